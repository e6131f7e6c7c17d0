"""Base address registers as declarations.

Source: PCI Local Bus specification 3.0, section 6.2.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from mmap import PAGESIZE
from typing import cast

NUM_BARS = 6

_IO_SPACE = 0x1
_MEMORY_64 = 0x4
_PREFETCHABLE = 0x8

_MIN_IO, _MAX_IO = 4, 256
_MIN_MEMORY, _MAX_MEMORY_32, _MAX_MEMORY_64 = 16, 1 << 31, 1 << 63

Range = tuple[int, int]
"""(offset, size), in bytes."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: how many bytes of which space it claims, and whether memory stands behind it.

    ``memory`` makes it mmap-able by the client, but for the pages of the ``trapped`` ranges, whose accesses
    still come as messages.
    """

    size: int
    io: bool = field(default=False, kw_only=True)
    prefetchable: bool = field(default=False, kw_only=True)
    bits64: bool = field(default=False, kw_only=True)
    memory: bool = field(default=False, kw_only=True)
    trapped: tuple[Range, ...] = field(default=(), kw_only=True)

    def check(self) -> None:
        """Raise ValueError for a declaration that no PCI bus could carry out; config space asks, and says which BAR."""
        self._check_types()
        smallest, largest = self._limits()
        if self.size.bit_count() != 1 or not smallest <= self.size <= largest:
            raise ValueError(f"{self}: the size must be a power of two, {smallest:#x} to {largest:#x}")
        if self.io and (self.prefetchable or self.bits64 or self.memory):
            raise ValueError(f"{self}: I/O space is never prefetchable, bits64 or memory: drop these")
        if self.trapped and not self.memory:
            raise ValueError(f"{self}: only memory=True needs trapped: without it every access is a message")
        for offset, size in self.trapped:
            if offset < 0 or size < 1 or offset + size > self.size:
                raise ValueError(f"{self}: trapped ({offset:#x}, {size:#x}) is not a range inside the BAR")
        if self.memory and not self.mmap_areas:
            raise ValueError(f"{self}: trapped leaves no page to map: drop memory=True")

    @property
    def flags(self) -> int:
        """The read-only low bits of the register."""
        if self.io:
            return _IO_SPACE
        return _MEMORY_64 * self.bits64 | _PREFETCHABLE * self.prefetchable

    @property
    def width(self) -> int:
        """Bytes of the register: 8 if it takes the next one too."""
        return 8 if self.bits64 else 4

    @property
    def address_mask(self) -> int:
        """The bits of the address that can be written: the size as a guest measures it."""
        return (1 << 8 * self.width) - self.size

    @property
    def mmap_areas(self) -> tuple[Range, ...]:
        """What may be mapped, as (offset, size) of whole pages in order; empty without ``memory``."""
        return tuple(self._untrapped_pages()) if self.memory else ()

    @property
    def sparse_areas(self) -> tuple[Range, ...]:
        """:attr:`mmap_areas` as region information wants it: empty also where the whole BAR may be mapped."""
        return () if self.mmap_areas == ((0, self.size),) else self.mmap_areas

    def traps(self, offset: int, size: int) -> bool:
        """Whether every access to this range arrives as a message."""
        return not any(offset < at + length and at < offset + size for at, length in self.mmap_areas)

    def _check_types(self) -> None:
        size, trapped = cast(object, self.size), cast(object, self.trapped)
        if not isinstance(size, int):
            raise ValueError(f"{self}: the size must be an int")
        if not isinstance(trapped, tuple | list) or not all(_is_range(one) for one in trapped):
            raise ValueError(f"{self}: trapped has (offset, size) pairs: write ((0, 0x1000),) for one")

    def _limits(self) -> tuple[int, int]:
        if self.io:
            return _MIN_IO, _MAX_IO
        largest = _MAX_MEMORY_64 if self.bits64 else _MAX_MEMORY_32
        return (PAGESIZE if self.memory else _MIN_MEMORY), largest

    def _untrapped_pages(self) -> Iterator[Range]:
        free = 0
        for offset, size in sorted(self.trapped):
            start = offset // PAGESIZE * PAGESIZE
            if start > free:
                yield free, start - free
            free = max(free, -(-(offset + size) // PAGESIZE) * PAGESIZE)
        if free < self.size:
            yield free, self.size - free


def _is_range(one: object) -> bool:
    return isinstance(one, tuple | list) and len(one) == 2 and all(isinstance(number, int) for number in one)
