"""edu, register by register as its specification (QEMU's docs/specs/edu.rst) has it, and against a model."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user import Client, DeviceState
from vfio_user.devices.edu import Edu
from vfio_user.fds import OwnedFd
from vfio_user.wire.constants import DmaFlags, IrqSetFlags, PciIrq

from .device_support import TIMEOUT, Event, attached, events, guest_memory, serving

ID, LIVENESS, FACTORIAL, STATUS = 0x00, 0x04, 0x08, 0x20
IRQ_STATUS, IRQ_RAISE, IRQ_ACK = 0x24, 0x60, 0x64
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
START, TO_GUEST, DMA_IRQ = 1, 2, 4
BUFFER, PAGE = 0x40000, 4096
BAR_SIZE = 1 << 20
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
READ_WRITE = DmaFlags.READ | DmaFlags.WRITE
ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
UNMASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK


def read(client: Client, offset: int, size: int = 4) -> int:
    return int.from_bytes(client.region_read(0, offset, size), "little")


def write(client: Client, offset: int, value: int, size: int = 4) -> None:
    client.region_write(0, offset, value.to_bytes(size, "little"))


def transfer(client: Client, source: int, destination: int, count: int, command: int) -> None:
    """One DMA, done when this returns."""
    for offset, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count), (COMMAND, command)):
        write(client, offset, value, 8)
    deadline = time.monotonic() + TIMEOUT
    while read(client, COMMAND) & START:  # by messages it takes as long as this client needs to answer
        assert time.monotonic() < deadline


@pytest.fixture
def edu() -> Iterator[Client]:
    with attached(Edu()) as client:
        yield client


@pytest.fixture
def event() -> Iterator[Event]:
    with events(1) as (one,):
        yield one


def test_identification(edu: Client) -> None:
    assert read(edu, ID) == 0x010000ED
    write(edu, ID, 0)
    assert read(edu, ID) == 0x010000ED
    assert edu.region_read(7, 0, 4).hex() == "3412e811"
    assert edu.region_read(7, 8, 4).hex() == "1000ff00"
    assert edu.regions[0].size == BAR_SIZE
    assert [irq.count for irq in edu.irqs] == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("value", [0, 1, 0xDEADBEEF, U32])
def test_liveness_inverts(edu: Client, value: int) -> None:
    write(edu, LIVENESS, value)
    assert read(edu, LIVENESS) == value ^ U32


@pytest.mark.parametrize("value", [0, 1, 2, 5, 12, 13, 33, 34, 35, 1000, U32])
def test_factorial_in_32_bits(edu: Client, value: int) -> None:
    write(edu, FACTORIAL, value)
    assert read(edu, STATUS) == 0
    assert read(edu, FACTORIAL) == (math.factorial(value) & U32 if value < 100 else 0)


def test_only_the_interrupt_bit_of_status_is_written(edu: Client) -> None:
    write(edu, STATUS, U32)
    assert read(edu, STATUS) == 0x80
    write(edu, STATUS, 0x7F)
    assert read(edu, STATUS) == 0


def test_a_finished_factorial_interrupts_if_asked_to(edu: Client, event: Event) -> None:
    edu.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])
    write(edu, FACTORIAL, 3)
    assert read(edu, IRQ_STATUS) == 0
    write(edu, STATUS, 0x80)
    write(edu, FACTORIAL, 4)
    assert (read(edu, IRQ_STATUS), read(edu, FACTORIAL)) == (1, 24)
    assert event.take() == 1


def test_raise_and_acknowledge_add_and_take_away_bits(edu: Client) -> None:
    write(edu, IRQ_RAISE, 0b1010)
    write(edu, IRQ_RAISE, 0b0011)
    assert read(edu, IRQ_STATUS) == 0b1011
    write(edu, IRQ_STATUS, 0)  # read-only
    write(edu, IRQ_ACK, 0b0110)
    assert read(edu, IRQ_STATUS) == 0b1001
    assert (read(edu, IRQ_RAISE), read(edu, IRQ_ACK)) == (U32, U32)  # write-only


def config_interrupt(client: Client) -> bool:
    return bool(client.region_read(7, 6, 1)[0] & 0x8)


def test_intx_is_a_level(edu: Client, event: Event) -> None:
    edu.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])
    write(edu, IRQ_RAISE, 1)
    write(edu, IRQ_RAISE, 2)
    assert event.take() == 1  # the line was high already, and nobody has ended the first one
    assert config_interrupt(edu)
    edu.set_irqs(PciIrq.INTX, UNMASK, 0, 1)
    assert event.take() == 1  # the cause stands
    write(edu, IRQ_ACK, 1)
    assert config_interrupt(edu)
    edu.set_irqs(PciIrq.INTX, UNMASK, 0, 1)
    assert event.take() == 1
    write(edu, IRQ_ACK, 2)
    assert not config_interrupt(edu)
    edu.set_irqs(PciIrq.INTX, UNMASK, 0, 1)
    assert event.take() == 0


def test_msi_where_the_client_listens_for_it() -> None:
    with attached(Edu()) as edu, events(2) as (intx, msi):
        edu.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [intx.fd])
        edu.set_irqs(PciIrq.MSI, ASSIGN, 0, 1, [msi.fd])
        write(edu, IRQ_RAISE, 1)
        write(edu, IRQ_RAISE, 2)
        assert (msi.take(), intx.take()) == (2, 0)
        assert not config_interrupt(edu)
        edu.set_irqs(PciIrq.MSI, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 0, 0)
        write(edu, IRQ_RAISE, 4)
        assert (msi.take(), intx.take()) == (0, 1)
        assert read(edu, IRQ_STATUS) == 7


@pytest.mark.parametrize(
    "flags", [READ_WRITE, READ_WRITE | DmaFlags.MMAP, READ_WRITE | DmaFlags.FILE_IO], ids=["default", "mmap", "file"]
)
def test_dma_both_ways_by_file_descriptor(edu: Client, flags: int) -> None:
    data = random.Random(1).randbytes(PAGE)
    with guest_memory(1 << 20) as memory:
        os.pwrite(memory, data, 0x3000)
        edu.dma_map(0x10000, 1 << 20, memory, flags=flags)
        transfer(edu, 0x13000, BUFFER, PAGE, START)
        transfer(edu, BUFFER + 5, 0x10001, PAGE - 5, START | TO_GUEST)
        assert os.pread(memory, PAGE, 0) == b"\0" + data[5:] + bytes(4)


def test_dma_both_ways_by_messages(edu: Client) -> None:
    data = random.Random(2).randbytes(PAGE)
    memory = bytearray(1 << 16)
    memory[7 : 7 + PAGE] = data
    edu.dma_map(1 << 40, 1 << 16, memory=memory)
    transfer(edu, (1 << 40) + 7, BUFFER, PAGE, START)
    transfer(edu, BUFFER, (1 << 40) + 0x8000, PAGE, START | TO_GUEST)
    assert memory[0x8000 : 0x8000 + PAGE] == data
    assert memory[0x9000:] == bytes(0x7000)


def test_dma_that_has_ended_interrupts_if_asked_to(edu: Client, event: Event) -> None:
    edu.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])
    with guest_memory(PAGE) as memory:
        edu.dma_map(0, PAGE, memory)
        transfer(edu, 0, BUFFER, 16, START)
        assert read(edu, IRQ_STATUS) == 0
        transfer(edu, 0, BUFFER, 16, START | DMA_IRQ)
        assert (read(edu, IRQ_STATUS), event.take(), read(edu, COMMAND)) == (0x100, 1, DMA_IRQ)


def test_a_command_without_start_is_ignored(edu: Client) -> None:
    write(edu, COMMAND, TO_GUEST | DMA_IRQ, 8)
    assert (read(edu, COMMAND), read(edu, IRQ_STATUS)) == (0, 0)


WRONG_TRANSFERS = [
    ("before the buffer", 0x1000, BUFFER - 1, 16),
    ("beyond the buffer", 0x1000, BUFFER + PAGE - 15, 16),
    ("not the buffer", 0x1000, 0, 16),
    ("buffer wraps", 0x1000, U64, 16),
    ("huge count", 0x1000, BUFFER, U64),
    ("one too many", 0x1000, BUFFER, PAGE + 1),
    ("unmapped", 0x40_0000, BUFFER, 16),
    ("half unmapped", 0x1FF8, BUFFER, 16),
    ("guest wraps", U64 - 7, BUFFER, 16),
    ("read-only or write-only", 0x8000, BUFFER, 16),
]


@pytest.mark.parametrize("to_guest", [False, True], ids=["read", "write"])
@pytest.mark.parametrize(
    ("guest", "own", "count"), [case[1:] for case in WRONG_TRANSFERS], ids=[c[0] for c in WRONG_TRANSFERS]
)
def test_a_transfer_that_cannot_be_moves_nothing(
    caplog: pytest.LogCaptureFixture, guest: int, own: int, count: int, to_guest: bool
) -> None:
    device = Edu()
    pattern = random.Random(3).randbytes(PAGE)
    with attached(device) as edu, guest_memory(0x3000) as memory:
        os.pwrite(memory, pattern, 0)
        forbidden = DmaFlags.READ if to_guest else DmaFlags.WRITE
        edu.dma_map(0x1000, 0x1000, memory)
        edu.dma_map(0x8000, 0x1000, memory, 0x1000, flags=forbidden)
        transfer(edu, 0x1000, BUFFER, PAGE, START)
        os.pwrite(memory, bytes(PAGE), 0)
        ends = (own, guest) if to_guest else (guest, own)
        transfer(edu, *ends, count, START | DMA_IRQ | (TO_GUEST if to_guest else 0))
        assert read(edu, IRQ_STATUS) == 0x100  # it has ended all the same
        assert device.buffer == pattern
        assert os.pread(memory, 0x3000, 0) == bytes(0x3000)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # a word of it, no traceback


@pytest.mark.parametrize("to_guest", [False, True])
def test_nothing_is_moved_by_a_count_of_0(edu: Client, to_guest: bool) -> None:
    transfer(edu, BUFFER, BUFFER, 0, START | DMA_IRQ | (TO_GUEST if to_guest else 0))
    assert read(edu, IRQ_STATUS) == 0x100


def test_a_client_that_refuses_its_memory_fails_the_transfer_only(edu: Client) -> None:
    edu.dma_map(0, PAGE)  # by messages, and nothing is registered to answer them from
    transfer(edu, 0, BUFFER, 16, START | DMA_IRQ)
    assert (read(edu, IRQ_STATUS), read(edu, ID)) == (0x100, 0x010000ED)


def test_dma_addresses_are_cut_by_the_mask() -> None:
    with attached(Edu(dma_mask=(1 << 28) - 1)) as edu, guest_memory(PAGE) as memory:
        edu.dma_map(0x1000, PAGE, memory)
        os.pwrite(memory, b"cut", 0)
        transfer(edu, 0xF000_0000_1000, BUFFER, 3, START)
        transfer(edu, BUFFER, 0x1000_1100, 3, START | TO_GUEST)
        assert os.pread(memory, 3, 0x100) == b"cut"


class Frozen:
    """A link that keeps deferred work until it is told to do it: the device is busy meanwhile."""

    spin = 0.0

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def defer(self, work: Callable[[], None]) -> None:
        self.work.append(work)

    def dma_read(self, address: int, buffer: memoryview) -> None:
        raise OSError(errno.EFAULT, "not here")

    def dma_write(self, address: int, data: memoryview) -> None:
        raise OSError(errno.EFAULT, "not here")

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        raise AssertionError

    def unwatch(self, fd: int) -> None:
        raise AssertionError

    def stop(self) -> None:
        raise AssertionError


def poke(device: Edu, offset: int, value: int, size: int = 4) -> None:
    device.region_write(0, offset, memoryview(value.to_bytes(size, "little")))


def peek(device: Edu, offset: int, size: int = 4) -> int:
    data = bytearray(size)
    device.region_read(0, offset, memoryview(data))
    return int.from_bytes(data, "little")


def test_busy_is_visible_and_nothing_is_started_over() -> None:
    device, link = Edu(), Frozen()
    device.connected(link)
    poke(device, FACTORIAL, 5)
    assert peek(device, STATUS) == 1
    poke(device, FACTORIAL, 3)  # ignored while it computes
    poke(device, SOURCE, BUFFER, 8)
    poke(device, COMMAND, START)
    assert peek(device, COMMAND) == START
    for offset in (SOURCE, DESTINATION, COUNT):  # nor may the transfer be changed while it runs
        poke(device, offset, 77, 8)
    poke(device, COMMAND, START | TO_GUEST | DMA_IRQ)
    assert [peek(device, offset, 8) for offset in (SOURCE, DESTINATION, COUNT, COMMAND)] == [BUFFER, 0, 0, START]
    assert len(link.work) == 2
    for work in link.work:
        work()
    assert (peek(device, STATUS), peek(device, FACTORIAL), peek(device, COMMAND)) == (0, 120, 0)
    assert peek(device, IRQ_STATUS) == 0


def test_a_reset_ends_what_was_busy() -> None:
    device, link = Edu(), Frozen()
    device.connected(link)
    poke(device, STATUS, 0x80)
    poke(device, FACTORIAL, 5)
    poke(device, COMMAND, START | DMA_IRQ)
    device.reset()
    for work in link.work:
        work()
    assert [peek(device, offset) for offset in (STATUS, FACTORIAL, COMMAND, IRQ_STATUS)] == [0, 0, 0, 0]


class Model:
    """What the specification says, with work that ends at once."""

    def __init__(self) -> None:
        self.registers = dict.fromkeys(
            (LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, SOURCE, DESTINATION, COUNT, COMMAND), 0
        )
        self.buffer = bytearray(PAGE)
        self.memory = bytearray(MAPPED_SIZE)

    def read(self, offset: int, size: int) -> int:
        known = offset in self.registers or offset == ID
        if not known or size not in ((4,) if offset < 0x80 else (4, 8)):
            return int(U64 >> 64 - 8 * size)
        return (0x010000ED if offset == ID else self.registers[offset]) & U64 >> 64 - 8 * size

    def write(self, offset: int, size: int, value: int) -> None:
        if size not in ((4,) if offset < 0x80 else (4, 8)):
            return
        registers = self.registers
        if offset == LIVENESS:
            registers[offset] = value ^ U32
        elif offset == FACTORIAL:
            registers[offset] = math.factorial(value) & U32 if value < 34 else 0
            registers[IRQ_STATUS] |= 1 if registers[STATUS] & 0x80 else 0
        elif offset == STATUS:
            registers[offset] = value & 0x80
        elif offset == IRQ_RAISE:
            registers[IRQ_STATUS] |= value
        elif offset == IRQ_ACK:
            registers[IRQ_STATUS] &= ~value
        elif offset in (SOURCE, DESTINATION, COUNT):
            registers[offset] = value
        elif offset == COMMAND and value & START:
            registers[offset] = value & ~START
            self._transfer(bool(value & TO_GUEST))
            registers[IRQ_STATUS] |= 0x100 if value & DMA_IRQ else 0

    def _transfer(self, to_guest: bool) -> None:
        own, guest, count = self.registers[DESTINATION] - BUFFER, self.registers[SOURCE] - MAPPED, self.registers[COUNT]
        if to_guest:
            own, guest = self.registers[SOURCE] - BUFFER, self.registers[DESTINATION] - MAPPED
        if own < 0 or own + count > PAGE or guest < 0 or guest + count > MAPPED_SIZE:
            return
        if to_guest:
            self.memory[guest : guest + count] = self.buffer[own : own + count]
        else:
            self.buffer[own : own + count] = self.memory[guest : guest + count]


MAPPED, MAPPED_SIZE = 0x1000, 0x3000
OFFSETS = [ID, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, IRQ_RAISE, IRQ_ACK, SOURCE, DESTINATION, COUNT, COMMAND]

offsets = st.one_of(
    st.sampled_from(OFFSETS),
    st.builds(lambda base, by: base + by, st.sampled_from(OFFSETS), st.integers(0, 8)),
    st.integers(0, BAR_SIZE - 8),
)
near = st.builds(
    lambda base, by: (base + by) & U64,
    st.sampled_from([0, BUFFER, BUFFER + PAGE, MAPPED, MAPPED + MAPPED_SIZE]),
    st.integers(-3, 40),
)
values = st.one_of(near, st.integers(0, 40), st.integers(0, U64))
accesses = st.tuples(st.sampled_from(["read", "write"]), offsets, st.sampled_from([1, 2, 4, 8]), values)
transfers = st.builds(
    lambda own, guest, count, to_guest, irq: [
        ("write", SOURCE, 8, own if to_guest else guest),
        ("write", DESTINATION, 8, guest if to_guest else own),
        ("write", COUNT, 8, count),
        ("write", COMMAND, 4, START | TO_GUEST * to_guest | DMA_IRQ * irq),
    ],
    near,
    near,
    st.integers(0, 100) | st.integers(PAGE - 40, PAGE + 1),
    st.booleans(),
    st.booleans(),
)
Program = list[tuple[str, int, int, int]]
programs: st.SearchStrategy[Program] = st.lists(st.one_of(accesses.map(lambda one: [one]), transfers), max_size=30).map(
    lambda parts: list(itertools.chain.from_iterable(parts))
)


def run_against_model(
    program: Program, seed: int, memory: int, reader: Callable[[int, int], int], writer: Callable[[int, int, int], None]
) -> Model:
    model = Model()
    model.memory[:] = random.Random(seed).randbytes(MAPPED_SIZE)
    os.pwrite(memory, model.memory, 0)
    for kind, offset, size, value in program:
        if kind == "read":
            assert reader(offset, size) == model.read(offset, size)
        else:
            value &= U64 >> 64 - 8 * size
            writer(offset, size, value)
            model.write(offset, size, value)
    for offset in OFFSETS:
        assert reader(offset, 4) == model.read(offset, 4)
    assert os.pread(memory, MAPPED_SIZE, 0) == model.memory
    return model


@given(programs, st.integers(0, 99), st.sampled_from([DmaFlags.MMAP, DmaFlags.FILE_IO]))
def test_every_access_is_as_the_model_has_it(program: Program, seed: int, way: int) -> None:
    device = Edu()
    with guest_memory(MAPPED_SIZE) as memory:
        device.dma_map(READ_WRITE | way, 0, MAPPED, MAPPED_SIZE, OwnedFd.duplicate(memory))
        model = run_against_model(
            program,
            seed,
            memory,
            lambda offset, size: peek(device, offset, size),
            lambda offset, size, value: poke(device, offset, value, size),
        )
        assert device.buffer == model.buffer
        assert device.irq.asserted == bool(model.registers[IRQ_STATUS])
        device.dma_unmap(0, MAPPED, MAPPED_SIZE)


@settings(max_examples=10)
@given(programs, st.integers(0, 99))
def test_the_same_over_the_wire_with_posted_writes(program: Program, seed: int) -> None:
    with attached(Edu()) as edu, guest_memory(MAPPED_SIZE) as memory:
        edu.dma_map(MAPPED, MAPPED_SIZE, memory)
        run_against_model(
            program,
            seed,
            memory,
            lambda offset, size: read(edu, offset, size),
            lambda offset, size, value: edu.region_write(0, offset, value.to_bytes(size, "little"), posted=True),
        )


def test_reset_puts_everything_back(edu: Client) -> None:
    for offset in (LIVENESS, FACTORIAL, STATUS, IRQ_RAISE, SOURCE, DESTINATION, COUNT):
        write(edu, offset, 0x84)
    edu.region_write(7, 4, b"\7\4")
    edu.reset()
    assert [read(edu, offset) for offset in OFFSETS[1:]] == [0, 0, 0, 0, U32, U32, 0, 0, 0, 0]
    assert edu.region_read(7, 4, 2) == b"\0\0"
    assert not config_interrupt(edu)
    assert edu.migration_get_state() == DeviceState.RUNNING


def test_a_client_that_leaves_in_the_middle_of_dma_leaves_no_device_that_is_busy_for_ever() -> None:
    with serving(Edu()) as path:
        with Client.connect(path, TIMEOUT) as edu:
            edu.dma_map(0, PAGE, memory=bytearray(PAGE))
            for offset, value in ((DESTINATION, BUFFER), (COUNT, 16), (COMMAND, START | DMA_IRQ)):
                edu.region_write(0, offset, value.to_bytes(8, "little"), posted=True)
            edu.region_write(0, FACTORIAL, b"\5\0\0\0", posted=True)  # its DMA_READ is never answered
        with Client.connect(path, TIMEOUT) as edu:
            assert [read(edu, offset) for offset in (COMMAND, STATUS, FACTORIAL, IRQ_STATUS)] == [
                DMA_IRQ,
                0,
                120,
                0x100,
            ]
            write(edu, FACTORIAL, 3)
            assert read(edu, FACTORIAL) == 6
