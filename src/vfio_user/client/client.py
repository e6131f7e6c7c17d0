"""The blocking client."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

from vfio_user.client.core import PROPOSAL, Call, ClientCore, Request, allocate, drive
from vfio_user.client.readiness import Readiness
from vfio_user.client.regions import IoFdDescription, RegionDescription
from vfio_user.errors import CallTimeoutError, ConnectionClosedError, FramingError, UnexpectedReplyError, UsageError
from vfio_user.protocol import Connection, Message, Outgoing
from vfio_user.transport.blocking import Channel
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import DeviceState, DmaFlags, MigrationFlags

T = TypeVar("T")
Incoming = tuple[Message, Connection, Channel]

READ_WRITE = DmaFlags.READ | DmaFlags.WRITE


class Client:
    """A connection to a device server, as a VMM has it.

    Made by :meth:`connect`. Calls may come from several threads; they are served one at a time. Every call raises

    - CommandError, an OSError with the reply's errno, when the server refuses;
    - CallTimeoutError when it is not answered in time, whatever else the server sends meanwhile;
    - ProtocolError when the server breaks the protocol, ConnectionClosedError when it is gone;
    - UsageError when what was asked for cannot be sent.

    While a call waits, the server's DMA_READ and DMA_WRITE are answered from the memory given to :meth:`dma_map`.
    """

    def __init__(
        self,
        sock: socket.socket,
        timeout: float = 5.0,
        *,
        proposal: Capabilities = PROPOSAL,
        max_write: int | None = None,
    ) -> None:
        """Negotiate over a connected socket, which is the client's from here on, and ask what the device is."""
        self.timeout = timeout
        try:
            self._core = ClientCore(proposal, max_write=max_write)
        except BaseException:
            sock.close()
            raise
        self._channel = Channel(sock, self._core.connection.framer)
        self._links = [(self._core.connection, self._channel)]
        self._lock = threading.Lock()
        self._readiness: Readiness | None = None
        self._closed = False
        try:
            self._run(self._core.negotiate())
            self._adopt_twin_socket()
            self._run(self._core.discover())
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        timeout: float = 5.0,
        *,
        proposal: Capabilities = PROPOSAL,
        max_write: int | None = None,
    ) -> Self:
        """Connect to the server at ``path``.

        ``timeout``: seconds, for this and for every call. ``proposal``: the capabilities to offer. ``max_write``: most
        bytes in one write, for a server that takes less than it says (libvfio-user: 32768). Raises what connect(2)
        does (FileNotFoundError, ConnectionRefusedError), and what every call raises.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(os.fspath(path))
        except (TimeoutError, BlockingIOError) as error:
            sock.close()
            raise CallTimeoutError(f"{os.fspath(path)}: nobody accepts the connection") from error
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout, proposal=proposal, max_write=max_write)

    def close(self) -> None:
        """Leave. The server forgets the memory and the interrupts that this client gave it.

        A call of another thread that is under way ends with ConnectionClosedError, and lets go of the sockets then;
        so does a call that a signal handler interrupts with this.
        """
        self._closed = True
        for _, channel in self._links:
            channel.stop_receiving()
        self._release()

    def _release(self) -> None:
        """Let go of everything, unless a call is under way: the last one does it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            for _, channel in self._links:
                channel.close()
            if self._readiness is not None:
                self._readiness.close()
                self._readiness = None
            self._core.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """A descriptor that is readable when the server asks for DMA while no call is under way, see serve_dma."""
        if self._closed:
            raise ConnectionClosedError("this client was closed")
        if self._readiness is None:
            self._readiness = Readiness(channel.fileno() for _, channel in self._links)
            self._note_left_over()
        return self._readiness.fileno()

    def _note_left_over(self) -> None:
        if self._readiness is not None and any(channel.framer.mid_message for _, channel in self._links):
            self._readiness.leave_over()

    # What the device is

    @property
    def version(self) -> tuple[int, int]:
        """(major, minor) that was negotiated."""
        return self._core.version

    @property
    def capabilities(self) -> Capabilities:
        """What the server stated."""
        return self._core.capabilities

    @property
    def info(self) -> m.DeviceInfo:
        """DEVICE_GET_INFO's answer; ``flags`` are DeviceFlags."""
        return self._core.info

    @property
    def regions(self) -> tuple[RegionDescription, ...]:
        """By index, see wire.constants.PciRegion."""
        return self._core.regions

    @property
    def irqs(self) -> tuple[m.IrqInfo, ...]:
        """By index, see wire.constants.PciIrq; ``flags`` are IrqInfoFlags."""
        return self._core.irqs

    def region_io_fds(self, region: int) -> tuple[IoFdDescription, ...]:
        """The parts of a region that file descriptors serve. The descriptors are the caller's to close."""
        return self._run(self._core.region_io_fds(region))

    # Regions

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` of a region, in as many reads as the server's limit asks for."""
        buffer = allocate(count)
        self._run(self._core.region_read_into(region, offset, memoryview(buffer)))
        return bytes(buffer)

    def region_read_into(self, region: int, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from ``offset`` of a region."""
        self._run(self._core.region_read_into(region, offset, memoryview(buffer).cast("B")))

    def region_write(self, region: int, offset: int, data: m.Buffer, posted: bool = False) -> None:
        """Write ``data`` at ``offset`` of a region. ``posted``: without a reply, so without an error either."""
        self._run(self._core.region_write(region, offset, memoryview(data).cast("B"), posted))

    def region_write_multi(self, writes: Sequence[tuple[int, int, m.Buffer]]) -> None:
        """Several writes of (region, offset, data), in order, in as few messages as the server allows."""
        self._run(self._core.region_write_multi(writes))

    # DMA, interrupts, reset

    def dma_map(
        self,
        address: int,
        size: int,
        fd: int | None = None,
        offset: int = 0,
        flags: int = READ_WRITE,
        *,
        memory: bytearray | memoryview | None = None,
    ) -> None:
        """Let the device access [address, address + size), in bytes: the file ``fd`` from ``offset`` on.

        ``fd`` stays the caller's. Without one the server asks for the memory by messages, which are answered from
        ``memory``, or refused. With ``fd`` and ``memory`` messages are answered from ``memory``. ``flags``: DmaFlags.
        """
        view = None if memory is None else memoryview(memory).cast("B")
        self._run(self._core.dma_map(address, size, fd, offset, flags, view))

    def dma_unmap(self, address: int, size: int, *, page_size: int | None = None) -> bytes:
        """Take back a range that was mapped. With ``page_size``: returns its dirty bitmap, as dma_logging_report."""
        return self._run(self._core.dma_unmap(address, size, page_size))

    def dma_unmap_all(self) -> None:
        """Take back everything that was mapped (flag ALL, which libvfio-user has and the specification has not)."""
        self._run(self._core.dma_unmap_all())

    def set_irqs(
        self, index: int, flags: int, start: int, count: int, fds: Sequence[int] = (), data: m.Buffer = b""
    ) -> None:
        """DEVICE_SET_IRQS (IrqSetFlags) for vectors [start, start + count) of an index.

        ``fds``: one eventfd per vector, which stay the caller's; ``data``: one byte per vector with DATA_BOOL.
        """
        self._run(self._core.set_irqs(index, flags, start, count, fds, data))

    def reset(self) -> None:
        """DEVICE_RESET: also the way out of migration state ERROR."""
        self._run(self._core.reset())

    # Features and migration

    def device_feature(self, flags: int, data: m.Buffer = b"") -> bytes:
        """DEVICE_FEATURE as it is: FeatureFlags with a DeviceFeature; returns what the feature has to say."""
        return self._run_copied(self._core.device_feature(flags, data))

    def probe(self, feature: int) -> bool:
        """Whether the device has a feature (DeviceFeature)."""
        return self._run(self._core.probe(feature))

    def migration_flags(self) -> MigrationFlags:
        """Which migration states the device has. Refused with EINVAL or ENOTTY: it cannot migrate."""
        return self._run(self._core.migration_flags())

    def migration_get_state(self) -> DeviceState:
        """The migration state that the device is in."""
        return self._run(self._core.migration_get_state())

    def migration_set_state(self, state: DeviceState) -> None:
        """Have the device go to ``state``, by whatever path it knows.

        Refused, it may have gone a part of the way: ask where it is.
        """
        self._run(self._core.migration_set_state(state))

    def migration_read_data(self, size: int) -> bytes:
        """Up to ``size`` bytes of the migration stream; fewer: it ends, or has nothing more for now, here."""
        buffer = allocate(size)
        count = self._run(self._core.migration_read_data_into(memoryview(buffer)))
        return bytes(memoryview(buffer)[:count])

    def migration_read_data_into(self, buffer: bytearray | memoryview) -> int:
        """As :meth:`migration_read_data`, into ``buffer``: the bytes filled."""
        return self._run(self._core.migration_read_data_into(memoryview(buffer).cast("B")))

    def migration_write_data(self, data: m.Buffer) -> None:
        """Give the device what comes next in the migration stream, in as many messages as its limit asks for."""
        self._run(self._core.migration_write_data(memoryview(data).cast("B")))

    def migration_data_size(self) -> int:
        """About how many bytes STOP_COPY will send."""
        return self._run(self._core.migration_data_size())

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]] = ()) -> int:
        """Log the pages that DMA dirties in ``ranges`` of (iova, length), or everywhere. Returns the page size."""
        return self._run(self._core.dma_logging_start(page_size, ranges))

    def dma_logging_stop(self) -> None:
        """Log no longer. What was logged and not reported is forgotten."""
        self._run(self._core.dma_logging_stop())

    def dma_logging_report(self, iova: int, length: int, page_size: int) -> bytes:
        """The dirty bitmap of [iova, iova + length), which is clean from now on.

        Bit n % 8 of byte n // 8 is page n of ``page_size`` bytes from ``iova`` on; padded to a multiple of 8 bytes.
        """
        return self._run(self._core.dma_logging_report(iova, length, page_size))

    # How calls run

    def serve_dma(self, timeout: float = 0.0) -> int:
        """Answer the server's DMA requests while no call is under way; how many came within ``timeout`` seconds."""
        with self._exclusive():
            deadline = time.monotonic() + timeout
            if self._readiness is not None:
                self._readiness.take_over()
            answered = self._answer_waiting(deadline + self.timeout)
            while True:
                try:
                    self._receive_any(deadline)
                except CallTimeoutError:
                    return answered
                answered += self._answer_waiting(deadline + self.timeout)
                if time.monotonic() >= deadline:
                    return answered

    def _answer_waiting(self, deadline: float) -> int:
        """Answer what has come already; how many messages that were."""
        answered = 0
        while (incoming := self._next_message()) is not None:
            self._take(incoming, {}, deadline)
            answered += 1
        return answered

    def _adopt_twin_socket(self) -> None:
        if self._core.twin_socket is None:
            return
        connection = Connection(Role.CLIENT, self._core.connection.framer.max_size)
        connection.negotiated = True
        self._links.append((connection, Channel(self._core.twin_socket, connection.framer)))

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One call at a time; after one that lost the stream there is no other."""
        try:
            with self._lock:
                if self._closed:
                    raise ConnectionClosedError("this client was closed")
                try:
                    yield
                except (ConnectionClosedError, FramingError, UnexpectedReplyError):
                    self._closed = True
                    raise
        finally:
            if self._closed:
                self._release()

    def _run(self, call: Call[T], timeout: float | None = None) -> T:
        """Drive a call: send what it asks for, hand it the replies, until it returns."""
        with self._exclusive():
            deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
            try:
                return drive(call, lambda requests: self._transact(requests, deadline))
            finally:
                self._note_left_over()

    def _run_copied(self, call: Call[memoryview]) -> bytes:
        def copied() -> Call[bytes]:
            view = yield from call
            return bytes(view)

        return self._run(copied())

    def _transact(self, requests: Sequence[Request], deadline: float) -> list[Message]:
        """Send commands and wait for the replies of those that have one."""
        connection = self._core.connection
        awaited: dict[int, Message | None] = {}
        try:
            for request in requests:
                msg_id, outgoing = connection.command(
                    request.command, request.parts, request.fds, posted=request.posted
                )
                if not request.posted:
                    awaited[msg_id] = None
                self._send(self._channel, outgoing, deadline)
            self._await(awaited, deadline, keep=len(awaited) > 1)
        except BaseException:
            for msg_id, message in awaited.items():
                connection.abandon(msg_id)
                if message is not None:
                    message.close()
            raise
        return [message for message in awaited.values() if message is not None]

    def _send(self, channel: Channel, outgoing: Outgoing, deadline: float) -> None:
        try:
            channel.send(outgoing, deadline)
        except CallTimeoutError:
            self._closed = True  # a part of the message is out: nothing else can follow it
            raise
        except (OSError, OverflowError) as error:
            if isinstance(error, ConnectionClosedError):
                raise
            raise UsageError(f"the message cannot be sent: {error}") from error

    def _await(self, awaited: dict[int, Message | None], deadline: float, *, keep: bool) -> None:
        left = len(awaited)
        while left:
            incoming = self._next_message()
            if incoming is None:
                self._receive_any(deadline)
            else:
                left -= self._take(incoming, awaited, deadline, keep)
            if left and time.monotonic() >= deadline:
                raise CallTimeoutError("not answered in time, though the server keeps sending")

    def _next_message(self) -> Incoming | None:
        """The next whole message on any socket, of those that were received."""
        for connection, channel in self._links:
            message = channel.framer.next_message()
            if message is not None:
                return message, connection, channel
        return None

    def _take(self, incoming: Incoming, awaited: dict[int, Message | None], deadline: float, keep: bool = False) -> int:
        """Answer a command of the server's, or put a reply where it is awaited: 1 if that was one."""
        message, connection, channel = incoming
        if message.is_reply:
            return self._take_reply(message, connection, awaited, keep)
        reply = self._core.answer_command(message, connection)
        if reply is not None:
            self._send(channel, reply, deadline)
        return 0

    def _take_reply(
        self, message: Message, connection: Connection, awaited: dict[int, Message | None], keep: bool
    ) -> int:
        try:
            wanted = connection.check(message)
        except BaseException:
            message.close()
            raise
        if not wanted:
            message.close()
            return 0
        if keep:
            message.payload = memoryview(bytes(message.payload))
        awaited[message.msg_id] = message
        self._core.accept(message)
        return 1

    def _receive_any(self, deadline: float) -> None:
        """Receive from whichever socket has something. Raises CallTimeoutError at ``deadline``."""
        if len(self._links) == 1:
            self._channel.receive_before(deadline)
            return
        poll = select.poll()
        for _, channel in self._links:
            poll.register(channel.fileno(), select.POLLIN)
        ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if not ready:
            raise CallTimeoutError("the peer did not answer in time")
        for _, channel in self._links:
            if channel.fileno() in ready:
                channel.receive()
