"""Pipes of memory alone beside the first one."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.errors import MigrationError
from vfio_user.live import Offer, Status
from vfio_user.live.link import Activity, Link
from vfio_user.live.pipes import Pipe, SocketPipe
from vfio_user.live.remote import RemoteDestination
from vfio_user.live.stream import HEADER_SIZE, PREAMBLE_SIZE, Kind
from vfio_user.testing.leaks import no_fd_leaks

from .live_remote_support import (
    LARGE,
    MEMORY,
    PAGE,
    SOON,
    TIMEOUT,
    Cut,
    Guest,
    Memory,
    Receiver,
    expect_moved,
    expect_not_moved,
    fill,
    local,
    migration,
    preamble,
    raw_record,
    socket_pipes,
    two_guests,
)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Guest, Guest]]:
    with two_guests(tmp_path) as both:
        yield both


def many_pipes(stack: ExitStack, count: int) -> tuple[list[Pipe], list[Pipe]]:
    pairs = [stack.enter_context(socket_pipes()) for _ in range(count)]
    return [here for here, _ in pairs], [there for _, there in pairs]


@pytest.mark.parametrize("compress", [False, True])
def test_memory_takes_several_pipes(sides: tuple[Guest, Guest], compress: bool) -> None:
    if compress:
        pytest.importorskip("zstandard")
    source, destination = sides
    fill(source)
    with ExitStack() as stack, no_fd_leaks():
        (here, *ours), (there, *theirs) = many_pipes(stack, 4)
        receiver = Receiver(there, local(destination), lanes=theirs[::-1])
        to = RemoteDestination(here, memory_pipes=ours, compress=compress, timeout=TIMEOUT)
        list(migration(source, to).run())
        arrival = receiver.ended()
        assert arrival is not None
        assert (arrival.memory_bytes, arrival.zero_bytes) == (MEMORY, MEMORY - 2 * PAGE)
        assert ours[0].sent > 0
    expect_moved(source, destination)


@settings(deadline=None, max_examples=50)
@given(
    writes=st.lists(
        st.tuples(st.integers(0, LARGE // PAGE - 1), st.integers(1, 600), st.integers(0, 255)), min_size=1, max_size=8
    ),
    count=st.integers(1, 3),
)
def test_the_last_contents_of_a_page_arrive_last(writes: list[tuple[int, int, int]], count: int) -> None:
    expected = bytearray(LARGE)
    with ExitStack() as stack:
        (here, *ours), (there, *theirs) = many_pipes(stack, 1 + count)
        receiver = Receiver(there, memory := Memory(), lanes=theirs)
        to = stack.enter_context(RemoteDestination(here, memory_pipes=ours, timeout=TIMEOUT))
        to.check(Offer([], [(0, LARGE)]))
        to.begin()
        for page, pages, value in writes:
            data = bytes([value]) * min(pages * PAGE, LARGE - page * PAGE)
            expected[page * PAGE : page * PAGE + len(data)] = data
            to.write_memory(page * PAGE, memoryview(data))
        to.settle()
        assert memory.contents == expected
        to.load()
        to.start()
        assert receiver.ended() is not None


def test_another_number_of_pipes_is_refused() -> None:
    with ExitStack() as stack:
        (here, *ours), (there, *theirs) = many_pipes(stack, 3)
        receiver = Receiver(there, Memory(), lanes=theirs[:1])
        to = stack.enter_context(RemoteDestination(here, memory_pipes=ours, timeout=TIMEOUT))
        with pytest.raises(MigrationError, match="the source has 2 more pipes, here are 1"):
            to.check(Offer([], []))
        assert receiver.ended() is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (lambda token: b"x" * 100, "not a migration"),
        (lambda token: preamble(token) + raw_record(Kind.SETTLE), "pipe 0 of a migration"),
        (lambda token: preamble(bytes(16), 1) + raw_record(Kind.SETTLE), "another migration"),
        (lambda token: preamble(token, 1) + raw_record(Kind.DEVICE, b"x"), "DEVICE record does not belong here"),
        (lambda token: preamble(token, 1) + raw_record(Kind.START), "START record does not belong here"),
        (lambda token: preamble(token, 1) + raw_record(Kind.MEMORY, b"x", address=LARGE), "not inside"),
        (lambda token: preamble(token, 1) + raw_record(Kind.MEMORY, b"x" * 9)[:-1], "the pipe ends within a record"),
        (lambda token: b"", "the pipe ends"),
    ],
)
def test_what_is_wrong_with_a_pipe_of_memory_ends_the_migration(said: Callable[[bytes], bytes], reason: str) -> None:
    here, there = socket.socketpair()
    ours, theirs = socket.socketpair()
    token = bytes(range(16))
    offer = b'{"offer": {"devices": [], "memory": [[0, %d]]}, "memory_pipes": 1}' % LARGE
    with here, ours:
        receiver = Receiver(SocketPipe(there), memory := Memory(), lanes=[SocketPipe(theirs)])
        here.sendall(preamble(token) + raw_record(Kind.OFFER, offer) + raw_record(Kind.BEGIN))
        ours.sendall(said(token))
        ours.shutdown(socket.SHUT_WR)
        here.sendall(raw_record(Kind.LOAD) + raw_record(Kind.START))
        here.shutdown(socket.SHUT_WR)
        assert receiver.ended() is None
    assert reason in str(receiver.error)
    assert memory.calls == ["check", "begin", "abort"]


@pytest.mark.parametrize("after", [0, 31, 40, PREAMBLE_SIZE + HEADER_SIZE, 2 * PAGE])
def test_a_pipe_of_memory_that_is_cut_leaves_the_source_running(sides: tuple[Guest, Guest], after: int) -> None:
    source, destination = sides
    fill(source)
    cut = Cut("there", after)
    with socket_pipes() as (here, there):
        receiver = Receiver(there, local(destination), lanes=[cut.pipes[1]])
        job = migration(source, RemoteDestination(here, memory_pipes=[cut.pipes[0]], timeout=TIMEOUT))
        with pytest.raises(MigrationError):
            list(job.run())
        assert receiver.ended() is None
    cut.join(TIMEOUT)
    assert job.report.status is Status.FAILED
    assert "rolling back" not in str(
        job.report.error
    )  # the first pipe is sound: the destination was reset, and said so
    expect_not_moved(source, destination)


def test_a_pipe_may_be_silent_while_another_is_not() -> None:
    activity = Activity()
    activity.at = time.monotonic() + 2 * SOON
    with socket_pipes() as (here, _):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            Link(here, SOON, activity=activity).receive()
        assert time.monotonic() - started > 2.9 * SOON
