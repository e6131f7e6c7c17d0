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
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vfio_user.errors import VfioUserError

BINARY = "qemu-system-x86_64"
DEVICE = "vfio-user-pci"

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


class QemuError(VfioUserError):
    """QEMU died, could not be started, or refused what the test asked; its stderr is in the message."""


class QemuTimeoutError(QemuError, TimeoutError):
    """What was waited for did not happen in time."""


class QmpError(QemuError):
    """QEMU answered a QMP command with an error; ``kind`` is its error class, such as ``CommandNotFound``."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QMP {command}: {kind}: {description}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class BarLayout:
    """What sizing a BAR tells: ``size`` in bytes (0: not implemented) and its type bits."""

    size: int
    io: bool = False
    is_64bit: bool = False
    prefetchable: bool = False


def find_qemu() -> Path | None:
    """A QEMU that has the vfio-user-pci device, or None.

    Looked for in the environment variable ``VFIO_USER_QEMU``, as ``.qemu/qemu-system-x86_64`` (what
    ``scripts/fetch_qemu.py`` makes) in the current directory or one above it, and on PATH. Raises
    :class:`QemuError` when the variable names something that cannot be executed: a wish that is not met must
    not pass for no wish.
    """
    wished = os.environ.get("VFIO_USER_QEMU")
    if wished:
        return _executable(wished)
    here = Path.cwd()
    for folder in (here, *here.parents):
        fetched = folder / ".qemu" / BINARY
        if os.access(fetched, os.X_OK):
            return fetched
    system = shutil.which(BINARY)
    return Path(system) if system and _has_device(system) else None


def _executable(name: str) -> Path:
    path = shutil.which(name)
    if path is None:
        raise QemuError(f"VFIO_USER_QEMU={name} is not an executable")
    return Path(path)


def _has_device(qemu: str) -> bool:
    command = [qemu, "-machine", "none", "-device", "help"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return f'"{DEVICE}"' in listing


class QtestMachine:
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
        devices: Sequence[str | Path | Mapping[str, Any]] = (),
        *,
        memory: int = 64 << 20,
        anonymous_ram: bool = False,
        extra_args: Sequence[str] = (),
        timeout: float = 10.0,
    ) -> None:
        self.memory = memory
        self.timeout = timeout
        self.devfns = tuple(devfn(slot) for slot in range(1, len(devices) + 1))
        self.irq_levels: dict[int, bool] = {}
        self.irq_record: list[tuple[int, bool]] = []
        self.events: deque[dict[str, Any]] = deque()
        self._last_words: str | None = None
        command = [str(qemu), *_machine_args(memory, anonymous_ram)]
        for slot, device in enumerate(devices, start=1):
            command += ["-device", _device_option(device, slot)]
        with contextlib.ExitStack() as undo:
            self._stderr = undo.enter_context(tempfile.TemporaryFile())
            self._qtest, qtest_end = _socket_pair(undo, "qtest")
            self._qmp, qmp_end = _socket_pair(undo, "QMP")
            self._process = _spawn([*command, *extra_args], qtest_end, qmp_end, self._stderr.fileno())
            self._undo = undo.pop_all()
        qtest_end.close()
        qmp_end.close()
        try:
            self._shake_hands()
        except BaseException:
            self._dispose()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._dispose()  # what went wrong first is what the reader must see

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What QEMU wrote to its stderr so far; all of it, once the machine is closed."""
        if self._last_words is not None:
            return self._last_words
        size = os.fstat(self._stderr.fileno()).st_size
        # pread: QEMU writes through the same file offset, which must not be moved.
        return os.pread(self._stderr.fileno(), size, 0).decode(errors="replace").strip()

    def close(self) -> None:
        """Have QEMU quit, and wait for that; closing twice is fine.

        Raises :class:`QemuError` when it dies instead, :class:`QemuTimeoutError` when it has to be killed.
        """
        if self._last_words is not None:
            return
        self.qmp("quit")
        try:
            status = self._process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            raise self._fatal(f"QMP quit: not within {self.timeout} s", QemuTimeoutError) from None
        if status:
            raise self._fatal("QMP quit")
        self._dispose()

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
        deadline = _Deadline(self.timeout if timeout is None else timeout)
        while self.irq_levels.get(line, False) != level:
            what = f"IRQ {line} {'raised' if level else 'lowered'}"
            answer = self._receive(self._qtest, what, deadline, fatal=False)
            if not self._take_irq(answer):
                raise self._fatal(f"{what}: QEMU said {answer!r}")

    def clock_step(self, nanoseconds: int) -> int:
        """Let the virtual clock run on; returns its new time in ns. Under qtest it stands still otherwise."""
        return int(self._command(f"clock_step {nanoseconds}"))

    def wait_until(self, what: str, condition: Callable[[], bool], timeout: float | None = None) -> None:
        """Call ``condition``, which looks at the machine, until it holds.

        Raises :class:`QemuTimeoutError` when it does not; the machine goes on.
        """
        deadline = _Deadline(self.timeout if timeout is None else timeout)
        while not condition():
            if deadline.passed:
                raise self._error(f"{what}: not within {deadline.seconds} s", QemuTimeoutError)

    # QMP.

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        """Execute a QMP command; returns what it returns. Raises :class:`QmpError` when QEMU refuses."""
        what, deadline = f"QMP {command}", _Deadline(self.timeout)
        self._send(self._qmp, json.dumps({"execute": command, "arguments": arguments}), what, deadline)
        while True:
            answer = self._receive_qmp(what, deadline, fatal=True)
            if "error" in answer:
                raise QmpError(command, answer["error"]["class"], answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def wait_event(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        """The oldest QMP event of this name that was not taken yet; waits for one if there is none.

        Raises :class:`QemuTimeoutError` when none comes; the machine goes on.
        """
        deadline = _Deadline(self.timeout if timeout is None else timeout)
        while True:
            event = next((event for event in self.events if event["event"] == name), None)
            if event is not None:
                self.events.remove(event)
                return event
            self._receive_qmp(f"QMP event {name}", deadline, fatal=False)

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

    # The two connections.

    def _shake_hands(self) -> None:
        self._receive_qmp("QMP greeting", _Deadline(self.timeout), fatal=True)
        self.qmp("qmp_capabilities")

    def _command(self, line: str) -> str:
        """Have a qtest command done; returns what stands after OK."""
        deadline = _Deadline(self.timeout)
        what = f"qtest {line[:40]}"
        self._send(self._qtest, line, what, deadline)
        answer = self._receive(self._qtest, what, deadline)
        while self._take_irq(answer):
            answer = self._receive(self._qtest, what, deadline)
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

    def _receive_qmp(self, what: str, deadline: _Deadline, *, fatal: bool) -> dict[str, Any]:
        """The next QMP message; an event is also kept in ``events``."""
        message: dict[str, Any] = json.loads(self._receive(self._qmp, what, deadline, fatal=fatal))
        if "event" in message:
            self.events.append(message)
        return message

    def _send(self, lines: _Lines, line: str, what: str, deadline: _Deadline) -> None:
        try:
            lines.send(line, deadline)
        except TimeoutError:
            raise self._fatal(f"{what}: not taken within {deadline.seconds} s", QemuTimeoutError) from None
        except OSError as error:
            raise self._fatal(f"{what}: {error}", grace=self.timeout) from error

    def _receive(self, lines: _Lines, what: str, deadline: _Deadline, *, fatal: bool = True) -> str:
        """The next line; ``fatal``: if it does not come in time, no later answer could be told from it."""
        try:
            return lines.receive(deadline)
        except TimeoutError:
            late = f"{what}: not within {deadline.seconds} s"
            raise (self._fatal if fatal else self._error)(late, QemuTimeoutError) from None
        except OSError as error:
            raise self._fatal(f"{what}: {error}", grace=self.timeout) from error

    def _error(self, message: str, kind: type[QemuError] = QemuError) -> QemuError:
        return kind(f"{message}\nQEMU's stderr: {self.stderr or 'empty'}")

    def _fatal(self, message: str, kind: type[QemuError] = QemuError, *, grace: float = 0) -> QemuError:
        """An error after which the machine is closed, with how QEMU ended."""
        return self._error(f"{message} (QEMU: {self._dispose(grace)})", kind)

    def _dispose(self, grace: float = 0) -> str:
        """Let go of everything; kill QEMU if it does not end within ``grace`` seconds. Returns how it ended."""
        try:
            end = _how_it_ended(self._process.wait(grace))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(self.timeout)
            end = "killed"
        if self._last_words is None:
            self._last_words = self.stderr
        self._undo.close()
        return end


def _how_it_ended(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.strsignal(-status) or f"signal {-status}"


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


def _device_option(device: str | Path | Mapping[str, Any], slot: int) -> str:
    properties = device if isinstance(device, Mapping) else {"socket": device}
    address = {"type": "unix", "path": str(properties["socket"])}
    return json.dumps({**properties, "driver": DEVICE, "socket": address, "addr": f"{slot:02x}.0"})


def _socket_pair(undo: contextlib.ExitStack, name: str) -> tuple[_Lines, socket.socket]:
    """Our end and QEMU's end of one connection."""
    ours, theirs = socket.socketpair()
    undo.enter_context(ours)
    undo.enter_context(theirs)
    return _Lines(ours, name), theirs


def _spawn(command: list[str], qtest: socket.socket, qmp: socket.socket, stderr: int) -> subprocess.Popen[bytes]:
    """Start QEMU with the connections as inherited fds: no paths to clean up, and its death ends them."""
    ends = {"qtest": qtest.fileno(), "qmp": qmp.fileno()}
    for name, fd in ends.items():
        command += ["-chardev", f"socket,id={name},fd={fd}", f"-{name}", f"chardev:{name}"]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=tuple(ends.values()),
        )
    except OSError as error:
        raise QemuError(f"{command[0]} does not start: {error}") from error


class _Deadline:
    """A moment ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._moment = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._moment

    def arm(self, sock: socket.socket) -> None:
        """Give the next operation on a socket what is left of the time."""
        left = self._moment - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)


class _Lines:
    """Lines of text over a stream socket, each way."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._socket = sock
        self._name = name
        self._pending = bytearray()

    def send(self, line: str, deadline: _Deadline) -> None:
        deadline.arm(self._socket)
        self._socket.sendall(line.encode() + b"\n")

    def receive(self, deadline: _Deadline) -> str:
        """The next line without its end; ConnectionError when no more will come."""
        while (end := self._pending.find(b"\n")) < 0:
            deadline.arm(self._socket)
            more = self._socket.recv(CHUNK)
            if not more:
                raise ConnectionError(f"QEMU closed its {self._name} connection")
            self._pending += more
        line = self._pending[:end].decode()
        del self._pending[: end + 1]
        return line.rstrip("\r")
