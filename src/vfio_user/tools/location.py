"""Places in a device, as people write them: ``bar0+0x10:u32``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfio_user.errors import UsageError
from vfio_user.wire.constants import PciRegion

REGIONS = {region.name.lower(): int(region) for region in PciRegion}
WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}

_LOCATION = re.compile(r"(?P<region>\w+)(?:\+(?P<offset>\w+))?(?::(?P<width>\w+))?")


@dataclass(frozen=True, slots=True)
class Location:
    """A region's index, an offset in it and a width, both in bytes."""

    region: int
    offset: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Location:
        """``REGION[+OFFSET][:WIDTH]``: config, rom, bar0 to bar5 or an index; u8 u16 u32 (the default) u64."""
        match = _LOCATION.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is no place: write it like bar0+0x10:u32")
        name, offset, width = match.groups()
        return cls(_region(name), _number(offset or "0"), _width(width or "u32"))

    def __str__(self) -> str:
        region = next((name for name, index in REGIONS.items() if index == self.region), str(self.region))
        width = next(name for name, size in WIDTHS.items() if size == self.width)
        return f"{region}+{self.offset:#x}:{width}"


def parse_assignment(text: str) -> tuple[Location, int]:
    """``LOCATION=VALUE``."""
    place, found, value = text.partition("=")
    location = Location.parse(place)
    if not found:
        raise UsageError(f"{text!r} has no value: write it like bar0+0x4:u32=0x1234")
    number = _number(value)
    if number >= 1 << 8 * location.width:
        raise UsageError(f"{value} does not fit in {location.width} bytes")
    return location, number


def _region(name: str) -> int:
    if name.lower() in REGIONS:
        return REGIONS[name.lower()]
    if name.isdecimal():
        index = _number(name)
        if index >= 1 << 32:
            raise UsageError(f"region {index} does not fit in 32 bits")
        return index
    raise UsageError(f"{name!r} is no region: {', '.join(REGIONS)} or an index")


def _width(name: str) -> int:
    if name not in WIDTHS:
        raise UsageError(f"{name!r} is no width: {', '.join(WIDTHS)}")
    return WIDTHS[name]


def _number(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        raise UsageError(f"{text!r} is no number") from None
    if not 0 <= number < 1 << 64:
        raise UsageError(f"{text} does not fit in 64 bits")
    return number
