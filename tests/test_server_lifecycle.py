"""Server: where it listens, how it stops, clients that leave and come back. Row 34 of protocol.md, section 0."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    ALL_CAPABILITIES,
    TIMEOUT,
    MigratableBackend,
    RawPeer,
    Serving,
    access,
    assert_quiet,
    dma_map,
    eventfds,
    memfd,
    message,
    open_fds,
    recording,
    serving,
)
from vfio_user import Region, Server, serve
from vfio_user.server import Quiescing, aio
from vfio_user.transport.blocking import Channel

MODES: dict[str, dict[str, Any]] = {"serve_forever": {}, "poll": {"polled": True}, "spin": {"spin": 50e-6}}


@pytest.fixture
def backend(caplog: pytest.LogCaptureFixture) -> Iterator[MigratableBackend]:
    backend = MigratableBackend()
    with recording(backend):
        yield backend
    assert_quiet(caplog)


@pytest.fixture(params=MODES)
def served(backend: MigratableBackend, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(backend, **MODES[request.param]) as served:
        yield served


def listening_socket(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def in_thread(server: Server) -> Serving:
    served = Serving(server, "")
    served.thread.start()
    return served


# Where it listens


@pytest.mark.parametrize(
    "options", [{}, {"path": "p", "fd": 3}, {"path": "p", "sock": "s"}, {"sock": "s", "fd": 3}], ids=str
)
def test_one_of_path_sock_and_fd(backend: MigratableBackend, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one of path, sock and fd"):
        Server(backend, **options)


def test_path(backend: MigratableBackend, tmp_path: Path) -> None:
    """Made when the server is, removed when it is closed; closing twice is fine."""
    path = tmp_path / "s"
    server = Server(backend, path)
    assert path.is_socket()
    with RawPeer.connect(path):  # waits in the backlog
        server.close()
    assert not path.exists()
    server.close()
    server.shutdown()


def test_a_stale_socket_is_replaced(backend: MigratableBackend, tmp_path: Path) -> None:
    path = tmp_path / "s"
    listening_socket(path).close()
    assert path.is_socket()
    with Server(backend, str(path)) as server:
        served = in_thread(server)
        with RawPeer.connect(path) as peer:
            peer.version()
            peer.check_alive()
        server.shutdown()
        served.join()


@pytest.mark.parametrize("full", [False, True], ids=["idle", "full backlog"])
def test_a_live_socket_is_not(backend: MigratableBackend, tmp_path: Path, full: bool) -> None:
    path = tmp_path / "s"
    before = open_fds()
    with listening_socket(path) as live, contextlib.ExitStack() as waiting:
        if full:
            live.listen(0)
            waiting.enter_context(RawPeer.connect(path))
        with pytest.raises(OSError, match="in use") as caught:
            Server(backend, path)
        assert caught.value.errno == errno.EADDRINUSE
        assert str(path) in str(caught.value)
        assert path.is_socket()
    assert open_fds() <= before


def test_what_is_no_socket_is_not_replaced(backend: MigratableBackend, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(OSError, match="in use") as caught:
        Server(backend, path)
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "precious"


@pytest.mark.parametrize(("name", "error"), [("no such directory/s", errno.ENOENT), ("x" * 200, errno.ENAMETOOLONG)])
def test_paths_that_cannot_be(backend: MigratableBackend, tmp_path: Path, name: str, error: int) -> None:
    before = open_fds()
    with pytest.raises(OSError, match=r"No such file|too long") as caught:
        Server(backend, tmp_path / name)
    assert (caught.value.errno, caught.value.filename) == (error, str(tmp_path / name))
    assert open_fds() <= before


def test_a_socket_file_that_is_another_ones_by_now_stays(backend: MigratableBackend, tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = Server(backend, path)
    path.rename(tmp_path / "elsewhere")
    with listening_socket(path):
        server.close()
        assert path.is_socket()
    path.unlink()
    server = Server(backend, path)
    path.unlink()
    server.close()


@pytest.mark.parametrize("by", ["sock", "fd"])
def test_a_listening_socket(backend: MigratableBackend, tmp_path: Path, by: str) -> None:
    """It is the server's from then on; its file is whoever's made it."""
    path = tmp_path / "s"
    listener = listening_socket(path)
    server = Server(backend, sock=listener) if by == "sock" else Server(backend, fd=listener.detach())
    with server:
        served = in_thread(server)
        for _ in range(2):
            with RawPeer.connect(path) as peer:
                peer.version()
                peer.check_alive()
        server.shutdown()
        served.join()
    assert path.is_socket()
    with pytest.raises(ConnectionRefusedError):
        RawPeer.connect(path)


@pytest.mark.parametrize("by", ["sock", "fd"])
@pytest.mark.parametrize("polled", [False, True])
def test_row34_a_connected_socket(backend: MigratableBackend, by: str, polled: bool) -> None:
    """Serving ends with its client."""
    ours, theirs = socket.socketpair()
    server = Server(backend, sock=ours) if by == "sock" else Server(backend, fd=ours.detach())
    with server, RawPeer(theirs) as peer:
        served = Serving(server, "", polled=polled)
        if polled:
            assert server.poll() == 0  # a connected socket is served without being ready
        served.thread.start()
        peer.version()
        peer.check_alive()
        assert not server.finished
        peer.close()
        served.join()
        assert server.finished
    assert [call[0] for call in backend.called("connected", "disconnected")] == ["connected", "disconnected"]


@pytest.mark.parametrize("make", [lambda: os.eventfd(0), lambda: os.memfd_create("x")])
def test_a_descriptor_that_is_no_socket(backend: MigratableBackend, make: Any) -> None:
    fd = make()
    with pytest.raises(OSError, match="socket") as caught:
        Server(backend, fd=fd)
    assert caught.value.errno == errno.ENOTSOCK
    os.close(fd)


# How it stops


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", [0, 1, 16, 20, None], ids=["idle", "1 byte", "header", "payload", "no client"])
def test_row34_shutdown_at_any_point_of_a_message(backend: MigratableBackend, mode: str, part: int | None) -> None:
    before = open_fds()
    with serving(backend, **MODES[mode]) as served:
        if part is not None:
            peer = served.client()
            peer.send(message(1, 10, access(0, 0, 4) + b"data")[:part])
        served.server.shutdown()
        served.join()
        if part is not None:
            assert peer.at_end()
        served.server.shutdown()
    assert open_fds() <= before


@pytest.mark.parametrize("mode", MODES)
def test_shutdown_answers_what_was_received(backend: MigratableBackend, mode: str) -> None:
    """Stop in a hook: the reply still goes out, and those to what came with it."""
    with serving(backend, **MODES[mode]) as served:
        peer = served.client()
        backend.act["region_write"] = served.server.shutdown
        write = access(0, 0, 4) + b"data"
        peer.send(message(1, 10, write) + message(2, 10, write) + message(3, 9, access(0, 0, 4)))
        assert [peer.read().msg_id for _ in range(3)] == [1, 2, 3]
        assert peer.at_end()
        served.join()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["register", "large", "descriptor"])
def test_shutdown_of_a_send_to_a_client_that_does_not_read(
    backend: MigratableBackend, monkeypatch: pytest.MonkeyPatch, mode: str, what: str
) -> None:
    stuck = threading.Event()
    check = Channel._check_progress

    def spy(channel: Channel, deadline: float | None) -> None:
        stuck.set()
        check(channel, deadline)

    monkeypatch.setattr(Channel, "_check_progress", spy)
    monkeypatch.setattr("vfio_user.transport.blocking._SEND_SLICE", 0.01)
    request = {
        "register": message(1, 9, access(0, 0, 4096)),
        "large": message(1, 17, struct.pack("<II", 8 + (1 << 20), 1 << 20)),
        "descriptor": message(1, 5, struct.pack("<IIIIQQ", 80, 0, 3, 0, 0, 0)),
    }[what]
    with serving(backend, **MODES[mode]) as served:
        peer = served.client()
        backend.state = backend.state.PRE_COPY
        backend.stream += bytes(1 << 20)
        peer.send(request * 2000)
        assert stuck.wait(TIMEOUT)
        served.server.shutdown()
        served.join()


@pytest.mark.parametrize("mode", MODES)
def test_shutdown_while_dma_is_awaited(backend: MigratableBackend, mode: str) -> None:
    def dma() -> None:
        assert backend.link is not None
        backend.link.dma_read(0, memoryview(bytearray(4)))

    backend.act["region_write"] = dma
    with serving(backend, **MODES[mode]) as served:
        peer = served.client()
        peer.post(10, access(0, 0, 4) + b"data")
        assert peer.read().command == 11
        served.server.shutdown()
        served.join()


@pytest.mark.parametrize("mode", MODES)
def test_shutdown_while_a_command_is_parked(backend: MigratableBackend, mode: str) -> None:
    """DMA has to stop first: the server takes no memory away from under it."""
    with serving(backend, **MODES[mode]) as served:
        peer = served.client()
        peer.ok(2, dma_map(0, 0x1000))
        backend.quiescing = quiescing = Quiescing()
        peer.post(13)
        backend.wait_for("quiesce")
        served.server.shutdown()
        assert not backend.called("dma_unmap")
        quiescing.done()
        served.join()
        assert backend.called("dma_unmap")


def test_an_event_loop_polls_on_after_a_shutdown_until_the_client_is_let_go(
    backend: MigratableBackend, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with Server(backend, path) as server, RawPeer.connect(path) as peer:
        peer.send(message(1, 1, struct.pack("<HH", 0, 2) + ALL_CAPABILITIES) + message(2, 2, dma_map(0, 0x1000)))
        assert server.poll() == 2
        server.shutdown()
        assert not server.finished
        server.poll()
        assert server.finished
        assert backend.called("dma_unmap")


def test_close_with_a_client(backend: MigratableBackend, tmp_path: Path) -> None:
    """As in an event loop that ends: no thread is in serve_forever()."""
    before = open_fds()
    path = tmp_path / "s"
    with Server(backend, path) as server, RawPeer.connect(path) as peer:
        peer.send(message(1, 1, struct.pack("<HH", 0, 2) + ALL_CAPABILITIES) + message(2, 2, dma_map(0, 0x1000)))
        assert server.poll() == 2
        server.close()
        assert [peer.read().msg_id for _ in range(2)] == [1, 2]
        assert peer.at_end()
    assert backend.called("dma_unmap", "disconnected") == [("dma_unmap", 0, 0, 0x1000), ("disconnected",)]
    assert open_fds() <= before


def test_serve_until_interrupted(backend: MigratableBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(server: Server) -> None:
        assert (tmp_path / "s").is_socket()
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    serve(backend, tmp_path / "s")
    assert not (tmp_path / "s").exists()


# An event loop of one's own


def ready(server: Server, timeout: float = 0) -> bool:
    poll = select.poll()
    poll.register(server.fileno(), select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def test_poll_and_fileno(backend: MigratableBackend, tmp_path: Path) -> None:
    """fileno() is readable exactly while there is something to do, poll() counts messages and never blocks."""
    path = tmp_path / "s"
    with Server(backend, path) as server:
        assert not ready(server)
        assert server.poll() == 0
        with RawPeer.connect(path) as peer, RawPeer.connect(path) as second:
            assert ready(server, TIMEOUT)
            assert server.poll() == 0
            assert not ready(server)  # the second client waits until the first is gone
            peer.send(message(1, 1, struct.pack("<HH", 0, 2)))
            assert ready(server, TIMEOUT)
            assert server.poll() == 1
            assert peer.read().msg_id == 1
            assert not ready(server)
            peer.send(message(2, 9, access(0, 0, 4)) * 3 + message(3, 4, bytes([16] + [0] * 15)))
            assert server.poll() == 4
            assert [peer.read().msg_id for _ in range(4)] == [2, 2, 2, 3]
            part = message(4, 9, access(0, 0, 4))
            peer.send(part[:20])
            assert server.poll() == 0
            assert not ready(server)
            peer.send(part[20:])
            assert ready(server, TIMEOUT)
            assert server.poll() == 1
            peer.close()
            assert ready(server, TIMEOUT)
            assert server.poll() == 0
            assert backend.called("disconnected")
            second.send(message(5, 1, struct.pack("<HH", 0, 2)))
            assert ready(server, TIMEOUT)
            assert server.poll() == 1
            assert second.read().msg_id == 5
            assert not server.finished
            server.shutdown()
            assert not server.finished
            assert ready(server)
            server.poll()
            assert server.finished
            assert second.at_end()


def test_poll_and_quiescing(backend: MigratableBackend, tmp_path: Path) -> None:
    """done() makes fileno() readable; what came behind the parked command is served with it."""
    path = tmp_path / "s"
    with Server(backend, path) as server, RawPeer.connect(path) as peer:
        backend.quiescing = quiescing = Quiescing()
        peer.send(message(1, 1, struct.pack("<HH", 0, 2)) + message(2, 13) + message(3, 9, access(0, 0, 4)))
        server.poll()
        assert peer.read().msg_id == 1
        peer.send(message(4, 9, access(0, 0, 4)))
        while ready(server):
            server.poll()
        quiescing.done()
        assert ready(server)
        while ready(server):
            server.poll()
        assert [peer.read().msg_id for _ in range(3)] == [2, 3, 4]
        backend.quiescing = None


# Clients that come and go


def test_a_client_that_comes_back(served: Serving, backend: MigratableBackend) -> None:
    """The device's state is kept; its memory is unmapped hook by hook, its interrupts are disabled."""
    peer = served.client()
    with memfd() as fd, eventfds(2) as fds:
        for address in (0x3000, 0x1000, 0x2000):
            peer.ok(2, dma_map(address, 0x1000), [fd])
        peer.ok(8, struct.pack("<5I", 20, 4 | 32, 1, 0, 2), fds)
        peer.ok(8, struct.pack("<5I", 20, 4 | 32, 0, 0, 1), fds[:1])
        peer.ok(8, struct.pack("<5I", 20, 1 | 32, 2, 0, 1))
    peer.region_write(0, 0x10, b"kept")
    peer.ok(16, struct.pack("<IIII", 16, 2 | 1 << 17, 1, 0))
    calls = len(backend.calls)
    peer.close()
    backend.wait_for("disconnected")
    assert backend.calls[calls:] == [
        ("quiesce",),
        ("set_irqs", 0, 1 | 32, 0, 0, 0),
        ("set_irqs", 1, 1 | 32, 0, 0, 0),
        ("dma_unmap", 0, 0x1000, 0x1000),
        ("dma_unmap", 0, 0x2000, 0x1000),
        ("dma_unmap", 0, 0x3000, 0x1000),
        ("disconnected",),
    ]
    peer = served.client()
    assert peer.region_read(0, 0x10, 4) == b"kept"
    assert peer.ok(16, struct.pack("<II", 16, 2 | 1 << 16))[8:12] == struct.pack("<I", 1)
    peer.ok(2, dma_map(0, 0x10000))


def test_a_client_that_unmapped_and_disabled_itself(served: Serving, backend: MigratableBackend) -> None:
    peer = served.client()
    peer.ok(2, dma_map(0, 0x1000))
    peer.ok(3, struct.pack("<IIQQ", 24, 2, 0, 0))
    calls = len(backend.calls)
    peer.close()
    backend.wait_for("disconnected")
    assert backend.calls[calls:] == [("quiesce",), ("disconnected",)]


def test_hooks_that_fail_when_the_client_leaves(served: Serving, backend: MigratableBackend) -> None:
    """One that refuses keeps none of the others from being called."""
    peer = served.client()
    for address in (0x1000, 0x2000):
        peer.ok(2, dma_map(address, 0x1000))
    with eventfds(1) as fds:
        for index in (0, 1):
            peer.ok(8, struct.pack("<5I", 20, 4 | 32, index, 0, 1), fds)
    backend.fail["dma_unmap"] = backend.fail["set_irqs"] = OSError(errno.EIO, "no")
    calls = len(backend.calls)
    peer.close()
    backend.wait_for("disconnected")
    assert [call[:3] for call in backend.calls[calls:]] == [
        ("quiesce",),
        ("set_irqs", 0, 33),
        ("set_irqs", 1, 33),
        ("dma_unmap", 0, 0x1000),
        ("dma_unmap", 0, 0x2000),
        ("disconnected",),
    ]
    backend.fail.clear()
    served.client().check_alive()


def test_one_client_at_a_time(served: Serving, backend: MigratableBackend) -> None:
    """The second waits, and is served when the first has left."""
    first = served.client()
    second = served.connect()
    second.send(message(1, 1, struct.pack("<HH", 0, 2)))
    for _ in range(20):
        first.check_alive()
    assert len(backend.called("connected")) == 1
    first.close()
    assert second.read().msg_id == 1
    second.check_alive()
    assert len(backend.called("connected")) == 2


def test_a_reply_that_cannot_be_sent(served: Serving, backend: MigratableBackend) -> None:
    """The device gave a descriptor that is none: this client is let go, the next one is served."""
    backend.regions[4] = Region(0x1000, 3, 1_000_000)
    peer = served.client()
    peer.post(5, struct.pack("<IIIIQQ", 32, 0, 4, 0, 0, 0))
    assert peer.at_end()
    served.client().check_alive()


def test_a_device_that_fails_when_a_client_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A bug of the device: logged, this client is let go, the next one is served."""
    with recording(MigratableBackend()) as backend, serving(backend) as served:
        backend.fail["connected"] = RuntimeError("bug")
        assert served.connect().at_end()
        backend.wait_for("disconnected")
        backend.fail.clear()
        served.client().check_alive()
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [errno.EMFILE, errno.ECONNABORTED])
def test_a_client_that_cannot_be_accepted(
    backend: MigratableBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    error: int,
) -> None:
    """It is tried again: a shortage of descriptors passes."""
    accept = socket.socket.accept
    failures = iter([error, error])

    def failing(sock: socket.socket) -> tuple[socket.socket, Any]:
        if (number := next(failures, None)) is not None:
            raise OSError(number, os.strerror(number))
        return accept(sock)

    monkeypatch.setattr("vfio_user.server.server.Server._pause", lambda self, seconds: None)
    monkeypatch.setattr(socket.socket, "accept", failing)
    with serving(backend, **MODES[mode]) as served:
        served.client().check_alive()
    assert len([record for record in caplog.records if "could not be accepted" in record.getMessage()]) == 2


def test_a_shortage_of_descriptors_does_not_delay_a_shutdown(backend: MigratableBackend, tmp_path: Path) -> None:
    with Server(backend, tmp_path / "s") as server:
        server.shutdown()
        server._pause(TIMEOUT * 10)


def test_clients_that_say_nothing(served: Serving, backend: MigratableBackend) -> None:
    for number in range(1, 4):
        served.connect().close()
        backend.wait_for("disconnected", number)
    served.client().check_alive()


# The asyncio server runs the same one in a thread


async def test_asyncio_server(backend: MigratableBackend, tmp_path: Path) -> None:
    path = tmp_path / "s"

    def session() -> None:
        with RawPeer.connect(path) as peer:
            peer.version()
            peer.region_write(0, 0, b"data")
            assert peer.region_read(0, 0, 4) == b"data"

    async with aio.Server(backend, path) as server:
        task = asyncio.create_task(server.serve_forever())
        await asyncio.to_thread(session)
        server.shutdown()
        await task
    assert not path.exists()
    task = asyncio.create_task(aio.serve(backend, path))
    await asyncio.to_thread(wait_for_socket, path)
    await asyncio.to_thread(session)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not path.exists()


def wait_for_socket(path: Path) -> None:
    done = threading.Event()
    for _ in range(1000):
        if path.is_socket():
            return
        done.wait(0.01)
    pytest.fail("no socket")
