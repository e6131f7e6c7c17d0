"""What the options of filters are written like: durations, rates, errno names, regions."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vfio_user.errors import UsageError
from vfio_user.wire.constants import PCI_NUM_REGIONS, PciRegion

MAX_DELAY = 60.0
"""Seconds. The connection is served by the thread that sleeps: it hears of nothing meanwhile, not of its end either."""

_SECONDS = {"": 1, "s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_SHARES = {"": 1, "%": 100}
_NUMBER = re.compile(r"(?P<number>\d{1,15}(?:\.\d{1,15})?)(?P<unit>[a-z%]*)", re.ASCII)
_BOOLEANS = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}


class Form(NamedTuple):
    """How a value is written, in one word for the help, and what makes it of text. That raises ValueError."""

    metavar: str
    parse: Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Setting:
    """An option of a filter: how it is written and what it means."""

    form: Form
    help: str


def _quantity(text: str, units: dict[str, int], remedy: str) -> float:
    """A number and a unit, of which ``units`` says how many make a whole."""
    match = _NUMBER.fullmatch(text)
    if match is None or match["unit"] not in units:
        raise ValueError(remedy)
    return float(match["number"]) / units[match["unit"]]


def parse_duration(text: str) -> float:
    """Seconds, from a number with s (the default), ms, us or ns behind it."""
    seconds = _quantity(text, _SECONDS, "write a time like 5ms, 100us or 0.5s")
    if seconds > MAX_DELAY:
        raise ValueError(f"{MAX_DELAY:.0f}s is the most")
    return seconds


def parse_rate(text: str) -> float:
    """0 to 1, from a number or from percent."""
    rate = _quantity(text, _SHARES, "write a rate like 10% or 0.1")
    if rate > 1:
        raise ValueError("a rate is at most 100%, or 1")
    return rate


def parse_errno(text: str) -> int:
    """An errno, from its name or its number."""
    number = getattr(errno, text.upper(), None) if text.isalnum() and not text.isdecimal() else parse_number(text)
    if not isinstance(number, int) or number not in errno.errorcode:
        raise ValueError("write an errno like EIO or 5")
    return number


def parse_number(text: str) -> int:
    """A number that is not negative, of at most 18 digits."""
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise ValueError("write a number that is not negative")
    return int(text)


def parse_region(text: str) -> int:
    """The index of a region, from its name (bar0, config) or its number."""
    names = {region.name.lower(): int(region) for region in PciRegion}
    if text.lower() in names:
        return names[text.lower()]
    if text.isascii() and text.isdecimal() and len(text) <= 2 and int(text) < PCI_NUM_REGIONS:
        return int(text)
    raise ValueError(f"a region is one of {', '.join(names)}, or an index below {PCI_NUM_REGIONS}")


def parse_text(text: str) -> str:
    """Any text but none at all."""
    if not text:
        raise ValueError("write a text")
    return text


def parse_flag(text: str) -> bool:
    """A boolean, from yes or no."""
    if text.lower() not in _BOOLEANS:
        raise ValueError("write yes or no")
    return _BOOLEANS[text.lower()]


def region_name(index: int) -> str:
    """``bar0``, ``config``; a region that PCI has no name for is ``region 12``."""
    return PciRegion(index).name.lower() if 0 <= index < PCI_NUM_REGIONS else f"region {index}"


def errno_name(number: int) -> str:
    """``EIO``; a number that is no errno of this system stays one."""
    return errno.errorcode.get(number, str(number))


DURATION = Form("TIME", parse_duration)
RATE = Form("RATE", parse_rate)
ERRNO = Form("ERRNO", parse_errno)
NUMBER = Form("N", parse_number)
REGION = Form("REGION", parse_region)
FLAG = Form("YES|NO", parse_flag)
TEXT = Form("TEXT", parse_text)


def no_such(what: str, name: str, known: Mapping[str, object]) -> UsageError:
    """The error for a name that is none, which lists those that are."""
    return UsageError(f"no {what} {name!r}; there are: {', '.join(sorted(known)) or 'none'}")
