"""Many commands in flight on many queues, and what every block must hold after them.

::

    workload = NvmeWorkload(driver, blocks=4096)
    workload.start()
    ...                                      # migrate the controller, reset its server, whatever
    assert workload.verify() == []

Each block that is written holds its address and the number of the write, so that a write that was lost, done twice or
put elsewhere is found, and named. Two commands in flight never touch the same block: what must be there is certain.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vfio_user.devices.nvme.constants import IoOpcode
from vfio_user.errors import CallTimeoutError, VfioUserError
from vfio_user.testing.nvme.access import Memory
from vfio_user.testing.nvme.commands import Command, NvmeTimeoutError
from vfio_user.testing.nvme.data import Buffer
from vfio_user.testing.nvme.driver import FORCE_UNIT_ACCESS, NvmeDriver, io
from vfio_user.testing.nvme.queues import QueuePair, Ticket, controller_state

UNKNOWN, ZEROS = -1, 0
"""What a block holds besides the number of a write."""

WEIGHTS: Mapping[IoOpcode, int] = {
    IoOpcode.WRITE: 8,
    IoOpcode.READ: 4,
    IoOpcode.COMPARE: 1,
    IoOpcode.WRITE_ZEROES: 1,
    IoOpcode.VERIFY: 1,
    IoOpcode.FLUSH: 1,
}
"""How often each command is chosen."""

_OPTIONAL = {IoOpcode.COMPARE: 0, IoOpcode.WRITE_ZEROES: 3, IoOpcode.VERIFY: 7}
"""Commands that not every controller has, with their bit in ONCS."""
_WITH_DATA = frozenset({IoOpcode.WRITE, IoOpcode.READ, IoOpcode.COMPARE})
_SGL_SUPPORTED = 3
_WORD = struct.Struct("<QQ")
_WAIT = 0.005


def content(lba: int, number: int, size: int) -> bytes:
    """What write ``number`` leaves in a block."""
    return _WORD.pack(lba, number) * (size // _WORD.size) if number else bytes(size)


class LoggedMemory:
    """Another memory, and what the driver wrote there since it was asked before."""

    def __init__(self, memory: Memory) -> None:
        self.address, self.size = memory.address, memory.size
        self._memory = memory
        self._written: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self.read: Callable[[int, int], bytes] = memory.read

    def write(self, address: int, data: bytes) -> None:
        self._memory.write(address, data)
        with self._lock:  # only now that it is written: a report that comes too early would let it be lost
            self._written.append((address, len(data)))

    def dirty(self) -> list[tuple[int, int]]:
        """(address, length) of each write, as ``guest_dirty`` of a live migration wants it."""
        with self._lock:
            written, self._written = self._written, []
        return written


class WrongDataError(VfioUserError):
    """A read gave what was not written: a sentence for each block is in ``differences``."""

    def __init__(self, differences: Sequence[str]) -> None:
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        super().__init__(differences[0] + more)
        self.differences = differences


@dataclass(slots=True)
class _Operation:
    """A command in flight. ``number``: what its blocks hold after it."""

    opcode: IoOpcode
    lba: int
    blocks: int
    number: int
    buffer: Buffer | None
    ticket: Ticket = field(init=False)


class NvmeWorkload:
    """Keeps ``depth`` commands in flight on each I/O queue of an enabled driver, in a thread of its own.

    The queues are the workload's until :meth:`verify` has returned, so that it sees the end of every command.

    The ``blocks`` blocks from ``first`` on are the workload's; a command has up to ``most`` of them. ``seed``: another
    one, other commands. :meth:`pause` leaves commands in flight: a migration takes them along.
    """

    def __init__(
        self,
        driver: NvmeDriver,
        nsid: int = 1,
        *,
        first: int = 0,
        blocks: int = 2048,
        depth: int = 8,
        most: int = 24,
        seed: int = 0,
        weights: Mapping[IoOpcode, int] = WEIGHTS,
    ) -> None:
        self.driver = driver
        self.nsid = nsid
        self.done = 0
        """Commands that ended so far."""
        self.number = 0
        """Writes so far, those in flight included."""
        self._first, self._most, self._depth = first, most, depth
        self._holds = [UNKNOWN] * blocks
        self._busy = bytearray(blocks)
        self._flying: dict[Ticket, _Operation] = {}
        self._random = random.Random(seed)
        self._size = driver.namespace(nsid).block_size
        controller = driver.identify_controller()
        self._sgl = bool(controller.sgls & _SGL_SUPPORTED)
        possible = {
            code: weight
            for code, weight in weights.items()
            if code not in _OPTIONAL or controller.oncs >> _OPTIONAL[code] & 1
        }
        self._codes, self._weights = list(possible), list(possible.values())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # Its thread

    def start(self) -> None:
        """Work from now on, or again."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, name="nvme workload", daemon=True)
        self._thread.start()

    resume = start

    def pause(self) -> None:
        """Work no longer; commands stay in flight. Raises what went wrong so far."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(self.driver.timeout)
            if thread.is_alive():
                raise CallTimeoutError("the workload does not pause")
        self._raise()

    @property
    def running(self) -> bool:
        """Whether its thread works."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, done: int) -> None:
        """Wait until so many commands have ended in all. Raises what went wrong, NvmeTimeoutError if nothing moves."""
        deadline = time.monotonic() + self.driver.timeout
        while self.done < done:
            if not self.running:
                self.pause()  # which raises what it died of
                raise NvmeTimeoutError(f"{self.done} of {done} commands ended, and the workload is paused")
            if time.monotonic() > deadline:
                raise NvmeTimeoutError(f"{self.done} of {done} commands ended in {self.driver.timeout} s")
            time.sleep(_WAIT)

    @property
    def in_flight(self) -> int:
        """Commands that have not ended, or were not seen to."""
        return len(self._flying)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self.step()
        except BaseException as error:
            self._error = error

    # What it does

    def step(self) -> None:
        """Have ``depth`` commands in flight on each queue, and look after those that ended."""
        pairs = self.driver.queues
        for pair in pairs:
            self._fill(pair)
        if not sum(self._reap(pair) for pair in pairs):
            self._random.choice(pairs).wait(_WAIT)

    def run(self, commands: int) -> None:
        """Work here, until so many more commands have ended."""
        until = self.done + commands
        while self.done < until:
            self.step()

    def settle(self) -> None:
        """Wait until nothing is in flight. Raises NvmeTimeoutError for commands that were lost."""
        deadline = time.monotonic() + self.driver.timeout
        while self._flying:
            if sum(map(self._reap, self.driver.queues)):
                continue
            lost = next(iter(self._flying))
            if time.monotonic() > deadline:
                state = controller_state(self.driver.hardware)
                raise NvmeTimeoutError(f"{len(self._flying)} commands did not end, {lost} among them; {state}")
            lost.pair.wait(_WAIT)

    def _fill(self, pair: QueuePair) -> None:
        prepared = [
            operation
            for _ in range(min(self._depth - len(pair.outstanding), pair.sq.room))
            if (operation := self._choose()) is not None
        ]
        self._send(pair, prepared)

    def _send(self, pair: QueuePair, operations: Sequence[_Operation]) -> None:
        tickets = pair.submit_many(map(self._command, operations))
        for operation, ticket in zip(operations, tickets, strict=True):
            operation.ticket = ticket
            self._flying[ticket] = operation

    def _choose(self) -> _Operation | None:
        """A command on blocks that no other touches; None: there was none just now."""
        opcode = self._random.choices(self._codes, self._weights)[0]
        if opcode == IoOpcode.FLUSH:
            return _Operation(opcode, 0, 0, 0, None)
        blocks = self._random.randint(1, self._most)
        lba = self._random.randint(0, len(self._holds) - blocks)
        if self._busy.find(1, lba, lba + blocks) >= 0:
            return None
        if opcode == IoOpcode.COMPARE and UNKNOWN in self._holds[lba : lba + blocks]:
            opcode = IoOpcode.WRITE
        self._busy[lba : lba + blocks] = b"\1" * blocks
        number = ZEROS
        if opcode == IoOpcode.WRITE:
            number = self.number = self.number + 1
        buffer = self._buffer(blocks * self._size) if opcode in _WITH_DATA else None
        operation = _Operation(opcode, lba, blocks, number, buffer)
        if buffer is not None and opcode != IoOpcode.READ:
            expected = [number] * blocks if opcode == IoOpcode.WRITE else self._holds[lba : lba + blocks]
            buffer.write(self._content(lba, expected))
        return operation

    def _buffer(self, length: int) -> Buffer:
        """Of any shape that the controller understands."""
        pick = self._random
        if self._sgl and pick.random() < 0.3:
            return self.driver.buffers.sgl(self._split(length), per_segment=pick.choice([3, 256]))
        return self.driver.buffers.prp(
            length,
            offset=pick.choice([0, 4 * pick.randrange(1024)]),
            scattered=pick.random() < 0.7,
            list_offset=pick.choice([0, 8 * pick.randrange(512)]),
        )

    def _split(self, length: int) -> list[int]:
        """Into up to four pieces, at multiples of 4."""
        cuts = sorted({4 * self._random.randrange(1, length // 4) for _ in range(self._random.randrange(4))})
        return [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]

    def _command(self, operation: _Operation) -> Command:
        if operation.opcode == IoOpcode.FLUSH:
            return Command(IoOpcode.FLUSH, self.nsid)
        fua = FORCE_UNIT_ACCESS if operation.opcode == IoOpcode.WRITE and not operation.number % 16 else 0
        lba = self._first + operation.lba
        return io(operation.opcode, self.nsid, lba, operation.blocks, operation.buffer, fua)

    def _content(self, lba: int, numbers: Sequence[int]) -> bytes:
        return b"".join(content(self._first + at, number, self._size) for at, number in enumerate(numbers, start=lba))

    # How it ends

    def _reap(self, pair: QueuePair) -> int:
        ended = pair.reap()
        for ticket in ended:
            operation = self._flying.pop(ticket)
            if ticket.completion is not None and ticket.completion.interrupted:
                self._send(pair, [operation])  # as any host does
            else:
                self._ended(operation)
        return len(ended)

    def _ended(self, operation: _Operation) -> None:
        assert operation.ticket.completion is not None
        lba, end = operation.lba, operation.lba + operation.blocks
        try:
            operation.ticket.completion.check(f"{operation.ticket} at LBA {self._first + lba}")
            if operation.opcode == IoOpcode.READ:
                assert operation.buffer is not None
                if differences := list(self._differences(lba, operation.buffer.read())):
                    raise WrongDataError(differences)
            if operation.opcode in (IoOpcode.WRITE, IoOpcode.WRITE_ZEROES):
                self._holds[lba:end] = [operation.number] * operation.blocks
        finally:
            self._busy[lba:end] = bytes(operation.blocks)
            if operation.buffer is not None:
                operation.buffer.release()
            self.done += 1

    # What must be

    def verify(self) -> list[str]:
        """Come to rest, and read all blocks by the controller: a sentence for each that differs.

        Raises what went wrong before, and NvmeTimeoutError for commands that never ended.
        """
        self.pause()
        self.settle()
        data = self.driver.read(self.nsid, self._first, len(self._holds))
        return list(self._differences(0, data))

    def verify_image(self, image: bytes | memoryview) -> list[str]:
        """The same for what the disk's image holds, after :meth:`verify` (and a flush, if it is to be durable)."""
        start = self._first * self._size
        return list(self._differences(0, image[start : start + len(self._holds) * self._size]))

    def _differences(self, lba: int, data: bytes | memoryview) -> Iterator[str]:
        for at in range(len(data) // self._size):
            number = self._holds[lba + at]
            block = data[at * self._size : (at + 1) * self._size]
            if number != UNKNOWN and block != content(self._first + lba + at, number, self._size):
                found = _WORD.unpack_from(block)
                yield f"block {self._first + lba + at} is (block, write) {found}, must be of write {number}"
