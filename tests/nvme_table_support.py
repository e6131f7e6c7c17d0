"""A controller without a server: whoever calls it is its server, and has its memory before him."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import mmap

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import IoOpcode
from vfio_user.fds import OwnedFd
from vfio_user.testing.nvme import Command, NvmeDriver, SharedMemory
from vfio_user.testing.nvme.queues import QueuePair
from vfio_user.wire.constants import PciRegion

from .nvme_gate_support import BUS_MASTER, PCI_COMMAND, TIMEOUT, DirectRegisters

MEMORY = 1 << 20
READ_WRITE = 3
DEPTH = 16
ADVICE = Command(IoOpcode.DATASET_MANAGEMENT, 1)
"""It asks for nothing, and no worker is needed for it."""


class Spinning:
    """The link of a server that spins; what is deferred is done at once, and then what was posted."""

    spin = 1e-4

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[], None]] = {}

    def settle(self) -> None:
        """Do what was posted."""
        while ready := select.select(list(self.watched), [], [], 0)[0]:
            for fd in ready:
                self.watched[fd]()

    def defer(self, work: Callable[[], None]) -> None:
        work()
        self.settle()

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        self.watched[fd] = ready

    def unwatch(self, fd: int) -> None:
        del self.watched[fd]

    def stop(self) -> None:
        raise AssertionError

    def dma_read(self, address: int, buffer: memoryview) -> None:
        raise AssertionError("there is no memory that is reached by messages")

    def dma_write(self, address: int, data: memoryview) -> None:
        raise AssertionError("there is no memory that is reached by messages")


@dataclass
class Table:
    """A controller, looked at by who calls ``device.look_for_work``, and a driver with one queue pair."""

    device: Nvme
    driver: NvmeDriver
    queue: QueuePair
    memory: memoryview
    file: OwnedFd
    link: Spinning

    @property
    def rung(self) -> int:
        """Doorbell writes of the queue pair."""
        return self.queue.sq.doorbell.rung

    def submit(self) -> bool:
        """One more command; whether its doorbell was rung."""
        before = self.rung
        self.queue.submit(ADVICE)
        return self.rung > before

    def look(self, *, last: bool = False) -> tuple[bool, int]:
        """What a look says, and how many completions there are after it."""
        return self.device.look_for_work(last), len(self.queue.reap())

    def settle(self) -> None:
        """Wait until all that was submitted has completed."""
        executor, deadline = self.device.executor, time.monotonic() + TIMEOUT
        while executor.workers or executor.submissions[self.queue.sq.identifier].waiting:
            assert time.monotonic() < deadline
            executor.workers.wait(TIMEOUT)
            self.link.settle()

    def unmap(self) -> None:
        self.device.dma_unmap(0, 0, MEMORY)

    def map(self) -> None:
        self.device.dma_map(READ_WRITE, 0, 0, MEMORY, OwnedFd(os.dup(self.file.fileno())))


@contextlib.contextmanager
def table(link: Spinning, *, shadow: bool = True) -> Iterator[Table]:
    with contextlib.closing(Nvme(size=1 << 16)) as device, OwnedFd(os.memfd_create("guest")) as file:
        os.ftruncate(file.fileno(), MEMORY)
        with mmap(file.fileno(), MEMORY) as memory, memoryview(memory) as view:
            device.connected(link)
            device.region_write(PciRegion.CONFIG, PCI_COMMAND, memoryview(BUS_MASTER.to_bytes(2, "little")))
            device.dma_map(READ_WRITE, 0, 0, MEMORY, OwnedFd(os.dup(file.fileno())))
            driver = NvmeDriver(DirectRegisters(device), SharedMemory(view))
            driver.enable()
            queue = driver.create_queue_pair(DEPTH)
            if shadow:
                driver.enable_shadow_doorbells()
            yield Table(device, driver, queue, view, file, link)
            device.disconnected()
