"""The qtest harness against a real QEMU without any of our devices: what it says is what QEMU does."""

from __future__ import annotations

import os
import random
import signal
import stat
from pathlib import Path

import pytest

from vfio_user.testing import qtest
from vfio_user.testing.qtest import (
    BarLayout,
    QemuError,
    QemuTimeoutError,
    QmpError,
    QtestMachine,
    devfn,
    find_qemu,
)

from .conftest import MachineFactory

pytestmark = pytest.mark.qemu

RAM = 0x10_0000  # well above what firmware has put below 1 MiB
HOST_BRIDGE, LPC = devfn(0), devfn(0x1F)
TIMER_LINE = 0
SLOT_FREE, SLOT_EDU = devfn(2), devfn(3)
EDU = ("-device", "edu,addr=3")  # QEMU's own edu: a 1 MiB memory BAR
EDU_BAR = 0xE000_0000
NVME = ("-device", "nvme,serial=x,addr=3")  # a 64-bit BAR
E1000 = ("-device", "e1000,addr=3")  # an I/O BAR at 1


def test_ram_holds_every_width_little_endian(machine: MachineFactory) -> None:
    m = machine()
    m.writeq(RAM, 0x8877_6655_4433_2211)
    assert m.read(RAM, 8) == bytes.fromhex("1122334455667788")
    assert (m.readb(RAM + 1), m.readw(RAM + 2), m.readl(RAM + 4)) == (0x22, 0x4433, 0x8877_6655)
    m.writeb(RAM, 0xAA)
    m.writew(RAM + 2, 0xCCDD)
    m.writel(RAM + 4, 0xDEAD_BEEF)
    assert m.readq(RAM) == 0xDEAD_BEEF_CCDD_22AA


@pytest.mark.parametrize("size", [0, 1, qtest.CHUNK - 1, qtest.CHUNK, qtest.CHUNK + 1, 3 * qtest.CHUNK + 7])
def test_bulk_reads_what_bulk_wrote(machine: MachineFactory, size: int) -> None:
    m, data = machine(), random.Random(size).randbytes(size)
    m.write(RAM + 3, data)
    assert m.read(RAM + 3, size) == data
    assert m.read(RAM + 3 + size, 16) == bytes(16)


@pytest.mark.parametrize("anonymous", [False, True])
def test_ram_has_the_size_and_the_backing_asked_for(machine: MachineFactory, anonymous: bool) -> None:
    m = machine(memory=16 << 20, anonymous_ram=anonymous)
    last = (16 << 20) - 4
    m.writel(last, 0x1234_5678)
    assert m.readl(last) == 0x1234_5678
    assert m.qmp("query-memory-size-summary")["base-memory"] == 16 << 20
    memfds = [fd for fd in Path(f"/proc/{m.pid}/fd").iterdir() if "memfd:" in str(fd.readlink())]
    assert bool(memfds) is not anonymous


def test_ports(machine: MachineFactory) -> None:
    m = machine()
    for port in (0x70, 0x71):  # the index of the CMOS, then the register chosen: B, in 24-hour mode
        assert 0 <= m.inb(port) <= 0xFF
    m.outb(0x70, 0x0F)
    m.outb(0x71, 0x5A)
    assert m.inb(0x71) == 0x5A
    m.outl(qtest.CONFIG_ADDRESS, qtest.CONFIG_ENABLE)
    assert m.inl(qtest.CONFIG_DATA) == 0x29C0_8086
    assert (m.inw(qtest.CONFIG_DATA), m.inw(qtest.CONFIG_DATA + 2)) == (0x8086, 0x29C0)


def test_config_space_of_the_host_bridge(machine: MachineFactory) -> None:
    m = machine()
    assert m.config_read(HOST_BRIDGE, 0) == 0x29C0_8086
    assert [m.config_read(HOST_BRIDGE, at, 2) for at in (0, 2)] == [0x8086, 0x29C0]
    assert [m.config_read(HOST_BRIDGE, at, 1) for at in range(4)] == [0x86, 0x80, 0xC0, 0x29]
    assert m.config_read(SLOT_FREE, 0) == 0xFFFF_FFFF
    functions = m.pci_functions()
    assert functions[HOST_BRIDGE] == (0x8086, 0x29C0)
    assert functions[LPC] == (0x8086, 0x2918)
    assert SLOT_FREE not in functions


def test_config_write_changes_its_own_bytes_only(machine: MachineFactory) -> None:
    m = machine(extra_args=EDU)
    interrupt_line = 0x3C
    before = m.config_read(SLOT_EDU, interrupt_line)
    m.config_write(SLOT_EDU, interrupt_line, 0xA5, 1)
    assert m.config_read(SLOT_EDU, interrupt_line) == before & ~0xFF | 0xA5
    m.config_write(SLOT_EDU, qtest.BAR0 + 2, 0xE010, 2)
    assert m.config_read(SLOT_EDU, qtest.BAR0) == 0xE010_0000


@pytest.mark.parametrize(("offset", "width"), [(0, 8), (0, 3), (1, 2), (2, 4), (256, 1), (-4, 4)])
def test_config_access_that_the_mechanism_cannot_make_is_refused(
    machine: MachineFactory, offset: int, width: int
) -> None:
    m = machine()
    with pytest.raises(ValueError, match=f"no config access of {width} bytes"):
        m.config_read(HOST_BRIDGE, offset, width)
    with pytest.raises(ValueError, match=f"no config access of {width} bytes"):
        m.config_write(HOST_BRIDGE, offset, 0, width)


@pytest.mark.parametrize(
    ("device", "bar", "layout"),
    [
        (EDU, 0, BarLayout(1 << 20)),
        (EDU, 1, BarLayout(0)),
        (NVME, 0, BarLayout(16 << 10, is_64bit=True)),
        (E1000, 0, BarLayout(128 << 10)),
        (E1000, 1, BarLayout(64, io=True)),
        (("-device", "ivshmem-plain,memdev=s,addr=3", "-object", "memory-backend-memfd,id=s,size=4M"), 2,
         BarLayout(4 << 20, is_64bit=True, prefetchable=True)),
    ],
)  # fmt: skip
def test_bar_sizing(machine: MachineFactory, device: tuple[str, ...], bar: int, layout: BarLayout) -> None:
    m = machine(extra_args=device)
    m.enable(SLOT_EDU, bus_master=False)
    before = m.config_read(SLOT_EDU, qtest.COMMAND, 2), m.config_read(SLOT_EDU, qtest.BAR0 + 4 * bar)
    assert m.size_bar(SLOT_EDU, bar) == layout
    assert before == (m.config_read(SLOT_EDU, qtest.COMMAND, 2), m.config_read(SLOT_EDU, qtest.BAR0 + 4 * bar))


def test_a_mapped_bar_answers_where_it_was_put(machine: MachineFactory) -> None:
    m = machine(extra_args=EDU)
    assert m.readl(EDU_BAR) != 0x0100_00ED
    assert m.map_bar(SLOT_EDU, 0, EDU_BAR).size == 1 << 20
    assert m.readl(EDU_BAR) == 0x0100_00ED
    m.enable(SLOT_EDU, memory=False)
    assert m.readl(EDU_BAR) != 0x0100_00ED


def test_a_64_bit_bar_goes_above_4_gib(machine: MachineFactory) -> None:
    m = machine(extra_args=NVME)
    version, address = 0x08, 0x10_0000_0000
    m.map_bar(SLOT_EDU, 0, address)
    assert m.readl(address + version) == 0x0001_0400


@pytest.mark.parametrize(("bar", "address"), [(0, EDU_BAR + 0x1000), (1, EDU_BAR), (6, EDU_BAR), (-1, EDU_BAR)])
def test_a_bar_that_cannot_be_there_is_refused(machine: MachineFactory, bar: int, address: int) -> None:
    m = machine(extra_args=EDU)
    with pytest.raises(ValueError, match=f"BAR {bar}"):
        m.map_bar(SLOT_EDU, bar, address)


def test_interrupt_lines_are_recorded(machine: MachineFactory) -> None:
    m = machine(extra_args=EDU)
    m.irq_intercept_in("ioapic")
    m.map_bar(SLOT_EDU, 0, EDU_BAR)
    m.writel(EDU_BAR + 0x60, 1)  # raise an interrupt
    (line,) = {line for line, level in m.irq_record if level}
    m.wait_irq(line)
    assert m.irq_levels[line]
    m.writel(EDU_BAR + 0x64, 1)  # acknowledge it
    m.wait_irq(line, level=False)
    assert [level for moved, level in m.irq_record if moved == line] == [True, False]


def test_the_clock_runs_only_when_stepped(machine: MachineFactory) -> None:
    m = machine()
    m.irq_intercept_in("ioapic")
    start = m.clock_step(1)
    assert m.irq_record == []
    assert m.clock_step(1_000_000_000) == start + 1_000_000_000
    assert 18 <= m.irq_record.count((TIMER_LINE, True)) <= 19  # the PC's timer: 18.2 Hz


def test_waits_end_and_the_machine_goes_on(machine: MachineFactory) -> None:
    m = machine()
    m.irq_intercept_in("ioapic")
    with pytest.raises(QemuTimeoutError, match=r"IRQ 16 raised: not within 0\.01 s\nQEMU's stderr: empty"):
        m.wait_irq(16, timeout=0.01)
    with pytest.raises(QemuTimeoutError, match="QMP event STOP"):
        m.wait_event("STOP", timeout=0.01)
    with pytest.raises(TimeoutError, match="the moon is blue"):
        m.wait_until("the moon is blue", lambda: m.readl(RAM) != 0, timeout=0.01)
    assert m.readl(RAM) == 0


def test_qmp_returns_refuses_and_reports_events(machine: MachineFactory) -> None:
    m = machine()
    assert m.qmp("query-status")["running"] is True
    assert "q35" in m.qmp("qom-get", path="/machine", property="type")
    with pytest.raises(QmpError, match="QMP no-such: CommandNotFound") as refused:
        m.qmp("no-such")
    assert refused.value.kind == "CommandNotFound"
    m.qmp("stop")
    m.qmp("cont")
    m.wait_event("RESUME")  # out of order: STOP, which came first, is kept
    m.wait_event("STOP")
    assert not m.events


def test_reset_puts_devices_back(machine: MachineFactory) -> None:
    m = machine(extra_args=EDU)
    for _ in range(2):
        m.map_bar(SLOT_EDU, 0, EDU_BAR)
        assert m.readl(EDU_BAR) == 0x0100_00ED
        m.reset()
        assert m.config_read(SLOT_EDU, qtest.COMMAND, 2) & 0x7 == 0
        assert m.config_read(SLOT_EDU, qtest.BAR0) == 0


def test_an_unknown_interrupt_controller_is_an_error_and_the_machine_goes_on(machine: MachineFactory) -> None:
    m = machine()
    with pytest.raises(QemuError, match="irq_intercept_in nowhere: QEMU said 'FAIL"):
        m.irq_intercept_in("nowhere")
    assert m.readl(RAM) == 0


def test_death_is_reported_with_its_signal(machine: MachineFactory) -> None:
    m = machine()
    os.kill(m.pid, signal.SIGKILL)
    with pytest.raises(QemuError, match=rf"qtest readl {RAM:#x}: .*QEMU: Killed"):
        m.readl(RAM)
    with pytest.raises(QemuError, match="qtest readl"):  # and it stays dead
        m.readl(RAM)


def test_a_death_that_nobody_noticed_is_found_at_the_end(qemu: Path) -> None:
    with pytest.raises(QemuError, match="QMP quit"), QtestMachine(qemu) as m:
        os.kill(m.pid, signal.SIGKILL)


def test_a_refusal_to_start_carries_stderr(machine: MachineFactory) -> None:
    with pytest.raises(QemuError, match=r"(?s)^QMP .*exit status 1.*no-such-device"):
        machine(extra_args=["-device", "no-such-device"])


def test_a_server_that_is_not_there_is_reported(machine: MachineFactory, tmp_path: Path) -> None:
    with pytest.raises(QemuError, match=r"(?s)exit status 1.*nobody\.sock"):
        machine([tmp_path / "nobody.sock"])


def test_a_binary_that_is_not_there_is_reported_and_leaks_no_fd(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(QemuError, match="no-qemu does not start"):
        QtestMachine(tmp_path / "no-qemu")
    assert os.listdir("/proc/self/fd") == before


def test_no_answer_is_a_timeout_that_ends_qemu(qemu: Path) -> None:
    m = QtestMachine(qemu)
    m.timeout = 0.2  # from now on: to start may take longer
    os.kill(m.pid, signal.SIGSTOP)
    with pytest.raises(QemuTimeoutError, match=r"(?s)qtest readl .*not within 0\.2 s .*QEMU: killed"):
        m.readl(RAM)
    assert not Path(f"/proc/{m.pid}").exists()


def test_a_machine_leaves_nothing_behind(qemu: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with QtestMachine(qemu) as m:
        assert m.stderr == ""
    m.close()
    assert os.listdir("/proc/self/fd") == before
    assert not Path(f"/proc/{m.pid}").exists()


def test_the_error_of_the_test_itself_is_not_hidden(qemu: Path) -> None:
    def fail(m: QtestMachine) -> None:
        os.kill(m.pid, signal.SIGKILL)
        raise ArithmeticError

    with pytest.raises(ArithmeticError), QtestMachine(qemu) as m:
        fail(m)
    assert not Path(f"/proc/{m.pid}").exists()


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory, environment and PATH without any QEMU."""
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    monkeypatch.delenv("VFIO_USER_QEMU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_find_qemu_in_order(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_qemu() is None
    system = _script(nowhere / "bin/qemu-system-x86_64", """echo 'name "vfio-user-pci", bus PCI'""")
    assert find_qemu() == system
    fetched = _script(nowhere / "here/.qemu/qemu-system-x86_64", "exit 1")
    assert find_qemu() == fetched
    wished = _script(nowhere / "mine", "exit 1")
    monkeypatch.setenv("VFIO_USER_QEMU", str(wished))
    assert find_qemu() == wished


def test_find_qemu_takes_no_system_qemu_without_the_device(nowhere: Path) -> None:
    _script(nowhere / "bin/qemu-system-x86_64", """echo 'name "vfio-pci", bus PCI'""")
    assert find_qemu() is None


def test_find_qemu_refuses_a_wish_that_is_not_met(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIO_USER_QEMU", str(nowhere / "missing"))
    with pytest.raises(QemuError, match="missing is not an executable"):
        find_qemu()
