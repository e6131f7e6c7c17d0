"""Places in a device, as people write them: ``bar0+0x10:u32``, ``config+0..0x40``, ``config.command``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfio_user.errors import UsageError
from vfio_user.wire.constants import PciRegion

REGIONS = {region.name.lower(): int(region) for region in PciRegion}
WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}

_LOCATION = re.compile(r"(?P<region>\w+)(?:\+(?P<offset>\w+))?(?::(?P<width>\w+))?")
_EXTENT = re.compile(r"(?P<region>\w+)(?:\+(?P<start>\w+))?\.\.(?P<end>\w+)?(?::(?P<width>\w+))?")
_NAME = re.compile(r"(?P<name>[A-Za-z][\w@]*(?:\.[\w@]+)+)(?::(?P<width>\w+))?")


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
        return cls(_region(name), number(offset or "0"), _width(width or "u32"))

    def __str__(self) -> str:
        return f"{region_name(self.region)}+{self.offset:#x}:u{8 * self.width}"


@dataclass(frozen=True, slots=True)
class Extent:
    """A region's index and the bytes from ``start`` to ``end``, which is not among them; None: to the region's end.

    ``width``: of each access, in bytes; None: as many at once as there can be.
    """

    region: int
    start: int
    end: int | None
    width: int | None

    @classmethod
    def parse(cls, text: str) -> Extent:
        """``REGION[+START]..[END][:WIDTH]``; both are offsets in the region."""
        match = _EXTENT.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is no range: write it like bar0+0x10..0x40")
        region, start, end, width = match.groups()
        first, last = number(start or "0"), None if end is None else number(end)
        if last is not None and last <= first:
            raise UsageError(f"{text!r} ends before it begins: END is an offset in the region, as START is")
        return cls(_region(region), first, last, None if width is None else _width(width))

    def __str__(self) -> str:
        end = "" if self.end is None else f"{self.end:#x}"
        return f"{region_name(self.region)}+{self.start:#x}..{end}{f':u{8 * self.width}' if self.width else ''}"


@dataclass(frozen=True, slots=True)
class Name:
    """A register's name, which says where it is once the device is known; ``width`` in bytes, None: the register's."""

    name: str
    width: int | None = None

    @classmethod
    def parse(cls, text: str) -> Name:
        """``REGION.NAME[:WIDTH]``."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is no name: write it like config.command")
        name, width = match.groups()
        return cls(name, None if width is None else _width(width))

    def __str__(self) -> str:
        return self.name if self.width is None else f"{self.name}:u{8 * self.width}"


Place = Location | Extent | Name


def parse_place(text: str) -> Place:
    """A location, a range or a register's name. Raises UsageError."""
    kind = Extent if ".." in text else Name if "." in text else Location
    return kind.parse(text)


def parse_assignment(text: str) -> tuple[Location | Name, int]:
    """``PLACE=VALUE``, for a place that is no range. Raises UsageError, also for a value that does not fit."""
    left, found, right = text.partition("=")
    place = parse_place(left)
    if not found:
        raise UsageError(f"{text!r} has no value: write it like bar0+0x4:u32=0x1234")
    if isinstance(place, Extent):
        raise UsageError(f"{place} is a range, which takes no value")
    value = number(right)
    if isinstance(place, Location):
        check_fits(place, value)
    return place, value


def check_fits(location: Location, value: int) -> None:
    """Raises UsageError if ``value`` has more bits than there are at ``location``."""
    if value >= 1 << 8 * location.width:
        raise UsageError(f"{value:#x} does not fit in the {location.width} bytes of {location}")


def region_name(index: int) -> str:
    """What people write for a region: ``bar0``; its index, if it has no name."""
    return next((name for name, known in REGIONS.items() if known == index), str(index))


def _region(name: str) -> int:
    if name.lower() in REGIONS:
        return REGIONS[name.lower()]
    if name.isdecimal():
        index = number(name)
        if index >= 1 << 32:
            raise UsageError(f"region {index} does not fit in 32 bits")
        return index
    raise UsageError(f"{name!r} is no region: {', '.join(REGIONS)} or an index")


def _width(name: str) -> int:
    if name not in WIDTHS:
        raise UsageError(f"{name!r} is no width: {', '.join(WIDTHS)}")
    return WIDTHS[name]


def number(text: str) -> int:
    """A number as Python has them, of 64 bits. Raises UsageError."""
    try:
        value = int(text, 0)
    except ValueError:
        raise UsageError(f"{text!r} is no number") from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"{text} does not fit in 64 bits")
    return value
