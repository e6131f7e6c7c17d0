"""A real QEMU without a guest, its vfio-user devices driven by a test.

Under ``-accel qtest`` QEMU has a machine but no running CPU: the test does what firmware and drivers would do,
one port or memory access at a time, and sees every interrupt line that moves. It starts in a tenth of a second:
the cheapest real client there is::

    with QtestMachine(find_qemu(), ["/run/edu.sock"]) as machine:
        edu = machine.devfns[0]
        machine.map_bar(edu, 0, 0xE000_0000)
        assert machine.readl(0xE000_0000) == 0x0100_00ED

Start the device's server first: QEMU connects once, without retry.

Sources: QEMU's ``system/qtest.c`` (the line protocol), ``docs/interop/qmp-spec`` (QMP), the PCI Local Bus
Specification 3.0, sections 3.2.2.3.2 (configuration mechanism #1) and 6.2.5.1 (sizing of BARs).
"""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.testing.qemu import (
    Deadline,
    PluggedDevice,
    QemuError,
    QemuMachine,
    QemuTimeoutError,
    QmpError,
    device_properties,
    find_qemu,
)

__all__ = ["BarLayout", "QemuError", "QemuTimeoutError", "QmpError", "QtestMachine", "devfn", "find_qemu"]

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
CONFIG_ENABLE = 1 << 31
CONFIG_SIZE = 256

VENDOR_ID, COMMAND, BAR0 = 0x00, 0x04, 0x10
COMMAND_IO, COMMAND_MEMORY, COMMAND_BUS_MASTER = 1, 2, 4
BAR_IO, BAR_64BIT, BAR_PREFETCHABLE = 1, 4, 8
BAR_COUNT = 6

PORT_LETTERS = {1: "b", 2: "w", 4: "l"}
MEMORY_LETTERS = {**PORT_LETTERS, 8: "q"}
CHUNK = 64 * 1024  # bytes of one bulk access: QEMU scans a line again whenever more of it comes


@dataclass(frozen=True, slots=True)
class BarLayout:
    """What sizing a BAR tells: ``size`` in bytes (0: not implemented) and its type bits."""

    size: int
    io: bool = False
    is_64bit: bool = False
    prefetchable: bool = False


class QtestMachine(QemuMachine):
    """A q35 machine under ``-accel qtest`` with vfio-user devices plugged in; a context manager.

    ``devices`` names the servers: each a socket path, or a mapping of properties of vfio-user-pci with the
    socket path as ``socket``, for example ``{"socket": path, "x-no-posted-writes": True}``. The n-th one sits at
    ``devfns[n]`` on bus 0. ``memory`` is the guest's RAM in bytes, from address 0 on: a memfd that the device
    servers can map. With ``anonymous_ram`` it has no fd, and their DMA must go by messages. ``timeout`` in
    seconds bounds every wait for an answer of QEMU's.

    Any call raises :class:`QemuError` when QEMU dies and :class:`QemuTimeoutError` when it does not answer; the
    machine is closed then. The moves of intercepted interrupt lines are kept in ``irq_levels`` (by line, as it
    is now) and in ``irq_record`` ((line, level) in order); QMP events that nobody took yet, in ``events``.
    """

    def __init__(
        self,
        qemu: str | Path,
        devices: Sequence[PluggedDevice] = (),
        *,
        memory: int = 64 << 20,
        anonymous_ram: bool = False,
        extra_args: Sequence[str] = (),
        timeout: float = 10.0,
    ) -> None:
        self.memory = memory
        self.devfns = tuple(devfn(slot) for slot in range(1, len(devices) + 1))
        self.irq_levels: dict[int, bool] = {}
        self.irq_record: list[tuple[int, bool]] = []
        arguments = _machine_args(memory, anonymous_ram)
        for slot, device in enumerate(devices, start=1):
            arguments += ["-device", json.dumps(device_properties(device, addr=f"{slot:02x}.0"))]
        super().__init__(qemu, [*arguments, *extra_args], channels={"qtest": "-qtest"}, timeout=timeout)

    # Ports and memory.

    def inb(self, port: int) -> int:
        """Read one byte from an I/O port."""
        return self._number(f"inb {port:#x}")

    def inw(self, port: int) -> int:
        """Read two bytes from an I/O port."""
        return self._number(f"inw {port:#x}")

    def inl(self, port: int) -> int:
        """Read four bytes from an I/O port."""
        return self._number(f"inl {port:#x}")

    def outb(self, port: int, value: int) -> None:
        """Write one byte to an I/O port."""
        self._command(f"outb {port:#x} {value:#x}")

    def outw(self, port: int, value: int) -> None:
        """Write two bytes to an I/O port."""
        self._command(f"outw {port:#x} {value:#x}")

    def outl(self, port: int, value: int) -> None:
        """Write four bytes to an I/O port."""
        self._command(f"outl {port:#x} {value:#x}")

    def readb(self, address: int) -> int:
        """Read one byte of guest physical memory."""
        return self._number(f"readb {address:#x}")

    def readw(self, address: int) -> int:
        """Read two bytes of guest physical memory."""
        return self._number(f"readw {address:#x}")

    def readl(self, address: int) -> int:
        """Read four bytes of guest physical memory."""
        return self._number(f"readl {address:#x}")

    def readq(self, address: int) -> int:
        """Read eight bytes of guest physical memory."""
        return self._number(f"readq {address:#x}")

    def writeb(self, address: int, value: int) -> None:
        """Write one byte to guest physical memory."""
        self._command(f"writeb {address:#x} {value:#x}")

    def writew(self, address: int, value: int) -> None:
        """Write two bytes to guest physical memory."""
        self._command(f"writew {address:#x} {value:#x}")

    def writel(self, address: int, value: int) -> None:
        """Write four bytes to guest physical memory."""
        self._command(f"writel {address:#x} {value:#x}")

    def writeq(self, address: int, value: int) -> None:
        """Write eight bytes to guest physical memory."""
        self._command(f"writeq {address:#x} {value:#x}")

    def read(self, address: int, size: int) -> bytes:
        """Read ``size`` bytes of guest physical memory."""
        spans = ((at, min(CHUNK, size - at)) for at in range(0, size, CHUNK))
        return b"".join(self._read_chunk(address + at, count) for at, count in spans)

    def write(self, address: int, data: bytes) -> None:
        """Write ``data`` to guest physical memory."""
        for at in range(0, len(data), CHUNK):
            chunk = data[at : at + CHUNK]
            self._command(f"b64write {address + at:#x} {len(chunk)} {base64.b64encode(chunk).decode()}")

    # Interrupts and time.

    def irq_intercept_in(self, path: str = "ioapic") -> None:
        """Watch the interrupt lines that go into the device at this QOM path, instead of delivering them."""
        self._command(f"irq_intercept_in {path}")

    def wait_irq(self, line: int, timeout: float | None = None, *, level: bool = True) -> None:
        """Wait until an intercepted line is raised (or lowered). Line 0 of the IOAPIC is the timer.

        QEMU takes any access to a BAR of a vfio-user device for the end of its INTx: the line falls, and rises
        again if the device still has cause. So wait first, then look at the device.

        Raises :class:`QemuTimeoutError` when nothing comes; the machine goes on.
        """
        deadline = Deadline(self.timeout if timeout is None else timeout)
        while self.irq_levels.get(line, False) != level:
            what = f"IRQ {line} {'raised' if level else 'lowered'}"
            answer = self._receive("qtest", what, deadline, fatal=False)
            if not self._take_irq(answer):
                raise self._fatal(f"{what}: QEMU said {answer!r}")

    def clock_step(self, nanoseconds: int) -> int:
        """Let the virtual clock run on; returns its new time in ns. Under qtest it stands still otherwise."""
        return int(self._command(f"clock_step {nanoseconds}"))

    def wait_until(self, what: str, condition: Callable[[], bool], timeout: float | None = None) -> None:
        """Call ``condition``, which looks at the machine, until it holds.

        Raises :class:`QemuTimeoutError` when it does not; the machine goes on.
        """
        deadline = Deadline(self.timeout if timeout is None else timeout)
        while not condition():
            if deadline.passed:
                raise self._error(f"{what}: not within {deadline.seconds} s", QemuTimeoutError)

    def reset(self) -> None:
        """Reset the whole machine and wait until that is done; every device is unmapped and disabled then."""
        self.events = deque(event for event in self.events if event["event"] != "RESET")
        self.qmp("system_reset")
        self.wait_event("RESET")

    # PCI, bus 0.

    def config_read(self, devfn: int, offset: int, width: int = 4) -> int:
        """Read 1, 2 or 4 bytes of a function's config space; all ones where there is none."""
        port = self._select_config(devfn, offset, width)
        return self._number(f"in{PORT_LETTERS[width]} {port:#x}")

    def config_write(self, devfn: int, offset: int, value: int, width: int = 4) -> None:
        """Write 1, 2 or 4 bytes of a function's config space."""
        port = self._select_config(devfn, offset, width)
        self._command(f"out{PORT_LETTERS[width]} {port:#x} {value:#x}")

    def pci_functions(self) -> dict[int, tuple[int, int]]:
        """The functions on bus 0: devfn to (vendor id, device id)."""
        ids = {devfn: self.config_read(devfn, VENDOR_ID) for devfn in range(CONFIG_SIZE)}
        return {devfn: (both & 0xFFFF, both >> 16) for devfn, both in ids.items() if both & 0xFFFF != 0xFFFF}

    def enable(self, devfn: int, *, io: bool = True, memory: bool = True, bus_master: bool = True) -> None:
        """Set what a function answers to, and whether it may do DMA, in its COMMAND register."""
        bits = io * COMMAND_IO | memory * COMMAND_MEMORY | bus_master * COMMAND_BUS_MASTER
        command = self.config_read(devfn, COMMAND, 2)
        self.config_write(devfn, COMMAND, command & ~0x7 | bits, 2)

    def size_bar(self, devfn: int, bar: int) -> BarLayout:
        """Size a BAR as firmware does, with decoding off meanwhile; BAR and COMMAND keep their values."""
        command = self.config_read(devfn, COMMAND, 2)
        self.config_write(devfn, COMMAND, command & ~(COMMAND_IO | COMMAND_MEMORY), 2)
        low = self._probe_bar(devfn, bar)
        layout = _bar_layout(low, self._probe_bar(devfn, bar + 1) if _is_64bit(low) else None)
        self.config_write(devfn, COMMAND, command, 2)
        return layout

    def map_bar(self, devfn: int, bar: int, address: int) -> BarLayout:
        """Place a BAR at a memory address or port, and enable I/O, memory and bus mastering."""
        layout = self.size_bar(devfn, bar)
        if not layout.size or address % layout.size:
            raise ValueError(f"BAR {bar} of {layout.size:#x} bytes cannot be at {address:#x}")
        self.config_write(devfn, _bar_offset(bar), address & 0xFFFF_FFFF)
        if layout.is_64bit:
            self.config_write(devfn, _bar_offset(bar + 1), address >> 32)
        self.enable(devfn)
        return layout

    def _select_config(self, devfn: int, offset: int, width: int) -> int:
        if width not in PORT_LETTERS or offset % width or not 0 <= offset < CONFIG_SIZE:
            raise ValueError(f"no config access of {width} bytes at {offset:#x}")
        self.outl(CONFIG_ADDRESS, CONFIG_ENABLE | devfn << 8 | offset & ~3)
        return CONFIG_DATA + offset % 4

    def _probe_bar(self, devfn: int, bar: int) -> int:
        offset = _bar_offset(bar)
        before = self.config_read(devfn, offset)
        self.config_write(devfn, offset, 0xFFFF_FFFF)
        probed = self.config_read(devfn, offset)
        self.config_write(devfn, offset, before)
        return probed

    # The qtest connection.

    def _command(self, line: str) -> str:
        """Have a qtest command done; returns what stands after OK."""
        deadline = Deadline(self.timeout)
        what = f"qtest {line[:40]}"
        self._send("qtest", line, what, deadline)
        answer = self._receive("qtest", what, deadline)
        while self._take_irq(answer):
            answer = self._receive("qtest", what, deadline)
        verdict, _, result = answer.partition(" ")
        if verdict != "OK":
            raise self._error(f"{what}: QEMU said {answer!r}")
        return result

    def _number(self, line: str) -> int:
        return int(self._command(line), 16)

    def _read_chunk(self, address: int, size: int) -> bytes:
        return base64.b64decode(self._command(f"b64read {address:#x} {size:#x}"), validate=True)

    def _take_irq(self, answer: str) -> bool:
        """Record an interrupt line's move, which may come in between anything else; whether it was one."""
        word, _, move = answer.partition(" ")
        if word != "IRQ":
            return False
        direction, _, line = move.partition(" ")
        self.irq_levels[int(line)] = direction == "raise"
        self.irq_record.append((int(line), direction == "raise"))
        return True


def devfn(slot: int, function: int = 0) -> int:
    """The number of a PCI function on its bus."""
    return slot << 3 | function


def _bar_offset(bar: int) -> int:
    if not 0 <= bar < BAR_COUNT:
        raise ValueError(f"there is no BAR {bar}")
    return BAR0 + 4 * bar


def _is_64bit(low: int) -> bool:
    return low & (BAR_IO | BAR_64BIT) == BAR_64BIT


def _bar_layout(low: int, high: int | None) -> BarLayout:
    """What the answer to all ones means: the address bits that stick are those above the size."""
    if low & BAR_IO:
        sticking = low & ~0x3
        return BarLayout(size=sticking & -sticking, io=True)
    sticking = low & ~0xF | (high or 0) << 32
    return BarLayout(size=sticking & -sticking, is_64bit=high is not None, prefetchable=bool(low & BAR_PREFETCHABLE))


def _machine_args(memory: int, anonymous_ram: bool) -> list[str]:
    backend = "" if anonymous_ram else ",memory-backend=ram"
    ram = [] if anonymous_ram else ["-object", f"memory-backend-memfd,id=ram,size={memory},share=on"]
    return [
        *("-accel", "qtest", "-qtest-log", "none"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", f"q35{backend}", "-m", f"{memory}B", *ram),
    ]
