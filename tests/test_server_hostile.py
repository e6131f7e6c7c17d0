"""Bad input, and what it gets: an error reply or a logged close, no leak, no traceback, the next client is served."""

from __future__ import annotations

import errno
import logging
import random
import resource
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support import (
    ALL_CAPABILITIES,
    HEADER,
    NO_REPLY,
    REPLY,
    TIMEOUT,
    MigratableBackend,
    RawPeer,
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
from vfio_user import Region
from vfio_user.transport.blocking import Channel

VERSION = message(1, 1, struct.pack("<HH", 0, 2) + ALL_CAPABILITIES)
DISCARD_LIMIT = 64 << 20


@pytest.fixture
def backend() -> Iterator[MigratableBackend]:
    backend = MigratableBackend()
    with recording(backend):
        yield backend


@pytest.fixture(params=["serve_forever", "poll"])
def served(
    backend: MigratableBackend, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[Serving]:
    with serving(backend, polled=request.param == "poll") as served:
        yield served
    assert_quiet(caplog)


@pytest.fixture
def peer(served: Serving) -> RawPeer:
    return served.client()


@pytest.mark.parametrize("command", [0, 14, 19, 20, 255, 65535])
def test_unknown_commands(peer: RawPeer, command: int) -> None:
    for payload in (b"", bytes(100)):
        assert peer.refused(command, payload) == errno.EINVAL
        peer.post(command, payload, flags=NO_REPLY)
        peer.check_alive()


@pytest.mark.parametrize("command", [11, 12])
def test_commands_in_the_wrong_direction(peer: RawPeer, command: int) -> None:
    assert peer.refused(command, struct.pack("<QQ", 0, 4) + b"data") == errno.EINVAL
    peer.check_alive()


@pytest.mark.parametrize("command", [0, 1, 4, 9, 11, 12, 13, 65535])
def test_replies_where_commands_belong(peer: RawPeer, command: int) -> None:
    """protocol.md, section 1: an unsolicited reply gets an error reply."""
    for flags in (REPLY, 0x21, 2, 3, 15, 0xFFFFFFEF):
        assert peer.refused(command, bytes(16), flags=flags) == errno.EINVAL
        peer.check_alive()


@pytest.mark.parametrize("command", [4, 5, 6, 7, 9, 17])
def test_no_reply_where_it_makes_no_sense(peer: RawPeer, command: int) -> None:
    peer.post(command, struct.pack("<IIQQQ", 32, 0, 0, 0, 0), flags=NO_REPLY)
    peer.check_alive()


@pytest.mark.parametrize("command", range(2, 19))
def test_every_payload_length(peer: RawPeer, backend: MigratableBackend, command: int) -> None:
    """Zeros of any length are answered once each: nothing is read past the payload, the stream stays in step."""
    for length in range(80):
        assert peer.call(command, bytes(length)).flags in (REPLY, 0x21)
        assert peer.call(command, b"\xff" * length).flags in (REPLY, 0x21)
    peer.check_alive()


@pytest.mark.parametrize(("command", "count"), [(4, 1), (9, 253), (13, 1), (15, 1), (16, 253), (17, 1), (18, 1)])
def test_descriptors_where_none_belong(served: Serving, peer: RawPeer, command: int, count: int) -> None:
    with eventfds(1) as fds:
        before = open_fds()
        assert peer.refused(command, struct.pack("<IIII", 16, 0, 0, 0), fds * count) == errno.EINVAL
        peer.post(command, struct.pack("<IIII", 16, 0, 0, 0), fds * count, flags=NO_REPLY)
        peer.check_alive()
        assert open_fds() <= before


def test_descriptors_with_a_posted_write_among_others(peer: RawPeer, backend: MigratableBackend) -> None:
    """The short way for register accesses is not taken while descriptors wait for their message."""
    with eventfds(1) as fds:
        before = open_fds()
        write = message(1, 10, access(0, 0, 4) + b"data", NO_REPLY)
        peer.send(write)
        peer.send(write, fds)
        peer.send(write)
        peer.check_alive()
        assert open_fds() <= before
    assert len(backend.called("region_write")) == 2


@pytest.mark.parametrize("size", [(1 << 20) + 33, 3 << 20])
@pytest.mark.parametrize(("command", "count"), [(2, 1), (8, 0), (8, 1), (10, 0), (13, 0), (13, 1), (99, 0)])
def test_too_large_to_take(peer: RawPeer, backend: MigratableBackend, size: int, command: int, count: int) -> None:
    """Skipped as it comes, answered, its descriptors closed; what follows is in step."""
    before = open_fds()
    with eventfds(count) as fds:
        assert peer.refused(command, bytes(size - HEADER.size), fds) == errno.EINVAL
        peer.post(command, bytes(size - HEADER.size), fds, flags=NO_REPLY)
        peer.check_alive()
    assert open_fds() <= before
    assert [call[0] for call in backend.calls] == ["connected"]


def test_the_largest_that_is_skipped(peer: RawPeer) -> None:
    peer.send(HEADER.pack(7, 10, DISCARD_LIMIT, 0, 0))
    part = bytes(1 << 20)
    left = DISCARD_LIMIT - HEADER.size
    while left:
        peer.send(part[:left])
        left -= min(left, len(part))
    reply = peer.read()
    assert (reply.msg_id, reply.error) == (7, errno.EINVAL)
    peer.check_alive()


@pytest.mark.parametrize("size", [0, 1, 15, DISCARD_LIMIT + 1, 2**31, 2**32 - 1])
def test_what_cannot_be_framed_is_a_logged_close(
    served: Serving, peer: RawPeer, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    peer.check_alive()
    peer.send(HEADER.pack(1, 9, size, 0, 0))
    assert peer.at_end()
    served.client().check_alive()
    assert [record.levelno for record in caplog.records if f"{size} bytes" in record.getMessage()] == [logging.WARNING]


def session_messages(memory: int, irq: int) -> list[tuple[bytes, list[int]]]:
    """A whole session of good commands of every kind."""
    return [
        (VERSION, []),
        (message(2, 4, struct.pack("<4I", 16, 0, 0, 0)), []),
        (message(3, 5, struct.pack("<IIIIQQ", 80, 0, 3, 0, 0, 0)), []),
        (message(4, 2, dma_map(0, 0x1000)), [memory]),
        (message(5, 8, struct.pack("<5I", 20, 36, 0, 0, 1)), [irq]),
        (message(6, 10, access(0, 0, 4) + b"data", NO_REPLY), []),
        (message(7, 9, access(0, 0, 4)), []),
        (message(8, 15, struct.pack("<QQII8s", 1, 0, 0, 4, b"data")), []),
        (message(9, 16, struct.pack("<IIII", 16, 2 | 1 << 17, 3, 0)), []),
        (message(10, 17, struct.pack("<II", 16, 8)), []),
        (message(11, 3, dma_unmap(0, 0x1000)), []),
        (message(12, 13), []),
    ]


def test_a_client_that_goes_away_at_any_byte(served: Serving, backend: MigratableBackend) -> None:
    """Header cut at every byte, every message cut at every byte; then a new client is served, and nothing leaks."""
    backend.act["reset"] = lambda: setattr(backend, "state", backend.state.RUNNING)
    served.client().close()
    backend.wait_for("disconnected")
    with memfd() as memory, eventfds(1) as irqs:
        script = session_messages(memory, irqs[0])
        before: Counter[str] = Counter()
        cuts = [(number, cut) for number, (data, _) in enumerate(script) for cut in range(len(data))]
        for number, cut in cuts:
            with RawPeer.connect(served.path) as peer:
                for data, fds in script[:number]:
                    peer.send(data, fds)
                data, fds = script[number]
                if cut:
                    peer.send(data[:cut], fds)
            if cut == 0:
                with served.client() as good:
                    good.check_alive()
                    for fd in backend.fds:
                        fd.close()
                    backend.fds.clear()
                    before = before or open_fds()
                    assert open_fds() <= before
                    backend.state = backend.state.RUNNING
    served.client().check_alive()
    backend.calls.clear()


def test_a_client_that_stops_talking_in_mid_message_and_goes_on(peer: RawPeer) -> None:
    """Byte by byte everything is served as well."""
    with memfd() as memory, eventfds(1) as irqs:
        for data, fds in session_messages(memory, irqs[0])[1:]:
            for position in range(len(data)):
                peer.send(data[position : position + 1], fds if position == 0 else [])
    replies = [peer.read() for _ in range(10)]
    assert [reply.msg_id for reply in replies] == [2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert {reply.error for reply in replies} == {0}


def test_half_closed(served: Serving, peer: RawPeer) -> None:
    """What was asked before the client stopped sending is answered, then it is over."""
    peer.send(message(1, 9, access(0, 0, 4)) * 3)
    peer.socket.shutdown(socket.SHUT_WR)
    assert [peer.read().command for _ in range(3)] == [9, 9, 9]
    assert peer.at_end()
    served.client().check_alive()


@pytest.mark.parametrize("command", [9, 4])
def test_a_client_that_asks_and_does_not_listen(served: Serving, backend: MigratableBackend, command: int) -> None:
    """It closes with its replies unread, or before they are sent: no more than the end of this client."""
    payload = access(0, 0, 4) if command == 9 else struct.pack("<4I", 16, 0, 0, 0)
    for number in range(1, 6):
        peer = served.client()
        peer.send(message(1, command, payload) * 100)
        peer.close()
        backend.wait_for("disconnected", number)
    served.client().check_alive()


def send_has_no_room(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set as soon as a send of the server's has waited for room and found none."""
    full = threading.Event()
    check = Channel._check_progress

    def spy(channel: Channel, deadline: float | None) -> None:
        full.set()
        check(channel, deadline)

    monkeypatch.setattr(Channel, "_check_progress", spy)
    monkeypatch.setattr("vfio_user.transport.blocking._SEND_SLICE", 0.01)
    return full


@pytest.mark.parametrize("count", [4, 4096, 5000])
def test_a_client_that_reads_slowly(
    served: Serving, backend: MigratableBackend, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Replies that do not fit into the socket are sent when there is room, however long that takes."""
    full = send_has_no_room(monkeypatch)
    backend.memory = bytearray(0x2000)
    backend.regions[0] = Region(0x2000)
    peer = served.client()
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
    total = 3000 if count == 4 else 300
    peer.send(b"".join(message(number, 9, access(0, 0, count)) for number in range(total)))
    assert full.wait(TIMEOUT)
    for number in range(total):
        reply = peer.read()
        assert (reply.msg_id, reply.error, len(reply.payload)) == (number, 0, 16 + count)
    peer.check_alive()


def test_a_thousand_clients_leave_nothing_behind(
    served: Serving, backend: MigratableBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Bad and good ones, gone at any point: as many descriptors as before, and no more memory."""
    caplog.set_level(logging.ERROR)  # a captured warning keeps what its exception saw, receive buffers too
    chance = random.Random(20)

    def round_of(number: int) -> None:
        with RawPeer.connect(served.path) as peer:
            if number % 10 == 0:
                peer.send(bytes(chance.randrange(256) for _ in range(chance.randrange(64))))
                return
            for data, fds in script[: chance.randrange(len(script))]:
                peer.send(data, fds)
            if number % 3 == 0:
                garbage = bytearray(script[chance.randrange(len(script))][0])
                garbage[chance.randrange(len(garbage))] ^= 1 << chance.randrange(8)
                peer.send(bytes(garbage), [memory, *irqs][: chance.randrange(3)])

    def settle() -> tuple[Counter[str], int]:
        with served.client() as peer:
            peer.check_alive()
            for fd in backend.fds:
                fd.close()
            backend.fds.clear()
            backend.calls.clear()
            backend.stream.clear()
            return open_fds(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with memfd() as memory, eventfds(1) as irqs:
        script = session_messages(memory, irqs[0])
        for number in range(200):
            round_of(number)
        fds, peak = settle()
        for number in range(800):
            round_of(number)
            if number % 100 == 99:
                settle()
        after, grown = settle()
        assert after <= fds
        assert grown - peak < 4096, "KiB more than after the first 200"


def read_replies(peer: RawPeer) -> None:
    while True:
        assert peer.read().flags in (REPLY, 0x21)


@pytest.mark.parametrize("seed", range(20))
def test_garbage(served: Serving, seed: int) -> None:
    """Mutated sessions: whatever comes back is a stream of whole messages, and the server lives."""
    chance = random.Random(seed)
    with memfd() as memory, eventfds(1) as irqs, RawPeer.connect(served.path) as peer:
        script = session_messages(memory, irqs[0])
        stream = bytearray(b"".join(data for data, _ in script))
        for _ in range(3):
            stream[chance.randrange(len(VERSION), len(stream))] = chance.randrange(256)
        peer.send(bytes(stream))
        peer.socket.shutdown(socket.SHUT_WR)
        with pytest.raises((EOFError, ConnectionResetError), match=r"after 0 of 16|reset"):
            read_replies(peer)
    served.client().check_alive()
