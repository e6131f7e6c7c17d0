"""BAR declarations, and the MSI-X table behind a BAR."""

from __future__ import annotations

from mmap import PAGESIZE
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.pci import Bar, MsixCapability, MsixTable

PAGES = 16


@given(st.lists(st.tuples(st.integers(0, PAGES * PAGESIZE - 1), st.integers(1, 3 * PAGESIZE)), max_size=4))
def test_what_may_be_mapped_is_the_pages_that_nothing_traps(ranges: list[tuple[int, int]]) -> None:
    size = PAGES * PAGESIZE
    trapped = tuple((offset, min(length, size - offset)) for offset, length in ranges)
    free = [
        page
        for page in range(PAGES)
        if not any(at < (page + 1) * PAGESIZE and page * PAGESIZE < at + length for at, length in trapped)
    ]
    bar = Bar(size, memory=True, trapped=trapped)
    mapped = [
        page for offset, length in bar.mmap_areas for page in range(offset // PAGESIZE, (offset + length) // PAGESIZE)
    ]
    assert mapped == free
    assert all(offset % PAGESIZE == 0 == length % PAGESIZE and length for offset, length in bar.mmap_areas)
    assert all(bar.traps(*one) for one in trapped)
    assert not any(bar.traps(page * PAGESIZE + PAGESIZE - 1, 1) for page in free)


def test_areas_for_region_information() -> None:
    whole = Bar(4 * PAGESIZE, memory=True)
    assert (whole.mmap_areas, whole.sparse_areas) == (((0, 4 * PAGESIZE),), ())
    part = Bar(4 * PAGESIZE, memory=True, trapped=((0, 4),))
    assert part.mmap_areas == part.sparse_areas == ((PAGESIZE, 3 * PAGESIZE),)
    assert Bar(4 * PAGESIZE).mmap_areas == ()
    assert Bar(4 * PAGESIZE).traps(0, 4 * PAGESIZE)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "power of two"),
        (-16, {}, "power of two"),
        (24, {}, "power of two"),
        (8, {}, "0x10 to"),
        (1 << 32, {}, "0x80000000"),
        (2, {"io": True}, "0x4 to 0x100"),
        (512, {"io": True}, "0x4 to 0x100"),
        (PAGESIZE // 2, {"memory": True}, "power of two"),
        (16, {"io": True, "bits64": True}, "drop"),
        (16, {"io": True, "prefetchable": True}, "drop"),
        (4096.0, {}, "must be an int"),
        ("4K", {}, "must be an int"),
        (4096, {"trapped": (0, 16)}, r"write \(\(0, 0x1000\),\)"),
        (4096, {"trapped": 16}, "pairs"),
        (4096, {"trapped": ((0, 16),)}, "only memory=True"),
        (PAGESIZE, {"memory": True, "trapped": ((0, 1),)}, "drop memory=True"),
        (2 * PAGESIZE, {"memory": True, "trapped": ((PAGESIZE, PAGESIZE + 1),)}, "inside the BAR"),
        (2 * PAGESIZE, {"memory": True, "trapped": ((0, 0),)}, "inside the BAR"),
        (2 * PAGESIZE, {"memory": True, "trapped": ((-1, 4),)}, "inside the BAR"),
    ],
)
def test_a_bar_that_cannot_be_is_refused(size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bar(size, **options).check()


def test_the_largest_and_smallest_bars() -> None:
    for smallest in (Bar(16), Bar(4, io=True), Bar(1 << 31), Bar(1 << 63, bits64=True)):
        smallest.check()
    assert Bar(1 << 31).address_mask == 1 << 31
    assert Bar(1 << 63, bits64=True).address_mask == 1 << 63
    assert Bar(16).address_mask == 0xFFFFFFF0
    assert Bar(4, io=True).address_mask == 0xFFFFFFFC


def read(table: MsixTable, bar: int, offset: int, length: int) -> bytes | None:
    data = bytearray(b"\xee" * length)
    taken = table.read_into(bar, offset, memoryview(data))
    if not taken:
        assert data == b"\xee" * length, "not its own, yet written"
    return bytes(data) if taken else None


@given(st.data())
def test_table_and_pending_bits_in_one_bar_against_bytes(data: st.DataObject) -> None:
    vectors, table_at, pba_at, size = 3, 0x40, 0x78, 0xA0
    pending = data.draw(st.binary(min_size=8, max_size=8))
    table = MsixTable(MsixCapability(vectors, 1, table_at, 1, pba_at), lambda: pending)
    model = bytearray(size)
    model[table_at : table_at + 48] = (bytes(12) + b"\1\0\0\0") * vectors
    model[pba_at : pba_at + 8] = pending
    writable = bytearray(size)
    writable[table_at : table_at + 48] = (b"\xfc" + b"\xff" * 11 + b"\1\0\0\0") * vectors
    owned = {*range(table_at, table_at + 48), *range(pba_at, pba_at + 8)}
    for _ in range(data.draw(st.integers(1, 6))):
        offset = data.draw(st.integers(0, size))
        content = data.draw(st.binary(max_size=size - offset))
        touches = not owned.isdisjoint(range(offset, offset + len(content)))
        assert table.write(1, offset, memoryview(content)) == touches
        assert not table.write(0, offset, content)
        for at, byte in enumerate(content, offset):
            model[at] = (model[at] & ~writable[at]) | (byte & writable[at])
        assert read(table, 1, offset, len(content)) == (
            bytes(model[offset : offset + len(content)]) if touches else None
        )
        assert read(table, 0, offset, len(content)) is None
    assert table.save() == model[table_at : table_at + 48]


def test_the_table_is_saved_loaded_and_reset() -> None:
    capability = MsixCapability(2, 1, 0, 1, 0x800)
    table, other = MsixTable(capability, lambda: bytes(8)), MsixTable(capability, lambda: bytes(8))
    fresh = table.save()
    table.write(1, 0, bytes(range(16)))
    other.load(table.save())
    assert read(other, 1, 0, 16) == bytes(range(12)) + bytes(4)
    for wrong in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="saved are"):
            table.load(wrong)
    table.reset()
    assert table.save() == fresh == (bytes(12) + b"\1\0\0\0") * 2
