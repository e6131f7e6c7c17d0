"""What the tests of a controller's life share: a storage that has to be waited for, a guest at a desk."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import Configuration, Register
from vfio_user.devices.nvme.storage.base import Views
from vfio_user.devices.nvme.storage.memory import MemoryStorage
from vfio_user.testing import FakeGuest
from vfio_user.testing.nvme import ClientInterrupts, NvmeDriver
from vfio_user.wire.constants import PciIrq, PciRegion

TIMEOUT = 10.0
BLOCK = 512
PCI_COMMAND, NO_BUS_MASTER, BUS_MASTER = 4, 2, 6


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class GatedStorage(MemoryStorage):
    """Memory whose every call has to wait, at a gate. ``calls`` have come there, in this order.

    ``trespasses`` are those that went on when the storage was not the controller's: it was another server's, perhaps.
    """

    def __init__(self, size: int = 1 << 20, *, block_size: int = BLOCK, shut: bool = False) -> None:
        super().__init__("gated", size=size)
        self.block_size = block_size
        self.gate = threading.Event()
        if not shut:
            self.gate.set()
        self.calls: list[str] = []
        self.trespasses: list[str] = []
        self.acquired = self.closed = self.dirty = False
        self._came = threading.Condition()

    def wait_for(self, count: int) -> None:
        """Wait until so many calls have come to the gate."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.calls) >= count, TIMEOUT), self.calls

    def _pass(self, call: str) -> None:
        with self._came:
            self.calls.append(call)
            self._came.notify_all()
        if not self.gate.wait(3 * TIMEOUT):
            raise TimeoutError(f"nobody opened the gate for {call}")
        if not self.acquired:
            self.trespasses.append(call)

    def acquire(self) -> None:
        self.acquired = True

    def release(self) -> None:
        if self.acquired and self.dirty:
            self.flush()
        self.acquired = False

    def close(self) -> None:
        self.closed = True

    def read_now(self, offset: int, views: Views) -> bool:
        return False

    def write_now(self, offset: int, views: Views) -> bool:
        return False

    def read(self, offset: int, views: Views) -> None:
        self._pass("read")
        super().read(offset, views)

    def write(self, offset: int, views: Views) -> None:
        self._pass("write")
        self.dirty = True
        super().write(offset, views)

    def flush(self) -> None:
        self._pass("flush")
        self.dirty = False

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._pass("write_zeroes")
        self.dirty = True
        super().write_zeroes(offset, length, unmap=unmap)


class SlowToAcquire(GatedStorage):
    """A server that does not answer, or answers late."""

    def acquire(self) -> None:
        self._pass("acquire")
        super().acquire()


class Desk:
    """A controller, its guest, and a driver that polls; ``listen`` is for the interrupts of one index."""

    def __init__(
        self, device: Nvme, *, memory_size: int = 2 << 20, shared: bool = True, timeout: float = TIMEOUT
    ) -> None:
        self.device = device
        self._closing = contextlib.ExitStack()
        self._closing.callback(device.close)
        self.guest = self._closing.enter_context(
            FakeGuest(device, memory_size=memory_size, shared=shared, timeout=timeout)
        )
        self.driver = NvmeDriver.of_client(self.guest.client, self.guest.memory, timeout=timeout)
        self.driver.enable()

    def listen(self, index: PciIrq, count: int | None = None) -> ClientInterrupts:
        interrupts = ClientInterrupts(self.guest.client, index, count)
        self._closing.callback(interrupts.close)
        return interrupts

    def nudge(self) -> None:
        """Whatever was posted before has arrived, and what it caused has happened."""
        self.guest.read32(Register.CSTS)

    def in_device(self, work: Callable[[], object]) -> None:
        """Have the thread that serves the client call ``work``, and wait for that. Raises what it raises."""
        self.post(work)()

    def post(self, work: Callable[[], object]) -> Callable[[], None]:
        """The same; what is returned waits."""
        done = threading.Event()
        errors: list[BaseException] = []

        def do() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
            done.set()

        def wait() -> None:
            assert done.wait(TIMEOUT)
            if errors:
                raise errors[0]

        self.device.post(do)
        return wait

    def configure(self, *, clear: int = 0, set: int = 0) -> None:
        """Change bits of CC, without waiting for what comes of it."""
        self.guest.write32(Register.CC, self.guest.read32(Register.CC) & ~clear | set)

    def begin_reset(self) -> None:
        """CC.EN becomes 0."""
        self.configure(clear=Configuration.EN)

    def bus_master(self, on: bool) -> None:
        self.guest.write16(PCI_COMMAND, BUS_MASTER if on else NO_BUS_MASTER, PciRegion.CONFIG)

    def close(self) -> None:
        self._closing.close()


def controller_of(*storages: MemoryStorage, **options: object) -> Nvme:
    """A controller with a namespace for each storage."""
    device = Nvme(**{"path": ""} | options)
    for storage in storages:
        device.add_namespace(storage)
    return device


@contextlib.contextmanager
def gated(
    *storages: GatedStorage, memory_size: int = 2 << 20, shared: bool = True, **options: object
) -> Iterator[Desk]:
    """A desk with these, whose gates are open when it is left."""
    with contextlib.ExitStack() as closing:
        desk = Desk(controller_of(*storages, **options), memory_size=memory_size, shared=shared)
        closing.callback(desk.close)
        for storage in storages:
            closing.callback(storage.gate.set)
        yield desk


def settle(device: Nvme) -> None:
    """Have everything end that is under way in a device that nobody serves."""
    while device.executor.workers:
        device.executor.workers.wait(TIMEOUT)
        device.executor.land()


class DirectRegisters:
    """Registers of a device that nobody serves: each access is a call, made by whoever makes it."""

    def __init__(self, device: Nvme) -> None:
        self.device = device

    def _read(self, offset: int, size: int) -> int:
        data = bytearray(size)
        self.device.region_read(PciRegion.BAR0, offset, memoryview(data))
        return int.from_bytes(data, "little")

    def _write(self, offset: int, value: int, size: int) -> None:
        self.device.region_write(PciRegion.BAR0, offset, memoryview(value.to_bytes(size, "little")))

    def read32(self, offset: int) -> int:
        return self._read(offset, 4)

    def read64(self, offset: int) -> int:
        return self._read(offset, 8)

    def write32(self, offset: int, value: int) -> None:
        self._write(offset, value, 4)

    def write64(self, offset: int, value: int) -> None:
        self._write(offset, value, 8)

    ring = write32


class MessageGuest:
    """Guest memory that a device reaches by messages. ``touched`` is called before each, as a client that does
    something of its own before it answers; a session serves that meanwhile.
    """

    def __init__(self, device: Nvme, size: int = 1 << 20) -> None:
        self.memory = bytearray(size)
        self.touched: Callable[[int], None] = lambda address: None
        device.dma.messages = self
        device.dma.map(0, size, 3)
        device.region_write(PciRegion.CONFIG, PCI_COMMAND, memoryview(BUS_MASTER.to_bytes(2, "little")))

    def dma_read(self, address: int, buffer: memoryview) -> None:
        self.touched(address)
        buffer[:] = self.memory[address : address + len(buffer)]

    def dma_write(self, address: int, data: memoryview) -> None:
        self.touched(address)
        self.memory[address : address + len(data)] = data
