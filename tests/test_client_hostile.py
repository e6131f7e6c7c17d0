"""Servers that keep a client waiting, or say anything at all: every call ends in time, with a documented error.

Tests whose names have ``row_NN`` assert that row of protocol.md's section 0, the client's column.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.hostile import (
    CLIENTS,
    NO_REPLY,
    SET_UP,
    Answers,
    Handler,
    Peer,
    Request,
    both,
    message,
    pattern,
    prepared,
    scripted,
)
from vfio_user.errors import (
    CallTimeoutError,
    CommandError,
    ConnectionClosedError,
    ProtocolError,
    UnexpectedReplyError,
)
from vfio_user.testing import no_fd_leaks
from vfio_user.wire import messages as m
from vfio_user.wire.constants import Command

pytestmark = both

TIMEOUT = 0.2
SLACK = 5.0
"""What a slow machine may add to a timeout. A call without one would take much longer, or for ever."""
DOCUMENTED = (CallTimeoutError, ConnectionClosedError, ProtocolError, CommandError)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


@contextlib.contextmanager
def ends_in_time(error: type[Exception] = CallTimeoutError, match: str | None = None) -> Iterator[None]:
    started = time.monotonic()
    with pytest.raises(error, match=match):
        yield
    assert time.monotonic() - started < TIMEOUT + SLACK


# Row 34: the timeout covers a whole call


def silence(peer: Peer, request: Request) -> None:
    """Never answer."""


def drip_by_drip(peer: Peer, request: Request) -> None:
    """A reply that gets longer every 10 ms, and never ends."""
    peer.raw(message(request.msg_id, request.command, size=1 << 20))
    while not peer.over.wait(0.01):
        peer.raw(b"\0")


def drip_without_pause(peer: Peer, request: Request) -> None:
    """As fast as bytes can be sent one by one: there is always something to receive."""
    peer.raw(message(request.msg_id, request.command, size=60 << 20))
    while not peer.over.is_set():
        peer.raw(b"\0")


def half_a_header(peer: Peer, request: Request) -> None:
    peer.raw(message(request.msg_id, request.command)[:15])
    peer.over.wait()


def ask_for_ever(peer: Peer, request: Request) -> None:
    """DMA requests without end, each answered."""
    while not peer.over.is_set():
        peer.raw(message(1, Command.DMA_READ, m.DmaAccess(0, 1).pack(), flags=0))
        if peer.receive() is None:
            return


def post_for_ever(peer: Peer, request: Request) -> None:
    """Commands that want no answer, without end."""
    burst = message(1, Command.DMA_WRITE, m.DmaAccess(0, 8).pack() + bytes(8), flags=NO_REPLY) * 100
    while not peer.over.is_set():
        peer.raw(burst)


def oversize_for_ever(peer: Peer, request: Request) -> None:
    """Messages that are skipped, without end."""
    skipped = message(1, Command.DMA_WRITE, bytes(2 << 20), flags=NO_REPLY)
    while not peer.over.is_set():
        peer.raw(skipped)


STALLS: dict[str, Handler] = {
    handler.__name__: handler
    for handler in (
        silence,
        drip_by_drip,
        drip_without_pause,
        half_a_header,
        ask_for_ever,
        post_for_ever,
        oversize_for_ever,
    )
}


@pytest.mark.parametrize("stall", STALLS)
def test_row_34_a_call_ends_within_its_timeout(kind: str, stall: str) -> None:
    with scripted(kind, {Command.DEVICE_RESET: STALLS[stall]}, timeout=TIMEOUT) as (client, server):
        with ends_in_time():
            client.reset()
        server.peer.over.set()


def test_row_34_what_has_come_already_counts_too(kind: str) -> None:
    """8,192 requests in one go: the time is over long before they are."""
    burst = message(1, Command.DMA_READ, flags=NO_REPLY) * 8192
    with prepared(*SET_UP, burst) as sock, CLIENTS[kind](sock) as client:
        client.timeout = 0.002
        with pytest.raises(CallTimeoutError):
            client.reset()


@pytest.mark.parametrize("command", [Command.VERSION, Command.DEVICE_GET_IRQ_INFO])
@pytest.mark.parametrize("stall", ["silence", "drip_by_drip", "post_for_ever"])
def test_row_34_set_up_ends_within_its_timeout(kind: str, command: Command, stall: str) -> None:
    with ends_in_time(), scripted(kind, {command: STALLS[stall]}, timeout=TIMEOUT):
        pass


def test_row_34_a_server_that_takes_nothing(kind: str) -> None:
    """It is the client that cannot send: the socket is full, a part of a message is out."""

    def deaf(peer: Peer, request: Request) -> None:
        peer.over.wait()

    with scripted(kind, {Command.DEVICE_RESET: deaf}, timeout=TIMEOUT) as (client, server):
        with ends_in_time():
            client.reset()
        with ends_in_time():
            client.region_write(0, 0, bytes(4 << 20), posted=True)
        with pytest.raises(ConnectionClosedError):
            client.region_read(0, 0, 1)
        server.peer.over.set()


def test_row_17_an_answer_that_never_comes_is_a_clear_error_and_one_that_is_late_is_dropped(kind: str) -> None:
    """The connection lives: nothing is known to be wrong with its stream."""
    held: list[Request] = []

    def late(peer: Peer, request: Request) -> None:
        if not held:
            held.append(request)
        else:
            peer.reply(held[0])
            peer.reply(request)

    with scripted(kind, {Command.DEVICE_RESET: late}, timeout=TIMEOUT) as (client, _):
        with ends_in_time(match="did not answer in time"):
            client.reset()
        client.timeout = 20.0
        client.reset()
        assert client.region_read(0, 0, 8) == pattern(0, 8)


def test_a_late_answer_brings_nothing_with_it(kind: str) -> None:
    """Its descriptors are closed, and it is not taken for the answer of a later call."""
    held: list[Request] = []

    def late(peer: Peer, request: Request) -> None:
        held.append(request)

    def flush(peer: Peer, request: Request) -> None:
        for old in held:
            peer.reply(old, old.payload + b"late", [0])
        peer.reply(request)

    answers: Answers = {Command.REGION_READ: late, Command.DEVICE_RESET: flush}
    with scripted(kind, answers, timeout=TIMEOUT) as (client, _):
        for _ in range(2):
            with ends_in_time():
                client.region_read(0, 0, 4)
        client.timeout = 20.0
        client.reset()


def test_replies_that_nobody_asked_for_end_the_connection(kind: str) -> None:
    def unrelated(peer: Peer, request: Request) -> None:
        for number in range(1000):
            peer.raw(message(0x8000 + number, Command.REGION_READ, bytes(16)))
        peer.over.wait()

    with scripted(kind, {Command.DEVICE_RESET: unrelated}, timeout=20) as (client, server):
        with ends_in_time(UnexpectedReplyError):
            client.reset()
        server.peer.over.set()


def test_a_drip_fed_server_that_is_fast_enough_is_understood(kind: str) -> None:
    def byte_by_byte(peer: Peer, request: Request) -> None:
        for byte in message(request.msg_id, request.command, request.payload + pattern(0, 16)):
            peer.raw(bytes([byte]))

    with scripted(kind, {Command.REGION_READ: byte_by_byte}) as (client, _):
        assert client.region_read(0, 0, 16) == pattern(0, 16)


def test_a_reply_cut_at_every_byte(kind: str) -> None:
    whole = message(5, Command.REGION_READ, struct.pack("<QII", 0, 0, 16) + pattern(0, 16))
    for length in range(len(whole)):
        with (
            prepared(*SET_UP, whole[:length]) as sock,
            CLIENTS[kind](sock) as client,
            pytest.raises(ConnectionClosedError),
        ):
            client.region_read(0, 0, 16)
    with prepared(*SET_UP, whole) as sock, CLIENTS[kind](sock) as client:
        assert client.region_read(0, 0, 16) == pattern(0, 16)


# Memory


@contextlib.contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """How many bytes were allocated at most, both sides together, since the start."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_row_34_what_a_server_announces_is_not_allocated(kind: str) -> None:
    """A header may promise 64 MiB; replies may be skipped by the hundred MiB: neither takes memory."""

    def promise(peer: Peer, request: Request) -> None:
        peer.raw(message(request.msg_id, request.command, size=60 << 20))
        for _ in range(60):
            peer.raw(bytes(1 << 20))
        peer.over.wait()

    with scripted(kind, {Command.DEVICE_RESET: promise}, timeout=20) as (client, server), traced() as peak:
        with pytest.raises(ProtocolError):
            client.reset()
        server.peer.over.set()
        assert peak() < 8 << 20


# Anything at all


REPLIES = (
    *SET_UP,
    message(5, Command.REGION_READ, struct.pack("<QII", 0, 0, 8) + pattern(0, 8)),
    message(1, Command.DMA_READ, m.DmaAccess(0, 8).pack(), flags=0),
    message(6, Command.DMA_MAP),
    message(2, Command.DMA_WRITE, m.DmaAccess(0, 4).pack() + b"data", flags=0),
    message(3, Command.DMA_READ, m.DmaAccess(0, 8).pack(), flags=0),
    message(7, Command.DEVICE_FEATURE, struct.pack("<IIQ", 16, 0x10001, 5)),
    message(8, Command.DEVICE_FEATURE, struct.pack("<IIQQQQ", 40, 0x10008, 0, 0x10000, 0x1000, 3)),
    message(9, Command.MIG_DATA_READ, struct.pack("<II", 12, 4) + b"data"),
    message(10, Command.DEVICE_GET_REGION_IO_FDS, struct.pack("<IIII", 64, 0, 0, 1)),
    message(11, Command.DEVICE_GET_REGION_IO_FDS, struct.pack("<IIII", 64, 0, 0, 1) + m.IoFd(0, 4, 0, 0).pack()),
    message(12, Command.DMA_UNMAP, struct.pack("<IIQQQQ", 48, 1, 0, 0x1000, 0x1000, 8) + bytes(8)),
    message(13, Command.DEVICE_RESET),
)
"""A whole conversation: what the calls of ``converse`` are answered."""


def map_all(client: Any) -> None:
    """Mapping what cannot be mapped is an OSError by its documentation."""
    for region in client.regions:
        with contextlib.suppress(OSError):
            region.map()


def converse(client: Any) -> int:
    """Make every kind of call; how many were answered."""
    calls: list[Callable[[], object]] = [
        lambda: client.region_read(0, 0, 8),
        lambda: client.dma_map(0, 0x1000, memory=bytearray(0x1000)),
        lambda: client.migration_flags(),
        lambda: client.dma_logging_report(0, 0x10000, 0x1000),
        lambda: client.migration_read_data(8),
        lambda: map_all(client),
        lambda: client.region_io_fds(0),
        lambda: client.dma_unmap(0, 0x1000, page_size=0x1000),
        lambda: client.reset(),
    ]
    answered = 0
    for call in calls:
        try:
            call()
        except DOCUMENTED:
            continue
        answered += 1
    return answered


def meet(kind: str, *parts: bytes | tuple[bytes, list[int]]) -> int:
    """Let a client loose on what a server says. Nothing but documented errors, in time, and nothing left open."""
    started = time.monotonic()
    answered = 0
    with no_fd_leaks(), prepared(*parts) as sock:
        try:
            with CLIENTS[kind](sock, TIMEOUT * 5) as client:
                answered = converse(client)
        except DOCUMENTED:
            pass
    assert time.monotonic() - started < SLACK
    return answered


def test_the_whole_conversation_is_understood_as_it_is(kind: str) -> None:
    fd = os.eventfd(0)
    try:
        assert meet(kind, *REPLIES[:-3], (REPLIES[-3], [fd]), *REPLIES[-2:]) == 9
    finally:
        os.close(fd)


fuzzing = settings(max_examples=150, deadline=None)


@fuzzing
@given(data=st.binary(max_size=400))
def test_random_bytes(kind: str, data: bytes) -> None:
    meet(kind, data)
    meet(kind, *SET_UP, data)


@fuzzing
@given(
    index=st.integers(0, len(REPLIES) - 1),
    position=st.floats(0, 1, exclude_max=True),
    value=st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from([0, 1, 31, 32, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFF0]).map(lambda n: n.to_bytes(4, "little")),
        st.sampled_from([1 << 63, (1 << 64) - 1, (1 << 64) - 0x1000]).map(lambda n: n.to_bytes(8, "little")),
    ),
    cut=st.integers(0, 20),
    fds=st.lists(st.sampled_from([0, 1, 2]), max_size=3),
)
@example(index=3, position=0.5, value=b"\xff\xff\xff\xff", cut=0, fds=[])
def test_replies_that_are_nearly_right(
    kind: str, index: int, position: float, value: bytes, cut: int, fds: list[int]
) -> None:
    """One field of one message replaced, some bytes of it missing, and descriptors that nobody asked for."""
    replies: list[bytes | tuple[bytes, list[int]]] = list(REPLIES)
    wrong = bytearray(REPLIES[index])
    where = int(position * len(wrong))
    wrong[where : where + len(value)] = value
    if cut:
        del wrong[-cut:]
    with contextlib.ExitStack() as opened:
        made = [os.eventfd(0), os.memfd_create("x"), os.open("/", os.O_RDONLY)]
        for fd in made:
            opened.callback(os.close, fd)
        replies[index] = (bytes(wrong), [made[number] for number in fds])
        meet(kind, *replies)


@fuzzing
@given(seed=st.integers(0, 1 << 32), chain=st.binary(max_size=120), cap_offset=st.integers(0, 200))
def test_capability_chains_of_any_kind(kind: str, seed: int, chain: bytes, cap_offset: int) -> None:
    """Random links that point near each other."""
    links = bytearray(chain)
    choose = random.Random(seed)
    for start in range(0, len(links) - 8, 8):
        struct.pack_into("<HHI", links, start, choose.randrange(3), 1, choose.randrange(28, 40 + len(links)))
    head = m.RegionInfo(32 + len(links), 0xF, 0, cap_offset, 0x10000).pack()
    asked = message(2, Command.DEVICE_GET_REGION_INFO, m.RegionInfo(32 + len(links), 7, 0, 0, 0x10000).pack())
    replies = [*SET_UP[:2], asked, message(3 if links else 2, Command.DEVICE_GET_REGION_INFO, head + links)]
    meet(kind, *replies, SET_UP[4])


def test_no_descriptor_leaks_over_many_failed_connections(kind: str) -> None:
    fd = os.eventfd(0)
    try:
        with no_fd_leaks():
            for index in range(len(REPLIES)):
                bad = REPLIES[index][:-1]
                meet(kind, *REPLIES[:index], (bad, [fd] * 253))
    finally:
        os.close(fd)
