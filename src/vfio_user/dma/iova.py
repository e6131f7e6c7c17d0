"""A table keyed by ranges of I/O virtual addresses."""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

ADDRESS_SPACE = 1 << 64
"""Bytes of the I/O virtual address space. A range may end here, and not beyond."""

_PAGE_SHIFT = 12
_MAX_RECENT = 1 << 15
"""Pages of which the table remembers whose they are: a few MiB at most."""


def check_range(address: int, size: int) -> None:
    """Raise OSError(EINVAL) unless ``[address, address + size)`` is a range of the address space, not empty."""
    if size <= 0 or address < 0 or address + size > ADDRESS_SPACE:
        raise OSError(errno.EINVAL, f"no range of a 64-bit address space: {address:#x}, {size:#x} bytes")


class IovaTable(Generic[T]):
    """Values keyed by ranges ``[address, address + size)``, in bytes, no two of which overlap.

    A lookup is one binary search, in a few entries or in 65,535 of them; one in a page that was looked up before is
    none at all. Ranges may be adjacent, and stay apart.
    Nothing is synchronised: whoever changes the table lets nobody look at it meanwhile, and an iterator must be
    used up before the next change.
    """

    __slots__ = ("_entries", "_recent", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._entries: list[tuple[int, int, T]] = []
        self._recent: dict[int, tuple[int, int, T]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[int, int, T]]:
        """Every ``(address, size, value)``, by rising address."""
        return iter(self._entries)

    def check(self, address: int, size: int) -> None:
        """Raise what :meth:`add` would raise for this range."""
        check_range(address, size)
        for start, length, _ in self.overlapping(address, size):
            raise OSError(
                errno.EEXIST,
                f"{address:#x}, {size:#x} bytes, overlaps {start:#x}, {length:#x} bytes",
            )

    def add(self, address: int, size: int, value: T) -> None:
        """Enter a range.

        Raises OSError: EEXIST where it overlaps another one, EINVAL where it is empty or leaves the address space.
        """
        self.check(address, size)
        position = bisect_left(self._starts, address)
        self._starts.insert(position, address)
        self._entries.insert(position, (address, size, value))

    def get(self, address: int, size: int) -> T | None:
        """The value of exactly this range, or None."""
        entry = self.find(address)
        return entry[2] if entry is not None and entry[:2] == (address, size) else None

    def remove(self, address: int, size: int) -> T:
        """Take out exactly this range and return its value. Raises OSError(ENOENT) where there is none."""
        entry = self.find(address)
        if entry is None or entry[:2] != (address, size):
            raise OSError(errno.ENOENT, f"no such range: {address:#x}, {size:#x} bytes")
        position = bisect_left(self._starts, address)
        del self._starts[position]
        del self._entries[position]
        self._recent = {}
        return entry[2]

    def find(self, address: int) -> tuple[int, int, T] | None:
        """The ``(start, size, value)`` whose range contains ``address``, or None."""
        recent, page = self._recent, address >> _PAGE_SHIFT
        entry = recent.get(page)
        if entry is not None and 0 <= address - entry[0] < entry[1]:
            return entry
        position = bisect_right(self._starts, address)
        if position:
            entry = self._entries[position - 1]
            if address - entry[0] < entry[1]:
                if len(recent) >= _MAX_RECENT:
                    recent.clear()
                recent[page] = entry
                return entry
        return None

    def overlapping(self, address: int, length: int) -> list[tuple[int, int, T]]:
        """Every ``(start, size, value)`` with a byte in ``[address, address + length)``, by rising address."""
        if length <= 0:
            return []
        position = bisect_right(self._starts, address)
        if position:
            start, size, _ = self._entries[position - 1]
            if address - start < size:
                position -= 1
        return self._entries[position : bisect_left(self._starts, address + length, position)]

    def clear(self) -> None:
        """Take out every range."""
        self._recent = {}
        self._starts.clear()
        self._entries.clear()
