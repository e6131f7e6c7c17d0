"""The main job in one go: a device at work is moved, live, from one process to another.

Two ``edu`` servers in processes of their own, and here the VMM: a guest that has its device copy real bytes, block by
block, by DMA in both directions, without pause until the switch-over, and goes on at the destination. Then memory and
device are compared, byte by byte, with what they must be.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

from vfio_user.client import Client
from vfio_user.devices import edu
from vfio_user.errors import CallTimeoutError, MigrationError, VfioUserError
from vfio_user.fds import OwnedFd
from vfio_user.live import LocalDestination, MemoryRegion, Migration, Report, Status
from vfio_user.wire.constants import PAGE_SIZE, IrqSetFlags, PciIrq

BLOCK = edu.BUFFER_SIZE
MIN_INPUT = 64 << 20
BAR0 = 0
TIMEOUT = 20.0
"""Seconds for anything that should take none; these machines may be slow."""
AFTER = 200
"""Blocks that the guest copies at the destination before everything is compared."""
VISIBLE = (edu.LIVENESS, edu.FACTORIAL, edu.STATUS, edu.IRQ_STATUS)
WIDE = (edu.DMA_SOURCE, edu.DMA_DESTINATION, edu.DMA_COUNT, edu.DMA_COMMAND)
"""edu's registers of 4 and of 8 bytes that can be read without an effect."""


def standard_library(size: int = MIN_INPUT) -> bytes:
    """The files of the installed Python standard library as one stream of ``size`` bytes or a bit more."""
    root = Path(sysconfig.get_path("stdlib"))
    stream = bytearray()
    while len(stream) < size:
        before = len(stream)
        for path in sorted(root.rglob("*.py")):
            if "site-packages" not in path.parts:
                stream += path.read_bytes()
            if len(stream) >= size:
                break
        if len(stream) == before:
            raise MigrationError(f"no standard library in {root}: give a file with --input")
    return bytes(stream)


@contextmanager
def device_process() -> Iterator[socket.socket]:
    """Our end of the socket of an ``edu`` server in a process of its own, which ends when this one does, in any way."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-m", "vfio_user", "serve", "edu", "--fd", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        try:
            yield ours
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Host:
    """One side: guest memory in a memfd, and a client that plugs the device into it."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        self._memory = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC))
        os.ftruncate(self._memory.fileno(), size)
        self.memory = memoryview(mmap(self._memory.fileno(), size))
        self.interrupt = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self.client = Client(sock, TIMEOUT)
        self.client.dma_map(0, size, self._memory.fileno())
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
        self.client.set_irqs(PciIrq.INTX, flags, 0, 1, [self.interrupt.fileno()])

    def read(self, register: int, width: int = 4) -> int:
        return int.from_bytes(self.client.region_read(BAR0, register, width), "little")

    def write(self, register: int, value: int, width: int = 4) -> None:
        self.client.region_write(BAR0, register, value.to_bytes(width, "little"))

    def transfer(self, source: int, destination: int, command: int) -> None:
        """One DMA of a block, as a driver does it: program, start, wait until it has ended."""
        values = (source, destination, BLOCK, command)
        self.client.region_write_multi(
            [(BAR0, register, value.to_bytes(8, "little")) for register, value in zip(WIDE, values, strict=True)]
        )
        while self.read(edu.DMA_COMMAND) & edu.DMA_START:
            pass

    def registers(self) -> dict[int, int]:
        return {r: self.read(r) for r in VISIBLE} | {r: self.read(r, 8) for r in WIDE}

    def close(self) -> None:
        self.client.close()
        self.interrupt.close()
        self._memory.close()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in guest memory: the input, its copy, and a page of the guest's own."""

    blocks: int

    @property
    def copy(self) -> int:
        return self.blocks * BLOCK

    @property
    def counter(self) -> int:
        return 2 * self.blocks * BLOCK

    @property
    def scratch(self) -> int:
        return self.counter + PAGE_SIZE

    @property
    def size(self) -> int:
        return self.scratch + PAGE_SIZE

    def source_of(self, number: int) -> int:
        return number % self.blocks * BLOCK

    def destination_of(self, number: int) -> int:
        """Each time round the copy is shifted by a block, so that what was right before is wrong now."""
        return self.copy + (number + number // self.blocks) % self.blocks * BLOCK


class Guest:
    """The workload: copies block after block through the device, and counts them in its own memory."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written = threading.Event()
        self.done = 0

    def start(self, host: Host, until: int | None = None) -> None:
        """Work on ``host`` until :meth:`pause`, or until so many blocks are done in all."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, args=(host, until), name="guest", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Stop between two blocks. Raises what the guest ran into."""
        self._stop.set()
        self.join()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(TIMEOUT)
        if self._thread.is_alive():
            raise CallTimeoutError("the guest does not stop")
        if self._error is not None:
            raise self._error

    def dirty(self) -> list[tuple[int, int]]:
        """What the guest's processor wrote since it was asked before: its counter."""
        if not self._written.is_set():
            return []
        self._written.clear()
        return [(self._layout.counter, 8)]

    def _work(self, host: Host, until: int | None) -> None:
        try:
            while not self._stop.is_set() and (until is None or self.done < until):
                number = self.done
                host.transfer(self._layout.source_of(number), edu.BUFFER_ADDRESS, edu.DMA_START)
                destination = self._layout.destination_of(number)
                host.transfer(edu.BUFFER_ADDRESS, destination, edu.DMA_START | edu.DMA_TO_GUEST)
                self.done = number + 1
                counter = self._layout.counter
                host.memory[counter : counter + 8] = self.done.to_bytes(8, "little")
                self._written.set()
        except BaseException as error:
            self._error = error


@dataclass(slots=True)
class Outcome:
    """What the demonstration found. ``findings`` are the differences: none if all is as it must be."""

    report: Report
    findings: list[str]
    blocks_before: int
    blocks_after: int
    input_size: int

    @property
    def verified(self) -> bool:
        return self.report.status is Status.COMPLETED and not self.findings

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the keys that every migration reports, and what the guest did."""
        return self.report.as_json() | {
            "verified": self.verified,
            "findings": self.findings,
            "input_bytes": self.input_size,
            "blocks_copied_before": self.blocks_before,
            "blocks_copied_after": self.blocks_after,
        }


def run_to_end(migration: Migration) -> None:
    """Without a look at its rounds."""
    for _ in migration.run():
        pass


def run(data: bytes, *, bandwidth: float, follow: Callable[[Migration], None] = run_to_end) -> Outcome:
    """Migrate a device at work over ``data``. What fails is in the outcome's report.

    ``follow`` runs the migration: who watches its rounds does it there.
    """
    try:
        return _set_up_and_migrate(data, bandwidth, follow)
    except (VfioUserError, OSError) as error:
        return Outcome(Report(error=str(error)), [], 0, 0, len(data))


def _set_up_and_migrate(data: bytes, bandwidth: float, follow: Callable[[Migration], None]) -> Outcome:
    layout = Layout(max(1, -(-len(data) // BLOCK)))
    guest = Guest(layout)
    with ExitStack() as stack:
        source, destination = (Host(stack.enter_context(device_process()), layout.size) for _ in range(2))
        stack.callback(source.close)
        stack.callback(destination.close)
        source.memory[: len(data)] = data
        source.write(edu.LIVENESS, 0x2026_1122)
        source.write(edu.FACTORIAL, 12)
        return _migrate(source, destination, guest, layout, data, bandwidth, follow)


def _migrate(
    source: Host,
    destination: Host,
    guest: Guest,
    layout: Layout,
    data: bytes,
    bandwidth: float,
    follow: Callable[[Migration], None],
) -> Outcome:
    findings: list[str] = []
    registers: dict[int, int] = {}

    def pause() -> None:
        """Stop the guest, with an interrupt asserted that nobody has acknowledged: it must not get lost."""
        guest.pause()
        source.write(edu.IRQ_RAISE, 0x10)
        registers.update(source.registers())

    def resume() -> None:
        findings.extend(_compare_registers(registers, destination.registers()))
        if not _signalled(destination.interrupt):
            findings.append("the interrupt that stood at the switch-over did not reach the destination")

    migration = Migration(
        [source.client],
        LocalDestination([destination.client], [MemoryRegion(0, destination.memory)], resume=resume),
        memory=[MemoryRegion(0, source.memory)],
        guest_dirty=guest.dirty,
        pause=pause,
        resume=lambda: guest.start(source),
        bandwidth=bandwidth,
        downtime=0.002,
        force=True,
    )
    guest.start(source)
    try:
        follow(migration)
    except MigrationError:
        return Outcome(migration.report, findings, guest.done, 0, len(data))
    before = guest.done
    try:
        findings.extend(_compare_memory(layout, data, before, destination, "at the switch-over"))
        findings.extend(_compare_buffer(layout, data, before, destination))
        guest.start(destination, until=before + AFTER)
        guest.join()
        findings.extend(_compare_memory(layout, data, guest.done, destination, "after going on"))
    except (VfioUserError, OSError) as error:
        findings.append(f"the destination failed after the switch-over: {error}")
    return Outcome(migration.report, findings, before, guest.done - before, len(data))


def _signalled(eventfd: OwnedFd) -> bool:
    try:
        return os.eventfd_read(eventfd.fileno()) > 0
    except BlockingIOError:
        return False


def _compare_registers(expected: dict[int, int], found: dict[int, int]) -> Iterator[str]:
    for register, value in expected.items():
        if found[register] != value:
            yield f"register {register:#x} is {found[register]:#x}, must be {value:#x}"


def _compare_buffer(layout: Layout, data: bytes, done: int, host: Host) -> Iterator[str]:
    """edu's own buffer holds the last block that was copied; it can be looked at by DMA only."""
    host.transfer(edu.BUFFER_ADDRESS, layout.scratch, edu.DMA_START | edu.DMA_TO_GUEST)
    found = bytes(host.memory[layout.scratch : layout.scratch + BLOCK])
    host.memory[layout.scratch : layout.scratch + BLOCK] = bytes(BLOCK)
    start = layout.source_of(done - 1)
    if done and found != data[start : start + BLOCK].ljust(BLOCK, b"\0"):
        yield "the device's buffer is not the last block that it moved"


def _compare_memory(layout: Layout, data: bytes, done: int, host: Host, when: str) -> Iterator[str]:
    """Guest memory against what ``done`` blocks of work must have made of it, worked out here anew."""
    image = bytearray(layout.size)
    image[: len(data)] = data
    for number in range(max(0, done - 2 * layout.blocks), done):
        start, target = layout.source_of(number), layout.destination_of(number)
        image[target : target + BLOCK] = image[start : start + BLOCK]
    image[layout.counter : layout.counter + 8] = done.to_bytes(8, "little")
    for start in range(0, layout.size, PAGE_SIZE):
        if host.memory[start : start + PAGE_SIZE] != image[start : start + PAGE_SIZE]:
            yield f"{when}: the page at {start:#x} is not what it must be"
