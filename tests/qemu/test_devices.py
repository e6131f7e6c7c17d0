"""Our devices in a real QEMU without a guest: what a VMM that we did not write makes of them."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfio_user import ServerBackend
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.testing.qtest import BarLayout, QemuError, QtestMachine

from .conftest import MachineFactory, ServedInThread, servers

pytestmark = pytest.mark.qemu

TIMEOUT = 10.0
PORTS, CMOS = 0xC000, 0x70
EDU_BAR, TABLE_BAR, REGISTER_BAR = 0xE000_0000, 0xE020_0000, 0xE030_0000
MEMORY_BAR = 0x8_0000_0000  # above 4 GiB, where 64-bit BARs go
RAM = 0x10_0000
MIB, PAGE = 1 << 20, 4096
COMMAND, STATUS, CAPABILITIES, INTERRUPT_LINE = 0x04, 0x06, 0x34, 0x3C

ID, LIVENESS, FACTORIAL, EDU_STATUS = 0x00, 0x04, 0x08, 0x20
IRQ_STATUS, IRQ_RAISE, IRQ_ACK = 0x24, 0x60, 0x64
SOURCE, DESTINATION, COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
BUFFER = 0x40000
START, TO_GUEST, DMA_IRQ = 1, 2, 4


Serving = Callable[[ServerBackend], ServedInThread]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serving]:
    """Serves devices; name it before ``machine``, so that the machines are gone before the servers stop."""
    with servers(tmp_path) as start:
        yield start


def edu_machine(serve: Serving, machine: MachineFactory, device: Edu | None = None, **options: object) -> QtestMachine:
    """A machine with edu in it, its BAR mapped, the lines into the IOAPIC watched."""
    m = machine([serve(device or Edu()).path], **options)
    m.map_bar(m.devfns[0], 0, EDU_BAR)
    m.irq_intercept_in()
    return m


def capability(m: QtestMachine, devfn: int, wanted: int) -> int:
    """Where a capability is in config space."""
    at = m.config_read(devfn, CAPABILITIES, 1)
    while at and m.config_read(devfn, at, 1) != wanted:
        at = m.config_read(devfn, at + 1, 1)
    assert at, f"no capability {wanted:#x}"
    return at


def raised(m: QtestMachine) -> list[int]:
    return [line for line, level in m.irq_levels.items() if level and line]


def wait_any_irq(m: QtestMachine) -> int:
    """Wait for the device's line, whichever QEMU gave it; without touching a BAR, which would end the interrupt."""
    m.wait_until("an interrupt", lambda: m.inb(CMOS) >= 0 and bool(raised(m)))
    (line,) = raised(m)
    return line


# What QEMU sees


def test_gpio_as_qemu_sees_it(serve: Serving, machine: MachineFactory) -> None:
    m = machine([serve(Gpio()).path])
    (gpio,) = m.devfns
    assert m.config_read(gpio, 0) == 0x0DC8494F
    assert m.config_read(gpio, 8) == 0xFFFF0000
    assert [m.size_bar(gpio, bar) for bar in (0, 1, 2, 3)] == [
        BarLayout(0),
        BarLayout(0),
        BarLayout(256, io=True),
        BarLayout(0),
    ]
    m.map_bar(gpio, 2, PORTS)
    for read in (m.inb, m.inw, m.inl):
        assert [read(PORTS) for _ in range(3)] == [0, 0, 1]
    assert [m.inb(PORTS + 1), m.inl(PORTS + 4)] == [0, 0]


def test_edu_as_qemu_sees_it(serve: Serving, machine: MachineFactory) -> None:
    m = machine([serve(Edu()).path])
    (edu,) = m.devfns
    assert m.config_read(edu, 0) == 0x11E81234
    assert m.config_read(edu, 8) == 0x00FF0010
    assert m.size_bar(edu, 0) == BarLayout(MIB)
    assert m.config_read(edu, STATUS, 2) & 0x10
    assert m.config_read(edu, 0x3D, 1) == 1
    capability(m, edu, 0x05)


def test_ivshmem_as_qemu_sees_it(serve: Serving, machine: MachineFactory) -> None:
    m = machine([serve(Ivshmem(size=MIB, trapped=PAGE, vectors=2)).path])
    (ivshmem,) = m.devfns
    assert m.config_read(ivshmem, 0) == 0x11101AF4
    assert m.config_read(ivshmem, 8) == 0x05000001
    assert m.size_bar(ivshmem, 0) == BarLayout(256)
    assert m.size_bar(ivshmem, 1) == BarLayout(PAGE)
    assert m.size_bar(ivshmem, 2) == BarLayout(MIB, is_64bit=True, prefetchable=True)
    msix = capability(m, ivshmem, 0x11)
    assert m.config_read(ivshmem, msix + 2, 2) == 1
    assert [m.config_read(ivshmem, msix + at) for at in (4, 8)] == [1, 2048 | 1]


def test_all_three_at_once(serve: Serving, machine: MachineFactory) -> None:
    devices = [Gpio(), Edu(), Ivshmem(size=MIB, trapped=PAGE)]
    m = machine([serve(device).path for device in devices])
    gpio, edu, ivshmem = m.devfns
    functions = m.pci_functions()
    assert [functions[devfn] for devfn in m.devfns] == [(0x494F, 0x0DC8), (0x1234, 0x11E8), (0x1AF4, 0x1110)]
    m.map_bar(gpio, 2, PORTS)
    m.map_bar(edu, 0, EDU_BAR)
    m.map_bar(ivshmem, 2, MEMORY_BAR)
    for round_ in range(3):
        m.writel(EDU_BAR + LIVENESS, round_)
        m.writel(MEMORY_BAR + 8 * round_, round_ + 1)
        assert m.inb(PORTS) == int(round_ == 2)
        assert m.readl(EDU_BAR + LIVENESS) == ~round_ & 0xFFFF_FFFF
        assert m.readl(MEMORY_BAR + 8 * round_) == round_ + 1


def test_config_space_reads_and_writes(serve: Serving, machine: MachineFactory) -> None:
    device = Edu()
    m = machine([serve(device).path])
    (edu,) = m.devfns
    assert [m.config_read(edu, at, 1) for at in range(4)] == [0x34, 0x12, 0xE8, 0x11]
    assert [m.config_read(edu, at, 2) for at in (0, 2)] == [0x1234, 0x11E8]
    m.config_write(edu, INTERRUPT_LINE, 0x5A, 1)
    assert m.config_read(edu, INTERRUPT_LINE, 1) == 0x5A
    m.config_write(edu, 0, 0, 4)
    assert m.config_read(edu, 0) == 0x11E81234
    m.config_write(edu, COMMAND, 0x6, 2)
    assert device.config.bus_master
    assert device.config.memory_enabled


@pytest.mark.parametrize("posted", [True, False])
def test_bar_accesses_of_all_widths(serve: Serving, machine: MachineFactory, posted: bool) -> None:
    m = machine([{"socket": serve(Edu()).path, "x-no-posted-writes": not posted}])
    m.map_bar(m.devfns[0], 0, EDU_BAR)
    m.writeq(EDU_BAR + SOURCE, 0x1122_3344_5566_7788)
    assert (m.readq(EDU_BAR + SOURCE), m.readl(EDU_BAR + SOURCE)) == (0x1122_3344_5566_7788, 0x5566_7788)
    m.writel(EDU_BAR + SOURCE, 5)
    m.writew(EDU_BAR + SOURCE, 6)
    m.writeb(EDU_BAR + SOURCE, 7)
    assert m.readq(EDU_BAR + SOURCE) == 5
    assert (m.readb(EDU_BAR + SOURCE), m.readw(EDU_BAR + SOURCE)) == (0xFF, 0xFFFF)


def test_edu_identifies_lives_and_computes(serve: Serving, machine: MachineFactory) -> None:
    m = edu_machine(serve, machine)
    assert m.readl(EDU_BAR + ID) == 0x010000ED
    m.writel(EDU_BAR + LIVENESS, 0x1234_5678)
    assert m.readl(EDU_BAR + LIVENESS) == 0xEDCB_A987
    m.writel(EDU_BAR + FACTORIAL, 10)
    m.wait_until("the factorial", lambda: not m.readl(EDU_BAR + EDU_STATUS) & 1)
    assert m.readl(EDU_BAR + FACTORIAL) == 3628800


# Interrupts


def test_intx_through_to_the_ioapic(serve: Serving, machine: MachineFactory) -> None:
    """Any access to a BAR is the end of the interrupt to QEMU: it lowers the line and unmasks, we raise it again."""
    m = edu_machine(serve, machine)
    (edu,) = m.devfns
    m.writel(EDU_BAR + IRQ_RAISE, 0x10)
    line = wait_any_irq(m)
    assert m.config_read(edu, STATUS, 2) & 0x8
    lowered = m.irq_record.count((line, False))
    assert m.readl(EDU_BAR + IRQ_STATUS) == 0x10
    m.wait_irq(line)  # the cause stands, so it rose again
    assert m.irq_record.count((line, False)) > lowered
    m.writel(EDU_BAR + IRQ_ACK, 0x10)
    assert m.readl(EDU_BAR + IRQ_STATUS) == 0
    m.wait_irq(line, level=False)
    assert not m.config_read(edu, STATUS, 2) & 0x8
    m.writel(EDU_BAR + IRQ_RAISE, 1)
    m.wait_irq(line)


def test_the_interrupt_of_gpio(serve: Serving, machine: MachineFactory) -> None:
    m = machine([serve(Gpio()).path])
    m.map_bar(m.devfns[0], 2, PORTS)
    m.irq_intercept_in()
    assert [m.inb(PORTS), m.inb(PORTS)] == [0, 0]
    assert raised(m) == []
    assert m.inb(PORTS) == 1
    line = wait_any_irq(m)
    assert m.inb(PORTS) == 0  # the end of it
    m.wait_irq(line, level=False)


def test_msi_of_edu_arrives_in_ram(serve: Serving, machine: MachineFactory) -> None:
    m = edu_machine(serve, machine)
    (edu,) = m.devfns
    msi = capability(m, edu, 0x05)
    m.config_write(edu, msi + 4, RAM + 0x40)
    m.config_write(edu, msi + 8, 0)
    m.config_write(edu, msi + 12, 0xBEEF, 2)
    m.config_write(edu, msi + 2, m.config_read(edu, msi + 2, 2) | 1, 2)
    for cause in (1, 2):
        m.writel(RAM + 0x40, 0)
        m.writel(EDU_BAR + IRQ_RAISE, cause)
        m.wait_until("the message", lambda: m.readl(RAM + 0x40) == 0xBEEF)
    assert m.readl(EDU_BAR + IRQ_STATUS) == 3
    assert raised(m) == []
    m.config_write(edu, msi + 2, m.config_read(edu, msi + 2, 2) & ~1, 2)
    m.writel(EDU_BAR + IRQ_RAISE, 4)
    wait_any_irq(m)


def test_msix_of_ivshmem_arrives_in_ram(serve: Serving, machine: MachineFactory) -> None:
    m = machine([serve(Ivshmem(size=MIB, vectors=3)).path])
    (ivshmem,) = m.devfns
    m.map_bar(ivshmem, 0, REGISTER_BAR)
    m.map_bar(ivshmem, 1, TABLE_BAR)
    for vector in range(3):
        entry = TABLE_BAR + 16 * vector
        for at, value in ((0, RAM + 16 * vector), (4, 0), (8, 0x100 + vector), (12, 0)):
            m.writel(entry + at, value)
    msix = capability(m, ivshmem, 0x11)
    m.config_write(ivshmem, msix + 2, 0x8000, 2)
    for vector in (2, 0, 1):
        m.writel(REGISTER_BAR + 12, vector)
        m.wait_until("the message", lambda v=vector: m.readl(RAM + 16 * v) == 0x100 + v)  # type: ignore[misc]
    m.writel(RAM + 16, 0)
    m.writel(TABLE_BAR + 16 + 12, 1)  # masked
    m.writel(REGISTER_BAR + 12, 1)
    m.writel(REGISTER_BAR + 12, 0)
    m.writel(RAM, 0)
    m.writel(REGISTER_BAR + 12, 0)
    m.wait_until("the message", lambda: m.readl(RAM) == 0x100)
    assert m.readl(RAM + 16) == 0
    m.writel(TABLE_BAR + 16 + 12, 0)
    m.wait_until("the message that was held back", lambda: m.readl(RAM + 16) == 0x101)


# DMA


def transfer(m: QtestMachine, source: int, destination: int, count: int, command: int) -> None:
    for offset, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count), (DMA_COMMAND, command | START)):
        m.writeq(EDU_BAR + offset, value)
    m.wait_until("the transfer", lambda: not m.readl(EDU_BAR + DMA_COMMAND) & START)


@pytest.mark.parametrize("anonymous", [False, True], ids=["memfd", "messages"])
def test_dma_into_and_out_of_guest_ram(serve: Serving, machine: MachineFactory, anonymous: bool) -> None:
    """With anonymous RAM every byte goes by DMA_READ and DMA_WRITE, while QEMU polls the command register."""
    device = Edu()
    m = edu_machine(serve, machine, device, anonymous_ram=anonymous)
    rng = random.Random(anonymous)
    for count in (1, 7, 64, 1000, PAGE):
        data = rng.randbytes(count)
        m.write(RAM + 3, data)
        m.write(RAM + 0x2000, bytes(PAGE + 32))
        transfer(m, RAM + 3, BUFFER, count, 0)
        assert device.buffer[:count] == data
        transfer(m, BUFFER, RAM + 0x2000 + 5, count, TO_GUEST)
        assert m.read(RAM + 0x2000, PAGE + 32) == bytes(5) + data + bytes(PAGE + 27 - count)


@pytest.mark.parametrize("anonymous", [False, True], ids=["memfd", "messages"])
def test_dma_that_fails_and_dma_that_interrupts(serve: Serving, machine: MachineFactory, anonymous: bool) -> None:
    m = edu_machine(serve, machine, anonymous_ram=anonymous)
    transfer(m, 1 << 45, BUFFER, 16, DMA_IRQ)  # no memory there
    line = wait_any_irq(m)
    m.writel(EDU_BAR + IRQ_ACK, 0x100)
    assert m.readl(EDU_BAR + IRQ_STATUS) == 0
    m.wait_irq(line, level=False)
    m.write(RAM, b"again")
    transfer(m, RAM, BUFFER, 5, DMA_IRQ)
    m.wait_irq(line)
    transfer(m, BUFFER, RAM + 0x100, 5, TO_GUEST)
    assert m.read(RAM + 0x100, 5) == b"again"


def test_message_dma_with_writes_that_are_not_posted(serve: Serving, machine: MachineFactory) -> None:
    """The write's reply must come before the DMA: QEMU answers no DMA while it waits for a reply."""
    m = machine([{"socket": serve(Edu()).path, "x-no-posted-writes": True}], anonymous_ram=True)
    m.map_bar(m.devfns[0], 0, EDU_BAR)
    m.write(RAM, b"not posted")
    transfer(m, RAM, BUFFER, 10, 0)
    transfer(m, BUFFER, RAM + PAGE, 10, TO_GUEST)
    assert m.read(RAM + PAGE, 10) == b"not posted"


# Shared memory


@pytest.mark.parametrize("trapped", [0, PAGE])
def test_shared_memory_both_ways(serve: Serving, machine: MachineFactory, trapped: int) -> None:
    device = Ivshmem(size=MIB, trapped=trapped)
    m = machine([serve(device).path])
    m.map_bar(m.devfns[0], 2, MEMORY_BAR)
    data = random.Random(trapped).randbytes(3 * PAGE)
    m.write(MEMORY_BAR, data)
    m.readl(MEMORY_BAR)  # what was posted has arrived
    assert device.memory[2][: 3 * PAGE] == data
    device.memory[2][PAGE - 2 : PAGE + 2] = b"back"
    assert m.read(MEMORY_BAR + PAGE - 2, 4) == b"back"
    m.writeq(MEMORY_BAR + MIB - 8, 0x0102_0304_0506_0708)
    assert struct.unpack("<Q", device.memory[2][MIB - 8 :]) == (0x0102_0304_0506_0708,)


# Coming and going


def test_a_machine_reset_and_everything_works_again(serve: Serving, machine: MachineFactory) -> None:
    device = Edu()
    m = edu_machine(serve, machine, device)
    for round_ in range(2):
        m.writel(EDU_BAR + LIVENESS, 5)
        m.writel(EDU_BAR + IRQ_RAISE, 1)
        line = wait_any_irq(m)
        m.write(RAM, b"dma")
        transfer(m, RAM, BUFFER, 3, 0)
        m.reset()
        assert (device.liveness, device.irq_status, bytes(device.buffer[:3])) == (0, 0, bytes(3)), round_
        assert m.config_read(m.devfns[0], COMMAND, 2) & 7 == 0
        m.wait_irq(line, level=False)
        m.map_bar(m.devfns[0], 0, EDU_BAR)
        assert m.readl(EDU_BAR + LIVENESS) == 0


def test_a_server_that_stops_leaves_qemu_alive(serve: Serving, machine: MachineFactory) -> None:
    served = serve(Edu())
    m = machine([served.path])
    m.map_bar(m.devfns[0], 0, EDU_BAR)
    assert m.readl(EDU_BAR + ID) == 0x010000ED
    served.stop()
    m.wait_until("all ones", lambda: m.readl(EDU_BAR + ID) == 0xFFFF_FFFF)
    assert m.qmp("query-status")["running"] is True


def test_a_killed_qemu_makes_room_for_the_next(serve: Serving, qemu: Path) -> None:
    device = Edu()
    served = serve(device)
    for value in range(1, 4):
        with QtestMachine(qemu, [served.path]) as m:
            m.map_bar(m.devfns[0], 0, EDU_BAR)
            assert m.readl(EDU_BAR + LIVENESS) == 0  # QEMU resets its devices when it starts
            m.writel(EDU_BAR + LIVENESS, value)
            assert m.readl(EDU_BAR + LIVENESS) == ~value & 0xFFFF_FFFF
            os.kill(m.pid, signal.SIGKILL)
            with pytest.raises(QemuError, match="Killed"):
                m.readl(RAM)
    deadline = time.monotonic() + TIMEOUT
    while device.link is not None or list(device.dma):
        assert time.monotonic() < deadline
