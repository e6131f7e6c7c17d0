"""What an NVMe driver reaches: the controller's registers, guest memory, interrupts; three small protocols.

Behind them is a client of a device's server, or a QEMU without a guest; for anything else write three small classes.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vfio_user.client import Client
from vfio_user.fds import OwnedFd, close_all, take_signals
from vfio_user.testing.qtest import QtestMachine
from vfio_user.wire.constants import PAGE_SIZE, IrqSetFlags, PciIrq, PciRegion

_ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
_RELEASE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
_UNMASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK


class Registers(Protocol):
    """The controller's registers, by their offset in BAR0."""

    def read32(self, offset: int) -> int: ...

    def read64(self, offset: int) -> int: ...

    def write32(self, offset: int, value: int) -> None: ...

    def write64(self, offset: int, value: int) -> None: ...

    def ring(self, offset: int, value: int) -> None:
        """Write a doorbell, 4 bytes; it need not have arrived when this returns."""


class Memory(Protocol):
    """``size`` bytes of guest memory from ``address`` on, as both the driver and the controller see them."""

    address: int
    size: int

    def read(self, address: int, size: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...


class Interrupts(Protocol):
    """How a driver waits for the controller."""

    def wait(self, vector: int, seconds: float) -> None:
        """Return when ``vector`` may have been signalled since the last look, or after ``seconds``, or earlier."""


@dataclass(slots=True)
class Hardware:
    """All three, as one driver and its queues share them; a migration changes them under it."""

    registers: Registers
    memory: Memory
    interrupts: Interrupts


# A client


class ClientRegisters:
    """Registers through a client. Doorbells are posted writes, if that is wanted."""

    def __init__(self, client: Client, *, posted: bool = True) -> None:
        self._client = client
        self._posted = posted

    def read32(self, offset: int) -> int:
        return int.from_bytes(self._client.region_read(PciRegion.BAR0, offset, 4), "little")

    def read64(self, offset: int) -> int:
        return int.from_bytes(self._client.region_read(PciRegion.BAR0, offset, 8), "little")

    def write32(self, offset: int, value: int) -> None:
        self._client.region_write(PciRegion.BAR0, offset, value.to_bytes(4, "little"))

    def write64(self, offset: int, value: int) -> None:
        self._client.region_write(PciRegion.BAR0, offset, value.to_bytes(8, "little"))

    def ring(self, offset: int, value: int) -> None:
        self._client.region_write(PciRegion.BAR0, offset, value.to_bytes(4, "little"), self._posted)


class SharedMemory:
    """Guest memory that is mapped here: ``view``, which begins at ``address``."""

    def __init__(self, view: memoryview, address: int = 0) -> None:
        self.address = address
        self.size = len(view)
        self._view = view

    def read(self, address: int, size: int) -> bytes:
        start = address - self.address
        return self._view[start : start + size].tobytes()

    def write(self, address: int, data: bytes) -> None:
        start = address - self.address
        self._view[start : start + len(data)] = data


class ClientInterrupts:
    """The first ``count`` vectors of an interrupt index (PciIrq) of a client's device, by eventfds; close it.

    Meanwhile the device's DMA by messages is served.
    """

    def __init__(self, client: Client, index: int = PciIrq.MSIX, count: int | None = None) -> None:
        self._client, self._index = client, index
        vectors = client.irqs[index].count if count is None else count
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._fds = [OwnedFd(os.eventfd(0, flags)) for _ in range(vectors)]
        client.set_irqs(index, _ASSIGN, 0, vectors, [fd.fileno() for fd in self._fds])

    def wait(self, vector: int, seconds: float) -> None:
        poll = select.poll()
        for fd in (self._fds[vector].fileno(), self._client.fileno()):
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(seconds * 1000))
        if self._client.fileno() in ready:
            self._client.serve_dma()
        if self.take(vector) and self._index == PciIrq.INTX:
            self._client.set_irqs(PciIrq.INTX, _UNMASK, 0, 1)  # a level: it was masked when it was signalled

    def take(self, vector: int) -> int:
        """How often ``vector`` was signalled since the last look, without waiting."""
        return take_signals(self._fds[vector].fileno())

    def close(self) -> None:
        """Listen no longer."""
        if self._fds:
            self._client.set_irqs(self._index, _RELEASE, 0, 0)
        close_all(self._fds)
        self._fds = []


class Polling:
    """No interrupts: the driver looks at its queues again every ``pause`` seconds; ``look`` is called each time."""

    def __init__(self, pause: float = 0.0002, look: Callable[[], object] | None = None) -> None:
        self._pause = pause
        self._look = look

    def wait(self, vector: int, seconds: float) -> None:
        if self._look is not None:
            self._look()
        if self._pause:
            time.sleep(min(self._pause, seconds))


# A QEMU without a guest


class MachineRegisters:
    """Registers of a device in a :class:`QtestMachine`, whose BAR0 was mapped at ``bar``."""

    def __init__(self, machine: QtestMachine, bar: int) -> None:
        self._machine, self._bar = machine, bar

    def read32(self, offset: int) -> int:
        return self._machine.readl(self._bar + offset)

    def read64(self, offset: int) -> int:
        return self._machine.readq(self._bar + offset)

    def write32(self, offset: int, value: int) -> None:
        self._machine.writel(self._bar + offset, value)

    def write64(self, offset: int, value: int) -> None:
        self._machine.writeq(self._bar + offset, value)

    ring = write32


class MachineMemory:
    """A part of a :class:`QtestMachine`'s RAM."""

    def __init__(self, machine: QtestMachine, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.read: Callable[[int, int], bytes] = machine.read
        self.write: Callable[[int, bytes], None] = machine.write


# Pages


class OutOfMemoryError(MemoryError):
    """The driver's part of guest memory is used up."""


class Pages:
    """Which pages of a memory are free."""

    def __init__(self, memory: Memory, page_size: int = PAGE_SIZE) -> None:
        if memory.address % page_size:
            raise ValueError(f"guest memory at {memory.address:#x} does not begin with a page of {page_size} bytes")
        self.page_size = page_size
        self._address = memory.address
        self._used = bytearray(memory.size // page_size)

    @property
    def free(self) -> int:
        """How many there are."""
        return self._used.count(0)

    def allocate(self, count: int = 1) -> int:
        """The address of ``count`` pages in a row. Raises OutOfMemoryError."""
        first = self._used.find(bytes(count))
        if first < 0:
            raise OutOfMemoryError(f"no {count} free pages in a row: {self.free} of {len(self._used)} are free")
        self._used[first : first + count] = b"\1" * count
        return self._address + first * self.page_size

    def scattered(self, count: int) -> list[int]:
        """The addresses of ``count`` pages of which no two follow each other, where there is room for that."""
        taken = [self.allocate() for _ in range(2 * count)] if self.free >= 2 * count else None
        if taken is None:
            return [self.allocate() for _ in range(count)][::-1]
        for page in taken[::2]:
            self.release(page)
        return taken[1::2][::-1]

    def release(self, address: int, count: int = 1) -> None:
        """Give pages back."""
        first = (address - self._address) // self.page_size
        self._used[first : first + count] = bytes(count)
