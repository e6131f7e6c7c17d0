"""QEMU's educational device, as its specification (docs/specs/edu.rst) describes it.

It computes factorials, raises interrupts, and moves data between guest memory and its own buffer by DMA. Two
differences: work is done right after the access that starts it, not 100 ms later, and DMA addresses are not cut to
28 bits (``-o dma_mask=0xfffffff`` does that).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vfio_user.device import Bar, Device, option, state
from vfio_user.wire.constants import MigrationFlags

logger = logging.getLogger(__name__)

IDENTIFICATION = 0x010000ED
BUFFER_ADDRESS, BUFFER_SIZE = 0x40000, 4096

ID, LIVENESS, FACTORIAL, STATUS = 0x00, 0x04, 0x08, 0x20
IRQ_STATUS, IRQ_RAISE, IRQ_ACK = 0x24, 0x60, 0x64
DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98

STATUS_COMPUTING, STATUS_IRQ = 0x01, 0x80
DMA_START, DMA_TO_GUEST, DMA_IRQ = 0x01, 0x02, 0x04
FACTORIAL_DONE, DMA_DONE = 0x001, 0x100
"""What the interrupt status says of its cause."""

_REGISTERS = {
    ID: "identification",
    LIVENESS: "liveness",
    FACTORIAL: "factorial",
    STATUS: "status",
    IRQ_STATUS: "irq_status",
    DMA_SOURCE: "dma_source",
    DMA_DESTINATION: "dma_destination",
    DMA_COUNT: "dma_count",
    DMA_COMMAND: "dma_command",
}
"""Which attribute a register reads as."""
_NAMES = _REGISTERS | {IRQ_RAISE: "irq_raise", IRQ_ACK: "irq_acknowledge"}

_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1


class Edu(Device):
    """1234:11e8, one BAR of 1 MiB. Below 0x80 only accesses of 4 bytes count, from there on 4 and 8."""

    vendor_id, device_id, revision, class_code = 0x1234, 0x11E8, 0x10, 0x00FF00
    bars = {0: Bar(1 << 20)}
    intx = True
    msi_vectors = 1
    migration = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY

    dma_mask = option(_U64, "mask of a DMA address: 0xfffffff has QEMU's 28 bits")

    identification = IDENTIFICATION
    liveness = state(0)
    factorial = state(0)
    status = state(0)
    irq_status = state(0)
    dma_source = state(0)
    dma_destination = state(0)
    dma_count = state(0)
    dma_command = state(0)

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.buffer = bytearray(BUFFER_SIZE)
        self._unsent = True  # whether the buffer changed since pre-copy sent it
        self._writers = {
            LIVENESS: self._write_liveness,
            FACTORIAL: self._write_factorial,
            STATUS: self._write_status,
            IRQ_RAISE: self._raise,
            IRQ_ACK: self._acknowledge,
            DMA_SOURCE: self._write_dma_source,
            DMA_DESTINATION: self._write_dma_destination,
            DMA_COUNT: self._write_dma_count,
            DMA_COMMAND: self._write_dma_command,
        }

    def on_reset(self) -> None:
        self.buffer[:] = bytes(BUFFER_SIZE)
        self._unsent = True

    # Registers

    def register_names(self, region: int, offset: int, length: int) -> Sequence[str]:
        if region == 0:
            return [name for name in [_NAMES.get(offset)] if name and self._valid(offset, length)]
        return super().register_names(region, offset, length)

    @staticmethod
    def _valid(offset: int, size: int) -> bool:
        return size == 4 or (size == 8 and offset >= DMA_SOURCE)

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        name = _REGISTERS.get(offset) if self._valid(offset, len(data)) else None
        if name is None:
            data[:] = b"\xff" * len(data)
            return
        value: int = getattr(self, name)
        data[:] = value.to_bytes(8, "little")[: len(data)]

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        write = self._writers.get(offset)
        if write is not None and self._valid(offset, len(data)):
            write(int.from_bytes(data, "little"))

    def _write_liveness(self, value: int) -> None:
        self.liveness = ~value & _U32

    def _write_status(self, value: int) -> None:
        self.status = self.status & ~STATUS_IRQ | value & STATUS_IRQ

    # Interrupts

    def _raise(self, cause: int) -> None:
        self.irq_status |= cause
        if self.irq_status:
            self.raise_interrupt()

    def _acknowledge(self, cause: int) -> None:
        self.irq_status &= ~cause
        if not self.irq_status:
            self.irq.deassert()

    # Factorial

    def _write_factorial(self, value: int) -> None:
        if not self.status & STATUS_COMPUTING:
            self.factorial = value
            self.status |= STATUS_COMPUTING
            self.defer(self._compute)

    def _compute(self) -> None:
        """Once, however often it was deferred: a migration may have come in between and done it."""
        if not self.status & STATUS_COMPUTING:
            return
        result = 1
        for factor in range(2, min(self.factorial, 34) + 1):  # 34! is the first that is 0 in 32 bits
            result = result * factor & _U32
        self.factorial = result
        self.status &= ~STATUS_COMPUTING
        if self.status & STATUS_IRQ:
            self._raise(FACTORIAL_DONE)

    # DMA

    @property
    def _dma_running(self) -> bool:
        return bool(self.dma_command & DMA_START)

    def _write_dma_source(self, value: int) -> None:
        if not self._dma_running:
            self.dma_source = value

    def _write_dma_destination(self, value: int) -> None:
        if not self._dma_running:
            self.dma_destination = value

    def _write_dma_count(self, value: int) -> None:
        if not self._dma_running:
            self.dma_count = value

    def _write_dma_command(self, value: int) -> None:
        if value & DMA_START and not self._dma_running:
            self.dma_command = value
            self.defer(self._transfer)

    def _transfer(self) -> None:
        """Move the data, after the reply to the write that asked for it: it may take the client's help."""
        if not self._dma_running:
            return
        to_guest = bool(self.dma_command & DMA_TO_GUEST)
        own, guest = self.dma_source, self.dma_destination
        if not to_guest:
            own, guest = guest, own
        try:
            self._move(own - BUFFER_ADDRESS, guest & self.dma_mask, self.dma_count, to_guest)
        except OSError as error:
            logger.warning("edu: DMA of %#x bytes at %#x failed: %s", self.dma_count, guest, error)
        finish = self.dma_command & DMA_IRQ
        self.dma_command &= ~DMA_START
        if finish:
            self._raise(DMA_DONE)

    def _move(self, start: int, guest: int, count: int, to_guest: bool) -> None:
        if start < 0 or start + count > BUFFER_SIZE:
            logger.warning("edu: %#x bytes at %#x are not inside the buffer: nothing is moved", count, start)
            return
        if to_guest:
            self.dma.write(guest, memoryview(self.buffer)[start : start + count])
        else:
            self._unsent = True
            self.buffer[start : start + count] = self.dma.read(guest, count)

    # Migration

    def pre_copy(self) -> bytes:
        """The buffer, whenever it has changed since it was sent."""
        if not self._unsent:
            return b""
        self._unsent = False
        return bytes(self.buffer)

    def pre_copy_start(self) -> None:
        self._unsent = True

    def save(self) -> dict[str, object]:
        return {"buffer": bytes(self.buffer)}

    def load(self, saved: dict[str, object], pre_copy: Sequence[bytes]) -> None:
        buffer = saved.get("buffer")
        if saved.keys() != {"buffer"} or not isinstance(buffer, bytes) or len(buffer) != BUFFER_SIZE:
            raise ValueError(f"edu's buffer is {BUFFER_SIZE} bytes")
        for name in self.declared_state:
            if not 0 <= getattr(self, name) <= _U64:
                raise ValueError(f"{name} is no value of a register")
        self.buffer[:] = buffer
        self._unsent = True
