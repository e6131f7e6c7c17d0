"""What our controller has beyond QEMU's: INTx and MSI, namespaces that come and go, a disk that must not be written.

Section numbers are those of the NVM Express base specification, 1.4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import (
    ALL_NAMESPACES,
    DOORBELLS,
    AdminOpcode,
    AsyncEvent,
    ControllerStatus,
    Feature,
    Identify,
    IoOpcode,
    LogPage,
    Register,
)
from vfio_user.devices.nvme.storage.base import Views
from vfio_user.testing.nvme import Command, NvmeError, io
from vfio_user.wire.constants import PciIrq, PciRegion

from .nvme_gate_support import Desk, GatedStorage, gated

BLOCK, BLOCKS = 512, 1024


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(BLOCKS * BLOCK))
    with contextlib.closing(Desk(Nvme(path=str(path)))) as one:
        yield one


def flush_unseen(desk: Desk) -> None:
    """Have a completion stand in the I/O queue that the driver has not taken."""
    queue = desk.driver.queues[0]
    at = queue.cq.ring.address(queue.cq.head) + 14
    queue.submit(Command(IoOpcode.FLUSH, 1))
    while desk.guest.memory[at] & 1 != queue.cq.phase:
        desk.nudge()
    desk.nudge()


# INTx (7.5.1)


class TestIntx:
    def test_the_level_stands_until_the_completions_are_taken(self, desk: Desk) -> None:
        desk.listen(PciIrq.INTX)
        queue = desk.driver.create_queue_pair(vector=0)
        desk.nudge()
        assert not desk.device.irq.asserted
        for _ in range(3):
            flush_unseen(desk)
            flush_unseen(desk)
            assert desk.device.irq.asserted
            queue.drain()
            desk.nudge()
            assert not desk.device.irq.asserted

    def test_a_part_of_them_is_not_enough(self, desk: Desk) -> None:
        desk.listen(PciIrq.INTX)
        queue = desk.driver.create_queue_pair(vector=0)
        flush_unseen(desk)
        head = queue.cq.head
        flush_unseen(desk)
        queue.drain()
        assert queue.cq.head == head + 2
        flush_unseen(desk)
        desk.nudge()
        assert desk.device.irq.asserted
        queue.drain()
        desk.nudge()
        assert not desk.device.irq.asserted

    def test_masked_and_unmasked(self, desk: Desk) -> None:
        """3.1.3, 3.1.4: INTMS and INTMC show the mask; unmasked with a completion that stands, the level is back."""
        desk.listen(PciIrq.INTX)
        registers = desk.driver.hardware.registers
        desk.driver.create_queue_pair(vector=0)
        registers.write32(Register.INTMS, 1)
        assert [registers.read32(at) for at in (Register.INTMS, Register.INTMC)] == [1, 1]
        flush_unseen(desk)
        assert not desk.device.irq.asserted
        registers.write32(Register.INTMC, 1)
        assert registers.read32(Register.INTMS) == 0
        assert desk.device.irq.asserted
        registers.write32(Register.INTMS, 0xFFFF_FFFF)
        assert not desk.device.irq.asserted

    def test_a_driver_that_lives_by_it(self, desk: Desk) -> None:
        interrupts = desk.listen(PciIrq.INTX, 1)
        desk.driver.hardware.interrupts = interrupts
        desk.driver.create_queue_pair(vector=0)
        for number in range(20):
            desk.driver.write(1, number, bytes([number]) * BLOCK)
            assert desk.driver.read(1, number, 1) == bytes([number]) * BLOCK

    def test_a_reset_takes_it_back(self, desk: Desk) -> None:
        desk.listen(PciIrq.INTX)
        desk.driver.create_queue_pair(vector=0)
        flush_unseen(desk)
        assert desk.device.irq.asserted
        desk.driver.disable()
        assert not desk.device.irq.asserted
        assert desk.driver.hardware.registers.read32(Register.INTMS) == 0


# MSI and MSI-X


@pytest.mark.parametrize(("index", "count"), [(PciIrq.MSI, None), (PciIrq.MSIX, None), (PciIrq.MSIX, 4)])
def test_messages_by_vector(desk: Desk, index: PciIrq, count: int | None) -> None:
    """One for a completion, none for a queue that has none, no level."""
    interrupts = desk.listen(index, count)
    quiet, loud = desk.driver.create_queue_pair(vector=None), desk.driver.create_queue_pair(vector=2)
    interrupts.take(0)
    desk.driver.flush(queue=quiet)
    desk.driver.flush(queue=loud)
    desk.nudge()
    assert [bool(interrupts.take(vector)) for vector in (0, 1, 2, 3)] == [False, False, True, False]
    assert not desk.device.irq.asserted


def test_one_message_for_all(desk: Desk) -> None:
    """A guest that enabled one vector of MSI has all completions there (7.5.1.2)."""
    interrupts = desk.listen(PciIrq.MSI, 1)
    queue = desk.driver.create_queue_pair(vector=5)
    desk.nudge()
    interrupts.take(0)
    desk.driver.flush(queue=queue)
    desk.nudge()
    assert interrupts.take(0)


def test_messages_wait_behind_the_mask(desk: Desk) -> None:
    """3.1.3: with MSI, INTMS holds back what INTMC lets go; with MSI-X neither is to be used."""
    interrupts = desk.listen(PciIrq.MSI)
    registers = desk.driver.hardware.registers
    desk.driver.create_queue_pair(vector=1)
    registers.write32(Register.INTMS, 2)
    flush_unseen(desk)
    assert not interrupts.take(1)
    registers.write32(Register.INTMC, 2)
    assert interrupts.take(1)


# Namespaces


def test_a_namespace_that_is_added_is_told_of(desk: Desk, tmp_path: Path) -> None:
    """5.2.1, 5.14.1.4: an event if the host wants it, the page that says which, and then it can be used."""
    driver = desk.driver
    driver.create_queue_pair()
    (tmp_path / "two.img").write_bytes(b"\x22" * 64 * BLOCK)
    driver.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 1 << 8)
    driver.changed_namespaces()
    waiting = driver.async_event()
    desk.in_device(lambda: desk.device.add_namespace(str(tmp_path / "two.img")))
    event = driver.event(waiting)
    assert (event.what, event.log_page) == (AsyncEvent.NAMESPACE_ATTRIBUTE_CHANGED, LogPage.CHANGED_NAMESPACES)
    assert driver.changed_namespaces() == [2]
    assert driver.changed_namespaces() == []
    assert driver.active_namespaces() == [1, 2]
    assert driver.namespace(2).nsze == 64
    assert driver.read(2, 63, 1) == b"\x22" * BLOCK
    driver.write(2, 0, b"\x33" * BLOCK)
    assert driver.read(1, 0, 1) == bytes(BLOCK)
    waiting = driver.async_event()
    desk.in_device(lambda: desk.device.remove_namespace(2))
    driver.event(waiting)
    assert driver.changed_namespaces() == [2]
    with pytest.raises(NvmeError, match="INVALID_FIELD"):
        driver.execute(Command(IoOpcode.FLUSH, 2))
    assert (tmp_path / "two.img").read_bytes()[:BLOCK] == b"\x33" * BLOCK


def test_who_only_looks_at_the_changes_retains_the_event(desk: Desk) -> None:
    """RAE, as nvme-cli reads: the page has what changed since it was read last; the event waits for its reader."""
    driver = desk.driver
    driver.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 1 << 8)
    waiting = driver.async_event()
    desk.in_device(lambda: desk.device.add_namespace("memory:"))
    driver.event(waiting)
    page = driver.log_page(LogPage.CHANGED_NAMESPACES, 4096, retain=True)
    assert (page[0], any(page[4:])) == (2, False)
    waiting = driver.async_event()
    desk.in_device(lambda: desk.device.remove_namespace(2))
    driver.get_feature(Feature.ARBITRATION)
    assert not waiting.done
    assert driver.changed_namespaces() == [2]
    driver.event(waiting)


def test_no_event_for_who_does_not_want_it(desk: Desk, tmp_path: Path) -> None:
    """5.21.1.11."""
    driver = desk.driver
    waiting = driver.async_event()
    (tmp_path / "two.img").write_bytes(bytes(64 * BLOCK))
    desk.in_device(lambda: desk.device.add_namespace(str(tmp_path / "two.img")))
    driver.get_feature(Feature.ARBITRATION)
    assert not waiting.done
    assert driver.active_namespaces() == [1, 2]


def test_a_disk_that_must_not_be_written(tmp_path: Path) -> None:
    """8.19: NSATTR says so, and what writes is refused; what reads is not."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x44" * BLOCKS * BLOCK)
    with contextlib.closing(Desk(Nvme(path=str(path), read_only=True))) as desk:
        driver = desk.driver
        driver.create_queue_pair()
        assert driver.identify_namespace(1).nsattr & 1
        calls: list[Callable[[], object]] = [
            lambda: driver.write(1, 0, bytes(BLOCK)),
            lambda: driver.write_zeroes(1, 0, 1),
            lambda: driver.discard(1, [(0, 1)]),
            lambda: driver.format(1),
        ]
        for call in calls:
            with pytest.raises(NvmeError, match="NAMESPACE_WRITE_PROTECTED"):
                call()
        driver.flush()
        driver.compare(1, 0, b"\x44" * BLOCK)
        driver.verify(1, 0, 64)
    assert path.read_bytes() == b"\x44" * BLOCKS * BLOCK


@pytest.mark.parametrize("block_size", [512, 4096])
def test_blocks_of_either_size(tmp_path: Path, block_size: int) -> None:
    device = Nvme(path=str(tmp_path / "disk.img"), size=1 << 20, block_size=block_size)
    with contextlib.closing(Desk(device)) as desk:
        driver = desk.driver
        driver.create_queue_pair()
        assert driver.namespace(1).block_size == block_size
        driver.write(1, 5, b"\x55" * block_size)
        assert (tmp_path / "disk.img").read_bytes()[5 * block_size : 6 * block_size] == b"\x55" * block_size


# Events and timers


def test_a_temperature_that_is_reached(desk: Desk) -> None:
    """5.21.1.4, 5.2.1: a threshold at or below what it is, if the host wants to know."""
    driver = desk.driver
    driver.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 1 << 1)
    waiting = driver.async_event()
    temperature = int.from_bytes(driver.log_page(LogPage.SMART_HEALTH, 512)[1:3], "little")
    driver.set_feature(Feature.TEMPERATURE_THRESHOLD, temperature + 10)
    driver.get_feature(Feature.ARBITRATION)
    assert not waiting.done
    driver.set_feature(Feature.TEMPERATURE_THRESHOLD, temperature - 10)
    event = driver.event(waiting)
    assert (event.what, event.log_page) == (AsyncEvent.TEMPERATURE_THRESHOLD, LogPage.SMART_HEALTH)


def test_a_host_that_does_not_keep_it_alive(desk: Desk) -> None:
    """7.12: the controller fails when nobody says a word for so long; a reset is the way back, without the timer."""
    driver = desk.driver
    driver.set_feature(Feature.KEEP_ALIVE_TIMER, 100)
    driver.keep_alive()
    driver.wait_status(ControllerStatus.CFS, ControllerStatus.CFS)
    driver.enable()
    assert driver.get_feature(Feature.KEEP_ALIVE_TIMER) == 0


def test_settings_end_with_a_reset_of_the_function(desk: Desk) -> None:
    """PCI: a reset of the device is one of the controller."""
    desk.driver.set_feature(Feature.VOLATILE_WRITE_CACHE, 0)
    desk.guest.reset()
    desk.driver.forget()
    desk.guest.write16(4, 6, PciRegion.CONFIG)
    assert desk.driver.status == ControllerStatus(0)
    desk.driver.enable()
    assert desk.driver.get_feature(Feature.VOLATILE_WRITE_CACHE) == 1


def test_a_shutdown_may_take_as_long_as_a_flush(desk: Desk) -> None:
    """5.15.2.2, RTD3E in microseconds: hosts wait that long, and some only a few seconds where it is 0."""
    assert int.from_bytes(desk.driver.identify(Identify.CONTROLLER)[88:92], "little") >= 20_000_000


def test_a_reset_takes_the_timestamp_back(desk: Desk) -> None:
    """5.21.1.14: it is of a reset again, and begins at 0."""
    desk.driver.set_timestamp(1 << 40)
    desk.driver.enable()
    stamp = int.from_bytes(desk.driver.get_timestamp(), "little")
    assert (stamp >> 48, stamp < 1 << 40) == (0, True)


# Features (5.8, 5.21)

_UNDER, _WARNING = 1 << 20, 1 << 1


@pytest.mark.parametrize("select", range(4))
def test_a_timestamp_of_each_kind(desk: Desk, select: int, caplog: pytest.LogCaptureFixture) -> None:
    """5.21.1.14: current, default, saved, capabilities."""
    desk.driver.set_timestamp(1 << 40)
    with desk.driver.buffers.prp(4096) as buffer:
        buffer.write(bytes(4096))
        cdw10 = select << 8 | Feature.TIMESTAMP
        result = desk.driver.admin(Command(AdminOpcode.GET_FEATURES, cdw10=cdw10, pointer=buffer.pointer)).result
        stamp = int.from_bytes(buffer.read()[:6], "little")
    assert (result, stamp >= 1 << 40) == (4 if select == 3 else 0, select == 0)
    assert not caplog.records


def test_thresholds_that_nobody_set(desk: Desk) -> None:
    """5.21.1.4: over, the warning of IDENTIFY; under, 0: a disk that nobody set up does not raise an alarm."""
    over, under = (desk.driver.get_feature(Feature.TEMPERATURE_THRESHOLD, cdw11=which) for which in (0, _UNDER))
    assert over == int.from_bytes(desk.driver.identify(Identify.CONTROLLER)[266:268], "little")
    assert under & 0xFFFF == 0
    assert desk.driver.log_page(LogPage.SMART_HEALTH, 512)[0] == 0


@pytest.mark.parametrize("which", [2 << 20, 3 << 20, 1 << 16, 8 << 16, 9 << 16])
def test_thresholds_that_there_are_not(desk: Desk, which: int) -> None:
    """5.21.1.4: THSEL 2 and 3 are reserved, and there are no sensors but the composite temperature."""
    with pytest.raises(NvmeError, match="INVALID_FIELD"):
        desk.driver.set_feature(Feature.TEMPERATURE_THRESHOLD, which | 300)
    with pytest.raises(NvmeError, match="INVALID_FIELD"):
        desk.driver.get_feature(Feature.TEMPERATURE_THRESHOLD, cdw11=which)


@pytest.mark.parametrize("which", [0, _UNDER])
def test_a_threshold_of_all_sensors(desk: Desk, which: int) -> None:
    """5.21.1.4: TMPSEL Fh is to be set, for all that there are, and not to be got."""
    desk.driver.set_feature(Feature.TEMPERATURE_THRESHOLD, 0xF << 16 | which | 300)
    assert desk.driver.get_feature(Feature.TEMPERATURE_THRESHOLD, cdw11=which) & 0xFFFF == 300
    with pytest.raises(NvmeError, match="INVALID_FIELD"):
        desk.driver.get_feature(Feature.TEMPERATURE_THRESHOLD, cdw11=0xF << 16 | which)


@pytest.mark.parametrize(("passed", "again"), [(200, 400), (_UNDER | 400, _UNDER | 200)])
def test_smart_warns_of_a_threshold_that_is_passed(desk: Desk, passed: int, again: int) -> None:
    """5.14.1.2: critical warning, bit 1."""
    for value, warning in ((passed, _WARNING), (again, 0), (passed, _WARNING)):
        desk.driver.set_feature(Feature.TEMPERATURE_THRESHOLD, value)
        assert desk.driver.log_page(LogPage.SMART_HEALTH, 512)[0] == warning


OF_NAMESPACES = {Feature.ERROR_RECOVERY}


@pytest.mark.parametrize("feature", sorted({*Feature} - OF_NAMESPACES))
def test_a_feature_that_is_no_namespaces(desk: Desk, feature: Feature) -> None:
    """5.21: named with an NSID it is refused, and stays as it is."""
    with desk.driver.buffers.prp(4096) as buffer:
        named = Command(AdminOpcode.SET_FEATURES, 1, cdw10=feature, pointer=buffer.pointer)
        with pytest.raises(NvmeError, match="FEATURE_NOT_NAMESPACE_SPECIFIC"):
            desk.driver.admin(named)
        desk.driver.admin(dataclasses.replace(named, nsid=0))
        desk.driver.admin(dataclasses.replace(named, nsid=ALL_NAMESPACES))


def test_as_many_queues_as_there_may_be(desk: Desk) -> None:
    """5.21.1.7: what GET FEATURES says is what is allocated, asked for or not."""
    assert desk.driver.get_feature(Feature.NUMBER_OF_QUEUES) == 63 << 16 | 63
    assert desk.driver.request_queues(8) == 8
    assert desk.driver.get_feature(Feature.NUMBER_OF_QUEUES) == 7 << 16 | 7


def test_a_write_cache_that_is_switched_off_is_empty() -> None:
    """5.21.1.6: the host will flush no more."""
    storage = GatedStorage()
    with gated(storage) as desk:
        desk.driver.create_queue_pair()
        desk.driver.write(1, 0, bytes(BLOCK))
        assert storage.dirty
        desk.driver.set_feature(Feature.VOLATILE_WRITE_CACHE, 0)
        assert not storage.dirty
        desk.driver.set_feature(Feature.VOLATILE_WRITE_CACHE, 1)
        assert storage.calls == ["write", "flush"]


class LateWrites(GatedStorage):
    """Whose writes are done when the gate opens, and nothing else waits for that."""

    def flush(self) -> None:
        self.calls.append("flush")
        self.dirty = False


def test_a_write_that_ends_when_the_cache_is_off_is_durable() -> None:
    storage = LateWrites(shut=True)
    with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        ticket = desk.driver.create_queue_pair().submit(io(IoOpcode.WRITE, 1, 0, 1, buffer))
        storage.wait_for(1)
        desk.driver.set_feature(Feature.VOLATILE_WRITE_CACHE, 0)
        storage.gate.set()
        assert desk.driver.complete(ticket).status == "SUCCESS"
        assert not storage.dirty


def test_error_recovery_is_of_each_namespace() -> None:
    """5.21.1.5."""
    with gated(GatedStorage(), GatedStorage()) as desk:
        feature, driver = Feature.ERROR_RECOVERY, desk.driver
        driver.set_feature(feature, 7, 1)
        assert [driver.get_feature(feature, number) for number in (1, 2)] == [7, 0]
        driver.set_feature(feature, 9, ALL_NAMESPACES)
        assert [driver.get_feature(feature, number) for number in (1, 2)] == [9, 9]
        assert [driver.get_feature(feature, number, select=1) for number in (1, 2)] == [0, 0]
        for number, status in ((0, "INVALID_NAMESPACE_OR_FORMAT"), (3, "INVALID_FIELD"), (999, "INVALID_NAMESPACE_OR")):
            with pytest.raises(NvmeError, match=status):
                driver.set_feature(feature, 1, number)
            with pytest.raises(NvmeError, match=status):
                driver.get_feature(feature, number)
        with pytest.raises(NvmeError, match="INVALID_FIELD"):
            driver.set_feature(feature, 1 << 16, 1)  # DULBE, which no namespace says that it has
        desk.in_device(lambda: desk.device.remove_namespace(2))
        desk.in_device(lambda: desk.device.add_namespace(GatedStorage()))
        assert driver.get_feature(feature, 2) == 0


def test_vectors_that_there_are_not(desk: Desk) -> None:
    """5.21.1.9."""
    last = desk.device.interrupt_vectors - 1
    assert desk.driver.get_feature(Feature.INTERRUPT_VECTOR_CONFIGURATION, cdw11=last) == last
    with pytest.raises(NvmeError, match="INVALID_FIELD"):
        desk.driver.get_feature(Feature.INTERRUPT_VECTOR_CONFIGURATION, cdw11=last + 1)


def test_formats_that_do_not_fit_are_not_offered() -> None:
    """5.15.2.1, LBADS: 0 for one that is not there now."""
    with gated(GatedStorage(size=3 * BLOCK)) as desk:
        formats = desk.driver.identify_namespace(1).formats
        assert formats == [(BLOCK, 0), (0, 0)]
        with pytest.raises(NvmeError, match="INVALID_FORMAT"):
            desk.driver.format(1, 1)


def test_where_the_admin_queues_are_outlives_a_controller_reset_only(desk: Desk) -> None:
    """7.3.1, 7.3.2."""
    queues = (Register.AQA, Register.ASQ, Register.ACQ)
    before = [desk.guest.read32(register) for register in queues]
    assert any(before)
    desk.driver.disable()
    assert [desk.guest.read32(register) for register in queues] == before
    desk.driver.enable()
    desk.driver.reset_subsystem()
    assert not any(desk.guest.read32(register) for register in queues)


# What changed, and who was told of it


def add_namespaces(desk: Desk, count: int) -> None:
    for _ in range(count):
        desk.in_device(lambda: desk.device.add_namespace("memory:", size=1 << 16))


def test_changes_that_are_read_in_pieces(desk: Desk) -> None:
    """5.14.1.4: who has read a part of the list is told of the rest still."""
    add_namespaces(desk, 4)
    page, driver = LogPage.CHANGED_NAMESPACES, desk.driver
    assert struct.unpack("<2I", driver.log_page(page, 8, retain=True)) == (2, 3)
    assert struct.unpack("<2I", driver.log_page(page, 8, offset=8, retain=True)) == (4, 5)
    assert struct.unpack("<2I", driver.log_page(page, 8)) == (2, 3)
    assert driver.changed_namespaces() == [4, 5]
    assert driver.changed_namespaces() == []


def test_an_event_that_the_host_knows_of_is_not_told(desk: Desk) -> None:
    """5.2: it has read the page before it asked for events."""
    driver = desk.driver
    driver.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 1 << 8)
    add_namespaces(desk, 1)
    assert driver.changed_namespaces() == [2]
    waiting = driver.async_event()
    driver.get_feature(Feature.ARBITRATION)
    assert not waiting.done
    add_namespaces(desk, 1)
    driver.event(waiting)
    assert driver.changed_namespaces() == [3]


# Two fused commands


class FullStorage(GatedStorage):
    """Which can be read, and has no room."""

    def write(self, offset: int, views: Views) -> None:
        raise OSError(errno.ENOSPC, "full")


def test_a_pair_whose_second_fails() -> None:
    """4.6.1.2.1: the first one is aborted due to that, and is not what failed."""
    with gated(FullStorage()) as desk:
        desk.driver.create_queue_pair()
        ends = desk.driver.compare_and_write(1, 0, bytes(BLOCK), b"1" * BLOCK)
        assert [(one.status, one.do_not_retry) for one in ends] == [
            ("ABORTED_FAILED_FUSED", False),
            ("CAPACITY_EXCEEDED", False),
        ]


# Doorbells, messages


def test_a_head_that_comes_behind_its_shadow(desk: Desk) -> None:
    """7.13: a posted write of before may arrive when the shadow has gone on: it is a call, and nothing else."""
    driver = desk.driver
    queue = driver.create_queue_pair(16)
    driver.enable_shadow_doorbells()
    waiting = driver.async_event()
    for _ in range(6):
        driver.flush()
    desk.guest.write32(DOORBELLS + queue.cq.doorbell.offset, 3)
    for _ in range(30):
        driver.flush()
    assert not waiting.done
    driver.get_feature(Feature.ARBITRATION)
    assert not waiting.done


def test_a_queue_that_is_deleted_sends_no_message(desk: Desk) -> None:
    """Whoever deletes it has given its vector to somebody else, perhaps."""
    interrupts = desk.listen(PciIrq.MSIX)
    queue = desk.driver.create_queue_pair(vector=3)
    desk.driver.flush()
    desk.nudge()
    assert interrupts.take(3)
    desk.driver.delete_queue_pair(queue)
    desk.nudge()
    assert not interrupts.take(3)


def test_a_queue_that_is_deleted_takes_its_level_along(desk: Desk) -> None:
    """7.5.1: with a completion in it that nobody took."""
    desk.listen(PciIrq.INTX)
    queue = desk.driver.create_queue_pair(vector=0)
    flush_unseen(desk)
    assert desk.device.irq.asserted
    for opcode in (AdminOpcode.DELETE_IO_SQ, AdminOpcode.DELETE_IO_CQ):
        desk.driver.admin(Command(opcode, cdw10=queue.sq.identifier))
    desk.nudge()
    assert not desk.device.irq.asserted
