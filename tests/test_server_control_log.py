"""What a push takes from the DMA log: everything that is dirty, once, and back again when it came to nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vfio_user.dma.bitmap import DirtyLog
from vfio_user.server.control import _page_addresses

PAGE = 4096
BASE = 0x10000
SIZES = st.integers(1, 12 * PAGE)
PLACES = st.integers(0, 16 * PAGE)
WRITES = st.lists(st.tuples(PLACES, st.integers(1, 3 * PAGE)), max_size=12)


@given(start=PLACES, size=SIZES, shift=st.integers(0, 4), writes=WRITES)
def test_taken_is_what_was_written_in_whole_pages(
    start: int, size: int, shift: int, writes: list[tuple[int, int]]
) -> None:
    page = PAGE << shift
    log = DirtyLog()
    log.map(BASE + start, size)
    log.start(page)
    expected: set[int] = set()
    for at, length in writes:
        log.mark(BASE + at, length)
        low, high = max(BASE + at, BASE + start), min(BASE + at + length, BASE + start + size)
        if low < high:
            expected.update(range(low // page, (high - 1) // page + 1))
    count = log.count()
    runs = log.take()
    inside = range(BASE + start, BASE + start + size)
    taken = {address // page for first, length in runs for address in range(first, first + length)}
    assert taken == expected
    assert count == len(expected)
    assert all(first in inside and first + length - 1 in inside for first, length in runs)
    assert log.count() == 0
    assert log.take() == []
    for run in runs:
        log.mark(*run)
    assert log.take() == runs


@given(runs=st.lists(st.tuples(PLACES, SIZES), max_size=6))
def test_every_page_of_4_kib_has_one_address_in_its_run(runs: list[tuple[int, int]]) -> None:
    for first, length in runs:
        addresses = list(_page_addresses([(first, length)]))
        assert [address // PAGE for address in addresses] == list(
            range(first // PAGE, (first + length - 1) // PAGE + 1)
        )
        assert all(first <= address < first + length for address in addresses)
