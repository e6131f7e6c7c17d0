"""What a backend asks of its client: DMA by messages, deferred work, watches, and quiescing that ends later.

Rows 12, 17, 23, 29 of protocol.md, section 0. Every test runs with serve_forever(), with poll() and with spinning.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import (
    ERROR,
    NO_REPLY,
    REPLY,
    TIMEOUT,
    TWIN_CAPABILITIES,
    MigratableBackend,
    RawPeer,
    Received,
    Serving,
    access,
    assert_quiet,
    dma_map,
    dma_unmap,
    eventfds,
    memfd,
    message,
    open_fds,
    recording,
    serving,
)
from vfio_user.server import Quiescing, dma_messages, session

READ, WRITE, DMA_READ, DMA_WRITE, RESET = 9, 10, 11, 12, 13
MODES: dict[str, dict[str, Any]] = {"serve_forever": {}, "poll": {"polled": True}, "spin": {"spin": 50e-6}}


class LinkBackend(MigratableBackend):
    """Does what ``act`` says in its hooks; ``read`` has what DMA_READ brought."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[bytes] = []
        self.errors: list[OSError] = []

    def dma_read(self, address: int, size: int) -> Callable[[], None]:
        def work() -> None:
            assert self.link is not None
            buffer = bytearray(size)
            self.link.dma_read(address, memoryview(buffer))
            self.read.append(bytes(buffer))

        return work

    def dma_write(self, address: int, data: bytes) -> Callable[[], None]:
        def work() -> None:
            assert self.link is not None
            self.link.dma_write(address, memoryview(data))

        return work

    def deferred(self, work: Callable[[], None]) -> Callable[[], None]:
        def later() -> None:
            assert self.link is not None
            self.link.defer(work)

        return later

    def once(self, name: str, work: Callable[[], None]) -> None:
        """Do ``work`` in the next call of the hook, and only there."""

        def act() -> None:
            del self.act[name]
            work()

        self.act[name] = act


@pytest.fixture
def backend() -> Iterator[LinkBackend]:
    backend = LinkBackend()
    with recording(backend):
        yield backend


@pytest.fixture(params=MODES)
def served(backend: LinkBackend, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Serving]:
    with serving(backend, **MODES[request.param]) as served:
        yield served
    if not request.node.get_closest_marker("usefixtures"):
        assert_quiet(caplog)


@pytest.fixture
def loud() -> None:
    """Marks a test whose device fails: that is logged."""


@pytest.fixture
def peer(served: Serving) -> RawPeer:
    return served.client()


def write_request(offset: int = 0, data: bytes = b"go!!") -> bytes:
    return access(0, offset, len(data)) + data


def dma_request(peer: RawPeer, command: int, address: int, count: int) -> Received:
    """The next message must be this request of the server's."""
    request = peer.read()
    assert (request.command, request.flags, request.error, request.fds) == (command, 0, 0, [])
    assert request.payload[:16] == struct.pack("<QQ", address, count)
    assert len(request.payload) == (16 if command == DMA_READ else 16 + count)
    return request


def answer(peer: RawPeer, request: Received, data: bytes = b"") -> None:
    peer.reply(request, request.payload[:16] + data)


def read_reply(peer: RawPeer, msg_id: int, command: int, error: int = 0) -> Received:
    reply = peer.read()
    assert (reply.msg_id, reply.command, reply.error) == (msg_id, command, error), reply
    assert reply.flags == (REPLY | ERROR if error else REPLY)
    return reply


# DMA by messages


def test_row29_dma_read_in_a_hook(backend: LinkBackend, peer: RawPeer) -> None:
    backend.act["region_write"] = backend.dma_read(0x1234, 5)
    for data in (b"hello", b"again"):
        command = peer.post(WRITE, write_request())
        answer(peer, dma_request(peer, DMA_READ, 0x1234, 5), data)
        read_reply(peer, command, WRITE)
    assert backend.read == [b"hello", b"again"]


@pytest.mark.parametrize("length", [16, 0, 12], ids=["C", "QEMU 10.2", "specification"])
def test_row12_replies_to_dma_write(backend: LinkBackend, peer: RawPeer, length: int) -> None:
    backend.act["region_write"] = backend.dma_write(2**64 - 8, b"12345678")
    command = peer.post(WRITE, write_request())
    request = dma_request(peer, DMA_WRITE, 2**64 - 8, 8)
    assert request.payload[16:] == b"12345678"
    peer.reply(request, request.payload[:length])
    read_reply(peer, command, WRITE)


def test_of_nothing_there_is_no_request(backend: LinkBackend, peer: RawPeer) -> None:
    backend.once("region_write", backend.dma_read(0, 0))
    peer.ok(WRITE, write_request())
    backend.once("region_write", backend.dma_write(0, b""))
    peer.ok(WRITE, write_request())
    assert backend.read == [b""]


@pytest.mark.parametrize(
    ("limit", "size", "chunks"),
    [
        (100, 250, [100, 100, 50]),
        (1, 3, [1, 1, 1]),
        (1 << 20, 300_000, [131072, 131072, 37856]),  # row 29: never more than 128 KiB
        (1 << 20, 131072, [131072]),
    ],
)
def test_row29_requests_are_split(
    backend: LinkBackend, served: Serving, limit: int, size: int, chunks: list[int]
) -> None:
    peer = served.client(f'{{"capabilities":{{"max_data_xfer_size":{limit}}}}}\0'.encode())
    data = os.urandom(size)
    backend.once("region_write", backend.dma_read(0x1000, size))
    command = peer.post(WRITE, write_request())
    position = 0
    for count in chunks:
        answer(peer, dma_request(peer, DMA_READ, 0x1000 + position, count), data[position : position + count])
        position += count
    read_reply(peer, command, WRITE)
    assert backend.read == [data]
    backend.once("region_write", backend.dma_write(0x1000, data))
    command = peer.post(WRITE, write_request())
    written = b""
    for count in chunks:
        request = dma_request(peer, DMA_WRITE, 0x1000 + len(written), count)
        written += request.payload[16:]
        answer(peer, request)
    read_reply(peer, command, WRITE)
    assert written == data


def test_row23_commands_are_served_while_a_reply_is_awaited(backend: LinkBackend, peer: RawPeer) -> None:
    backend.once("region_write", backend.dma_read(0, 4))
    command = peer.post(WRITE, write_request())
    request = dma_request(peer, DMA_READ, 0, 4)
    for number in range(3):
        peer.region_write(0, 8, bytes([number] * 4))
        assert peer.region_read(0, 8, 4) == bytes([number] * 4)
    peer.check_alive()
    with memfd() as fd:
        peer.ok(2, dma_map(0, 0x1000), [fd])
    with eventfds(2) as fds:
        peer.ok(8, struct.pack("<5I", 20, 4 | 32, 1, 0, 2), fds)
    assert peer.refused(READ, access(0, 0x1000, 1)) == errno.EINVAL
    assert peer.refused(14) == errno.EINVAL
    answer(peer, request, b"data")
    read_reply(peer, command, WRITE)
    assert backend.read == [b"data"]


def test_row23_in_one_send_all_is_served_in_order(backend: LinkBackend, peer: RawPeer) -> None:
    """Commands before, around and behind the DMA reply, all in the receive buffer at once."""
    backend.once("region_write", backend.dma_read(0, 4))
    command = peer.post(WRITE, write_request())
    request = dma_request(peer, DMA_READ, 0, 4)
    peer.send(
        message(1, WRITE, write_request(9, b"a"))
        + message(request.msg_id, DMA_READ, struct.pack("<QQ", 0, 4) + b"data", REPLY)
        + message(2, WRITE, write_request(10, b"b"))
        + message(3, READ, access(0, 9, 2))
    )
    read_reply(peer, 1, WRITE)
    read_reply(peer, command, WRITE)
    read_reply(peer, 2, WRITE)
    assert read_reply(peer, 3, READ).payload[16:] == b"ab"


@pytest.mark.parametrize(
    ("flags", "error", "expected"),
    [
        (REPLY | ERROR, errno.EFAULT, errno.EFAULT),
        (REPLY | ERROR, 0xBEEF, 0xBEEF),
        (REPLY | ERROR, 0, errno.EINVAL),
    ],
)
@pytest.mark.parametrize("payload", [b"", b"a payload that nobody reads"])
def test_error_replies_reach_the_hook(
    backend: LinkBackend, peer: RawPeer, flags: int, error: int, expected: int, payload: bytes
) -> None:
    for work, kind in ((backend.dma_read(0, 4), DMA_READ), (backend.dma_write(0, b"data"), DMA_WRITE)):
        backend.once("region_write", work)
        command = peer.post(WRITE, write_request())
        request = dma_request(peer, kind, 0, 4)
        peer.reply(request, payload, flags=flags, error=error)
        read_reply(peer, command, WRITE, expected)
    assert backend.read == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack("<QQ", 0, 4),
        struct.pack("<QQ", 0, 4) + b"dat",
        struct.pack("<QQ", 0, 4) + b"data+",
        struct.pack("<QQ", 0, 3) + b"dat",
        struct.pack("<QQ", 1, 4) + b"data",
        struct.pack("<QQ", 0, 5) + b"data",
        struct.pack("<QQ", 0, 2**64 - 1) + b"data",
    ],
)
def test_wrong_replies_to_dma_read(backend: LinkBackend, peer: RawPeer, payload: bytes) -> None:
    backend.once("region_write", backend.dma_read(0, 4))
    command = peer.post(WRITE, write_request())
    peer.reply(dma_request(peer, DMA_READ, 0, 4), payload)
    read_reply(peer, command, WRITE, errno.EPROTO)
    peer.check_alive()
    assert backend.read == []


@pytest.mark.parametrize(
    "payload", [struct.pack("<QQ", 1, 4), struct.pack("<QQ", 0, 3), struct.pack("<QI", 1, 4), bytes(11), b"\0"]
)
def test_wrong_replies_to_dma_write(backend: LinkBackend, peer: RawPeer, payload: bytes) -> None:
    backend.once("region_write", backend.dma_write(0, b"data"))
    command = peer.post(WRITE, write_request())
    peer.reply(dma_request(peer, DMA_WRITE, 0, 4), payload)
    read_reply(peer, command, WRITE, errno.EPROTO)


def test_row23_replies_are_matched_by_id_and_type(backend: LinkBackend, peer: RawPeer) -> None:
    """What answers nothing gets an error reply, and the right one is awaited on."""
    backend.once("region_write", backend.dma_read(0, 4))
    command = peer.post(WRITE, write_request())
    request = dma_request(peer, DMA_READ, 0, 4)
    payload = struct.pack("<QQ", 0, 4) + b"bad!"
    for wrong in (
        message(request.msg_id + 1, DMA_READ, payload, REPLY),
        message(request.msg_id, DMA_WRITE, payload, REPLY),
        message(request.msg_id, WRITE, payload, REPLY),
        message(request.msg_id, DMA_READ, payload, 2),
        message(request.msg_id, DMA_READ, payload, 0),
        message(request.msg_id, 0, payload, REPLY),
    ):
        peer.send(wrong)
        assert (peer.read().flags, backend.read) == (REPLY | ERROR, [])
    answer(peer, request, b"data")
    read_reply(peer, command, WRITE)
    assert backend.read == [b"data"]
    peer.reply(request, payload)  # once more
    read_reply(peer, request.msg_id, DMA_READ, errno.EINVAL)


@pytest.mark.parametrize("twin", [False, True])
def test_descriptors_with_a_dma_reply_are_closed(backend: LinkBackend, served: Serving, twin: bool) -> None:
    peer, other = twin_client(served) if twin else (served.client(), None)
    channel = other or peer
    before = open_fds()
    backend.once("region_write", backend.dma_read(0, 4))
    command = peer.post(WRITE, write_request())
    request = dma_request(channel, DMA_READ, 0, 4)
    with eventfds(2) as fds:
        channel.send(message(request.msg_id, DMA_READ, request.payload[:16] + b"data", REPLY), fds)
        read_reply(peer, command, WRITE)
    peer.check_alive()
    assert open_fds() <= before


def test_a_reply_that_is_too_large(backend: LinkBackend, peer: RawPeer) -> None:
    backend.once("region_write", backend.dma_read(0, 4))
    command = peer.post(WRITE, write_request())
    request = dma_request(peer, DMA_READ, 0, 4)
    peer.reply(request, struct.pack("<QQ", 0, 4) + bytes(2 << 20))
    read_reply(peer, request.msg_id, DMA_READ, errno.EINVAL)
    peer.close()
    backend.wait_for("disconnected")
    assert command
    assert backend.read == []


@pytest.fixture(params=MODES)
def impatient(
    backend: LinkBackend, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[RawPeer]:
    """A client of a server that waits for DMA replies for a moment only."""
    with serving(backend, dma_timeout=0.05, **MODES[request.param]) as served:
        yield served.client()
    assert_quiet(caplog)


def test_a_reply_that_comes_too_late(backend: LinkBackend, impatient: RawPeer) -> None:
    backend.act["region_write"] = backend.dma_read(0, 4)
    command = impatient.post(WRITE, write_request())
    late = dma_request(impatient, DMA_READ, 0, 4)
    read_reply(impatient, command, WRITE, errno.ETIMEDOUT)
    answer(impatient, late, b"late")  # dropped without a word
    impatient.check_alive()
    backend.act.clear()
    impatient.check_alive()
    assert backend.read == []


def test_a_client_that_keeps_talking_does_not_stop_the_clock(backend: LinkBackend, impatient: RawPeer) -> None:
    backend.once("region_write", backend.dma_read(0, 4))
    command = impatient.post(WRITE, write_request())
    dma_request(impatient, DMA_READ, 0, 4)
    awaited = command
    for _ in range(100_000):
        other = impatient.post(READ, access(0, 0, 1))
        reply = impatient.read()
        if reply.msg_id == awaited:
            assert reply.error == errno.ETIMEDOUT
            read_reply(impatient, other, READ)
            return
    pytest.fail("the DMA request never timed out")


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("part", [b"", b"\1", message(0, DMA_READ, b"\0" * 20, REPLY)[:20]])
def test_a_client_that_vanishes_during_dma(backend: LinkBackend, served: Serving, deferred: bool, part: bytes) -> None:
    peer = served.client()
    with memfd() as fd:
        peer.ok(2, dma_map(0, 0x1000), [fd])
    work = backend.dma_read(0, 4)
    backend.once("region_write", backend.deferred(work) if deferred else work)
    peer.post(WRITE, write_request())
    if deferred:
        peer.read()
    dma_request(peer, DMA_READ, 0, 4)
    peer.send(part)
    peer.close()
    backend.wait_for("disconnected")
    assert backend.read == []
    assert backend.called("dma_unmap") == [("dma_unmap", 0, 0, 0x1000)]
    served.client().check_alive()


@pytest.mark.parametrize("deferred", [False, True])
def test_a_header_that_cannot_be_framed_during_dma(backend: LinkBackend, served: Serving, deferred: bool) -> None:
    peer = served.client()
    work = backend.dma_read(0, 4)
    backend.once("region_write", backend.deferred(work) if deferred else work)
    command = peer.post(WRITE, write_request())
    if deferred:
        read_reply(peer, command, WRITE)
    dma_request(peer, DMA_READ, 0, 4)
    peer.send(b"\xff" * 64)
    if not deferred:
        read_reply(peer, command, WRITE, errno.EINVAL)
    assert peer.at_end()
    served.client().check_alive()


@pytest.mark.parametrize("backwards", [False, True])
def test_dma_nests_to_a_limit(backend: LinkBackend, peer: RawPeer, backwards: bool) -> None:
    """Each request is answered by a command whose hook asks for DMA again."""
    backend.act["region_write"] = backend.dma_read(0, 1)
    commands, requests = [], []
    for _ in range(dma_messages.MAX_NESTING):
        commands.append(peer.post(WRITE, write_request()))
        requests.append(dma_request(peer, DMA_READ, 0, 1))
    assert peer.refused(WRITE, write_request()) == errno.EDEADLK
    for request in reversed(requests) if backwards else requests:
        answer(peer, request, b"x")
    for command in reversed(commands):
        read_reply(peer, command, WRITE)
    assert backend.read == [b"x"] * dma_messages.MAX_NESTING
    backend.act.clear()
    peer.ok(WRITE, write_request())


# What stops DMA waits for DMA


QUIESCING = {
    "reset": (RESET, b""),
    "unmap": (3, dma_unmap(0, 0x1000)),
    "state": (16, struct.pack("<IIII", 16, 2 | 1 << 17, 1, 0)),
}


@pytest.mark.parametrize("name", QUIESCING)
@pytest.mark.parametrize("where", ["hook", "deferred", "watch"])
@pytest.mark.parametrize("together", [False, True])
def test_row23_what_quiesces_waits_and_keeps_its_place(
    backend: LinkBackend, peer: RawPeer, name: str, where: str, together: bool
) -> None:
    """Behind the DMA that is in flight, and before all that came later."""
    peer.ok(2, dma_map(0, 0x1000))
    first = None
    with eventfds(1) as fds:
        if where == "watch":
            watch(backend, peer, fds[0], backend.dma_read(0, 4))
            os.eventfd_write(fds[0], 1)
        else:
            work = backend.dma_read(0, 4)
            backend.once("region_write", work if where == "hook" else backend.deferred(work))
            first = peer.post(WRITE, write_request())
            if where == "deferred":
                read_reply(peer, first, WRITE)
        request = dma_request(peer, DMA_READ, 0, 4)
        command, payload = QUIESCING[name]
        calls = len(backend.calls)
        reply = message(request.msg_id, DMA_READ, struct.pack("<QQ", 0, 4) + b"data", REPLY)
        stream = [message(1, command, payload), message(2, WRITE, write_request(8, b"behind"))]
        if together:
            peer.send(stream[0] + reply + stream[1])
        else:
            peer.send(stream[0] + stream[1])
            peer.send(reply)
        if where == "hook":
            assert first is not None
            read_reply(peer, first, WRITE)
        read_reply(peer, 1, command)
        read_reply(peer, 2, WRITE)
        assert backend.read == [b"data"]
        hooks = [call[0] for call in backend.calls[calls:]]
        assert hooks == [
            "quiesce",
            {"unmap": "dma_unmap", "state": "migration_set_state"}.get(name, name),
            "region_write",
        ]


def test_commands_that_wait_are_bounded(backend: LinkBackend, served: Serving) -> None:
    peer = served.client()
    backend.once("region_write", backend.deferred(backend.dma_read(0, 4)))
    peer.ok(WRITE, write_request())
    dma_request(peer, DMA_READ, 0, 4)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        peer.send(message(1, RESET) * (session.MAX_POSTPONED + 1))
    assert peer.at_end()
    served.client().check_alive()


def test_bytes_that_wait_are_bounded(backend: LinkBackend, served: Serving) -> None:
    peer = served.client()
    backend.once("region_write", backend.deferred(backend.dma_read(0, 4)))
    peer.ok(WRITE, write_request())
    dma_request(peer, DMA_READ, 0, 4)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(6):
            peer.send(message(1, RESET, bytes(1 << 20)))
    assert peer.at_end()
    served.client().check_alive()


def test_descriptors_of_commands_that_wait(backend: LinkBackend, served: Serving) -> None:
    """Postponed commands keep their descriptors, and give them back when the client leaves."""
    peer = served.client()
    before = open_fds()
    backend.once("region_write", backend.dma_read(0, 4))
    command = peer.post(WRITE, write_request())
    request = dma_request(peer, DMA_READ, 0, 4)
    with memfd() as fd:
        peer.send(message(1, RESET))
        peer.send(message(2, 2, dma_map(0, 0x1000)), [fd])
    answer(peer, request, b"data")
    read_reply(peer, command, WRITE)
    read_reply(peer, 1, RESET)
    read_reply(peer, 2, 2)
    assert len(backend.fds) == 1
    backend.fds.pop().close()
    assert open_fds() <= before
    backend.once("region_write", backend.dma_read(0, 4))
    peer.post(WRITE, write_request())
    dma_request(peer, DMA_READ, 0, 4)
    with memfd() as fd:
        peer.send(message(1, RESET))
        peer.send(message(2, 2, dma_map(0x1000, 0x1000)), [fd])
    peer.close()
    backend.wait_for("disconnected")
    served.client().check_alive()
    assert open_fds() <= before


# The twin socket


def twin_client(served: Serving) -> tuple[RawPeer, RawPeer]:
    """A client and its twin socket."""
    peer = served.connect()
    (fd,) = peer.version(TWIN_CAPABILITIES).fds
    twin = RawPeer(socket.socket(fileno=peer.take(fd)))
    served.peers.append(twin)
    return peer, twin


@pytest.mark.parametrize("deferred", [False, True])
def test_row26_dma_on_the_twin_socket(backend: LinkBackend, served: Serving, deferred: bool) -> None:
    peer, twin = twin_client(served)
    for work, kind in ((backend.dma_read(0, 4), DMA_READ), (backend.dma_write(0, b"data"), DMA_WRITE)):
        backend.once("region_write", backend.deferred(work) if deferred else work)
        command = peer.post(WRITE, write_request())
        request = dma_request(twin, kind, 0, 4)
        if deferred:
            read_reply(peer, command, WRITE)
        assert len(peer.region_read(0, 0, 4)) == 4
        answer(twin, request, b"data" if kind == DMA_READ else b"")
        if not deferred:
            read_reply(peer, command, WRITE)
        peer.check_alive()
    assert backend.read == [b"data"]


def test_row26_commands_meanwhile_and_nonsense_on_the_twin(backend: LinkBackend, served: Serving) -> None:
    peer, twin = twin_client(served)
    backend.once("region_write", backend.dma_read(0, 4))
    command = peer.post(WRITE, write_request())
    request = dma_request(twin, DMA_READ, 0, 4)
    assert peer.region_read(0, 8, 4) == bytes(4)
    assert twin.refused(READ, access(0, 0, 4)) == errno.EINVAL
    assert twin.refused(1, bytes(4)) == errno.EINVAL
    assert twin.refused(14) == errno.EINVAL
    twin.send(message(request.msg_id + 1, DMA_READ, bytes(20), REPLY))
    twin.send(message(request.msg_id, DMA_WRITE, bytes(20), REPLY))
    with eventfds(1) as fds:
        twin.send(message(0, RESET, b"", NO_REPLY), fds)
    assert peer.region_read(0, 8, 4) == bytes(4)
    peer.reply(request, bytes(20))  # on the wrong socket
    read_reply(peer, request.msg_id, DMA_READ, errno.EINVAL)
    answer(twin, request, b"data")
    read_reply(peer, command, WRITE)
    assert backend.read == [b"data"]
    assert not backend.called("reset")


@pytest.mark.parametrize("garbage", [False, True])
def test_row26_a_twin_socket_that_ends(backend: LinkBackend, served: Serving, garbage: bool) -> None:
    """DMA fails, the connection lives."""
    peer, twin = twin_client(served)
    backend.act["region_write"] = backend.dma_read(0, 4)
    command = peer.post(WRITE, write_request())
    dma_request(twin, DMA_READ, 0, 4)
    if garbage:
        twin.send(b"\xff" * 16)
    else:
        twin.close()
    read_reply(peer, command, WRITE, errno.EINVAL if garbage else errno.EIO)
    peer.check_alive()
    if not garbage:
        assert peer.refused(WRITE, write_request()) == errno.EIO


def test_row26_a_client_that_vanishes_with_its_twin(backend: LinkBackend, served: Serving) -> None:
    before = open_fds()
    for number in range(1, 4):
        peer, twin = twin_client(served)
        backend.once("region_write", backend.dma_read(0, 4))
        peer.post(WRITE, write_request())
        dma_request(twin, DMA_READ, 0, 4)
        for end in (peer, twin) if number % 2 else (twin, peer):
            end.close()
        backend.wait_for("disconnected", number)
    peer = served.client()
    peer.close()
    backend.wait_for("disconnected", 4)
    served.server.shutdown()
    served.join()
    assert open_fds() <= before


# Deferred work


def test_row23_deferred_work_comes_after_the_reply(backend: LinkBackend, peer: RawPeer) -> None:
    """Also when it defers more, and from a posted write, a slow-path command and one that failed."""
    order: list[str] = []

    def more() -> None:
        order.append("first")
        backend.dma_read(0, 4)()
        backend.deferred(lambda: order.append("second"))()

    backend.once("region_write", backend.deferred(more))
    command = peer.post(WRITE, write_request())
    read_reply(peer, command, WRITE)
    answer(peer, dma_request(peer, DMA_READ, 0, 4), b"data")
    peer.check_alive()
    assert order == ["first", "second"]
    backend.once("reset", backend.deferred(lambda: order.append("reset")))
    peer.ok(RESET)
    backend.once("region_write", backend.deferred(lambda: order.append("posted")))
    peer.post(WRITE, write_request(), flags=NO_REPLY)
    backend.fail["region_read"] = OSError(errno.EBUSY, "no")
    backend.once("region_read", backend.deferred(lambda: order.append("failed")))
    assert peer.refused(READ, access(0, 0, 4)) == errno.EBUSY
    peer.check_alive()
    assert order[2:] == ["reset", "posted", "failed"]


def test_deferred_dma_that_the_client_refuses(backend: LinkBackend, peer: RawPeer) -> None:
    """No traceback for what is the peer's doing."""
    backend.once("region_write", backend.deferred(backend.dma_read(0, 4)))
    peer.ok(WRITE, write_request())
    peer.reply(dma_request(peer, DMA_READ, 0, 4), flags=REPLY | ERROR, error=errno.EFAULT)
    peer.check_alive()


@pytest.mark.usefixtures("loud")
def test_deferred_work_with_a_bug(backend: LinkBackend, peer: RawPeer, caplog: pytest.LogCaptureFixture) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    backend.once("region_write", backend.deferred(bug))
    peer.ok(WRITE, write_request())
    peer.check_alive()
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]


def test_deferred_work_of_a_client_that_left_is_dropped(backend: LinkBackend, served: Serving) -> None:
    peer = served.client()
    backend.once("disconnected", lambda: None)
    backend.once("region_write", backend.deferred(backend.dma_read(0, 4)))
    peer.post(WRITE, write_request())
    peer.close()
    backend.wait_for("disconnected")
    served.client().check_alive()
    assert backend.read == []


# Watches


def watch(backend: LinkBackend, peer: RawPeer, fd: int, work: Callable[[], None]) -> None:
    """Have the backend watch ``fd``; ``work`` is done each time it was signalled."""

    def ready() -> None:
        os.eventfd_read(fd)
        work()

    def begin() -> None:
        assert backend.link is not None
        backend.link.watch(fd, ready)

    backend.once("region_read", begin)
    peer.region_read(0, 0, 4)


def test_watch(backend: LinkBackend, peer: RawPeer) -> None:
    with eventfds(2) as (doorbell, answered):
        watch(backend, peer, doorbell, lambda: os.eventfd_write(answered, 1))
        for _ in range(3):
            os.eventfd_write(doorbell, 1)
            wait_readable(answered)
            assert os.eventfd_read(answered) == 1
            assert peer.region_read(0, 0, 4) == bytes(4)

        def end() -> None:
            assert backend.link is not None
            backend.link.unwatch(doorbell)
            backend.link.unwatch(doorbell)
            backend.link.unwatch(-5)

        backend.once("region_write", end)
        peer.ok(WRITE, write_request())
        os.eventfd_write(doorbell, 1)
        peer.check_alive()
        assert os.eventfd_read(doorbell) == 1


def wait_readable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(TIMEOUT * 1000)


def test_dma_in_a_watch(backend: LinkBackend, peer: RawPeer) -> None:
    """Commands that come meanwhile are served, also those that the callback itself took off the socket."""
    with eventfds(1) as fds:
        watch(backend, peer, fds[0], backend.dma_read(0, 4))
        for turn in range(5):
            os.eventfd_write(fds[0], 1)
            request = dma_request(peer, DMA_READ, 0, 4)
            assert peer.region_read(0, 0, 4) == bytes(4)
            reply = message(request.msg_id, DMA_READ, struct.pack("<QQ", 0, 4) + b"data", REPLY)
            peer.send(reply + message(turn, 4, struct.pack("<4I", 16, 0, 0, 0)))
            read_reply(peer, turn, 4)
    assert backend.read == [b"data"] * 5


def test_dma_in_a_watch_that_takes_what_was_ready(backend: LinkBackend, peer: RawPeer) -> None:
    """Command and doorbell are there at once: the callback's DMA takes the command off the socket, none is left."""
    release = threading.Event()
    with eventfds(1) as fds:
        watch(backend, peer, fds[0], backend.dma_read(0, 4))
        backend.once("region_write", lambda: assert_set(release))
        command = peer.post(WRITE, write_request())
        backend.wait_for("region_write")
        os.eventfd_write(fds[0], 1)
        peer.send(message(1, 4, struct.pack("<4I", 16, 0, 0, 0)))
        release.set()
        read_reply(peer, command, WRITE)
        received = {reply.command: reply for reply in (peer.read(), peer.read())}
        answer(peer, received[DMA_READ], b"data")
        assert received[4].msg_id == 1
        peer.check_alive()
    assert backend.read == [b"data"]


def assert_set(event: threading.Event) -> None:
    assert event.wait(TIMEOUT)


def test_a_watch_ends_with_its_client(backend: LinkBackend, served: Serving) -> None:
    with eventfds(1) as fds:
        peer = served.client()
        watch(backend, peer, fds[0], lambda: pytest.fail("the client is gone"))
        peer.close()
        backend.wait_for("disconnected")
        os.eventfd_write(fds[0], 1)
        served.client().check_alive()
        assert os.eventfd_read(fds[0]) == 1


@pytest.mark.usefixtures("loud")
def test_a_watch_with_a_bug(backend: LinkBackend, peer: RawPeer, caplog: pytest.LogCaptureFixture) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    with eventfds(2) as (doorbell, other):
        watch(backend, peer, doorbell, bug)
        watch(backend, peer, other, backend.dma_read(0, 1))
        os.eventfd_write(doorbell, 1)
        peer.check_alive()
        os.eventfd_write(other, 1)
        answer(peer, dma_request(peer, DMA_READ, 0, 1), b"x")
        peer.check_alive()
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]


# Quiescing that ends later


@pytest.mark.parametrize("name", QUIESCING)
@pytest.mark.parametrize("error", [0, errno.EIO, 0xBEEF])
def test_row17_quiescing_that_ends_later(backend: LinkBackend, peer: RawPeer, name: str, error: int) -> None:
    """From another thread, with success or an errno: the command is answered then, and later ones behind it."""
    peer.ok(2, dma_map(0, 0x1000))
    backend.quiescing = quiescing = Quiescing()
    command, payload = QUIESCING[name]
    peer.send(
        message(1, command, payload) + message(2, WRITE, write_request(0, b"abcd")) + message(3, READ, access(0, 0, 4))
    )
    backend.wait_for("quiesce")
    peer.send(message(4, 4, struct.pack("<4I", 16, 0, 0, 0)))
    assert backend.called("reset", "dma_unmap", "migration_set_state", "region_write") == []
    thread = threading.Thread(target=quiescing.done, args=(error,))
    thread.start()
    thread.join()
    read_reply(peer, 1, command, error)
    read_reply(peer, 2, WRITE)
    assert read_reply(peer, 3, READ).payload[16:] == b"abcd"
    read_reply(peer, 4, 4)
    assert bool(backend.called("reset", "dma_unmap", "migration_set_state")) == (not error)
    backend.quiescing = None
    peer.ok(RESET)


def test_row17_two_that_quiesce_one_behind_the_other(backend: LinkBackend, peer: RawPeer) -> None:
    waiting = [Quiescing(), Quiescing()]
    backend.act["quiesce"] = lambda: setattr(backend, "quiescing", waiting[len(backend.called("quiesce")) - 1])
    peer.send(message(1, RESET) + message(2, RESET))
    backend.wait_for("quiesce")
    waiting[0].done()
    read_reply(peer, 1, RESET)
    backend.wait_for("quiesce", 2)
    waiting[1].done(errno.EAGAIN)
    read_reply(peer, 2, RESET, errno.EAGAIN)
    backend.act.clear()
    backend.quiescing = None


@pytest.mark.parametrize("error", [0, errno.EBUSY])
def test_row17_quiescing_that_has_ended_already(backend: LinkBackend, peer: RawPeer, error: int) -> None:
    backend.quiescing = Quiescing()
    backend.quiescing.done(error)
    assert peer.call(RESET).error == error
    backend.quiescing = None


def test_row17_no_reply_to_a_parked_command(backend: LinkBackend, peer: RawPeer) -> None:
    backend.quiescing = quiescing = Quiescing()
    peer.post(RESET, flags=NO_REPLY)
    backend.wait_for("quiesce")
    quiescing.done(errno.EIO)
    peer.check_alive()
    backend.quiescing = None


class Awaited(Quiescing):
    """Knows how often somebody began to wait for it: for the command, and then for the client's end."""

    def __init__(self) -> None:
        super().__init__()
        self.waiters = threading.Semaphore(0)

    def on_done(self, wake: Callable[[], None]) -> None:
        super().on_done(wake)
        self.waiters.release()

    def wait(self, number: int) -> None:
        assert self.waiters.acquire(timeout=TIMEOUT), f"nobody waits for the {number}. time"


def test_row17_a_client_that_leaves_while_its_command_is_parked(backend: LinkBackend, served: Serving) -> None:
    """Its memory is taken away only when DMA has stopped."""
    peer = served.client()
    with memfd() as fd:
        peer.ok(2, dma_map(0, 0x1000), [fd])
    before = open_fds()
    backend.quiescing = quiescing = Awaited()
    with memfd() as fd:
        peer.send(message(1, RESET))
        peer.send(message(2, 2, dma_map(0x1000, 0x1000)), [fd])
    quiescing.wait(1)
    peer.close()
    quiescing.wait(2)
    assert backend.called("dma_unmap", "reset") == []
    backend.quiescing = None
    quiescing.done()
    backend.wait_for("disconnected")
    assert backend.called("dma_unmap", "reset") == [("dma_unmap", 0, 0, 0x1000)]
    served.client().check_alive()
    assert open_fds() <= before


def test_row17_watches_are_served_while_a_command_is_parked(backend: LinkBackend, peer: RawPeer) -> None:
    """A device learns from one that its DMA has ended; DMA that it still does keeps the order of commands."""
    backend.quiescing = quiescing = Quiescing()
    with eventfds(1) as fds:

        def finish() -> None:
            backend.dma_write(0, b"last")()
            quiescing.done()

        watch(backend, peer, fds[0], finish)
        peer.send(message(1, RESET) + message(2, WRITE, write_request()))
        backend.wait_for("quiesce")
        os.eventfd_write(fds[0], 1)
        request = dma_request(peer, DMA_WRITE, 0, 4)
        peer.send(message(3, WRITE, write_request(4)) + message(request.msg_id, DMA_WRITE, request.payload[:16], REPLY))
        read_reply(peer, 1, RESET)
        read_reply(peer, 2, WRITE)
        read_reply(peer, 3, WRITE)
    backend.quiescing = None


def test_quiesced_when_the_client_leaves(backend: LinkBackend, served: Serving) -> None:
    peer = served.client()
    peer.ok(2, dma_map(0, 0x1000))
    backend.quiescing = quiescing = Quiescing()
    peer.close()
    backend.wait_for("quiesce")
    assert backend.called("dma_unmap") == []
    backend.quiescing = None
    quiescing.done()
    backend.wait_for("disconnected")
    assert [call[0] for call in backend.calls[-3:]] == ["quiesce", "dma_unmap", "disconnected"]


@pytest.mark.usefixtures("loud")
def test_a_device_that_cannot_quiesce_when_the_client_leaves(
    backend: LinkBackend, served: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "QUIESCE_TIMEOUT", 0.01)
    peer = served.client()
    peer.ok(2, dma_map(0, 0x1000))
    backend.quiescing = Quiescing()
    peer.close()
    backend.wait_for("disconnected")
    backend.quiescing = None
    peer = served.client()
    backend.fail["quiesce"] = backend.fail["disconnected"] = RuntimeError("bug")
    peer.close()
    backend.wait_for("disconnected", 2)
    backend.fail.clear()
    served.client().check_alive()
    assert backend.called("dma_unmap") == [("dma_unmap", 0, 0, 0x1000)]
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 3


def test_quiescing_is_done_once() -> None:
    woken: list[int] = []
    quiescing = Quiescing()
    assert not woken
    quiescing.on_done(lambda: woken.append(1))
    quiescing.done(errno.EIO)
    quiescing.done()
    assert (quiescing.error, woken) == (errno.EIO, [1])
    quiescing.on_done(lambda: woken.append(2))
    assert woken == [1, 2]
