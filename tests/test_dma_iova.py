"""The IOVA table against a plain dict."""

from __future__ import annotations

import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfio_user.dma.iova import ADDRESS_SPACE, IovaTable

# Small numbers, so that ranges meet; at both ends of the address space.
ADDRESSES = st.integers(0, 40) | st.integers(ADDRESS_SPACE - 40, ADDRESS_SPACE - 1)
SIZES = st.integers(-1, 12)


class TableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table: IovaTable[int] = IovaTable()
        self.model: dict[tuple[int, int], int] = {}
        self.next_value = 0

    def model_overlapping(self, address: int, length: int) -> list[tuple[int, int, int]]:
        return [
            (start, size, value)
            for (start, size), value in sorted(self.model.items())
            if max(start, address) < min(start + size, address + length)
        ]

    @initialize(layout=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=8))
    def begin(self, layout: list[tuple[int, int]]) -> None:
        address = 0
        for gap, size in layout:
            self.add(address + gap, size)
            address += gap + size

    @rule(address=ADDRESSES, size=SIZES)
    def add(self, address: int, size: int) -> None:
        self.next_value += 1
        if size <= 0 or address + size > ADDRESS_SPACE:
            expected = errno.EINVAL
        elif self.model_overlapping(address, size):
            expected = errno.EEXIST
        else:
            self.table.add(address, size, self.next_value)
            self.model[address, size] = self.next_value
            return
        with pytest.raises(OSError) as caught:  # noqa: PT011  the errno is looked at
            self.table.add(address, size, self.next_value)
        assert caught.value.errno == expected

    @rule(address=ADDRESSES, size=SIZES)
    def remove(self, address: int, size: int) -> None:
        if (address, size) in self.model:
            assert self.table.remove(address, size) == self.model.pop((address, size))
            return
        with pytest.raises(FileNotFoundError):
            self.table.remove(address, size)

    @rule(data=st.data())
    def remove_known(self, data: st.DataObject) -> None:
        if self.model:
            address, size = data.draw(st.sampled_from(sorted(self.model)))
            self.remove(address, size + data.draw(st.sampled_from([-1, 0, 1])))
            self.get(address, size - 1)

    @rule(address=ADDRESSES, size=SIZES)
    def get(self, address: int, size: int) -> None:
        assert self.table.get(address, size) == self.model.get((address, size))

    @rule(address=ADDRESSES)
    def find(self, address: int) -> None:
        assert self.table.find(address) == next(iter(self.model_overlapping(address, 1)), None)

    @rule(address=ADDRESSES, length=st.integers(-1, 8) | st.integers(9, 50))
    def overlapping(self, address: int, length: int) -> None:
        assert list(self.table.overlapping(address, length)) == self.model_overlapping(address, length)

    @rule()
    def clear(self) -> None:
        self.table.clear()
        self.model.clear()

    @invariant()
    def same(self) -> None:
        assert list(self.table) == [(*key, value) for key, value in sorted(self.model.items())]
        assert len(self.table) == len(self.model)
        for (address, size), value in self.model.items():
            assert self.table.get(address, size) == value


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_whole_address_space() -> None:
    table: IovaTable[str] = IovaTable()
    table.add(0, ADDRESS_SPACE, "all")
    assert table.find(ADDRESS_SPACE - 1) == (0, ADDRESS_SPACE, "all")
    assert table.find(ADDRESS_SPACE) is None
    assert table.find(-1) is None


class Counted(int):
    """An address that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        Counted.comparisons += 1
        return int(self) < int(other)


def test_lookup_among_many_is_a_binary_search() -> None:
    table: IovaTable[int] = IovaTable()
    for index in range(65_535):
        table.add(index * 8192, 4096, index)
    Counted.comparisons = 0
    assert table.find(Counted(40_000 * 8192 + 4095)) == (40_000 * 8192, 4096, 40_000)
    assert table.find(Counted(40_000 * 8192 + 4096)) is None
    assert 0 < Counted.comparisons <= 2 * 17


def test_neighbours_do_not_overlap() -> None:
    table: IovaTable[str] = IovaTable()
    for address in (8, 0, 4):
        table.add(address, 4, str(address))
    assert list(table.overlapping(4, 4)) == [(4, 4, "4")]
    assert list(table.overlapping(3, 2)) == [(0, 4, "0"), (4, 4, "4")]
    assert list(table.overlapping(5, 0)) == []


def test_errors_name_the_ranges() -> None:
    table: IovaTable[None] = IovaTable()
    table.add(0x1000, 0x1000, None)
    with pytest.raises(FileExistsError, match=r"0x1fff, 0x1 bytes, overlaps 0x1000"):
        table.add(0x1FFF, 1, None)
