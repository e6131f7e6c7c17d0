"""Guest memory that is written to while it is sent: it comes again, and must, before the destination loads."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.errors import StreamError
from vfio_user.live import Offer, link
from vfio_user.live.memory import TornMemory
from vfio_user.live.pipes import SocketPipe
from vfio_user.live.remote import RemoteDestination
from vfio_user.live.stream import HEADER_SIZE, LARGE, MAX_TORN, Kind

from .live_remote_support import OFFER, PAGE, TIMEOUT, Memory, Receiver, parts, raw_record, record, told


class RacedPipe(SocketPipe):
    """Calls ``race`` between the sum of a large record and its sending, so many ``times``."""

    def __init__(self, sock: socket.socket, race: Callable[[], None], times: int) -> None:
        super().__init__(sock)
        self._race, self._times = race, times

    def _write(self, buffers: list[memoryview]) -> int:
        if self._times and any(len(one) >= LARGE for one in buffers):
            self._times -= 1
            self._race()
        return super()._write(buffers)


SIZE = 4 * LARGE


@contextmanager
def raced(race: Callable[[], None], times: int, lanes: int = 0) -> Iterator[tuple[RemoteDestination, Receiver, Memory]]:
    """A source, and a destination that takes SIZE bytes of memory, which ``race`` writes to."""
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(1 + lanes)]
        ours = [stack.enter_context(RacedPipe(pair[0], race, times)) for pair in pairs]
        theirs = [stack.enter_context(SocketPipe(pair[1])) for pair in pairs]
        receiver = Receiver(theirs[0], memory := Memory(), lanes=theirs[1:])
        to = stack.enter_context(RemoteDestination(ours[0], memory_pipes=ours[1:], timeout=TIMEOUT))
        to.check(Offer([], [(0, SIZE)]))
        to.begin()
        yield to, receiver, memory
        to.close()
        receiver.join(TIMEOUT)
        assert not receiver.is_alive()


@pytest.mark.parametrize("lanes", [0, 1, 3])
def test_memory_that_is_written_to_while_it_is_sent_comes_again(lanes: int) -> None:
    content = bytearray(b"a" * SIZE)

    def race() -> None:
        content[LARGE + 7] += 1

    with raced(race, 1, lanes) as (to, receiver, memory):
        for start in range(0, SIZE, LARGE):
            to.write_memory(start, memoryview(content)[start : start + LARGE])
        to.settle()
        assert content[LARGE + 7] != ord("a")
        assert memory.contents[:SIZE] == content
        to.load()
        to.start()
        arrival = receiver.ended()
    assert arrival is not None
    assert arrival.memory_bytes == SIZE  # what came torn does not count


def test_memory_of_zeros_and_others_comes_again_where_it_was_torn() -> None:
    content = bytearray(b"a" * LARGE + bytes(LARGE) + b"b" * (2 * LARGE))

    def race() -> None:
        content[0] += 1
        content[-1] += 1

    with raced(race, 1) as (to, receiver, memory):
        to.write_memory(0, memoryview(content))
        to.settle()
        assert memory.contents[:SIZE] == content
        to.load()
        to.start()
        arrival = receiver.ended()
    assert arrival is not None
    assert (arrival.memory_bytes, arrival.zero_bytes) == (SIZE, LARGE)


def test_memory_that_is_settled_is_not_kept() -> None:
    content = bytearray(b"a" * SIZE)
    with raced(lambda: None, 0) as (to, _, _):
        to.write_memory(0, memoryview(content))
        with pytest.raises(BufferError):
            content.append(0)
        to.settle()
        content.append(0)
        to.write_memory(0, memoryview(content)[:SIZE])
        to.close()
        content.append(0)


class Damaging(SocketPipe):
    """Changes a byte of every page or more."""

    def _write(self, buffers: list[memoryview]) -> int:
        return super()._write([memoryview(b"!" + one[1:]) if len(one) >= PAGE else one for one in buffers])


@pytest.mark.parametrize("size", [PAGE, LARGE])
def test_a_pipe_that_damages_memory_is_given_up(size: int) -> None:
    here, there = socket.socketpair()
    receiver = Receiver(SocketPipe(there), memory := Memory())
    with Damaging(here) as pipe, RemoteDestination(pipe, timeout=TIMEOUT) as to:
        to.check(Offer([], [(0, SIZE)]))
        to.begin()
        to.write_memory(LARGE, memoryview(b"a" * size))
        with pytest.raises(StreamError, match="memory at 0x10000 is damaged on its way"):
            to.settle()
    assert receiver.ended() is None
    assert memory.calls[-1] == "abort"
    assert not any(memory.contents)


def test_more_torn_records_than_a_source_may_send_are_refused() -> None:
    preamble, offer, begin, *_ = parts(record())
    said = [torn(page, 1) for page in range(MAX_TORN + 1)]
    _, _, error = told(b"".join([preamble, offer, begin, *said]))
    assert f"more than {MAX_TORN} records of memory came torn" in str(error)


def test_a_source_settles_before_it_has_sent_more_than_may_come_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_TORN", 17)
    content = bytearray(b"a" * SIZE)
    with raced(lambda: None, 0) as (to, receiver, memory):
        for _ in range(10):
            to.write_memory(0, memoryview(content))
        assert memory.calls.count("settle") == 4  # before every second one but the first
        to.load()
        to.start()
        assert receiver.ended() is not None


def torn(address: int, size: int) -> bytes:
    whole = raw_record(Kind.MEMORY, b"x" * size, address=address)
    return whole[:HEADER_SIZE] + b"y" * size


@pytest.mark.parametrize(
    ("records", "missing"),
    [
        ([torn(0, PAGE)], 0),
        ([torn(0, 2 * PAGE), raw_record(Kind.MEMORY, b"z" * PAGE)], PAGE),
        ([torn(0, 2 * PAGE), raw_record(Kind.ZERO, size=2 * PAGE - 1)], PAGE),
        ([torn(0, 2 * PAGE), raw_record(Kind.ZERO, size=2 * PAGE), torn(PAGE, 1)], PAGE),
        ([torn(PAGE + 9, 1), raw_record(Kind.MEMORY, b"z", address=PAGE + 9)], PAGE),
        ([torn(1 << 20, PAGE), raw_record(Kind.ZERO, size=2 * PAGE)], 1 << 20),
        ([torn(0, 2 * PAGE), raw_record(Kind.ZERO, size=2 * PAGE)], None),
        ([torn(PAGE, PAGE), torn(0, PAGE), raw_record(Kind.ZERO, size=2 * PAGE)], None),
        ([torn(1 << 20, 5), raw_record(Kind.MEMORY, b"z" * PAGE, address=1 << 20)], None),
    ],
)
def test_what_came_torn_must_come_whole_before_load(records: list[bytes], missing: int | None) -> None:
    preamble, offer, begin, zero, memory, *rest = parts(record())
    said = [preamble, offer, begin, zero, memory, *records, *rest[:-1]]  # nothing is behind START
    recorder, arrival, error = told(b"".join(said))
    if missing is None:
        assert arrival is not None
        assert recorder.calls[-1] == "start"
    else:
        assert f"memory at {missing:#x} came torn, and did not come again" in str(error)
        assert recorder.calls[-1] == "abort"
        assert "load" not in recorder.calls
    assert b"y" not in b"".join(recorder.memory.values())


def test_a_torn_record_of_no_memory_of_the_guest_is_refused() -> None:
    preamble, offer, begin, *_ = parts(record())
    recorder, _, error = told(preamble + offer + begin + torn(2 * PAGE, 1))
    assert "not inside the guest's memory" in str(error)
    assert recorder.calls == ["check", "begin", "abort"]


REGIONS = [*OFFER.memory, (2 << 20, 3 * PAGE - 100)]


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from(REGIONS), st.integers(0, 3 * PAGE), st.integers(1, 3 * PAGE)),
        max_size=20,
    )
)
def test_torn_pages_are_those_touched_and_not_covered_since(
    steps: list[tuple[bool, tuple[int, int], int, int]],
) -> None:
    memory, expected = TornMemory(), set[int]()
    for whole, region, start, size in steps:
        first, length = region
        start = min(start, length - 1)
        size = min(size, length - start)
        pages = range(first, first + length, PAGE)
        if whole:
            memory.heal(region, first + start, size)
            expected -= {
                page
                for page in pages
                if first + start <= page and min(page + PAGE, first + length) <= first + start + size
            }
        else:
            memory.add(region, first + start, size)
            expected |= {page for page in pages if page < first + start + size and first + start < page + PAGE}
        assert (memory.first is None) is (not expected)
        if expected:
            assert memory.first in expected
