"""The server's DMA requests, answered from what dma_map was given: while a call waits, by the twin socket, when idle.

Tests whose names have ``row_NN`` assert that row of protocol.md's section 0, the client's column.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.hostile import (
    ERROR,
    NO_REPLY,
    REPLY,
    Handler,
    Peer,
    Request,
    both,
    message,
    pattern,
    scripted,
    version_answer,
)
from vfio_user.errors import CallTimeoutError, ConnectionClosedError, FramingError, UnexpectedReplyError
from vfio_user.testing import no_fd_leaks
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import Capabilities, TwinSocketCapability
from vfio_user.wire.constants import Command, DmaFlags

pytestmark = both

BASE = 0x1000
Script = Callable[[Peer], None]


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


def during_reset(script: Script) -> dict[int, Handler]:
    """Have the server do its DMA while the client waits for the reply to a reset."""

    def answer(peer: Peer, request: Request) -> None:
        script(peer)
        peer.reply(request)

    return {Command.DEVICE_RESET: answer}


def data_of(reply: Request) -> bytes:
    assert reply.flags == REPLY
    return reply.payload[16:]


def refused(reply: Request) -> int:
    assert reply.flags == REPLY | ERROR
    assert reply.payload == b""
    return reply.error


def test_row_23_requests_are_answered_while_a_call_waits(kind: str) -> None:
    memory = bytearray(b"guest memory".ljust(0x1000, b"\0"))

    def script(peer: Peer) -> None:
        reply = peer.dma_read(BASE + 6, 6)
        assert (reply.msg_id, reply.command) == (0x77, Command.DMA_READ)
        assert reply.payload == m.DmaAccess(BASE + 6, 6).pack() + b"memory"
        assert data_of(peer.dma_write(BASE, b"GUEST")) == b""
        assert data_of(peer.dma_read(BASE, 0x1000)) == bytes(memory)

    with scripted(kind, during_reset(script)) as (client, _):
        client.dma_map(BASE, 0x1000, memory=memory)
        client.reset()
        assert memory.startswith(b"GUEST memory\0")


def test_row_12_a_dma_write_is_answered_with_16_bytes(kind: str) -> None:
    def script(peer: Peer) -> None:
        reply = peer.dma_write(BASE + 1, b"abc")
        assert reply.payload == struct.pack("<QQ", BASE + 1, 3)
        assert reply.flags == REPLY

    with scripted(kind, during_reset(script)) as (client, _):
        client.dma_map(BASE, 0x1000, memory=bytearray(0x1000))
        client.reset()


def test_memory_behind_an_fd(kind: str) -> None:
    file = os.memfd_create("x")
    try:
        os.pwrite(file, b"hello", 0x2000)

        def script(peer: Peer) -> None:
            assert data_of(peer.dma_read(BASE, 5)) == b"hello"
            assert data_of(peer.dma_read(BASE + 0xFFE, 2)) == bytes(2), "behind the end of the file"
            peer.dma_write(BASE + 2, b"LLO")

        with scripted(kind, during_reset(script)) as (client, _):
            client.dma_map(BASE, 0x1000, file, offset=0x2000)
            client.reset()
            assert os.pread(file, 5, 0x2000) == b"heLLO"
    finally:
        os.close(file)


def test_memory_given_beside_an_fd_is_what_answers(kind: str) -> None:
    file = os.memfd_create("x")
    try:
        os.ftruncate(file, 0x1000)

        def script(peer: Peer) -> None:
            assert data_of(peer.dma_read(BASE, 4)) == b"view"

        with scripted(kind, during_reset(script)) as (client, server):
            client.dma_map(BASE, 0x1000, file, memory=bytearray(b"view".ljust(0x1000)))
            assert len(server.of(Command.DMA_MAP)[0].fds) == 1
            client.reset()
    finally:
        os.close(file)


def test_a_request_that_spans_adjacent_regions(kind: str) -> None:
    first, second = bytearray(b"a" * 0x1000), bytearray(b"b" * 0x1000)

    def script(peer: Peer) -> None:
        assert data_of(peer.dma_read(BASE + 0xFFE, 4)) == b"aabb"
        assert data_of(peer.dma_write(BASE + 0xFFF, b"XY")) == b""
        assert refused(peer.dma_write(BASE + 0x1FFF, b"ZZ")) == errno.EFAULT

    with scripted(kind, during_reset(script)) as (client, _):
        client.dma_map(BASE, 0x1000, memory=first)
        client.dma_map(BASE + 0x1000, 0x1000, memory=second)
        client.reset()
    assert first == b"a" * 0xFFF + b"X"
    assert second == b"Y" + b"b" * 0xFFF, "a write that cannot be done wholly is not done at all"


def dma(command: int, address: int, count: int, data: bytes = b"") -> Callable[[Peer], Request]:
    return lambda peer: peer.ask(command, struct.pack("<QQ", address, count) + data)


READ, WRITE = Command.DMA_READ, Command.DMA_WRITE


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        pytest.param(dma(READ, 0, 1), errno.EFAULT, id="read of unmapped memory"),
        pytest.param(dma(WRITE, 0, 1, b"x"), errno.EFAULT, id="write of unmapped memory"),
        pytest.param(dma(READ, BASE + 0xFFF, 2), errno.EFAULT, id="read over the end"),
        pytest.param(dma(READ, BASE - 1, 2), errno.EFAULT, id="read from before the start"),
        pytest.param(dma(READ, (1 << 64) - 1, 1 << 16), errno.EFAULT, id="read that wraps"),
        pytest.param(dma(READ, 0x8000, 1), errno.EFAULT, id="read of memory that is not ours to give"),
        pytest.param(dma(WRITE, 0x20000, 1, b"x"), errno.EACCES, id="write of read-only memory"),
        pytest.param(dma(READ, 0x30000, 1), errno.EACCES, id="read of write-only memory"),
        pytest.param(dma(READ, BASE, (1 << 20) + 1), errno.E2BIG, id="more than was agreed on"),
        pytest.param(dma(READ, BASE, 1 << 32), errno.E2BIG, id="read of 2^32"),
        pytest.param(dma(READ, BASE, (1 << 64) - 1), errno.E2BIG, id="read of 2^64 - 1"),
        pytest.param(dma(WRITE, BASE, (1 << 64) - 1, b"x"), errno.E2BIG, id="write of 2^64 - 1"),
        pytest.param(dma(WRITE, BASE, 2, b"x"), errno.EINVAL, id="write with less than it says"),
        pytest.param(dma(WRITE, BASE, 1, b"xy"), errno.EINVAL, id="write with more than it says"),
        pytest.param(dma(READ, BASE, 1, b"x"), errno.EINVAL, id="read with data"),
        pytest.param(lambda peer: peer.ask(READ, b""), errno.EINVAL, id="read without anything"),
        pytest.param(lambda peer: peer.ask(WRITE, bytes(15)), errno.EINVAL, id="write cut short"),
        pytest.param(lambda peer: peer.ask(WRITE, bytes(2 << 20)), errno.EINVAL, id="a message larger than any"),
        pytest.param(lambda peer: peer.ask(READ, struct.pack("<QQ", BASE, 1), fds=[0]), errno.EINVAL, id="with an fd"),
        pytest.param(lambda peer: peer.ask(Command.DEVICE_RESET, b""), errno.EINVAL, id="a client's command"),
        pytest.param(lambda peer: peer.ask(Command.VERSION, b"\0\0\2\0"), errno.EINVAL, id="VERSION"),
        pytest.param(lambda peer: peer.ask(14, b""), errno.EINVAL, id="a command that is gone"),
        pytest.param(lambda peer: peer.ask(0xFFFF, b"\xff" * 99), errno.EINVAL, id="a command that is none"),
    ],
)
def test_row_29_requests_that_cannot_be_served_are_refused_and_the_call_goes_on(
    kind: str, ask: Callable[[Peer], Request], error: int
) -> None:
    def script(peer: Peer) -> None:
        assert refused(ask(peer)) == error

    untouched = bytearray(0x1000)
    with scripted(kind, during_reset(script)) as (client, _):
        client.dma_map(BASE, 0x1000, memory=untouched)
        client.dma_map(0x8000, 0x1000)
        client.dma_map(0x20000, 0x1000, memory=bytearray(0x1000), flags=DmaFlags.READ)
        client.dma_map(0x30000, 0x1000, memory=bytearray(0x1000), flags=DmaFlags.WRITE)
        client.reset()
        assert client.region_read(0, 0, 4) == pattern(0, 4)
    assert untouched == bytes(0x1000)


def test_memory_that_is_taken_back_is_reached_no_more(kind: str) -> None:
    gone: list[int] = []

    def script(peer: Peer) -> None:
        gone.extend(refused(peer.dma_read(address, 1)) for address in (0x1000, 0x2000, 0x3000))

    file = os.memfd_create("x")
    try:
        with scripted(kind, during_reset(script)) as (client, server):
            client.dma_map(0x1000, 0x1000, file)
            client.dma_map(0x2000, 0x1000, memory=bytearray(0x1000))
            client.dma_unmap(0x1000, 0x1000)
            client.dma_unmap(0x2000, 0x1000)
            client.reset()
            client.dma_map(0x3000, 0x1000, file)
            client.dma_unmap_all()
            client.reset()
            for request in server.requests:
                request.close()
        assert gone == [errno.EFAULT] * 6
    finally:
        os.close(file)


def test_memory_whose_unmap_is_refused_stays(kind: str) -> None:
    def script(peer: Peer) -> None:
        assert data_of(peer.dma_read(BASE, 1)) == b"x"

    answers = {**during_reset(script), Command.DMA_UNMAP: lambda peer, request: peer.refuse(request, errno.EBUSY)}
    with scripted(kind, answers) as (client, _):
        client.dma_map(BASE, 0x1000, memory=bytearray(b"x" * 0x1000))
        for take_back in (client.dma_unmap_all, lambda: client.dma_unmap(BASE, 0x1000)):
            with pytest.raises(OSError, match="DMA_UNMAP"):
                take_back()
        client.reset()


def test_the_same_region_again_is_answered_from_the_new_memory(kind: str) -> None:
    def script(peer: Peer) -> None:
        assert data_of(peer.dma_read(BASE, 1)) == b"2"

    with scripted(kind, during_reset(script)) as (client, _):
        client.dma_map(BASE, 1, memory=bytearray(b"1"))
        client.dma_map(BASE, 1, memory=bytearray(b"2"))
        client.reset()


@pytest.mark.parametrize("command", [Command.DMA_WRITE, Command.DMA_READ, 0xFFFF])
def test_requests_that_want_no_reply_get_none(kind: str, command: int) -> None:
    """The next answer that the server sees is the one to its next question."""
    memory = bytearray(8)

    def script(peer: Peer) -> None:
        data = b"12" if command == Command.DMA_WRITE else b""
        peer.raw(message(1, command, m.DmaAccess(BASE, 2).pack() + data, flags=NO_REPLY))
        peer.raw(message(2, command, m.DmaAccess(0, 2).pack() + data, flags=NO_REPLY))
        assert peer.dma_read(BASE, 8).msg_id == 0x77

    with scripted(kind, during_reset(script)) as (client, _):
        client.dma_map(BASE, 8, memory=memory)
        client.reset()
    assert memory == (b"12" if command == Command.DMA_WRITE else b"\0\0") + bytes(6)


def test_a_request_of_no_bytes(kind: str) -> None:
    def script(peer: Peer) -> None:
        assert data_of(peer.dma_read(0, 0)) == b""
        assert data_of(peer.dma_write(0, b"")) == b""

    with scripted(kind, during_reset(script)) as (client, _):
        client.reset()


def test_many_requests_in_one_call_and_one_of_the_largest_size(kind: str) -> None:
    memory = bytearray(os.urandom(1 << 20))

    def script(peer: Peer) -> None:
        for number in range(200):
            assert data_of(peer.dma_read(number, 1)) == memory[number : number + 1]
        assert data_of(peer.dma_read(0, 1 << 20)) == memory

    with scripted(kind, during_reset(script)) as (client, _):
        client.dma_map(0, 1 << 20, memory=memory)
        client.reset()


def test_a_file_that_cannot_be_read_from_refuses(kind: str) -> None:
    """A pipe has no offsets: what pread says goes into the reply."""
    pipe = os.pipe()
    try:

        def script(peer: Peer) -> None:
            assert refused(peer.dma_read(BASE, 1)) == errno.ESPIPE
            assert refused(peer.dma_write(BASE, b"x")) == errno.ESPIPE

        with scripted(kind, during_reset(script)) as (client, _):
            client.dma_map(BASE, 0x1000, pipe[0])
            client.reset()
    finally:
        for fd in pipe:
            os.close(fd)


# The twin socket


class TwinServer:
    """Answers of a server that grants a twin socket, and its own end of that."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.peer = Peer(self._ours)
        text = version_answer(Capabilities(twin_socket=TwinSocketCapability(supported=True, fd_index=0)))
        self.answers: dict[int, Handler] = {
            Command.VERSION: lambda peer, request: peer.reply(request, text, [self._theirs.fileno()])
        }

    def __enter__(self) -> TwinServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def twin() -> Iterator[TwinServer]:
    with TwinServer() as server:
        yield server


def test_row_23_requests_on_the_twin_socket(kind: str, twin: TwinServer) -> None:
    def script(peer: Peer) -> None:
        assert data_of(twin.peer.dma_read(BASE, 4)) == b"twin"
        assert refused(twin.peer.dma_read(0, 4)) == errno.EFAULT
        assert data_of(peer.dma_read(BASE, 4)) == b"twin", "the main socket works as before"

    with scripted(kind, {**twin.answers, **during_reset(script)}) as (client, _):
        client.dma_map(BASE, 4, memory=bytearray(b"twin"))
        client.reset()


def reset_for_ever(client: Any) -> None:
    """What comes on two sockets at once may be seen in any order."""
    while True:
        client.reset()


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (message(5, Command.DEVICE_RESET), UnexpectedReplyError),
        (message(5, Command.DMA_READ, size=3, flags=0), FramingError),
    ],
    ids=["a reply", "no message"],
)
def test_nonsense_on_the_twin_socket_ends_the_connection(
    kind: str, twin: TwinServer, bad: bytes, error: type[Exception]
) -> None:
    with scripted(kind, {**twin.answers, **during_reset(lambda peer: twin.peer.raw(bad))}) as (client, _):
        with pytest.raises(error):
            reset_for_ever(client)
        with pytest.raises(ConnectionClosedError):
            client.reset()


def test_a_twin_socket_that_closes_ends_the_connection(kind: str, twin: TwinServer) -> None:
    def hang_up(peer: Peer, request: Request) -> None:
        twin.peer.sock.shutdown(socket.SHUT_RDWR)

    with (
        scripted(kind, {**twin.answers, Command.DEVICE_RESET: hang_up}) as (client, _),
        pytest.raises(ConnectionClosedError),
    ):
        client.reset()


# Idle


def readable(client: Any, timeout: float = 10.0) -> bool:
    poll = select.poll()
    poll.register(client.fileno(), select.POLLIN)
    return bool(poll.poll(timeout * 1000))


@pytest.mark.parametrize("by_twin", [False, True])
def test_requests_while_no_call_is_under_way(kind: str, by_twin: bool, twin: TwinServer) -> None:
    """``fileno`` tells when there is something to do, on either socket."""
    answers = twin.answers if by_twin else {}
    with scripted(kind, answers) as (client, server):
        client.dma_map(BASE, 4, memory=bytearray(b"idle"))
        assert not readable(client, 0)
        assert client.serve_dma() == 0
        assert client.serve_dma(0.01) == 0
        peer = twin.peer if by_twin else server.peer
        for _ in range(3):
            peer.raw(message(1, Command.DMA_READ, m.DmaAccess(BASE, 4).pack(), flags=0))
        answered = 0
        while answered < 3:
            assert readable(client)
            answered += client.serve_dma()
        assert answered == 3
        assert not readable(client, 0)
        if by_twin:
            replies = [reply for _ in range(3) if (reply := twin.peer.receive())]
        else:
            client.reset()  # the replies before it have arrived then
            replies = server.replies
        assert [data_of(reply) for reply in replies] == [b"idle"] * 3


def test_serve_dma_stays_for_as_long_as_it_was_told(kind: str) -> None:
    with scripted(kind) as (client, server):
        client.dma_map(BASE, 4, memory=bytearray(b"idle"))
        server.peer.raw(message(1, Command.DMA_READ, m.DmaAccess(BASE, 4).pack(), flags=0))
        started = time.monotonic()
        assert client.serve_dma(0.05) == 1
        assert time.monotonic() - started >= 0.05


@pytest.mark.parametrize("cut", [0, 16, 31])
@pytest.mark.parametrize("before", [True, False])
def test_a_request_that_came_with_the_reply_of_a_call_is_not_forgotten(kind: str, before: bool, cut: int) -> None:
    """It was received already, or a part of it: no socket will ever tell; ``fileno`` has to."""

    def reply_and_ask(peer: Peer, request: Request) -> None:
        asked = message(1, Command.DMA_READ, m.DmaAccess(BASE, 4).pack(), flags=0)
        rest.append(asked[len(asked) - cut :])
        peer.raw(message(request.msg_id, request.command) + asked[: len(asked) - cut])

    rest: list[bytes] = []
    with scripted(kind, {Command.DEVICE_RESET: reply_and_ask}) as (client, server):
        client.dma_map(BASE, 4, memory=bytearray(b"idle"))
        if before:
            assert not readable(client, 0)
        client.reset()
        assert readable(client)
        if cut:
            assert client.serve_dma() == 0
            assert not readable(client, 0)
            server.peer.raw(rest[0])
            assert readable(client)
        assert client.serve_dma() == 1
        assert not readable(client, 0)
        client.region_read(0, 0, 4)
        assert [data_of(reply) for reply in server.replies] == [b"idle"]


def test_serve_dma_returns_in_time_though_the_server_goes_on(kind: str) -> None:
    """Requests without end are no reason to stay, nor an error."""

    def flood(peer: Peer, request: Request) -> None:
        peer.reply(request)
        burst = message(1, Command.DMA_READ, m.DmaAccess(0, 1).pack(), flags=NO_REPLY) * 1000
        while not peer.over.is_set():
            peer.raw(burst)

    with scripted(kind, {Command.DEVICE_RESET: flood}) as (client, server):
        client.reset()
        try:
            assert readable(client)
            assert client.serve_dma() > 0
            assert client.serve_dma(0.05) > 0
        finally:
            server.peer.over.set()
            client.close()


def test_a_server_that_does_not_take_its_answers(kind: str) -> None:
    """A part of an answer is out: the connection is over, and the call ends in time."""

    def ask_and_never_listen(peer: Peer, request: Request) -> None:
        peer.raw(message(1, Command.DMA_READ, m.DmaAccess(0, 1 << 20).pack(), flags=0) * 8)
        peer.over.wait(20)

    with scripted(kind, {Command.DEVICE_RESET: ask_and_never_listen}, timeout=0.3) as (client, server):
        client.dma_map(0, 1 << 20, memory=bytearray(1 << 20))
        with pytest.raises(CallTimeoutError):
            client.reset()
        with pytest.raises(ConnectionClosedError):
            client.reset()
        server.peer.over.set()


@pytest.mark.parametrize(
    ("stream", "error"),
    [(message(9, 9), UnexpectedReplyError), (message(9, 9, size=1), FramingError), (b"", ConnectionClosedError)],
)
def test_serve_dma_ends_with_a_stream_that_is_lost(kind: str, stream: bytes, error: type[Exception]) -> None:
    def spoil(peer: Peer, request: Request) -> None:
        peer.reply(request)
        peer.raw(stream)
        if not stream:
            peer.sock.shutdown(socket.SHUT_RDWR)

    with scripted(kind, {Command.DEVICE_RESET: spoil}) as (client, _):
        client.reset()
        with pytest.raises(error):
            client.serve_dma(10)
        with pytest.raises(ConnectionClosedError):
            client.reset()
