"""A guest that never rests, to migrate: memory, devices that write it by DMA on their own, and a processor that does.

::

    with GuestSimulator([Workload(SequentialWriter), Workload(RandomWriter, {"seed": 7})]) as guest:
        guest.start()
        for done in guest.migration().run():
            print(done.number, done.left)
        assert guest.verify() == []

Everything that is written has a value that follows from who wrote it and how often it had written before, so that one
lost page, one lost write or one lost byte of a device's own state is found, and named. Each page of guest memory is
divided into *lanes* of 512 bytes, one for each writer: several devices and the processor dirty the same pages.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from mmap import mmap
from types import TracebackType
from typing import Any, ClassVar

from vfio_user.client import Client
from vfio_user.device import Bar, Device, option, register
from vfio_user.errors import CallTimeoutError
from vfio_user.fds import OwnedFd
from vfio_user.live import Destination, LocalDestination, MemoryRegion, Migration
from vfio_user.migration.states import RUNNING_STATES
from vfio_user.server import Link, Server
from vfio_user.wire.constants import PAGE_SIZE, DeviceState, MigrationFlags

LANE = 512
MAX_LANES = PAGE_SIZE // LANE
PROCESSOR = 0
"""The lane of the guest's processor; device n has lane n + 1."""
BLOCK = LANE
"""Bytes of a block of a device's own memory."""
MAX_BLOCKS = 256

RING_ADDRESS = 0
"""A page of descriptors, which the guest writes once: what :class:`ScatterGather` is to write next."""
RING = PAGE_SIZE // 4
GATHERED = 4
"""Descriptors of one operation."""

CONTROL, KICK, COUNT, RESUMED_AT, FAULTS, INTACT = 0x00, 0x04, 0x08, 0x10, 0x18, 0x20
"""Registers of a workload's BAR0. Bit 0 of CONTROL: work on your own. KICK: do so many operations now."""
RUN = 1

_WORD = struct.Struct("<IIQ")
_U64 = (1 << 64) - 1
_POISON = b"\xee"


def content(lane: int, page: int, number: int) -> bytes:
    """What write ``number`` of a lane leaves in its part of a page."""
    return _WORD.pack(lane, page, number) * (LANE // _WORD.size)


def scattered(seed: int, number: int, pages: int) -> int:
    """A page for ``number``, without an order that anyone would guess."""
    mixed = (number + 1) * 0x9E3779B97F4A7C15 + seed * 0xBF58476D1CE4E5B9 & _U64
    return (mixed ^ mixed >> 31) * 0x94D049BB133111EB % (1 << 61) % pages


def address_of(lane: int, page: int) -> int:
    """Where in guest memory a lane has its part of a page: the first page of all holds the descriptors."""
    return RING_ADDRESS + (1 + page) * PAGE_SIZE + lane * LANE


def last_writes(targets: Callable[[int], Sequence[int]], pages: int, count: int) -> dict[int, int]:
    """By page, the number of the write that is seen there after ``count`` operations; untouched pages are missing."""
    found: dict[int, int] = {}
    for number in range(count - 1, -1, -1):
        for page in targets(number):
            found.setdefault(page, number)
        if len(found) == pages:
            break
    return found


class Writer(Device, abstract=True):
    """A device that writes guest memory, operation after operation, while it runs and CONTROL says so.

    It also has memory of its own that no one else sees: operation n fills block n, counted round and round. With
    ``ahead`` that memory goes ahead, block by block as it changes, and the rest of the stream has what changed since.
    """

    vendor_id = 0x494F
    bars = {0: Bar(PAGE_SIZE)}

    lane = option(1, "which part of each page it writes")
    pages = option(64, "pages of guest memory that it writes")
    seed = option(0, "another one, other pages")
    burst = option(16, "operations in a row, when it works on its own")
    pace = option(0.0005, "seconds that it rests after them")
    blocks = option(16, "blocks of 512 bytes of its own memory")
    ahead = option(True, "whether it has PRE_COPY")
    p2p = option(False, "whether it has P2P")

    control = register(CONTROL, writable=RUN)
    kick = register(KICK, writable=(1 << 32) - 1)
    count = register(COUNT, width=8)
    """Operations done so far."""
    resumed_at = register(RESUMED_AT, width=8)
    """``count`` as the device loaded it."""
    faults = register(FAULTS, width=8)
    """Writes that found no guest memory: a device that runs before it is connected has some."""
    intact = register(INTACT)
    """1 while its own memory is what it must be."""

    def __init__(self, **options: object) -> None:
        self._bell = OwnedFd(os.eventfd(1, os.EFD_CLOEXEC))  # readable for ever: there is always work
        self._working = False
        super().__init__(**options)
        self.own = bytearray(self.blocks * BLOCK)
        self._unsent: set[int] = set(range(self.blocks))
        self.states: list[DeviceState] = []
        """Every state that a client asked for, in order."""

    def close(self) -> None:
        """Give back what the device holds. It works no more."""
        self._bell.close()

    def configure(self) -> None:
        if not 0 < self.lane < MAX_LANES:
            raise ValueError(f"lane {self.lane}: 1 to {MAX_LANES - 1}")
        if not 0 < self.blocks <= MAX_BLOCKS:
            raise ValueError(f"{self.blocks} blocks: 1 to {MAX_BLOCKS}")
        self.migration = (
            MigrationFlags.STOP_COPY
            | (MigrationFlags.PRE_COPY if self.ahead else MigrationFlags(0))
            | (MigrationFlags.P2P if self.p2p else MigrationFlags(0))
        )

    # What it does

    @classmethod
    def targets(cls, seed: int, pages: int, number: int) -> Sequence[int]:
        """The pages that operation ``number`` writes."""
        raise NotImplementedError

    def chosen(self, number: int) -> Sequence[int]:
        """The same, as the device finds it out."""
        return self.targets(self.seed, self.pages, number)

    def operate(self, times: int) -> None:
        for number in range(self.count, self.count + times):
            for page in self.chosen(number):
                self.dma.write(address_of(self.lane, page), content(self.lane, page, number))
            block = number % self.blocks
            self.own[block * BLOCK : (block + 1) * BLOCK] = content(self.lane, block, number)
            self._unsent.add(block)
            self.count = number + 1

    @classmethod
    def expected_own(cls, lane: int, blocks: int, count: int) -> bytes:
        """The device's own memory after ``count`` operations."""
        own = bytearray(blocks * BLOCK)
        for number in range(max(0, count - blocks), count):
            block = number % blocks
            own[block * BLOCK : (block + 1) * BLOCK] = content(lane, block, number)
        return bytes(own)

    @kick.on_write
    def kicked(self, old: int, new: int) -> None:
        self._attempt(new)

    @intact.on_read
    def compare(self) -> int:
        return int(self.own == self.expected_own(self.lane, self.blocks, self.count))

    @control.on_write
    def controlled(self, old: int, new: int) -> None:
        self._follow()

    def _tick(self) -> None:
        self._attempt(self.burst)
        time.sleep(self.pace)

    def _attempt(self, times: int) -> None:
        try:
            self.operate(times)
        except OSError:
            self.faults += 1

    def _follow(self) -> None:
        """Work on its own exactly while there is a client, the device runs, and it was told to."""
        link = self.link
        working = link is not None and bool(self.control & RUN) and self.migration_get_state() in RUNNING_STATES
        if working == self._working:
            return
        self._working = working
        if link is not None:
            link.watch(self._bell.fileno(), self._tick) if working else link.unwatch(self._bell.fileno())

    # Hooks

    def connected(self, link: Link) -> None:
        super().connected(link)
        self._follow()

    def disconnected(self) -> None:
        super().disconnected()
        self._follow()

    def on_reset(self) -> None:
        self.own[:] = bytes(len(self.own))
        self._unsent = set(range(self.blocks))
        self._follow()

    def migration_set_state(self, state: DeviceState) -> None:
        self.states.append(state)
        loading = self.migration_get_state() == DeviceState.RESUMING
        try:
            super().migration_set_state(state)
            if loading:
                self.resumed_at = self.count
        finally:
            self._follow()

    # State besides the registers

    def pre_copy_start(self) -> None:
        self._unsent = set(range(self.blocks))

    def pre_copy(self) -> bytes:
        changed = self._changed()
        self._unsent.clear()
        return changed

    def save(self) -> dict[str, object]:
        return {"changed": self._changed() if self.ahead else self._blocks(range(self.blocks))}

    def load(self, saved: dict[str, object], pre_copy: Sequence[bytes]) -> None:
        changed = saved.get("changed")
        if not isinstance(changed, bytes):
            raise ValueError("the device's own memory is missing")
        own = bytearray(self.own)
        for part in (*pre_copy, changed):
            self._apply(own, part)
        self.own[:] = own

    def _changed(self) -> bytes:
        return self._blocks(sorted(self._unsent))

    def _blocks(self, numbers: Iterable[int]) -> bytes:
        """For each block its number and what it holds."""
        return b"".join(bytes((block,)) + self.own[block * BLOCK : (block + 1) * BLOCK] for block in numbers)

    @staticmethod
    def _apply(own: bytearray, part: bytes) -> None:
        for start in range(0, len(part), 1 + BLOCK):
            block, data = part[start], part[start + 1 : start + 1 + BLOCK]
            if len(data) != BLOCK or (block + 1) * BLOCK > len(own):
                raise ValueError(f"block {block} does not belong here")
            own[block * BLOCK : (block + 1) * BLOCK] = data


class SequentialWriter(Writer):
    """Page after page, round and round."""

    device_id = 0x5101

    @classmethod
    def targets(cls, seed: int, pages: int, number: int) -> Sequence[int]:
        return [number % pages]


class RandomWriter(Writer):
    """Any page."""

    device_id = 0x5102

    @classmethod
    def targets(cls, seed: int, pages: int, number: int) -> Sequence[int]:
        return [scattered(seed, number, pages)]


class ScatterGather(Writer):
    """Several pages in each operation, which it looks up in a ring of descriptors in guest memory."""

    device_id = 0x5103

    @classmethod
    def targets(cls, seed: int, pages: int, number: int) -> Sequence[int]:
        return [descriptor(number * GATHERED + at) % pages for at in range(GATHERED)]

    def chosen(self, number: int) -> Sequence[int]:
        start = number * GATHERED % RING
        found = self.dma.read(RING_ADDRESS + 4 * start, 4 * GATHERED)
        return [page % self.pages for page in struct.unpack(f"<{GATHERED}I", found)]


class Flooder(Writer):
    """All its pages in each operation: faster than any link can send them."""

    device_id = 0x5104

    @classmethod
    def targets(cls, seed: int, pages: int, number: int) -> Sequence[int]:
        return range(pages)


def descriptor(number: int) -> int:
    """What the guest wrote at a place of the ring, counted round and round."""
    return scattered(0, number % RING, 1 << 32)


RING_CONTENT = struct.pack(f"<{RING}I", *map(descriptor, range(RING)))


def _unmap(mapping: mmap) -> None:
    with contextlib.suppress(BufferError):  # someone still looks at it: it goes away together with the last view
        mapping.close()


@dataclass(frozen=True, slots=True)
class Workload:
    """A device of the guest: its class, and options; ``lane`` and ``pages`` are the simulator's to give."""

    device: type[Writer]
    options: Mapping[str, Any] = field(default_factory=dict)


class Host:
    """One side: guest memory, and devices of the same kinds, each behind a server of its own.

    ``devices`` are those of servers that are threads here, ``processes`` the servers that are none.
    """

    TIMEOUT: ClassVar[float] = 20.0

    def __init__(self, workloads: Sequence[Workload], pages: int, *, processes: bool) -> None:
        self.workloads = workloads
        self.pages = pages
        self.devices: list[Writer] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.clients: list[Client] = []
        self._closing = contextlib.ExitStack()
        try:
            self._set_up(processes)
        except BaseException:
            self.close()
            raise

    def _set_up(self, processes: bool) -> None:
        size = (1 + self.pages) * PAGE_SIZE
        file = self._closing.enter_context(OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC)))
        os.ftruncate(file.fileno(), size)
        mapping = mmap(file.fileno(), size)
        self._closing.callback(_unmap, mapping)
        self.memory = self._closing.enter_context(memoryview(mapping))
        serve = self._process if processes else self._thread
        for sock in [self._closing.enter_context(serve(workload)) for workload in self.workloads]:
            client = Client(sock, self.TIMEOUT)
            self._closing.callback(client.close)
            self.clients.append(client)
            client.dma_map(RING_ADDRESS, size, file.fileno())

    @contextlib.contextmanager
    def _thread(self, workload: Workload) -> Iterator[socket.socket]:
        device = workload.device(**workload.options)
        self.devices.append(device)
        ours, theirs = socket.socketpair()
        with ours, contextlib.closing(device), Server(device, sock=theirs) as server:
            thread = threading.Thread(target=server.serve_forever, name=f"device {device.lane}", daemon=True)
            thread.start()
            try:
                yield ours
            finally:
                server.shutdown()
                thread.join(self.TIMEOUT)
                if thread.is_alive():
                    raise CallTimeoutError(f"the server of lane {device.lane} does not stop")

    @contextlib.contextmanager
    def _process(self, workload: Workload) -> Iterator[socket.socket]:
        kind = f"{workload.device.__module__}:{workload.device.__qualname__}"
        options = [part for name, value in workload.options.items() for part in ("-o", f"{name}={value}")]
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                command = [sys.executable, "-m", "vfio_user", "serve", kind, "--fd", str(theirs.fileno()), *options]
                process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            self.processes.append(process)
            try:
                yield ours
            finally:
                for number in (signal.SIGCONT, signal.SIGKILL):
                    process.send_signal(number)
                process.wait(self.TIMEOUT)

    def close(self) -> None:
        self._closing.close()
        self.devices.clear()  # they hold descriptors of their own

    # What the guest's driver does

    def read(self, number: int, register: int, size: int = 8) -> int:
        """A register of device ``number``."""
        return int.from_bytes(self.clients[number].region_read(0, register, size), "little")

    def write(self, number: int, register: int, value: int) -> None:
        self.clients[number].region_write(0, register, value.to_bytes(4, "little"))

    def run_devices(self, run: bool) -> None:
        """Have all devices work on their own, or no longer."""
        for number in range(len(self.clients)):
            self.write(number, CONTROL, RUN * run)


class GuestSimulator:
    """A guest with its devices on two hosts, ``here`` where it runs and ``there``, where nothing runs.

    Each device writes ``pages`` pages, together with all others and with the guest's processor. With ``processes`` the
    devices' servers are processes, to kill or to stop; otherwise they are threads. A context manager.
    """

    def __init__(self, workloads: Sequence[Workload], *, pages: int = 64, processes: bool = False) -> None:
        if not 0 < len(workloads) < MAX_LANES:
            raise ValueError(f"{len(workloads)} devices: 1 to {MAX_LANES - 1}")
        self.pages = pages
        self.workloads = [
            Workload(one.device, {**one.options, "lane": lane, "pages": pages}) for lane, one in enumerate(workloads, 1)
        ]
        with contextlib.ExitStack() as stack:
            self.here, self.there = (
                stack.enter_context(contextlib.closing(Host(self.workloads, pages, processes=processes)))
                for _ in range(2)
            )
            self._closing = stack.pop_all()
        self.written = 0
        """Writes of the guest's processor so far."""
        self._dirty: set[int] = {-1}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.here.memory[:PAGE_SIZE] = RING_CONTENT

    def close(self) -> None:
        try:
            self.pause()
        finally:
            self._closing.close()

    def __enter__(self) -> GuestSimulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The guest

    def start(self) -> None:
        """Have all devices and the processor work from now on."""
        self.here.run_devices(True)
        self.resume()

    def pause(self) -> None:
        """Stop the processor; the devices go on."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(Host.TIMEOUT)

    def resume(self) -> None:
        """Have the processor work from now on."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, args=(self.here,), name="processor", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the processor works."""
        return self._thread is not None

    def _work(self, host: Host) -> None:
        while not self._stop.is_set():
            self.compute(16, host)
            time.sleep(0.0005)

    def compute(self, times: int, host: Host | None = None) -> None:
        """Have the processor write so often, now."""
        memory = (host or self.here).memory
        for _ in range(times):
            page = scattered(PROCESSOR, self.written, self.pages)
            start = address_of(PROCESSOR, page)
            memory[start : start + LANE] = content(PROCESSOR, page, self.written)
            self.written += 1
            with self._lock:  # only now that it is written: a report that comes too early would let it be lost
                self._dirty.add(page)

    def kick(self, number: int, times: int) -> None:
        """Have device ``number`` do so many operations, now."""
        self.here.write(number, KICK, times)

    def dirty(self) -> list[tuple[int, int]]:
        """What the processor wrote since it was asked before: (address, length)."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        return [(address_of(PROCESSOR, page), LANE) for page in sorted(dirty)]

    # Its migration

    def migration(
        self,
        *,
        pause: Callable[[], None] | None = None,
        resume: Callable[[], None] | None = None,
        connect: Callable[[], None] = lambda: None,
        resume_there: Callable[[], None] | None = None,
        destination: Destination | None = None,
        **options: Any,
    ) -> Migration:
        """From here to there; ``options`` are Migration's. The memory there is overwritten before.

        The callbacks are called in place of the simulator's own: ``pause``, ``resume`` and :meth:`moved`. With
        another ``destination``, a remote one perhaps, the way to there is the caller's to make: :meth:`destination`.
        """
        return Migration(
            self.here.clients,
            destination or self.destination(connect=connect, resume=resume_there or self.moved),
            memory=[MemoryRegion(RING_ADDRESS, self.here.memory)],
            guest_dirty=options.pop("guest_dirty", self.dirty),
            pause=pause or self.pause,
            resume=resume or self.resume,
            **options,
        )

    def destination(self, **callbacks: Callable[[], None]) -> LocalDestination:
        """What is there, with memory that is worth nothing."""
        self.there.memory[:] = _POISON * len(self.there.memory)
        return LocalDestination(self.there.clients, [MemoryRegion(RING_ADDRESS, self.there.memory)], **callbacks)

    def moved(self) -> None:
        """The guest goes on there, which is here from now on."""
        self.here, self.there = self.there, self.here
        self.resume()

    # What must be

    def verify(self) -> list[str]:
        """Let the guest come to rest, and compare all that is here with what must be: a sentence for each difference.

        After a migration what was here before, if it still answers, tells up to where the work was done there.
        """
        self.pause()
        self.here.run_devices(False)
        return [*self._check_ring(), *self._check_processor(), *self._check_devices()]

    def verify_moved(self) -> list[str]:
        """As :meth:`verify`, and the devices went on exactly where those there, which are stopped, left off."""
        differences = self.verify()
        for number in range(len(self.workloads)):
            left_off, resumed = self.there.read(number, COUNT), self.here.read(number, RESUMED_AT)
            if left_off != resumed:
                differences.append(f"device {number} did {left_off} operations, and went on after {resumed}")
        return differences

    def _check_ring(self) -> Iterator[str]:
        if self.here.memory[:PAGE_SIZE] != RING_CONTENT:
            yield "the ring of descriptors was lost"

    def _check_processor(self) -> Iterator[str]:
        pages = self.pages
        yield from self._check_lane(
            PROCESSOR, last_writes(lambda number: [scattered(PROCESSOR, number, pages)], pages, self.written)
        )

    def _check_devices(self) -> Iterator[str]:
        for number, workload in enumerate(self.workloads):
            count, seed = self.here.read(number, COUNT), workload.options.get("seed", 0)
            last = last_writes(partial(workload.device.targets, seed, self.pages), self.pages, count)
            yield from self._check_lane(number + 1, last)
            if faults := self.here.read(number, FAULTS):
                yield f"device {number} wrote {faults} times where nothing was"
            if not self.here.read(number, INTACT, 4):
                yield f"device {number} has lost memory of its own, after {count} operations"

    def _check_lane(self, lane: int, last: Mapping[int, int]) -> Iterator[str]:
        for page in range(self.pages):
            start = address_of(lane, page)
            expected = content(lane, page, last[page]) if page in last else bytes(LANE)
            if self.here.memory[start : start + LANE] != expected:
                found = _WORD.unpack_from(self.here.memory, start)
                yield f"lane {lane} of page {page} is {found}, must be of write {last.get(page)}"
