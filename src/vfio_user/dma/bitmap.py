"""Which pages of the guest's memory a device has written: dirty bitmaps and DMA logging.

A *log page* is what a mark makes dirty: a page of the size that DMA_LOGGING_START chose. A *report page* is what a
bit of a report stands for: a page of the size that DMA_LOGGING_REPORT asks for, counted from the first address of
the report. Both are powers of two; neither needs to fit the other, nor the regions of guest memory.

Sources: vfio-user specification, sections "VFIO_DEVICE_FEATURE_DMA_LOGGING_START" and "_REPORT"; ``linux/vfio.h``.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from bitarray import bitarray

from .iova import ADDRESS_SPACE, IovaTable, check_range

MIN_LOG_PAGE = 4096
MAX_LOG_PAGE = 1 << 30
MAX_LOG_MEMORY = 256 << 20
"""Bytes that all bitmaps of one log may take: those of 8 TiB in pages of 4 KiB."""
MAX_PIECES = 65536
"""Pieces of pages that one log remembers as still dirty after reports that ended within a page."""
MAX_UNMAPPED = 1024
"""Bitmaps of unmapped memory that one log keeps, together of no more than MAX_LOG_MEMORY, beside those in use."""

_ROUND_COST = 128
"""What one round of a Python loop over a bitmap costs, in bits that a strided copy moves in the same time."""
_FEW_ROUNDS = 8
"""Rounds that cost no more than to set up anything better."""


def check_page_size(page_size: int) -> None:
    """Raise OSError(EINVAL) unless ``page_size`` is a power of two, and one of the address space."""
    if page_size <= 0 or page_size & (page_size - 1) or page_size >= ADDRESS_SPACE:
        raise OSError(errno.EINVAL, f"page size is no power of two: {page_size:#x}")


def check_logging_ranges(page_size: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Raise OSError(EINVAL) unless a log can be started with ``(iova, length)`` pairs in bytes.

    Each range lies in the address space, begins and ends at a page and overlaps no other one.
    """
    check_page_size(page_size)
    seen: IovaTable[None] = IovaTable()
    for iova, length in ranges:
        check_range(iova, length)
        if (iova | length) & (page_size - 1):
            raise OSError(errno.EINVAL, f"range {iova:#x}, {length:#x} bytes, is not in pages of {page_size:#x}")
        if seen.overlapping(iova, length):
            raise OSError(errno.EINVAL, f"range {iova:#x}, {length:#x} bytes, overlaps another one")
        seen.add(iova, length, None)


def check_report(iova: int, length: int, page_size: int) -> None:
    """Raise OSError(EINVAL) unless ``[iova, iova + length)`` can be reported in pages of ``page_size``."""
    check_page_size(page_size)
    check_range(iova, length)


def bitmap_size(length: int, page_size: int) -> int:
    """Bytes of a report of ``length`` bytes: a bit per page, in whole words of 64 bits."""
    return -(-length // (page_size * 64)) * 8


def clear_bitmap(bitmap: memoryview) -> None:
    """Set every byte to 0."""
    bitarray(buffer=bitmap).setall(0)


def page_count(address: int, size: int, page_size: int) -> int:
    """How many pages have a byte in ``[address, address + size)``."""
    return (address + size - 1) // page_size - address // page_size + 1


class PieceBudget:
    """How many pieces of pages the bitmaps of one log may still remember."""

    __slots__ = ("left",)

    def __init__(self, left: int = MAX_PIECES) -> None:
        self.left = left


class DirtyBitmap:
    """The dirty pages of ``[address, address + size)``: bit n is page ``address // page_size + n``.

    The range need not begin or end at a page: of a page that it shares, only its own part counts. A page that was
    reported in part is still dirty in the rest: the pieces are remembered, in bytes, as long as ``budget`` lasts.
    Beyond that the page stays dirty as a whole: reporting too much is safe, forgetting is not.
    """

    __slots__ = ("_bits", "_budget", "_bytes", "_end", "_first_page", "_pieces", "_shift", "address", "size")

    def __init__(self, address: int, size: int, page_size: int, budget: PieceBudget | None = None) -> None:
        """Raises OSError(EINVAL) for a range outside the address space or a page size that is no power of two."""
        check_range(address, size)
        check_page_size(page_size)
        self.address = address
        self.size = size
        self._end = address + size
        self._shift = page_size.bit_length() - 1
        self._first_page = address >> self._shift
        self._bits = bitarray(page_count(address, size, page_size), endian="little")
        self._bytes = memoryview(self._bits)
        self._pieces: dict[int, list[tuple[int, int]]] = {}
        self._budget = budget if budget is not None else PieceBudget()

    @property
    def nbytes(self) -> int:
        """Bytes that the bits take."""
        return self._bytes.nbytes

    def count(self) -> int:
        """How many pages are dirty, in whole or in part."""
        return self._bits.count(1)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(address, size) of what is dirty, in runs of whole pages, cut to the range."""
        begin = self._bits.find(1)
        while begin >= 0:
            end = self._bits.find(0, begin)
            if end < 0:
                end = len(self._bits)
            start = max(self._page_address(begin), self.address)
            yield start, min(self._page_address(end), self._end) - start
            begin = self._bits.find(1, end)

    def clear(self) -> None:
        """Make every page clean."""
        self._bits.setall(0)
        self._budget.left += sum(map(len, self._pieces.values()))
        self._pieces.clear()

    def mark(self, address: int, length: int) -> None:
        """Make every page dirty that has a byte in ``[address, address + length)``, as far as it is in the range."""
        end = address + length
        if end > self._end:
            end = self._end
        if address < self.address:
            address = self.address
        if address >= end:
            return
        first = (address >> self._shift) - self._first_page
        last = (end - 1 >> self._shift) - self._first_page
        if first == last:
            self._bits[first] = 1
        else:
            self._bits[first : last + 1] = 1
        if self._pieces:
            for page in self._pages_in_pieces(first, last):
                self._forget_pieces(page)

    def report(self, iova: int, length: int, page_size: int, out: memoryview) -> None:
        """Say what is dirty in ``[iova, iova + length)``, and make exactly that clean.

        Bit ``n % 8`` of byte ``n // 8`` of ``out`` is set where page ``n``, counted from ``iova`` in pages of
        ``page_size``, has a dirty byte; no bit is cleared. ``out`` has at least :func:`bitmap_size` bytes.
        """
        low, high = max(iova, self.address), min(iova + length, self._end)
        if low < high:
            self._report(low, high, _Report(iova, page_size, out))

    def move_to(self, other: DirtyBitmap) -> None:
        """Make dirty there, in whole pages, what is dirty here of the range of ``other``, and exactly that clean here.

        Both have the same page size, and no page of ``other`` was reported in part.
        """
        low, high = max(self.address, other.address), min(self._end, other._end)
        if low < high:
            self._report(low, high, _Report(other._page_address(0), 1 << self._shift, other._bytes))

    def _report(self, low: int, high: int, report: _Report) -> None:
        """Report and clean [low, high), which lies in the range and is not empty."""
        first = (low >> self._shift) - self._first_page
        last = (high - 1 >> self._shift) - self._first_page
        within_page = (1 << self._shift) - 1
        cut_first = low & within_page != 0
        cut_last = high & within_page != 0
        if self._pieces:
            for page in self._pages_in_pieces(first, last):
                self._report_pieces(page, low, high, report)
        if cut_first:
            self._report_pieces(first, low, high, report)
        if cut_last:
            self._report_pieces(last, low, high, report)
        self._report_pages(first + cut_first, last + 1 - cut_last, report)

    def _page_address(self, page: int) -> int:
        return self._first_page + page << self._shift

    def _report_pages(self, start: int, stop: int, report: _Report) -> None:
        """Report and clean the pages [start, stop), which lie in the range and in the report as a whole."""
        if start >= stop:
            return
        start = self._bits.find(1, start, stop)
        if start < 0:
            return
        stop = self._bits.find(1, start, stop, right=True) + 1
        offset = self._page_address(start) - report.iova
        position = offset >> report.shift
        if self._shift == report.shift and offset == position << report.shift and (position - start) % 8 == 0:
            self._move_bytes(start, stop, position, report)
        else:
            report.add_pages(self._bits, start, stop, offset, self._shift)
            self._bits[start:stop] = 0

    def _move_bytes(self, start: int, stop: int, position: int, report: _Report) -> None:
        """Move the bits [start, stop) to ``position``, which is as far from a byte's first bit as ``start``."""
        first, end = (start + 7) // 8, stop // 8
        if first >= end:
            report.add_bits(position, self._bits[start:stop])
        else:
            target = first + (position - start) // 8
            report.add_bytes(target, self._bytes[first:end])
            if start < first * 8:
                report.add_bits(position, self._bits[start : first * 8])
            if end * 8 < stop:
                report.add_bits(position + end * 8 - start, self._bits[end * 8 : stop])
        self._bits[start:stop] = 0

    def _report_pieces(self, page: int, low: int, high: int, report: _Report) -> None:
        """Report and clean what is dirty of one page in [low, high), and remember what is dirty outside."""
        if not self._bits[page]:
            return
        inside, outside = _split(self._pieces.get(page) or [self._extent(page)], low, high)
        for start, end in inside:
            report.add_range(start, end)
        if inside:
            self._forget_pieces(page)
            self._remember_pieces(page, outside)

    def _extent(self, page: int) -> tuple[int, int]:
        """Where the part of a page that belongs to the range begins and ends."""
        return max(self._page_address(page), self.address), min(self._page_address(page + 1), self._end)

    def _remember_pieces(self, page: int, pieces: list[tuple[int, int]]) -> None:
        if not pieces:
            self._bits[page] = 0
        elif len(pieces) <= self._budget.left:
            self._budget.left -= len(pieces)
            self._pieces[page] = pieces

    def _forget_pieces(self, page: int) -> None:
        self._budget.left += len(self._pieces.pop(page, ()))

    def _pages_in_pieces(self, first: int, last: int) -> list[int]:
        if last - first < len(self._pieces):
            return [page for page in range(first, last + 1) if page in self._pieces]
        return [page for page in self._pieces if first <= page <= last]


class _Report:
    """The bits of a report that is being filled in."""

    __slots__ = ("_bits", "_out", "iova", "shift")

    def __init__(self, iova: int, page_size: int, out: memoryview) -> None:
        self.iova = iova
        self.shift = page_size.bit_length() - 1
        self._out = out
        self._bits = bitarray(buffer=out, endian="little")

    def add_range(self, start: int, end: int) -> None:
        """Set the bits of the addresses [start, end)."""
        self._bits[start - self.iova >> self.shift : (end - 1 - self.iova >> self.shift) + 1] = 1

    def add_bits(self, position: int, bits: bitarray) -> None:
        """Set the bits that are set in ``bits``, from ``position`` on."""
        self._bits[position : position + len(bits)] |= bits

    def add_bytes(self, position: int, source: memoryview) -> None:
        """The same for whole bytes, from byte ``position`` on. Both sides are used in place: nothing is copied."""
        target = bitarray(buffer=self._out[position : position + len(source)], endian="little")
        target |= bitarray(buffer=source, endian="little")

    def add_pages(self, bits: bitarray, start: int, stop: int, offset: int, shift: int) -> None:
        """Set the bits of those pages of ``1 << shift`` bytes that are set in ``bits[start:stop]``.

        ``offset`` is how far the first of them is from the report's first address, in bytes.

        There are two ways. A round of a loop per run of dirty pages (and, with larger report pages, at most one
        per report page) is good for few runs, however long; moving every bit a few times is good for many.
        """
        count = stop - start
        dirty = bits.count(1, start, stop)
        covered = (count << shift >> self.shift) + 2
        rounds = min(dirty, count - dirty + 1, covered)
        if rounds <= _FEW_ROUNDS + max(count, covered) // _ROUND_COST:
            self._add_runs(bits, start, stop, offset, shift)
        elif shift >= self.shift:
            self._add_spread(bits[start:stop], offset, shift - self.shift)
        else:
            self._add_gathered(bits[start:stop], offset, shift)

    def _add_runs(self, bits: bitarray, start: int, stop: int, offset: int, shift: int) -> None:
        begin = bits.find(1, start, stop)
        while begin >= 0:
            end = bits.find(0, begin, stop)
            if end < 0:
                end = stop
            first = offset + (begin - start << shift) >> self.shift
            after = (offset + (end - start << shift) - 1 >> self.shift) + 1
            self._bits[first:after] = 1
            # Go on with the page that has the first byte whose report bit is not set yet.
            following = start + ((after << self.shift) - offset >> shift)
            begin = bits.find(1, min(following, stop), stop)

    def _add_spread(self, bits: bitarray, offset: int, ratio_shift: int) -> None:
        """Each bit becomes ``1 << ratio_shift`` bits, and one more where pages begin within a report page."""
        spread = bitarray(len(bits) << ratio_shift, endian="little")
        spread[:: 1 << ratio_shift] = bits
        for step in range(ratio_shift):
            spread |= spread >> (1 << step)
        position = offset >> self.shift
        self.add_bits(position, spread)
        if offset != position << self.shift:
            self.add_bits(position + 1, spread)

    def _add_gathered(self, bits: bitarray, offset: int, shift: int) -> None:
        """Every ``1 << (self.shift - shift)`` bits become one, and count for two where a page lies across a border."""
        ratio_shift = self.shift - shift
        page = 1 << shift
        for byte in (offset, offset + page - 1) if offset % page else (offset,):
            position, phase = byte >> self.shift, (byte >> shift) % (1 << ratio_shift)
            gathered = bitarray(phase, endian="little") + bits
            for step in range(ratio_shift):
                gathered |= gathered << (1 << step)
            self.add_bits(position, gathered[:: 1 << ratio_shift])


def _split(pieces: list[tuple[int, int]], low: int, high: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Cut (start, end) pieces in what lies in [low, high) and what does not."""
    inside, outside = [], []
    for start, end in pieces:
        cuts = (start, min(max(low, start), end), max(min(high, end), start), end)
        inside.append(cuts[1:3])
        outside += [cuts[0:2], cuts[2:4]]
    return [p for p in inside if p[0] < p[1]], [p for p in outside if p[0] < p[1]]


class UnmappedMarks:
    """What was dirty of memory when that was unmapped, until the same memory is mapped there again.

    True: there is some, or was some that there was no room for.
    """

    __slots__ = ("_kept", "_lost")

    def __init__(self) -> None:
        self._kept: list[tuple[Hashable, DirtyBitmap]] = []
        self._lost = False

    def __bool__(self) -> bool:
        return self._lost or bool(self._kept)

    def keep(self, memory: Hashable, bitmap: DirtyBitmap) -> None:
        """Take over the bitmap of what ``memory`` was mapped."""
        if bitmap.count():
            self._kept.append((memory, bitmap))
        nbytes = sum(kept.nbytes for _, kept in self._kept)
        if self._lost or len(self._kept) > MAX_UNMAPPED or nbytes > MAX_LOG_MEMORY:
            self.clear()
            self._lost = True

    def give_back(self, memory: Hashable, bitmap: DirtyBitmap) -> None:
        """``memory`` is mapped where ``bitmap``, a new one, says: what is known to be dirty of it goes there."""
        for entry in list(self._kept):
            known, kept = entry
            if known == memory:
                kept.move_to(bitmap)
                if not kept.count():
                    self._kept.remove(entry)

    def clear(self) -> None:
        for _, bitmap in self._kept:
            bitmap.clear()
        self._kept.clear()
        self._lost = False


class _Mapped(NamedTuple):
    """A region: see :meth:`DirtyLog.map`."""

    logged: bool
    memory: Hashable


class DirtyLog:
    """DMA logging of one device: which pages it wrote, of what is mapped and in the ranges that were asked for.

    There is a bitmap for each part of a mapped region that lies in a range, made when logging starts or the region
    is mapped, gone when logging stops or the region is unmapped. What is dirty then and was not reported is dirty
    again when the same memory is mapped there again: a VMM maps its regions anew whenever they change at an end, and
    need not ask what was dirty before.

    ``lock`` is held during each call. A device whose threads mark pages while another one reports gives a
    ``threading.Lock``, or marks that fall into a report may be lost.
    """

    def __init__(self, lock: AbstractContextManager[object] | None = None) -> None:
        self._lock: AbstractContextManager[object] = lock if lock is not None else nullcontext()
        self._regions: IovaTable[_Mapped] = IovaTable()
        self._reset()

    def _reset(self) -> None:
        self._asked: tuple[int, tuple[tuple[int, int], ...]] | None = None
        self._page_size = 0
        self._nbytes = 0
        self._budget = PieceBudget()
        self._ranges: IovaTable[None] = IovaTable()
        self._bitmaps: IovaTable[DirtyBitmap] = IovaTable()
        self._unmapped = UnmappedMarks()

    @property
    def active(self) -> bool:
        return self._asked is not None

    @property
    def page_size(self) -> int:
        """Bytes of a log page, 0 while logging is off."""
        return self._page_size

    @property
    def incomplete(self) -> bool:
        """Whether pages are dirty that nobody can be told of: of memory that was unmapped and is not there again."""
        with self._lock:
            return bool(self._unmapped)

    def forget_unmapped(self) -> None:
        """What was unmapped is nobody's memory any more."""
        with self._lock:
            self._unmapped.clear()

    def count(self) -> int:
        """How many log pages are dirty. A page that two regions share counts for each."""
        with self._lock:
            return sum(bitmap.count() for _, _, bitmap in self._bitmaps)

    def take(self) -> list[tuple[int, int]]:
        """(address, size) of all that is dirty, in runs of whole pages, cut to what is logged: it is clean from now on.

        A page that was reported in part counts as a whole. :meth:`mark` puts back what came to nothing.
        """
        with self._lock:
            bitmaps = [bitmap for _, _, bitmap in self._bitmaps]
            runs = [run for bitmap in bitmaps for run in bitmap.runs()]
            for bitmap in bitmaps:
                bitmap.clear()
            return runs

    def map(self, address: int, size: int, logged: bool = True, memory: Hashable = None) -> None:
        """A region of memory is there from now on. One that is not ``logged`` reads clean.

        ``memory`` is equal for the same memory at the same addresses: what was dirty of it when it was unmapped is
        dirty again.

        Raises OSError: EINVAL or EEXIST for a range that cannot be added, ENOMEM where logging is on and there is
        no room for the region's bitmap.
        """
        with self._lock:
            self._regions.check(address, size)
            if logged:
                for bitmap in self._log(list(self._in_ranges(address, size))):
                    self._unmapped.give_back(memory, bitmap)
            self._regions.add(address, size, _Mapped(logged, memory))

    def unmap(self, address: int, size: int) -> None:
        """The region is gone; what is dirty of it waits for :meth:`map`. Raises OSError(ENOENT) where there is none."""
        with self._lock:
            region = self._regions.remove(address, size)
            for start, length, bitmap in self._bitmaps.overlapping(address, size):
                self._bitmaps.remove(start, length)
                self._nbytes -= bitmap.nbytes
                self._unmapped.keep(region.memory, bitmap)

    def start(self, page_size: int, ranges: Sequence[tuple[int, int]] = ()) -> int:
        """Log what is written in ``ranges``, (iova, length) pairs; no ranges mean everything.

        Returns the page size chosen: the one asked for, but never below 4 KiB nor above 1 GiB. To start once more
        with the same page size and ranges changes nothing.

        Raises OSError: EINVAL for a page size or range that is none, and for others than those that are being
        logged; ENOMEM where the bitmaps would take more than 256 MiB.
        """
        check_logging_ranges(page_size, ranges)
        asked = (page_size, tuple(_join(ranges)))
        with self._lock:
            if self._asked is not None and self._asked != asked:
                raise OSError(errno.EINVAL, "logging is on, with another page size or other ranges")
            if self._asked is None:
                self._begin(asked)
            return self._page_size

    def _begin(self, asked: tuple[int, tuple[tuple[int, int], ...]]) -> None:
        page_size, ranges = asked
        self._page_size = min(max(page_size, MIN_LOG_PAGE), MAX_LOG_PAGE)
        for iova, length in ranges or ((0, ADDRESS_SPACE),):
            self._ranges.add(iova, length, None)
        logged = [(address, size) for address, size, region in self._regions if region.logged]
        try:
            self._log([part for region in logged for part in self._in_ranges(*region)])
        except BaseException:
            self._reset()
            raise
        self._asked = asked

    def stop(self) -> None:
        """Stop logging and forget what was dirty. Nothing happens where logging is off."""
        with self._lock:
            self._reset()

    def mark(self, address: int, length: int) -> None:
        """The device wrote ``[address, address + length)``. What is not being logged is passed over."""
        with self._lock:
            entry = self._bitmaps.find(address)
            if entry is not None and address + length <= entry[0] + entry[1]:
                entry[2].mark(address, length)
                return
            for _, _, bitmap in self._bitmaps.overlapping(address, length):
                bitmap.mark(address, length)

    def report(self, iova: int, length: int, page_size: int, out: memoryview) -> None:
        """Say what is dirty in ``[iova, iova + length)``, and make exactly that clean: see DirtyBitmap.report.

        Raises OSError: EINVAL where logging is off, where a byte of the range is not being logged, where the range
        or the page size is none or ``out`` too short; ENOENT where nothing in the range is mapped. Holes between
        what is mapped read clean.
        """
        check_page_size(page_size)
        if out.nbytes < bitmap_size(length, page_size):
            raise OSError(errno.EINVAL, f"{out.nbytes} bytes are too few for a report of {length:#x} bytes")
        with self._lock:
            self._check_logged(iova, length)
            bitmaps = self._bitmaps.overlapping(iova, length)
            if not bitmaps and not self._regions.overlapping(iova, length):
                raise OSError(errno.ENOENT, f"nothing is mapped in {iova:#x}, {length:#x} bytes")
            for _, _, bitmap in bitmaps:
                bitmap.report(iova, length, page_size, out)

    def _check_logged(self, iova: int, length: int) -> None:
        if self._asked is None:
            raise OSError(errno.EINVAL, "DMA logging is off")
        found = self._ranges.find(iova)
        if found is None or length <= 0 or iova + length > found[0] + found[1]:
            raise OSError(errno.EINVAL, f"{iova:#x}, {length:#x} bytes, is not all being logged")

    def _in_ranges(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        """The (address, size) parts of a region that are to be logged; none while logging is off."""
        for start, length, _ in self._ranges.overlapping(address, size):
            first = max(start, address)
            yield first, min(start + length, address + size) - first

    def _log(self, parts: Sequence[tuple[int, int]]) -> list[DirtyBitmap]:
        """Make the bitmaps of the (address, size) ``parts``, all or none."""
        nbytes = sum((page_count(*part, self._page_size) + 7) // 8 for part in parts)
        if self._nbytes + nbytes > MAX_LOG_MEMORY:
            raise OSError(errno.ENOMEM, f"dirty bitmaps would take {self._nbytes + nbytes:#x} bytes")
        bitmaps = [DirtyBitmap(*part, self._page_size, self._budget) for part in parts]
        for bitmap in bitmaps:
            self._bitmaps.add(bitmap.address, bitmap.size, bitmap)
        self._nbytes += nbytes
        return bitmaps


def _join(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(iova, length) ranges that do not overlap, sorted, adjacent ones made one."""
    joined: list[tuple[int, int]] = []
    for iova, length in sorted(ranges):
        if joined and sum(joined[-1]) == iova:
            iova, length = joined[-1][0], joined.pop()[1] + length
        joined.append((iova, length))
    return joined
