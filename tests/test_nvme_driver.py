"""The NVMe driver of ``testing``: what it puts into memory, and that it finds what a controller does wrong."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.constants import CQE_SIZE, DOORBELLS, SQE_SIZE, IoOpcode, Status
from vfio_user.devices.nvme.storage.base import Views
from vfio_user.devices.nvme.storage.memory import MemoryStorage
from vfio_user.testing import FakeGuest
from vfio_user.testing.nvme import (
    Command,
    Completion,
    NvmeDriver,
    NvmeError,
    NvmeProtocolError,
    NvmeTimeoutError,
    Pages,
    Polling,
    SharedMemory,
    io,
)
from vfio_user.testing.nvme.access import Hardware, OutOfMemoryError
from vfio_user.testing.nvme.commands import COMPLETION
from vfio_user.testing.nvme.data import Buffers
from vfio_user.testing.nvme.queues import (
    CompletionQueue,
    CompletionSide,
    Doorbell,
    QueuePair,
    Ring,
    SubmissionQueue,
)
from vfio_user.testing.nvme.workload import LoggedMemory, NvmeWorkload, WrongDataError

PAGE, BLOCK = 4096, 512
SIZE = 256 * PAGE
ADDRESS = 0x10_0000


class NoController:
    """Registers of nothing: what is written is kept, and what was never written is 0."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}

    def read32(self, offset: int) -> int:
        return self.values.get(offset, 0)

    read64 = read32

    def write32(self, offset: int, value: int) -> None:
        self.values[offset] = value

    write64 = ring = write32


@pytest.fixture
def hardware() -> Hardware:
    return bare_hardware()


def bare_hardware() -> Hardware:
    return Hardware(NoController(), SharedMemory(memoryview(bytearray(SIZE)), ADDRESS), Polling())


# Pages


def test_pages_are_given_once() -> None:
    pages = Pages(bare_hardware().memory)
    first, second = pages.allocate(3), pages.allocate()
    assert (first, second) == (ADDRESS, ADDRESS + 3 * PAGE)
    pages.release(first, 3)
    assert pages.allocate(4) == second + PAGE
    assert pages.allocate(2) == first
    with pytest.raises(OutOfMemoryError, match="free"):
        pages.allocate(SIZE // PAGE)


@given(count=st.integers(1, 100))
def test_scattered_pages_do_not_follow_each_other(count: int) -> None:
    pages = Pages(bare_hardware().memory)
    taken = pages.scattered(count)
    assert len(set(taken)) == count
    assert not any(page + PAGE in taken for page in taken)
    for page in taken:
        pages.release(page)
    assert pages.free == SIZE // PAGE


# Data


def prp_pages(hardware: Hardware, pointer: bytes, length: int) -> list[tuple[int, int]]:
    """The pieces that a controller finds by a data pointer (4.3), read as the specification tells it."""
    first, second = struct.unpack("<QQ", pointer)
    pieces = [(first, min(length, PAGE - first % PAGE))]
    left = length - pieces[0][1]
    entry = second
    if left > PAGE:
        entry = _entry(hardware, second)
    while left:
        if second and left > PAGE and second % PAGE == PAGE - 8:
            second = entry
            entry = _entry(hardware, second)
        assert entry % PAGE == 0
        pieces.append((entry, min(left, PAGE)))
        left -= pieces[-1][1]
        second += 8
        entry = _entry(hardware, second) if left and length - pieces[0][1] > PAGE else 0
    return pieces


def _entry(hardware: Hardware, address: int) -> int:
    return int.from_bytes(hardware.memory.read(address, 8), "little")


@given(
    length=st.integers(1, 60 * PAGE // BLOCK).map(lambda blocks: blocks * BLOCK),
    offset=st.integers(0, PAGE // 4 - 1).map(lambda words: 4 * words),
    start=st.integers(0, PAGE // 8 - 1).map(lambda entries: 8 * entries),
    scattered=st.booleans(),
)
def test_prps_name_every_byte(length: int, offset: int, start: int, scattered: bool) -> None:
    hardware = bare_hardware()
    pages = Pages(hardware.memory)
    with Buffers(hardware, pages).prp(length, offset=offset, scattered=scattered, list_offset=start) as buffer:
        assert len(buffer) == length
        assert prp_pages(hardware, buffer.pointer, length) == list(buffer.pieces)
        data = bytes(n % 251 for n in range(length))
        buffer.write(data)
        assert buffer.read() == data
    assert pages.free == SIZE // PAGE


@given(
    lengths=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=20),
    per_segment=st.integers(2, 10),
    offset=st.integers(0, PAGE - 1),
)
def test_sgls_name_every_byte(lengths: list[int], per_segment: int, offset: int) -> None:
    hardware = bare_hardware()
    pages = Pages(hardware.memory)
    with Buffers(hardware, pages).sgl(lengths, per_segment=per_segment, offset=offset) as buffer:
        found, segment = [], buffer.pointer
        while segment:
            *data, last = [struct.unpack("<QI3xB", segment[at : at + 16]) for at in range(0, len(segment), 16)]
            assert all(kind == 0 for _, _, kind in data)
            found += [(address, length) for address, length, _ in data]
            address, length, kind = last
            found += [] if kind else [(address, length)]
            segment = hardware.memory.read(address, length) if kind else b""
        assert found == list(buffer.pieces)
        assert [length for _, length in found] == lengths
    assert pages.free == SIZE // PAGE


# Queues


def pair_of(hardware: Hardware, depth: int, *, pages: int = 1, timeout: float = 10.0) -> QueuePair:
    allocator = Pages(hardware.memory)
    sq = Ring(hardware, allocator.scattered(pages), PAGE, SQE_SIZE, depth)
    cq = Ring(hardware, allocator.scattered(pages), PAGE, CQE_SIZE, depth)
    side = CompletionSide(CompletionQueue(1, cq, Doorbell(hardware, 12), None))
    return QueuePair(hardware, SubmissionQueue(1, sq, Doorbell(hardware, 8)), side, timeout)


def end(pair: QueuePair, at: int, command_id: int, *, status: int = 0, phase: int = 1, queue: int = 1) -> None:
    """Write a completion, as a controller does that has fetched everything."""
    entry = COMPLETION.pack(0, 0, pair.sq.tail, queue, command_id, status << 1 | phase)
    pair.hardware.memory.write(pair.cq.ring.address(at), entry)


@given(depth=st.integers(2, 200), batches=st.lists(st.integers(1, 60), max_size=12))
def test_rings_go_round(depth: int, batches: list[int]) -> None:
    """In scattered pages, every command is where it belongs, and every completion is seen once."""
    pair = pair_of(bare_hardware(), depth, pages=4)
    place = 0
    for size in batches:
        tickets = pair.submit_many([Command(IoOpcode.FLUSH, 7)] * min(size, depth - 1))
        for ticket in tickets:
            entry = pair.hardware.memory.read(pair.sq.ring.address(place % depth), SQE_SIZE)
            assert struct.unpack_from("<BBHI", entry) == (IoOpcode.FLUSH, 0, ticket.command_id, 7)
            end(pair, place % depth, ticket.command_id, phase=1 - place // depth % 2)
            place += 1
        assert pair.reap() == tickets
        assert pair.reap() == []
    assert not pair.outstanding


def test_a_command_that_ends_twice_is_found(hardware: Hardware) -> None:
    pair = pair_of(hardware, 8)
    ticket = pair.submit(Command(IoOpcode.FLUSH, 1))
    end(pair, 0, ticket.command_id)
    pair.reap()
    end(pair, 1, ticket.command_id)
    with pytest.raises(NvmeProtocolError, match="not in flight"):
        pair.reap()


@pytest.mark.parametrize("queue", [0, 2])
def test_an_end_for_another_queue_is_found(hardware: Hardware, queue: int) -> None:
    pair = pair_of(hardware, 8)
    end(pair, 0, pair.submit(Command(IoOpcode.FLUSH, 1)).command_id, queue=queue)
    with pytest.raises(NvmeProtocolError, match=f"of queue {queue}"):
        pair.reap()


def test_a_command_that_never_ends_is_named(hardware: Hardware) -> None:
    hardware.registers.write32(0x1C, 3)
    pair = pair_of(hardware, 8, timeout=0.01)
    ticket = pair.submit(Command(IoOpcode.READ, 1))
    with pytest.raises(NvmeTimeoutError, match=r"READ \(queue 1, command 0\).*CSTS 0x3 \(RDY\|CFS\)"):
        pair.complete(ticket)
    with pytest.raises(NvmeTimeoutError, match="room"):
        pair.submit_many([Command(IoOpcode.FLUSH, 1)] * 8)


def test_a_full_queue_takes_no_more(hardware: Hardware) -> None:
    queue = pair_of(hardware, 4).sq
    queue.push(bytes(3 * SQE_SIZE))
    with pytest.raises(ValueError, match="room for 0"):
        queue.push(bytes(SQE_SIZE))


@given(
    old=st.integers(0, 99),
    added=st.integers(1, 99),
    seen=st.integers(0, 99),
)
def test_shadow_doorbells_ring_for_who_waits(old: int, added: int, seen: int) -> None:
    """7.13: exactly if the value passes the event index."""
    hardware = bare_hardware()
    bell = Doorbell(hardware, 8)
    bell.ring(old)
    before = bell.rung
    bell.prepare_shadow(ADDRESS, ADDRESS + PAGE)
    bell.use_shadow(ADDRESS, ADDRESS + PAGE)
    hardware.memory.write(ADDRESS + PAGE, seen.to_bytes(4, "little"))
    bell.ring(old + added)
    passes = old <= seen < old + added
    assert bell.rung - before == passes
    assert hardware.registers.read32(DOORBELLS + 8) == (old + added if passes else old)
    assert int.from_bytes(hardware.memory.read(ADDRESS, 4), "little") == old + added


# Errors


def test_errors_say_what_and_why() -> None:
    completion = Completion(0, 0, 0, 1, 5, (Status.LBA_OUT_OF_RANGE | 1 << 14) << 1 | 1)
    error = NvmeError("READ (queue 1, command 5)", completion)
    assert str(error) == "READ (queue 1, command 5): LBA_OUT_OF_RANGE (0x080, do not retry)"
    assert error.status == Status.LBA_OUT_OF_RANGE
    unknown = completion._replace(tagged=0x3FF << 1)
    assert str(NvmeError("it", unknown)) == "it: status 0x3ff (0x3ff)"
    with pytest.raises(NvmeError, match="LBA_OUT_OF_RANGE"):
        completion.check("it")


def test_a_refused_queue_leaves_no_pages_behind(driver: NvmeDriver) -> None:
    free = driver.pages.free
    for identifier, vector in ((65535, None), (3, 4000)):
        with pytest.raises(NvmeError, match="INVALID"):
            driver.create_queue_pair(identifier=identifier, vector=vector)
    assert driver.pages.free == free
    queue = driver.create_queue_pair(identifier=3)
    driver.delete_queue_pair(queue)
    driver.shutdown()
    assert driver.pages.free == (4 << 20) // PAGE


def test_without_queues_there_is_no_io() -> None:
    driver = NvmeDriver(NoController(), SharedMemory(memoryview(bytearray(SIZE))))
    with pytest.raises(NvmeProtocolError, match="not enabled"):
        driver.keep_alive()
    with pytest.raises(NvmeProtocolError, match="create_queue_pair"):
        driver.flush()


def test_a_controller_that_never_gets_ready() -> None:
    driver = NvmeDriver(NoController(), SharedMemory(memoryview(bytearray(SIZE))), timeout=0.01)
    with pytest.raises(NvmeTimeoutError, match=r"CSTS & 0x1 = 0x1: not in 0.01 s; CSTS 0x0 \(not ready\)"):
        driver.enable()


# The workload finds what is wrong


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[NvmeDriver]:
    with contextlib.closing(Nvme(path=str(tmp_path / "disk.img"), size=1 << 20)) as device:
        yield from driven(device)


def driven(device: Nvme) -> Iterator[NvmeDriver]:
    with FakeGuest(device, memory_size=4 << 20) as guest:
        one = NvmeDriver.of_client(guest.client, guest.memory)
        one.enable()
        one.create_queue_pair(16)
        yield one


class Wrong(MemoryStorage):
    """A disk that does one write in ten otherwise than it was told."""

    def __init__(self, kind: str) -> None:
        super().__init__("wrong", size=1 << 20)
        self.kind, self.writes = kind, 0

    def write_now(self, offset: int, views: Views) -> bool:
        self.writes += 1
        if self.writes % 10:
            return super().write_now(offset, views)
        if self.kind == "elsewhere":
            super().write_now((offset + BLOCK) % (self.size // 2), views)
        return True


@pytest.mark.parametrize("kind", ["lost", "elsewhere"])
def test_writes_that_went_wrong_are_found(kind: str) -> None:
    with contextlib.closing(Nvme(path="")) as device:
        device.add_namespace(Wrong(kind))
        for driver in driven(device):
            workload = NvmeWorkload(driver, weights={IoOpcode.WRITE: 1})
            workload.run(120)
            differences = workload.verify()
            assert differences
            assert "must be of write" in differences[0]
            reader = NvmeWorkload(driver, weights={IoOpcode.READ: 1, IoOpcode.WRITE: 3})
            with pytest.raises(WrongDataError, match="must be of write"):
                reader.run(4000)


def test_a_workload_in_its_own_thread(driver: NvmeDriver) -> None:
    """It goes on after a pause, and raises what went wrong when it is asked."""
    workload = NvmeWorkload(driver, first=512, blocks=512)
    for turn in (1, 2):
        workload.start()
        workload.wait(turn * 50)
        workload.pause()
        assert not workload.running
    with pytest.raises(NvmeTimeoutError, match="paused"):
        workload.wait(workload.done + 1000)
    assert workload.verify() == []
    driver.execute(io(IoOpcode.WRITE_ZEROES, 1, 512, 512))
    assert workload.verify()
    workload.start()
    with pytest.raises((WrongDataError, NvmeError)):
        workload.wait(workload.done + 100_000)


def test_logged_memory_knows_what_was_written() -> None:
    memory = LoggedMemory(SharedMemory(memoryview(bytearray(SIZE)), ADDRESS))
    memory.write(ADDRESS + 5, b"abc")
    assert memory.read(ADDRESS + 4, 5) == b"\0abc\0"
    assert memory.dirty() == [(ADDRESS + 5, 3)]
    assert memory.dirty() == []
