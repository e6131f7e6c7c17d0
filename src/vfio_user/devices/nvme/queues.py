"""Submission and completion queues: rings of entries in the guest's memory (4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from vfio_user.devices.nvme.command import ENTRY, Command, Entry
from vfio_user.devices.nvme.constants import CQE_SIZE
from vfio_user.devices.nvme.workers import Job
from vfio_user.dma.memory import GuestMemory

_COMPLETION = Struct("<IIHHHH")
"""A completion queue entry (4.6): result, reserved, SQ head, SQ identifier, command identifier, status with phase."""
assert _COMPLETION.size == CQE_SIZE


class Ring:
    """The memory of a queue: ``pieces`` are the addresses of its parts, each of which has ``per_piece`` entries."""

    def __init__(self, memory: GuestMemory, pieces: Sequence[int], per_piece: int, entry_size: int, size: int) -> None:
        self.pieces = tuple(pieces)
        self.per_piece = per_piece
        self.size = size
        """Entries."""
        self._memory = memory
        self._entry_size = entry_size
        self._windows: dict[int, memoryview] = {}

    def read(self, index: int, count: int) -> bytes:
        """At most ``count`` entries from ``index`` on: those that lie in one piece. Raises OSError."""
        piece, within = divmod(index, self.per_piece)
        count = min(count, self.border(index))
        start, length = within * self._entry_size, count * self._entry_size
        window = self._windows.get(piece) or self._window(piece, write=False)
        if window is None:
            return self._memory.read(self.pieces[piece] + start, length)
        return bytes(window[start : start + length])

    def border(self, index: int) -> int:
        """How many entries from ``index`` on lie in one piece."""
        return min(self.per_piece - index % self.per_piece, self.size - index)

    def write(self, index: int, entry: bytes) -> None:
        """Put an entry at ``index``, or several that lie in one piece: by one copy, so that the last byte of one is
        never seen before its first.
        """
        piece, within = divmod(index, self.per_piece)
        start = within * self._entry_size
        window = self._windows.get(piece) or self._window(piece, write=True)
        if window is None:
            self._memory.write(self.pieces[piece] + start, entry)
            return
        window[start : start + len(entry)] = entry
        if self._memory.log.active:
            self._memory.log.mark(self.pieces[piece] + start, len(entry))

    def forget_windows(self) -> None:
        """The guest's memory is laid out anew: what was looked up is not to be used any more."""
        self._windows.clear()

    def _window(self, piece: int, *, write: bool) -> memoryview | None:
        entries = min(self.per_piece, self.size - piece * self.per_piece)
        window = self._memory.window(self.pieces[piece], entries * self._entry_size, write)
        if window is not None:
            self._windows[piece] = window
        return window


class CompletionQueue:
    """Where completions go. ``vector`` is the interrupt's, if ``interrupts`` are enabled."""

    def __init__(self, number: int, ring: Ring, vector: int, interrupts: bool) -> None:
        self.number = number
        self.ring = ring
        self.vector = vector
        self.interrupts = interrupts
        self.head = self.tail = 0
        self.phase = 1
        self.promised = 0
        """Completions to come, of commands that were fetched: each has its place."""
        self.users = 0
        """Submission queues that complete to here."""
        self.alive = True

    @property
    def room(self) -> int:
        """Entries that can still be promised."""
        size = self.ring.size
        return size - 1 - (self.tail - self.head) % size - self.promised

    @property
    def pending(self) -> bool:
        """Whether there are completions that the guest has not taken."""
        return self.head != self.tail

    def take_head(self, head: int) -> bool:
        """The host took everything before ``head``. False, and nothing happens, where it cannot have."""
        size = self.ring.size
        if head >= size or (head - self.head) % size > (self.tail - self.head) % size:
            return False
        self.head = head
        return True

    def post(self, result: int, head: int, queue: int, cid: int, status: int) -> None:
        """Add an entry; ``status`` is the status field without the phase tag. Raises OSError where memory is gone."""
        index, phase = self.tail, self.phase
        # First: memory that is written by messages shows the entry, and the host rings, before the write has returned.
        self.tail += 1
        if self.tail == self.ring.size:
            self.tail = 0
            self.phase ^= 1
        self.ring.write(index, _COMPLETION.pack(result, 0, head, queue, cid, status << 1 | phase))

    def post_done(self, head: int, queue: int, cids: Sequence[int]) -> None:
        """As :meth:`post`, for commands that ended well and have no results, in as few writes as it takes."""
        while cids:
            index, phase = self.tail, self.phase
            count = min(len(cids), self.ring.border(index))
            entries = b"".join([_COMPLETION.pack(0, 0, head, queue, cid, phase) for cid in cids[:count]])
            self.tail += count
            if self.tail == self.ring.size:
                self.tail = 0
                self.phase ^= 1
            self.ring.write(index, entries)
            cids = cids[count:]


class SubmissionQueue:
    """Where commands come from."""

    def __init__(self, number: int, ring: Ring, completions: CompletionQueue, priority: int = 0) -> None:
        self.number = number
        self.ring = ring
        self.completions = completions
        self.priority = priority
        self.head = self.tail = 0
        self.busy: dict[int, Job] = {}
        """By command identifier, what is under way elsewhere."""
        self.alive = True

    @property
    def waiting(self) -> int:
        """Commands that were not fetched."""
        return (self.tail - self.head) % self.ring.size

    def take_tail(self, tail: int) -> bool:
        """The host added everything before ``tail``. False, and nothing happens, where it cannot have."""
        if tail >= self.ring.size:
            return False
        self.tail = tail
        return True

    def entry(self, ahead: int) -> Command:
        """The command ``ahead`` of the one at the head, as it is now. Raises OSError."""
        return Command._make(ENTRY.unpack(self.ring.read((self.head + ahead) % self.ring.size, 1)))

    def peek(self, count: int) -> list[Entry]:
        """At most ``count`` commands from the head on, as they are now; perhaps fewer than wait. Raises OSError."""
        return list(ENTRY.iter_unpack(self.ring.read(self.head, count)))
