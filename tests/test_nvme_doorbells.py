"""Shadow doorbells and a server that looks at them before it sleeps (7.13): meanwhile nobody has to ring."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import IoOpcode
from vfio_user.fds import OwnedFd
from vfio_user.testing.nvme import Command, NvmeDriver, SharedMemory
from vfio_user.testing.nvme.queues import QueuePair
from vfio_user.wire.constants import PciRegion

from .nvme_gate_support import BUS_MASTER, PCI_COMMAND, DirectRegisters

pytestmark = pytest.mark.timeout(60)

MEMORY = 1 << 20
READ_WRITE = 3
ADVICE = Command(IoOpcode.DATASET_MANAGEMENT, 1)
"""It asks for nothing, and no worker is needed for it."""
BAD = 0x7FFF
"""No tail of any queue."""
DEPTH = 16


class Spinning:
    """The link of a server that spins; what is deferred is done at once."""

    spin = 1e-4

    def defer(self, work: Callable[[], None]) -> None:
        work()

    def watch(self, fd: int, ready: Callable[[], None]) -> None: ...

    def unwatch(self, fd: int) -> None: ...

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
    file: OwnedFd

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

    def unmap(self) -> None:
        self.device.dma_unmap(0, 0, MEMORY)

    def map(self) -> None:
        self.device.dma_map(READ_WRITE, 0, 0, MEMORY, OwnedFd(os.dup(self.file.fileno())))


@contextlib.contextmanager
def table(link: Spinning) -> Iterator[Table]:
    with contextlib.closing(Nvme(size=1 << 16)) as device, OwnedFd(os.memfd_create("guest")) as file:
        os.ftruncate(file.fileno(), MEMORY)
        with mmap(file.fileno(), MEMORY) as memory, memoryview(memory) as view:
            device.connected(link)
            device.region_write(PciRegion.CONFIG, PCI_COMMAND, memoryview(BUS_MASTER.to_bytes(2, "little")))
            device.dma_map(READ_WRITE, 0, 0, MEMORY, OwnedFd(os.dup(file.fileno())))
            driver = NvmeDriver(DirectRegisters(device), SharedMemory(view))
            driver.enable()
            queue = driver.create_queue_pair(DEPTH)
            driver.enable_shadow_doorbells()
            yield Table(device, driver, queue, file)
            device.disconnected()


@pytest.fixture
def desk() -> Iterator[Table]:
    with table(Spinning()) as desk:
        desk.look(last=True)
        yield desk


def test_while_the_server_looks_nobody_rings(desk: Table) -> None:
    assert desk.submit()  # it slept
    assert len(desk.queue.reap()) == 1
    for _ in range(DEPTH - 1):
        assert not desk.submit()
        assert desk.look() == (True, 1)
        assert desk.look() == (False, 0)
    assert desk.submit()  # the host has come by the place where it was last asked to: once in each round of the queue


def test_before_it_sleeps_the_host_is_asked_to_ring(desk: Table) -> None:
    desk.submit()
    desk.queue.reap()
    assert desk.look(last=True) == (False, 0)
    assert desk.submit()


def test_what_came_in_the_last_moment_is_done(desk: Table) -> None:
    desk.submit()
    desk.queue.reap()
    assert not desk.submit()
    assert desk.look(last=True) == (True, 1)


def test_a_server_that_does_not_spin_asks_for_every_ring() -> None:
    link = Spinning()
    link.spin = 0.0
    with table(link) as desk:
        for _ in range(3):
            assert desk.submit()
            assert len(desk.queue.reap()) == 1


def test_a_doorbell_beyond_the_queue_is_no_work(desk: Table) -> None:
    """Else the server would look for ever, and find it every time."""
    memory = desk.driver.hardware.memory
    assert desk.driver.shadow_pages is not None
    memory.write(desk.driver.shadow_pages[0] + 8, BAD.to_bytes(4, "little"))
    assert desk.look() == (False, 0)
    assert desk.look(last=True) == (False, 0)


def test_memory_that_comes_back_is_looked_at_again(desk: Table) -> None:
    desk.submit()
    desk.queue.reap()
    desk.unmap()
    assert desk.look() == (False, 0)
    desk.map()
    assert not desk.submit()
    assert desk.look() == (True, 1)


@pytest.mark.parametrize("last", [False, True])
def test_without_its_memory_there_is_nothing_to_see(desk: Table, last: bool) -> None:
    desk.submit()
    desk.queue.reap()
    desk.unmap()
    assert desk.look(last=last) == (False, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["submit", "look", "sleep"]), max_size=60))
def test_no_command_is_ever_left_behind(steps: list[str]) -> None:
    """Whatever the order: when the server sleeps, everything is done that was submitted without a ring before, and
    what is submitted after that is rung for."""
    with table(Spinning()) as desk:
        asleep, waiting = False, 0
        for step in steps:
            if step == "submit" and waiting < DEPTH - 1:
                waiting += 1
                if desk.submit():
                    asleep = False
                assert not asleep
            elif step == "look" and not asleep:
                desk.device.look_for_work(last=False)
            elif step == "sleep" and not asleep:
                asleep = not desk.device.look_for_work(last=True)
            waiting -= len(desk.queue.reap())
            assert not (asleep and waiting)
