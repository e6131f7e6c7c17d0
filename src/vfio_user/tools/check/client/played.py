"""The server that is played: an honest one, whose replies a scenario may twist."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfio_user.device import Bar, Device, register
from vfio_user.errors import ProtocolError
from vfio_user.fds import OwnedFd
from vfio_user.protocol import Message, Outgoing
from vfio_user.server.dispatch import Dispatcher
from vfio_user.tools.check.facts import told_capabilities
from vfio_user.tools.check.raw import NoMessageError, RawConnection, Received, Transcript, pack
from vfio_user.wire import messages as m
from vfio_user.wire.constants import HEADER_SIZE, TYPE_MASK, Command, HeaderFlags, MigrationFlags

BAR_SIZE = 0x4000


class PlainDevice(Device):
    """What is served: a register, INTx and MSI-X, a reset, a migration with a part before the stop."""

    vendor_id, device_id, msix_vectors = 0x494F, 0x0C0C, 4
    intx = True
    migration = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    bars = {0: Bar(BAR_SIZE)}
    scratch = register(0x0, writable=0xFFFFFFFF)

    def pre_copy(self) -> bytes:
        return b""


@dataclass(slots=True)
class Conversation:
    """All that the client sent on one connection, in order; and how it ended.

    ``regions``, as (size, flags), and ``irqs``, as counts, are by index what the client is told, ``capabilities`` what
    VERSION was answered with. ``asked``: the server's own commands by id, as (command, payload); ``replies``: what the
    client answered. ``twisted``: how often something else than the honest reply was sent.
    ``end``: the code of a NoMessageError.
    """

    regions: tuple[tuple[int, int], ...] = ()
    irqs: tuple[int, ...] = ()
    capabilities: dict[str, Any] = field(default_factory=dict)
    messages: list[Received] = field(default_factory=list)
    replies: dict[int, Received] = field(default_factory=dict)
    asked: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    twisted: int = 0
    end: str = ""

    def limit(self, name: str, default: int) -> int:
        """A number among the capabilities."""
        value = self.capabilities.get(name, default)
        return value if isinstance(value, int) else default


class Play:
    """One connection of a client's, which may last ``timeout`` seconds.

    ``twist`` is given every honest reply, to send it or something else.
    """

    def __init__(self, sock: socket.socket, timeout: float, twist: Twist, transcript: Transcript) -> None:
        self.wire = RawConnection(sock, timeout, transcript)
        self.device = PlainDevice()
        regions = tuple((region.size, int(region.flags)) for region in self.device.regions)
        irqs = tuple(irq.count for irq in self.device.irqs)
        self.conversation = Conversation(regions, irqs)
        self._dispatcher = Dispatcher(self.device)
        self._twist = twist
        self._until = time.monotonic() + timeout
        self._closing = False

    def run(self) -> Conversation:
        """Until the client leaves, the timeout is over, or the twist ends it."""
        try:
            while not self._closing and time.monotonic() < self._until:
                self._take(self.wire.read())
            self.conversation.end = "ours"
        except NoMessageError as error:
            self.conversation.end = error.code
        finally:
            self._dispatcher.client_left()
            self.wire.socket.close()  # but not the descriptors that came: they are the conversation's to look at
        return self.conversation

    def _take(self, received: Received) -> None:
        if received.header.flags & TYPE_MASK == HeaderFlags.REPLY:
            self.conversation.replies[received.header.msg_id] = received
            return
        self.conversation.messages.append(received)
        reply = self._honest(received)
        if reply is not None:
            self._note_capabilities(whole(reply))
            self._twist(self, received, reply)

    def _honest(self, received: Received) -> Outgoing | None:
        header = received.header
        message = Message(header.msg_id, header.command, header.flags, header.error_no, memoryview(received.payload))
        message.fds = [OwnedFd.duplicate(fd.fileno()) for fd in received.fds]  # the conversation keeps its own
        try:
            self._dispatcher.connection.check(message)
        except ProtocolError as error:
            return self._dispatcher.refuse(message, error)
        return self._dispatcher.handle(message)

    # For twists

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        self._note_capabilities(data)
        with contextlib.suppress(NoMessageError):  # gone: the next read says so
            self.wire.send(data, fds)

    def _note_capabilities(self, data: bytes) -> None:
        """What the client is told by a reply to VERSION, twisted or not; a piece of one tells nothing."""
        if len(data) < HEADER_SIZE:
            return
        header = m.Header.parse(data)
        if header.command != Command.VERSION or header.msg_size != len(data):
            return
        self.conversation.capabilities = {}
        with contextlib.suppress(ValueError):
            self.conversation.capabilities = told_capabilities(data[HEADER_SIZE + 4 :])

    def send_reply(self, reply: Outgoing) -> None:
        self.send(b"".join(map(bytes, reply.buffers)), reply.fds)

    def twisted(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send something else than the honest reply."""
        self.conversation.twisted += 1
        self.send(data, fds)

    def close(self) -> None:
        """Leave."""
        self.conversation.twisted += 1
        self._closing = True

    def ask(self, command: int, payload: bytes) -> int:
        """Send a command of the server's own; its id. The reply is in the conversation later."""
        number = self.wire.next_id()
        self.conversation.asked[number] = (command, payload)
        self.send(pack(number, command, payload))
        return number


Twist = Callable[[Play, Received, Outgoing], None]


def honest(play: Play, request: Received, reply: Outgoing) -> None:
    """No twist."""
    play.send_reply(reply)


def whole(reply: Outgoing) -> bytes:
    """The bytes of a reply."""
    return b"".join(map(bytes, reply.buffers))


def again(data: bytes, **fields: int) -> bytes:
    """A message with other header fields; ``msg_size`` follows its length unless it is given."""
    header = m.Header.parse(data)
    values = {name: getattr(header, name) for name in m.Header.__match_args__} | {"msg_size": len(data)} | fields
    return struct.pack(m.Header.LAYOUT.format, *values.values()) + data[HEADER_SIZE:]


def of(*commands: Command) -> Callable[[Twist], Twist]:
    """Twist the replies to these commands alone."""

    def only(twist: Twist) -> Twist:
        def chosen(play: Play, request: Received, reply: Outgoing) -> None:
            (twist if request.header.command in commands else honest)(play, request, reply)

        return chosen

    return only
