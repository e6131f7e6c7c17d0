"""What no guest does, done to an NVMe controller, with a model that says what must come of it.

``test_nvme_hostile`` is about what must never happen; here every answer is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import (
    DOORBELLS,
    VERSION,
    AdminOpcode,
    Configuration,
    ControllerStatus,
    Feature,
    IoOpcode,
    Register,
    Status,
)
from vfio_user.devices.nvme.controller import CAPABILITIES
from vfio_user.devices.nvme.identify import ASYNC_EVENTS
from vfio_user.testing.nvme import Command, NvmeError, io
from vfio_user.testing.nvme.data import prps
from vfio_user.wire.constants import PciIrq, PciRegion

from .nvme_gate_support import BLOCK, Desk, GatedStorage, gated

pytestmark = pytest.mark.timeout(60)

patiently = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def desk() -> Iterator[Desk]:
    with contextlib.closing(Desk(Nvme(size=1 << 20), memory_size=4 << 20)) as one:
        yield one


# Queues that come and go (5.3 to 5.6)


NUMBERS = st.integers(0, 3) | st.sampled_from([4, 5, 64, 65, 0xFFFF])
GRANTED = 4
SIZES = st.sampled_from([2, 2, 16, 64, 64, 1024, 1, 1025, 0x1_0000])
VECTORS = st.sampled_from([0, 1, 64, 65, 0xFFFF])
RINGS = st.sampled_from(range(1 << 20, 3 << 20, 1 << 18))
MISALIGNED = st.sampled_from([0, 0, 0, 0, 4, 0x800])
PLANS = st.lists(
    st.tuples(st.just("completions"), NUMBERS, SIZES, VECTORS, RINGS, MISALIGNED)
    | st.tuples(st.just("submissions"), NUMBERS, SIZES, NUMBERS, RINGS, MISALIGNED)
    | st.tuples(st.sampled_from(["delete completions", "delete submissions"]), NUMBERS)
    | st.tuples(st.just("reset")),
    max_size=25,
)


class Queues:
    """What queues there are, and what each command on them may come to: any of these, or success for none."""

    def __init__(self) -> None:
        self.completions: set[int] = set()
        self.submissions: dict[int, int] = {}

    def _faults_of_new(self, number: int, size: int, offset: int, taken: bool) -> set[Status]:
        faults = {
            Status.INVALID_QUEUE_IDENTIFIER: taken or not 0 < number <= GRANTED,
            Status.INVALID_QUEUE_SIZE: not 2 <= size <= 1024,
            Status.PRP_OFFSET_INVALID: bool(offset),
        }
        return {status for status, is_so in faults.items() if is_so}

    def create_completions(self, number: int, size: int, vector: int, offset: int) -> set[Status]:
        faults = self._faults_of_new(number, size, offset, number in self.completions)
        faults |= {Status.INVALID_INTERRUPT_VECTOR} if vector > 64 else set()
        if not faults:
            self.completions.add(number)
        return faults

    def create_submissions(self, number: int, size: int, completions: int, offset: int) -> set[Status]:
        faults = self._faults_of_new(number, size, offset, number in self.submissions)
        if not 0 < completions <= GRANTED:
            faults |= {Status.INVALID_QUEUE_IDENTIFIER}
        elif completions not in self.completions:
            faults |= {Status.COMPLETION_QUEUE_INVALID}
        if not faults:
            self.submissions[number] = completions
        return faults

    def delete_completions(self, number: int) -> set[Status]:
        if number not in self.completions:
            return {Status.INVALID_QUEUE_IDENTIFIER}
        if number in self.submissions.values():
            return {Status.INVALID_QUEUE_DELETION}
        self.completions.remove(number)
        return set()

    def delete_submissions(self, number: int) -> set[Status]:
        return set() if self.submissions.pop(number, None) is not None else {Status.INVALID_QUEUE_IDENTIFIER}


def ask(desk: Desk, command: Command) -> int:
    """The status of an admin command."""
    return desk.driver.complete(desk.driver.admin_queue.submit(command)).code


@patiently
@given(plan=PLANS)
def test_queues_in_any_order(desk: Desk, plan: list[tuple[object, ...]]) -> None:
    """Each CREATE and DELETE succeeds, or fails for one of the reasons that there are."""

    def begin() -> Queues:
        desk.driver.enable()
        desk.driver.request_queues(GRANTED)
        return Queues()

    model = begin()
    for kind, *values in plan:
        numbers = [value for value in values if isinstance(value, int)]
        if kind == "reset":
            model = begin()
        elif kind in ("completions", "submissions"):
            number, size, other, ring, offset = numbers
            create = model.create_completions if kind == "completions" else model.create_submissions
            opcode = AdminOpcode.CREATE_IO_CQ if kind == "completions" else AdminOpcode.CREATE_IO_SQ
            command = Command(opcode, cdw10=size - 1 << 16 | number, cdw11=other << 16 | 1, pointer=prps(ring + offset))
            status, faults = ask(desk, command), create(number, size, other, offset)
            assert status in (faults or {Status.SUCCESS})
        else:
            delete = model.delete_completions if kind == "delete completions" else model.delete_submissions
            opcode = AdminOpcode.DELETE_IO_CQ if kind == "delete completions" else AdminOpcode.DELETE_IO_SQ
            status, faults = ask(desk, Command(opcode, cdw10=numbers[0])), delete(numbers[0])
            assert status in (faults or {Status.SUCCESS})
    executor = desk.device.executor
    assert executor.completions.keys() == model.completions | {0}
    assert {n: q.completions.number for n, q in executor.submissions.items()} == model.submissions | {0: 0}


# Registers by pieces (3.1)


WRITABLE = {
    Register.CC: (4, 0x00FF_FFF0 & ~Configuration.SHN),
    Register.AQA: (4, 0x0FFF_0FFF),
    Register.ASQ: (8, (1 << 64) - (1 << 12)),
    Register.ACQ: (8, (1 << 64) - (1 << 12)),
}
"""Width, and what of it keeps what is written, as long as the controller is disabled."""
_COMMANDS = {Register.CC: 0xFE, Register.CC + 1: 0x3F}
"""Bytes that do more than keep what is written: all of them but EN and SHN."""
FIXED = {Register.CAP: (8, CAPABILITIES), Register.VS: (4, VERSION), Register.CSTS: (4, 0), Register.CMBSZ: (4, 0)}


ACCESSES = st.tuples(
    st.sampled_from([*WRITABLE, *FIXED]),
    st.integers(0, 7),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, (1 << 64) - 1),
)


@pytest.fixture(scope="module")
def bare() -> Iterator[Nvme]:
    """A controller that nobody serves."""
    with contextlib.closing(Nvme(size=1 << 20)) as device:
        yield device


@patiently
@given(accesses=st.lists(ACCESSES, max_size=30))
def test_registers_by_pieces(bare: Nvme, accesses: list[tuple[Register, int, int, int]]) -> None:
    """Bytes, halves, both halves in any order, two registers at once: each byte is where it belongs, or nowhere."""
    bare.reset()
    model, keeps = bytearray(0x48), bytearray(0x48)
    for register, (width, value) in FIXED.items():
        model[register : register + width] = value.to_bytes(width, "little")
    for register, (width, mask) in WRITABLE.items():
        keeps[register : register + width] = mask.to_bytes(width, "little")
    for register, shift, size, value in accesses:
        start = register + shift & -size  # VMMs let those through only that are aligned
        data = bytearray(value.to_bytes(8, "little")[:size])
        for at in range(start, start + size):
            if at in _COMMANDS:
                data[at - start] &= _COMMANDS[at]
            model[at] = model[at] & ~keeps[at] | data[at - start] & keeps[at]
        bare.region_write(PciRegion.BAR0, start, memoryview(data))
    for register, (width, _) in (WRITABLE | FIXED).items():
        shown = bytearray(width)
        bare.region_read(PciRegion.BAR0, register, memoryview(shown))
        assert shown == model[register : register + width], register.name


# Doorbell buffers (5.7)


def test_doorbell_buffers_that_cannot_be(desk: Desk) -> None:
    """Refused, and those of before are in use."""
    driver = desk.driver
    driver.create_queue_pair()
    driver.enable_shadow_doorbells()
    good, other = driver.pages.allocate(), driver.pages.allocate()
    for shadow, events, status in (
        (good + 4, other, "INVALID_FIELD"),
        (good, other + 0x800, "INVALID_FIELD"),
        (good, good, "INVALID_FIELD"),
        (1 << 45, other, "DATA_TRANSFER_ERROR"),
        (good, 1 << 45, "DATA_TRANSFER_ERROR"),
        ((1 << 64) - 4096, other, "DATA_TRANSFER_ERROR"),
    ):
        with pytest.raises(NvmeError, match=status):
            driver.admin(Command(AdminOpcode.DOORBELL_BUFFER_CONFIG, pointer=prps(shadow, events)))
        driver.flush()


def test_doorbell_buffers_again_and_again(desk: Desk) -> None:
    """The last ones count, and go on from where the queues are."""
    driver = desk.driver
    driver.create_queue_pair(8)
    for _ in range(5):
        driver.enable_shadow_doorbells()
        for _ in range(11):
            driver.flush()
    assert driver.status == ControllerStatus.RDY


def test_doorbell_buffers_on_the_queues_themselves(desk: Desk) -> None:
    """Whatever that makes of the queues, a reset makes a good controller of it."""
    driver = desk.driver
    queue = driver.create_queue_pair(64)
    pages = prps(queue.sq.ring.address(0), queue.cq.ring.address(0))
    with contextlib.suppress(NvmeError):
        driver.admin(Command(AdminOpcode.DOORBELL_BUFFER_CONFIG, pointer=pages))
    for number in range(20):
        desk.guest.write32(DOORBELLS + 8, number)
    driver.enable()
    driver.create_queue_pair()
    driver.flush()


# Interrupts


def test_vectors_that_are_masked_while_completions_come(desk: Desk) -> None:
    """PCI, MSI-X: they are pending, each once, and sent when the guest unmasks them: one by one, or all of them."""
    interrupts = desk.listen(PciIrq.MSIX)
    config = desk.device.config
    enabled, all_masked = 1 << 15, 1 << 14
    control = next(at for at in range(0x40, 0x100, 2) if "msix.control" in config.names(at, 2))
    queue = desk.driver.create_queue_pair(vector=1)
    desk.guest.write16(control, enabled | all_masked, PciRegion.CONFIG)
    interrupts.take(1)
    for _ in range(3):
        desk.driver.flush(queue=queue)
    desk.nudge()
    assert not interrupts.take(1)
    assert desk.device.irq.pba(PciIrq.MSIX)[0] & 2
    desk.guest.write16(control, enabled, PciRegion.CONFIG)
    assert interrupts.take(1) == 1
    assert not desk.device.irq.pba(PciIrq.MSIX)[0] & 2


# Events, timers


def test_one_request_for_events_too_many(desk: Desk) -> None:
    """5.2: the others wait on, and are answered in their order."""
    tickets = [desk.driver.async_event() for _ in range(ASYNC_EVENTS)]
    for _ in range(3):
        with pytest.raises(NvmeError, match="ASYNC_EVENT_LIMIT_EXCEEDED"):
            desk.driver.event(desk.driver.async_event())
    assert not any(ticket.done for ticket in tickets)
    desk.guest.write32(DOORBELLS + 8 * 60, 1)
    desk.driver.event(tickets[0])
    assert not any(ticket.done for ticket in tickets[1:])


@pytest.mark.parametrize("milliseconds", [0xFFFF_FFFF, 0x7FFF_FFFF, 0])
def test_a_keep_alive_of_any_length(desk: Desk, milliseconds: int) -> None:
    """7.12: 49 days are a time like any other, and none is none."""
    for value in (60_000, milliseconds):
        desk.driver.set_feature(Feature.KEEP_ALIVE_TIMER, value)
        desk.driver.keep_alive()
        assert desk.driver.get_feature(Feature.KEEP_ALIVE_TIMER) == value
    assert desk.driver.status == ControllerStatus.RDY


# Namespaces under load


def test_a_namespace_that_is_formatted_already() -> None:
    """5.23: the first one goes on, and nobody gets at the blocks before it has ended."""
    storage = GatedStorage(shut=True)
    with gated(storage) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        queue = desk.driver.create_queue_pair()
        first, second = (desk.driver.admin_queue.submit(Command(AdminOpcode.FORMAT_NVM, 1, cdw10=n)) for n in (1, 0))
        assert desk.driver.complete(second).status == "FORMAT_IN_PROGRESS"
        ticket = queue.submit(io(IoOpcode.READ, 1, 0, 1, buffer))
        assert desk.driver.complete(ticket).status == "FORMAT_IN_PROGRESS"
        storage.gate.set()
        assert desk.driver.complete(first).status == "SUCCESS"
        assert desk.driver.identify_namespace(1).block_size == 4096


def test_a_namespace_that_goes_under_many_commands() -> None:
    """Those that were fetched end well, the others find no namespace: each ends."""
    storage, other = GatedStorage(shut=True), GatedStorage()
    with gated(storage, other) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        queue = desk.driver.create_queue_pair(512)
        tickets = queue.submit_many([io(IoOpcode.READ, 1, 0, 1, buffer)] * 400)
        storage.wait_for(8)
        wait = desk.post(lambda: desk.device.remove_namespace(1))
        storage.gate.set()
        wait()
        ended = [desk.driver.complete(ticket).status for ticket in tickets]
        assert set(ended) == {"SUCCESS", "INVALID_FIELD"}
        assert storage.closed
        assert storage.trespasses == []
        assert desk.driver.read(2, 0, 1) == bytes(BLOCK)


@patiently
@given(aborts=st.lists(st.integers(0, 40) | st.just(0xFFFF), max_size=12), opens=st.integers(0, 12))
def test_aborts_at_any_time(aborts: list[int], opens: int) -> None:
    """5.1: a command that was aborted ends so, any other ends as ever, and each once."""
    storage = GatedStorage(shut=True)
    with gated(storage, threads=2) as desk, desk.driver.buffers.prp(BLOCK) as buffer:
        queue = desk.driver.create_queue_pair(64)
        tickets = queue.submit_many([io(IoOpcode.READ, 1, 0, 1, buffer)] * 30)
        by_cid = {ticket.command_id: ticket for ticket in tickets}
        aborted = set()
        for number, which in enumerate(aborts):
            if number == opens:
                storage.gate.set()
            cid = tickets[which].command_id if which < len(tickets) else which + 0x1000 & 0xFFFF
            result = desk.driver.admin(Command(AdminOpcode.ABORT, cdw10=cid << 16 | queue.sq.identifier)).result
            if not result & 1:
                aborted.add(cid)
        storage.gate.set()
        queue.drain()
        for cid, ticket in by_cid.items():
            assert desk.driver.complete(ticket).status == ("ABORT_REQUESTED" if cid in aborted else "SUCCESS")
        assert desk.device.namespaces[1].busy == 0
