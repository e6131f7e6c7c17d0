"""A connection over a blocking UNIX socket.

The socket stays in blocking mode, so that the hot path is one system call to receive and one to send. Deadlines are
kept by polling before a call that may block; a send that the peer does not take is interrupted by SO_SNDTIMEO.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time

from vfio_user.errors import CallTimeoutError, ConnectionClosedError
from vfio_user.protocol import Framer, Outgoing
from vfio_user.transport.ancillary import ANCILLARY_SIZE, Ancillary, pack_fds, skip_sent, take_fds

# As plain integers: "|" and "&" of the enum members that socket has cost as much as a system call.
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL)
_TRUNCATED = int(socket.MSG_CTRUNC)
_SEND_BUFFER = 512 << 10
"""Bytes asked for to hold what the peer has not taken yet: a message of 1 MiB wakes it less often than with less."""
_SEND_SLICE = 0.25
"""Seconds after which a send that makes no progress looks at its deadline and at whether the channel is closing."""


class Channel:
    """A socket and the framer that its bytes go to. Owns the socket."""

    def __init__(self, sock: socket.socket, framer: Framer) -> None:
        sock.setblocking(True)
        seconds, micros = divmod(int(_SEND_SLICE * 1e6), 1_000_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", seconds, micros))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self.socket = sock
        self.framer = framer
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._stopping = False

    def fileno(self) -> int:
        return self.socket.fileno()

    def receive(self, flags: int = 0) -> bool:
        """Take what is there, or wait for the first byte of it. Returns whether file descriptors came with it.

        Raises ConnectionClosedError at the end of the stream, BlockingIOError with MSG_DONTWAIT and nothing there.
        """
        framer = self.framer
        try:
            count, ancillary, got, _ = self.socket.recvmsg_into(framer.space(), ANCILLARY_SIZE, _RECEIVE_FLAGS | flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionClosedError(f"receiving: {error}") from error
        if count and not ancillary and not got & _TRUNCATED:
            framer.end += count  # as received() does, which need not be called for that
            return False
        self._received_more(count, ancillary, got)
        return True

    def receive_rest(self) -> None:
        """As :meth:`receive`; of a message that has begun, wait for all of it, or until descriptors come.

        Not by MSG_WAITALL: that sleeps and is woken once for every piece that the peer's kernel hands over, which
        across cores takes longer than to let a few of them gather meanwhile.
        """
        framer = self.framer
        missing = framer.missing
        if not missing:
            self.receive()
            return
        receive = self.socket.recvmsg_into
        rest = framer.space()[0][:missing]
        while rest:
            try:
                count, ancillary, got, _ = receive([rest], ANCILLARY_SIZE, _RECEIVE_FLAGS)
            except OSError as error:
                raise ConnectionClosedError(f"receiving: {error}") from error
            if not count or ancillary or got & _TRUNCATED:
                self._received_more(count, ancillary, got)
                return
            framer.end += count
            rest = rest[count:]

    def _received_more(self, count: int, ancillary: Ancillary, flags: int) -> None:
        """Take what came with ``count`` bytes; raises ConnectionClosedError if those are none."""
        framer = self.framer
        framer.received(count, take_fds(ancillary), truncated=bool(flags & _TRUNCATED))
        if not count:
            raise ConnectionClosedError(
                "the peer closed the connection in mid-message" if framer.mid_message else "the peer closed"
            )

    def receive_before(self, deadline: float) -> None:
        """As :meth:`receive`; raises CallTimeoutError when nothing has come at ``deadline`` (time.monotonic)."""
        if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise CallTimeoutError("the peer did not answer in time")
        self.receive()

    def send_small(self, data: bytes | bytearray) -> None:
        """Send all of ``data``, in one system call unless the peer is slow, or gone. Raises as :meth:`send` does."""
        try:
            sent = self.socket.send(data, _SEND_FLAGS)
        except OSError:
            sent = 0
        if sent != len(data):
            self.send(Outgoing([memoryview(data)[sent:]]))

    def send(self, message: Outgoing, deadline: float | None = None) -> None:
        """Send all of ``message``. Raises CallTimeoutError, ConnectionClosedError."""
        buffers, fds = message
        try:
            if fds:
                sent = self._send_first(message, deadline)
            elif len(buffers) == 1:
                sent = self.socket.send(buffers[0], _SEND_FLAGS)
            else:
                sent = self.socket.sendmsg(buffers, (), _SEND_FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._lost(error) from error
        if sent != sum(map(len, buffers)):
            self._send_rest(skip_sent(buffers, sent), deadline)

    def _send_first(self, message: Outgoing, deadline: float | None) -> int:
        """Send the part that carries the descriptors: they must not be sent twice, nor get lost."""
        while True:
            try:
                return self.socket.sendmsg(message.buffers, pack_fds(message.fds), _SEND_FLAGS)
            except BlockingIOError:
                self._check_progress(deadline)

    def _send_rest(self, rest: list[memoryview], deadline: float | None) -> None:
        while rest:
            self._check_progress(deadline)
            try:
                sent = self.socket.sendmsg(rest, (), _SEND_FLAGS)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._lost(error) from error
            rest = skip_sent(rest, sent)

    def _check_progress(self, deadline: float | None) -> None:
        if self._stopping:
            raise ConnectionClosedError("closed while a message was being sent")
        if deadline is not None and time.monotonic() >= deadline:
            raise CallTimeoutError("the peer does not take what is sent")

    def _lost(self, error: OSError) -> Exception:
        """EBADF may speak of the socket, or of a descriptor that was to be sent."""
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN) or self.socket.fileno() < 0:
            return ConnectionClosedError(f"sending: {error.strerror}")
        return error

    def stop_receiving(self) -> None:
        """End :meth:`receive`, now or once what the peer has sent so far is taken. For another thread or a signal."""
        self._stopping = True
        with contextlib.suppress(OSError):  # gone already
            self.socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self.socket.close()
        self.framer.close()
