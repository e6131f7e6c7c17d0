"""What has an NVMe controller stand still though it is enabled: its bus master bit, memory or a client that goes.

It touches no memory of the guest then, and loses nothing: what was rung for meanwhile is carried out afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vfio_user.devices.nvme import Nvme, controller, standstill
from vfio_user.devices.nvme.constants import (
    DOORBELLS,
    Configuration,
    ControllerStatus,
    Feature,
    IoOpcode,
    Register,
)
from vfio_user.devices.nvme.storage.base import Views
from vfio_user.errors import CommandError
from vfio_user.fds import OwnedFd
from vfio_user.testing import FakeGuest
from vfio_user.testing.nvme import Command, NvmeDriver, SharedMemory, Ticket, io
from vfio_user.testing.nvme.access import ClientRegisters
from vfio_user.testing.nvme.bare import NORMAL_SHUTDOWN
from vfio_user.testing.nvme.data import Buffer
from vfio_user.testing.nvme.queues import QueuePair
from vfio_user.wire.constants import DeviceState, PciRegion

from .nvme_gate_support import (
    BLOCK,
    BUS_MASTER,
    NO_BUS_MASTER,
    PCI_COMMAND,
    Desk,
    DirectRegisters,
    GatedStorage,
    MessageGuest,
    SlowToAcquire,
    controller_of,
    gated,
    settle,
    until,
)

pytestmark = pytest.mark.timeout(60)

SOON = 0.2
"""Seconds that the storage may take where the bus master bit waits for it."""
FLUSH = Command(IoOpcode.FLUSH, 1)


def read_of(buffer: Buffer) -> Command:
    return io(IoOpcode.READ, 1, 0, 1, buffer)


def all_ended(device: Nvme) -> bool:
    """Whether the workers have ended what they were at."""
    try:
        device.executor.workers.wait(0)
    except OSError:
        return False
    return True


def done(desk: Desk, ticket: Ticket) -> bool:
    """Whether the completion of a command stands in its queue, after all that was asked for has happened."""
    for _ in range(3):
        desk.nudge()
    ticket.pair.reap()
    return ticket.done


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who clears the bus master bit soon has an answer, and who leaves is soon gone."""
    for timeout in ("BUS_MASTER_TIMEOUT", "QUIESCE_TIMEOUT"):
        monkeypatch.setattr(standstill, timeout, SOON)


# The bus master bit


@contextlib.contextmanager
def by_messages(storage: GatedStorage) -> Iterator[tuple[Nvme, MessageGuest, QueuePair, Buffer]]:
    """A controller that nobody serves, whose guest's memory goes by messages; a queue pair, and room for a block."""
    with contextlib.closing(controller_of(storage)) as device:
        guest = MessageGuest(device)
        driver = NvmeDriver(DirectRegisters(device), SharedMemory(memoryview(guest.memory)))
        driver.enable()
        queue = driver.create_queue_pair()
        with driver.buffers.prp(BLOCK) as buffer:
            yield device, guest, queue, buffer


class TestBusMaster:
    """PCI: a host that clears it wants its memory left alone; kexec does, and whoever takes a device away."""

    def test_nothing_is_fetched(self) -> None:
        storage = GatedStorage()
        with gated(storage) as desk:
            queue = desk.driver.create_queue_pair()
            desk.bus_master(False)
            ticket = queue.submit(FLUSH)
            assert (done(desk, ticket), storage.calls) == (False, [])
            desk.bus_master(True)
            assert desk.driver.complete(ticket).status == "SUCCESS"

    def test_shadow_doorbells_are_not_looked_at(self) -> None:
        """Nobody rings for them again: they are looked at when DMA is allowed."""
        storage = GatedStorage()
        with gated(storage) as desk:
            queue = desk.driver.create_queue_pair()
            desk.driver.enable_shadow_doorbells()
            desk.driver.flush()
            desk.bus_master(False)
            tickets = [queue.submit(FLUSH) for _ in range(5)]
            assert not any(done(desk, ticket) for ticket in tickets)
            desk.bus_master(True)
            assert [desk.driver.complete(ticket).status for ticket in tickets] == ["SUCCESS"] * 5

    def test_workers_end_before_the_bit_is_cleared(self) -> None:
        """Else they would touch memory afterwards. It is completed when that is allowed."""
        storage = GatedStorage(shut=True)
        with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            queue = desk.driver.create_queue_pair()
            ticket = queue.submit(read_of(buffer))
            storage.wait_for(1)
            opener = threading.Timer(0.1, storage.gate.set)
            opener.start()
            desk.bus_master(False)
            assert all_ended(desk.device)
            assert not done(desk, ticket)
            desk.bus_master(True)
            assert desk.driver.complete(ticket).status == "SUCCESS"
            opener.join()

    @pytest.mark.parametrize("shared", [True, False], ids=["mapped", "by messages"])
    def test_what_hangs_is_completed_when_dma_is_allowed_again(self, impatient: None, shared: bool) -> None:
        storage = GatedStorage(shut=True)
        with gated(storage, shared=shared) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            ticket = desk.driver.create_queue_pair().submit(read_of(buffer))
            until(lambda: (desk.driver.status, storage.calls)[1])
            desk.bus_master(False)
            storage.gate.set()
            until(lambda: all_ended(desk.device))
            assert not done(desk, ticket)
            assert desk.driver.status == ControllerStatus.RDY
            desk.bus_master(True)
            assert desk.driver.complete(ticket).status == "SUCCESS"
            desk.driver.flush()

    def test_is_cleared_while_data_go_by_messages(self) -> None:
        """The client writes config space before it answers: that must not wait for the command that waits for it."""
        storage = GatedStorage()
        with by_messages(storage) as (device, guest, queue, buffer):
            command = read_of(buffer)
            page = int.from_bytes(command.pointer[:8], "little")
            guest.touched = lambda address: set_bus_master(device, False) if address == page else None
            tickets = queue.submit_many([command] * 5)
            settle(device)
            for _ in tickets:  # it is cleared with each of them
                set_bus_master(device, True)
                settle(device)
            queue.reap()
            assert [ticket.done for ticket in tickets] == [True] * 5

    def test_is_cleared_by_a_client_that_answers_nothing_meanwhile(self) -> None:
        """Nothing is asked of it before its write is answered."""
        storage = GatedStorage(shut=True)
        with by_messages(storage) as (device, guest, queue, buffer):
            ticket = queue.submit(read_of(buffer))
            storage.wait_for(1)
            asked: list[int] = []
            guest.touched = asked.append
            opener = threading.Timer(0.1, storage.gate.set)
            opener.start()
            set_bus_master(device, False)
            assert asked == []
            set_bus_master(device, True)
            settle(device)
            queue.reap()
            opener.join()
            assert ticket.done

    def test_comes_back_before_the_memory_does(self, impatient: None) -> None:
        """What was withheld waits for either."""
        storage = GatedStorage(shut=True)
        with movable(storage) as (desk, memory), desk.driver.buffers.prp(BLOCK) as buffer:
            ticket = desk.driver.create_queue_pair().submit(read_of(buffer))
            storage.wait_for(1)
            desk.bus_master(False)
            storage.gate.set()
            until(lambda: all_ended(desk.device))
            memory.unmap(0, SIZE)
            desk.bus_master(True)
            assert not done(desk, ticket)
            assert desk.driver.status == ControllerStatus.RDY
            memory.map(0, SIZE)
            assert done(desk, ticket)

    def test_a_shutdown_needs_none(self) -> None:
        """3.1.5: what was written is to be safe, that is all."""
        storage = GatedStorage()
        with gated(storage) as desk:
            desk.bus_master(False)
            desk.configure(set=NORMAL_SHUTDOWN)
            desk.driver.wait_status(ControllerStatus.SHST, ControllerStatus.SHST_COMPLETE)
            assert storage.calls == ["flush"]

    def test_no_unmap_has_it_completed(self, impatient: None) -> None:
        """Whoever takes memory away waits for what is under way: that is all, as long as DMA is not allowed."""
        storage = GatedStorage(shut=True)
        with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer, more_memory(desk.guest):
            ticket = desk.driver.create_queue_pair().submit(read_of(buffer))
            storage.wait_for(1)
            desk.bus_master(False)
            storage.gate.set()
            desk.guest.client.dma_unmap(MORE, PAGE)
            assert all_ended(desk.device)
            assert not done(desk, ticket)
            desk.bus_master(True)
            assert desk.driver.complete(ticket).status == "SUCCESS"

    def test_a_reset_ends_it_without_a_word(self, impatient: None) -> None:
        """3.1.5: with EN 0 there are no queues any more: the next host finds a good controller."""
        storage = GatedStorage(shut=True)
        with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            queue = desk.driver.create_queue_pair()
            ticket = queue.submit(read_of(buffer))
            storage.wait_for(1)
            desk.bus_master(False)
            storage.gate.set()
            until(lambda: all_ended(desk.device))
            desk.begin_reset()
            desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus(0))
            assert not done(desk, ticket)
            desk.bus_master(True)
            desk.driver.enable()
            desk.driver.create_queue_pair()
            assert desk.driver.read(1, 0, 1) == bytes(BLOCK)

    def test_events_wait(self) -> None:
        """5.2: their completions are DMA like any other."""
        with gated(GatedStorage()) as desk:
            desk.driver.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 1 << 8)
            waiting = desk.driver.async_event()
            desk.bus_master(False)
            desk.in_device(lambda: desk.device.add_namespace(GatedStorage()))
            desk.guest.write32(DOORBELLS + 8 * 60, 1)
            assert not done(desk, waiting)
            desk.bus_master(True)
            desk.driver.event(waiting)

    def test_a_controller_is_enabled_without(self) -> None:
        """3.1.5: that touches no memory."""
        with gated(GatedStorage()) as desk:
            desk.driver.disable()
            desk.bus_master(False)
            desk.driver.enable()
            ticket = desk.driver.admin_queue.submit(Command(0x0A, cdw10=Feature.ARBITRATION))
            assert not done(desk, ticket)
            desk.bus_master(True)
            assert desk.driver.complete(ticket).status == "SUCCESS"

    def test_it_migrates(self) -> None:
        """The bit and what was rung for come along: carried out where the host allows it."""
        there_storage = GatedStorage()
        with gated(GatedStorage(), serial="same") as here, gated(there_storage, serial="same") as there:
            queue = here.driver.create_queue_pair()
            here.bus_master(False)
            ticket = queue.submit(Command(IoOpcode.VERIFY, 1))
            move(here, there)
            there.nudge()
            assert "read" not in there_storage.calls
            assert not done(there, ticket)
            there.bus_master(True)
            assert here.driver.complete(ticket).status == "SUCCESS"

    def test_what_hung_is_not_lost_by_a_migration(self, impatient: None) -> None:
        """A completion that is owed does not travel: whoever stops the device has it told."""
        storage = GatedStorage(shut=True)
        with (
            gated(storage, serial="same") as here,
            gated(GatedStorage(), serial="same") as there,
            here.driver.buffers.prp(BLOCK) as buffer,
        ):
            ticket = here.driver.create_queue_pair().submit(read_of(buffer))
            storage.wait_for(1)
            here.bus_master(False)
            storage.gate.set()
            move(here, there)
            there.bus_master(True)
            assert here.driver.complete(ticket).status == "SUCCESS"


def set_bus_master(device: Nvme, on: bool) -> None:
    command = BUS_MASTER if on else NO_BUS_MASTER
    device.region_write(PciRegion.CONFIG, PCI_COMMAND, memoryview(command.to_bytes(2, "little")))


def move(here: Desk, there: Desk) -> None:
    """The device of one desk goes to the other, and its driver with it."""
    stream = here.guest.save()
    there.guest.memory[:] = here.guest.memory
    there.guest.load(stream)
    here.driver.move(ClientRegisters(there.guest.client), SharedMemory(there.guest.memory))


# Memory that goes, and comes back


PAGE, SIZE = 4096, 2 << 20
MORE = 1 << 40
"""Where there is memory that no queue is in."""


@contextlib.contextmanager
def more_memory(guest: FakeGuest) -> Iterator[None]:
    with OwnedFd(os.memfd_create("more", os.MFD_CLOEXEC)) as file:
        os.ftruncate(file.fileno(), PAGE)
        guest.client.dma_map(MORE, PAGE, file.fileno())
        yield


@pytest.mark.parametrize("ended", [True, False], ids=["before the reset", "after it"])
def test_a_reset_writes_nothing_either(impatient: None, ended: bool) -> None:
    """Of a read whose data goes by messages: the host may have booted another kernel there."""
    storage = GatedStorage(shut=True)
    with by_messages(storage) as (device, guest, queue, buffer):
        queue.submit(read_of(buffer))
        storage.wait_for(1)
        set_bus_master(device, False)
        if ended:
            storage.gate.set()
            until(lambda: all_ended(device))
            device.executor.land()
        guest.memory[:] = b"\xa5" * len(guest.memory)
        DirectRegisters(device).write32(Register.CC, 0)
        storage.gate.set()
        settle(device)
        assert guest.memory == b"\xa5" * len(guest.memory)


@pytest.mark.parametrize("shared", [True, False], ids=["mapped", "by messages"])
def test_who_asks_how_much_there_is_to_move_moves_nothing(impatient: None, shared: bool) -> None:
    """MIG_DATA_SIZE of a device that runs: what is under way goes on, what must not be completed is not."""
    storage = GatedStorage(shut=True)
    with gated(storage, shared=shared) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        ticket = desk.driver.create_queue_pair().submit(read_of(buffer))
        until(lambda: (desk.driver.status, storage.calls)[1])
        client = desk.guest.client
        client.migration_set_state(DeviceState.PRE_COPY)
        assert client.migration_data_size() > 0
        assert desk.device.executor.workers.undone() == 1
        desk.bus_master(False)
        storage.gate.set()
        until(lambda: all_ended(desk.device))
        assert client.migration_data_size() > 0
        assert not done(desk, ticket)
        desk.bus_master(True)
        assert desk.driver.complete(ticket).status == "SUCCESS"


class Movable:
    """A desk whose guest's memory is a file of which parts can be mapped, and taken away."""

    def __init__(self, desk: Desk) -> None:
        self.guest = desk.guest
        self._file = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC))
        os.ftruncate(self._file.fileno(), SIZE)
        self.guest.client.dma_unmap(0, SIZE)
        self.guest.memory = memoryview(mmap.mmap(self._file.fileno(), SIZE))
        self.map(0, SIZE)
        self.driver = desk.driver = NvmeDriver.of_client(self.guest.client, self.guest.memory)
        self.driver.enable()

    def map(self, start: int, end: int) -> None:
        self.guest.client.dma_map(start, end - start, self._file.fileno(), start)

    def unmap(self, start: int, end: int) -> None:
        self.guest.client.dma_unmap(start, end - start)


@contextlib.contextmanager
def movable(storage: GatedStorage) -> Iterator[tuple[Desk, Movable]]:
    with gated(storage, memory_size=SIZE) as desk:
        desk.driver.disable()
        yield desk, Movable(desk)


@pytest.mark.parametrize("shadow", [False, True], ids=["registers", "shadow doorbells"])
class TestMemory:
    """A VMM that lays its memory out anew, a vIOMMU: nothing of the queues was touched while they were nowhere."""

    def test_gone_and_back(self, shadow: bool) -> None:
        storage = GatedStorage()
        with movable(storage) as (desk, memory), desk.driver.buffers.prp(BLOCK) as buffer:
            self._prepare(desk, shadow)
            storage.gate.clear()
            ticket = desk.driver.first_queue.submit(read_of(buffer))
            storage.wait_for(2)
            opener = threading.Timer(0.1, storage.gate.set)
            opener.start()
            memory.unmap(0, SIZE)
            desk.nudge()
            memory.map(0, SIZE)
            assert desk.driver.complete(ticket).status == "SUCCESS"
            assert desk.driver.status == ControllerStatus.RDY
            desk.driver.flush()
            opener.join()

    def test_back_piece_by_piece(self, shadow: bool) -> None:
        """And commands that nobody had fetched: no ring will come for them."""
        storage = GatedStorage()
        with movable(storage) as (desk, memory), desk.driver.buffers.prp(BLOCK) as buffer:
            self._prepare(desk, shadow)
            storage.gate.clear()
            tickets = desk.driver.first_queue.submit_many([read_of(buffer)] * 300)
            storage.wait_for(2)
            storage.gate.set()
            memory.unmap(0, SIZE)
            for start in reversed(range(0, SIZE, SIZE // 8)):
                memory.map(start, start + SIZE // 8)
                desk.nudge()
            desk.driver.first_queue.drain()
            assert {desk.driver.complete(ticket).status for ticket in tickets} == {"SUCCESS"}

    def test_other_memory_is_nothing_to_wait_for(self, shadow: bool) -> None:
        """A vIOMMU takes the data's away after each command."""
        storage = GatedStorage()
        with movable(storage) as (desk, _), desk.driver.buffers.prp(BLOCK) as buffer:
            self._prepare(desk, shadow)
            storage.gate.clear()
            with more_memory(desk.guest):
                tickets = desk.driver.first_queue.submit_many([read_of(buffer)] * 300)
                storage.wait_for(2)
                storage.gate.set()
                desk.guest.client.dma_unmap(MORE, PAGE)
            desk.driver.first_queue.drain()
            assert {desk.driver.complete(ticket).status for ticket in tickets} == {"SUCCESS"}

    def test_a_ring_for_what_is_nowhere_is_fatal(self, shadow: bool) -> None:
        """9.5."""
        with movable(GatedStorage()) as (desk, memory):
            self._prepare(desk, shadow)
            memory.unmap(0, SIZE)
            desk.guest.write32(DOORBELLS + 8, 3)
            desk.driver.wait_status(ControllerStatus.CFS, ControllerStatus.CFS)
            memory.map(0, SIZE)
            desk.driver.enable()

    def test_a_host_that_begins_anew_elsewhere(self, shadow: bool) -> None:
        with movable(GatedStorage()) as (desk, memory):
            self._prepare(desk, shadow)
            memory.unmap(0, SIZE)
            desk.begin_reset()
            memory.map(0, SIZE)
            desk.driver.enable()
            desk.driver.create_queue_pair()
            desk.driver.flush()

    @staticmethod
    def _prepare(desk: Desk, shadow: bool) -> None:
        desk.driver.create_queue_pair(512)
        if shadow:
            desk.driver.enable_shadow_doorbells()
        desk.driver.flush()


# All of it, in any order


class SlowStorage(GatedStorage):
    """Commands are under way for a while."""

    def read(self, offset: int, views: Views) -> None:
        time.sleep(0.0005)
        super().read(offset, views)


class Juggler:
    """Takes away what the controller needs, and gives it back; submits commands whenever a guest could."""

    def __init__(self, desk: Desk, memory: Movable, command: Command) -> None:
        self._desk, self._memory, self._command = desk, memory, command
        self._mapped = self._runs = True
        self.tickets: list[Ticket] = []

    def submit(self, count: int) -> None:
        queue = self._desk.driver.first_queue
        if self._mapped and self._runs:
            self.tickets += queue.submit_many([self._command] * min(count, queue.sq.room))

    def bus_master(self, on: bool) -> None:
        self._desk.bus_master(on)

    def memory(self, on: bool) -> None:
        if on != self._mapped:
            (self._memory.map if on else self._memory.unmap)(0, SIZE)
            self._mapped = on

    def run(self, on: bool) -> None:
        if on != self._runs:
            try:
                self._desk.guest.client.migration_set_state(DeviceState.RUNNING if on else DeviceState.STOP)
            except CommandError as error:
                if self._mapped or error.errno != errno.EBUSY:  # completions do not travel
                    raise
            else:
                self._runs = on

    def reap(self, on: bool) -> None:
        if self._mapped and self._runs:
            self._desk.nudge()
            self._desk.driver.first_queue.reap()


STEPS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 60)),
    st.tuples(st.sampled_from(["bus_master", "memory", "run", "reap"]), st.booleans()),
)


@pytest.mark.parametrize("shadow", [False, True], ids=["registers", "shadow doorbells"])
@settings(max_examples=25, deadline=None)
@given(plan=st.lists(STEPS, max_size=20))
@example(plan=[("submit", 60), ("bus_master", False), ("memory", False), ("run", False), ("bus_master", True)])
def test_whatever_is_taken_away_no_command_is_lost(shadow: bool, plan: list[tuple[str, int]]) -> None:
    """Each command ends, once and well, after all has been given back; the controller does not fail over it."""
    with movable(SlowStorage()) as (desk, memory), desk.driver.buffers.prp(BLOCK) as buffer:
        desk.driver.create_queue_pair(128)
        if shadow:
            desk.driver.enable_shadow_doorbells()
        juggler = Juggler(desk, memory, read_of(buffer))
        for name, value in [*plan, ("memory", True), ("run", True), ("bus_master", True)]:
            getattr(juggler, name)(value)
        desk.driver.first_queue.drain()
        assert {desk.driver.complete(ticket).status for ticket in juggler.tickets} <= {"SUCCESS"}
        assert desk.driver.status == ControllerStatus.RDY


# A client that goes


@contextlib.contextmanager
def guest_memory() -> Iterator[tuple[OwnedFd, memoryview]]:
    """Memory of a guest that is longer there than its VMM."""
    with OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC)) as file:
        os.ftruncate(file.fileno(), SIZE)
        yield file, memoryview(mmap.mmap(file.fileno(), SIZE))


@contextlib.contextmanager
def client_of(device: Nvme, file: OwnedFd) -> Iterator[FakeGuest]:
    """A VMM whose guest has that memory."""
    with FakeGuest(device, memory_size=PAGE, memory_address=MORE) as guest:
        guest.client.dma_map(0, SIZE, file.fileno())
        yield guest


def test_who_comes_next_may_be_another_guest() -> None:
    """A VMM is killed with commands in its queues. The next one has other memory at these addresses: nothing of that
    is touched, until a guest rings that knows of the queues, or resets the controller.
    """
    storage = GatedStorage(shut=True)
    with contextlib.closing(controller_of(storage)) as device, guest_memory() as (file, memory):
        with client_of(device, file) as guest:
            driver = NvmeDriver.of_client(guest.client, memory)
            driver.enable()
            queue = driver.create_queue_pair(512)
            with driver.buffers.prp(BLOCK) as buffer:
                queue.submit_many([read_of(buffer)] * 300)
            storage.wait_for(1)
            opener = threading.Timer(0.2, storage.gate.set)  # when the server waits for those that were fetched
            opener.start()
        opener.join()
        with FakeGuest(device, memory_size=SIZE) as stranger:
            for _ in range(3):
                stranger.read32(Register.CSTS)
            assert bytes(stranger.memory) == bytes(SIZE)
            assert device.csts == ControllerStatus.RDY
        with client_of(device, file) as guest:
            driver.move(ClientRegisters(guest.client), SharedMemory(memory))
            queue.sq.ring_doorbell()
            queue.drain()
            driver.flush()
            driver.disable()


@pytest.mark.parametrize("shared", [True, False], ids=["mapped", "by messages"])
def test_what_the_last_client_left_behind_does_not_reach_the_next(impatient: None, shared: bool) -> None:
    """The storage hangs when a client leaves, and comes to itself when another one is there."""
    storage = GatedStorage(shut=True)
    with contextlib.closing(controller_of(storage)) as device:
        with FakeGuest(device, memory_size=SIZE, shared=shared) as guest:
            driver = NvmeDriver.of_client(guest.client, guest.memory)
            driver.enable()
            with driver.buffers.prp(BLOCK) as buffer:
                driver.create_queue_pair().submit(read_of(buffer))
            until(lambda: (driver.status, storage.calls)[1])
        with FakeGuest(device, memory_size=SIZE, shared=shared) as stranger:
            stranger.memory[:] = b"\xa5" * SIZE
            storage.gate.set()
            until(lambda: all_ended(device))
            for _ in range(3):
                stranger.read32(Register.CSTS)
            assert bytes(stranger.memory) == b"\xa5" * SIZE
            NvmeDriver.of_client(stranger.client, stranger.memory).enable()


def test_who_comes_back_has_to_ring() -> None:
    """The server looked at shadow doorbells until its client left: nobody does now, and nobody else rings."""
    with contextlib.closing(Nvme(size=1 << 20)) as device, guest_memory() as (file, memory):
        with client_of(device, file) as guest:
            driver = NvmeDriver.of_client(guest.client, memory)
            driver.enable()
            queue = driver.create_queue_pair(64)
            driver.enable_shadow_doorbells()
            doorbell, unrung = queue.sq.doorbell, 0
            while unrung < 5:
                before = doorbell.rung
                driver.flush()
                unrung = unrung + 1 if doorbell.rung == before else 0
        with client_of(device, file) as guest:
            driver.move(ClientRegisters(guest.client), SharedMemory(memory))
            driver.flush()


def test_a_namespace_that_comes_while_nobody_is_there() -> None:
    """The event waits for a host: there is no memory to tell it in, which is no reason to fail."""
    with contextlib.closing(Nvme(size=1 << 20)) as device, guest_memory() as (file, memory):
        with client_of(device, file) as guest:
            driver = NvmeDriver.of_client(guest.client, memory)
            driver.enable()
            driver.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 1 << 8)
            waiting = driver.async_event()
            guest.read32(Register.CSTS)
        device.add_namespace(GatedStorage())
        with client_of(device, file) as guest:
            driver.move(ClientRegisters(guest.client), SharedMemory(memory))
            assert driver.active_namespaces() == [1, 2]
            driver.event(waiting)
            assert driver.status == ControllerStatus.RDY


# Migration


def test_a_storage_that_hangs_when_all_is_to_be_durable(impatient: None) -> None:
    """Then the device does not stop, and goes on as soon as the storage does."""
    storage = GatedStorage()
    with gated(storage) as desk:
        desk.driver.create_queue_pair()
        desk.driver.flush()
        storage.gate.clear()
        with pytest.raises(CommandError) as caught:
            desk.guest.client.migration_set_state(DeviceState.STOP)
        assert caught.value.errno == errno.ETIMEDOUT
        assert desk.guest.client.migration_get_state() is DeviceState.RUNNING
        storage.gate.set()
        desk.driver.flush()
        desk.guest.client.migration_set_state(DeviceState.STOP)
        assert not storage.acquired


def test_a_storage_that_hangs_when_the_guest_comes(impatient: None) -> None:
    """Then the device does not run, and the storage is left to the other side when it comes to itself."""
    storage = SlowToAcquire()
    with gated(storage) as desk:
        client = desk.guest.client
        client.migration_set_state(DeviceState.STOP)
        storage.gate.clear()
        storage.calls.clear()
        for _ in range(2):
            with pytest.raises(CommandError) as caught:
                client.migration_set_state(DeviceState.RUNNING)
            assert caught.value.errno == errno.ETIMEDOUT
            assert client.migration_get_state() is DeviceState.STOP
        assert storage.calls == ["acquire"]
        storage.gate.set()
        until(lambda: all_ended(desk.device))
        assert not storage.acquired
        client.migration_set_state(DeviceState.RUNNING)
        assert storage.acquired
        desk.driver.create_queue_pair()
        desk.driver.flush()


def test_a_stopped_controller_takes_no_storage() -> None:
    """It is another's; enabled meanwhile, it is ready as soon as it runs."""
    storage = GatedStorage()
    with gated(storage) as desk:
        desk.driver.disable()
        desk.guest.client.migration_set_state(DeviceState.STOP)
        desk.configure(set=Configuration.EN)
        desk.nudge()
        assert not storage.acquired
        assert all_ended(desk.device)
        desk.guest.client.migration_set_state(DeviceState.RUNNING)
        desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus.RDY)
        assert storage.acquired


def test_one_that_is_about_to_be_enabled_moves() -> None:
    with gated(GatedStorage(), serial="same") as here, gated(GatedStorage(), serial="same") as there:
        here.driver.disable()
        here.guest.client.migration_set_state(DeviceState.STOP)
        here.configure(set=Configuration.EN)
        move(here, there)
        there.driver.wait_status(ControllerStatus.RDY, ControllerStatus.RDY)


# The end


def test_a_storage_that_hangs_is_not_closed_under_its_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its descriptor's number could be another file's when the write goes on. What nobody has begun never is."""
    monkeypatch.setattr(standstill, "QUIESCE_TIMEOUT", SOON)
    monkeypatch.setattr(controller, "CLOSE_TIMEOUT", SOON)
    storage = GatedStorage(shut=True)
    device = controller_of(storage, threads=4)
    try:
        with FakeGuest(device, memory_size=SIZE) as guest:
            driver = NvmeDriver.of_client(guest.client, guest.memory)
            driver.enable()
            with driver.buffers.prp(BLOCK) as buffer:
                driver.create_queue_pair(64).submit_many([io(IoOpcode.WRITE, 1, 0, 1, buffer)] * 50)
            storage.wait_for(4)
        device.close()
        assert not storage.closed
        assert "is not closed: [Errno 110] 4 commands are still at the storage" in caplog.text
        storage.gate.set()
        until(lambda: all_ended(device))
        assert storage.calls == ["write"] * 4
        device.close()
        assert storage.closed
    finally:
        storage.gate.set()
        device.close()
