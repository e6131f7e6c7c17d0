"""A server that says what a test tells it to, and both clients behind one interface.

:class:`ScriptedServer` answers like a small, well-behaved device; a test replaces the answers that it wants to be
wrong. :func:`prepared` is for streams that are known beforehand: no thread, the whole of what the server ever says
waits in the socket. :class:`AioTwin` runs the asyncio client's calls to their end: it passes for a blocking one.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import inspect
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from vfio_user import Client, aio
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import Capabilities, pack_capabilities
from vfio_user.wire.constants import Command, DeviceFlags, RegionFlags

HEADER = struct.Struct("<HHIII")
REPLY, NO_REPLY, ERROR = 1, 0x10, 0x20
PATIENT = 20.0
"""Timeout of calls that are expected to be answered: never the reason why a test fails."""

REGION_SIZE = 0x10000
REGIONS, IRQS = 2, 1


@dataclass
class Request:
    """One message of the client's, as it came."""

    msg_id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def posted(self) -> bool:
        return bool(self.flags & NO_REPLY)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def message(
    msg_id: int, command: int, payload: bytes = b"", *, flags: int = REPLY, error: int = 0, size: int | None = None
) -> bytes:
    """The bytes of one message; ``size``: what the header says, whatever is true."""
    return HEADER.pack(msg_id, command, 16 + len(payload) if size is None else size, flags, error) + payload


def version_answer(capabilities: Capabilities | bytes | None = None, version: tuple[int, int] = (0, 2)) -> bytes:
    text = capabilities if isinstance(capabilities, bytes) else pack_capabilities(capabilities or Capabilities())
    return struct.pack("<HH", *version) + text


def device_info(regions: int = REGIONS, irqs: int = IRQS) -> bytes:
    return m.DeviceInfo(16, DeviceFlags.RESET | DeviceFlags.PCI, regions, irqs).pack()


def region_info(index: int, *, argsz: int = 32, flags: int = 3, cap_offset: int = 0, size: int = REGION_SIZE) -> bytes:
    return m.RegionInfo(argsz, flags, index, cap_offset, size).pack()


def irq_info(index: int) -> bytes:
    return m.IrqInfo(16, 1, index, 4).pack()


def pattern(offset: int, count: int) -> bytes:
    """What a region of the scripted server reads as."""
    return bytes((offset + i) * 7 & 0xFF for i in range(count))


Handler = Callable[["Peer", Request], None]


class Peer:
    """The server's end of the socket, in the server's thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.over = threading.Event()
        """Set when the test is done with the connection: whatever goes on until then ends now."""

    def receive(self) -> Request | None:
        """The next message, whole; None at the end."""
        fds: list[int] = []
        head = self._exactly(HEADER.size, fds)
        if head is None:
            return None
        msg_id, command, size, flags, error = HEADER.unpack(head)
        payload = self._exactly(size - HEADER.size, fds)
        if payload is None:
            return None
        return Request(msg_id, command, flags, error, payload, fds)

    def _exactly(self, count: int, fds: list[int]) -> bytes | None:
        data = b""
        while len(data) < count:
            try:
                part, ancillary, _, _ = self.sock.recvmsg(count - len(data), socket.CMSG_SPACE(4 * 253))
            except OSError:
                part, ancillary = b"", []
            for _, _, numbers in ancillary:
                fds.extend(array.array("i", numbers))
            if not part:
                return None
            data += part
        return data

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are. A client that has gone does not matter."""
        with contextlib.suppress(OSError):
            while data:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                data, fds = data[self.sock.sendmsg([data], ancillary) :], ()

    def reply(self, request: Request, payload: bytes = b"", fds: Sequence[int] = (), **header: int) -> None:
        """Answer; ``header`` replaces msg_id, command, flags, error or size."""
        values: dict[str, Any] = {"msg_id": request.msg_id, "command": request.command, **header}
        self.raw(message(values.pop("msg_id"), values.pop("command"), payload, **values), fds)

    def refuse(self, request: Request, error: int, payload: bytes = b"") -> None:
        self.reply(request, payload, flags=REPLY | ERROR, error=error)

    def ask(self, command: int, payload: bytes, msg_id: int = 0x77, fds: Sequence[int] = (), **header: int) -> Request:
        """Send a command to the client and return what it answers."""
        self.raw(message(msg_id, command, payload, **{"flags": 0, **header}), fds)
        answer = self.receive()
        assert answer is not None, "the client is gone"
        return answer

    def dma_read(self, address: int, count: int) -> Request:
        return self.ask(Command.DMA_READ, m.DmaAccess(address, count).pack())

    def dma_write(self, address: int, data: bytes) -> Request:
        return self.ask(Command.DMA_WRITE, m.DmaAccess(address, len(data)).pack() + data)


def _answer_read(peer: Peer, request: Request) -> None:
    access = m.RegionAccess.parse(request.payload)
    peer.reply(request, request.payload + pattern(access.offset, access.count))


def _answer_mig_read(peer: Peer, request: Request) -> None:
    size = m.MigData.parse(request.payload).size
    peer.reply(request, m.MigData(8 + size, size).pack() + pattern(0, size))


def _echo(size: int | None) -> Handler:
    return lambda peer, request: peer.reply(request, request.payload[:size])


Answers = Mapping[Any, Handler]
"""How a server answers, by command."""

GOOD: Answers = {
    Command.VERSION: lambda peer, request: peer.reply(request, version_answer()),
    Command.DEVICE_GET_INFO: lambda peer, request: peer.reply(request, device_info()),
    Command.DEVICE_GET_REGION_INFO: lambda peer, r: peer.reply(r, region_info(m.RegionInfo.parse(r.payload).index)),
    Command.DEVICE_GET_IRQ_INFO: lambda peer, r: peer.reply(r, irq_info(m.IrqInfo.parse(r.payload).index)),
    Command.REGION_READ: _answer_read,
    Command.REGION_WRITE: _echo(16),
    Command.REGION_WRITE_MULTI: _echo(8),
    Command.DMA_MAP: _echo(0),
    Command.DMA_UNMAP: _echo(24),
    Command.DEVICE_SET_IRQS: _echo(0),
    Command.DEVICE_RESET: _echo(0),
    Command.DEVICE_FEATURE: _echo(None),
    Command.MIG_DATA_READ: _answer_mig_read,
    Command.MIG_DATA_WRITE: _echo(0),
}
"""How a well-behaved server answers."""


class ScriptedServer:
    """Answers in a thread, as GOOD says or ``answers`` says instead, and keeps what it was asked."""

    def __init__(self, answers: Answers) -> None:
        self.client_socket, sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.peer = Peer(sock)
        self.requests: list[Request] = []
        self.replies: list[Request] = []
        """To what the server asked and no handler waited for."""
        self._answers = {**GOOD, **answers}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while (request := self.peer.receive()) is not None:
                if request.flags & REPLY:
                    self.replies.append(request)
                    continue
                self.requests.append(request)
                if not request.posted:
                    self._answers[request.command](self.peer, request)
        except BaseException as error:
            self._error = error
        finally:
            self.peer.sock.close()

    def of(self, command: int) -> list[Request]:
        """The requests of one kind."""
        return [request for request in self.requests if request.command == command]

    def finish(self) -> None:
        """Wait for everything that was sent to be handled. Raises what went wrong in a handler."""
        self.peer.over.set()
        with contextlib.suppress(OSError):
            self.client_socket.shutdown(socket.SHUT_RDWR)
        self.client_socket.close()
        self._thread.join(PATIENT)
        assert not self._thread.is_alive()
        for request in self.requests:
            request.close()
        if self._error is not None:
            raise self._error


class AioTwin:
    """The asyncio client with the blocking one's calls: each runs to its end in a loop of its own."""

    def __init__(self, sock: socket.socket, timeout: float = 5.0, **options: Any) -> None:
        self._runner = asyncio.Runner()
        try:
            self._client = self._runner.run(self._start(sock, timeout, options))
        except BaseException:
            self._runner.close()
            raise

    @staticmethod
    async def _start(sock: socket.socket, timeout: float, options: dict[str, Any]) -> aio.Client:
        client = aio.Client(sock, timeout, **options)
        await client.start()
        return client

    @classmethod
    def connect(cls, path: str, timeout: float = 5.0, **options: Any) -> AioTwin:
        twin = cls.__new__(cls)
        twin._runner = asyncio.Runner()
        try:
            twin._client = twin._runner.run(aio.Client.connect(path, timeout, **options))
        except BaseException:
            twin._runner.close()
            raise
        return twin

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not inspect.iscoroutinefunction(value):
            return value
        return lambda *args, **kwargs: self._runner.run(value(*args, **kwargs))

    @property
    def timeout(self) -> float:
        return self._client.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._client.timeout = seconds

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> AioTwin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._runner.close()


CLIENTS: dict[str, Any] = {"blocking": Client, "aio": AioTwin}
both = pytest.mark.parametrize("kind", CLIENTS)
"""Run a test with the blocking client and with its asyncio twin."""


@contextlib.contextmanager
def scripted(
    kind: str, answers: Answers | None = None, timeout: float = PATIENT, **options: Any
) -> Iterator[tuple[Any, ScriptedServer]]:
    """A client of ``kind`` that is connected to a scripted server."""
    server = ScriptedServer(answers or {})
    try:
        with CLIENTS[kind](server.client_socket, timeout, **options) as client:
            yield client, server
    finally:
        server.finish()


def offering(**capabilities: Any) -> dict[int, Handler]:
    """Answers of a server that states ``capabilities``."""
    text = Capabilities(**capabilities)
    return {Command.VERSION: lambda peer, request: peer.reply(request, version_answer(text))}


SET_UP: Sequence[bytes] = (
    message(0, Command.VERSION, version_answer(Capabilities(max_msg_fds=8))),
    message(1, Command.DEVICE_GET_INFO, device_info(1, 1)),
    message(2, Command.DEVICE_GET_REGION_INFO, region_info(0, argsz=64)),
    message(
        3,
        Command.DEVICE_GET_REGION_INFO,
        region_info(0, argsz=64, flags=RegionFlags.CAPS | RegionFlags.MMAP | 3, cap_offset=32)
        + m.pack_sparse_areas([(0x1000, 0x1000)]),
    ),
    message(4, Command.DEVICE_GET_IRQ_INFO, irq_info(0)),
)
"""What a server says until a client is connected, message by message: ids count from 0."""


@contextlib.contextmanager
def prepared(*parts: bytes | tuple[bytes, Sequence[int]]) -> Iterator[socket.socket]:
    """A socket for a client, in which all that the server ever says waits already, and then the end of the stream."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        peer = Peer(theirs)
        for part in parts:
            data, fds = part if isinstance(part, tuple) else (part, ())
            peer.raw(data, fds)
        theirs.shutdown(socket.SHUT_WR)
        yield ours
