"""A guest with a disk moves, back and forth, while it writes: each block is what the driver was told in the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vfio_user.client import Client
from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import AsyncEvent, Feature, IoOpcode, LogPage
from vfio_user.live import LocalDestination, MemoryRegion, Migration, Status
from vfio_user.testing import FakeGuest
from vfio_user.testing.nvme import ClientInterrupts, Command, NvmeDriver, SharedMemory, Ticket, io
from vfio_user.testing.nvme.access import ClientRegisters
from vfio_user.testing.nvme.workload import LoggedMemory, NvmeWorkload
from vfio_user.wire.constants import PciIrq, PciRegion

pytestmark = pytest.mark.timeout(60)

BLOCK, BLOCKS = 512, 8192
MEMORY = 4 << 20
TIMEOUT = 8.0
QUICK: dict[str, Any] = {"downtime": 0.0, "max_rounds": 3, "force": True}
"""A guest that never rests never converges: three rounds, and over."""


class Host:
    """One side: a controller, its client, guest memory that knows what the driver writes, interrupts."""

    def __init__(self, device: Nvme) -> None:
        self.device = device
        self.guest = FakeGuest(device, memory_size=MEMORY, timeout=TIMEOUT)
        self.client = self.guest.client
        self.memory = LoggedMemory(SharedMemory(self.guest.memory))
        self.interrupts = ClientInterrupts(self.client)
        self.registers = ClientRegisters(self.client)

    def close(self) -> None:
        self.interrupts.close()
        self.guest.close()
        self.device.close()

    @property
    def regions(self) -> list[MemoryRegion]:
        return [MemoryRegion(0, self.guest.memory)]


class MovingGuest:
    """A driver, and two hosts that it moves between. ``workload`` pauses for that, if there is one."""

    def __init__(self, make: Callable[[], Nvme]) -> None:
        self.workload: NvmeWorkload | None = None
        with contextlib.ExitStack() as stack:
            self.here, self.there = (stack.enter_context(contextlib.closing(Host(make()))) for _ in range(2))
            self._closing = stack.pop_all()
        self.here.client.region_write(PciRegion.CONFIG, 4, b"\6\0")
        self.driver = NvmeDriver(self.here.registers, self.here.memory, self.here.interrupts, timeout=TIMEOUT)

    def close(self) -> None:
        self._closing.close()

    def move(self, **options: Any) -> Migration:
        """From here to there."""
        self.there.guest.memory[:] = b"\xee" * MEMORY
        job = Migration(
            [self.here.client],
            LocalDestination([self.there.client], self.there.regions, resume=self._moved),
            memory=self.here.regions,
            guest_dirty=self.here.memory.dirty,
            pause=self._pause,
            resume=self._resume,
            **QUICK | options,
        )
        for _ in job.run():
            pass
        assert (job.report.status, job.report.error) == (Status.COMPLETED, None)
        return job

    def _moved(self) -> None:
        self.here, self.there = self.there, self.here
        self.driver.move(self.here.registers, self.here.memory, self.here.interrupts)
        self._resume()

    def _pause(self) -> None:
        if self.workload is not None:
            self.workload.pause()

    def _resume(self) -> None:
        if self.workload is not None:
            self.workload.start()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(BLOCKS * BLOCK)
    return path


Moving = Callable[..., MovingGuest]


@pytest.fixture
def moving(image: Path) -> Iterator[Moving]:
    """A guest whose two hosts have the same image, or other options; its controller is enabled."""
    with contextlib.ExitStack() as guests:

        def start(**options: Any) -> MovingGuest:
            guest = MovingGuest(lambda: Nvme(**{"path": str(image)} | options))
            guests.callback(guest.close)
            guest.driver.enable()
            return guest

        yield start


def at_work(guest: MovingGuest, **options: Any) -> NvmeWorkload:
    """A workload on three queues, with interrupts on vectors of their own."""
    for vector, depth in enumerate((16, 9, 32), start=1):
        guest.driver.create_queue_pair(depth, vector=vector)
    guest.workload = NvmeWorkload(guest.driver, blocks=BLOCKS, **options)
    guest.workload.start()
    return guest.workload


def checked(guest: MovingGuest, image: Path) -> None:
    """What the controller reads, and what is in the image, are what the driver was told."""
    assert guest.workload is not None
    assert guest.workload.verify() == []
    guest.driver.flush()
    assert guest.workload.verify_image(image.read_bytes()) == []


# Under load


@pytest.mark.parametrize("shadow", [False, True], ids=["doorbells", "shadow doorbells"])
def test_a_disk_that_moves_a_hundred_times(moving: Moving, image: Path, shadow: bool) -> None:
    """Fifty times each way of ringing, the block that was written last is what is there."""
    guest = moving()
    if shadow:
        guest.driver.enable_shadow_doorbells()
    workload = at_work(guest)
    for _ in range(50):
        done = workload.done
        guest.move()
        workload.wait(done + 10)
    checked(guest, image)


def test_memory_that_moves_with_its_controller(moving: Moving) -> None:
    """Nothing is shared: the disk itself goes along."""
    guest = moving(path="memory:", size=BLOCKS * BLOCK)
    workload = at_work(guest)
    for _ in range(5):
        guest.move()
        workload.wait(workload.done + 50)
    assert workload.verify() == []


def test_a_migration_that_fails_goes_on_where_it_was(moving: Moving, image: Path) -> None:
    guest = moving()
    workload = at_work(guest)
    workload.wait(100)
    other = Host(Nvme(path="memory:", size=BLOCK * 8))
    with contextlib.closing(other):
        job = Migration(
            [guest.here.client],
            LocalDestination([other.client], other.regions),
            memory=guest.here.regions,
            guest_dirty=guest.here.memory.dirty,
            pause=workload.pause,
            resume=workload.start,
            **QUICK,
        )
        with contextlib.suppress(Exception):
            for _ in job.run():
                pass
        assert job.report.status is Status.FAILED
    workload.wait(workload.done + 100)
    checked(guest, image)


# What else comes along


def test_commands_that_were_submitted_and_not_rung_for(moving: Moving) -> None:
    """They stand in the queue on the other side, and are done when the doorbell rings there."""
    guest = moving()
    queue = guest.driver.create_queue_pair(8)
    queue.sq.push(Command(IoOpcode.FLUSH, 1).pack(77))
    guest.move()
    queue.outstanding[77] = Ticket(queue, 77, "FLUSH")
    queue.sq.ring_doorbell()
    queue.drain()


def test_queues_of_every_kind_in_the_middle_of_their_rings(moving: Moving) -> None:
    """Scattered pages, several on one completion queue, odd places of head, tail and phase."""
    guest = moving()
    driver = guest.driver
    queues = [
        driver.create_queue_pair(300, contiguous=False),
        driver.create_queue_pair(5),
        driver.create_queue_pair(7, identifier=40, completion_depth=33),
        driver.create_queue_pair(2, identifier=41, completion_queue=40),
    ]
    for number, queue in enumerate(queues, start=1):
        for _ in range(3 * number + 1):
            driver.flush(queue=queue)
    for _ in range(3):
        guest.move()
        for number, queue in enumerate(queues):
            driver.write(1, number, bytes([number + 1]) * BLOCK, queue=queue)
            assert driver.read(1, number, 1, queue) == bytes([number + 1]) * BLOCK
    driver.delete_queue_pair(queues[3])
    driver.delete_queue_pair(queues[2])


def test_events_that_are_waited_for(moving: Moving) -> None:
    """The request goes along, and so does the event that nobody had asked for yet; what is masked stays so."""
    guest = moving()
    driver = guest.driver
    driver.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 1 << 8)
    waiting = driver.async_event()
    guest.move()
    assert not waiting.done
    driver.hardware.registers.ring(0x1000 + 8 * 9, 0)
    assert driver.event(waiting).name == AsyncEvent.INVALID_DOORBELL_REGISTER.name
    masked = driver.async_event()
    guest.move()
    driver.hardware.registers.ring(0x1000 + 8 * 9, 0)
    driver.get_feature(Feature.ARBITRATION)
    assert not masked.done
    guest.move()
    driver.log_page(LogPage.ERROR_INFORMATION, 64)
    assert driver.event(masked).name == AsyncEvent.INVALID_DOORBELL_REGISTER.name


def test_features_logs_and_identity(moving: Moving) -> None:
    guest = moving()
    driver = guest.driver
    driver.create_queue_pair()
    values = {Feature.INTERRUPT_COALESCING: 0x0203, Feature.VOLATILE_WRITE_CACHE: 0, Feature.ARBITRATION: 0x0403_0201}
    for feature, value in values.items():
        driver.set_feature(feature, value)
    driver.set_timestamp(1_700_000_000_000)
    driver.complete(driver.queues[0].submit(io(IoOpcode.VERIFY, 1, BLOCKS, 1)))
    driver.write(1, 0, os.urandom(BLOCK))
    before = driver.identify(1), driver.identify(0, 1), driver.identify(3, 1)
    health = driver.log_page(LogPage.SMART_HEALTH, 512)
    errors = driver.log_page(LogPage.ERROR_INFORMATION, 64)
    guest.move()
    assert (driver.identify(1), driver.identify(0, 1), driver.identify(3, 1)) == before
    assert {feature: driver.get_feature(feature) for feature in values} == values
    assert int.from_bytes(driver.get_timestamp()[:6], "little") - 1_700_000_000_000 < 1000 * TIMEOUT
    assert driver.log_page(LogPage.SMART_HEALTH, 512)[32:96] == health[32:96]
    assert driver.log_page(LogPage.ERROR_INFORMATION, 64) == errors


def enable_msix(client: Client) -> None:
    """As a guest does before it looks at its interrupts: in config space."""
    at = client.region_read(PciRegion.CONFIG, 0x34, 1)[0]
    while client.region_read(PciRegion.CONFIG, at, 1) != b"\x11":
        at = client.region_read(PciRegion.CONFIG, at + 1, 1)[0]
    client.region_write(PciRegion.CONFIG, at + 2, b"\0\x80")


def test_an_interrupt_that_nobody_took(moving: Moving) -> None:
    """A completion was posted while no one listened: the interrupt comes where the guest is now."""
    guest = moving()
    driver, here = guest.driver, guest.here
    enable_msix(here.client)
    queue = driver.create_queue_pair(8, vector=3)
    here.interrupts.close()
    ticket = queue.submit(Command(IoOpcode.FLUSH, 1))
    while not here.guest.memory[queue.cq.ring.address(0) + 14] & 1:
        here.client.region_read(0, 0, 8)
    guest.move()
    assert guest.here.interrupts.take(3) == 1
    driver.complete(ticket)
    here.interrupts = ClientInterrupts(here.client)


def test_the_level_of_intx(moving: Moving) -> None:
    """It stays while a completion stands, wherever that is."""
    guest = moving()
    for host in (guest.here, guest.there):
        host.interrupts.close()
        host.interrupts = ClientInterrupts(host.client, PciIrq.INTX, 1)
    driver = guest.driver
    driver.hardware.interrupts = guest.here.interrupts
    queue = driver.create_queue_pair(8, vector=0)
    driver.flush()
    queue.submit(Command(IoOpcode.FLUSH, 1))
    while not guest.here.device.irq.asserted:
        guest.here.client.region_read(0, 0, 8)
    guest.move()
    assert guest.here.device.irq.asserted
    queue.drain()
    guest.here.client.region_read(0, 0, 8)
    assert not guest.here.device.irq.asserted


def test_a_controller_that_is_off_or_broken(moving: Moving) -> None:
    """What is not enabled, and what has failed, is the same on the other side; a reset brings it back there."""
    guest = moving()
    driver = guest.driver
    driver.disable()
    guest.move()
    assert not driver.status
    driver.enable()
    driver.hardware.registers.write64(0x28, 1 << 45)
    driver.disable()
    driver.prepare()
    driver.hardware.registers.write64(0x28, 1 << 45)
    driver.hardware.registers.write32(0x14, 0x0046_0001)
    driver.admin_queue.submit(Command(0))
    while not driver.status & 2:
        pass
    guest.move()
    assert driver.status & 2
    driver.enable()
    assert driver.identify_controller().nn
