"""Submission and completion queues in guest memory. Source: NVM Express Base Specification 1.4, section 4.1."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vfio_user.devices.nvme.constants import CQE_SIZE, DOORBELLS, SQE_SIZE, ControllerStatus, Register
from vfio_user.testing.nvme.access import Hardware
from vfio_user.testing.nvme.commands import (
    COMPLETION,
    Command,
    Completion,
    NvmeProtocolError,
    NvmeTimeoutError,
)

_U32 = struct.Struct("<I")
_LIKELY = 16
"""Completions that are looked at in one go."""
_QUIET = 0.0005
"""Seconds until a queue without interrupts is looked at again."""
_IDENTIFIERS = 0xFFFF  # FFFFh is left out: some controllers keep it for themselves

Condition = Callable[[], bool]


class Ring:
    """``size`` entries in guest memory, in pages that need not follow each other."""

    def __init__(self, hardware: Hardware, pages: Sequence[int], page_size: int, entry: int, size: int) -> None:
        self.hardware = hardware
        self.pages = pages
        self.size = size
        self.entry = entry
        self._per_page = page_size // entry
        self._contiguous = all(page == pages[0] + number * page_size for number, page in enumerate(pages))

    def address(self, index: int) -> int:
        """Where an entry is."""
        page, within = divmod(index, self._per_page)
        return self.pages[page] + within * self.entry

    def spans(self, index: int, count: int) -> Iterator[tuple[int, int]]:
        """The address of, and the entries in, each piece of memory that ``count`` entries from ``index`` on are in."""
        while count:
            border = self.size if self._contiguous else (index // self._per_page + 1) * self._per_page
            here = min(count, border - index, self.size - index)
            yield self.address(index), here
            index, count = (index + here) % self.size, count - here


class Doorbell:
    """A doorbell, with its shadow in guest memory once there is one (section 7.13): as Linux rings it.

    ``offset``: from the first doorbell, in bytes.
    """

    def __init__(self, hardware: Hardware, offset: int) -> None:
        self._hardware = hardware
        self.offset = offset
        self._value = 0
        self._shadow: tuple[int, int] | None = None
        self.rung = 0
        """Register writes so far."""

    def prepare_shadow(self, shadow: int, event: int) -> None:
        """Write the value to address ``shadow``, and that the next ring, whatever it is, is waited for to ``event``
        (EventIdx): before the controller looks there.
        """
        for address in (shadow, event):
            self._hardware.memory.write(address, _U32.pack(self._value))

    def use_shadow(self, shadow: int, event: int) -> None:
        """From now on the value goes to ``shadow``, and to the register only as the controller says at ``event``."""
        self._shadow = shadow, event

    def ring(self, value: int) -> None:
        old, self._value = self._value, value
        if self._shadow is not None and not self._asked_for(old, value, *self._shadow):
            return
        self.rung += 1
        self._hardware.registers.ring(DOORBELLS + self.offset, value)

    def _asked_for(self, old: int, new: int, shadow: int, event: int) -> bool:
        """Whether the controller waits for a value from behind ``old`` up to ``new``."""
        memory = self._hardware.memory
        memory.write(shadow, _U32.pack(new))
        (index,) = _U32.unpack(memory.read(event, 4))
        return bool(new - index - 1 & 0xFFFF < new - old & 0xFFFF)


class SubmissionQueue:
    """Entries for the controller. ``head`` is where it was when it last said so, in a completion."""

    def __init__(self, identifier: int, ring: Ring, doorbell: Doorbell) -> None:
        self.identifier = identifier
        self.ring = ring
        self.doorbell = doorbell
        self.tail = 0
        self.head = 0

    @property
    def size(self) -> int:
        return self.ring.size

    @property
    def room(self) -> int:
        """How many entries can be added; a full queue has one that is empty."""
        return (self.head - self.tail - 1) % self.size

    def push(self, entries: bytes) -> None:
        """Add whole entries, 64 bytes each; the controller learns of them by :meth:`ring_doorbell`.

        Raises ValueError where there is no room.
        """
        count = len(entries) // SQE_SIZE
        if count > self.room:
            raise ValueError(f"{count} commands, and room for {self.room}")
        done = 0
        for address, here in self.ring.spans(self.tail, count):
            self.ring.hardware.memory.write(address, entries[done : done + here * SQE_SIZE])
            done += here * SQE_SIZE
        self.tail = (self.tail + count) % self.size

    def ring_doorbell(self) -> None:
        self.doorbell.ring(self.tail)


class CompletionQueue:
    """Entries of the controller. ``vector``: its interrupt, or None if it has none."""

    def __init__(self, identifier: int, ring: Ring, doorbell: Doorbell, vector: int | None) -> None:
        self.identifier = identifier
        self.ring = ring
        self.doorbell = doorbell
        self.vector = vector
        self.head = 0
        self.phase = 1

    @property
    def size(self) -> int:
        return self.ring.size

    def take(self) -> list[Completion]:
        """All that is new, oldest first; the controller may use its place again after :meth:`ring_doorbell`."""
        taken: list[Completion] = []
        while len(taken) < self.size:
            asked = min(_LIKELY, self.size - self.head)
            data = b"".join(
                self.ring.hardware.memory.read(address, here * CQE_SIZE)
                for address, here in self.ring.spans(self.head, asked)
            )
            new = list(self._new(data))
            taken += new
            if len(new) < asked:
                break
        return taken

    def _new(self, data: bytes) -> Iterator[Completion]:
        for entry in COMPLETION.iter_unpack(data):
            if entry[5] & 1 != self.phase:
                return
            self.head += 1
            if self.head == self.size:
                self.head = 0
                self.phase ^= 1
            yield Completion(*entry)

    def ring_doorbell(self) -> None:
        self.doorbell.ring(self.head)


@dataclass(slots=True, eq=False)
class Ticket:
    """A command that was submitted. ``completion`` is there as soon as it was seen."""

    pair: QueuePair
    command_id: int
    what: str
    completion: Completion | None = None

    @property
    def done(self) -> bool:
        return self.completion is not None

    def __str__(self) -> str:
        return f"{self.what} (queue {self.pair.sq.identifier}, command {self.command_id})"


@dataclass(slots=True, eq=False)
class CompletionSide:
    """A completion queue, and the tickets of every submission queue whose commands end there."""

    queue: CompletionQueue
    pairs: dict[int, QueuePair] = field(default_factory=dict)
    """By identifier of the submission queue."""


class QueuePair:
    """A submission queue and the completion queue that its commands end in, which may be that of others, too."""

    def __init__(self, hardware: Hardware, sq: SubmissionQueue, side: CompletionSide, timeout: float) -> None:
        self.hardware = hardware
        self.sq = sq
        self.side = side
        self.timeout = timeout
        self.outstanding: dict[int, Ticket] = {}
        """By command identifier, what the controller has not ended."""
        self._next = 0
        side.pairs[sq.identifier] = self

    @property
    def cq(self) -> CompletionQueue:
        return self.side.queue

    def submit(self, command: Command, what: str | None = None) -> Ticket:
        """Hand one command to the controller. Waits while the queue is full."""
        return self.submit_many([command], what)[0]

    def submit_many(self, commands: Iterable[Command], what: str | None = None) -> list[Ticket]:
        """Hand commands to the controller, with one write to the doorbell if they fit into the queue."""
        tickets: list[Ticket] = []
        entries = bytearray()
        for command in commands:
            if len(entries) // SQE_SIZE >= self.sq.room:
                self._push(entries)
                self.reap_until(lambda: self.sq.room > 0, "room in the queue")
            ticket = Ticket(self, self._identifier(), what or command.name(admin=self.sq.identifier == 0))
            self.outstanding[ticket.command_id] = ticket
            entries += command.pack(ticket.command_id)
            tickets.append(ticket)
        self._push(entries)
        return tickets

    def _push(self, entries: bytearray) -> None:
        if entries:
            self.sq.push(bytes(entries))
            self.sq.ring_doorbell()
            entries.clear()

    def _identifier(self) -> int:
        if len(self.outstanding) >= _IDENTIFIERS:
            raise ValueError("every command identifier is in use")
        while self._next in self.outstanding:
            self._next = (self._next + 1) % _IDENTIFIERS
        identifier, self._next = self._next, (self._next + 1) % _IDENTIFIERS
        return identifier

    def reap(self) -> list[Ticket]:
        """Take what the controller has ended, of this and of all other submission queues of the completion queue.

        Raises NvmeProtocolError for the end of a command that had ended, or never was.
        """
        completions = self.cq.take()
        if not completions:
            return []
        ended = [self._ended(completion) for completion in completions]
        self.cq.ring_doorbell()
        return ended

    def _ended(self, completion: Completion) -> Ticket:
        pair = self.side.pairs.get(completion.sq_id)
        ticket = pair.outstanding.pop(completion.command_id, None) if pair is not None else None
        if pair is None or ticket is None:
            raise NvmeProtocolError(
                f"completion queue {self.cq.identifier} ends command {completion.command_id} of queue "
                f"{completion.sq_id}, which is not in flight: {completion.status}"
            )
        if not completion.sq_head < pair.sq.size:
            raise NvmeProtocolError(f"{ticket}: the queue's head at {completion.sq_head} of {pair.sq.size}")
        pair.sq.head = completion.sq_head
        ticket.completion = completion
        return ticket

    def complete(self, ticket: Ticket, timeout: float | None = None) -> Completion:
        """Wait for the end of a command; how it ended. Raises NvmeTimeoutError after ``timeout`` seconds."""
        self.reap_until(lambda: ticket.done, str(ticket), timeout)
        assert ticket.completion is not None
        return ticket.completion

    def drain(self, timeout: float | None = None) -> None:
        """Wait until the controller has ended every command of this queue."""
        self.reap_until(lambda: not self.outstanding, f"{len(self.outstanding)} commands in flight", timeout)

    def reap_until(self, condition: Condition, what: str, timeout: float | None = None) -> None:
        """Reap until ``condition`` holds. Raises NvmeTimeoutError, with the controller's state, after ``timeout``."""
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        while not condition():
            if self.reap():
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise NvmeTimeoutError(f"{what}: not within {seconds} s; {controller_state(self.hardware)}")
            self.wait(left)

    def wait(self, seconds: float) -> None:
        """Let time pass until the completion queue may have something new, at most ``seconds``."""
        vector = self.cq.vector
        self.hardware.interrupts.wait(vector or 0, seconds if vector is not None else min(seconds, _QUIET))


def controller_state(hardware: Hardware) -> str:
    """What CSTS says, in words."""
    status = ControllerStatus(hardware.registers.read32(Register.CSTS) & sum(ControllerStatus))
    return f"CSTS {int(status):#x} ({status.name or 'not ready'})"
