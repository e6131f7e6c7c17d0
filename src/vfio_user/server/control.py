"""The control socket: several clients that manage a device while another one, the primary, uses it (docs/control.md).

All of it is served by the thread that serves the primary client, whenever that thread waits, and never waits itself:
what a client sends is gathered piece by piece, what it does not take yet is kept for it, and a command that has to
wait for the primary's leaves its connection alone until then.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol

from vfio_user.dma.iova import IovaTable
from vfio_user.dma.memory import GuestMemory
from vfio_user.errors import ConnectionClosedError, FramingError, MessageError, ProtocolError
from vfio_user.fds import OwnedFd
from vfio_user.migration.states import RUNNING_STATES
from vfio_user.protocol import Message, Outgoing
from vfio_user.server import access, info, irqs, migration
from vfio_user.server.backend import Quiescing, ServerBackend
from vfio_user.server.context import AccessGate, Context, DmaMapping, Limits, Reply, check_argsz
from vfio_user.server.dispatch import Dispatcher, Handler
from vfio_user.transport.ancillary import skip_sent
from vfio_user.transport.blocking import Channel
from vfio_user.wire import messages as m
from vfio_user.wire.commands import CONTROL_COMMANDS
from vfio_user.wire.constants import PAGE_SIZE, AccessMode, Command, ControlCommand, IrqSetFlags, RegionFlags

logger = logging.getLogger("vfio_user.server")

MAX_CLIENTS = 32
"""Control clients at the same time; more wait to be accepted."""
_TURN = 16
"""Commands of one client that are served before others have their turn."""
_DONTWAIT = int(socket.MSG_DONTWAIT)
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_SETTLED_ONLY = frozenset({Command.DEVICE_FEATURE, ControlCommand.CONTROL_PUSH, ControlCommand.CONTROL_ACCESS})
"""Commands that may stop DMA, ask for some or change what becomes of accesses: not in the middle of a primary one."""
_RAISE = int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER)


class Primary(Protocol):
    """What is needed of the session of the primary client."""

    @property
    def settled(self) -> bool: ...
    @property
    def held(self) -> int: ...
    @property
    def maps(self) -> IovaTable[DmaMapping]: ...
    def poll_watches(self) -> None: ...
    def follow_device(self) -> None: ...
    def dma_read(self, address: int, buffer: memoryview) -> None: ...
    def dma_write(self, address: int, data: memoryview) -> None: ...
    def dma_post(self, writes: Iterable[tuple[int, bytes]]) -> int: ...


class _Peer:
    """One control client: its connection, the command that waits, and what it has not taken yet of a reply."""

    def __init__(self, sock: socket.socket, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.channel = Channel(sock, dispatcher.connection.framer)
        self.fd = sock.fileno()
        self.busy = False
        self.watched = 0
        self.waiting: tuple[Message, Quiescing | None] | None = None
        self._unsent: list[memoryview] = []

    def next_message(self) -> Message | None:
        """The next whole one, of what was received and what one more look at the socket gives; None: not yet."""
        message = self.channel.framer.next_message()
        if message is None:
            with contextlib.suppress(BlockingIOError):
                self.channel.receive(_DONTWAIT)
                message = self.channel.framer.next_message()
        return message

    def send(self, reply: Outgoing | None) -> None:
        """Send as much of a reply as is taken now. The rest is copied: the device's memory does not stay as it is."""
        if reply is None:
            return
        self._unsent = [memoryview(part).cast("B") for part in reply.buffers]
        if not self.flush():
            self._unsent = [memoryview(b"".join(self._unsent))]

    def flush(self) -> bool:
        """Send more of what was not taken. Whether nothing is left."""
        while self._unsent:
            try:
                sent = self.channel.socket.sendmsg(self._unsent, (), _SEND_FLAGS)
            except BlockingIOError:
                return False
            self._unsent = skip_sent(self._unsent, sent)
        return True

    @property
    def interest(self) -> int:
        """What the client must do before anything more is to be done."""
        if self.waiting is not None:
            return 0
        return select.EPOLLOUT if self._unsent else select.EPOLLIN

    def close(self) -> None:
        if self.waiting is not None:
            self.waiting[0].close()
            self.waiting = None
        self.channel.close()


class Control:
    """The clients of the socket ``listener`` of a server of ``backend``.

    ``primary`` is the session of the primary client while there is one. ``gate`` says what becomes of its accesses.
    """

    def __init__(self, backend: ServerBackend, listener: socket.socket, limits: Limits) -> None:
        self.gate = AccessGate()
        self.primary: Primary | None = None
        self._backend = backend
        self._limits = limits
        self._listener = listener
        listener.setblocking(False)
        self._handlers = self._table()
        self._peers: dict[int, _Peer] = {}
        self._again: deque[_Peer] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._spare: OwnedFd | None = _spare_descriptor()
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._epoll.register(listener, select.EPOLLIN)
        self._accepting = True
        self._closed = False

    def fileno(self) -> int:
        """A descriptor that is readable whenever :meth:`serve` has something to do."""
        return self._epoll.fileno()

    def serve(self) -> None:
        """Do what can be done without waiting. Never raises. It is called within itself while a device asks for DMA."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif fd == self._listener.fileno():
                self._accept()
            elif (peer := self._peers.get(fd)) is not None:
                self._turn(peer)
        for _ in range(len(self._again)):
            if self._again:
                self._turn(self._again.popleft())

    def retry(self) -> None:
        """What made commands wait may be over."""
        if self._again:
            self._wake()

    def close(self) -> None:
        """Let the clients go."""
        self._closed = True
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._listener.close()
        self._epoll.close()
        os.close(self._wake_fd)
        if self._spare is not None:
            self._spare.close()

    def _wake(self) -> None:
        """From any thread."""
        if not self._closed:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._wake_fd, 1)

    # Clients

    def _accept(self) -> None:
        try:
            sock = self._listener.accept()[0]
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("a control client could not be accepted: %s", error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return
        dispatcher = Dispatcher(self._backend, self._limits, commands=CONTROL_COMMANDS, handlers=self._handlers)
        peer = self._peers[sock.fileno()] = _Peer(sock, dispatcher)
        self._watch(peer, select.EPOLLIN)
        self._listen()

    def _turn_away(self) -> None:
        """Close the connection that waits: left there, it would be accepted in vain over and over."""
        if self._spare is not None:
            self._spare.close()
        self._spare = None
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
            self._spare = _spare_descriptor()

    def _listen(self) -> None:
        """Accept clients as long as there are not too many."""
        accepting = len(self._peers) < MAX_CLIENTS
        if accepting != self._accepting:
            self._accepting = accepting
            self._epoll.modify(self._listener, select.EPOLLIN if accepting else 0)

    def _watch(self, peer: _Peer, interest: int) -> None:
        """Not at all where nothing is of interest: epoll would tell of a client that left over and over."""
        if interest and peer.watched:
            self._epoll.modify(peer.fd, interest)
        elif interest:
            self._epoll.register(peer.fd, interest)
        elif peer.watched:
            self._epoll.unregister(peer.fd)
        peer.watched = interest

    def _drop(self, peer: _Peer) -> None:
        """A client left. Nothing of the device is changed by that."""
        self._watch(peer, 0)
        del self._peers[peer.fd]
        if peer.waiting is not None and peer.waiting[1] is not None:
            peer.waiting[1].on_done(lambda: None)
            self._quiesced()
        peer.close()
        self._listen()

    def _turn(self, peer: _Peer) -> None:
        """Serve one client as far as that goes without waiting for it, and not for too long."""
        if peer.busy or self._peers.get(peer.fd) is not peer:
            return
        peer.busy = True
        self._watch(peer, 0)
        try:
            more = self._advance(peer)
        except (ConnectionClosedError, FramingError, OSError) as error:
            logger.debug("a control client left: %s", error)
            self._drop(peer)
            return
        except Exception:
            logger.exception("a control client is let go")
            self._drop(peer)
            return
        peer.busy = False
        self._watch(peer, peer.interest)
        if (more or peer.waiting is not None) and peer not in self._again:
            self._again.append(peer)
        if more:
            self._wake()

    def _advance(self, peer: _Peer) -> bool:
        """Whether there is more to do at once."""
        for _ in range(_TURN):
            if not peer.flush():
                return False
            if peer.waiting is None:
                message = peer.next_message()
                if message is None:
                    return False
                self._check(peer, message)
            if peer.waiting is not None and not self._attempt(peer):
                return False
        return True

    # Commands

    def _check(self, peer: _Peer, message: Message) -> None:
        """Judge a message; a command that passes waits for :meth:`_attempt`."""
        try:
            if peer.dispatcher.connection.check(message):
                peer.waiting = (message, None)
            else:
                message.close()
        except ProtocolError as error:
            self._refuse(peer, message, error)

    def _attempt(self, peer: _Peer) -> bool:
        """Handle the command that waits, unless it has to wait on: False."""
        assert peer.waiting is not None
        message, quiescing = peer.waiting
        if message.command in _SETTLED_ONLY and self.primary is not None and not self.primary.settled:
            return False
        try:
            quiescing = quiescing or self._quiesce(peer, message)
        except Exception as error:
            self._refuse(peer, message, error)
            return True
        if quiescing is not None and quiescing.error is None:
            return False
        self._finish(peer, message, quiescing)
        return True

    def _quiesce(self, peer: _Peer, message: Message) -> Quiescing | None:
        """Have DMA stopped where a command needs it. While that takes its time, what might start some is held."""
        if self.primary is not None and message.command == Command.DEVICE_FEATURE:
            self.primary.poll_watches()  # a doorbell that was rung before must not start DMA behind the quiesce
        quiescing = peer.dispatcher.quiesce(message)
        if quiescing is not None:
            peer.waiting = (message, quiescing)
            self.gate.quiescing += 1
            self._follow()
            quiescing.on_done(self._wake)
        return quiescing

    def _finish(self, peer: _Peer, message: Message, quiescing: Quiescing | None) -> None:
        """Handle a command whose DMA is quiesced, or whose quiesce failed; the reply comes last."""
        peer.waiting = None
        if quiescing is not None and quiescing.error:
            reply = peer.dispatcher.refuse(message, OSError(quiescing.error, "the device did not quiesce"))
        else:
            reply = peer.dispatcher.handle(message)
        if quiescing is not None:
            self._quiesced()
        elif message.command == Command.DEVICE_FEATURE:
            self._follow()
        self._answer(peer, reply)

    def _refuse(self, peer: _Peer, message: Message, error: Exception) -> None:
        peer.waiting = None
        self._answer(peer, peer.dispatcher.refuse(message, error))

    def _answer(self, peer: _Peer, reply: Outgoing | None) -> None:
        peer.send(reply)
        if peer.dispatcher.closing:
            raise ConnectionClosedError("the negotiation failed")

    def _quiesced(self) -> None:
        self.gate.quiescing -= 1
        self._follow()

    def _follow(self) -> None:
        """The device may be in another state, or the gate in another mode: the primary client is served accordingly."""
        if self.primary is not None:
            self.primary.follow_device()

    def _table(self) -> Mapping[int, Handler]:
        return {
            Command.DEVICE_GET_INFO: info.get_info,
            Command.DEVICE_GET_REGION_INFO: _region_info,
            Command.DEVICE_GET_IRQ_INFO: info.get_irq_info,
            Command.DEVICE_SET_IRQS: _trigger,
            Command.REGION_READ: _region_read,
            Command.DEVICE_FEATURE: self._device_feature,
            Command.MIG_DATA_READ: migration.mig_data_read,
            Command.MIG_DATA_WRITE: migration.mig_data_write,
            ControlCommand.CONTROL_PUSH: partial(_negotiated, self._push),
            ControlCommand.CONTROL_ACCESS: partial(_negotiated, self._set_access),
            ControlCommand.CONTROL_STATUS: partial(_negotiated, self._status),
        }

    def _device_feature(self, context: Context, message: Message) -> Reply:
        """As everywhere. DMA is what the primary client mapped."""
        context.maps = IovaTable() if self.primary is None else self.primary.maps
        return migration.device_feature(context, message)

    def _push(self, context: Context, message: Message) -> Reply:
        """Have the primary client see as dirty what the device dirtied: all of it, or an error and the log as it was.

        Raises OSError: ENOTCONN, ENOTSUP, ENODATA or EBUSY where that makes no sense, ENOTRECOVERABLE where the device
        wrote to memory that was unmapped since and is not there again, and what the client answers.
        """
        primary, dma = self.primary, self._backend.dma
        if primary is None:
            raise OSError(errno.ENOTCONN, "there is no primary client")
        if dma is None:
            raise OSError(errno.ENOTSUP, "the device does not tell what it wrote")
        if not dma.log.active:
            raise OSError(errno.ENODATA, "DMA is not being logged")
        if context.state() in RUNNING_STATES:
            raise OSError(errno.EBUSY, "the device runs: what it writes meanwhile could be overwritten")
        if dma.log.incomplete:
            raise OSError(errno.ENOTRECOVERABLE, "the device wrote to memory that is not mapped any more")
        runs = dma.log.take()
        try:
            pages = _push_runs(dma, primary, runs)
        except BaseException:
            for address, size in runs:
                dma.log.mark(address, size)
            raise
        return Reply([m.ControlPushed(pages).pack()])

    def _set_access(self, context: Context, message: Message) -> Reply:
        number = m.ControlAccess.parse(message.payload).mode
        try:
            self.gate.mode = AccessMode(number)
        except ValueError:
            raise MessageError(f"{number} is no access mode") from None
        self._follow()
        return Reply([m.ControlAccess(number).pack()])

    def _status(self, context: Context, message: Message) -> Reply:
        state, dma, primary = context.state(), self._backend.dma, self.primary
        status = m.ControlStatus(
            access=self.gate.mode,
            held=primary.held if primary is not None else 0,
            page_size=dma.log.page_size if dma is not None else 0,
            dirty_pages=dma.log.count() if dma is not None else 0,
            state=m.ControlStatus.NO_STATE if state is None else state,
            connected=primary is not None,
        )
        return Reply([status.pack()])


def _spare_descriptor() -> OwnedFd:
    """One to give up when there is no other."""
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))


def _negotiated(handler: Handler, context: Context, message: Message) -> Reply:
    if not context.client.has_control:
        raise OSError(errno.ENOTSUP, "x_control was not negotiated")
    return handler(context, message)


def _region_info(context: Context, message: Message) -> Reply:
    """No descriptor, which would let its holder write; and reading is all that is served."""
    request = m.RegionInfo.parse(message.payload)
    size = m.RegionInfo.LAYOUT.size
    check_argsz(request.argsz, size)
    region = context.region(request.index)
    flags = region.flags & RegionFlags.READ if region.size else 0
    return Reply([m.RegionInfo(size, flags, request.index, 0, region.size, region.offset).pack()])


def _region_read(context: Context, message: Message) -> Reply:
    context.refresh_access()
    return access.region_read(context, message)


def _trigger(context: Context, message: Message) -> Reply:
    """Have the device raise interrupts. Eventfds and masks are the primary client's."""
    request = m.IrqSet.parse(message.payload)
    if request.flags != _RAISE or not request.count:
        raise MessageError("a control client raises interrupts, and nothing else of SET_IRQS", errno.EPERM)
    return irqs.set_irqs(context, message)


def _push_runs(dma: GuestMemory, primary: Primary, runs: list[tuple[int, int]]) -> int:
    """Write a byte of each page of 4 KiB back to where it is; how many pages that were.

    The first write is answered: the client says then whether it takes any. The read at the end is answered behind all
    of the others.
    """
    addresses = _page_addresses(runs)
    first = next(addresses, None)
    if first is None:
        return 0
    try:
        primary.dma_write(first, memoryview(dma.read(first, 1)))
        posted = primary.dma_post((address, dma.read(address, 1)) for address in addresses)
        primary.dma_read(first, memoryview(bytearray(1)))
    except ConnectionClosedError as error:
        raise OSError(errno.ENOTCONN, "the primary client has left") from error
    return 1 + posted


def _page_addresses(runs: list[tuple[int, int]]) -> Iterator[int]:
    """An address in every page of 4 KiB that has a part in a run of (address, size)."""
    for start, size in runs:
        for page in range(start & -PAGE_SIZE, start + size, PAGE_SIZE):
            yield max(page, start)
