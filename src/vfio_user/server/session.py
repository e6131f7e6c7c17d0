"""One client, served: receives, dispatches, replies, and asks the client for DMA by messages.

The loop is written for register accesses: one recvmsg, one hook, one send, with many posted writes to a recvmsg.
:meth:`Session._serve_accesses` takes those that need no thought straight from the receive buffer; everything else,
and everything that is wrong in any way, goes through :class:`Dispatcher`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from vfio_user.dma.iova import IovaTable
from vfio_user.errors import (
    ConnectionClosedError,
    FramingError,
    ProtocolError,
    VfioUserError,
)
from vfio_user.protocol import Message
from vfio_user.server.access import touches_bar
from vfio_user.server.backend import Quiescing, ServerBackend
from vfio_user.server.context import DmaMapping, Limits
from vfio_user.server.dispatch import DUMMY_HANDLERS, Dispatcher, Handler
from vfio_user.server.dma_messages import DMA_TIMEOUT, DmaMessages, kept
from vfio_user.transport.blocking import Channel
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS
from vfio_user.wire.constants import HEADER_SIZE, AccessMode, Command, HeaderFlags

if TYPE_CHECKING:
    from vfio_user.server.control import Control

logger = logging.getLogger("vfio_user.server")

QUIESCE_TIMEOUT = 30.0
"""Seconds that a device may take to stop its DMA after its client has left."""
MAX_POSTPONED = 1024
MAX_POSTPONED_BYTES = 4 << 20
"""Commands that may wait, in number and in bytes, for a DMA request to end before DMA can be quiesced."""

_READ, _WRITE = int(Command.REGION_READ), int(Command.REGION_WRITE)
_NO_REPLY, _REPLY = int(HeaderFlags.NO_REPLY), int(HeaderFlags.REPLY)
_ACCESS = struct.Struct(m.Header.LAYOUT.format + m.RegionAccess.LAYOUT.format.removeprefix("<"))
_ACCESS_SIZE = _ACCESS.size
_LOAD = int(Command.MIG_DATA_WRITE)
_DATA = struct.Struct(m.Header.LAYOUT.format + m.MigData.LAYOUT.format.removeprefix("<"))
_DATA_SIZE = _DATA.size
_DONTWAIT = int(socket.MSG_DONTWAIT)
_SMALL = 4096
"""Bytes up to which a read is served without asking for a view of them first."""


class Session:
    """Serves one client on ``sock`` until it leaves; see :class:`~vfio_user.server.backend.Link` for backends."""

    def __init__(
        self,
        backend: ServerBackend,
        sock: socket.socket,
        epoll: select.epoll,
        wake: Callable[[], None],
        *,
        limits: Limits | None = None,
        spin: float = 0.0,
        dma_timeout: float = DMA_TIMEOUT,
        control: Control | None = None,
    ) -> None:
        self._backend = backend
        self._control = control
        gate = None if control is None else control.gate
        self._dispatcher = Dispatcher(backend, limits, offer_twin=lambda: self._dma.offer_twin(), gate=gate)
        self._connection = self._dispatcher.connection
        self._context = self._dispatcher.context
        self._framer = self._connection.framer
        self._channel = Channel(sock, self._framer)
        self._dma = DmaMessages(
            self._connection, self._channel, self._context, dma_timeout, self._handle, self._control
        )
        self._epoll = epoll
        self._wake = wake
        self._spin = spin
        self._receive_bytes = self._spin_and_receive if spin else self._channel.receive
        self._watches: dict[int, Callable[[], None]] = {}
        self._deferred: deque[Callable[[], None]] = deque()
        self._working = False
        self._parked: tuple[Message | None, Quiescing] | None = None
        self._postponed: deque[Message] = deque()
        self._held: deque[Message] = deque()
        self._closed = False
        epoll.register(sock, select.EPOLLIN)
        if control is not None:
            self.watch(control.fileno(), control.serve)
            control.primary = self
        try:
            backend.connected(self)
            self._context.refresh_access()  # some know only now what they are
        except Exception:
            logger.exception("the device failed in connected()")
            self._channel.stop_receiving()

    # The loop

    def serve(self) -> None:
        """Serve until the client leaves, or :meth:`stop` and all that was received before is answered."""
        try:
            while True:
                self._receive()
                self._process(wait=True)
        except ConnectionClosedError as error:
            logger.debug("%s", error)
        except (FramingError, OSError) as error:
            logger.warning("closing: %s", error)
        finally:
            self.close()

    def step(self) -> int | None:
        """Serve what is there without waiting for more: messages handled; None when the client has left."""
        handled = 0
        try:
            self._poll_watches(0)
            while self._parked is None or self._resume():
                handled += self._process()
                try:
                    self._channel.receive(_DONTWAIT)
                except BlockingIOError:
                    if self._spin and self._look_for_work(last=True):
                        self._wake()  # there may be more: whoever waits for us is to come back, others have their turn
                    break
                handled += self._process()
            return handled
        except ConnectionClosedError as error:
            logger.debug("%s", error)
        except (FramingError, OSError) as error:
            logger.warning("closing: %s", error)
        self.close()
        return None

    def stop(self) -> None:
        """End :meth:`serve` when what was received is answered. For signal handlers and other threads."""
        self._channel.stop_receiving()
        self._wake()

    def _receive(self) -> None:
        while self._parked is not None:
            self._poll_watches(-1)
            if self._resume():
                self._process()
        if not self._watches:
            if self._framer.mid_message:
                self._channel.receive_rest()
            else:
                self._receive_bytes(0)
            return
        self._receive_among_watches()

    def _receive_among_watches(self) -> bool:
        """Wait for any descriptor. True where more came of it than bytes of the client's."""
        ready = self._wait()
        only_client = len(ready) == 1 and ready[0][0] == self._channel.fileno()
        if only_client or self._serve_watches(ready):
            with contextlib.suppress(BlockingIOError):  # taken already, while a watch's callback awaited DMA
                return self._channel.receive(_DONTWAIT) or not only_client
        return True

    def _wait(self) -> list[tuple[int, int]]:
        """The descriptors that are ready, as soon as one is; none where the device found work meanwhile."""
        poll = self._epoll.poll
        for worked in self._looks():
            if worked:
                return []
            if ready := poll(0):
                return ready
        return poll()

    def _spin_and_receive(self, flags: int) -> bool:
        """Look for the next bytes for a while before sleeping. True also where the device found work meanwhile."""
        receive = self._channel.receive
        for worked in self._looks():
            if worked:
                return True
            try:
                return receive(_DONTWAIT)
            except BlockingIOError:
                continue
        return receive(flags)

    def _looks(self) -> Iterator[bool]:
        """One for each look around before the server sleeps, none where it does not spin.

        True: the device found work. If it asked for DMA, commands may have come meanwhile: see to them, then wait anew.
        """
        until = time.perf_counter() + self._spin
        last = not self._spin
        while not last:
            yield False
            last = time.perf_counter() >= until
            if self._look_for_work(last):
                yield True

    def _look_for_work(self, last: bool) -> bool:
        try:
            return self._backend.look_for_work(last)
        except (ConnectionClosedError, FramingError):
            raise
        except Exception:
            logger.exception("the device failed in look_for_work()")
            return False
        finally:
            if self._deferred:
                self._work()

    def _poll_watches(self, timeout: float) -> bool:
        """Wait for any descriptor and serve those that the backend watches. True if the client's is ready."""
        return self._serve_watches(self._epoll.poll(timeout))

    def _serve_watches(self, ready: list[tuple[int, int]]) -> bool:
        own = self._channel.fileno()
        readable = False
        for fd, _ in ready:
            if fd == own:
                readable = True
            elif (callback := self._watches.get(fd)) is not None:
                self._run(callback)
                self._work()
            else:
                _drain(fd)
        return readable

    def _process(self, *, wait: bool = False) -> int:
        """Handle every whole message that has come; how many. ``wait``: register accesses are awaited in here, too."""
        handled = 0
        framer = self._framer
        connection = self._connection
        context = self._context
        while self._parked is None:
            if connection.negotiated and not self._postponed and not framer.has_fds:
                if context.loading:
                    handled += self._serve_migration_data()
                handled += self._serve_accesses(wait)
            message = self._postponed.popleft() if self._postponed else framer.next_message()
            if message is None:
                break
            handled += 1
            self._handle(message)
            if self._deferred:
                self._work()
        return handled

    def _serve_accesses(self, wait: bool) -> int:
        """Serve register accesses at the front of the receive buffer, as long as nothing is special about them.

        With ``wait`` the next ones are awaited here: a turn is one recvmsg, one hook, one send and little else.
        Every call of a function that is left out here is felt: the caches are cold after each switch of processes.
        """
        framer = self._framer
        context = self._context
        backend = self._backend
        send = self._channel.send_small
        most = context.limits.data_xfer_size
        handled = 0
        buffer = framer.buffer
        # A hook that asked for DMA moved the framer on to a new buffer, and commands may have been postponed since.
        while framer.buffer is buffer:
            start = framer.start
            if framer.end - start < _ACCESS_SIZE:
                if framer.end != start or not wait:
                    break
                if self._receive_among_watches() if self._watches else self._receive_bytes(0):
                    break
                continue
            msg_id, command, size, flags, _, offset, region, count = _ACCESS.unpack_from(buffer, start)
            if not 0 < count <= most or region >= len(context.readable):
                break
            try:
                if command == _WRITE:
                    stop = start + size
                    if size != _ACCESS_SIZE + count or stop > framer.end or flags & ~_NO_REPLY:
                        break
                    if offset + count > context.writable[region]:
                        break
                    framer.start = stop
                    backend.region_write(region, offset, framer.view[start + _ACCESS_SIZE : stop])
                    reply = None if flags else bytearray(_ACCESS_SIZE)
                    length = _ACCESS_SIZE
                elif command == _READ and size == _ACCESS_SIZE and count <= _SMALL and not flags:
                    if offset + count > context.readable[region]:
                        break
                    framer.start = start + _ACCESS_SIZE
                    length = _ACCESS_SIZE + count
                    reply = bytearray(length)
                    backend.region_read(region, offset, memoryview(reply)[_ACCESS_SIZE:])
                else:
                    break
                if reply is not None:
                    _ACCESS.pack_into(reply, 0, msg_id, command, length, _REPLY, 0, offset, region, count)
            except Exception as error:
                self._refuse(Message(msg_id, command, flags, 0, framer.view[:0]), error)
            else:
                if reply is not None:
                    send(reply)
            handled += 1
            if self._deferred:
                self._work()
        return handled

    def _serve_migration_data(self) -> int:
        """Take migration data at the front of the receive buffer, as :meth:`_serve_accesses` does accesses."""
        framer = self._framer
        most = self._context.limits.data_xfer_size
        handled = 0
        buffer = framer.buffer
        while framer.buffer is buffer and framer.end - framer.start >= _DATA_SIZE:
            start = framer.start
            msg_id, command, size, flags, _, argsz, count = _DATA.unpack_from(buffer, start)
            stop = start + size
            if command != _LOAD or flags or not 0 < count <= most or size != _DATA_SIZE + count or stop > framer.end:
                break
            if argsz < m.MigData.LAYOUT.size + count:
                break
            framer.start = stop
            try:
                self._backend.migration_write_data(framer.view[start + _DATA_SIZE : stop])
            except Exception as error:
                self._refuse(Message(msg_id, command, flags, 0, framer.view[:0]), error)
            else:
                self._channel.send_small(m.Header.LAYOUT.pack(msg_id, command, HEADER_SIZE, _REPLY, 0))
            handled += 1
            if self._deferred:
                self._work()
        return handled

    # One message

    def _handle(self, message: Message) -> None:
        try:
            if not self._connection.check(message):
                message.close()
                return
        except ProtocolError as error:
            self._refuse(message, error)
            return
        if message.is_reply:
            self._dma.replied(message)
            return
        if self._context.depth and self._must_wait(message):
            self._postpone(message)
            return
        if self._context.access is not AccessMode.PASS and touches_bar(message):
            self._divert(message)
            return
        if self._watches and _may_quiesce(message):
            message = kept(message)
            self._poll_watches(0)  # a doorbell that was rung before must not start DMA behind the quiesce
        try:
            quiescing = self._dispatcher.quiesce(message)
        except Exception as error:
            self._refuse(message, error)
            return
        if quiescing is not None and quiescing.error is None:
            self._park(message, quiescing)
        else:
            self._finish(message, quiescing)

    def _finish(self, message: Message, quiescing: Quiescing | None) -> None:
        """Handle a command whose DMA is quiesced, or whose quiesce failed."""
        if quiescing is not None and quiescing.error:
            self._refuse(message, OSError(quiescing.error, "the device did not quiesce"))
            return
        if self._held and message.command == Command.DEVICE_RESET:
            self._answer_held()
        self._answer(message)
        self._release_held()

    def _answer(self, message: Message, handlers: Mapping[int, Handler] | None = None) -> None:
        reply = self._dispatcher.handle(message, handlers)
        if reply is not None:
            self._channel.send(reply)
        self._after_reply()

    def _refuse(self, message: Message, error: Exception) -> None:
        reply = self._dispatcher.refuse(message, error)
        if reply is not None:
            self._channel.send(reply)
        self._after_reply()

    def _after_reply(self) -> None:
        """The twin socket's offered end has gone out; a connection that must end does so now."""
        self._dma.twin_offered()
        if self._dispatcher.closing:
            raise ConnectionClosedError("the negotiation failed")

    def _park(self, message: Message | None, quiescing: Quiescing) -> None:
        """Have a command wait until DMA has stopped, and every later one behind it. None: only those."""
        self._parked = (message, quiescing)
        self._epoll.modify(self._channel.fileno(), select.EPOLLRDHUP)
        quiescing.on_done(self._wake)

    def _resume(self) -> bool:
        """Handle the parked command if its time has come. False: it has to wait on."""
        assert self._parked is not None
        message, quiescing = self._parked
        if quiescing.error is None:
            self._check_hangup()
            return False
        self._parked = None
        self._epoll.modify(self._channel.fileno(), select.EPOLLIN)
        if message is not None:
            self._finish(message, quiescing)
        self._work()
        self._retry_control()
        return True

    def _check_hangup(self) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLRDHUP)
        if poll.poll(0):
            raise ConnectionClosedError("the peer closed while a command waited for DMA to stop")

    @property
    def spin(self) -> float:
        """Seconds that the server looks around before it sleeps."""
        return self._spin

    # What a control socket may ask

    @property
    def settled(self) -> bool:
        """Whether no command is under way that waits for DMA: only then another one may stop DMA, or ask for some."""
        return not self._context.depth and (self._parked is None or self._parked[0] is None)

    @property
    def held(self) -> int:
        """Accesses that wait for the device to run again."""
        return len(self._held)

    @property
    def maps(self) -> IovaTable[DmaMapping]:
        """What the client mapped."""
        return self._context.maps

    def poll_watches(self) -> None:
        """Serve what the backend watches and is ready now. A stream that is lost meanwhile is seen when it is read."""
        with contextlib.suppress(ConnectionClosedError, FramingError):
            self._poll_watches(0)

    def follow_device(self) -> None:
        """The device is in another state, or the gate in another mode."""
        self._context.refresh_access()
        self._release_held()

    def dma_post(self, writes: Iterable[tuple[int, bytes]]) -> int:
        """Send (address, data) by DMA_WRITE without asking for replies; how many. Raises OSError as dma_write does."""
        return self._dma.post(writes)

    def _retry_control(self) -> None:
        """What a control client wants may have waited for this to be over."""
        if self._control is not None and self.settled:
            self._control.retry()

    # What is not for a device that stands still

    def _divert(self, message: Message) -> None:
        """Keep an access from the device: answer it without, or have it wait until the device runs."""
        if self._context.access is AccessMode.DUMMY:
            self._answer(message, DUMMY_HANDLERS)
            return
        self._held.append(kept(message))
        if not _too_many(self._held, share=2):  # once they are released, others may wait behind them
            return
        if self._context.depth:
            self._let_go("the client sends accesses instead of answering a DMA request")
        self._park(None, Quiescing())  # let the client wait, too: no message is taken until these are served

    def _release_held(self) -> None:
        """Serve what was held before anything else, if it may be served now."""
        if not self._held or self._context.access is AccessMode.HOLD:
            return
        self._postponed.extendleft(reversed(self._held))
        self._held.clear()
        if self._parked is not None and self._parked[0] is None:
            self._parked[1].done()

    def _answer_held(self) -> None:
        """What was held came before a reset, which makes undone whatever it would have done."""
        while self._held:
            self._answer(self._held.popleft(), DUMMY_HANDLERS)

    # What a backend may ask: Link

    def defer(self, work: Callable[[], None]) -> None:
        self._deferred.append(work)

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        self._watches[fd] = ready
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        if self._watches.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # closed by the backend, which epoll forgets by itself
                self._epoll.unregister(fd)

    def dma_read(self, address: int, buffer: memoryview) -> None:
        try:
            self._dma.read(address, buffer)
        finally:
            self._retry_control()

    def dma_write(self, address: int, data: memoryview) -> None:
        try:
            self._dma.write(address, data)
        finally:
            self._retry_control()

    def _must_wait(self, message: Message) -> bool:
        """Whether a command that came while a DMA request awaits its reply must wait for that: it stops DMA.

        Later ones wait behind it: commands are served in order.
        """
        return bool(self._postponed) or self._parked is not None or _may_quiesce(message)

    def _postpone(self, message: Message) -> None:
        self._postponed.append(kept(message))
        if _too_many(self._postponed):
            self._let_go("the client sends commands instead of answering a DMA request")

    def _let_go(self, reason: str) -> NoReturn:
        """End the connection. What is raised within a hook may not come through; an end of the stream does."""
        self._channel.stop_receiving()
        raise ConnectionClosedError(reason)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (ConnectionClosedError, FramingError):
            raise
        except (OSError, VfioUserError) as error:
            logger.warning("deferred work ended: %s", error)
        except Exception:
            logger.exception("the device failed in deferred work")

    def _work(self) -> None:
        """Do what hooks deferred; what that defers in turn, too. Not inside itself."""
        if self._working:
            return
        self._working = True
        try:
            while self._deferred:
                self._run(self._deferred.popleft())
        finally:
            self._working = False

    # The end

    def close(self) -> None:
        """Forget the client: stop DMA, take away its interrupts and memory, close its descriptors."""
        if self._closed:
            return
        self._closed = True
        if self._control is not None:
            self._control.primary = None
        if self._parked is not None and self._parked[0] is None:
            self._parked = None  # nothing of the device's was waited for
        self._quiesce_now()
        parked = self._parked[0] if self._parked is not None else None
        for message in (*self._postponed, *self._held, parked):
            if message is not None:
                message.close()
        self._deferred.clear()
        self._dispatcher.client_left()
        try:
            self._backend.disconnected()
        except Exception:
            logger.exception("the device failed in disconnected()")
        for fd in list(self._watches):
            self.unwatch(fd)
        self._epoll.unregister(self._channel.fileno())
        self._channel.close()
        self._context.drop_reply_buffers()
        self._dma.close()
        if self._control is not None:
            self._control.retry()

    def _quiesce_now(self) -> None:
        try:
            quiescing = self._backend.quiesce() if self._parked is None else self._parked[1]
        except Exception:
            logger.exception("the device failed to quiesce after its client left")
            return
        if quiescing is None:
            return
        done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            quiescing.on_done(lambda: os.eventfd_write(done, 1))
            poll = select.poll()
            poll.register(done, select.POLLIN)
            if not poll.poll(QUIESCE_TIMEOUT * 1000):
                logger.error("the device did not stop its DMA in %s s after its client left", QUIESCE_TIMEOUT)
            quiescing.on_done(lambda: None)
        finally:
            os.close(done)


def _may_quiesce(message: Message) -> bool:
    """Whether a command stops DMA; of DEVICE_FEATURE it depends on what is set."""
    return COMMANDS[message.command].quiesces or message.command == Command.DEVICE_FEATURE


def _too_many(messages: Collection[Message], *, share: int = 1) -> bool:
    """Whether more commands wait than may; ``share``: than a half may, a third."""
    most, bytes_most = MAX_POSTPONED // share, MAX_POSTPONED_BYTES // share
    return len(messages) > most or sum(len(kept.payload) for kept in messages) > bytes_most


def _drain(fd: int) -> None:
    """Take the counter of the eventfd that woke the loop."""
    with contextlib.suppress(OSError):
        os.eventfd_read(fd)
