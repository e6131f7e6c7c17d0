"""Namespaces in memory, and their way to another server."""

from __future__ import annotations

import contextlib
import errno
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfio_user.devices.nvme.storage import MemoryStorage
from vfio_user.devices.nvme.storage import memory as module
from vfio_user.devices.nvme.storage.memory import BLOCK, DATA, LEAST_PART, RECORD, ZERO

from .nvme_storage_support import SECTOR, data, fails, read, split, views, write

TIMEOUT = 20.0
SIZE = 5 * BLOCK + 3 * SECTOR
"""With a last block that is none."""


@pytest.fixture
def memory() -> Iterator[MemoryStorage]:
    with contextlib.closing(MemoryStorage("memory:", size=SIZE)) as storage:
        yield storage


def parts(storage: MemoryStorage, limit: int = LEAST_PART) -> Iterator[bytes]:
    while storage.unsent():
        yield storage.next_part(limit)


def test_what_it_is(memory: MemoryStorage) -> None:
    assert (memory.name, memory.size, memory.block_size, memory.read_only) == ("memory:", SIZE, SECTOR, False)
    assert not any(read(memory, 0, SIZE))
    assert memory.unsent()  # who takes its place at the other side may hold something
    for _ in range(2):
        memory.acquire()
        memory.flush()
        memory.release()
        memory.close()


@pytest.mark.parametrize("size", [0, -512, 511, 513])
def test_sizes_of_no_disk(size: int) -> None:
    with pytest.raises(ValueError, match=f"memory: {size} bytes are no disk"):
        MemoryStorage("memory:", size=size)


def test_more_than_there_can_be() -> None:
    for size in (1 << 62, 1 << 70):
        with fails(errno.ENOMEM, f"{size} bytes"):
            MemoryStorage("memory:", size=size)


def test_read_only(memory: MemoryStorage) -> None:
    with contextlib.closing(MemoryStorage("memory:", size=SIZE, read_only=True)) as storage:
        with fails(errno.EROFS):
            write(storage, 0, bytes(512))
        with fails(errno.EROFS):
            storage.write_now(0, views([512]))
        with fails(errno.EROFS):
            storage.discard(0, SIZE)
        write(memory, 0, data(512))
        memory.mark_all_unsent()
        for part in parts(memory):
            storage.apply(part)
        assert read(storage, 0, 512) == data(512)


def test_pieces(memory: MemoryStorage) -> None:
    assert memory.write_now(SECTOR, split(data(5 * SECTOR), [SECTOR, 3 * SECTOR, SECTOR]))
    into = views([2 * SECTOR, 3 * SECTOR])
    assert memory.read_now(SECTOR, into)
    assert b"".join(into) == data(5 * SECTOR)


class Migrating(RuleBasedStateMachine):
    """A disk that is written while it is sent: when all was sent, the other side has the same."""

    ranges = (
        st.tuples(st.integers(0, SIZE // SECTOR), st.integers(0, SIZE // SECTOR))
        .map(sorted)
        .filter(lambda ends: ends[0] < ends[1])
    )

    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = (MemoryStorage("memory:", size=SIZE) for _ in range(2))
        write(self.there, 0, data(SIZE, 9))  # of a migration before, that failed
        self.content = bytearray(SIZE)
        self.begun = False

    def teardown(self) -> None:
        self.here.close()
        self.there.close()

    @rule(ends=ranges, seed=st.integers(0, 5))
    def write(self, ends: list[int], seed: int) -> None:
        start, stop = (end * SECTOR for end in ends)
        content = data(stop - start, seed) if seed else bytes(stop - start)
        write(self.here, start, content)
        self.content[start:stop] = content

    @rule(ends=ranges, unmap=st.booleans())
    def zero(self, ends: list[int], unmap: bool) -> None:
        start, stop = (end * SECTOR for end in ends)
        self.here.write_zeroes(start, stop - start, unmap=unmap)
        self.content[start:stop] = bytes(stop - start)

    @rule()
    def begin(self) -> None:
        self.here.mark_all_unsent()
        self.begun = True

    @rule(limit=st.integers(LEAST_PART, 3 * LEAST_PART))
    def send(self, limit: int) -> None:
        more = self.here.unsent()
        part = self.here.next_part(limit)
        assert bool(part) == more
        assert len(part) <= limit
        self.there.apply(part)

    @rule()
    def send_all(self) -> None:
        for part in parts(self.here):
            self.there.apply(part)
        if self.begun:
            assert read(self.there, 0, SIZE) == self.content

    @invariant()
    def here_is_what_was_written(self) -> None:
        assert read(self.here, 0, SIZE) == self.content


Migrating.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestMigrating = Migrating.TestCase


def test_what_was_never_written_is_short() -> None:
    """A gigabyte of it in a few bytes; what was given back, too."""
    with contextlib.closing(MemoryStorage("memory:", size=1 << 30)) as storage:
        storage.mark_all_unsent()
        assert [RECORD.unpack(part) for part in parts(storage)] == [(0, 1 << 30, ZERO)]
        write(storage, 10 * BLOCK, data(BLOCK))
        write(storage, 20 * BLOCK, bytes(BLOCK))
        storage.mark_all_unsent()
        assert sum(map(len, parts(storage))) == 5 * RECORD.size + BLOCK
        storage.discard(0, 1 << 30)
        storage.mark_all_unsent()
        assert len(b"".join(parts(storage))) == RECORD.size


def test_only_what_changed_is_sent_again(memory: MemoryStorage) -> None:
    memory.mark_all_unsent()
    assert list(parts(memory))
    write(memory, BLOCK - SECTOR, data(2 * SECTOR))
    assert memory.unsent()
    sent = list(parts(memory))
    assert [RECORD.unpack_from(part) for part in sent] == [(0, BLOCK, DATA), (BLOCK, BLOCK, DATA)]
    assert memory.next_part(LEAST_PART) == b""


def test_a_limit_that_nothing_fits(memory: MemoryStorage) -> None:
    with pytest.raises(ValueError, match=f"limit {LEAST_PART - 1}"):
        memory.next_part(LEAST_PART - 1)


CHANGES: dict[str, Callable[[MemoryStorage], None]] = {
    "a block that was never written": lambda storage: write(storage, 2 * BLOCK, data(SECTOR)),
    "a block that was written": lambda storage: write(storage, 0, data(SECTOR, 3)),
    "several blocks": lambda storage: write(storage, SECTOR, data(4 * BLOCK, 3)),
    "given back": lambda storage: storage.discard(0, 2 * BLOCK),
}


@pytest.mark.parametrize("inner", ["send", "change"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_written_by_a_thread_while_another_sends(change: Callable[[MemoryStorage], None], inner: str) -> None:
    """One does all of its work between any two lines of the other's: what was written last arrives."""
    for line in itertools.count():
        with contextlib.ExitStack() as stack:
            here, there = (
                stack.enter_context(contextlib.closing(MemoryStorage("memory:", size=SIZE))) for _ in range(2)
            )
            write(here, 0, data(BLOCK + SECTOR))
            here.mark_all_unsent()

            def send(here: MemoryStorage = here, there: MemoryStorage = there) -> None:
                for part in parts(here):
                    there.apply(part)

            outer, other = (partial(change, here), send) if inner == "send" else (send, partial(change, here))
            happened = interrupted(outer, other, line)
            send()
            assert read(there, 0, SIZE) == read(here, 0, SIZE)
            if not happened:
                assert line > 10
                return


def interrupted(work: Callable[[], None], other: Callable[[], None], line: int) -> bool:
    """Do ``work``, and before its ``line``-th line in the module ``other``; False if it has fewer."""
    lines = itertools.count()
    happened = False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal happened
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line" and next(lines) == line:
            happened = True
            other()
        return trace

    def traced() -> None:
        sys.settrace(trace)
        work()

    with ThreadPoolExecutor(1) as threads:  # whoever measures coverage traces this one
        threads.submit(traced).result(TIMEOUT)
    return happened


# What others may say


def record(start: int, length: int, kind: int, content: bytes = b"") -> bytes:
    return RECORD.pack(start, length, kind) + content


@pytest.mark.parametrize(
    "part",
    [
        b"\0",
        record(0, 0, ZERO),
        record(0, 0, DATA),
        record(0, SIZE + 1, ZERO),
        record(SIZE, SECTOR, ZERO),
        record((1 << 64) - 1, (1 << 64) - 1, ZERO),
        record(0, SECTOR, 2),
        record(0, SECTOR, DATA, bytes(SECTOR - 1)),
        record(0, SECTOR, DATA, bytes(SECTOR + 1)),
        record(SECTOR, SECTOR, ZERO) + record(0, SECTOR, ZERO),
        record(0, SIZE, ZERO) * 2,
    ],
)
def test_wrong_parts_change_nothing(memory: MemoryStorage, part: bytes) -> None:
    write(memory, 0, data(SIZE))
    with pytest.raises(ValueError, match="record of memory"):
        memory.apply(record(0, SECTOR, ZERO) + part if len(part) == 1 else part)
    assert read(memory, 0, SIZE) == data(SIZE)


@settings(max_examples=60)
@given(st.binary(max_size=200), st.data())
def test_any_bytes(part: bytes, draw: st.DataObject) -> None:
    """Also those that begin well."""
    with contextlib.closing(MemoryStorage("memory:", size=SIZE)) as storage:
        write(storage, 0, data(SIZE))
        storage.mark_all_unsent()
        good = storage.next_part(LEAST_PART)
        cut = draw.draw(st.integers(0, len(good)))
        for bytes_ in (part, good[:cut] + part):
            with contextlib.suppress(ValueError):
                storage.apply(bytes_)
        assert len(read(storage, 0, SIZE)) == SIZE
