"""What the tests of the protocol and of the server share: a raw peer, a server in a thread, a backend that records.

The peer knows nothing of the package but the header's layout, which it writes out itself: it can say anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import struct
import tempfile
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest

from vfio_user import Irq, Region, Server, ServerBackend
from vfio_user.fds import OwnedFd
from vfio_user.server import Link, Quiescing
from vfio_user.wire.constants import DeviceState, MigrationFlags

TIMEOUT = 10.0
"""Seconds after which something that must happen has not happened."""

HEADER = struct.Struct("<HHIII")
REPLY, NO_REPLY, ERROR = 0x01, 0x10, 0x20
READ_WRITE = 3
CONFIG = 7

ALL_CAPABILITIES = (
    b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"max_dma_maps":65535,"pgsizes":4096,'
    b'"write_multiple":true,"migration":{"pgsize":4096,"max_bitmap_size":268435456}}}\0'
)
TWIN_CAPABILITIES = b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true}}}' + b" " * 40 + b"\0"


class Received(NamedTuple):
    """A message as it came."""

    msg_id: int
    command: int
    size: int
    flags: int
    error: int
    payload: bytes
    fds: list[int]


class RawPeer:
    """The other end of a connection, on a connected socket: says any bytes, reads message by message.

    Descriptors that came are closed with it. Every read fails after TIMEOUT.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT)
        self.socket = sock
        self._next_id = 100
        self._fds: list[int] = []

    @classmethod
    def connect(cls, path: str | os.PathLike[str]) -> RawPeer:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # Bytes

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of ``data`` by one sendmsg where it fits, with ``fds`` on its first byte."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        sent = self.socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def read(self) -> Received:
        """The next message. Raises EOFError at the end of the stream."""
        fds: list[int] = []
        head = self._exactly(HEADER.size, fds)
        msg_id, command, size, flags, error = HEADER.unpack(head)
        assert size >= HEADER.size
        payload = self._exactly(size - HEADER.size, fds)
        self._fds += fds
        return Received(msg_id, command, size, flags, error, payload, fds)

    def _exactly(self, count: int, fds: list[int]) -> bytes:
        data = bytearray()
        while len(data) < count:
            part, ancillary, flags, _ = self.socket.recvmsg(count - len(data), socket.CMSG_SPACE(4 * 253))
            for _, _, raw in ancillary:
                numbers = array("i")
                numbers.frombytes(raw)
                fds += numbers
            assert not flags & socket.MSG_CTRUNC
            if not part:
                raise EOFError(f"after {len(data)} of {count} bytes")
            data += part
        return bytes(data)

    def at_end(self) -> bool:
        """Whether the stream ends here: nothing more was said before the other side closed."""
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    # Messages

    def post(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0, msg_id: int | None = None
    ) -> int:
        """Send a command; its id."""
        if msg_id is None:
            msg_id = self._next_id
            self._next_id = self._next_id % 0xFFFF + 1
        self.send(message(msg_id, command, payload, flags), fds)
        return msg_id

    def call(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> Received:
        """Send a command and read its reply, whose id and command must be right."""
        msg_id = self.post(command, payload, fds, flags=flags)
        reply = self.read()
        assert (reply.msg_id, reply.command) == (msg_id, command), reply
        return reply

    def ok(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> bytes:
        """The payload of the reply to a command that must succeed."""
        reply = self.call(command, payload, fds, flags=flags)
        assert (reply.flags, reply.error) == (REPLY, 0), (os.strerror(reply.error), reply)
        return reply.payload

    def refused(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> int:
        """The errno of the reply to a command that must fail: header only (row 1)."""
        reply = self.call(command, payload, fds, flags=flags)
        assert (reply.flags, reply.size, reply.fds) == (REPLY | ERROR, HEADER.size, []), reply
        return reply.error

    def version(self, text: bytes = ALL_CAPABILITIES, *, major: int = 0, minor: int = 2) -> Received:
        return self.call(1, struct.pack("<HH", major, minor) + text)

    def take(self, fd: int) -> int:
        """Keep a descriptor that came: the caller closes it."""
        self._fds.remove(fd)
        return fd

    def reply(self, request: Received, payload: bytes = b"", *, flags: int = REPLY, error: int = 0) -> None:
        """Answer a command of the server's."""
        self.send(message(request.msg_id, request.command, payload, flags, error))

    # Commands that many tests need

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        return self.ok(9, access(region, offset, count))[16:]

    def region_write(self, region: int, offset: int, data: bytes) -> bytes:
        return self.ok(10, access(region, offset, len(data)) + data)

    def check_alive(self) -> None:
        """The next good message works."""
        assert self.ok(4, struct.pack("<4I", 16, 0, 0, 0))[:4] == struct.pack("<I", 16)


def message(msg_id: int, command: int, payload: bytes = b"", flags: int = 0, error: int = 0) -> bytes:
    return HEADER.pack(msg_id, command, HEADER.size + len(payload), flags, error) + payload


def access(region: int, offset: int, count: int) -> bytes:
    return struct.pack("<QII", offset, region, count)


def dma_map(address: int, size: int, *, flags: int = READ_WRITE, offset: int = 0, argsz: int = 32) -> bytes:
    return struct.pack("<IIQQQ", argsz, flags, offset, address, size)


def dma_unmap(address: int, size: int, *, flags: int = 0, argsz: int = 24) -> bytes:
    return struct.pack("<IIQQ", argsz, flags, address, size)


class RecordingBackend(ServerBackend):
    """A device with every kind of region that takes whatever it is asked, and writes it down.

    ``calls`` are tuples that begin with the hook's name. ``fail`` has exceptions that hooks of these names raise,
    ``act`` functions that run inside them. ``quiescing`` is what quiesce() returns, ``looked`` what
    looks for work. Descriptors that came are in ``fds``, and closed by :meth:`close`.
    """

    resettable = True

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[str, Exception] = {}
        self.act: dict[str, Callable[[], None]] = {}
        self.quiescing: Quiescing | None = None
        self.looked: Callable[[bool], bool] = lambda last: False
        self.link: Link | None = None
        self.fds: list[OwnedFd] = []
        self.memory = bytearray(0x1000)
        self.config = bytearray(range(256))
        self.file = OwnedFd(os.memfd_create("region"))
        os.ftruncate(self.file.fileno(), 0x4000)
        self.regions: list[Region] = [
            Region(0x1000),
            Region(0x100, 1),
            Region(0x100, 2),
            Region(0x3000, READ_WRITE, self.file.fileno(), 0x1000, [(0, 0x1000), (0x2000, 0x1000)]),
            Region(0x1000, READ_WRITE, self.file.fileno()),
            Region(0, 0),
            Region(0, 0),
            Region(256),
            Region(0, 0),
        ]
        self.irqs: list[Irq] = [Irq(1, 7), Irq(4), Irq(2048), Irq(1), Irq(1)]
        self._changed = threading.Condition()

    def close(self) -> None:
        self.file.close()
        for fd in self.fds:
            fd.close()
        self.fds.clear()

    def record(self, name: str, *arguments: object) -> None:
        with self._changed:
            self.calls.append((name, *arguments))
            self._changed.notify_all()
        if name in self.act:
            self.act[name]()
        if name in self.fail:
            raise self.fail[name]

    def wait_for(self, name: str, times: int = 1) -> None:
        """Wait until the hook was called so often."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.called(name)) >= times, TIMEOUT), f"no {name}"

    def called(self, *names: str) -> list[tuple[Any, ...]]:
        """The calls of these hooks, in order."""
        return [call for call in self.calls if call[0] in names]

    def connected(self, link: Link) -> None:
        self.link = link
        self.record("connected")

    def disconnected(self) -> None:
        self.link = None
        self.record("disconnected")

    def look_for_work(self, last: bool) -> bool:
        return self.looked(last)

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        self.record("region_read", region, offset, len(data))
        source = self.config if region == CONFIG else self.memory
        part = source[offset : offset + len(data)]
        data[: len(part)] = part

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        self.record("region_write", region, offset, bytes(data))
        if region == 0:
            self.memory[offset : offset + len(data)] = data

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        self.record("dma_map", flags, offset, address, size, fd is not None)
        if fd is not None:
            self.fds.append(fd)

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        self.record("dma_unmap", flags, address, size)

    def reset(self) -> None:
        self.record("reset")

    def set_irqs(self, index: int, flags: int, start: int, count: int, fds: Sequence[OwnedFd]) -> None:
        self.record("set_irqs", index, flags, start, count, len(fds))
        self.fds += fds

    def quiesce(self) -> Quiescing | None:
        self.record("quiesce")
        return self.quiescing


class MigratableBackend(RecordingBackend):
    """A recording device that migrates: any state is taken, ``stream`` is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.flags = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
        self.state = DeviceState.RUNNING
        self.stream = bytearray()
        self.chosen_page_size: int | None = None

    def migration_flags(self) -> MigrationFlags:
        if "migration_flags" in self.fail:
            raise self.fail["migration_flags"]
        return self.flags

    def migration_get_state(self) -> DeviceState:
        return self.state

    def migration_set_state(self, state: DeviceState) -> None:
        self.record("migration_set_state", state)
        self.state = state

    def migration_read_data(self, data: memoryview) -> int:
        self.record("migration_read_data", len(data))
        count = min(len(data), len(self.stream))
        data[:count] = self.stream[:count]
        del self.stream[:count]
        return count

    def migration_write_data(self, data: memoryview) -> None:
        self.record("migration_write_data", len(data))
        self.stream += data

    def migration_data_size(self) -> int:
        self.record("migration_data_size")
        return len(self.stream)

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        self.record("dma_logging_start", page_size, list(ranges))
        return self.chosen_page_size or page_size

    def dma_logging_stop(self) -> None:
        self.record("dma_logging_stop")

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        self.record("dma_logging_report", iova, length, page_size, len(bitmap))
        bitmap[0] = 0xA5


class Serving:
    """A server, its path, and the peers that the test connected. ``error`` is what ended its thread.

    ``polled``: it is driven by poll() and a selector of the test's instead of serve_forever().
    """

    def __init__(self, server: Server, path: str, *, polled: bool = False) -> None:
        self.server = server
        self.polled = polled
        self.handled = 0
        self.path = path
        self.peers: list[RawPeer] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, name="server")

    def _serve(self) -> None:
        try:
            if self.polled:
                self._poll()
            else:
                self.server.serve_forever()
        except BaseException as error:
            self.error = error

    def _poll(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.server.fileno(), selectors.EVENT_READ)
            while not self.server.finished:
                assert selector.select(TIMEOUT * 2), "nothing to do for the server"
                self.handled += self.server.poll()

    def connect(self) -> RawPeer:
        """A peer that has said nothing yet."""
        peer = RawPeer.connect(self.path)
        self.peers.append(peer)
        return peer

    def client(self, text: bytes = ALL_CAPABILITIES) -> RawPeer:
        """A peer that has negotiated."""
        peer = self.connect()
        assert peer.version(text).flags == REPLY
        return peer

    def join(self) -> None:
        """Wait for the end of serve_forever, which must not have raised."""
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive(), "the server did not stop"
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def serving(backend: ServerBackend, *, polled: bool = False, **options: Any) -> Iterator[Serving]:
    """``backend`` served in a thread at a path of its own; in the end it is shut down and must have ended cleanly."""
    with tempfile.TemporaryDirectory(prefix="vu") as directory:
        path = str(Path(directory) / "s")
        with Server(backend, path, **options) as server:
            served = Serving(server, path, polled=polled)
            served.thread.start()
            try:
                yield served
            finally:
                try:
                    server.shutdown()
                    served.join()
                finally:
                    for peer in served.peers:
                        peer.close()


@contextlib.contextmanager
def recording(backend: RecordingBackend) -> Iterator[RecordingBackend]:
    try:
        yield backend
    finally:
        backend.close()


@contextlib.contextmanager
def memfd(size: int = 0x10000) -> Iterator[int]:
    """A file to map, of ``size`` bytes."""
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def open_fds() -> Counter[str]:
    """How many descriptors of each kind this process has open: compare with ``<=``, garbage may go."""
    kinds: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            kinds[os.readlink(f"/proc/self/fd/{number}").rstrip("0123456789[]")] += 1
    return kinds


def assert_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing at level ERROR, no traceback: a peer's fault is no event for whoever runs the server."""
    loud = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR or record.exc_info]
    assert not loud, [record.getMessage() for record in loud]
