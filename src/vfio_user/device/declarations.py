"""What a device class declares besides its BARs: state that is saved, and options."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import TypeVar, cast

from vfio_user.errors import StreamError
from vfio_user.migration import encode_state

T = TypeVar("T")
Kind = TypeVar("Kind")

BOOLEANS = {True: ("true", "yes", "on", "1"), False: ("false", "no", "off", "0")}
"""How a boolean option is written."""
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True, slots=True)
class State:
    """A declared piece of state: what it is in a new device."""

    default: object

    def new(self) -> object:
        """A value of its own for a device that starts, or is reset."""
        return copy.deepcopy(self.default)

    def check(self, name: str, value: object) -> None:
        """Raise ValueError unless ``value`` is what a stream may have for the attribute ``name``.

        That is the default's type, and for bytes in place its length.
        """
        if isinstance(self.default, bytearray):
            if not isinstance(value, bytes) or len(value) != len(self.default):
                raise ValueError(f"{name} is {len(self.default)} bytes")
        elif type(value) is not type(self.default):
            raise ValueError(f"{name} is of type {type(self.default).__name__}, not {type(value).__name__}")

    def restored(self, name: str, value: object) -> object:
        """What the attribute ``name`` holds for a value of a stream. Raises ValueError for one that it cannot be."""
        self.check(name, value)
        in_place = isinstance(self.default, bytearray)
        return bytearray(value) if in_place and isinstance(value, bytes) else copy.deepcopy(value)


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a device class: what it is without being given, what it means, how text becomes its value."""

    default: object
    help: str
    parse: Callable[[str], object]

    def new(self) -> object:
        """The default, as a value of its own for one device."""
        return copy.deepcopy(self.default)


def state(default: T) -> T:
    """Declare a piece of a device's state: an attribute that a reset sets to ``default`` and a migration carries.

    An int (up to 64 bits), float, bool, str, bytes or bytearray, or a list or dict of those.
    """
    return cast(T, State(default))


def option(default: T, help: str, parse: Callable[[str], T] | None = None) -> T:
    """Declare an option: a keyword of the constructor, and ``-o NAME=VALUE`` of ``vfio-user serve``.

    ``parse`` turns text into the value and raises ValueError for what it cannot be; by default the type of
    ``default`` does.
    """
    return cast(T, Option(default, help, parse or _parser(default)))


def _parser(default: object) -> Callable[[str], object]:
    if isinstance(default, bool):
        return _parse_bool
    if isinstance(default, int):
        return _parse_int
    return type(default)


def _parse_int(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def _parse_bool(text: str) -> bool:
    for value, words in BOOLEANS.items():
        if text.lower() in words:
            return value
    raise ValueError(f"{text!r} is not true or false")


def parse_size(text: str) -> int:
    """Bytes, with K, M, G or T for the powers of 1024: for ``option(..., parse=parse_size)``. Raises ValueError."""
    shift = _UNITS.get(text[-1:].upper(), 0)
    return _parse_int(text[:-1] if shift else text) << shift


def check_states(declared: Mapping[str, State]) -> None:
    """Raise ValueError, which names it, for state that no stream can carry."""
    for name, one in declared.items():
        try:
            encode_state({name: saved_value(one.default)})
        except StreamError as error:
            raise ValueError(f"{error}: declare a type that state() names") from error


def check_options(declared: Mapping[str, Option]) -> None:
    """Raise ValueError, which names it, for an option that no text can fill."""
    for name, one in declared.items():
        if one.parse in _NOT_FROM_TEXT:
            kind = type(one.default).__name__
            raise ValueError(f"option {name!r}: text does not become a {kind} by itself: give it parse=")


_NOT_FROM_TEXT = (NoneType, bytes, bytearray, list, tuple, dict, set)


def declared_in(cls: type, kind: type[Kind]) -> dict[str, Kind]:
    """The attributes of one kind that a class and its bases declare, by name; a class hides what its bases have."""
    found: dict[str, Kind] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, kind):
                found[name] = value
            else:
                found.pop(name, None)
    return found


def saved_value(value: object) -> object:
    """A value of declared state as a stream holds it."""
    return bytes(value) if isinstance(value, bytearray) else value


def saved_values(declared: Mapping[str, State], device: object) -> dict[str, object]:
    """The declared state of ``device`` by name, for a stream.

    Raises ValueError, which names it, for a value that the other side would refuse: it is not of its default's type.
    """
    values = {name: saved_value(getattr(device, name)) for name in declared}
    for name, one in declared.items():
        one.check(name, values[name])
    return values


def restored_values(
    declared: Mapping[str, State], fields: Mapping[str, object], *, complete: bool
) -> dict[str, object]:
    """Declared state by name, from the fields of a stream.

    ``complete``: a field that is missing is an error; otherwise, in a stream of an older version, it has its default.
    Raises ValueError, which names the field.
    """
    unknown = [name for name in fields if name not in declared]
    missing = [name for name in declared if name not in fields]
    if unknown:
        raise ValueError(f"unknown state: {', '.join(unknown)}")
    if missing and complete:
        raise ValueError(f"missing state: {', '.join(missing)}")
    return {name: one.restored(name, fields[name]) if name in fields else one.new() for name, one in declared.items()}
