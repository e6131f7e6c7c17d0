"""The connection to the server that the device is really behind, for calls that may come inside each other."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vfio_user.client.core import PROPOSAL, Call, ClientCore, Request, close_replies, drive
from vfio_user.client.memory import RegisteredMemory
from vfio_user.errors import (
    CallTimeoutError,
    CommandError,
    ConnectionClosedError,
    FramingError,
    ProtocolError,
    UnexpectedReplyError,
    UsageError,
    VfioUserError,
)
from vfio_user.fds import OwnedFd
from vfio_user.protocol import Connection, Message
from vfio_user.server import Link
from vfio_user.transport.blocking import Channel
from vfio_user.wire.commands import Role

logger = logging.getLogger("vfio_user.tools")

T = TypeVar("T")

GRACE = 0.1
"""Seconds that a reply has to come before what the server asks for meanwhile is done: see :meth:`Upstream._await`."""
MAX_ASKED = 32
"""Requests of the server that wait, each of 1 MiB at most. The next is not read before one of them is answered."""

_DONTWAIT = int(socket.MSG_DONTWAIT)
_LOSSES = (CallTimeoutError, ConnectionClosedError, FramingError, UnexpectedReplyError)
"""What ends the connection. Whoever does not answer in time is not waited for again."""


class _ClientMemory(RegisteredMemory):
    """The client's memory, which only the client can touch: it marks as dirty what is written by its hand."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def add(
        self, address: int, size: int, flags: int, *, memory: memoryview | None, fd: OwnedFd | None, offset: int
    ) -> None:
        """The client checks by itself what is mapped."""
        if fd is not None:
            fd.close()

    def read(self, address: int, count: int) -> bytes:
        data = bytearray(count)
        self._link.dma_read(address, memoryview(data))
        return bytes(data)

    def write(self, address: int, data: memoryview) -> None:
        self._link.dma_write(address, data)


class Upstream:
    """A connection to the server at ``path``; :meth:`attach` makes it that of a client.

    What the server asks of the client's memory goes to the client's link. That may call :meth:`call` again while it
    waits: calls nest. All of it happens in the thread that serves the link. ``timeout``: seconds for a reply;
    ``max_write``: see :class:`~vfio_user.Client`.

    Raises what connect(2) does, and VfioUserError where the server is none that can be talked to.
    """

    def __init__(self, path: Path, timeout: float, max_write: int | None) -> None:
        self.core = ClientCore(PROPOSAL, max_write=max_write)
        self._path, self._timeout = path, timeout
        self._link: Link | None = None
        self._lost = False
        self._depth = 0
        self._asked: deque[tuple[Message, Connection, Channel]] = deque()
        self._replies: dict[int, Message] = {}
        self._ends: list[tuple[Connection, Channel]] = []
        self._poll = select.poll()
        self._add_end(self.core.connection, _connected(path, timeout))
        try:
            self._run(self.core.negotiate())
            self._adopt_twin_socket()
            self._run(self.core.discover())
        except BaseException:
            self.close()
            raise

    def attach(self, link: Link) -> None:
        """Let the server reach the client behind ``link``. When the server is lost, the client is let go."""
        self._link = link
        self.core.memory = _ClientMemory(link)
        for _, channel in self._ends:
            link.watch(channel.fileno(), self._serve)
        self._note_left_over()

    @property
    def lost(self) -> bool:
        """Whether the server is gone, or has hung up."""
        poll = select.poll()
        poll.register(self._ends[0][1].fileno(), select.POLLRDHUP)
        return self._lost or bool(poll.poll(0))

    @property
    def busy(self) -> bool:
        """Whether a call is under way, and this is within it: the server waits for memory, and may take no command
        until it has that, if the command could stop DMA."""
        return self._depth > 0

    def _adopt_twin_socket(self) -> None:
        if self.core.twin_socket is not None:
            connection = Connection(Role.CLIENT, self.core.connection.framer.max_size)
            connection.negotiated = True
            self._add_end(connection, self.core.twin_socket)

    def _add_end(self, connection: Connection, sock: socket.socket) -> None:
        channel = Channel(sock, connection.framer)
        self._ends.append((connection, channel))
        self._poll.register(channel, select.POLLIN)

    def close(self) -> None:
        """Leave: the server takes back what the client gave it."""
        self._leave_link()
        for _, channel in self._ends:
            channel.close()
        for message in (*self._replies.values(), *(asked[0] for asked in self._asked)):
            message.close()
        self._replies.clear()
        self._asked.clear()
        self.core.close()

    def call(self, call: Call[T]) -> T:
        """Make one of ``core``'s calls. Raises OSError: what the server refused with, EPROTO for an answer that is
        none, ENOTCONN when the server is gone."""
        if self._lost:
            raise OSError(errno.ENOTCONN, "the server is gone")
        self._depth += 1
        try:
            return self._run(call)
        except CommandError:
            raise
        except _LOSSES as error:
            self._lose(error)
            raise OSError(errno.ENOTCONN, f"the server is gone: {error}") from error
        except UsageError as error:
            raise OSError(errno.EINVAL, str(error)) from error
        except ProtocolError as error:
            raise OSError(errno.EPROTO, str(error)) from error
        finally:
            self._depth -= 1
            self._note_left_over()

    def _note_left_over(self) -> None:
        """What came behind the last reply is served later: whoever made the call may wait for its own reply."""
        if self._link is not None and (self._asked or any(channel.framer.mid_message for _, channel in self._ends)):
            self._link.defer(self._serve)

    def _run(self, call: Call[T]) -> T:
        deadline = time.monotonic() + self._timeout
        return drive(call, lambda requests: self._transact(requests, deadline))

    def _transact(self, requests: Sequence[Request], deadline: float) -> list[Message]:
        """Send commands, wait for their replies."""
        connection, channel = self._ends[0]
        left: deque[int] = deque()
        replies: list[Message] = []
        try:
            for request in requests:
                msg_id, outgoing = connection.command(request.command, request.parts, request.fds)
                left.append(msg_id)
                channel.send(outgoing, deadline)
            while left:
                replies.append(self._await(left[0], deadline))
                left.popleft()
                self.core.accept(replies[-1])
        except BaseException:
            for msg_id in left:
                connection.abandon(msg_id)
            close_replies([*replies, *(self._replies.pop(msg_id) for msg_id in left if msg_id in self._replies)])
            raise
        return replies

    def _await(self, msg_id: int, deadline: float) -> Message:
        """The reply to a command of ours.

        What the server asks for meanwhile comes second: a client that waits for this reply itself, as QEMU does,
        answers nothing before. A server that cannot reply before it has what it asks for gets it, and all that it asks
        for then, when GRACE is over.
        """
        patience = deadline
        while msg_id not in self._replies:
            now = time.monotonic()
            if now >= deadline:
                raise CallTimeoutError("it does not answer in time")
            if self._asked:
                patience = min(patience, now + GRACE)
            until = patience if self._asked else deadline
            if len(self._asked) >= MAX_ASKED or not (self._take() or self._receive(until)):
                self._answer()
        return self._replies.pop(msg_id)

    def _take(self) -> bool:
        """Put the next message that was received where it belongs. False: there is none."""
        for connection, channel in self._ends:
            message = channel.framer.next_message()
            if message is None:
                continue
            message.payload = memoryview(bytes(message.payload))
            if not message.is_reply:
                self._asked.append((message, connection, channel))
            elif self._is_awaited(message, connection):
                self._replies[message.msg_id] = message
            return True
        return False

    def _is_awaited(self, message: Message, connection: Connection) -> bool:
        awaited = False
        try:
            awaited = connection.check(message)
        except ProtocolError as error:  # also one that was asked for and cannot be taken: somebody waits for it
            raise UnexpectedReplyError(str(error)) from error
        finally:
            if not awaited:
                message.close()
        return awaited

    def _receive(self, until: float) -> bool:
        """Wait for more, at most until then. Whether any came."""
        ready = dict(self._poll.poll(max(0.0, until - time.monotonic()) * 1000))
        for _, channel in self._ends:
            if channel.fileno() in ready:
                channel.receive(_DONTWAIT)
        return bool(ready)

    def _answer(self) -> None:
        """Do what the server asked for first, if it did."""
        if self._asked:
            message, connection, channel = self._asked.popleft()
            reply = self.core.answer_command(message, connection)
            if reply is not None:
                channel.send(reply, time.monotonic() + self._timeout)

    def _serve(self) -> None:
        """Do what the server asks for while no call is under way."""
        if self._lost:
            return
        try:
            for _, channel in self._ends:
                with suppress(BlockingIOError):
                    channel.receive(_DONTWAIT)
            while self._take() or self._asked:
                self._answer()
        except (VfioUserError, OSError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if not self._lost:
            logger.warning("%s: %s", self._path, error)
            link = self._leave_link()
            if link is not None:
                link.stop()

    def _leave_link(self) -> Link | None:
        link, self._link, self._lost = self._link, None, True
        if link is not None:
            for _, channel in self._ends:
                link.unwatch(channel.fileno())
        return link


def _connected(path: Path, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(os.fspath(path))
    except (TimeoutError, BlockingIOError) as error:
        sock.close()
        raise CallTimeoutError("nobody accepts the connection") from error
    except BaseException:
        sock.close()
        raise
    return sock
