"""Both sides of a proxy, and who manages it, say what they must not, stop in the middle, or never stop."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.dma.bitmap import DirtyLog, bitmap_size
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.tools.proxy import ProxyBackend
from vfio_user.tools.proxy.log import UpstreamLog
from vfio_user.tools.proxy.upstream import MAX_ASKED, Upstream
from vfio_user.wire.constants import Command, DeviceState, FeatureFlags

from .control_support import Bench, refusal, wait_until
from .hostile import Answers, Peer, Request, ScriptedServer, message
from .proxy_support import lost, proxied
from .support import ERROR, REPLY, RawPeer

PATIENCE = 0.5
"""Seconds that the proxy gives its server here, where that says nothing."""
FEATURE = 16
STATE_GET = FeatureFlags.GET | 2


def state_reply(request: Request) -> bytes:
    """A well-behaved answer to DEVICE_FEATURE of a device that migrates and runs."""
    flags = struct.unpack_from("<I", request.payload, 4)[0]
    data = {FeatureFlags.GET | 1: struct.pack("<Q", 5), STATE_GET: struct.pack("<Ii", DeviceState.RUNNING, 0)}
    return struct.pack("<II", 16, flags) + data[flags] if flags in data else request.payload


def feature(peer: Peer, request: Request) -> None:
    peer.reply(request, state_reply(request))


@contextlib.contextmanager
def before(answers: Answers, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[tuple[Bench, ScriptedServer]]:
    """A proxy before a server that says what a test wants it to."""
    server = ScriptedServer({Command.DEVICE_FEATURE: feature, **answers})
    monkeypatch.setattr("vfio_user.tools.proxy.upstream._connected", lambda path, timeout: server.client_socket)
    try:
        with proxied(Path("/nowhere"), **{"timeout": PATIENCE, **options}) as bench:
            yield bench, server
    finally:
        server.finish()


def then(what: Callable[[Peer], None]) -> Callable[[Peer, Request], None]:
    """Answers, having done something else first."""

    def answer(peer: Peer, request: Request) -> None:
        what(peer)
        peer.reply(request, request.payload[:16])

    return answer


def half_a_header(peer: Peer) -> None:
    peer.raw(b"\1\2\3")
    peer.sock.shutdown(socket.SHUT_WR)


FATAL: dict[str, Callable[[Peer], None]] = {
    "a reply that nobody asked for": lambda peer: peer.raw(message(0x1234, Command.REGION_READ, bytes(16))),
    "a reply of another command": lambda peer: peer.raw(message(0, Command.DMA_MAP)),
    "a size below the header's": lambda peer: peer.raw(message(5, Command.DMA_READ, b"", flags=0, size=3)),
    "a size beyond all bounds": lambda peer: peer.raw(message(5, Command.DMA_READ, b"", flags=0, size=1 << 31)),
    "the end": lambda peer: peer.sock.shutdown(socket.SHUT_RDWR),
    "half a header": half_a_header,
}


@pytest.mark.parametrize("what", FATAL)
def test_what_ends_the_connection_ends_the_clients_too(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_fd_leaks(), before({Command.REGION_WRITE: then(FATAL[what])}, monkeypatch) as (bench, _):
        primary, control = bench.primary(), bench.control()
        with contextlib.suppress(OSError):
            primary.region_write(0, 0, b"1234")
        wait_until(lambda: lost(primary))
        with bench.raw() as raw:
            assert raw.refused(Command.REGION_READ, struct.pack("<QII", 0, 0, 4)) == errno.ENOTCONN
        assert not control.status().connected


@pytest.mark.parametrize(
    ("command", "payload", "fds", "error"),
    [
        (Command.REGION_READ, struct.pack("<QII", 0, 0, 4), 0, errno.EINVAL),
        (99, b"", 0, errno.EINVAL),
        (Command.DMA_READ, b"short", 0, errno.EINVAL),
        (Command.DMA_READ, struct.pack("<QQ", 0, 1 << 40), 0, errno.E2BIG),
        (Command.DMA_READ, struct.pack("<QQ", 0, 16), 3, errno.EINVAL),
        (Command.DMA_READ, struct.pack("<QQ", 0, 16), 0, errno.EFAULT),
        (Command.DMA_WRITE, struct.pack("<QQ", 0, 8) + b"four", 0, errno.EINVAL),
    ],
)
def test_what_a_server_must_not_ask_is_refused_and_all_goes_on(
    command: int, payload: bytes, fds: int, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Request] = []

    def ask(peer: Peer) -> None:
        with open("/dev/null", "rb") as file:
            answers.append(peer.ask(command, payload, fds=[file.fileno()] * fds))

    with no_fd_leaks(), before({Command.REGION_WRITE: then(ask)}, monkeypatch, timeout=10.0) as (bench, _):
        primary = bench.primary()
        primary.region_write(0, 0, b"1234")
        (answer,) = answers
        assert (answer.flags, answer.command, answer.error) == (REPLY | ERROR, command, error)
        assert primary.region_read(0, 0, 2) == bench.control().region_read(0, 0, 2)


def test_descriptors_with_replies_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_fds(peer: Peer, request: Request) -> None:
        with open("/dev/null", "rb") as file:
            peer.reply(request, state_reply(request), [file.fileno()] * 5)

    with no_fd_leaks(), before({Command.DEVICE_FEATURE: with_fds}, monkeypatch) as (bench, _):
        assert bench.control().status().state is None  # nothing of it is believed
        bench.primary().region_read(0, 0, 4)


def test_a_server_is_cut_off_at_each_byte_of_an_injected_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(message(0, FEATURE, bytes(16)))
    with no_fd_leaks():
        for length in range(whole):
            asked = threading.Event()

            def torn(peer: Peer, request: Request, length: int = length, asked: threading.Event = asked) -> None:
                reply = message(request.msg_id, request.command, state_reply(request))
                if not asked.is_set():
                    peer.raw(reply)
                    return
                peer.raw(reply[:length])
                peer.sock.shutdown(socket.SHUT_RDWR)

            with before({Command.DEVICE_FEATURE: torn}, monkeypatch, timeout=10.0) as (bench, _):
                primary, control = bench.primary(), bench.control()
                assert control.status().state is DeviceState.RUNNING
                asked.set()
                status = control.status()
                assert status.state is None
                wait_until(partial(lost, primary))


def test_a_server_that_says_nothing_is_not_waited_for_twice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with before({Command.REGION_READ: lambda peer, request: None}, monkeypatch) as (bench, _):
        primary = bench.primary()
        with contextlib.suppress(OSError):
            primary.region_read(0, 0, 4)
        wait_until(lambda: lost(primary))
    assert caplog.text.count("it does not answer in time") == 1


def test_a_server_that_asks_and_never_reads_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered as far as it takes that; what it asks for more stays in its own socket."""

    def flood(peer: Peer, request: Request) -> None:
        with contextlib.suppress(OSError):
            for number in range(1 << 16):
                peer.sock.sendall(message(number, Command.DMA_READ, struct.pack("<QQ", 0, 1 << 40), flags=0) * 16)

    with before({Command.REGION_WRITE: flood}, monkeypatch) as (bench, _):
        primary = bench.primary()
        with contextlib.suppress(OSError):
            primary.region_write(0, 0, b"1234")
        wait_until(lambda: lost(primary))


DMA_WRITES = [struct.pack("<QQ", address, 8) + data for address, data in ((0, b"the 1st."), (64, b"the 2nd."))]


def test_what_a_server_asks_behind_its_reply_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both come at once: nothing tells of the second but what was received with the first."""

    def reply_and_ask(peer: Peer, request: Request) -> None:
        asked = message(7, Command.DMA_WRITE, DMA_WRITES[0], flags=0)
        peer.raw(message(request.msg_id, request.command, request.payload[:16]) + asked)

    with (
        before({Command.REGION_WRITE: reply_and_ask}, monkeypatch, timeout=10.0) as (bench, server),
        RawPeer.connect(bench.path) as primary,
    ):
        primary.version()
        primary.region_write(0, 0, b"1234")
        asked = primary.read()
        assert asked.payload == DMA_WRITES[0]
        primary.reply(asked, asked.payload[:16])
        primary.region_read(0, 0, 4)
        assert [(reply.msg_id, reply.flags) for reply in server.replies] == [(7, REPLY)]


def test_what_waits_is_not_overwritten_by_what_comes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_twice(peer: Peer, request: Request) -> None:
        peer.raw(b"".join(message(7, Command.DMA_WRITE, asked, flags=0) for asked in DMA_WRITES))
        answered = 0
        while answered < 2 and (other := peer.receive()) is not None:
            if other.flags & REPLY:
                answered += 1
            else:
                peer.reply(other, other.payload + bytes(4096))
        peer.reply(request, request.payload[:16])

    with (
        before({Command.REGION_WRITE: ask_twice}, monkeypatch, timeout=10.0) as (bench, _),
        RawPeer.connect(bench.path) as primary,
    ):
        primary.version()
        primary.post(Command.REGION_WRITE, struct.pack("<QII", 0, 0, 4) + b"1234")
        for expected in DMA_WRITES:
            asked = primary.read()
            assert asked.payload == expected
            assert primary.region_read(0, 0, 4096) == bytes(4096)
            primary.reply(asked, asked.payload[:16])
        assert primary.read().command == Command.REGION_WRITE


def test_so_much_waits_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    answer = Upstream._answer

    def spy(upstream: Upstream) -> None:
        waiting.append(len(upstream._asked))
        answer(upstream)

    def ask(peer: Peer, request: Request) -> None:
        peer.raw(message(7, Command.DMA_READ, struct.pack("<QQ", 0, 1 << 40), flags=0) * 200)
        for _ in range(200):
            assert peer.receive() is not None
        peer.reply(request, request.payload[:16])

    monkeypatch.setattr(Upstream, "_answer", spy)
    with before({Command.REGION_WRITE: ask}, monkeypatch, timeout=10.0) as (bench, _):
        bench.primary().region_write(0, 0, b"1234")
    assert max(waiting) == MAX_ASKED


def test_replies_behind_a_refusal_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = {Command.REGION_WRITE: lambda peer, request: peer.refuse(request, errno.EIO)}
    with before(refuse, monkeypatch, timeout=10.0, max_write=4) as (bench, server):
        primary = bench.primary()
        assert refusal(lambda: primary.region_write(0, 0, bytes(12))) == errno.EIO
        assert primary.region_read(0, 0, 4)
        assert len(server.of(Command.REGION_WRITE)) == 3
        backend = bench.device
        assert isinstance(backend, ProxyBackend)
        assert not backend._connection._replies


def test_a_client_uses_whatever_ids_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    with before({}, monkeypatch, timeout=10.0) as (bench, server), RawPeer.connect(bench.path) as primary:
        primary.version()
        control = bench.control()
        for msg_id in (0, 0xFFFF, 0, 7):
            primary.post(Command.REGION_READ, struct.pack("<QII", 8, 0, 4), msg_id=msg_id)
            assert control.region_read(0, 16, 4)
            reply = primary.read()
            assert (reply.msg_id, reply.payload[16:]) == (msg_id, bytes((8 + i) * 7 & 0xFF for i in range(4)))
        ids = [request.msg_id for request in server.requests]
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("mode", ["half a command", "no answer to DMA", "garbage"])
def test_a_client_that_leaves_in_the_middle_is_forgotten(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(peer: Peer) -> None:
        with contextlib.suppress(AssertionError):  # it may be gone
            peer.ask(Command.DMA_READ, struct.pack("<QQ", 0, 16))

    with no_fd_leaks(), before({Command.REGION_WRITE: then(ask)}, monkeypatch, timeout=10.0) as (bench, _):
        control = bench.control()
        with RawPeer.connect(bench.path) as primary:
            primary.version()
            if mode == "half a command":
                with open("/dev/null", "rb") as file:
                    primary.send(message(1, Command.DMA_MAP, bytes(32), flags=0)[:20], [file.fileno()])
            elif mode == "garbage":
                primary.send(struct.pack("<HHI", 1, 2, 3) + bytes(56))
            else:
                primary.post(Command.REGION_WRITE, struct.pack("<QII", 0, 0, 4) + b"1234")
                assert primary.read().command == Command.DMA_READ
            wait_until(lambda: mode == "garbage" or control.status().connected)
        wait_until(lambda: not control.status().connected)


# The log of another server

PAGE = 4096
REGION = 64 * PAGE
WRITES = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 3 * REGION), st.integers(1, 5 * PAGE)),
        st.tuples(st.sampled_from(["count", "take", "fail", "report"]), st.just(0), st.just(0)),
    ),
    max_size=20,
)


class Remote:
    """A log as another server has it."""

    busy = False

    def __init__(self, *, told: bool) -> None:
        self.log = DirtyLog()
        self._told = told

    def start(self, page_size: int, ranges: Any) -> int:
        if self._told and not ranges:
            raise OSError(errno.EINVAL, "nothing to log")
        return self.log.start(page_size * 2, ranges)

    def stop(self) -> None:
        self.log.stop()

    def report(self, iova: int, length: int, page_size: int) -> bytes:
        bitmap = bytearray(bitmap_size(length, page_size))
        self.log.report(iova, length, page_size, memoryview(bitmap))
        return bytes(bitmap)


@given(told=st.booleans(), steps=WRITES)
def test_no_mark_is_lost_between_the_two_logs(told: bool, steps: list[tuple[str, int, int]]) -> None:
    remote = Remote(told=told)
    log = UpstreamLog(remote)
    for one in (remote.log, log):
        one.map(0, REGION)
        one.map(2 * REGION, REGION)
    log.start(PAGE)
    written: set[int] = set()
    for what, at, length in steps:
        if what == "write":
            remote.log.mark(at, length)
            written |= {page for page in range(at // PAGE, (at + length - 1) // PAGE + 1) if page // 64 in (0, 2)}
        elif what == "count":
            assert log.count() >= len(written)
        elif what == "report":
            bitmap = bytearray(bitmap_size(3 * REGION, PAGE))
            log.report(0, 3 * REGION, PAGE, memoryview(bitmap))
            found = {page for page in range(3 * 64) if bitmap[page // 8] >> page % 8 & 1}
            assert written <= found <= {page + step & ~1 | bit for page in written for step in (0,) for bit in (0, 1)}
            written.clear()
        else:
            runs = log.take()
            found = {page for address, size in runs for page in range(address // PAGE, (address + size) // PAGE)}
            assert written <= found
            assert {page // 2 for page in found} == {page // 2 for page in written}
            if what == "fail":
                for run in runs:
                    log.mark(*run)
            else:
                written.clear()
    log.stop()
    assert not remote.log.active
    assert not log.active


def test_a_log_that_cannot_begin_here_does_not_go_on_there() -> None:
    remote = Remote(told=False)
    log = UpstreamLog(remote)
    log.map(0, 1 << 50)
    with pytest.raises(OSError, match="dirty bitmaps"):
        log.start(PAGE)
    assert not remote.log.active
