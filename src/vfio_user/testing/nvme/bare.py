"""The class :class:`BareDriver`: a controller enabled, its queues, and commands as they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from vfio_user.client import Client
from vfio_user.devices.nvme.constants import (
    CQE_SIZE,
    NSSR_RESET,
    SQE_SIZE,
    AdminOpcode,
    Configuration,
    ControllerStatus,
    Register,
)
from vfio_user.testing.nvme.access import (
    ClientRegisters,
    Hardware,
    Interrupts,
    MachineMemory,
    MachineRegisters,
    Memory,
    Pages,
    Polling,
    Registers,
    SharedMemory,
)
from vfio_user.testing.nvme.commands import Command, Completion, NvmeProtocolError, NvmeTimeoutError
from vfio_user.testing.nvme.data import Buffer, Buffers, prps
from vfio_user.testing.nvme.queues import (
    CompletionQueue,
    CompletionSide,
    Doorbell,
    QueuePair,
    Ring,
    SubmissionQueue,
    Ticket,
    controller_state,
)
from vfio_user.testing.qtest import QtestMachine
from vfio_user.wire.constants import PciRegion

PCI_COMMAND, MEMORY_AND_BUS_MASTER = 0x04, 0x06

CONTIGUOUS, INTERRUPTS = 1, 2
"""Bits of CDW11 of the commands that create queues."""
NORMAL_SHUTDOWN, ABRUPT_SHUTDOWN = 1 << 14, 2 << 14
"""CC.SHN."""


def configuration(*, page_size: int = 4096, sqe: int = 6, cqe: int = 4) -> int:
    """CC without EN: entries of 2 ** ``sqe`` and 2 ** ``cqe`` bytes, NVM command set, round robin."""
    return cqe << 20 | sqe << 16 | page_size.bit_length() - 13 << 7


class BareDriver:
    """What :class:`NvmeDriver` stands on: the controller as a whole, its queues, and any command."""

    def __init__(
        self, registers: Registers, memory: Memory, interrupts: Interrupts | None = None, *, timeout: float = 10.0
    ) -> None:
        self.hardware = Hardware(registers, memory, interrupts or Polling())
        self.timeout = timeout
        self.pages = Pages(memory)
        self.buffers = Buffers(self.hardware, self.pages)
        self.queues: list[QueuePair] = []
        """The I/O queues, in the order that they were made in."""
        self._admin: QueuePair | None = None
        self._sides: dict[int, CompletionSide] = {}
        self.shadow_pages: tuple[int, int] | None = None
        """The addresses of the pages of shadow doorbells and of event indexes, once they are in use."""

    @classmethod
    def of_client(
        cls,
        client: Client,
        memory: memoryview,
        address: int = 0,
        *,
        interrupts: Interrupts | None = None,
        posted: bool = True,
        timeout: float = 10.0,
    ) -> Self:
        """A driver of what ``client`` is connected to, with its ``memory``, which is mapped for DMA at ``address``.

        ``interrupts``: :class:`ClientInterrupts`, for example; None: the driver polls. ``posted``: doorbells are
        written without waiting for a reply.
        """
        client.region_write(PciRegion.CONFIG, PCI_COMMAND, MEMORY_AND_BUS_MASTER.to_bytes(2, "little"))
        registers = ClientRegisters(client, posted=posted)
        polling = Polling(look=client.serve_dma)
        return cls(registers, SharedMemory(memory, address), interrupts or polling, timeout=timeout)

    @classmethod
    def of_machine(
        cls, machine: QtestMachine, bar: int, memory: int, size: int, *, interrupts: Interrupts | None = None
    ) -> Self:
        """A driver of a device in a QEMU without a guest, its BAR0 at ``bar``; it uses ``size`` bytes at ``memory``."""
        return cls(
            MachineRegisters(machine, bar),
            MachineMemory(machine, memory, size),
            interrupts or Polling(pause=0),
            timeout=machine.timeout,
        )

    def __enter__(self) -> Self:
        self.enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.shutdown()

    def move(self, registers: Registers, memory: Memory, interrupts: Interrupts | None = None) -> None:
        """Go on with a controller that became, by a migration, what the one before was; memory has the same addresses.

        Let no command be submitted or waited for meanwhile.
        """
        hardware = self.hardware
        hardware.registers, hardware.memory, hardware.interrupts = registers, memory, interrupts or Polling()

    # The controller as a whole

    @property
    def capabilities(self) -> int:
        """CAP."""
        return self.hardware.registers.read64(Register.CAP)

    @property
    def stride(self) -> int:
        """Bytes from one doorbell to the next."""
        return 4 << (self.capabilities >> 32 & 0xF)

    @property
    def status(self) -> ControllerStatus:
        """CSTS."""
        return ControllerStatus(self.hardware.registers.read32(Register.CSTS))

    @property
    def admin_queue(self) -> QueuePair:
        if self._admin is None:
            raise NvmeProtocolError("the controller is not enabled")
        return self._admin

    def enable(self, depth: int = 32) -> None:
        """Enable the controller, with an admin queue of ``depth`` entries each way; a new beginning."""
        self.disable()
        self.prepare(depth)
        self.hardware.registers.write32(Register.CC, configuration(page_size=self.pages.page_size) | Configuration.EN)
        self.wait_status(ControllerStatus.RDY, ControllerStatus.RDY)

    def prepare(self, depth: int = 32) -> None:
        """All of :meth:`enable` but the last step, for those who want to do that otherwise."""
        side = self._make_side(0, self._ring(CQE_SIZE, depth), vector=0)
        self._admin = self._make_pair(0, self._ring(SQE_SIZE, depth), side)
        registers = self.hardware.registers
        registers.write32(Register.AQA, depth - 1 << 16 | depth - 1)
        registers.write64(Register.ASQ, self._admin.sq.ring.address(0))
        registers.write64(Register.ACQ, self._admin.cq.ring.address(0))

    def disable(self) -> None:
        """Disable the controller, and forget every queue and every command in flight."""
        registers = self.hardware.registers
        registers.write32(Register.CC, registers.read32(Register.CC) & ~Configuration.EN)
        self.wait_status(ControllerStatus.RDY | ControllerStatus.CFS, ControllerStatus(0))
        self.forget()

    def shutdown(self, *, abrupt: bool = False) -> None:
        """Notify the controller of a shutdown, wait until it is ready for that, and disable it."""
        registers = self.hardware.registers
        notification = ABRUPT_SHUTDOWN if abrupt else NORMAL_SHUTDOWN
        registers.write32(Register.CC, registers.read32(Register.CC) & ~Configuration.SHN | notification)
        self.wait_status(ControllerStatus.SHST, ControllerStatus.SHST_COMPLETE)
        self.disable()

    def reset_subsystem(self) -> None:
        """Write NSSR, where CAP has NSSRS; the controller is disabled by it."""
        self.hardware.registers.write32(Register.NSSR, NSSR_RESET)
        self.wait_status(ControllerStatus.RDY, ControllerStatus(0))
        self.forget()

    def wait_status(self, mask: ControllerStatus, value: ControllerStatus) -> None:
        """Wait until the bits of ``mask`` in CSTS are ``value``.

        Raises NvmeProtocolError if the controller fails instead, NvmeTimeoutError after the driver's timeout.
        """
        deadline = time.monotonic() + self.timeout
        while (status := self.status) & mask != value:
            if value and status & ~mask & ControllerStatus.CFS:
                raise NvmeProtocolError(f"the controller failed: {controller_state(self.hardware)}")
            if time.monotonic() > deadline:
                wanted = f"CSTS & {int(mask):#x} = {int(value):#x}"
                raise NvmeTimeoutError(f"{wanted}: not in {self.timeout} s; {controller_state(self.hardware)}")
            self.hardware.interrupts.wait(0, 0.001)

    def forget(self) -> None:
        """Drop every queue, and every command in flight: the controller was disabled or reset."""
        pairs = [*self.queues, *([self._admin] if self._admin is not None else [])]
        for ring in [pair.sq.ring for pair in pairs] + [side.queue.ring for side in self._sides.values()]:
            self._release(ring)
        self._sides.clear()
        self.queues.clear()
        self._admin = None
        if self.shadow_pages is not None:
            for page in self.shadow_pages:
                self.pages.release(page)
            self.shadow_pages = None

    # Commands

    def submit(self, queue: QueuePair, command: Command) -> Ticket:
        """Hand a command to the controller, without waiting for its end."""
        return queue.submit(command)

    def complete(self, ticket: Ticket, timeout: float | None = None) -> Completion:
        """Wait for the end of a command; how it ended, well or not."""
        return ticket.pair.complete(ticket, timeout)

    def execute(self, command: Command, queue: QueuePair | None = None) -> Completion:
        """Do one command, by default of the first I/O queue; how it ended. Raises NvmeError."""
        ticket = (queue or self.first_queue).submit(command)
        return self.complete(ticket).check(str(ticket))

    def admin(self, command: Command) -> Completion:
        """Do one admin command; how it ended. Raises NvmeError."""
        return self.execute(command, self.admin_queue)

    @property
    def first_queue(self) -> QueuePair:
        """The I/O queue that is used where none is named."""
        if not self.queues:
            raise NvmeProtocolError("there is no I/O queue: create_queue_pair()")
        return self.queues[0]

    # Queues

    def create_queue_pair(
        self,
        depth: int = 32,
        *,
        identifier: int | None = None,
        vector: int | None = None,
        contiguous: bool = True,
        priority: int = 0,
        completion_queue: int | None = None,
        completion_depth: int | None = None,
    ) -> QueuePair:
        """Create an I/O submission queue of ``depth`` entries and, unless ``completion_queue`` names one that is
        there, a completion queue of the same ``identifier``, with interrupts if there is a ``vector``.

        Not ``contiguous``: in scattered pages, named by a PRP list (CAP.CQR must be 0).
        """
        taken = {pair.sq.identifier for pair in self.queues} | self._sides.keys()
        number = identifier or next(n for n in range(1, 1 << 16) if n not in taken)
        side = self._sides.get(number if completion_queue is None else completion_queue)
        if side is None:
            side = self._create_completion_queue(number, completion_depth or depth, vector, contiguous)
        flags = priority << 1 | side.queue.identifier << 16
        with self._created(AdminOpcode.CREATE_IO_SQ, number, SQE_SIZE, depth, flags, contiguous) as ring:
            pair = self._make_pair(number, ring, side)
        self.queues.append(pair)
        return pair

    def _create_completion_queue(self, number: int, depth: int, vector: int | None, contiguous: bool) -> CompletionSide:
        flags = 0 if vector is None else INTERRUPTS | vector << 16
        with self._created(AdminOpcode.CREATE_IO_CQ, number, CQE_SIZE, depth, flags, contiguous) as ring:
            return self._make_side(number, ring, vector)

    @contextmanager
    def _created(
        self, opcode: int, number: int, entry: int, depth: int, flags: int, contiguous: bool
    ) -> Iterator[Ring]:
        """A ring that the controller knows; its pages are free again if it refuses."""
        ring = self._ring(entry, depth, contiguous=contiguous)
        try:
            with Buffer(self.hardware, self.pages, []) as lists:  # which the controller needs only now
                where = ring.address(0) if contiguous else self.buffers.prp_list(lists, ring.pages)
                size_and_id = depth - 1 << 16 | number
                self.admin(Command(opcode, cdw10=size_and_id, cdw11=flags | contiguous, pointer=prps(where)))
            yield ring
        except BaseException:
            self._release(ring)
            raise

    def delete_queue_pair(self, pair: QueuePair) -> None:
        """Delete a submission queue, and its completion queue where that has no other.

        The controller ends the commands in flight: their tickets say how.
        """
        self.admin(Command(AdminOpcode.DELETE_IO_SQ, cdw10=pair.sq.identifier))
        pair.reap()
        self.queues.remove(pair)
        del pair.side.pairs[pair.sq.identifier]
        self._release(pair.sq.ring)
        if not pair.side.pairs:
            self.admin(Command(AdminOpcode.DELETE_IO_CQ, cdw10=pair.cq.identifier))
            del self._sides[pair.cq.identifier]
            self._release(pair.cq.ring)

    def enable_shadow_doorbells(self) -> None:
        """Give the controller pages for shadow doorbells, and ring those of all I/O queues by them from now on.

        The admin queue's have none: Linux gives them none, and controllers know.
        """
        shadow, events = self.pages.allocate(), self.pages.allocate()
        for page in (shadow, events):
            self.hardware.memory.write(page, bytes(self.pages.page_size))
        bells = [bell for pair in self.queues for bell in (pair.sq.doorbell, pair.cq.doorbell)]
        for bell in bells:
            bell.prepare_shadow(shadow + bell.offset, events + bell.offset)
        self.admin(Command(AdminOpcode.DOORBELL_BUFFER_CONFIG, pointer=prps(shadow, events)))
        self.shadow_pages = shadow, events
        for bell in bells:
            bell.use_shadow(shadow + bell.offset, events + bell.offset)

    def _doorbell(self, number: int) -> Doorbell:
        """Doorbell 2y: the tail of SQ y; 2y + 1: the head of CQ y."""
        bell = Doorbell(self.hardware, number * self.stride)
        if self.shadow_pages is not None:
            shadow, events = self.shadow_pages
            bell.prepare_shadow(shadow + bell.offset, events + bell.offset)
            bell.use_shadow(shadow + bell.offset, events + bell.offset)
        return bell

    def _make_side(self, identifier: int, ring: Ring, vector: int | None) -> CompletionSide:
        side = CompletionSide(CompletionQueue(identifier, ring, self._doorbell(2 * identifier + 1), vector))
        self._sides[identifier] = side
        return side

    def _make_pair(self, identifier: int, ring: Ring, side: CompletionSide) -> QueuePair:
        return QueuePair(
            self.hardware, SubmissionQueue(identifier, ring, self._doorbell(2 * identifier)), side, self.timeout
        )

    def _ring(self, entry: int, size: int, *, contiguous: bool = True) -> Ring:
        """A ring of zeros."""
        step = self.pages.page_size
        count = -(-size * entry // step)
        first = self.pages.allocate(count) if contiguous else 0
        pages = [first + number * step for number in range(count)] if contiguous else self.pages.scattered(count)
        for page in pages:
            self.hardware.memory.write(page, bytes(step))
        return Ring(self.hardware, pages, step, entry, size)

    def _release(self, ring: Ring) -> None:
        for page in ring.pages:
            self.pages.release(page)
