"""A connection over a UNIX socket in an asyncio event loop; the names are those of ``blocking``.

asyncio has no call for ancillary data: the loop tells when the socket is ready, recvmsg and sendmsg are called here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable

from vfio_user.errors import CallTimeoutError, ConnectionClosedError
from vfio_user.protocol import Framer, Outgoing
from vfio_user.transport.ancillary import ANCILLARY_SIZE, pack_fds, skip_sent, take_fds

_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


class Channel:
    """A socket and the framer that its bytes go to. Owns the socket. For one task at a time."""

    def __init__(self, sock: socket.socket, framer: Framer) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.framer = framer

    def fileno(self) -> int:
        return self.socket.fileno()

    def receive(self) -> None:
        """Take what is there. Raises BlockingIOError when nothing is, ConnectionClosedError at the end."""
        try:
            count, ancillary, got, _ = self.socket.recvmsg_into(
                self.framer.space(), ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionClosedError(f"receiving: {error}") from error
        truncated = bool(got & socket.MSG_CTRUNC)
        self.framer.received(count, take_fds(ancillary), truncated=truncated)
        if not count:
            raise ConnectionClosedError("the peer closed")

    async def send(self, message: Outgoing, deadline: float | None = None) -> None:
        """Send all of ``message``. Raises CallTimeoutError at ``deadline`` (loop time), ConnectionClosedError."""
        rest, fds = skip_sent(message.buffers, 0), message.fds
        while rest:
            try:
                sent = self.socket.sendmsg(rest, pack_fds(fds), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await wait_ready([self], deadline, write=True)
                continue
            except OSError as error:
                if error.errno in _GONE or self.socket.fileno() < 0:
                    raise ConnectionClosedError(f"sending: {error.strerror}") from error
                raise
            rest, fds = skip_sent(rest, sent), ()

    def stop_receiving(self) -> None:
        """Have a task that waits for this channel see its end."""
        with contextlib.suppress(OSError):  # gone already
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()
        self.framer.close()


async def wait_ready(channels: list[Channel], deadline: float | None, *, write: bool = False) -> None:
    """Wait until one of ``channels`` is readable, or writable. Raises CallTimeoutError at ``deadline``."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add: Callable[..., None] = loop.add_writer if write else loop.add_reader
    remove: Callable[..., bool] = loop.remove_writer if write else loop.remove_reader
    numbers = [channel.fileno() for channel in channels]
    for number in numbers:
        add(number, wake)
    try:
        async with asyncio.timeout_at(deadline):
            await ready
    except TimeoutError:
        raise CallTimeoutError("the peer did not answer in time") from None
    finally:
        for number in numbers:
            remove(number)
