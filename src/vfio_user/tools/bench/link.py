"""Messages and the clock, with as little around them as Python can do.

A client does what is not measured: it negotiates, maps, changes states. What is measured goes over the same socket, as
bytes that were made before: the client's own work, several times that of a C program, would hide the server's.
"""

from __future__ import annotations

import errno
import socket
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns
from types import TracebackType

from vfio_user.client import Client
from vfio_user.client.core import MAX_ERRNO
from vfio_user.errors import CallTimeoutError, CommandError, ConnectionClosedError, ProtocolError
from vfio_user.wire.commands import command_name
from vfio_user.wire.constants import DEFAULT_DATA_XFER_SIZE, HEADER_SIZE, TYPE_MASK, Command, HeaderFlags
from vfio_user.wire.messages import Header

ROOM = DEFAULT_DATA_XFER_SIZE
"""Bytes of data in the longest message that is measured."""
_MARGIN = 256
_NO_SIGNAL = int(socket.MSG_NOSIGNAL)
_REPLY, _ERROR = int(HeaderFlags.REPLY), int(HeaderFlags.ERROR)


class Link:
    """A connected socket, which is the link's from here on. ``path``: what to call the server.

    ``timeout``: seconds for each call and each reply. Raises what Client does. :meth:`exchange` raises CommandError for
    a refusal; CallTimeoutError, ConnectionClosedError, and ProtocolError for an answer to something else, and is
    ``broken`` from then on: what came next would be taken for the answer to something else again.
    """

    def __init__(self, sock: socket.socket, timeout: float, path: str) -> None:
        self.path = path
        self.broken = False
        self._socket = sock
        self._buffer = bytearray(HEADER_SIZE + _MARGIN + ROOM)
        self._view = memoryview(self._buffer)
        try:
            self.client = Client(sock.dup(), timeout)
            sock.settimeout(None)
            self.set_patience(timeout)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def connect(cls, path: str, timeout: float) -> Link:
        """Connect to the server at ``path``. Raises what Client.connect does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
        except (TimeoutError, BlockingIOError) as error:
            sock.close()
            raise CallTimeoutError(f"{path}: nobody accepts the connection") from error
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout, path)

    def set_patience(self, timeout: float) -> None:
        """Seconds that an exchange waits until it can go on sending, and for its reply, from now on."""
        interval = struct.pack("@ll", *divmod(int(timeout * 1e6), 1_000_000))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, interval)

    @property
    def server_pid(self) -> int:
        """The process that listened at the path when this connected."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("=iII", credentials)[0])

    @property
    def limit(self) -> int:
        """Bytes of data in one message."""
        return min(self.client.capabilities.data_xfer_size, ROOM)

    def exchange(self, request: bytes, reply_size: int, fds: Sequence[int] = ()) -> int:
        """Send a whole message and receive its reply, of ``reply_size`` bytes or another size: the nanoseconds."""
        sock, view = self._socket, self._view
        with self._breaking():
            begin = perf_counter_ns()
            if fds:
                _send_fds(sock, request, fds)
            else:
                sock.sendall(request, _NO_SIGNAL)
            got = sock.recv_into(view)
            if got != reply_size:
                got = self._receive_rest(got)
            end = perf_counter_ns()
            refused = self._check(request, got)
        if refused:
            raise CommandError(refused, command_name(Header.parse(request).command))
        return end - begin

    def send(self, messages: bytes) -> None:
        """Send commands that have no reply."""
        with self._breaking():
            self._socket.sendall(messages, _NO_SIGNAL)

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """What is raised within is named, and ends the use of this connection."""
        if self.broken:
            raise ConnectionClosedError(f"{self.path}: the connection is of no use any more")
        self.broken = True
        try:
            yield
        except BlockingIOError as error:  # SO_RCVTIMEO, SO_SNDTIMEO
            raise CallTimeoutError(f"{self.path}: not answered in time") from error
        except OSError as error:
            if isinstance(error, ConnectionClosedError):
                raise
            raise ConnectionClosedError(f"{self.path}: {error.strerror}") from error
        self.broken = False

    def reply(self) -> memoryview:
        """What came behind the header of the last reply; valid until the next exchange."""
        return self._view[HEADER_SIZE : Header.parse(self._view).msg_size]

    def _receive_rest(self, got: int) -> int:
        """The rest of a message of which ``got`` bytes are there; all its bytes."""
        size = HEADER_SIZE
        while got < size or got < (size := self._size(got)):
            count = self._socket.recv_into(self._view[got:])
            if not count:
                raise ConnectionClosedError(f"{self.path}: the server closed the connection in mid-message")
            got += count
        return got

    def _size(self, got: int) -> int:
        if not got:
            raise ConnectionClosedError(f"{self.path}: the server closed the connection")
        size = Header.parse(self._view).msg_size
        if not HEADER_SIZE <= size <= len(self._buffer):
            raise ProtocolError(f"{self.path}: a reply of {size} bytes")
        return size

    def _check(self, request: bytes, got: int) -> int:
        """Whether that is the reply: the errno that it carries, 0 for none."""
        asked, header = Header.parse(request), Header.parse(self._view)
        if (header.msg_id, header.command, header.flags & TYPE_MASK) != (asked.msg_id, asked.command, _REPLY):
            raise ProtocolError(f"{self.path}: {command_name(header.command)} came, where a reply was to come")
        if header.msg_size != got:
            raise ProtocolError(f"{self.path}: {got} bytes came, the reply has {header.msg_size}")
        if not header.flags & _ERROR:
            return 0
        return header.error_no if 0 < header.error_no <= MAX_ERRNO else errno.EINVAL

    def close(self) -> None:
        self.client.close()
        self._socket.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def message(command: Command, *parts: bytes, flags: int = 0) -> bytes:
    """A whole command. Its id tells one command from another, which is enough for one at a time."""
    body = b"".join(parts)
    return Header(0x4200 | command, command, HEADER_SIZE + len(body), flags, 0).pack() + body


def _send_fds(sock: socket.socket, request: bytes, fds: Sequence[int]) -> None:
    sent = sock.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))], _NO_SIGNAL)
    if sent < len(request):
        sock.sendall(request[sent:], _NO_SIGNAL)
