"""The DMA log of a device that another server has."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Protocol

from bitarray import bitarray
from bitarray.util import intervals

from vfio_user.dma.bitmap import MIN_LOG_PAGE, DirtyLog
from vfio_user.dma.iova import ADDRESS_SPACE, IovaTable

MOST_PAGES = 1 << 28
"""Pages that are asked for at once: a bitmap of 32 MiB, for 1 TiB in pages of 4 KiB. Regions are not cut before that:
libvfio-user reports them as a whole only."""


class RemoteLog(Protocol):
    """What the server does; each raises OSError. ``busy``: it must not be asked now."""

    @property
    def busy(self) -> bool: ...
    def start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int: ...
    def stop(self) -> None: ...
    def report(self, iova: int, length: int, page_size: int) -> bytes: ...


class UpstreamLog(DirtyLog):
    """A log whose marks are fetched from the server that logs, before anyone looks at them.

    To fetch a mark takes it away there; it is kept here then, whatever becomes of what it was fetched for.
    """

    def __init__(self, remote: RemoteLog) -> None:
        super().__init__()
        self._remote = remote
        self._remote_page_size = 0
        self._covered: IovaTable[None] | None = None  # what is logged there; None: everything

    def start(self, page_size: int, ranges: Sequence[tuple[int, int]] = ()) -> int:
        """As ever; raises also what the server refuses with. Its pages may be of another size than those here."""
        remote_page_size, covered = self._start_there(page_size, ranges)
        try:
            chosen = super().start(page_size, ranges)
        except BaseException:
            if not self.active:
                self._remote.stop()
            raise
        self._remote_page_size, self._covered = max(remote_page_size, MIN_LOG_PAGE), covered
        return chosen

    def _start_there(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> tuple[int, IovaTable[None] | None]:
        """The page size that the server chose, and what it logs."""
        try:
            return self._remote.start(page_size, ranges), _table(ranges) if ranges else None
        except OSError as error:
            if ranges or error.errno != errno.EINVAL:
                raise
        # The kernel wants to be told what it is to log, and so may a server: what is mapped now.
        mapped = _whole_pages([(address, size) for address, size, region in self._regions if region.logged], page_size)
        return self._remote.start(page_size, mapped), _table(mapped)

    def stop(self) -> None:
        """As ever; raises what the server refuses with."""
        self._remote.stop()
        super().stop()

    def take(self) -> list[tuple[int, int]]:
        self._fetch()
        return super().take()

    def count(self) -> int:
        if not self._remote.busy:
            self._fetch()
        return super().count()

    def report(self, iova: int, length: int, page_size: int, out: memoryview) -> None:
        self._fetch(iova, length)
        super().report(iova, length, page_size, out)

    def fetch_last(self, address: int, size: int) -> None:
        """Before the server unmaps a region, and forgets its marks: all of it counts as dirty if it does not tell."""
        if self.active:
            try:
                self._fetch(address, size)
            except OSError:
                self.mark(address, size)

    def _fetch(self, iova: int = 0, length: int = ADDRESS_SPACE) -> None:
        """Mark what the server has marked since in the regions of a range; all of what it does not log."""
        for address, size, region in self._regions.overlapping(iova, length):
            for start, count in self._in_ranges(address, size) if region.logged else ():
                if self._is_covered(start, count):
                    self._fetch_part(start, count)
                else:
                    self.mark(start, count)

    def _is_covered(self, address: int, length: int) -> bool:
        if self._covered is None:
            return True
        found = self._covered.find(address)
        return found is not None and address + length <= found[0] + found[1]

    def _fetch_part(self, address: int, length: int) -> None:
        page = self._remote_page_size
        step = page * MOST_PAGES
        for start in range(address, address + length, step):
            size = min(step, address + length - start)
            bits = bitarray(endian="little")
            bits.frombytes(self._remote.report(start, size, page))
            del bits[-(-size // page) :]
            for dirty, first, stop in intervals(bits):
                if dirty:
                    self.mark(start + first * page, (stop - first) * page)


def _table(ranges: Iterable[tuple[int, int]]) -> IovaTable[None]:
    table: IovaTable[None] = IovaTable()
    for iova, length in ranges:
        table.add(iova, length, None)
    return table


def _whole_pages(ranges: Iterable[tuple[int, int]], page_size: int) -> list[tuple[int, int]]:
    """Sorted (iova, length) ranges, widened to whole pages, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for address, size in ranges:
        start, end = address & -page_size, -(-(address + size) // page_size) * page_size
        if joined and start <= sum(joined[-1]):
            start = joined.pop()[0]
        joined.append((start, end - start))
    return joined
