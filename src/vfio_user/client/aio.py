"""The asyncio client: the names of the blocking one, with ``await``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

from vfio_user.client.core import PROPOSAL, Call, ClientCore, Request, allocate, close_replies
from vfio_user.client.readiness import Readiness
from vfio_user.client.regions import IoFdDescription, RegionDescription
from vfio_user.errors import CallTimeoutError, ConnectionClosedError, FramingError, UnexpectedReplyError, UsageError
from vfio_user.protocol import Connection, Message, Outgoing
from vfio_user.transport.aio import Channel, wait_ready
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import DeviceState, DmaFlags, MigrationFlags

T = TypeVar("T")
Incoming = tuple[Message, Connection, Channel]

READ_WRITE = DmaFlags.READ | DmaFlags.WRITE


class Client:
    """A connection to a device server, as a VMM has it, in an asyncio event loop.

    Made by :meth:`connect`. Calls may come from several tasks; they are served one at a time. What they raise is what
    the blocking client's raise; a call may also be cancelled.
    """

    def __init__(
        self,
        sock: socket.socket,
        timeout: float = 5.0,
        *,
        proposal: Capabilities = PROPOSAL,
        max_write: int | None = None,
    ) -> None:
        """Take a connected socket; :meth:`start` negotiates over it."""
        self.timeout = timeout
        try:
            self._core = ClientCore(proposal, max_write=max_write)
        except BaseException:
            sock.close()
            raise
        self._channel = Channel(sock, self._core.connection.framer)
        self._links = [(self._core.connection, self._channel)]
        self._lock = asyncio.Lock()
        self._readiness: Readiness | None = None
        self._closed = False

    async def start(self) -> None:
        """Negotiate, and ask what the device is."""
        try:
            await self._run(self._core.negotiate())
            self._adopt_twin_socket()
            await self._run(self._core.discover())
        except BaseException:
            self.close()
            raise

    @classmethod
    async def connect(
        cls,
        path: str | os.PathLike[str],
        timeout: float = 5.0,
        *,
        proposal: Capabilities = PROPOSAL,
        max_write: int | None = None,
    ) -> Self:
        """Connect to the server at ``path``; parameters and errors are those of the blocking client."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(os.fspath(path))  # to a UNIX socket: done at once, or refused
        except BlockingIOError as error:
            sock.close()
            raise CallTimeoutError(f"{os.fspath(path)}: nobody accepts the connection") from error
        except BaseException:
            sock.close()
            raise
        client = cls(sock, timeout, proposal=proposal, max_write=max_write)
        await client.start()
        return client

    def close(self) -> None:
        """Leave. The server forgets the memory and the interrupts that this client gave it.

        A call of another task that is under way ends with ConnectionClosedError, and lets go of the sockets then.
        """
        self._closed = True
        if not self._lock.locked():
            self._release()
            return
        for _, channel in self._links:
            channel.stop_receiving()

    def _release(self) -> None:
        for _, channel in self._links:
            channel.close()
        if self._readiness is not None:
            self._readiness.close()
            self._readiness = None
        self._core.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
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

    async def region_io_fds(self, region: int) -> tuple[IoFdDescription, ...]:
        """The parts of a region that file descriptors serve. The descriptors are the caller's to close."""
        return await self._run(self._core.region_io_fds(region))

    # Regions

    async def region_read(self, region: int, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` of a region, in as many reads as the server's limit asks for."""
        buffer = allocate(count)
        await self._run(self._core.region_read_into(region, offset, memoryview(buffer)))
        return bytes(buffer)

    async def region_read_into(self, region: int, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from ``offset`` of a region."""
        await self._run(self._core.region_read_into(region, offset, memoryview(buffer).cast("B")))

    async def region_write(self, region: int, offset: int, data: m.Buffer, posted: bool = False) -> None:
        """Write ``data`` at ``offset`` of a region. ``posted``: without a reply, so without an error either."""
        await self._run(self._core.region_write(region, offset, memoryview(data).cast("B"), posted))

    async def region_write_multi(self, writes: Sequence[tuple[int, int, m.Buffer]]) -> None:
        """Several writes of (region, offset, data), in order, in as few messages as the server allows."""
        await self._run(self._core.region_write_multi(writes))

    # DMA, interrupts, reset

    async def dma_map(
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
        await self._run(self._core.dma_map(address, size, fd, offset, flags, view))

    async def dma_unmap(self, address: int, size: int, *, page_size: int | None = None) -> bytes:
        """Take back a range that was mapped. With ``page_size``: returns its dirty bitmap, as dma_logging_report."""
        return await self._run(self._core.dma_unmap(address, size, page_size))

    async def dma_unmap_all(self) -> None:
        """Take back everything that was mapped (flag ALL, which libvfio-user has and the specification has not)."""
        await self._run(self._core.dma_unmap_all())

    async def set_irqs(
        self, index: int, flags: int, start: int, count: int, fds: Sequence[int] = (), data: m.Buffer = b""
    ) -> None:
        """DEVICE_SET_IRQS (IrqSetFlags) for vectors [start, start + count) of an index.

        ``fds``: one eventfd per vector, which stay the caller's; ``data``: one byte per vector with DATA_BOOL.
        """
        await self._run(self._core.set_irqs(index, flags, start, count, fds, data))

    async def reset(self) -> None:
        """DEVICE_RESET: also the way out of migration state ERROR."""
        await self._run(self._core.reset())

    # Features and migration

    async def device_feature(self, flags: int, data: m.Buffer = b"") -> bytes:
        """DEVICE_FEATURE as it is: FeatureFlags with a DeviceFeature; returns what the feature has to say."""
        return await self._run_copied(self._core.device_feature(flags, data))

    async def probe(self, feature: int) -> bool:
        """Whether the device has a feature (DeviceFeature)."""
        return await self._run(self._core.probe(feature))

    async def migration_flags(self) -> MigrationFlags:
        """Which migration states the device has. Refused with EINVAL or ENOTTY: it cannot migrate."""
        return await self._run(self._core.migration_flags())

    async def migration_get_state(self) -> DeviceState:
        """The migration state that the device is in."""
        return await self._run(self._core.migration_get_state())

    async def migration_set_state(self, state: DeviceState) -> None:
        """Have the device go to ``state``, by whatever path it knows.

        Refused, it may have gone a part of the way: ask where it is.
        """
        await self._run(self._core.migration_set_state(state))

    async def migration_read_data(self, size: int) -> bytes:
        """Up to ``size`` bytes of the migration stream; fewer: it ends, or has nothing more for now, here."""
        buffer = allocate(size)
        count = await self._run(self._core.migration_read_data_into(memoryview(buffer)))
        return bytes(memoryview(buffer)[:count])

    async def migration_read_data_into(self, buffer: bytearray | memoryview) -> int:
        """As :meth:`migration_read_data`, into ``buffer``: the bytes filled."""
        return await self._run(self._core.migration_read_data_into(memoryview(buffer).cast("B")))

    async def migration_write_data(self, data: m.Buffer) -> None:
        """Give the device what comes next in the migration stream, in as many messages as its limit asks for."""
        await self._run(self._core.migration_write_data(memoryview(data).cast("B")))

    async def migration_data_size(self) -> int:
        """About how many bytes STOP_COPY will send."""
        return await self._run(self._core.migration_data_size())

    async def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]] = ()) -> int:
        """Log the pages that DMA dirties in ``ranges`` of (iova, length), or everywhere. Returns the page size."""
        return await self._run(self._core.dma_logging_start(page_size, ranges))

    async def dma_logging_stop(self) -> None:
        """Log no longer. What was logged and not reported is forgotten."""
        await self._run(self._core.dma_logging_stop())

    async def dma_logging_report(self, iova: int, length: int, page_size: int) -> bytes:
        """The dirty bitmap of [iova, iova + length), which is clean from now on.

        Bit n % 8 of byte n // 8 is page n of ``page_size`` bytes from ``iova`` on; padded to a multiple of 8 bytes.
        """
        return await self._run(self._core.dma_logging_report(iova, length, page_size))

    # How calls run

    async def serve_dma(self, timeout: float = 0.0) -> int:
        """Answer the server's DMA requests while no call is under way; how many came within ``timeout`` seconds."""
        async with self._exclusive():
            deadline = _now() + timeout
            if self._readiness is not None:
                self._readiness.take_over()
            answered = await self._answer_waiting(deadline + self.timeout)
            while True:
                try:
                    await self._receive_any(deadline)
                except CallTimeoutError:
                    return answered
                answered += await self._answer_waiting(deadline + self.timeout)
                if _now() >= deadline:
                    return answered

    async def _answer_waiting(self, deadline: float) -> int:
        """Answer what has come already; how many messages that were."""
        answered = 0
        while (incoming := self._next_message()) is not None:
            await self._take(incoming, {}, deadline)
            answered += 1
        return answered

    def _adopt_twin_socket(self) -> None:
        if self._core.twin_socket is None:
            return
        connection = Connection(Role.CLIENT, self._core.connection.framer.max_size)
        connection.negotiated = True
        self._links.append((connection, Channel(self._core.twin_socket, connection.framer)))

    @contextlib.asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """One call at a time; after one that lost the stream there is no other."""
        async with self._lock:
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

    async def _run(self, call: Call[T], timeout: float | None = None) -> T:
        """Drive a call: send what it asks for, hand it the replies, until it returns."""
        async with self._exclusive():
            deadline = _now() + (self.timeout if timeout is None else timeout)
            replies: list[Message] = []
            try:
                requests = next(call)
                while True:
                    try:
                        replies = await self._transact(requests, deadline)
                    except BaseException as error:
                        requests = call.throw(error)
                    else:
                        requests = call.send(replies)
                        close_replies(replies)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                close_replies(replies)
                self._note_left_over()

    async def _run_copied(self, call: Call[memoryview]) -> bytes:
        def copied() -> Call[bytes]:
            view = yield from call
            return bytes(view)

        return await self._run(copied())

    async def _transact(self, requests: Sequence[Request], deadline: float) -> list[Message]:
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
                await self._send(self._channel, outgoing, deadline)
            await self._await(awaited, deadline, keep=len(awaited) > 1)
        except BaseException:
            for msg_id, message in awaited.items():
                connection.abandon(msg_id)
                if message is not None:
                    message.close()
            raise
        return [message for message in awaited.values() if message is not None]

    async def _send(self, channel: Channel, outgoing: Outgoing, deadline: float) -> None:
        try:
            await channel.send(outgoing, deadline)
        except (CallTimeoutError, asyncio.CancelledError):
            self._closed = True  # a part of the message is out: nothing else can follow it
            raise
        except (OSError, OverflowError) as error:
            if isinstance(error, ConnectionClosedError):
                raise
            raise UsageError(f"the message cannot be sent: {error}") from error

    async def _await(self, awaited: dict[int, Message | None], deadline: float, *, keep: bool) -> None:
        left = len(awaited)
        while left:
            incoming = self._next_message()
            if incoming is None:
                await self._receive_any(deadline)
            else:
                left -= await self._take(incoming, awaited, deadline, keep)
            if left and _now() >= deadline:
                raise CallTimeoutError("not answered in time, though the server keeps sending")

    def _next_message(self) -> Incoming | None:
        """The next whole message on any socket, of those that were received."""
        for connection, channel in self._links:
            message = channel.framer.next_message()
            if message is not None:
                return message, connection, channel
        return None

    async def _take(
        self, incoming: Incoming, awaited: dict[int, Message | None], deadline: float, keep: bool = False
    ) -> int:
        """Answer a command of the server's, or put a reply where it is awaited: 1 if that was one."""
        message, connection, channel = incoming
        if message.is_reply:
            return self._take_reply(message, connection, awaited, keep)
        reply = self._core.answer_command(message, connection)
        if reply is not None:
            await self._send(channel, reply, deadline)
        await asyncio.sleep(0)  # a server that always has something to say must not stop the other tasks
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

    async def _receive_any(self, deadline: float) -> None:
        """Receive from whichever socket has something. Raises CallTimeoutError at ``deadline``."""
        channels = [channel for _, channel in self._links]
        if _receive_ready(channels):
            await asyncio.sleep(0)  # nor one whose message goes on and on
        else:
            await wait_ready(channels, deadline)
            _receive_ready(channels)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _receive_ready(channels: list[Channel]) -> bool:
    """Take what has come on any of ``channels``; whether anything had."""
    received = False
    for channel in channels:
        with contextlib.suppress(BlockingIOError):
            channel.receive()
            received = True
    return received
