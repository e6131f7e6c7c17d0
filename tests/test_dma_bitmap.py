"""Dirty bitmaps and the dirty log, against sets of bytes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from itertools import groupby
from random import Random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfio_user.dma import bitmap as bitmap_module
from vfio_user.dma.bitmap import (
    MAX_PIECES,
    DirtyBitmap,
    DirtyLog,
    PieceBudget,
    bitmap_size,
    check_logging_ranges,
    check_report,
)
from vfio_user.dma.iova import ADDRESS_SPACE

SPACE = 1500


def bits_of(out: bytes | bytearray) -> set[int]:
    value = int.from_bytes(out, "little")
    return {n for n, bit in enumerate(reversed(f"{value:b}")) if bit == "1"}


def refused(error: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  the errno is looked at
        call(*args)
    assert caught.value.errno == error


def touched(region: range, address: int, length: int, page_size: int) -> set[int]:
    """The bytes of those pages, as far as they are in the region, that a write there touches."""
    low, high = max(address, region.start), min(address + length, region.stop)
    if low >= high:
        return set()
    first, after = low // page_size * page_size, -(-high // page_size) * page_size
    return set(range(max(first, region.start), min(after, region.stop)))


class Model:
    """The dirty bytes of one region: what a DirtyBitmap must know."""

    def __init__(self, address: int, size: int, page_size: int) -> None:
        self.region = range(address, address + size)
        self.page_size = page_size
        self.dirty: set[int] = set()

    def mark(self, address: int, length: int) -> None:
        self.dirty |= touched(self.region, address, length, self.page_size)

    def report(self, iova: int, length: int, page_size: int) -> set[int]:
        reported = {byte for byte in self.dirty if iova <= byte < iova + length}
        self.dirty -= reported
        return {(byte - iova) // page_size for byte in reported}

    @property
    def pages(self) -> int:
        return len({byte // self.page_size for byte in self.dirty})


def report(bitmap: DirtyBitmap | DirtyLog, iova: int, length: int, page_size: int, before: int = 0) -> set[int]:
    """The bits of a report, written over bytes that are ``before``."""
    out = bytearray([before]) * bitmap_size(length, page_size)
    bitmap.report(iova, length, page_size, memoryview(out))
    return bits_of(out)


@st.composite
def patterns(draw: st.DrawFn) -> set[int]:
    """Numbers of pages: few or many, alone or in runs."""
    random = Random(draw(st.integers(0, 1000)))
    density, stay = draw(st.sampled_from([0.5, 0.03, 0.2, 0.9, 1.0])), draw(st.sampled_from([0.0, 0.5, 0.9]))
    pages, dirty = set(), False
    for page in range(SPACE):
        dirty = dirty if random.random() < stay else random.random() < density
        if dirty:
            pages.add(page)
    return pages


@st.composite
def reports(draw: st.DrawFn, page_shift: int) -> tuple[int, int, int, int]:
    """(iova, length, page size, what is in every byte beforehand)."""
    shift = draw(st.integers(max(page_shift - 4, 0), page_shift + 4) | st.just(page_shift) | st.integers(0, 63))
    iova = draw(st.integers(0, SPACE))
    if draw(st.booleans()):
        iova = iova >> page_shift << page_shift
    return iova, draw(st.integers(1, 40) | st.integers(1, SPACE)), 1 << shift, draw(st.sampled_from([0, 0x12, 0xFF]))


@given(address=st.integers(0, 200), size=st.integers(1, SPACE), page_shift=st.integers(0, 7), data=st.data())
@settings(max_examples=250, deadline=None)
def test_reports_exactly(address: int, size: int, page_shift: int, data: st.DataObject) -> None:
    page_size = 1 << page_shift
    bitmap, model = DirtyBitmap(address, size, page_size), Model(address, size, page_size)
    for _ in range(data.draw(st.integers(1, 3))):
        marks = [(page * page_size, 1) for page in data.draw(patterns()) if page * page_size < SPACE]
        marks += data.draw(st.lists(st.tuples(st.integers(-20, SPACE), st.integers(0, SPACE)), max_size=3))
        for mark in marks:
            bitmap.mark(*mark)
            model.mark(*mark)
        for iova, length, report_page, before in data.draw(st.lists(reports(page_shift), max_size=6)):
            known = bits_of(bytes([before]) * bitmap_size(length, report_page))
            expected = model.report(iova, length, report_page) | known
            assert report(bitmap, iova, length, report_page, before) == expected
            assert bitmap.count() == model.pages
    assert report(bitmap, address, size, 1) == model.report(address, size, 1)
    assert bitmap.count() == 0


@pytest.mark.parametrize("rounds_allowed", [1 << 30, -(1 << 30)], ids=["runs", "vector"])
@given(
    address=st.integers(0, 64),
    page_shift=st.integers(0, 5),
    report_shift=st.integers(0, 8),
    iova=st.integers(0, 100),
    length=st.integers(300, 600) | st.integers(1, 600),
    dirty=patterns(),
)
@settings(max_examples=250, deadline=None)
def test_both_ways_to_fill_a_report_agree(
    rounds_allowed: int, address: int, page_shift: int, report_shift: int, iova: int, length: int, dirty: set[int]
) -> None:
    bitmap, model = DirtyBitmap(address, 600, 1 << page_shift), Model(address, 600, 1 << page_shift)
    for page in dirty:
        bitmap.mark(page << page_shift, 1)
        model.mark(page << page_shift, 1)
    with mock.patch.object(bitmap_module, "_FEW_ROUNDS", rounds_allowed):
        assert report(bitmap, iova, length, 1 << report_shift) == model.report(iova, length, 1 << report_shift)
    assert report(bitmap, address, 600, 1) == model.report(address, 600, 1)


@given(
    reports=st.lists(st.tuples(st.integers(0, 255), st.integers(1, 60)), max_size=40),
    marks=st.lists(st.integers(0, 255), max_size=10),
    pieces=st.integers(0, 6),
)
@settings(deadline=None)
def test_without_budget_too_much_is_reported_never_too_little(
    reports: list[tuple[int, int]], marks: list[int], pieces: int
) -> None:
    budget = PieceBudget(pieces)
    bitmap, model = DirtyBitmap(0, 256, 64, budget), Model(0, 256, 64)
    bitmap.mark(0, 256)
    model.mark(0, 256)
    for index, (iova, length) in enumerate(reports):
        for byte in marks[index : index + 1]:
            bitmap.mark(byte, 1)
            model.mark(byte, 1)
        assert report(bitmap, iova, length, 1) >= model.report(iova, length, 1)
        assert budget.left >= 0
    assert report(bitmap, 0, 256, 1) >= model.report(0, 256, 1)
    assert (bitmap.count(), budget.left) == (0, pieces)


def test_mark_and_clear_give_pieces_back() -> None:
    budget = PieceBudget(8)
    bitmap = DirtyBitmap(0, 8192, 4096, budget)
    bitmap.mark(0, 8192)
    report(bitmap, 100, 5000, 1)
    assert (budget.left, bitmap.count()) == (6, 2)
    bitmap.mark(5000, 1)
    assert budget.left == 7
    assert report(bitmap, 0, 8192, 1) == set(range(100)) | set(range(4096, 8192))
    bitmap.mark(0, 1)
    report(bitmap, 0, 1, 1)
    bitmap.clear()
    assert (budget.left, bitmap.count()) == (8, 0)


@given(
    here=st.tuples(st.integers(0, 200), st.integers(1, 600)),
    there=st.tuples(st.integers(0, 200), st.integers(1, 600)),
    page_shift=st.integers(0, 7),
    dirty=patterns(),
    reported=st.lists(st.tuples(st.integers(0, 800), st.integers(1, 60)), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_what_is_dirty_moves_to_a_bitmap_of_another_range(
    here: tuple[int, int], there: tuple[int, int], page_shift: int, dirty: set[int], reported: list[tuple[int, int]]
) -> None:
    page_size = 1 << page_shift
    old, new = DirtyBitmap(*here, page_size), DirtyBitmap(*there, page_size)
    known, moved = Model(*here, page_size), Model(*there, page_size)
    for page in dirty:
        old.mark(page << page_shift, 1)
        known.mark(page << page_shift, 1)
    for part in reported:
        assert report(old, *part, 1) == known.report(*part, 1)
    old.move_to(new)
    for byte in known.dirty & set(moved.region):
        moved.mark(byte, 1)
    known.dirty -= set(moved.region)
    assert (old.count(), new.count()) == (known.pages, moved.pages)
    for bitmap, model in ((old, known), (new, moved)):
        assert report(bitmap, 0, 2 * SPACE, 1) == model.dirty


@pytest.mark.parametrize("report_page", [512, 2048, 4096, 8192, 1 << 16])
@pytest.mark.parametrize("step", [1, 2, 3, 50])
def test_reports_of_many_pages(report_page: int, step: int) -> None:
    """64 MiB: in libvfio-user 255 bits of a report with another page size than the log's are too many."""
    size, base = 64 << 20, 1 << 32
    bitmap = DirtyBitmap(base, size, 4096)
    pages = range(0, size >> 12, step)
    for page in pages:
        bitmap.mark(base + page * 4096, 1)
    finer = max(4096 // report_page, 1)
    expected = {page * 4096 // report_page + n for page in pages for n in range(finer)}
    assert report(bitmap, base, size, report_page) == expected
    assert bitmap.count() == 0


@pytest.mark.parametrize("first", [0, 1, 7, 8, 13])
@pytest.mark.parametrize("start", [0, 8, 16, 5])
def test_bits_that_are_there_stay(first: int, start: int) -> None:
    """Reports in the log's own pages move whole bytes where they can."""
    bitmap = DirtyBitmap(start * 4096, 100 * 4096, 4096)
    for page in (first, first + 1, 40, 50, 90):
        bitmap.mark((start + page) * 4096, 1)
    expected = {start + page for page in (first, first + 1, 40, 50, 90)} | bits_of(b"\x81" * 16)
    assert report(bitmap, 0, 128 * 4096, 4096, before=0x81) == expected
    assert bitmap.count() == 0


@pytest.mark.parametrize("page_size", [1, 1024])
def test_bits_at_the_end_of_the_address_space(page_size: int) -> None:
    bitmap = DirtyBitmap(ADDRESS_SPACE - 4096, 4096, page_size)
    bitmap.mark(ADDRESS_SPACE - 1, 1)
    assert report(bitmap, 0, ADDRESS_SPACE, 1 << 63) == {1}
    bitmap.mark(ADDRESS_SPACE - 2048, 2048)
    assert report(bitmap, ADDRESS_SPACE - 4096, 4096, 1 << 63) == {0}
    assert bitmap.count() == 0


def test_a_shared_page_counts_for_each_region() -> None:
    left, right = DirtyBitmap(0, 6000, 4096), DirtyBitmap(6000, 6000, 4096)
    for bitmap in (left, right):
        bitmap.mark(5000, 1000)
    out = memoryview(bytearray(bitmap_size(12000, 1)))
    for bitmap in (left, right):
        bitmap.report(0, 12000, 1, out)
    assert bits_of(out.tobytes()) == set(range(4096, 6000))
    assert right.count() == 0


@pytest.mark.parametrize(
    ("length", "page_size", "size"),
    [(1, 1, 8), (64, 1, 8), (65, 1, 16), (4096 * 64 + 1, 4096, 16), (1 << 40, 4096, 32 << 20), (1, 1 << 63, 8)],
)
def test_bitmap_size(length: int, page_size: int, size: int) -> None:
    assert bitmap_size(length, page_size) == size


@pytest.mark.parametrize(
    ("page_size", "ranges"),
    [
        (0, []),
        (-4096, []),
        (100, []),
        (1 << 64, []),
        (4096, [(0, 0)]),
        (4096, [(0, -4096)]),
        (4096, [(-4096, 4096)]),
        (4096, [(512, 4096)]),
        (4096, [(0, 4097)]),
        (4096, [(ADDRESS_SPACE - 4096, 8192)]),
        (4096, [(0, 8192), (4096, 4096)]),
        (4096, [(0, 4096), (0, 4096)]),
    ],
)
def test_logging_ranges_refused(page_size: int, ranges: list[tuple[int, int]]) -> None:
    refused(errno.EINVAL, check_logging_ranges, page_size, ranges)
    refused(errno.EINVAL, DirtyLog().start, page_size, ranges)


@pytest.mark.parametrize(
    ("iova", "length", "page_size"),
    [(0, 4096, 0), (0, 4096, 3), (0, 0, 4096), (0, -1, 4096), (1, ADDRESS_SPACE, 1 << 63), (-1, 2, 1)],
)
def test_report_refused(iova: int, length: int, page_size: int) -> None:
    refused(errno.EINVAL, check_report, iova, length, page_size)
    log = DirtyLog()
    log.map(0, 4096)
    log.start(4096)
    refused(errno.EINVAL, log.report, iova, length, page_size, memoryview(bytearray(4096)))


UNIT = 512
"""The log's smallest page is 4096 bytes, too many for a model of bytes: here everything is in units of these."""
UNITS = st.integers(0, 150)


class LogMachine(RuleBasedStateMachine):
    """Regions, ranges, marks and reports in every order; all numbers in units."""

    def __init__(self) -> None:
        super().__init__()
        self.log = DirtyLog()
        self.regions: dict[tuple[int, int], tuple[bool, int]] = {}
        self.ranges: tuple[tuple[int, int], ...] | None = None
        self.page = 0
        self.dirty: set[int] = set()
        self.unmapped: dict[int, set[int]] = {0: set(), 1: set()}

    def in_ranges(self, unit: int) -> bool:
        if self.ranges is None:
            return False
        return not self.ranges or any(start <= unit < start + length for start, length in self.ranges)

    def parts(self) -> Iterator[range]:
        """The stretches of logged regions that are in ranges."""
        for (address, size), (logged, _) in self.regions.items():
            units = [unit for unit in range(address, address + size) if logged and self.in_ranges(unit)]
            for _, stretch in groupby(enumerate(units), key=lambda pair: pair[1] - pair[0]):
                found = [unit for _, unit in stretch]
                yield range(found[0], found[-1] + 1)

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        address = 0
        for gap, size in data.draw(st.lists(st.tuples(st.sampled_from([0, 0, 3, 8]), st.integers(1, 40)), max_size=5)):
            self.map(address + gap, size, data.draw(st.sampled_from([True, True, False])), 0)
            address += gap + size

    @rule(address=UNITS, size=st.integers(1, 60), logged=st.booleans() | st.just(True), memory=st.integers(0, 1))
    def map(self, address: int, size: int, logged: bool, memory: int) -> None:
        if any(max(address, start) < min(address + size, start + n) for start, n in self.regions):
            refused(errno.EEXIST, self.log.map, address * UNIT, size * UNIT, logged, memory)
            return
        self.log.map(address * UNIT, size * UNIT, logged, memory)
        self.regions[address, size] = logged, memory
        for part in self.parts():
            if part.start in range(address, address + size):
                for unit in self.unmapped[memory] & set(part):
                    self.dirty |= touched(part, unit, 1, self.log_page)
                self.unmapped[memory] -= set(part)

    @property
    def log_page(self) -> int:
        return max(1 << self.page, 4096 // UNIT)

    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        if self.regions:
            address, size = data.draw(st.sampled_from(sorted(self.regions)))
            self.log.unmap(address * UNIT, size * UNIT)
            _, memory = self.regions.pop((address, size))
            self.unmapped[memory] |= self.dirty & set(range(address, address + size))
            self.dirty -= set(range(address, address + size))
        refused(errno.ENOENT, self.log.unmap, 1 << 50, UNIT)

    @rule(
        stop=st.booleans(),
        shift=st.integers(0, 5),
        cuts=st.lists(st.integers(0, 40), max_size=6, unique=True),
        data=st.data(),
    )
    def start(self, stop: bool, shift: int, cuts: list[int], data: st.DataObject) -> None:
        if stop:
            self.log.stop()
            self.ranges = None
            self.dirty.clear()
            self.forget_unmapped()
        pairs = zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False)
        ranges = tuple((low << shift, high - low << shift) for low, high in pairs)
        asked = [(iova * UNIT, length * UNIT) for iova, length in data.draw(st.permutations(ranges))]
        if self.ranges is not None:
            if (shift, ranges) != (self.page, self.ranges):
                refused(errno.EINVAL, self.log.start, UNIT << shift, asked)
            return
        assert self.log.start(UNIT << shift, asked) == max(UNIT << shift, 4096)
        self.page, self.ranges = shift, ranges

    @rule()
    def forget_unmapped(self) -> None:
        self.log.forget_unmapped()
        self.unmapped = {0: set(), 1: set()}

    @rule()
    def start_again(self) -> None:
        if self.ranges is not None:
            self.log.start(UNIT << self.page, [(iova * UNIT, length * UNIT) for iova, length in self.ranges])

    @rule(address=UNITS, length=st.integers(0, 100))
    def mark(self, address: int, length: int) -> None:
        self.log.mark(address * UNIT, length * UNIT)
        for part in self.parts():
            self.dirty |= touched(part, address, length, self.log_page)

    @rule(iova=UNITS, length=st.integers(1, 200), shift=st.integers(0, 10), before=st.integers(0, 255))
    def report(self, iova: int, length: int, shift: int, before: int) -> None:
        asked = (iova * UNIT, length * UNIT, UNIT << shift)
        out = bytearray(bitmap_size(length, 1 << shift))
        out[0] = before
        wanted = range(iova, iova + length)
        if not all(map(self.in_ranges, wanted)):
            refused(errno.EINVAL, self.log.report, *asked, memoryview(out))
        elif not any(max(iova, start) < min(iova + length, start + n) for start, n in self.regions):
            refused(errno.ENOENT, self.log.report, *asked, memoryview(out))
        else:
            refused(errno.EINVAL, self.log.report, *asked, memoryview(out)[:-1])
            self.log.report(*asked, memoryview(out))
            reported = {unit for unit in self.dirty if unit in wanted}
            self.dirty -= reported
            assert bits_of(out) == {unit - iova >> shift for unit in reported} | bits_of(bytes([before]))
            return
        assert bits_of(out) == bits_of(bytes([before]))

    @invariant()
    def state(self) -> None:
        assert self.log.active == (self.ranges is not None)
        assert (self.log.count() == 0) == (not self.dirty)
        assert self.log.incomplete == any(self.unmapped.values())


TestLog = LogMachine.TestCase
TestLog.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(("asked", "chosen"), [(1, 4096), (4096, 4096), (1 << 21, 1 << 21), (1 << 63, 1 << 30)])
def test_page_size_chosen(asked: int, chosen: int) -> None:
    log = DirtyLog()
    assert log.page_size == 0
    assert log.start(asked) == chosen == log.page_size
    assert log.start(asked) == chosen


def test_other_ranges_while_on_are_refused_and_change_nothing() -> None:
    log = DirtyLog()
    log.map(0, 8192)
    log.start(4096, [(0, 4096)])
    log.mark(0, 8192)
    refused(errno.EINVAL, log.start, 4096, [(4096, 4096)])
    refused(errno.EINVAL, log.start, 4096)
    refused(errno.EINVAL, log.start, 8192, [(0, 8192)])
    assert report(log, 0, 4096, 4096) == {0}
    refused(errno.EINVAL, log.report, 0, 8192, 4096, memoryview(bytearray(8)))
    refused(errno.EINVAL, log.report, 4096, 4096, 4096, memoryview(bytearray(8)))


def test_adjacent_ranges_are_one() -> None:
    log = DirtyLog()
    log.map(0, 1 << 20)
    log.start(4096, [(4096, 4096), (8192, 4096)])
    assert log.start(4096, [(4096, 8192)]) == 4096
    log.mark(0, 1 << 20)
    assert report(log, 4096, 8192, 4096) == {0, 1}


def test_memory_of_the_bitmaps_is_bounded() -> None:
    log = DirtyLog()
    log.map(0, 1 << 43)
    log.map(1 << 43, 4096)
    refused(errno.ENOMEM, log.start, 4096)
    assert not log.active
    refused(errno.EINVAL, log.report, 0, 4096, 4096, memoryview(bytearray(8)))
    assert log.start(4096, [(1 << 43, 4096)]) == 4096
    log.stop()
    log.unmap(0, 1 << 43)
    log.start(4096)
    refused(errno.ENOMEM, log.map, 1 << 44, 1 << 43)
    log.map(1 << 44, 4096)
    log.map(1 << 45, 1 << 43, False)
    log.mark(1 << 44, 1)
    assert log.count() == 1


def test_memory_is_bounded_exactly_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmap_module, "MAX_LOG_MEMORY", 64)
    size = 64 * 8 * 4096
    log = DirtyLog()
    log.map(0, size)
    log.start(4096)
    for _ in range(3):
        refused(errno.ENOMEM, log.map, size, 1)
        log.mark(0, 4096)
        report(log, 1, 1, 1)
        assert log._budget.left == MAX_PIECES - 2
        log.unmap(0, size)
        log.map(0, size)
        assert (log.count(), log._budget.left) == (1, MAX_PIECES)


@pytest.mark.parametrize("bound", ["MAX_UNMAPPED", "MAX_LOG_MEMORY"])
def test_what_is_kept_of_unmapped_memory_is_bounded(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmap_module, bound, 2)
    log = DirtyLog()
    log.start(4096)
    for page in range(3):
        log.map(page * 4096, 4096)
        log.mark(page * 4096, 1)
        report(log, page * 4096, 1, 1)
        log.unmap(page * 4096, 4096)
        assert log.incomplete
    assert log._budget.left == MAX_PIECES
    log.map(0, 2 * 4096)
    assert (log.count(), log.incomplete) == (0, True)
    log.mark(0, 1)
    log.unmap(0, 2 * 4096)
    assert log._budget.left == MAX_PIECES
    log.stop()
    log.start(4096)
    assert not log.incomplete


def test_what_was_reported_of_unmapped_memory_does_not_come_back() -> None:
    log = DirtyLog()
    log.start(4096)
    log.map(0, 1 << 20)
    log.mark(0, 1 << 20)
    assert report(log, 0, 1 << 20, 4096) == set(range(256))
    log.unmap(0, 1 << 20)
    assert not log.incomplete
    log.map(0, 1 << 20)
    assert log.count() == 0


def test_the_lock_is_held() -> None:
    lock = mock.MagicMock(wraps=threading.Lock())
    log = DirtyLog(lock)
    calls: tuple[Callable[[], object], ...] = (
        lambda: log.map(0, 8192),
        lambda: log.start(4096),
        lambda: log.mark(0, 1),
        lambda: report(log, 0, 4096, 4096),
        lambda: log.unmap(0, 8192),
        lambda: log.incomplete,
        log.forget_unmapped,
        log.stop,
    )
    for done, call in enumerate(calls, start=1):
        call()
        assert lock.__enter__.call_count == lock.__exit__.call_count == done
