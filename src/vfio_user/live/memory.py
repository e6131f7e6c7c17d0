"""Guest memory that moves: which pages are still to be copied, and the copying."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bitarray import bitarray
from bitarray.util import intervals

PIECE = 1 << 20
"""Most bytes that are copied at once."""

DirtyRanges = Callable[[], Iterable[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A piece of guest memory, the same guest address on both sides. Sizes and addresses in bytes, page-aligned."""

    address: int
    source: memoryview
    destination: memoryview

    def __post_init__(self) -> None:
        if len(self.source) != len(self.destination):
            raise ValueError(f"{len(self.source)} bytes of memory here, {len(self.destination)} there")

    @property
    def size(self) -> int:
        return len(self.source)


class MemoryCopy:
    """Copies guest memory page by page; what is dirty is copied again.

    ``guest_dirty``, if given, returns the (address, length) ranges that the guest's own processors wrote since it was
    asked before: the device's log does not know of those.
    """

    def __init__(self, regions: Sequence[MemoryRegion], page_size: int, guest_dirty: DirtyRanges | None = None) -> None:
        self.regions = regions
        self.page_size = page_size
        self.guest_dirty = guest_dirty
        self._dirty = [bitarray(-(-region.size // page_size)) for region in regions]
        for bits in self._dirty:
            bits.setall(True)

    @property
    def dirty_pages(self) -> int:
        """Pages that must still be copied."""
        return sum(bits.count() for bits in self._dirty)

    def collect(self, report: Callable[[int, int, int], bytes]) -> None:
        """Take as dirty what ``report(iova, length, page_size)``, a device's log, and the guest say."""
        for region, bits in zip(self.regions, self._dirty, strict=True):
            log = bitarray(endian="little")
            log.frombytes(report(region.address, region.size, self.page_size))
            bits |= bitarray(log[: len(bits)], endian=bits.endian)
        if self.guest_dirty is not None:
            for address, length in self.guest_dirty():
                self.mark(address, length)

    def mark(self, address: int, length: int) -> None:
        """Take [address, address + length) as dirty, as far as it is memory that moves."""
        for region, bits in zip(self.regions, self._dirty, strict=True):
            start = max(address, region.address) - region.address
            end = min(address + length, region.address + region.size) - region.address
            if start < end:
                bits[start // self.page_size : -(-end // self.page_size)] = True

    def copy(self, pace: Callable[[int], None]) -> int:
        """Copy every dirty page; they are clean from now on. Returns how many there were.

        ``pace`` hears, piece by piece, how many bytes were copied so far, and may take its time.
        """
        pages = 0
        for region, bits in zip(self.regions, self._dirty, strict=True):
            pending = bitarray(bits)
            bits.setall(False)
            for first, stop in self._pieces(pending):
                part = slice(first * self.page_size, stop * self.page_size)
                region.destination[part] = region.source[part]
                pages += stop - first
                pace(pages * self.page_size)
        return pages

    def _pieces(self, pending: bitarray) -> Iterator[tuple[int, int]]:
        """Runs of dirty pages, (first, stop), none of them longer than PIECE."""
        most = max(1, PIECE // self.page_size)
        for value, first, stop in intervals(pending):
            if value:
                for start in range(first, stop, most):
                    yield start, min(start + most, stop)
