"""The pass-through: every byte and every descriptor goes on untouched and in order, while an observer sees messages.

A :class:`Flow` is one direction of one socket, a :class:`Proxy` all of them in one thread. Bytes go on as soon as
they come, whole messages or not; a copy of nothing is made: they are sent out of the buffer in which a Framer finds
the messages. Where it cannot, the observer is told so once, and the bytes still pass.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from vfio_user.errors import FramingError
from vfio_user.fds import OwnedFd, close_all
from vfio_user.protocol import Framer
from vfio_user.protocol.framing import DISCARD_LIMIT
from vfio_user.tools.trace.seen import Observer, Place, Seen, SeenFd, describe_fd
from vfio_user.transport.ancillary import ANCILLARY_SIZE, pack_fds, take_fds
from vfio_user.transport.listener import BoundSocket
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import DEFAULT_DATA_XFER_SIZE, HEADER_SIZE
from vfio_user.wire.messages import Header

logger = logging.getLogger("vfio_user.tools")

BUFFER_SIZE = DEFAULT_DATA_XFER_SIZE + 4096
"""The largest message that a flow has room for before a larger one comes."""
_SEND_BUFFER = 512 << 10
"""Bytes that a socket is asked to hold: a message of 1 MiB wakes its receiver less often than with less."""
_HEADER = Header.LAYOUT
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL)
_TRUNCATED = int(socket.MSG_CTRUNC)
_READABLE, _WRITABLE = int(select.EPOLLIN), int(select.EPOLLOUT)
_ENDED = _READABLE | int(select.EPOLLHUP | select.EPOLLERR)

_EPOCH = time.time_ns() - time.perf_counter_ns()


def _now() -> int:
    """Nanoseconds since the epoch, by a clock that is never set."""
    return _EPOCH + time.perf_counter_ns()


class _Part(NamedTuple):
    """Bytes that wait to be sent, and the descriptors that ride on the first of them."""

    data: memoryview
    fds: Sequence[OwnedFd] = ()


Substitute = Callable[[OwnedFd], OwnedFd]
"""Gives what is passed on in place of a descriptor."""


class Flow:
    """One direction: what ``source`` says goes to ``target``.

    ``substitute`` is asked for each socket that travels with the flow's first message: the twin socket of a VERSION
    reply, which is to be looked into as well.
    """

    def __init__(
        self,
        source: socket.socket,
        target: socket.socket,
        place: Place,
        observer: Observer,
        substitute: Substitute | None = None,
    ) -> None:
        self.source = source
        self.target = target
        self.place = place
        self.ended = False
        self._observer = observer
        self._substitute = substitute
        self._framer: Framer | None = Framer(BUFFER_SIZE)
        self._blind_buffer = memoryview(b"")
        self._behind = 0  # bytes that have come since the last message began, itself included
        self._complete = True  # whether that was all of it
        self._early_fds: list[SeenFd] = []  # of a message that is not whole yet
        self._lost_fds = False
        self._parts: deque[_Part] = deque()

    @property
    def blocked(self) -> bool:
        """Whether the target must take something before more is received."""
        return bool(self._parts)

    def receive(self) -> None:
        """Take what is there, and pass it on. At the end of the stream that is passed on, too."""
        space = self._framer.space()[0] if self._framer is not None else self._blind_buffer
        try:
            count, ancillary, flags, _ = self.source.recvmsg_into([space], ANCILLARY_SIZE, _RECEIVE_FLAGS)
        except BlockingIOError:
            return
        except ConnectionError:  # it closed with bytes of ours unread
            count, ancillary, flags = 0, [], 0
        now = _now()
        if not count:
            self._end()
        elif ancillary or flags & _TRUNCATED:
            self._pass_with_fds(space[:count], take_fds(ancillary), bool(flags & _TRUNCATED), now)
        else:
            self._pass(space[:count])
            for message in self._cut(count, now):
                self._observer.seen(message)

    def _pass(self, data: memoryview) -> None:
        """Send what came without descriptors, at once if the target takes it."""
        try:
            sent = self.target.send(data, _SEND_FLAGS)
        except OSError:
            sent = 0
        if sent < len(data):
            self._parts.append(_Part(data[sent:]))
            self.send()

    def _pass_with_fds(self, data: memoryview, fds: list[OwnedFd], truncated: bool, now: int) -> None:
        """Descriptors belong to the last message that begins in what came with them: they ride on its first byte.

        One call to recvmsg never reads past the bytes that carried some, but it may begin with messages before.
        """
        described = [describe_fd(fd.fileno()) for fd in fds]
        if self._substitute is not None:
            fds = [self._substitute(fd) if _is_stream_socket(fd) else fd for fd in fds]
        framed = self._framer is not None
        messages = list(self._cut(len(data), now))
        at = max(0, len(data) - self._behind) if framed else 0
        if at:
            self._parts.append(_Part(data[:at]))
        self._parts.append(_Part(data[at:], fds))
        self.send()
        if messages and self._complete:
            messages[-1] = messages[-1]._replace(
                fds=messages[-1].fds + tuple(described), fault=_LOST_FDS if truncated else messages[-1].fault
            )
        else:
            self._early_fds += described
            self._lost_fds |= truncated
        for message in messages:
            self._observer.seen(message)

    def send(self) -> None:
        """Pass on what waits, as far as the target takes it."""
        parts = self._parts
        try:
            while parts:
                data, fds = parts[0]
                if fds:
                    sent = self.target.sendmsg([data], pack_fds([fd.fileno() for fd in fds]), _SEND_FLAGS)
                    close_all(fds)
                else:
                    sent = self.target.send(data, _SEND_FLAGS)
                if sent == len(data):
                    parts.popleft()
                else:
                    parts[0] = _Part(data[sent:])
        except BlockingIOError:
            return
        except ConnectionError:
            self._stop_source()

    def _cut(self, count: int, now: int) -> Iterator[Seen]:
        """The messages that are whole now that ``count`` bytes more are in the framer's buffer."""
        framer = self._framer
        if framer is None:
            return
        framer.received(count)
        self._behind += count
        while framer.start < framer.end:
            self._grow(framer)
            self._behind = framer.end - framer.start
            try:
                message = framer.next_message()
            except FramingError as error:
                self._give_up(str(error))
                return
            self._complete = message is not None
            if message is None:
                return
            self._substitute = None
            size = HEADER_SIZE + len(message.payload)
            header = Header(message.msg_id, message.command, size, message.flags, message.error)
            fds, self._early_fds = tuple(self._early_fds), []
            fault, self._lost_fds = _LOST_FDS if self._lost_fds else message.fault, False
            yield Seen(now, self.place, header, message.payload, fds, fault)

    @staticmethod
    def _grow(framer: Framer) -> None:
        """Make room for a message that is larger than any before it, within reason."""
        if framer.end - framer.start >= HEADER_SIZE:
            size: int = _HEADER.unpack_from(framer.buffer, framer.start)[2]
            if framer.max_size < size <= DISCARD_LIMIT:
                framer.reserve(min(2 * size, DISCARD_LIMIT))

    def _give_up(self, reason: str) -> None:
        self._framer = None
        self._blind_buffer = memoryview(bytearray(BUFFER_SIZE))
        self._observer.unclear(self.place, reason)

    def _end(self) -> None:
        """Nothing more comes: the target is told, and may still say what it has to."""
        if self._framer is not None and self._framer.mid_message:
            missing = self._framer.missing
            self._observer.unclear(
                self.place, f"it ended in mid-message, {missing} bytes short" if missing else "it ended in mid-header"
            )
        self.ended = True
        with contextlib.suppress(OSError):
            self.target.shutdown(socket.SHUT_WR)

    def _stop_source(self) -> None:
        """The target is gone: whoever sends to it shall find out as if it were there itself."""
        self.ended = True
        self.close()
        with contextlib.suppress(OSError):
            self.source.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Let go of what still waits."""
        for part in self._parts:
            close_all(part.fds)
        self._parts.clear()


_LOST_FDS = "file descriptors were lost on the way: too many are open"


def _is_stream_socket(fd: OwnedFd) -> bool:
    return stat.S_ISSOCK(os.fstat(fd.fileno()).st_mode)


class _Link:
    """Two connected sockets and the flows between them."""

    def __init__(self, to_server: Flow, to_client: Flow) -> None:
        self.flows = (to_server, to_client)
        self.connection = to_server.place.connection
        self._state: tuple[bool, ...] = ()
        for flow in self.flows:
            flow.source.setblocking(False)
            flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    @property
    def ended(self) -> bool:
        return all(flow.ended and not flow.blocked for flow in self.flows)

    @property
    def changed(self) -> bool:
        """Whether what it waits for is something else than when this was asked before."""
        before = self._state
        self._state = tuple(state for flow in self.flows for state in (flow.ended, flow.blocked))
        return self._state != before

    def interest(self) -> Iterator[tuple[socket.socket, int]]:
        """What to wait for at each of the sockets."""
        for flow, back in (self.flows, self.flows[::-1]):
            reading = _READABLE if not flow.ended and not flow.blocked else 0
            yield flow.source, reading | (_WRITABLE if back.blocked else 0)

    def ready(self, sock: socket.socket, events: int) -> None:
        """Do what ``events`` allow at one of the sockets."""
        for flow in self.flows:
            if flow.target is sock and flow.blocked and events & ~_READABLE:
                flow.send()
            if flow.source is sock and not flow.ended and not flow.blocked and events & _ENDED:
                flow.receive()

    def close(self) -> None:
        for flow in self.flows:
            flow.close()
            flow.source.close()


class HasFileno(Protocol):
    def fileno(self) -> int: ...


Connect = Callable[[], socket.socket]
"""Gives a connected socket to the server, for a client that came."""


class Proxy:
    """Stands between clients and a server, one connection at a time, in the thread that calls :meth:`serve`.

    ``listener`` is where clients come, ``connect`` how the server is reached when one did; :meth:`join` takes two
    sockets that are connected already. Owns all of them. The observer may be slow, which slows down what passes, and
    may fail, which does not: then :attr:`failure` says how.
    """

    def __init__(
        self, observer: Observer, listener: socket.socket | None = None, connect: Connect | None = None
    ) -> None:
        self.failure: Exception | None = None
        self._observer = _Guarded(observer, self._failed)
        self._listener = listener
        self._connect = connect
        self.connections = 0
        self.stopping = False
        self._links: list[_Link] = []
        self._by_fd: dict[int, tuple[_Link, socket.socket]] = {}
        self._masks: dict[int, int] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        if listener is not None:
            listener.setblocking(False)
            self._epoll.register(listener, select.EPOLLIN)

    def watch(self, what: HasFileno, ready: Callable[[], None]) -> None:
        """Have :meth:`serve` call ``ready``, once, when ``what`` is readable."""
        self._watched[what.fileno()] = ready
        self._epoll.register(what.fileno(), select.EPOLLIN)

    def join(self, client: socket.socket, server: socket.socket) -> None:
        """Pass on what these two say from now on; both are this object's."""
        self.connections += 1
        self._observer.connected(self.connections)
        self._add(client, server, self.connections, twin=False)

    def call_later(self, seconds: float, call: Callable[[], None]) -> None:
        """Have :meth:`serve` call ``call``, once, so much later, if it has not returned by then."""
        self._timers.append((time.monotonic() + seconds, call))

    def serve(self) -> None:
        """Pass on until :meth:`stop`, or without a listener until all connections have ended.

        Raises OSError when the server cannot be reached.
        """
        while not self.stopping and (self._listener is not None or self._links):
            for fd, events in self._epoll.poll(self._time_left()):
                self._handle(fd, events)
                if self.stopping:
                    return
            self._run_timers()

    def finish(self, patience: float) -> None:
        """Take no client any more: :meth:`serve` returns when those that are there have left, or after ``patience``."""
        if self._listener is not None:
            if not self._links:
                self._epoll.unregister(self._listener)
            self._listener.close()
            self._listener = None
            self.call_later(patience, self.stop)

    def stop(self) -> None:
        """Have :meth:`serve` return. From any thread, or a signal handler."""
        self.stopping = True
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Close every socket."""
        for link in self._links:
            link.close()
        self._links.clear()
        if self._listener is not None:
            self._listener.close()
        self._epoll.close()
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, fd: int, events: int) -> None:
        if fd in self._by_fd:
            link, sock = self._by_fd[fd]
            link.ready(sock, events)
            self._update(link)
        elif fd in self._watched:
            self._epoll.unregister(fd)
            self._watched.pop(fd)()
        elif self._listener is not None and fd == self._listener.fileno():
            self._accept(self._listener)

    def _time_left(self) -> float | None:
        return max(0.0, min(due for due, _ in self._timers) - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        now = time.monotonic()
        due = [timer for timer in self._timers if timer[0] <= now]
        for timer in due:
            self._timers.remove(timer)
            timer[1]()

    def _accept(self, listener: socket.socket) -> None:
        assert self._connect is not None, "a proxy with a listener knows how to connect"
        try:
            client = listener.accept()[0]
        except BlockingIOError:  # it went away again
            return
        try:
            server = self._connect()
        except BaseException:
            client.close()
            raise
        self._epoll.unregister(listener)
        self.join(client, server)

    def _add(self, client: socket.socket, server: socket.socket, connection: int, *, twin: bool) -> None:
        substitute = None if twin else lambda fd: self._look_into(fd, connection)
        to_server = Flow(client, server, Place(connection, twin, Role.CLIENT), self._observer)
        to_client = Flow(server, client, Place(connection, twin, Role.SERVER), self._observer, substitute)
        link = _Link(to_server, to_client)
        self._links.append(link)
        self._by_fd |= {sock.fileno(): (link, sock) for sock in (client, server)}
        self._update(link)

    def _look_into(self, fd: OwnedFd, connection: int) -> OwnedFd:
        """The twin socket: the client gets one of ours, whose other end is passed on to the server's."""
        theirs, ours = socket.socketpair()
        server = socket.socket(fileno=fd.take())
        self._add(ours, server, connection, twin=True)
        return OwnedFd(theirs.detach())

    def _update(self, link: _Link) -> None:
        """Wait for what the link can go on with; one that has ended goes, and makes room for the next client."""
        if not link.changed:
            return
        if link.ended:
            self._remove(link)
            return
        for sock, mask in link.interest():
            fd = sock.fileno()
            before = self._masks.get(fd, 0)
            if mask == before:
                continue
            # A socket with nothing to wait for is taken out: its hang-up would be reported for ever.
            if not mask:
                self._epoll.unregister(fd)
            elif before:
                self._epoll.modify(fd, mask)
            else:
                self._epoll.register(fd, mask)
            self._masks[fd] = mask

    def _remove(self, link: _Link) -> None:
        for flow in link.flows:
            fd = flow.source.fileno()
            if self._masks.pop(fd, 0):
                self._epoll.unregister(fd)
            del self._by_fd[fd]
        link.close()
        self._links.remove(link)
        if not any(other.connection == link.connection for other in self._links):
            self._observer.left(link.connection)
        if self._listener is not None and not self._links:
            self._epoll.register(self._listener, select.EPOLLIN)

    def _failed(self, error: Exception) -> None:
        self.failure = error
        logger.error("tracing has stopped, what passes goes on: %s", error)
        logger.info("the observer failed", exc_info=error)


class _Guarded(Observer):
    """An observer that cannot do harm: the first exception is its last."""

    def __init__(self, observer: Observer, failed: Callable[[Exception], None]) -> None:
        self._observer = observer
        self._failed = failed

    def connected(self, connection: int) -> None:
        self._call(self._observer.connected, connection)

    def seen(self, message: Seen) -> None:
        try:
            self._observer.seen(message)
        except Exception as error:
            self._end(error)

    def unclear(self, place: Place, reason: str) -> None:
        self._call(self._observer.unclear, place, reason)

    def left(self, connection: int) -> None:
        self._call(self._observer.left, connection)

    def _call(self, told: Callable[..., None], *arguments: Any) -> None:
        try:
            told(*arguments)
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        self._observer = Observer()
        self._failed(error)


def listen(path: str | os.PathLike[str]) -> socket.socket:
    """A socket that listens at ``path``; a stale one there is replaced, a live one is not. Raises OSError."""
    return BoundSocket(path).socket


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """A socket that is connected to the server at ``path``. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        number = error.errno or errno.ENAMETOOLONG  # Python checks the length itself, and gives none
        raise OSError(number, os.strerror(number), os.fspath(path)) from error
    return sock
