"""Guest memory that moves: which pages are still to be sent, and the pieces in which they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bitarray import bitarray
from bitarray.util import intervals, zeros

from vfio_user.wire.constants import PAGE_SIZE

PIECE = 1 << 20
"""Most bytes that go at once."""

DirtyRanges = Callable[[], Iterable[tuple[int, int]]]
"""Gives the (address, length) ranges that the guest's own processors wrote since it was asked before."""

DeviceLog = Callable[[int, int, int], bytes]
"""``dma_logging_report(iova, length, page_size)`` of a device."""


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A piece of guest memory: its address there, and the memory itself. In bytes, page-aligned."""

    address: int
    memory: memoryview

    @property
    def size(self) -> int:
        return len(self.memory)


class DirtyMemory:
    """Which pages of guest memory are still to be sent: at first all.

    The devices' logs know what DMA wrote. ``guest_dirty``, if given, knows what the guest's processors did.
    """

    def __init__(self, regions: Sequence[MemoryRegion], page_size: int, guest_dirty: DirtyRanges | None = None) -> None:
        self.regions = regions
        self.page_size = page_size
        self._guest_dirty = guest_dirty
        self._dirty = [bitarray(-(-region.size // page_size), endian="little") for region in regions]
        for bits in self._dirty:
            bits.setall(True)

    @property
    def pages(self) -> int:
        """Pages that are still to be sent."""
        return sum(bits.count() for bits in self._dirty)

    def collect(self, logs: Sequence[DeviceLog]) -> None:
        """Take as dirty what the logs and the guest say."""
        for region, bits in zip(self.regions, self._dirty, strict=True):
            for report in logs:
                log = bitarray(endian="little")
                log.frombytes(report(region.address, region.size, self.page_size))
                bits |= log[: len(bits)]
        if self._guest_dirty is not None:
            for address, length in self._guest_dirty():
                self.mark(address, length)

    def mark(self, address: int, length: int) -> None:
        """Take [address, address + length) as dirty, as far as it is memory that moves."""
        for region, bits in zip(self.regions, self._dirty, strict=True):
            start = max(address, region.address) - region.address
            end = min(address + length, region.address + region.size) - region.address
            if start < end:
                bits[start // self.page_size : -(-end // self.page_size)] = True

    def take(self) -> Iterator[tuple[int, memoryview]]:
        """The dirty memory as (address, piece), none larger than PIECE; a page counts as sent from when it is taken.

        What is dirtied meanwhile is found by the next :meth:`collect`: it must come after these pieces were read.
        """
        for region, bits in zip(self.regions, self._dirty, strict=True):
            for first, stop in self._pieces(bits.copy()):
                bits[first:stop] = False
                start, end = first * self.page_size, min(stop * self.page_size, region.size)
                yield region.address + start, region.memory[start:end]

    def _pieces(self, pending: bitarray) -> Iterator[tuple[int, int]]:
        """Runs of dirty pages, (first, stop), none of them longer than PIECE."""
        most = max(1, PIECE // self.page_size)
        for value, first, stop in intervals(pending):
            if value:
                for start in range(first, stop, most):
                    yield start, min(start + most, stop)


class TornMemory:
    """Pages of guest memory that came torn, and have not come whole since. A region is its (address, size)."""

    def __init__(self) -> None:
        self._torn: dict[tuple[int, int], bitarray] = {}  # a bit for each page; regions without such a page have none

    @property
    def first(self) -> int | None:
        """Where there is such a page."""
        return next((address + pages.find(True) * PAGE_SIZE for (address, _), pages in self._torn.items()), None)

    def add(self, region: tuple[int, int], address: int, size: int) -> None:
        """[address, address + size) of ``region`` came torn."""
        pages = self._torn.setdefault(region, zeros(-(-region[1] // PAGE_SIZE)))
        start = address - region[0]
        pages[start // PAGE_SIZE : -(-(start + size) // PAGE_SIZE)] = True

    def heal(self, region: tuple[int, int], address: int, size: int) -> None:
        """[address, address + size) of ``region`` came whole. What is left of a page at either end does not count."""
        if (pages := self._torn.get(region)) is None:
            return
        start, end = address - region[0], address - region[0] + size
        pages[-(-start // PAGE_SIZE) : len(pages) if end == region[1] else end // PAGE_SIZE] = False
        if not pages.any():
            del self._torn[region]


def place(regions: Sequence[MemoryRegion], address: int, size: int) -> memoryview:
    """The memory at [address, address + size). Raises ValueError if that is not inside of one region."""
    for region in regions:
        start = address - region.address
        if start >= 0 and start + size <= region.size:
            return region.memory[start : start + size]
    raise ValueError(f"{size:#x} bytes at {address:#x} are not inside the guest's memory")
