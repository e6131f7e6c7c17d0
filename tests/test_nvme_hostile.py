"""A guest that does all it can to an NVMe controller: registers, commands, lists of addresses, memory that changes.

Whatever it does, the server goes on, every command of an I/O queue ends exactly once with a status that there is, no
byte outside of what the guest may have written changes, and a reset makes a good controller of it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from fuzz import nvme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    Status,
)
from vfio_user.devices.nvme.queues import CompletionQueue, Ring
from vfio_user.fds import OwnedFd
from vfio_user.testing import FakeGuest
from vfio_user.testing.nvme import ClientInterrupts, Command, NvmeDriver, NvmeError, Ticket, io
from vfio_user.testing.nvme.commands import SGL, NvmeProtocolError
from vfio_user.testing.nvme.data import descriptor, prps
from vfio_user.testing.nvme.workload import NvmeWorkload
from vfio_user.wire.constants import DmaFlags, PciRegion

BLOCK, BLOCKS = 512, 2048
PAGE = 4096
MEMORY = 4 << 20
STATUSES = {int(status) for status in Status}

OWN = 0x1234_5000_0000
"""Where the driver's memory is: a guest that overwrites its own queues by a read only harms itself."""
CAGE, CAGE_SIZE = 0x4000_0000, 16 * PAGE
"""Memory of the guest that stands between pages of the same file that are not the guest's."""
LOCKED = CAGE + CAGE_SIZE
"""And some that it granted for reading only, which follows."""
GUARD = b"\xa5" * PAGE

patiently = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Complaints(logging.Handler):
    """What the package logs of exceptions that it did not expect."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.records.append(self.format(record))


class Cell:
    """A controller, a guest with a driver, and memory in which to see whether anything went where it must not."""

    def __init__(self, device: Nvme) -> None:
        self.device = device
        self.guest = FakeGuest(device, memory_size=MEMORY, memory_address=OWN)
        self.driver = NvmeDriver.of_client(self.guest.client, self.guest.memory, OWN)
        with OwnedFd(os.memfd_create("cage", os.MFD_CLOEXEC)) as file:
            os.ftruncate(file.fileno(), CAGE_SIZE + 3 * PAGE)
            self.file = mmap.mmap(file.fileno(), CAGE_SIZE + 3 * PAGE)
            self.file[:] = GUARD * (CAGE_SIZE // PAGE + 3)
            self.guest.client.dma_map(CAGE, CAGE_SIZE, file.fileno(), PAGE)
            self.guest.client.dma_map(LOCKED, PAGE, file.fileno(), PAGE + CAGE_SIZE, flags=DmaFlags.READ)

    def begin(self) -> None:
        """A new beginning, whatever the state: enabled, with one queue pair."""
        self.driver.enable()
        self.driver.create_queue_pair(64)

    def check(self) -> None:
        """The controller is as good as new, and nothing outside was touched."""
        self.begin()
        driver = self.driver
        assert driver.identify_controller().nn
        if driver.identify_namespace(1).block_size != BLOCK:
            driver.format(1, 0)
        data = os.urandom(16 * BLOCK)
        driver.write(1, 0, data)
        assert driver.read(1, 0, 16) == data
        assert self.file[:PAGE] == GUARD
        assert self.file[PAGE + CAGE_SIZE :] == GUARD * 2

    def close(self) -> None:
        self.guest.close()
        self.device.close()


@pytest.fixture
def complaints() -> Iterator[Complaints]:
    """Fails the test for every exception that was logged as a bug."""
    handler = Complaints()
    logger = logging.getLogger("vfio_user")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    assert handler.records == []


@pytest.fixture
def cell(tmp_path: Path, complaints: Complaints) -> Iterator[Cell]:
    one = Cell(Nvme(path=str(tmp_path / "disk.img"), size=BLOCKS * BLOCK))
    with contextlib.closing(one):
        yield one


# What a hostile guest thinks of

U32S = st.integers(0, 0xFFFF_FFFF) | st.sampled_from([0, 1, 2, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0xFFFF_FFFF])
ADDRESSES = st.sampled_from(
    [
        CAGE,
        CAGE + 4,
        CAGE + PAGE,
        CAGE + 2 * PAGE,
        CAGE + 8 * PAGE,
        CAGE + CAGE_SIZE - PAGE,
        CAGE + CAGE_SIZE - 8,
        LOCKED,
        LOCKED + PAGE - 8,
        LOCKED + PAGE,
        CAGE - PAGE,
        0,
        1,
        1 << 45,
        (1 << 64) - PAGE,
        (1 << 64) - 1,
    ]
)
GOOD = st.sampled_from(range(CAGE, CAGE + CAGE_SIZE, PAGE))
QWORDS = GOOD | GOOD | ADDRESSES | st.integers(0, (1 << 64) - 1)
NSIDS = st.sampled_from([1] * 12 + [0, 2, 256, 257, ALL_NAMESPACES])
LENGTHS = st.sampled_from([0, 4, 15, 16, 24, 64, 512, 512, 1024, 4096, 4096, 8192, 0x1_0000, 0xFFFF_FFF0, 0xFFFF_FFFF])
DESCRIPTORS = st.builds(
    lambda kind, address, length, sub: descriptor(kind, address, length, sub),
    st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3, 15]),
    GOOD | ADDRESSES,
    LENGTHS,
    st.sampled_from([0] * 15 + [1]),
)
POINTERS = st.builds(prps, QWORDS, QWORDS) | DESCRIPTORS
FLAGS = st.sampled_from([0] * 8 + [SGL] * 6 + [2 << 6, 3 << 6, 1, 2, 3, SGL | 1, 0x3C])
LBAS = st.sampled_from([0, 0, 1, BLOCKS - 1, BLOCKS, 0xFFFF_FFFF])
COUNTS = st.sampled_from([0, 0, 7, 15, 127, 0xFFFF, 1 << 30, 1 << 25 | 15, 0xFFFF_FFFF])

io_commands = st.builds(
    Command,
    opcode=st.sampled_from([*IoOpcode, *IoOpcode, *IoOpcode, 0x7F]),
    nsid=NSIDS,
    cdw10=LBAS,
    cdw11=st.sampled_from([0, 0, 0, 4, 0xFFFF_FFFF]),
    cdw12=COUNTS,
    cdw13=U32S,
    flags=FLAGS,
    pointer=POINTERS,
    metadata=QWORDS,
    cdw2=U32S,
)
FEATURES = st.sampled_from([feature for feature in Feature if feature != Feature.KEEP_ALIVE_TIMER])
ADMIN_DWORDS = (
    U32S
    | st.builds(lambda low, high: low | high << 16, st.integers(0, 66), st.sampled_from([0, 1, 7, 255, 1023, 0xFFFF]))
    | st.builds(lambda page, size: size << 16 | page, st.sampled_from([*LogPage]), st.integers(0, 0xFFFF))
    | FEATURES
    | st.sampled_from([*Identify])
)
admin_commands = st.builds(
    Command,
    opcode=st.sampled_from([*(set(AdminOpcode) - {AdminOpcode.ASYNC_EVENT_REQUEST}), 0x7F]),
    nsid=NSIDS,
    cdw10=ADMIN_DWORDS,
    cdw11=U32S | st.builds(lambda queue, bits: queue << 16 | bits, st.integers(0, 66), st.integers(0, 7)),
    cdw12=U32S,
    cdw13=st.sampled_from([0, 0, 1, 0xFFFF_FFFF]),
    flags=FLAGS,
    pointer=POINTERS,
).filter(lambda c: c.opcode != AdminOpcode.SET_FEATURES or c.cdw10 & 0xFF != Feature.KEEP_ALIVE_TIMER)


# Registers


OFFSETS = st.sampled_from([*Register, *range(DOORBELLS, DOORBELLS + 32, 4), DOORBELLS + 8 * 64, 0x3FFC, 2, 0x16])
ACCESSES = st.tuples(
    OFFSETS, st.sampled_from([4, 4, 4, 8, 1, 2]), st.sampled_from([0, 1, 0x46_0001, 0x46_4001, 0x4E56_4D65]) | QWORDS
)


@patiently
@given(accesses=st.lists(ACCESSES, max_size=30))
def test_registers_in_any_order(cell: Cell, accesses: list[tuple[int, int, int]]) -> None:
    for offset, size, value in accesses:
        with contextlib.suppress(OSError):
            cell.guest.write(offset, value & (1 << 8 * size) - 1, size)
        with contextlib.suppress(OSError):
            cell.guest.read(offset, size)
    cell.check()


# Commands


@patiently
@given(commands=st.lists(io_commands, min_size=1, max_size=30), content=st.lists(DESCRIPTORS | st.binary(max_size=16)))
def test_every_io_command_ends_once(cell: Cell, commands: list[Command], content: list[bytes]) -> None:
    cell.begin()
    scribble(cell, content)
    tickets = cell.driver.queues[0].submit_many(commands)
    cell.driver.queues[0].drain()
    assert {ticket.completion.code for ticket in tickets if ticket.completion} <= STATUSES
    cell.check()


@patiently
@given(commands=st.lists(admin_commands, min_size=1, max_size=20))
def test_every_admin_command_ends_once(cell: Cell, commands: list[Command]) -> None:
    cell.begin()
    tickets = cell.driver.admin_queue.submit_many(commands)
    cell.driver.admin_queue.reap_until(
        lambda: not cell.driver.admin_queue.outstanding or bool(cell.driver.status & ControllerStatus.CFS),
        "all of them, or a controller that failed for doorbells that are in no memory",
    )
    assert {ticket.completion.code for ticket in tickets if ticket.completion} <= STATUSES
    cell.check()


def scribble(cell: Cell, content: list[bytes]) -> None:
    """Fill the cage with these, again and again."""
    data = b"".join(content)[:CAGE_SIZE] or b"\0"
    cell.file[PAGE : PAGE + CAGE_SIZE] = (data * (CAGE_SIZE // len(data) + 1))[:CAGE_SIZE]


@pytest.fixture(scope="module")
def target() -> Iterator[nvme.Target]:
    with contextlib.closing(nvme.Target()) as one:
        yield one


ENTRIES = (io_commands | admin_commands).map(lambda command: command.pack(3))
OPERATIONS = st.one_of(
    st.builds(lambda page, part, n: bytes((0, page, n)) + part * n, st.integers(0, 63), DESCRIPTORS, st.integers(1, 9)),
    ACCESSES.map(lambda access: b"\1" + struct.pack("<HI", access[0], access[2] & 0xFFFF_FFFF)),
    st.builds(lambda which, entry: bytes((which,)) + entry, st.sampled_from([2, 3, 3]), ENTRIES),
)


@patiently
@given(script=st.lists(OPERATIONS, max_size=30).map(b"".join) | st.binary(max_size=300))
def test_everything_at_once(target: nvme.Target, script: bytes) -> None:
    """All of it in any order, as the fuzzer has it."""
    target.run(script)


def test_the_target_does_reach_the_controller(target: nvme.Target) -> None:
    read = Command(IoOpcode.READ, 1, pointer=prps(0)).pack(1)
    assert target.run(b"\3" + read + b"\1" + struct.pack("<HI", Register.INTMS, 1) + b"\0\0\1" + bytes(16)) == 3
    assert target.run(b"\3" + read[:-1]) == 0
    assert target.device.logs.health.reads


# Lists of addresses


@patiently
@given(entries=st.lists(QWORDS, min_size=1, max_size=40), start=st.sampled_from([0, 8, PAGE - 8, PAGE - 4]))
def test_prp_lists_of_anything(cell: Cell, entries: list[int], start: int) -> None:
    """Each list is in a page of its own, the last entry of which points anywhere, also back."""
    cell.begin()
    scribble(cell, [struct.pack(f"<{len(entries)}Q", *entries)])
    pointer = prps(CAGE + 4 * PAGE, CAGE + start)
    run(cell, [Command(code, 1, cdw12=n, pointer=pointer) for code in (1, 2, 5) for n in (15, 63, 1023, 2047)])


@patiently
@given(descriptors=st.lists(DESCRIPTORS, min_size=1, max_size=40), length=LENGTHS)
def test_sgl_segments_of_anything(cell: Cell, descriptors: list[bytes], length: int) -> None:
    cell.begin()
    scribble(cell, descriptors)
    firsts = [descriptor(kind, CAGE, length) for kind in (2, 3)]
    run(cell, [Command(code, 1, cdw12=n, flags=SGL, pointer=p) for p in firsts for code in (1, 2, 5) for n in (0, 255)])


def run(cell: Cell, commands: list[Command]) -> None:
    tickets = cell.driver.queues[0].submit_many(commands)
    cell.driver.queues[0].drain()
    assert {ticket.completion.code for ticket in tickets if ticket.completion} <= STATUSES
    cell.check()


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        ("to itself", descriptor(2, CAGE, 16)),
        ("to itself, behind data of no length", descriptor(0, CAGE, 0) + descriptor(2, CAGE, 32)),
        ("a huge one", descriptor(2, CAGE, CAGE_SIZE)),
        ("huge, of data of no length", descriptor(0, CAGE, 0) * (CAGE_SIZE // 16)),
    ],
)
def test_sgl_loops_end(cell: Cell, name: str, segment: bytes) -> None:
    cell.begin()
    scribble(cell, [segment])
    for first in (descriptor(2, CAGE, len(segment)), descriptor(2, CAGE, CAGE_SIZE)):
        ticket = cell.driver.queues[0].submit(Command(IoOpcode.READ, 1, flags=SGL, pointer=first))
        assert cell.driver.complete(ticket).code in {
            Status.INVALID_NUMBER_OF_SGLS,
            Status.INVALID_SGL_SEGMENT,
            Status.DATA_SGL_LENGTH_INVALID,
        }
    cell.check()


def test_a_prp_list_that_comes_back_to_itself_ends(cell: Cell) -> None:
    """1 MiB by a list of one page whose last entry is that page: each turn names the same pages again."""
    cell.begin()
    entries = [CAGE + PAGE] * 511 + [CAGE]
    scribble(cell, [struct.pack("<512Q", *entries)])
    ticket = cell.driver.queues[0].submit(Command(IoOpcode.READ, 1, cdw12=2047, pointer=prps(CAGE + PAGE, CAGE)))
    assert cell.driver.complete(ticket).code == Status.SUCCESS
    cell.check()


@pytest.mark.parametrize("address", [LOCKED, CAGE + CAGE_SIZE - PAGE])
def test_memory_that_may_only_be_read_is_not_written(cell: Cell, address: int) -> None:
    """The second page is read-only: what can be written before it may be; a write to the disk from there is fine."""
    cell.begin()
    driver = cell.driver
    driver.write(1, 0, b"\x11" * 2 * PAGE)
    pointer = prps(address, LOCKED)
    read, write = (Command(code, 1, cdw12=15, pointer=pointer) for code in (IoOpcode.READ, IoOpcode.WRITE))
    assert driver.complete(driver.queues[0].submit(read)).code == Status.DATA_TRANSFER_ERROR
    assert driver.complete(driver.queues[0].submit(write)).code == Status.SUCCESS
    assert driver.read(1, 8, 8) == GUARD
    cell.check()


# Queues


def test_rings_that_overlap(cell: Cell) -> None:
    """A completion queue on top of a submission queue: what it makes of that is the guest's affair."""
    cell.begin()
    driver = cell.driver
    ring = driver.queues[0].sq.ring.address(0)
    driver.admin(Command(AdminOpcode.CREATE_IO_CQ, cdw10=63 << 16 | 9, cdw11=1, pointer=prps(ring)))
    driver.admin(Command(AdminOpcode.CREATE_IO_SQ, cdw10=63 << 16 | 9, cdw11=9 << 16 | 1, pointer=prps(ring)))
    for tail in range(1, 64):
        driver.hardware.registers.ring(DOORBELLS + 8 * 9, tail)
    driver.get_feature(Feature.ARBITRATION)
    cell.check()


@pytest.mark.parametrize("opcode", [AdminOpcode.CREATE_IO_SQ, AdminOpcode.CREATE_IO_CQ])
@pytest.mark.parametrize("address", [1 << 45, CAGE + CAGE_SIZE - PAGE, LOCKED])
def test_queues_that_the_guest_has_no_memory_for(cell: Cell, opcode: AdminOpcode, address: int) -> None:
    """Refused, or fatal as soon as they are used (9.5); a reset is the way out."""
    cell.begin()
    driver = cell.driver
    other = driver.pages.allocate(16)
    where = {AdminOpcode.CREATE_IO_CQ: other, AdminOpcode.CREATE_IO_SQ: other} | {opcode: address}
    with contextlib.suppress(NvmeError):
        for code, flags in ((AdminOpcode.CREATE_IO_CQ, 1), (AdminOpcode.CREATE_IO_SQ, 9 << 16 | 1)):
            driver.admin(Command(code, cdw10=1023 << 16 | 9, cdw11=flags, pointer=prps(where[code])))
        driver.hardware.registers.ring(DOORBELLS + 8 * 9, 1000)
        with contextlib.suppress(NvmeProtocolError):
            driver.wait_status(ControllerStatus.CFS, ControllerStatus.CFS)
    driver.pages.release(other, 16)
    cell.check()


@pytest.mark.parametrize("tail", [64, 65, 0xFFFF, 0x1_0000, 0x1_0001, 0xFFFF_FFFF])
def test_doorbells_beyond_the_queue(cell: Cell, tail: int) -> None:
    """5.2.1: an event, and nothing is fetched."""
    cell.begin()
    driver = cell.driver
    event = driver.async_event()
    driver.hardware.registers.ring(DOORBELLS + 8, tail)
    assert driver.event(event).what == AsyncEvent.INVALID_DOORBELL_VALUE
    driver.flush()
    assert not driver.queues[0].outstanding
    cell.check()


def test_a_head_that_is_ahead_of_the_completions(cell: Cell) -> None:
    """5.2.1: a head between the two ends of what was posted is the only one that can be."""
    cell.begin()
    driver = cell.driver
    event = driver.async_event()
    driver.hardware.registers.ring(DOORBELLS + 8 + 4, 5)
    assert driver.event(event).what == AsyncEvent.INVALID_DOORBELL_VALUE
    driver.flush()
    cell.check()


def test_the_same_identifier_twice(cell: Cell) -> None:
    """4.2: both end, one of them in a conflict if the other is still under way."""
    cell.begin()
    queue = cell.driver.queues[0]
    queue.sq.push(b"".join(Command(IoOpcode.FLUSH, 1).pack(7) for _ in range(20)))
    queue.sq.ring_doorbell()
    seen: list[int] = []
    while len(seen) < 20:
        ended = queue.cq.take()
        seen += [completion.code for completion in ended]
        queue.cq.ring_doorbell()
        cell.guest.read32(Register.CSTS)
    assert set(seen) <= {Status.SUCCESS, Status.COMMAND_ID_CONFLICT}
    cell.check()


def test_completions_that_nobody_takes(cell: Cell) -> None:
    """4.1.2: a full queue stops its submission queues, and no others; nothing is overwritten."""
    cell.begin()
    driver = cell.driver
    queue = driver.create_queue_pair(64, completion_depth=8)
    queue.sq.push(b"".join(Command(IoOpcode.FLUSH, 1).pack(n) for n in range(60)))
    queue.sq.ring_doorbell()
    for _ in range(20):
        driver.flush(queue=driver.queues[0])
    taken: list[int] = []
    rounds = 0
    while len(taken) < 60:
        ended = queue.cq.take()
        assert len(ended) <= 7
        taken += [completion.command_id for completion in ended]
        queue.cq.ring_doorbell()
        driver.get_feature(Feature.ARBITRATION)
        rounds += 1
    assert sorted(taken) == list(range(60))
    assert rounds >= 60 // 7
    cell.check()


class EagerGuest:
    """The ring of a guest that rings the doorbell as soon as it sees an entry, while that is still being written."""

    size = 4

    def __init__(self) -> None:
        self.queue = CompletionQueue(1, cast(Ring, self), 0, interrupts=True)
        self.taken: list[bool] = []

    def write(self, index: int, entry: bytes) -> None:
        self.taken.append(self.queue.take_head((index + 1) % self.size))


def test_a_head_that_comes_while_the_completion_is_written() -> None:
    """4.1: where memory is reached by messages, the guest sees an entry before the controller hears that it has it."""
    guest = EagerGuest()
    for number in range(10):
        guest.queue.post(0, 0, 1, number, 0)
    assert guest.taken == [True] * 10
    assert guest.queue.room == 3


# Memory that changes, and goes


@pytest.mark.parametrize("shadow", [False, True], ids=["rings", "shadow doorbells"])
def test_memory_that_changes_while_it_is_read(cell: Cell, shadow: bool) -> None:
    """Another processor writes nonsense into queues, lists and shadow doorbells all the time."""
    cell.begin()
    driver = cell.driver
    if shadow:
        driver.enable_shadow_doorbells()
    queue = driver.queues[0]
    ring = queue.sq.ring.address(0)
    stop = threading.Event()

    def write() -> None:
        memory, number = cell.guest.memory, 0
        while not stop.is_set():
            number += 1
            memory[ring - OWN : ring - OWN + PAGE] = os.urandom(PAGE)
            scribble(cell, [descriptor(number % 4, CAGE + number % 16 * PAGE, 1 << number % 32)])
            if shadow and driver.shadow_pages is not None:
                for page in driver.shadow_pages:
                    struct.pack_into("<4I", memory, page - OWN + 8, *([number % 70] * 4))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for tail in range(400):
            driver.hardware.registers.ring(DOORBELLS + 8, tail % 64)
            driver.hardware.registers.ring(DOORBELLS + 12, tail % 64)
            if tail % 16 == 0:
                driver.get_feature(Feature.ARBITRATION)
    finally:
        stop.set()
        thread.join(10)
    cell.check()


def test_memory_that_goes_under_a_queue(cell: Cell) -> None:
    """9.5: what cannot be reached any more is fatal; with other memory and a reset it goes on."""
    cell.begin()
    driver = cell.driver
    driver.admin(Command(AdminOpcode.CREATE_IO_CQ, cdw10=63 << 16 | 9, cdw11=1, pointer=prps(CAGE)))
    driver.admin(Command(AdminOpcode.CREATE_IO_SQ, cdw10=63 << 16 | 9, cdw11=9 << 16 | 1, pointer=prps(CAGE + PAGE)))
    scribble(cell, [bytes(PAGE)])
    driver.hardware.registers.ring(DOORBELLS + 8 * 9, 1)
    while not cell.file[PAGE + 14] & 1:
        driver.get_feature(Feature.ARBITRATION)
    cell.guest.client.dma_unmap(CAGE, CAGE_SIZE)
    driver.hardware.registers.ring(DOORBELLS + 8 * 9, 2)
    driver.wait_status(ControllerStatus.CFS, ControllerStatus.CFS)
    cell.begin()
    driver.flush()


def test_memory_that_goes_under_a_thousand_commands(tmp_path: Path, complaints: Complaints) -> None:
    """An unmap waits for what is under way, and leaves nobody with memory that is gone."""
    device = Nvme(path=str(tmp_path / "disk.img"), size=BLOCKS * BLOCK)
    with contextlib.closing(device), FakeGuest(device, memory_size=MEMORY) as guest:
        driver = NvmeDriver.of_client(guest.client, guest.memory)
        driver.enable()
        queue = driver.create_queue_pair(64)
        with OwnedFd(os.memfd_create("more", os.MFD_CLOEXEC)) as file:
            os.ftruncate(file.fileno(), CAGE_SIZE)
            for _ in range(20):
                guest.client.dma_map(CAGE, CAGE_SIZE, file.fileno())
                tickets = queue.submit_many(
                    Command(code, 1, cdw12=15, pointer=prps(CAGE, CAGE + PAGE)) for code in (1, 2, 5, 12) * 12
                )
                guest.client.dma_unmap(CAGE, CAGE_SIZE)
                queue.drain()
                assert {t.completion.code for t in tickets if t.completion} <= {
                    Status.SUCCESS,
                    Status.DATA_TRANSFER_ERROR,
                    Status.COMPARE_FAILURE,
                }


def test_a_guest_that_leaves_in_the_middle(tmp_path: Path, complaints: Complaints) -> None:
    """The next one finds a controller that still believes in queues which are in no one's memory: it resets it."""
    device = Nvme(path=str(tmp_path / "disk.img"), size=BLOCKS * BLOCK)
    with contextlib.closing(device):
        for _ in range(5):
            with FakeGuest(device, memory_size=MEMORY) as guest:
                driver = NvmeDriver.of_client(guest.client, guest.memory)
                driver.enable()
                queue = driver.create_queue_pair(64)
                buffer = driver.buffers.prp(64 * BLOCK)
                queue.submit_many(io(IoOpcode.WRITE, 1, 64 * n, 64, buffer) for n in range(30))
        with FakeGuest(device, memory_size=MEMORY) as guest:
            guest.write32(DOORBELLS + 8, 3)
            with NvmeDriver.of_client(guest.client, guest.memory) as driver:
                driver.create_queue_pair()
                assert driver.read(1, 0, 1) == bytes(BLOCK)


def test_resets_under_load(cell: Cell) -> None:
    """7.3: what was under way ends, or does not; nothing of it appears after the reset."""
    codes = IoOpcode.WRITE, IoOpcode.VERIFY
    for turn in range(12):
        cell.begin()
        queue = cell.driver.queues[0]
        with cell.driver.buffers.prp(64 * BLOCK) as buffer:
            queue.submit_many(io(code, 1, 64 * n, 64, buffer) for n in range(20) for code in codes)
            if turn % 3 == 0:
                cell.driver.disable()
            elif turn % 3 == 1:
                cell.guest.reset()
                cell.guest.write16(4, 6, PciRegion.CONFIG)
                cell.driver.forget()
            else:
                cell.driver.reset_subsystem()
    cell.check()
    workload = NvmeWorkload(cell.driver, blocks=BLOCKS)
    workload.run(200)
    assert workload.verify() == []


def test_by_messages(tmp_path: Path, complaints: Complaints) -> None:
    """A guest whose memory can only be reached by messages: slower, and the same."""
    device = Nvme(path=str(tmp_path / "disk.img"), size=BLOCKS * BLOCK)
    with contextlib.closing(device), FakeGuest(device, memory_size=MEMORY, shared=False) as guest:
        interrupts = ClientInterrupts(guest.client)
        with NvmeDriver.of_client(guest.client, guest.memory, interrupts=interrupts) as driver:
            for vector in (1, 2):
                driver.create_queue_pair(16, vector=vector)
            workload = NvmeWorkload(driver, blocks=512)
            workload.run(300)
            assert workload.verify() == []
            bad = Command(IoOpcode.READ, 1, cdw12=15, pointer=prps(1 << 45, 0))
            ticket: Ticket = driver.queues[0].submit(bad)
            assert driver.complete(ticket).code == Status.DATA_TRANSFER_ERROR
        interrupts.close()
