"""What a server asks its client for: DMA by messages, over the connection itself or over its twin socket."""

from __future__ import annotations

import errno
import logging
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol

from vfio_user.errors import CallTimeoutError, FramingError, MessageError, ProtocolError
from vfio_user.protocol import Connection, Message, Outgoing
from vfio_user.server.context import Context
from vfio_user.server.dispatch import errno_of
from vfio_user.transport.blocking import Channel
from vfio_user.wire import messages as m
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import SERVER_DMA_CHUNK, Command

logger = logging.getLogger("vfio_user.server")

DMA_TIMEOUT = 5.0
"""Seconds that the client has to answer a DMA_READ or DMA_WRITE."""
MAX_NESTING = 8
"""Requests that may await their replies inside each other, through hooks that are served meanwhile."""

_DMA_WRITE = int(Command.DMA_WRITE)
_DONTWAIT = int(socket.MSG_DONTWAIT)
_POSTED_AT_ONCE = 1024
"""Posted DMA writes of a push that go out in one send."""


class Beside(Protocol):
    """What else is served while a reply is awaited: whoever manages the device."""

    def fileno(self) -> int:
        """Readable when there is something to serve."""

    def serve(self) -> None: ...


class DmaMessages:
    """Asks the client of ``connection``, and has ``serve`` serve its commands until the reply is there.

    ``timeout`` in seconds for each reply. What moves data raises OSError: what the reply says, ETIMEDOUT, EDEADLK when
    nested too deeply.
    """

    def __init__(
        self,
        connection: Connection,
        channel: Channel,
        context: Context,
        timeout: float,
        serve: Callable[[Message], None],
        beside: Beside | None,
    ) -> None:
        self._connection = connection
        self._channel = channel
        self._framer = channel.framer
        self._context = context
        self._timeout = timeout
        self._serve = serve
        self._beside = beside
        self._replies: dict[tuple[int, int], Message] = {}
        self._twin: tuple[Connection, Channel] | None = None
        self._twin_offer: socket.socket | None = None

    def read(self, address: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from the client's memory by DMA_READ."""
        for start, stop in self._chunks(len(buffer)):
            head = m.DmaAccess(address + start, stop - start).pack()
            reply = self._request(Command.DMA_READ, [head])
            data = _checked_dma_reply(reply, head)
            if len(data) != stop - start:
                raise OSError(errno.EPROTO, f"DMA_READ of {stop - start} bytes answered with {len(data)}")
            buffer[start:stop] = data

    def write(self, address: int, data: memoryview) -> None:
        """Write ``data`` to the client's memory by DMA_WRITE."""
        for start, stop in self._chunks(len(data)):
            head = m.DmaAccess(address + start, stop - start).pack()
            reply = self._request(Command.DMA_WRITE, [head, data[start:stop]])
            if reply.payload:  # QEMU 10.2 answers with a header only, the specification's table with 12 bytes
                _checked_dma_reply(reply, head, shortest=12)

    def post(self, writes: Iterable[tuple[int, bytes]]) -> int:
        """Send (address, data) by DMA_WRITE without asking for replies; how many."""
        connection, channel = self._twin or (self._connection, self._channel)
        command, pack = connection.command, m.DmaAccess.LAYOUT.pack
        sent = 0
        for batch in _batches(writes, _POSTED_AT_ONCE):
            parts: list[m.Buffer] = []
            for address, data in batch:
                parts += command(_DMA_WRITE, (pack(address, len(data)), data), posted=True)[1].buffers
            try:
                channel.send(Outgoing([b"".join(parts)]), time.monotonic() + self._timeout)
            except CallTimeoutError:
                self._channel.stop_receiving()  # a part of a message is out: nothing else can follow it
                raise OSError(errno.ETIMEDOUT, "the client does not take what is written to its memory") from None
            sent += len(batch)
        return sent

    def _chunks(self, size: int) -> list[tuple[int, int]]:
        most = min(self._context.client.data_xfer_size, SERVER_DMA_CHUNK)
        return [(start, min(start + most, size)) for start in range(0, size, most)]

    def _request(self, command: Command, parts: list[m.Buffer]) -> Message:
        """Send a DMA request and serve the client's commands until its reply is there."""
        if self._context.depth >= MAX_NESTING:
            raise OSError(errno.EDEADLK, f"{MAX_NESTING} DMA requests await their replies already")
        connection, channel = self._twin or (self._connection, self._channel)
        deadline = time.monotonic() + self._timeout
        msg_id, outgoing = connection.command(command, parts)
        self._framer.hold()
        self._context.depth += 1
        try:
            channel.send(outgoing, deadline)
            reply = self._await_reply((id(connection), msg_id), deadline)
        except CallTimeoutError:
            raise OSError(errno.ETIMEDOUT, f"{command.name} was not answered in time") from None
        except FramingError as error:  # a device that asked for DMA expects an OSError; the loop meets the same again
            raise OSError(error.errno, str(error)) from error
        finally:
            self._context.depth -= 1
            connection.abandon(msg_id)
        if reply.is_error:
            raise OSError(reply.error or errno.EINVAL, f"{command.name} was refused")
        return reply

    def _await_reply(self, key: tuple[int, int], deadline: float) -> Message:
        while key not in self._replies:
            message = self._framer.next_message()
            if message is not None:
                self._serve(message)
            elif not self._take_twin_reply():
                self._receive_any(deadline)
        return self._replies.pop(key)

    def _take_twin_reply(self) -> bool:
        """Look at the next message on the twin socket, where nothing but replies belongs."""
        if self._twin is None:
            return False
        connection, channel = self._twin
        message = channel.framer.next_message()
        if message is None:
            return False
        try:
            if connection.check(message):
                if message.is_command:
                    raise MessageError(f"{message!r} on the twin socket")
                self._replies[id(connection), message.msg_id] = kept(message)
            message.close()
        except ProtocolError as error:
            logger.debug("on the twin socket: %s", error)
            message.close()
            if message.is_command:
                channel.send(connection.error_reply(message, errno_of(error)))
        return True

    def _receive_any(self, deadline: float) -> None:
        channels = [self._channel] if self._twin is None else [self._channel, self._twin[1]]
        poll = select.poll()
        for channel in channels:
            poll.register(channel.fileno(), select.POLLIN)
        if self._beside is not None:
            poll.register(self._beside, select.POLLIN)
        ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if not ready or time.monotonic() >= deadline:
            raise CallTimeoutError("no reply in time")
        for channel in channels:
            if channel.fileno() in ready:
                channel.receive(_DONTWAIT)
        if self._beside is not None and self._beside.fileno() in ready:
            self._beside.serve()

    def replied(self, message: Message) -> None:
        """The client sent a reply over the connection itself."""
        self._replies[id(self._connection), message.msg_id] = kept(message)

    # The twin socket

    def offer_twin(self) -> int:
        """Make the twin socket; the client's end is closed here once the reply that carries it has gone out."""
        own, self._twin_offer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = Connection(Role.SERVER, self._connection.framer.max_size)
        connection.negotiated = True
        self._twin = (connection, Channel(own, connection.framer))
        return self._twin_offer.fileno()

    def twin_offered(self) -> None:
        """The reply that carries the client's end of the twin socket has gone out."""
        if self._twin_offer is not None:
            self._twin_offer.close()
            self._twin_offer = None

    def close(self) -> None:
        """Let go of the twin socket."""
        if self._twin is not None:
            self._twin[1].close()
        self.twin_offered()


def kept(message: Message) -> Message:
    """``message`` with a payload of its own, that outlives the receive buffer."""
    message.payload = memoryview(bytes(message.payload))
    return message


def _batches(writes: Iterable[tuple[int, bytes]], size: int) -> Iterator[list[tuple[int, bytes]]]:
    iterator = iter(writes)
    while batch := list(islice(iterator, size)):
        yield batch


def _checked_dma_reply(reply: Message, head: bytes, shortest: int | None = None) -> memoryview:
    """The data behind the fixed part of a DMA reply, which must repeat the request's."""
    size = len(head)
    fixed = bytes(reply.payload[:size])
    if len(fixed) < (shortest or size) or fixed != head[: len(fixed)]:
        raise OSError(errno.EPROTO, "a DMA reply does not repeat the address and count of its request")
    return reply.payload[size:]
