"""The class :class:`NvmeDriver`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from vfio_user.devices.nvme.constants import (
    ALL_NAMESPACES,
    AdminOpcode,
    Feature,
    Identify,
    IoOpcode,
    LogPage,
)
from vfio_user.testing.nvme.access import Interrupts, Memory, Registers
from vfio_user.testing.nvme.bare import BareDriver
from vfio_user.testing.nvme.commands import FUSED_FIRST, FUSED_SECOND, Command, Completion
from vfio_user.testing.nvme.data import Buffer
from vfio_user.testing.nvme.identify import (
    IDENTIFY_SIZE,
    Event,
    IdentifyController,
    IdentifyNamespace,
    namespace_descriptors,
    namespace_list,
)
from vfio_user.testing.nvme.queues import QueuePair, Ticket

FORCE_UNIT_ACCESS = 1 << 30
DEALLOCATE_ZEROES = 1 << 25
"""Bits of CDW12 of WRITE and WRITE ZEROES."""
DEALLOCATE = 1 << 2
"""CDW11 of DATASET MANAGEMENT."""

_RANGE = struct.Struct("<IIQ")
_TIMESTAMP = 8
_MAX_TRANSFER = 1 << 20
_MIN_PAGE = 4096


def io(
    opcode: int, nsid: int, lba: int, blocks: int, buffer: Buffer | None = None, cdw12: int = 0, *, flags: int = 0
) -> Command:
    """A command on ``blocks`` blocks from ``lba`` on; ``cdw12`` are bits of that besides the number of blocks."""
    return Command(
        opcode,
        nsid,
        cdw10=lba & 0xFFFFFFFF,
        cdw11=lba >> 32,
        cdw12=cdw12 | blocks - 1,
        flags=flags | (buffer.flags if buffer is not None else 0),
        pointer=buffer.pointer if buffer is not None else bytes(16),
    )


class NvmeDriver(BareDriver):
    """A driver for any NVMe controller, small enough to be read, for tests of controllers.

    ::

        with FakeGuest(Nvme(path="disk.img"), memory_size=16 << 20) as guest:
            with NvmeDriver.of_client(guest.client, guest.memory) as driver:
                driver.create_queue_pair()
                driver.write(1, 0, b"hello".ljust(512))
                assert driver.read(1, 0, 1).startswith(b"hello")

    Entering the ``with`` block enables the controller, leaving it without an error shuts it down. ``memory`` is all the
    driver's: queues, data and lists are in its pages. ``timeout`` in seconds, for everything that is waited for.

    Calls wait for the end of their command, and raise NvmeError with its status unless it succeeded, NvmeTimeoutError
    when nothing comes, NvmeProtocolError for what no controller may do. For many commands in flight: :meth:`submit`
    and :meth:`complete`, with :class:`Command` and :attr:`buffers`. Addresses and lengths are in bytes, LBAs and
    ``blocks`` in blocks; numbers that the specification counts from 0 are counted from 1 here.
    """

    def __init__(
        self, registers: Registers, memory: Memory, interrupts: Interrupts | None = None, *, timeout: float = 10.0
    ) -> None:
        super().__init__(registers, memory, interrupts, timeout=timeout)
        self._namespaces: dict[int, IdentifyNamespace] = {}
        self._controller: IdentifyController | None = None

    def forget(self) -> None:
        super().forget()
        self._namespaces.clear()
        self._controller = None

    # Admin commands

    def _admin_data(self, command: Callable[[bytes], Command], size: int) -> bytes:
        """What an admin command gives, of ``size`` bytes; ``command`` gets the data pointer."""
        with self.buffers.prp(size) as buffer:
            self.admin(command(buffer.pointer))
            return buffer.read()

    def identify(self, cns: int, nsid: int = 0, *, controller: int = 0) -> bytes:
        """A data structure of IDENTIFY."""
        return self._admin_data(
            lambda pointer: Command(AdminOpcode.IDENTIFY, nsid, cdw10=controller << 16 | cns, pointer=pointer),
            IDENTIFY_SIZE,
        )

    def identify_controller(self) -> IdentifyController:
        """What the controller is, now."""
        self._controller = IdentifyController.parse(self.identify(Identify.CONTROLLER))
        return self._controller

    @property
    def controller(self) -> IdentifyController:
        """What the controller is, as it was when it was asked first."""
        return self._controller or self.identify_controller()

    @property
    def max_transfer(self) -> int:
        """Bytes of data that one of the driver's own commands has at most: the controller's limit, MDTS, or 1 MiB."""
        mdts, minimum = self.controller.mdts, _MIN_PAGE << (self.capabilities >> 48 & 0xF)
        return min(_MAX_TRANSFER, minimum << mdts) if mdts else _MAX_TRANSFER

    def identify_namespace(self, nsid: int) -> IdentifyNamespace:
        """What a namespace is, now."""
        self._namespaces[nsid] = namespace = IdentifyNamespace.parse(self.identify(Identify.NAMESPACE, nsid))
        return namespace

    def namespace(self, nsid: int) -> IdentifyNamespace:
        """What a namespace is, as it was when it was asked first."""
        known = self._namespaces.get(nsid)
        return self.identify_namespace(nsid) if known is None else known

    def active_namespaces(self, after: int = 0) -> list[int]:
        """The NSIDs of active namespaces above ``after``: 1024 at most."""
        return namespace_list(self.identify(Identify.ACTIVE_NAMESPACES, after))

    def namespace_descriptors(self, nsid: int) -> dict[int, bytes]:
        """The identifiers of a namespace by type."""
        return dict(namespace_descriptors(self.identify(Identify.NAMESPACE_DESCRIPTORS, nsid)))

    def get_feature(self, feature: int, nsid: int = 0, *, select: int = 0, cdw11: int = 0) -> int:
        """The value of a feature: DW0 of the completion.

        ``select`` 0: the current one, 1: the default, 2: the saved one, 3: what can be done with it.
        """
        return self.admin(Command(AdminOpcode.GET_FEATURES, nsid, cdw10=select << 8 | feature, cdw11=cdw11)).result

    def set_feature(self, feature: int, value: int, nsid: int = 0, *, save: bool = False) -> int:
        """Set a feature (CDW11); DW0 of the completion."""
        return self.admin(Command(AdminOpcode.SET_FEATURES, nsid, cdw10=save << 31 | feature, cdw11=value)).result

    def get_timestamp(self) -> bytes:
        """The 8 bytes of the timestamp feature."""
        return self._admin_data(
            lambda pointer: Command(AdminOpcode.GET_FEATURES, cdw10=Feature.TIMESTAMP, pointer=pointer), _TIMESTAMP
        )

    def set_timestamp(self, milliseconds: int) -> None:
        """Set the timestamp: milliseconds since 1970."""
        with self.buffers.prp(_TIMESTAMP) as buffer:
            buffer.write(milliseconds.to_bytes(6, "little") + bytes(2))
            self.admin(Command(AdminOpcode.SET_FEATURES, cdw10=Feature.TIMESTAMP, pointer=buffer.pointer))

    def request_queues(self, count: int) -> int:
        """Ask for ``count`` I/O queue pairs; how many there may be."""
        granted = self.set_feature(Feature.NUMBER_OF_QUEUES, count - 1 << 16 | count - 1)
        return min(granted & 0xFFFF, granted >> 16) + 1

    def log_page(
        self, page: LogPage | int, size: int, nsid: int = ALL_NAMESPACES, *, offset: int = 0, retain: bool = False
    ) -> bytes:
        """``size`` bytes (a multiple of 4) of a log page; ``retain``: an event that told of it is not over yet."""
        dwords = size // 4 - 1
        return self._admin_data(
            lambda pointer: Command(
                AdminOpcode.GET_LOG_PAGE,
                nsid,
                cdw10=(dwords & 0xFFFF) << 16 | retain << 15 | page,
                cdw11=dwords >> 16,
                cdw12=offset & 0xFFFFFFFF,
                cdw13=offset >> 32,
                pointer=pointer,
            ),
            size,
        )

    def changed_namespaces(self) -> list[int]:
        """The NSIDs of the changed namespace log page, which is empty again after this."""
        return namespace_list(self.log_page(LogPage.CHANGED_NAMESPACES, 4096))

    def async_event(self) -> Ticket:
        """Ask for an asynchronous event; see :meth:`event`."""
        return self.admin_queue.submit(Command(AdminOpcode.ASYNC_EVENT_REQUEST))

    def event(self, ticket: Ticket, timeout: float | None = None) -> Event:
        """Wait for the event that was asked for."""
        return Event.parse(self.complete(ticket, timeout).check(str(ticket)).result)

    def abort(self, ticket: Ticket) -> bool:
        """Ask for the abortion of a command; whether the controller says that it did."""
        cdw10 = ticket.command_id << 16 | ticket.pair.sq.identifier
        return not self.admin(Command(AdminOpcode.ABORT, cdw10=cdw10)).result & 1

    def format(self, nsid: int, lba_format: int = 0, *, erase: int = 0) -> None:
        """Format a namespace; ``erase`` 1: user data."""
        self.admin(Command(AdminOpcode.FORMAT_NVM, nsid, cdw10=erase << 9 | lba_format))
        self._namespaces.pop(nsid, None)

    def keep_alive(self) -> None:
        """Say that the host lives."""
        self.admin(Command(AdminOpcode.KEEP_ALIVE))

    # I/O commands

    def read(self, nsid: int, lba: int, blocks: int, queue: QueuePair | None = None) -> bytes:
        """``blocks`` blocks of a namespace, by as many commands as it takes."""
        parts = []
        for first, count in self._parts(nsid, lba, blocks):
            with self.buffers.prp(count * self.namespace(nsid).block_size) as buffer:
                self.execute(io(IoOpcode.READ, nsid, first, count, buffer), queue)
                parts.append(buffer.read())
        return b"".join(parts)

    def write(self, nsid: int, lba: int, data: bytes, *, fua: bool = False, queue: QueuePair | None = None) -> None:
        """Write whole blocks, by as many commands as it takes; ``fua``: they are durable then."""
        self._send(IoOpcode.WRITE, nsid, lba, data, queue, cdw12=FORCE_UNIT_ACCESS * fua)

    def compare(self, nsid: int, lba: int, data: bytes, queue: QueuePair | None = None) -> None:
        """Compare whole blocks; NvmeError (COMPARE_FAILURE) if they differ."""
        self._send(IoOpcode.COMPARE, nsid, lba, data, queue)

    def _send(self, opcode: int, nsid: int, lba: int, data: bytes, queue: QueuePair | None, *, cdw12: int = 0) -> None:
        size = self.namespace(nsid).block_size
        if len(data) % size:
            raise ValueError(f"{len(data)} bytes are not whole blocks of {size}")
        for first, count in self._parts(nsid, lba, len(data) // size):
            start = (first - lba) * size
            with self.buffers.prp(count * size) as buffer:
                buffer.write(data[start : start + count * size])
                self.execute(io(opcode, nsid, first, count, buffer, cdw12), queue)

    def _parts(self, nsid: int, lba: int, blocks: int) -> list[tuple[int, int]]:
        """LBA and number of blocks of each command."""
        most = min(self.max_transfer // self.namespace(nsid).block_size, 1 << 16)
        return [(lba + done, min(most, blocks - done)) for done in range(0, blocks, most)]

    def compare_and_write(
        self, nsid: int, lba: int, expected: bytes, data: bytes, queue: QueuePair | None = None
    ) -> tuple[Completion, Completion]:
        """Both commands, fused; how each ended, well or not."""
        blocks = len(data) // self.namespace(nsid).block_size
        pair = queue or self.first_queue
        with self.buffers.prp(len(expected)) as first, self.buffers.prp(len(data)) as second:
            first.write(expected)
            second.write(data)
            compare, write = pair.submit_many(
                [
                    io(IoOpcode.COMPARE, nsid, lba, blocks, first, flags=FUSED_FIRST),
                    io(IoOpcode.WRITE, nsid, lba, blocks, second, flags=FUSED_SECOND),
                ]
            )
            return self.complete(compare), self.complete(write)

    def flush(self, nsid: int = ALL_NAMESPACES, queue: QueuePair | None = None) -> None:
        """Make durable what was written."""
        self.execute(Command(IoOpcode.FLUSH, nsid), queue)

    def write_zeroes(
        self, nsid: int, lba: int, blocks: int, *, deallocate: bool = False, queue: QueuePair | None = None
    ) -> None:
        """Have blocks read as zeros."""
        self.execute(io(IoOpcode.WRITE_ZEROES, nsid, lba, blocks, cdw12=DEALLOCATE_ZEROES * deallocate), queue)

    def verify(self, nsid: int, lba: int, blocks: int, queue: QueuePair | None = None) -> None:
        """Have the controller read blocks, without any data."""
        self.execute(io(IoOpcode.VERIFY, nsid, lba, blocks), queue)

    def discard(self, nsid: int, ranges: Sequence[tuple[int, int]], queue: QueuePair | None = None) -> None:
        """Deallocate ranges, each (LBA, blocks), 256 at most."""
        with self.buffers.prp(_RANGE.size * len(ranges)) as buffer:
            buffer.write(b"".join(_RANGE.pack(0, blocks, lba) for lba, blocks in ranges))
            command = Command(
                IoOpcode.DATASET_MANAGEMENT, nsid, cdw10=len(ranges) - 1, cdw11=DEALLOCATE, pointer=buffer.pointer
            )
            self.execute(command, queue)
