"""An NVMe controller whose storage is slow, or hangs, while its guest resets, aborts, formats, migrates, or leaves.

Whatever comes: nothing touches guest memory or the storage after the controller said that it is done, nothing waits
that need not, and the next guest finds a good controller.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vfio_user import Client, Server
from vfio_user.devices.nvme import Nvme, standstill
from vfio_user.devices.nvme.complaints import Complaints
from vfio_user.devices.nvme.constants import (
    ALL_NAMESPACES,
    AdminOpcode,
    Configuration,
    ControllerStatus,
    Feature,
    IoOpcode,
    LogPage,
    Register,
)
from vfio_user.devices.nvme.execution import MAX_JOBS
from vfio_user.devices.nvme.features import Timestamp
from vfio_user.devices.nvme.storage.base import Views
from vfio_user.devices.nvme.storage.memory import MemoryStorage
from vfio_user.testing import FakeGuest
from vfio_user.testing.guest import map_memory
from vfio_user.testing.nvme import Command, NvmeDriver, SharedMemory, Ticket, io
from vfio_user.testing.nvme.access import ClientRegisters
from vfio_user.testing.nvme.bare import NORMAL_SHUTDOWN, configuration
from vfio_user.testing.nvme.commands import FUSED_FIRST, FUSED_SECOND
from vfio_user.testing.nvme.data import Buffer, prps
from vfio_user.testing.nvme.queues import QueuePair
from vfio_user.wire.constants import DeviceState, PciIrq, PciRegion

from .nvme_gate_support import (
    BLOCK,
    TIMEOUT,
    Desk,
    DirectRegisters,
    GatedStorage,
    MessageGuest,
    SlowToAcquire,
    controller_of,
    gated,
    settle,
)

pytestmark = pytest.mark.timeout(60)

MANY = 300
"""More commands than workers are given."""
SOON = 0.3
"""Seconds that a storage may take, where a test waits for that to pass."""
KEEP_ALIVE = 800
"""Milliseconds: long enough for a slow machine to say a word in, short enough to be waited for."""
PCI_EXPRESS, DEVICE_CONTROL, START_FLR = 0x10, 8, 1 << 15


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the storage soon gives up."""
    monkeypatch.setattr(standstill, "QUIESCE_TIMEOUT", SOON)


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def read_of(buffer: Buffer, blocks: int = 1) -> Command:
    return io(IoOpcode.READ, 1, 0, blocks, buffer)


def pair_of(expected: Buffer, data: Buffer) -> list[Command]:
    """COMPARE AND WRITE."""
    return [
        io(IoOpcode.COMPARE, 1, 0, 1, expected, flags=FUSED_FIRST),
        io(IoOpcode.WRITE, 1, 0, 1, data, flags=FUSED_SECOND),
    ]


def status_of(driver: NvmeDriver, ticket: Ticket) -> str:
    return driver.complete(ticket).status


def waits(desk: Desk, queue: QueuePair, count: int) -> bool:
    """Whether that many completions stand in the queue that the driver has not taken; fewer than it has places."""
    desk.nudge()
    last = queue.cq.head + count - 1
    phase = queue.cq.phase ^ (last >= queue.cq.size)
    return desk.guest.memory[queue.cq.ring.address(last % queue.cq.size) + 14] & 1 == phase


# Enabling


class TestEnable:
    """7.6.1: RDY may take its time, CAP.TO; the client has no such patience with a register write."""

    @pytest.fixture
    def storage(self) -> SlowToAcquire:
        return SlowToAcquire()

    @pytest.fixture
    def desk(self, storage: SlowToAcquire) -> Iterator[Desk]:
        with gated(storage) as desk:
            desk.driver.disable()
            storage.gate.clear()
            storage.calls.clear()
            desk.driver.prepare()
            desk.configure(set=configuration() | Configuration.EN)
            storage.wait_for(1)
            assert desk.driver.status == 0
            yield desk

    def test_serves_the_client_while_the_storage_is_sought(self, desk: Desk, storage: SlowToAcquire) -> None:
        storage.gate.set()
        desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus.RDY)
        desk.driver.create_queue_pair()
        desk.driver.flush()

    def test_is_taken_back(self, desk: Desk, storage: SlowToAcquire) -> None:
        """And done again: the second time counts, however the first one ends."""
        desk.begin_reset()
        desk.configure(set=Configuration.EN)
        storage.gate.set()
        desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus.RDY)
        assert storage.calls == ["acquire"] * 2
        assert storage.acquired
        desk.driver.create_queue_pair()
        desk.driver.flush()
        desk.begin_reset()
        until(lambda: not storage.acquired)

    def test_is_taken_back_for_good(self, desk: Desk, storage: SlowToAcquire) -> None:
        desk.begin_reset()
        storage.gate.set()
        until(lambda: not storage.acquired)
        assert desk.driver.status == 0

    def test_has_the_namespace_that_came_meanwhile(self, desk: Desk, storage: SlowToAcquire) -> None:
        other = GatedStorage()
        desk.in_device(lambda: desk.device.add_namespace(other))
        storage.gate.set()
        desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus.RDY)
        assert (storage.acquired, other.acquired) == (True, True)

    def test_is_for_good_though_a_migration_begins(self, desk: Desk, storage: SlowToAcquire) -> None:
        """Which has a controller that is not enabled leave its storage to others: one that is about to be keeps it."""
        desk.guest.client.migration_set_state(DeviceState.PRE_COPY)
        storage.gate.set()
        desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus.RDY)
        desk.driver.create_queue_pair()
        desk.driver.flush()
        assert storage.acquired

    def test_fails_where_one_of_two_cannot_be_had(self) -> None:
        """The other one is left to others; when the storage is back, so is the controller."""

        class Elsewhere(GatedStorage):
            def acquire(self) -> None:
                if not self.gate.is_set():
                    raise BlockingIOError(errno.EWOULDBLOCK, "somebody else uses it")
                super().acquire()

        good, bad = GatedStorage(), Elsewhere()
        with gated(good, bad) as desk:
            bad.gate.clear()
            desk.driver.disable()
            desk.configure(set=Configuration.EN)
            desk.driver.wait_status(ControllerStatus.CFS, ControllerStatus.CFS)
            assert not good.acquired
            bad.gate.set()
            desk.driver.enable()
            desk.driver.create_queue_pair()
            assert desk.driver.read(2, 0, 1) == bytes(BLOCK)


# Resets


class TestReset:
    def test_done_when_data_by_messages_are(self) -> None:
        """7.3.2, 3.1.6: once RDY is 0 the host may use its memory for something else."""
        storage = GatedStorage()
        with contextlib.closing(controller_of(storage)) as device:
            guest, driver = self._direct(device)
            pages, late = self._pages(driver), list[int]()

            def touched(address: int) -> None:
                if address == pages[0]:
                    self._disable(device)
                elif not driver.status & ControllerStatus.RDY:
                    late.append(address)

            guest.touched = touched
            driver.first_queue.submit(Command(IoOpcode.READ, 1, cdw12=15, pointer=prps(*pages)))
            settle(device)
            assert late == []
            assert driver.status == 0
            assert not storage.acquired

    def test_writes_nothing_into_a_storage_that_was_given_back(self) -> None:
        storage = GatedStorage()
        with contextlib.closing(controller_of(storage)) as device:
            guest, driver = self._direct(device)
            pages = self._pages(driver)
            guest.touched = lambda address: self._disable(device) if address == pages[0] else None
            driver.first_queue.submit(Command(IoOpcode.WRITE, 1, cdw12=15, pointer=prps(*pages)))
            settle(device)
            assert storage.trespasses == []
            assert driver.status == 0
            assert not storage.acquired

    @staticmethod
    def _direct(device: Nvme) -> tuple[MessageGuest, NvmeDriver]:
        guest = MessageGuest(device)
        driver = NvmeDriver(DirectRegisters(device), SharedMemory(memoryview(guest.memory)))
        driver.prepare()
        driver.hardware.registers.write32(Register.CC, configuration() | Configuration.EN)
        settle(device)
        driver.create_queue_pair()
        return guest, driver

    @staticmethod
    def _pages(driver: NvmeDriver) -> tuple[int, int]:
        """Two that do not follow each other: there is a message for each."""
        first, _, second = (driver.pages.allocate() for _ in range(3))
        return first, second

    @staticmethod
    def _disable(device: Nvme) -> None:
        registers = DirectRegisters(device)
        registers.write32(Register.CC, registers.read32(Register.CC) & ~Configuration.EN)

    def test_begins_nothing_more(self) -> None:
        """What no worker has begun never is: CAP.TO is not enough for a deep queue on a slow storage."""
        storage = GatedStorage(shut=True)
        with gated(storage, threads=4) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            desk.driver.create_queue_pair(512).submit_many([read_of(buffer)] * MANY)
            storage.wait_for(4)
            desk.begin_reset()
            assert desk.driver.status & ControllerStatus.RDY
            storage.gate.set()
            desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus(0))
            assert len(storage.calls) == 4
            assert desk.device.namespaces[1].busy == 0
            desk.driver.enable()
            desk.driver.create_queue_pair()
            assert desk.driver.read(1, 0, 1) == bytes(BLOCK)

    def test_ends_a_queue_that_is_being_deleted(self) -> None:
        """DELETE I/O SQ waits for the commands of its queue: a reset ends them, and their completions with them."""
        storage = GatedStorage(shut=True)
        with gated(storage, threads=4) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            queue = desk.driver.create_queue_pair(512)
            queue.submit_many([read_of(buffer)] * MANY)
            storage.wait_for(4)
            desk.driver.admin_queue.submit(Command(AdminOpcode.DELETE_IO_SQ, cdw10=queue.sq.identifier))
            desk.nudge()
            desk.begin_reset()
            storage.gate.set()
            until(lambda: not desk.driver.status & ControllerStatus.RDY)
            assert len(storage.calls) == 4
            assert queue.cq.take() == []

    def test_serves_the_client_while_dirty_data_become_durable(self) -> None:
        storage = GatedStorage()
        with gated(storage) as desk:
            desk.driver.create_queue_pair()
            desk.driver.write(1, 0, b"x" * BLOCK)
            storage.gate.clear()
            desk.begin_reset()
            storage.wait_for(2)
            assert storage.calls[-1] == "flush"
            assert desk.driver.status & ControllerStatus.RDY
            assert storage.acquired
            storage.gate.set()
            desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus(0))
            assert not storage.acquired
            assert not storage.dirty

    def test_lets_go_of_every_namespace_though_one_is_added(self) -> None:
        """A namespace comes while the first one is flushed: the second one is left to others all the same."""
        first, second = GatedStorage(), GatedStorage()
        with gated(first, second) as desk:
            desk.driver.create_queue_pair()
            desk.driver.write(1, 0, b"x" * BLOCK)
            first.gate.clear()
            desk.begin_reset()
            first.wait_for(2)
            desk.in_device(lambda: desk.device.add_namespace(GatedStorage()))
            first.gate.set()
            desk.driver.wait_status(ControllerStatus.RDY, ControllerStatus(0))
            assert (first.acquired, second.acquired) == (False, False)

    def test_of_the_function_keeps_what_is_being_written(self, impatient: None) -> None:
        """FLR while the storage hangs: no other server may have it before the last write has ended."""
        storage = GatedStorage(shut=True)
        with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            desk.driver.create_queue_pair().submit(io(IoOpcode.WRITE, 1, 0, 1, buffer))
            storage.wait_for(1)
            self._reset_function(desk.guest)
            until(lambda: desk.driver.status == 0)
            assert storage.acquired
            storage.gate.set()
            until(lambda: not storage.acquired)
            assert storage.trespasses == []
            assert not storage.dirty

    @staticmethod
    def _reset_function(guest: FakeGuest) -> None:
        config = guest.client.region_read(PciRegion.CONFIG, 0, 256)
        at = config[0x34]
        while config[at] != PCI_EXPRESS:
            at = config[at + 1]
        at += DEVICE_CONTROL
        guest.write16(at, guest.read16(at, PciRegion.CONFIG) | START_FLR, PciRegion.CONFIG)

    def test_of_the_device_forgets_how_long_a_burst_is(self) -> None:
        with contextlib.closing(Desk(Nvme(size=1 << 20))) as desk:
            burst = desk.device.executor.burst
            desk.driver.set_feature(Feature.ARBITRATION, 0)
            assert desk.device.executor.burst == 1
            desk.guest.reset()
            assert desk.device.executor.burst == burst


# A client that goes wrong


@contextlib.contextmanager
def with_a_raw_socket(device: Nvme) -> Iterator[tuple[Client, socket.socket]]:
    """A client of ``device``, and its socket for what no client sends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Server(device, sock=theirs) as server, ours.dup() as raw:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Client(ours, TIMEOUT) as client:
                yield client, raw
        finally:
            server.shutdown()
            thread.join(TIMEOUT)
            assert not thread.is_alive()


def test_a_garbled_answer_harms_no_other_guest() -> None:
    """A client answers the first of many DMA_WRITEs with three bytes: every command ends, for whoever comes next."""
    storage = GatedStorage(shut=True)
    with contextlib.closing(controller_of(storage)) as device:
        with with_a_raw_socket(device) as (client, raw), contextlib.ExitStack() as buffers:
            driver = NvmeDriver.of_client(client, map_memory(client, 8 << 20, shared=False))
            driver.enable()
            queue = driver.create_queue_pair(64)
            reads = [read_of(buffers.enter_context(driver.buffers.prp(128 << 10)), 256) for _ in range(16)]
            queue.submit_many(reads)
            until(lambda: (driver.status, len(device.executor.workers))[1] == len(reads))
            ended = threading.Event()

            def end_together() -> None:
                storage.gate.set()
                device.executor.workers.wait(TIMEOUT)
                ended.set()

            device.post(end_together)
            assert ended.wait(TIMEOUT)
            raw.sendall(b"\1\0\1\0" + (3).to_bytes(4, "little") + bytes(8))
            until(lambda: device.namespaces[1].busy == 0)
        with FakeGuest(device) as other:
            driver = NvmeDriver.of_client(other.client, other.memory)
            driver.enable()
            driver.create_queue_pair()
            assert driver.read(1, 0, 1) == bytes(BLOCK)
            other.reset()


# ABORT


def test_doorbells_of_a_host_that_is_gone_are_not_looked_at() -> None:
    """DOORBELL BUFFER CONFIG writes memory by messages; before the host's answers it resets the controller."""
    with contextlib.closing(controller_of(GatedStorage())) as device:
        guest, registers = MessageGuest(device), DirectRegisters(device)
        driver = NvmeDriver(registers, SharedMemory(memoryview(guest.memory)))
        driver.enable()
        shadow, events = driver.pages.allocate(), driver.pages.allocate()

        def touched(address: int) -> None:
            if address in (shadow, events):
                guest.touched = lambda address: None
                registers.write32(Register.CC, 0)

        guest.touched = touched
        driver.admin_queue.submit(Command(AdminOpcode.DOORBELL_BUFFER_CONFIG, pointer=prps(shadow, events)))
        settle(device)
        assert not driver.status & ControllerStatus.RDY
        assert device.executor.doorbells is None


class TestAbort:
    def test_is_carried_out_while_the_storage_hangs(self) -> None:
        """5.1: however many commands wait for the storage, those for the controller do not."""
        storage = GatedStorage(shut=True)
        with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            tickets = desk.driver.create_queue_pair(512).submit_many([read_of(buffer)] * MANY)
            until(lambda: len(desk.device.executor.workers) == MAX_JOBS)
            assert desk.driver.abort(tickets[250])
            assert status_of(desk.driver, tickets[250]) == "ABORT_REQUESTED"
            storage.gate.set()
            desk.driver.first_queue.drain()
            assert all(ticket.done for ticket in tickets)

    def test_of_a_format_that_nobody_began(self) -> None:
        """5.1: then the namespace is what it was."""
        busy, other = GatedStorage(shut=True), GatedStorage()
        with gated(busy, other, threads=1) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            ticket = desk.driver.create_queue_pair().submit(read_of(buffer))
            busy.wait_for(1)
            format_ = desk.driver.admin_queue.submit(Command(AdminOpcode.FORMAT_NVM, 2))
            assert desk.driver.abort(format_)
            assert status_of(desk.driver, format_) == "ABORT_REQUESTED"
            busy.gate.set()
            assert status_of(desk.driver, ticket) == "SUCCESS"
            assert desk.driver.read(2, 0, 1) == bytes(BLOCK)

    def test_of_a_reset_format_neither(self) -> None:
        """A reset takes a format along that waits for a worker: the next host finds a namespace as before."""
        busy, other = GatedStorage(shut=True), GatedStorage()
        with gated(busy, other, threads=1) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
            desk.driver.create_queue_pair().submit(read_of(buffer))
            busy.wait_for(1)
            desk.driver.admin_queue.submit(Command(AdminOpcode.FORMAT_NVM, 2, cdw10=1))
            desk.begin_reset()
            busy.gate.set()
            desk.driver.enable()
            desk.driver.create_queue_pair()
            assert desk.driver.read(2, 0, 1) == bytes(BLOCK)


def test_a_format_lasts_until_blocks_have_their_new_size() -> None:
    """5.23: a command that came before would count in the old ones."""
    storage = GatedStorage(shut=True)
    with gated(storage) as desk:
        namespace = desk.device.namespaces[1]
        ticket = desk.driver.admin_queue.submit(Command(AdminOpcode.FORMAT_NVM, 1, cdw10=1))
        storage.wait_for(1)
        seen: list[tuple[bool, int]] = []

        def ended_and_not_landed() -> None:
            storage.gate.set()
            desk.device.executor.workers.wait(TIMEOUT)
            seen.append((namespace.formatting, namespace.block_size))

        desk.in_device(ended_and_not_landed)
        assert seen == [(True, 512)]
        assert status_of(desk.driver, ticket) == "SUCCESS"
        assert (namespace.formatting, namespace.block_size) == (False, 4096)


# Keep alive (7.12)


class TestKeepAlive:
    """A controller that stands still hears nobody: it cannot say that the host is gone."""

    @pytest.fixture
    def desk(self) -> Iterator[Desk]:
        with contextlib.closing(Desk(Nvme(size=1 << 20, serial="same"))) as desk:
            desk.driver.set_feature(Feature.KEEP_ALIVE_TIMER, KEEP_ALIVE)
            yield desk

    @staticmethod
    def _let_it_expire() -> None:
        time.sleep(1.25 * KEEP_ALIVE / 1000)

    def test_does_not_run_while_the_device_is_stopped(self, desk: Desk) -> None:
        desk.guest.client.migration_set_state(DeviceState.STOP)
        self._let_it_expire()
        desk.guest.client.migration_set_state(DeviceState.RUNNING)
        desk.driver.set_feature(Feature.KEEP_ALIVE_TIMER, 0)
        assert desk.driver.status == ControllerStatus.RDY

    def test_runs_again_afterwards(self, desk: Desk) -> None:
        desk.guest.client.migration_set_state(DeviceState.STOP)
        desk.guest.client.migration_set_state(DeviceState.RUNNING)
        desk.driver.wait_status(ControllerStatus.CFS, ControllerStatus.CFS)

    def test_goes_on_after_a_word_that_came_just_in_time(self, desk: Desk) -> None:
        """The timer has ended, and KEEP ALIVE is read before anybody looks at that: silence afterwards is seen."""
        desk.driver.timeout = 3.0
        desk.driver.set_feature(Feature.KEEP_ALIVE_TIMER, 100)

        def late() -> None:
            time.sleep(0.15)
            desk.device.keep_alive.restart()

        desk.in_device(late)
        desk.driver.wait_status(ControllerStatus.CFS, ControllerStatus.CFS)

    def test_is_not_that_of_a_host_before_a_reset(self) -> None:
        """The next host wants none, and its storage has workers, whose news come the same way as the timer's."""
        with gated(GatedStorage()) as desk:
            desk.driver.set_feature(Feature.KEEP_ALIVE_TIMER, KEEP_ALIVE)
            desk.guest.client.migration_set_state(DeviceState.STOP)
            self._let_it_expire()
            desk.guest.reset()
            desk.driver.forget()
            desk.bus_master(True)
            desk.driver.enable()
            desk.driver.create_queue_pair()
            assert desk.driver.read(1, 0, 1) == bytes(BLOCK)
            assert desk.driver.status == ControllerStatus.RDY

    def test_is_what_the_stream_says_there_and_back(self, desk: Desk) -> None:
        """The host sets no timer any more at B: A's, of before, does not run when it comes back."""
        driver = desk.driver
        with (
            contextlib.closing(Nvme(size=1 << 20, serial="same")) as device,
            FakeGuest(device, memory_size=2 << 20) as b,
        ):
            self._move(driver, desk.guest, b)
            driver.set_feature(Feature.KEEP_ALIVE_TIMER, 0)
            self._let_it_expire()
            self._move(driver, b, desk.guest)
            assert driver.get_feature(Feature.KEEP_ALIVE_TIMER) == 0
            assert driver.status == ControllerStatus.RDY

    @staticmethod
    def _move(driver: NvmeDriver, here: FakeGuest, there: FakeGuest) -> None:
        stream = here.save()
        there.memory[:] = here.memory
        there.load(stream)
        driver.move(ClientRegisters(there.client), SharedMemory(there.memory))


# The timestamp (5.21.1.14)


def test_a_timestamp_stands_still_with_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a destination has waited: it goes on from what it was, and says that it may have missed some."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    here, there = Timestamp(), Timestamp()
    there.run(False)
    here.set(5_000)
    now += 1
    here.run(False)
    now += 60
    there.value = here.value
    now += 60
    there.run(True)
    now += 1
    assert there.value & (1 << 48) - 1 == 7_000
    assert there.value >> 48 == 0b011


# Fused commands


def test_a_pair_that_waits_for_places_asks_for_the_doorbell() -> None:
    """4.10, 7.13: with shadow doorbells nobody rings for places that were not asked for."""
    with contextlib.closing(Desk(Nvme(size=1 << 20))) as desk:
        desk.listen(PciIrq.MSIX)
        driver = desk.driver
        queue = driver.create_queue_pair(64, completion_depth=16)
        driver.enable_shadow_doorbells()
        with driver.buffers.prp(BLOCK) as first, driver.buffers.prp(BLOCK) as second:
            driver.execute(read_of(first))
            reads = queue.submit_many([read_of(first)] * 14)
            until(lambda: waits(desk, queue, 14))
            pair = queue.submit_many(pair_of(first, second))
            for _ in range(3):
                desk.nudge()
            assert [status_of(driver, ticket) for ticket in (*reads, *pair)] == ["SUCCESS"] * 16
            driver.execute(read_of(first))


def test_a_pair_on_a_slow_storage_keeps_no_client_waiting() -> None:
    """6.1.1: COMPARE AND WRITE is a job like any other, and alone at its namespace."""
    storage = GatedStorage()
    with gated(storage) as desk:
        driver = desk.driver
        driver.create_queue_pair()
        storage.gate.clear()
        with (
            driver.buffers.prp(BLOCK) as expected,
            driver.buffers.prp(BLOCK) as data,
            driver.buffers.prp(BLOCK) as seen,
        ):
            data.write(b"n" * BLOCK)
            pair = driver.first_queue.submit_many(pair_of(expected, data))
            storage.wait_for(1)
            behind = driver.first_queue.submit(read_of(seen))
            assert driver.status == ControllerStatus.RDY
            driver.keep_alive()
            assert storage.calls == ["read"]
            storage.gate.set()
            assert [status_of(driver, ticket) for ticket in (*pair, behind)] == ["SUCCESS"] * 3
            assert seen.read() == b"n" * BLOCK


def test_a_pair_with_the_identifier_of_another_command(caplog: pytest.LogCaptureFixture) -> None:
    """4.2: no host may do that, and a controller need not see it; but each of the three ends, once."""

    class SlowToFlush(GatedStorage):
        def read(self, offset: int, views: Views) -> None:
            MemoryStorage.read(self, offset, views)

        def write(self, offset: int, views: Views) -> None:
            MemoryStorage.write(self, offset, views)

    storage = SlowToFlush(shut=True)
    with gated(storage) as desk:
        queue = desk.driver.create_queue_pair()
        with desk.driver.buffers.prp(BLOCK) as expected, desk.driver.buffers.prp(BLOCK) as data:
            flush = queue.submit(Command(IoOpcode.FLUSH, ALL_NAMESPACES))
            storage.wait_for(1)
            first, second = pair_of(expected, data)
            queue.sq.push(first.pack(flush.command_id) + second.pack(0x77))
            queue.sq.ring_doorbell()
            until(lambda: waits(desk, queue, 2))
            storage.gate.set()
            until(lambda: not desk.device.executor.workers)
            desk.nudge()
            ended = sorted(one.command_id for one in queue.cq.take())
        assert ended == [flush.command_id, flush.command_id, 0x77]
    assert not [record for record in caplog.records if record.exc_info]


def test_many_commands_that_need_no_waiting_are_done_in_pieces() -> None:
    """A client is served between them: it may have a time-out of its own."""

    class Quick(GatedStorage):
        def read_now(self, offset: int, views: Views) -> bool:
            self.calls.append("read_now")
            time.sleep(0.001)
            return True

    storage = Quick()
    with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        queue = desk.driver.create_queue_pair(1024)
        desk.bus_master(False)
        queue.submit_many([read_of(buffer)] * 128)
        executor, seen = desk.device.executor, list[int]()

        def work_once() -> None:
            executor.held = False
            executor.work()
            seen.append(len(storage.calls))

        desk.in_device(work_once)
        assert seen[0] < 128
        desk.bus_master(True)
        queue.drain()
        assert len(storage.calls) == 128


# Standing still


def test_nothing_is_under_way_once_all_stands_still() -> None:
    """What lands meanwhile may begin something else: the flush of a shutdown."""
    storage = GatedStorage(shut=True)
    with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        desk.driver.create_queue_pair().submit(read_of(buffer))
        storage.wait_for(1)
        desk.configure(set=NORMAL_SHUTDOWN)
        storage.gate.set()
        desk.guest.client.migration_set_state(DeviceState.STOP)
        assert not desk.device.executor.workers
        assert desk.driver.status & ControllerStatus.SHST == ControllerStatus.SHST_COMPLETE


def test_a_shutdown_under_way_is_over_where_the_guest_comes_to() -> None:
    storage = GatedStorage(shut=True)
    with gated(storage, serial="same") as here, gated(GatedStorage(), serial="same") as there:
        with here.driver.buffers.prp(BLOCK) as buffer:
            here.driver.create_queue_pair().submit(read_of(buffer))
            storage.wait_for(1)
            here.configure(set=NORMAL_SHUTDOWN)
            storage.gate.set()
            stream = here.guest.save()
        there.guest.memory[:] = here.guest.memory
        there.guest.load(stream)
        there.driver.wait_status(ControllerStatus.SHST, ControllerStatus.SHST_COMPLETE)


# Namespaces that go


def test_a_namespace_at_work_cannot_be_removed(impatient: None) -> None:
    storage = GatedStorage(shut=True)
    with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        ticket = desk.driver.create_queue_pair().submit(io(IoOpcode.WRITE, 1, 0, 1, buffer))
        storage.wait_for(1)
        with pytest.raises(OSError, match="still at the storage"):
            desk.in_device(lambda: desk.device.remove_namespace(1))
        assert (1 in desk.device.namespaces, storage.acquired, storage.closed) == (True, True, False)
        storage.gate.set()
        assert status_of(desk.driver, ticket) == "SUCCESS"
        desk.in_device(lambda: desk.device.remove_namespace(1))
        assert (1 in desk.device.namespaces, storage.acquired, storage.closed) == (False, False, True)


def test_a_namespace_that_cannot_be_left_whole_goes_all_the_same() -> None:
    """Whoever removes it is told, and the host, too."""

    class Broken(GatedStorage):
        def release(self) -> None:
            raise OSError(errno.EIO, "the flush failed")

    storage = Broken()
    with gated(storage) as desk:
        desk.driver.log_page(LogPage.CHANGED_NAMESPACES, 4096)
        with pytest.raises(OSError, match="the flush failed"):
            desk.in_device(lambda: desk.device.remove_namespace(1))
        assert storage.closed
        assert desk.driver.active_namespaces() == []
        assert desk.driver.changed_namespaces() == [1]


def test_no_such_namespace() -> None:
    with gated(GatedStorage()) as desk, pytest.raises(KeyError):
        desk.in_device(lambda: desk.device.remove_namespace(2))


# What is logged


def test_lines_that_come_again_and_again_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    complaints = Complaints(logging.getLogger("vfio_user"), lambda: now)
    for now in (0.0, 0.1, 0.9, 1.0, 1.5, 3.0, 3.1):
        complaints.about("one", now)
        complaints.about("another", now)
    assert [text for text in caplog.messages if text.startswith("one")] == [
        "one: 0.0",
        "one: 1.0 (and 2 times more before)",
        "one: 3.0 (and 1 times more before)",
    ]
    assert len(caplog.messages) == 6


def test_a_guest_that_fails_its_controller_all_the_time(caplog: pytest.LogCaptureFixture) -> None:
    """Two register writes, a line in the log: it could fill a disk."""
    with gated(GatedStorage()) as desk:
        desk.driver.disable()
        for _ in range(200):
            desk.guest.write32(Register.CC, Configuration.EN | Configuration.CSS)
            desk.driver.wait_status(ControllerStatus.CFS, ControllerStatus.CFS)
            desk.driver.disable()
        desk.driver.enable()
    assert 1 <= sum("the controller failed" in text for text in caplog.messages) < 50


def test_a_storage_that_fails_with_every_command(caplog: pytest.LogCaptureFixture) -> None:
    """The controller's own log, and SMART, have all of it; the server's has a line a second."""

    class Failing(GatedStorage):
        def read(self, offset: int, views: Views) -> None:
            raise OSError(errno.EIO, "scratched")

    with gated(Failing()) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        tickets = desk.driver.create_queue_pair(512).submit_many([read_of(buffer)] * MANY)
        assert {status_of(desk.driver, ticket) for ticket in tickets} == {"UNRECOVERED_READ_ERROR"}
        assert int.from_bytes(desk.driver.log_page(LogPage.SMART_HEALTH, 512)[176:192], "little") == MANY
    lines = [text for text in caplog.messages if "scratched" in text]
    assert lines[0].startswith("the storage of namespace 1 failed")
    assert len(lines) < MANY / 10
