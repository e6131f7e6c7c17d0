"""Byte pipes to another host: a socket, plain or with TLS, or a pair of file descriptors.

Every wait has a deadline (time.monotonic), in both directions: a peer that is stopped stops nobody else. What the peer
does, or fails to do, is raised as CallTimeoutError or ConnectionClosedError.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from vfio_user.errors import CallTimeoutError, ConnectionClosedError, UsageError
from vfio_user.fds import OwnedFd
from vfio_user.transport.ancillary import skip_sent

Octets = bytes | bytearray | memoryview
_T = TypeVar("_T")

_MOST_BUFFERS = 512
"""Of one system call; Linux takes 1024."""
_BUFFER = 1 << 20
"""Bytes asked of the kernel to hold what the peer has not taken yet: it then wakes less often."""


class _NotNowError(Exception):
    """Nothing moves before ``event`` of ``fd``."""

    def __init__(self, fd: int, event: int) -> None:
        super().__init__()
        self._fd = fd
        self._event = event

    def wait(self, deadline: float, silence: str) -> None:
        """Wait until something may move. Raises CallTimeoutError at ``deadline``."""
        poll = select.poll()
        poll.register(self._fd, self._event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise CallTimeoutError(f"{silence}: timed out")


class Pipe(ABC):
    """Bytes to and from a peer. Owns what carries them; a context manager."""

    def __init__(self) -> None:
        self.sent = 0
        """Bytes that were handed over for the peer, so far. What is not in it, the peer cannot have."""
        self.closed = False

    def send(self, buffers: Sequence[Octets], deadline: float) -> None:
        """Send all of ``buffers``. After a failure the peer may have a part of it."""
        rest = [memoryview(buffer) for buffer in buffers]
        while rest:
            try:
                count = self._tried("sending", self._write, rest[:_MOST_BUFFERS])
            except _NotNowError as later:
                later.wait(deadline, "the other side takes nothing")
                continue
            self.sent += count
            rest = skip_sent(rest, count)

    def receive(self, space: memoryview, deadline: float) -> int:
        """Put what comes next into ``space``, at least one byte; 0 at the end of the stream."""
        while True:
            try:
                return self._tried("receiving", self._read, space)
            except _NotNowError as later:
                later.wait(deadline, "nothing comes from the other side")

    def receive_now(self, space: memoryview) -> int | None:
        """As :meth:`receive`; None if nothing is there now."""
        try:
            return self._tried("receiving", self._read, space)
        except _NotNowError:
            return None

    def interrupt(self) -> None:  # noqa: B027 - not every pipe can
        """End what another thread waits for here, if that can be done; else its deadline does."""

    def close(self) -> None:
        """Close it; the peer sees the end of the stream. A second time does nothing."""
        if not self.closed:
            self.closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tried(self, what: str, call: Callable[[_T], int], argument: _T) -> int:
        if self.closed:
            raise ConnectionClosedError("the pipe is closed")
        try:
            return call(argument)
        except OSError as error:
            raise ConnectionClosedError(f"{what}: {error.strerror or error}{self.epilogue()}") from error

    def epilogue(self) -> str:
        """What is known of why the stream has ended, to be put behind that it has."""
        return ""

    @abstractmethod
    def _write(self, buffers: list[memoryview]) -> int:
        """Send a part of ``buffers``, or raise _NotNowError or OSError."""

    @abstractmethod
    def _read(self, space: memoryview) -> int:
        """Receive what is there, or raise _NotNowError or OSError."""

    @abstractmethod
    def _close(self) -> None: ...


class SocketPipe(Pipe):
    """A connected stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        if isinstance(sock, ssl.SSLSocket):
            raise UsageError("a TLS socket needs a TlsPipe")
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:  # TCP finds its own
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._socket = sock

    def _write(self, buffers: list[memoryview]) -> int:
        try:
            return self._socket.sendmsg(buffers, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise _NotNowError(self._socket.fileno(), select.POLLOUT) from None

    def _read(self, space: memoryview) -> int:
        try:
            return self._socket.recv_into(space)
        except BlockingIOError:
            raise _NotNowError(self._socket.fileno(), select.POLLIN) from None

    def interrupt(self) -> None:
        _shut_down(self._socket)

    def _close(self) -> None:
        self._socket.close()


class TlsPipe(Pipe):
    """A TLS socket after its handshake. Raises UsageError for one whose peer's certificate was not checked."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__()
        if sock.context.verify_mode != ssl.CERT_REQUIRED:
            raise UsageError("guest memory goes only to a peer whose certificate is checked: verify_mode=CERT_REQUIRED")
        sock.setblocking(False)
        self._socket = sock
        self._unsent: bytes | None = None

    def _write(self, buffers: list[memoryview]) -> int:
        if self._unsent is None:  # a second try must be with the same bytes
            self._unsent = b"".join(buffers)
        try:
            count = self._socket.send(self._unsent)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise self._later(error) from None
        self._unsent = None
        return count

    def _read(self, space: memoryview) -> int:
        try:
            return self._socket.recv_into(space)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise self._later(error) from None

    def _later(self, error: ssl.SSLError) -> _NotNowError:
        event = select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT
        return _NotNowError(self._socket.fileno(), event)

    def interrupt(self) -> None:
        _shut_down(self._socket)

    def _close(self) -> None:
        self._socket.close()


def _shut_down(sock: socket.socket) -> None:
    """End both directions below TLS: SSLSocket's own shutdown would go on in plain text."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class FdPipe(Pipe):
    """Two file descriptors, to read from and to write to: a pair of pipes, a program's stdin and stdout.

    They are made non-blocking while it is open, which is seen by whoever shares them.
    """

    def __init__(self, reader: OwnedFd, writer: OwnedFd) -> None:
        super().__init__()
        self._reader, self._writer = reader, writer
        self._was_blocking = [(fd, os.get_blocking(fd.fileno())) for fd in (reader, writer)]
        for fd in (reader, writer):
            os.set_blocking(fd.fileno(), False)
            with contextlib.suppress(OSError):  # no pipe, or more than this user may have
                fcntl.fcntl(fd.fileno(), fcntl.F_SETPIPE_SZ, _BUFFER)

    @classmethod
    def standard(cls) -> FdPipe:
        """This program's stdin and stdout, which stay open when the pipe is closed."""
        return cls(OwnedFd.duplicate(0), OwnedFd.duplicate(1))

    def _write(self, buffers: list[memoryview]) -> int:
        try:
            return os.writev(self._writer.fileno(), buffers)
        except BlockingIOError:
            raise _NotNowError(self._writer.fileno(), select.POLLOUT) from None

    def _read(self, space: memoryview) -> int:
        try:
            return os.readv(self._reader.fileno(), [space])
        except BlockingIOError:
            raise _NotNowError(self._reader.fileno(), select.POLLIN) from None

    def _close(self) -> None:
        for fd, was in self._was_blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(fd.fileno(), was)
            fd.close()
