"""Every call of the client, without I/O.

A call is a generator: it yields batches of :class:`Request`, is sent the replies, and returns its result. The
blocking and the asyncio client run the same generators; what they add is how to send, to wait and to give up.

Every reply is checked: whether it was asked for by :class:`~vfio_user.protocol.Connection`, its sizes and contents
here. What a server may make a client allocate is bounded by what was asked.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import NamedTuple, TypeVar

from vfio_user.client.memory import RegisteredMemory
from vfio_user.client.regions import IoFdDescription, RegionDescription
from vfio_user.dma.bitmap import bitmap_size
from vfio_user.errors import CommandError, MessageError, NegotiationError, ProtocolError, UsageError
from vfio_user.fds import OwnedFd, close_all
from vfio_user.protocol import Connection, Message, Outgoing
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import (
    Capabilities,
    MigrationCapability,
    TwinSocketCapability,
    pack_capabilities,
    parse_capabilities,
)
from vfio_user.wire.commands import COMMANDS, CONTROL_COMMANDS, Role, Tail, command_name
from vfio_user.wire.constants import (
    DEFAULT_DATA_XFER_SIZE,
    DEFAULT_DMA_MAPS,
    HEADER_SIZE,
    MAX_BITMAP_SIZE,
    MAX_MSG_FDS,
    PAGE_SIZE,
    REGION_INFO_CAP_SPARSE_MMAP,
    VERSION_MAJOR,
    VERSION_MINOR,
    Command,
    ControlCommand,
    DeviceFeature,
    DeviceState,
    DmaFlags,
    DmaUnmapFlags,
    FeatureFlags,
    IoFdType,
    MigrationFlags,
    RegionFlags,
)

T = TypeVar("T")

MAX_REGIONS = 256
MAX_IRQS = 256
MAX_INFO_ARGSZ = 1 << 16
"""Largest region info that is asked for: 4,000 sparse areas."""
MAX_MULTI = 200
"""Writes in one REGION_WRITE_MULTI, as QEMU."""
WINDOW = 64
"""Commands that are sent before their replies are read: a server whose replies nobody reads would stop."""
ANSWER_ROOM = 32
"""Spaces behind the proposal: a server's answer may not be longer, and names the twin socket's fd besides."""
MAX_ERRNO = 4095
_MARGIN = 64

PROPOSAL = Capabilities(
    max_msg_fds=MAX_MSG_FDS,
    max_data_xfer_size=DEFAULT_DATA_XFER_SIZE,
    max_dma_maps=DEFAULT_DMA_MAPS,
    pgsizes=PAGE_SIZE,
    write_multiple=True,
    twin_socket=TwinSocketCapability(supported=True),
    migration=MigrationCapability(pgsize=PAGE_SIZE),
)
"""What a client proposes."""


class Request(NamedTuple):
    """One command to send; ``fds`` stay the caller's."""

    command: Command | ControlCommand
    parts: Sequence[m.Buffer] = ()
    fds: Sequence[int] = ()
    posted: bool = False


Call = Generator[Sequence[Request], list[Message], T]


def drive(call: Call[T], transact: Callable[[Sequence[Request]], list[Message]]) -> T:
    """Make a call: ``transact`` sends what it asks for, and returns the replies, which it has until it asks again."""
    replies: list[Message] = []
    try:
        requests = next(call)
        while True:
            try:
                replies = transact(requests)
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


def close_replies(replies: Sequence[Message]) -> None:
    """Close the fds that came with replies and were not taken."""
    for message in replies:
        message.close()


def _one(request: Request) -> Call[Message]:
    """Send one command and return its reply, whose payload is valid until the next command."""
    replies = yield (request,)
    return replies[0]


def allocate(count: int) -> bytearray:
    """Room for ``count`` bytes that were asked for. Raises UsageError where there cannot be any."""
    try:
        return bytearray(count)
    except (ValueError, OverflowError, MemoryError) as error:
        raise UsageError(f"{count} bytes cannot be read at once") from error


class ClientCore:
    """The client's side of one connection: what was negotiated, what the device is, and the calls."""

    def __init__(self, proposal: Capabilities = PROPOSAL, *, max_write: int | None = None) -> None:
        if max_write is not None and max_write < 1:
            raise UsageError(f"max_write {max_write}: at least one byte")
        self._proposal = proposal
        self._max_write = max_write
        longest = max(proposal.data_xfer_size, MAX_INFO_ARGSZ)
        commands = CONTROL_COMMANDS if proposal.has_control else COMMANDS
        self.connection = Connection(Role.CLIENT, longest + HEADER_SIZE + _MARGIN, commands)
        self.twin_socket: socket.socket | None = None
        self.memory = RegisteredMemory()
        self.version = (VERSION_MAJOR, VERSION_MINOR)
        self.capabilities = Capabilities()
        self.info = m.DeviceInfo(0)
        self.regions: tuple[RegionDescription, ...] = ()
        self.irqs: tuple[m.IrqInfo, ...] = ()

    # Replies

    def accept(self, message: Message) -> None:
        """Raise CommandError when a reply carries an error, whatever its payload is; MessageError for a wrong size."""
        if message.is_error:
            known = 0 < message.error <= MAX_ERRNO
            raise CommandError(message.error if known else errno.EINVAL, command_name(message.command))
        row = self.connection.commands[message.command]
        least, came = row.reply.LAYOUT.size, len(message.payload)
        if came < least or (came > least and row.reply_tail is Tail.NONE):
            raise MessageError(f"{row.command.name} answered with {came} bytes instead of {least}")
        if len(message.fds) > row.reply_fds:
            raise MessageError(
                f"{row.command.name} answers with {row.reply_fds} file descriptors at most, {len(message.fds)} came"
            )

    def close(self) -> None:
        self.connection.close()
        self.memory.clear()
        for region in self.regions:
            if region.fd is not None:
                region.fd.close()
        if self.twin_socket is not None:
            self.twin_socket.close()

    # Set-up

    def negotiate(self) -> Call[None]:
        text = pack_capabilities(self._proposal, room=ANSWER_ROOM)
        version = m.Version(VERSION_MAJOR, VERSION_MINOR).pack()
        reply = yield from _one(Request(Command.VERSION, (version, text)))
        answer = m.Version.parse(reply.payload)
        if answer.major != VERSION_MAJOR or answer.minor > VERSION_MINOR:
            raise NegotiationError(f"the server answers with version {answer.major}.{answer.minor}")
        self.version = (answer.major, answer.minor)
        self.capabilities = parse_capabilities(bytes(reply.payload[m.Version.LAYOUT.size :])) or Capabilities()
        if self._proposal.has_control and not self.capabilities.has_control:
            raise NegotiationError("this is no control socket: it does not grant x_control")
        self._take_twin_socket(reply)
        self.connection.negotiated = True

    def _take_twin_socket(self, reply: Message) -> None:
        twin = self.capabilities.twin_socket
        if not isinstance(twin, TwinSocketCapability) or not twin.supported:
            return
        index = twin.fd_index if isinstance(twin.fd_index, int) else 0
        if index >= len(reply.fds):
            raise NegotiationError(f"a twin socket at fd {index}, {len(reply.fds)} came")
        self.twin_socket = _stream_socket(reply.fds[index])

    def discover(self) -> Call[None]:
        """Ask for all there is to know of the device: its regions and interrupts."""
        self.info = yield from self.get_info()
        if self.info.num_regions > MAX_REGIONS or self.info.num_irqs > MAX_IRQS:
            raise MessageError(
                f"{self.info.num_regions} regions and {self.info.num_irqs} interrupt indexes: "
                f"at most {MAX_REGIONS} and {MAX_IRQS}"
            )
        for index in range(self.info.num_regions):
            region = yield from self.get_region_info(index)
            self.regions += (region,)
        for index in range(self.info.num_irqs):
            irq = yield from self.get_irq_info(index)
            self.irqs += (irq,)

    def get_info(self) -> Call[m.DeviceInfo]:
        request = m.DeviceInfo(m.DeviceInfo.LAYOUT.size)
        reply = yield from _one(Request(Command.DEVICE_GET_INFO, (request.pack(),)))
        return m.DeviceInfo.parse(reply.payload)

    def get_region_info(self, index: int) -> Call[RegionDescription]:
        """Asked again with more room where the first answer says that capabilities did not fit."""
        fds: list[OwnedFd] = []
        argsz = m.RegionInfo.LAYOUT.size
        try:
            while True:
                request = m.RegionInfo(argsz, 0, index)
                reply = yield from _one(Request(Command.DEVICE_GET_REGION_INFO, (request.pack(),)))
                fds += reply.fds
                reply.fds = []
                info = m.RegionInfo.parse(reply.payload)
                _check_index(reply, info.index, index)
                if info.argsz <= argsz:
                    break
                argsz = _more_room(reply, info.argsz, first=argsz == m.RegionInfo.LAYOUT.size)
            _check_room(reply, argsz)
            areas = self._sparse_areas(info, reply.payload)
        except BaseException:
            close_all(fds)
            raise
        close_all(fds[1:])
        fd = fds[0] if fds else None
        return RegionDescription(index, info.size, RegionFlags(info.flags), info.offset, areas, fd)

    @staticmethod
    def _sparse_areas(info: m.RegionInfo, payload: memoryview) -> tuple[tuple[int, int], ...]:
        if not info.flags & RegionFlags.CAPS or not info.cap_offset:
            return ()
        for header, position in m.parse_capability_chain(payload, info.cap_offset):
            if header.id == REGION_INFO_CAP_SPARSE_MMAP:
                areas = m.parse_sparse_areas(payload, position)
                for offset, size in areas:
                    if offset + size > info.size:
                        raise MessageError(f"region {info.index}: sparse area {offset:#x}+{size:#x} leaves it")
                return areas
        return ()

    def get_irq_info(self, index: int) -> Call[m.IrqInfo]:
        request = m.IrqInfo(m.IrqInfo.LAYOUT.size, 0, index)
        reply = yield from _one(Request(Command.DEVICE_GET_IRQ_INFO, (request.pack(),)))
        info = m.IrqInfo.parse(reply.payload)
        _check_index(reply, info.index, index)
        return info

    def region_io_fds(self, index: int) -> Call[tuple[IoFdDescription, ...]]:
        """Entries may be 48 bytes (libvfio-user) or 40 (the specification): their stride is what ``argsz`` says."""
        base = argsz = m.RegionIoFds.LAYOUT.size
        while True:
            request = m.RegionIoFds(argsz, 0, index, 0)
            reply = yield from _one(Request(Command.DEVICE_GET_REGION_IO_FDS, (request.pack(),)))
            answer = m.RegionIoFds.parse(reply.payload)
            _check_index(reply, answer.index, index)
            if answer.argsz <= argsz:
                break
            argsz = _more_room(reply, answer.argsz, first=argsz == base)
        _check_room(reply, argsz)
        entries = _io_fd_entries(answer, reply.payload)
        kinds = [_check_io_fd(entry, len(reply.fds)) for entry in entries]
        return tuple(_describe_io_fd(kind, entry, reply.fds) for kind, entry in zip(kinds, entries, strict=True))

    # Regions

    def region_read_into(self, region: int, offset: int, buffer: memoryview) -> Call[None]:
        for start, size in self._chunks(len(buffer), self._read_limit):
            head = m.RegionAccess(offset + start, region, size).pack()
            reply = yield from _one(Request(Command.REGION_READ, (head,)))
            _check_echo(reply, head)
            data = reply.payload[len(head) :]
            if len(data) != size:
                raise MessageError(f"REGION_READ of {size} bytes answered with {len(data)}")
            buffer[start : start + size] = data

    def region_write(self, region: int, offset: int, data: memoryview, posted: bool) -> Call[None]:
        yield from self._write_each(self._pieces(region, offset, data), posted)

    def _pieces(self, region: int, offset: int, data: memoryview) -> Iterable[tuple[int, int, memoryview]]:
        """A write as the writes that the server takes."""
        for start, size in self._chunks(len(data), self._write_limit):
            yield region, offset + start, data[start : start + size]

    def _write_each(self, writes: Iterable[tuple[int, int, memoryview]], posted: bool) -> Call[None]:
        """One REGION_WRITE each, pipelined."""
        batch: list[Request] = []
        heads: list[bytes] = []
        for region, offset, data in writes:
            heads.append(m.RegionAccess(offset, region, len(data)).pack())
            batch.append(Request(Command.REGION_WRITE, (heads[-1], data), posted=posted))
            if len(batch) == WINDOW:
                yield from _written(batch, heads, posted)
                batch, heads = [], []
        if batch:
            yield from _written(batch, heads, posted)

    def region_write_multi(self, writes: Sequence[tuple[int, int, m.Buffer]]) -> Call[None]:
        """By REGION_WRITE_MULTI where the server has it and no write is longer than 8 bytes."""
        views = [(region, offset, memoryview(data).cast("B")) for region, offset, data in writes]
        pieces = [piece for view in views for piece in self._pieces(*view)]
        if self.capabilities.write_multiple is not True or any(len(data) > 8 for _, _, data in pieces):
            yield from self._write_each(pieces, False)
            return
        for start, size in self._chunks(len(pieces), self._multi_limit):
            part = pieces[start : start + size]
            entries = [m.WriteMultiEntry(o, r, len(data), bytes(data)).pack() for r, o, data in part]
            head = m.WriteMulti(len(part)).pack()
            reply = yield from _one(Request(Command.REGION_WRITE_MULTI, (head, *entries)))
            done = m.WriteMulti.parse(reply.payload).count
            if done != len(part):
                raise MessageError(f"{done} of {len(part)} writes were done")

    @property
    def _read_limit(self) -> int:
        return min(self.capabilities.data_xfer_size, self._proposal.data_xfer_size)

    @property
    def _write_limit(self) -> int:
        most = min(self.capabilities.data_xfer_size, 1 << 30)
        return most if self._max_write is None else min(most, self._max_write)

    @property
    def _multi_limit(self) -> int:
        return max(1, min(MAX_MULTI, self._write_limit // m.WriteMultiEntry.LAYOUT.size))

    @staticmethod
    def _chunks(size: int, most: int) -> Iterable[tuple[int, int]]:
        return ((start, min(most, size - start)) for start in range(0, size, most))

    # DMA, interrupts, reset

    def dma_map(
        self, address: int, size: int, fd: int | None, offset: int, flags: int, memory: memoryview | None
    ) -> Call[None]:
        if memory is not None and len(memory) < size:
            raise UsageError(f"memory of {len(memory)} bytes for a DMA region of {size}")
        if memory is not None and memory.readonly and flags & DmaFlags.WRITE:
            raise UsageError("memory that cannot be written for a DMA region that can")
        request = m.DmaMap(m.DmaMap.LAYOUT.size, flags, offset, address, size)
        backing = None if fd is None or memory is not None else _duplicate(fd)
        try:
            yield from _one(Request(Command.DMA_MAP, (request.pack(),), () if fd is None else (fd,)))
            access = flags & (DmaFlags.READ | DmaFlags.WRITE)
            self._register(address, size, access, memory, backing, offset)
        except BaseException:
            if backing is not None:
                backing.close()
            raise

    def _register(
        self, address: int, size: int, access: int, memory: memoryview | None, fd: OwnedFd | None, offset: int
    ) -> None:
        try:
            self.memory.add(address, size, access, memory=memory, fd=fd, offset=offset)
        except OSError as error:
            raise MessageError(f"the server took a DMA region that it must refuse: {error}") from error

    def dma_unmap(self, address: int, size: int, page_size: int | None) -> Call[bytes]:
        """With a ``page_size`` the dirty bitmap comes back, as DMA logging's report would give it."""
        fixed = m.DmaUnmap.LAYOUT.size
        if page_size is None:
            request = m.DmaUnmap(fixed, 0, address, size).pack()
            reply = yield from _one(Request(Command.DMA_UNMAP, (request,)))
            m.DmaUnmap.parse(reply.payload)
            self.memory.remove(address, size)
            return b""
        info = m.DirtyBitmapInfo(page_size, _bitmap_size(size, page_size))
        argsz = fixed + m.DirtyBitmapInfo.LAYOUT.size + info.size
        self.connection.framer.reserve(HEADER_SIZE + argsz)
        request = m.DmaUnmap(argsz, DmaUnmapFlags.GET_DIRTY_BITMAP, address, size).pack()
        reply = yield from _one(Request(Command.DMA_UNMAP, (request, info.pack())))
        bitmap = reply.payload[argsz - info.size :]
        if len(bitmap) != info.size:
            raise MessageError(f"a dirty bitmap of {len(bitmap)} bytes, asked for {info.size}")
        self.memory.remove(address, size)
        return bytes(bitmap)

    def dma_unmap_all(self) -> Call[None]:
        request = m.DmaUnmap(m.DmaUnmap.LAYOUT.size, DmaUnmapFlags.ALL, 0, 0).pack()
        reply = yield from _one(Request(Command.DMA_UNMAP, (request,)))
        m.DmaUnmap.parse(reply.payload)
        self.memory.clear()

    def set_irqs(
        self, index: int, flags: int, start: int, count: int, fds: Sequence[int], data: m.Buffer
    ) -> Call[None]:
        """Eventfds go in as many messages as the server's max_msg_fds asks for."""
        data = memoryview(data).cast("B")
        most = max(1, min(self.capabilities.msg_fds, MAX_MSG_FDS))
        size = m.IrqSet.LAYOUT.size + len(data)
        if len(fds) > most and count == len(fds) and not data:
            for first in range(0, count, most):
                part = fds[first : first + most]
                request = m.IrqSet(size, flags, index, start + first, len(part))
                yield from _one(Request(Command.DEVICE_SET_IRQS, (request.pack(),), part))
            return
        request = m.IrqSet(size, flags, index, start, count)
        yield from _one(Request(Command.DEVICE_SET_IRQS, (request.pack(), data), fds))

    def reset(self) -> Call[None]:
        yield from _one(Request(Command.DEVICE_RESET))

    # Features and migration

    def device_feature(self, flags: int, data: m.Buffer, reply_size: int | None = None) -> Call[memoryview]:
        """``reply_size``: most bytes of data that the reply may have; the view is valid until the next call."""
        data = memoryview(data).cast("B")
        size = m.Feature.LAYOUT.size
        room = self._proposal.data_xfer_size if reply_size is None else reply_size
        self.connection.framer.reserve(HEADER_SIZE + size + room)
        argsz = size + max(len(data), room)
        request = m.Feature(argsz, flags).pack()
        reply = yield from _one(Request(Command.DEVICE_FEATURE, (request, data)))
        _check_room(reply, argsz)
        answer = m.Feature.parse(reply.payload)
        if answer.flags != flags:
            raise MessageError(f"DEVICE_FEATURE {flags:#x} answered as {answer.flags:#x}")
        return reply.payload[size:]

    def probe(self, feature: int) -> Call[bool]:
        """Whether the device has a feature; EINVAL and ENOTTY both say that it has not."""
        try:
            yield from self.device_feature(FeatureFlags.PROBE | feature, b"")
        except CommandError as error:
            if error.errno in (errno.EINVAL, errno.ENOTTY):
                return False
            raise
        return True

    def _get_feature(self, feature: DeviceFeature, layout: type[P], request: bytes = b"") -> Call[P]:
        data = yield from self.device_feature(FeatureFlags.GET | feature, request, layout.LAYOUT.size)
        return layout.parse(data)

    def migration_flags(self) -> Call[MigrationFlags]:
        answer = yield from self._get_feature(DeviceFeature.MIGRATION, m.FeatureMigration)
        return MigrationFlags(answer.flags)

    def migration_get_state(self) -> Call[DeviceState]:
        answer = yield from self._get_feature(DeviceFeature.MIG_DEVICE_STATE, m.FeatureDeviceState)
        try:
            return DeviceState(answer.device_state)
        except ValueError:
            raise MessageError(f"{answer.device_state} is no device state") from None

    def migration_set_state(self, state: int) -> Call[None]:
        data = m.FeatureDeviceState(state).pack()
        yield from self.device_feature(FeatureFlags.SET | DeviceFeature.MIG_DEVICE_STATE, data, len(data))

    def migration_data_size(self) -> Call[int]:
        answer = yield from self._get_feature(DeviceFeature.MIG_DATA_SIZE, m.FeatureDataSize)
        return answer.stop_copy_length

    def migration_read_data_into(self, buffer: memoryview) -> Call[int]:
        """Bytes filled. Fewer than there is room for: the stream ends, or has nothing more for now, here."""
        done = 0
        for start, size in self._chunks(len(buffer), self._read_limit):
            request = m.MigData(m.MigData.LAYOUT.size + size, size).pack()
            reply = yield from _one(Request(Command.MIG_DATA_READ, (request,)))
            count = m.MigData.parse(reply.payload).size
            data = reply.payload[m.MigData.LAYOUT.size :]
            if count > size or not count <= len(data) <= size:
                raise MessageError(f"asked for {size} bytes, {count} announced, {len(data)} came")
            buffer[start : start + count] = data[:count]
            done = start + count
            if count < size:
                break
        return done

    def migration_write_data(self, data: memoryview) -> Call[None]:
        """One MIG_DATA_WRITE for each part, pipelined: a guest may stand still meanwhile."""
        requests = []
        for start, size in self._chunks(len(data), self._write_limit):
            head = m.MigData(m.MigData.LAYOUT.size + size, size).pack()
            requests.append(Request(Command.MIG_DATA_WRITE, (head, data[start : start + size])))
        for start, size in self._chunks(len(requests), WINDOW):
            yield requests[start : start + size]

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> Call[int]:
        data = b"".join(
            [m.LoggingControl(page_size, len(ranges)).pack(), *(m.LoggingRange(*pair).pack() for pair in ranges)]
        )
        flags = FeatureFlags.SET | DeviceFeature.DMA_LOGGING_START
        reply = yield from self.device_feature(flags, data, len(data))
        chosen = m.LoggingControl.parse(reply).page_size
        if chosen <= 0 or chosen & (chosen - 1):
            raise MessageError(f"the server chose to log pages of {chosen} bytes")
        return chosen

    def dma_logging_stop(self) -> Call[None]:
        yield from self.device_feature(FeatureFlags.SET | DeviceFeature.DMA_LOGGING_STOP, b"", 0)

    def dma_logging_report(self, iova: int, length: int, page_size: int) -> Call[bytes]:
        size = _bitmap_size(length, page_size)
        request = m.LoggingReport(iova, length, page_size).pack()
        flags = FeatureFlags.GET | DeviceFeature.DMA_LOGGING_REPORT
        reply = yield from self.device_feature(flags, request, len(request) + size)
        bitmap = reply[len(request) :]
        if len(bitmap) != size:
            raise MessageError(f"a dirty bitmap of {len(bitmap)} bytes, asked for {size}")
        return bytes(bitmap)

    # What the server asks

    def answer_command(self, message: Message, connection: Connection) -> Outgoing | None:
        """Serve a command of the server's: DMA from registered memory, an error for anything else."""
        try:
            connection.check(message)
            parts = self._serve_dma(message)
        except (ProtocolError, OSError) as error:
            reply = connection.error_reply(message, error.errno or errno.EIO)
        else:
            reply = connection.reply(message, parts)
        finally:
            message.close()
        return reply if message.wants_reply else None

    def _serve_dma(self, message: Message) -> Sequence[m.Buffer]:
        request = m.DmaAccess.parse(message.payload)
        head = bytes(message.payload[: m.DmaAccess.LAYOUT.size])
        data = message.payload[len(head) :]
        if request.count > self._proposal.data_xfer_size:
            raise MessageError(f"DMA of {request.count} bytes at once", errno.E2BIG)
        if message.command == Command.DMA_READ:
            if len(data):
                raise MessageError("DMA_READ with data")
            return head, self.memory.read(request.address, request.count)
        if len(data) != request.count:
            raise MessageError(f"DMA_WRITE of {request.count} bytes brings {len(data)}")
        self.memory.write(request.address, data)
        return (head,)


P = TypeVar("P", bound=m.Payload)


def _bitmap_size(length: int, page_size: int) -> int:
    if length <= 0 or page_size <= 0 or page_size & (page_size - 1):
        raise UsageError(f"a dirty bitmap for {length} bytes in pages of {page_size}")
    size = bitmap_size(length, page_size)
    if size > MAX_BITMAP_SIZE:
        raise UsageError(f"a dirty bitmap of {size} bytes: at most {MAX_BITMAP_SIZE}, ask for less at a time")
    return size


def _stream_socket(fd: OwnedFd) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd.fileno())
    except OSError as error:
        raise NegotiationError(f"the twin socket is no socket: {error.strerror}") from error
    fd.take()
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.close()
        raise NegotiationError(f"the twin socket is of {sock.family!r}, {sock.type!r}")
    return sock


def _duplicate(fd: int) -> OwnedFd:
    try:
        return OwnedFd.duplicate(fd)
    except (OSError, OverflowError) as error:
        raise UsageError(f"fd {fd}: {error}") from error


def _check_index(reply: Message, index: int, asked: int) -> None:
    if index != asked:
        raise MessageError(f"{command_name(reply.command)} of index {asked} answered for {index}")


def _more_room(reply: Message, argsz: int, *, first: bool) -> int:
    """The ``argsz`` that an answer asks for, once, and not without bound."""
    if not first or argsz > MAX_INFO_ARGSZ:
        raise MessageError(f"{command_name(reply.command)} asks for {argsz} bytes, at most {MAX_INFO_ARGSZ}, and once")
    return argsz


def _check_room(reply: Message, argsz: int) -> None:
    if len(reply.payload) > argsz:
        raise MessageError(
            f"{command_name(reply.command)} answered with {len(reply.payload)} bytes, {argsz} were asked for"
        )


def _check_echo(reply: Message, head: bytes) -> None:
    if reply.payload[: len(head)] != head:
        asked, came = m.RegionAccess.parse(head), m.RegionAccess.parse(reply.payload)
        raise MessageError(f"{command_name(reply.command)} of {asked} answered for another place, {came}")


def _written(batch: list[Request], heads: list[bytes], posted: bool) -> Call[None]:
    replies = yield batch
    if not posted:
        for reply, head in zip(replies, heads, strict=True):
            _check_echo(reply, head)


def _io_fd_entries(answer: m.RegionIoFds, payload: memoryview) -> list[m.IoFd]:
    if not answer.count:
        return []
    if answer.count > MAX_MSG_FDS:
        raise MessageError(f"{answer.count} I/O fds: at most {MAX_MSG_FDS} can come")
    base, short, full = m.RegionIoFds.LAYOUT.size, m.IoFd.SHORT_SIZE, m.IoFd.LAYOUT.size
    stride, rest = divmod(answer.argsz - base, answer.count)
    if rest or stride not in (short, full):
        raise MessageError(f"{answer.count} I/O fds in {answer.argsz - base} bytes")
    if base + answer.count * stride > len(payload):
        raise MessageError(f"{answer.count} I/O fds announced, {len(payload)} bytes came")
    parse = m.IoFd.parse if stride == full else m.IoFd.parse_short
    return [parse(payload, base + i * stride) for i in range(answer.count)]


def _check_io_fd(entry: m.IoFd, fd_count: int) -> IoFdType:
    try:
        kind = IoFdType(entry.type)
    except ValueError:
        raise MessageError(f"{entry.type} is no type of I/O fd") from None
    indexes = [entry.fd_index, entry.shadow_mem_fd_index] if kind is IoFdType.IOEVENTFD_SHADOW else [entry.fd_index]
    for index in indexes:
        if index != m.NO_FD_INDEX and index >= fd_count:
            raise MessageError(f"I/O fd {index}, {fd_count} came")
    return kind


def _describe_io_fd(kind: IoFdType, entry: m.IoFd, fds: list[OwnedFd]) -> IoFdDescription:
    """One descriptor may serve several sub-regions: each gets a duplicate of its own."""

    def take(index: int) -> OwnedFd | None:
        return None if index == m.NO_FD_INDEX else OwnedFd.duplicate(fds[index].fileno())

    shadowed = kind is IoFdType.IOEVENTFD_SHADOW
    return IoFdDescription(
        kind,
        entry.offset,
        entry.size,
        take(entry.fd_index),
        entry.flags,
        entry.datamatch,
        entry.user_data if kind is IoFdType.IOREGIONFD else 0,
        take(entry.shadow_mem_fd_index) if shadowed else None,
        entry.shadow_offset if shadowed else 0,
    )
