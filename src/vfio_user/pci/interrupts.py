"""A device's interrupts, and what the client's SET_IRQS does to them.

One rule carries everything: a trigger first becomes *pending*, then leaves as one count of the vector's
eventfd as soon as there is one and nothing holds it back. So none is ever lost: not between two assignments
of eventfds, not while masked, not while no client is there, not while a migration has the device stopped.

Sources: ``linux/vfio.h`` (VFIO_DEVICE_SET_IRQS), PCI Local Bus specification 3.0, sections 2.2.6 and 6.8.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import pairwise
from typing import Final, TypedDict

from vfio_user.fds import OwnedFd, is_eventfd, signal_eventfd
from vfio_user.pci.msi import MAX_MSI_VECTORS, MAX_MSIX_VECTORS

INTX, MSI, MSIX, ERR, REQ = range(5)
"""The interrupt indexes of a PCI device (VFIO_PCI_*_IRQ_INDEX)."""

_NAMES = ("INTX", "MSI", "MSIX", "ERR", "REQ")
_LIMITS = (1, MAX_MSI_VECTORS, MAX_MSIX_VECTORS, 1, 1)

DATA_NONE, DATA_EVENTFD = 1, 4
ACTION_MASK, ACTION_UNMASK, ACTION_TRIGGER = 8, 16, 32
"""Flags of SET_IRQS (VFIO_IRQ_SET_*) that arrive here; the server turns DATA_BOOL into runs of DATA_NONE."""

_DATA_BITS = 7

OnWatch = Callable[[OwnedFd | None, int, int, int], None]
"""Called with (eventfd, index, vector, action): watch it from now on for the action; None: watch none."""


class InterruptState(TypedDict):
    """What a migration carries: the level of INTx, and the vectors of each index that are pending."""

    asserted: bool
    pending: list[list[int]]


class Interrupts:
    """The interrupts of a PCI function. ``counts``: vectors of INTX, MSI, MSIX, ERR and REQ.

    A client that wants eventfds to mask and unmask needs ``on_watch``: whoever owns the event loop watches
    them and answers a signalled one with ``set_irqs(index, action | DATA_NONE, vector, 1, ())``. Without it,
    such a request is refused. ``on_level`` hears of every change of INTx's level.

    Not thread-safe: a worker of the device hands its triggers to the thread that serves the client.

    Raises ValueError for counts beyond what PCI has.
    """

    def __init__(
        self,
        counts: Sequence[int],
        on_watch: OnWatch | None = None,
        on_level: Callable[[bool], None] | None = None,
    ) -> None:
        if len(counts) != len(_NAMES):
            raise ValueError(f"{len(counts)} interrupt counts: one each for {', '.join(_NAMES)}")
        for name, count, limit in zip(_NAMES, counts, _LIMITS, strict=True):
            if not 0 <= count <= limit:
                raise ValueError(f"{count} {name} vectors: 0 to {limit} are possible")
        self.counts: Final = tuple(counts)
        self._intx = _IntxLine(counts[INTX])
        self._lines = (self._intx, *(_Vectors(count) for count in counts[MSI:]))
        self._vectors = max(counts[INTX], counts[MSI], counts[MSIX])
        self._messages = next((index for index in (MSIX, MSI) if counts[index]), INTX)
        self._listened = self._find_listened()
        self._on_watch = on_watch
        self._on_level = on_level
        self._watched: dict[tuple[int, int, int], OwnedFd] = {}
        self._operations = {
            ACTION_TRIGGER | DATA_NONE: self._loop_back,
            ACTION_TRIGGER | DATA_EVENTFD: self._assign,
            ACTION_MASK | DATA_NONE: self._mask,
            ACTION_UNMASK | DATA_NONE: self._unmask,
        }

    # The device's side.

    def trigger(self, vector: int = 0) -> None:
        """Send one interrupt the way that the client listens for it.

        That is MSI-X if any of its vectors has an eventfd, else MSI (a guest may enable fewer than the device
        has: a vector beyond those shares one, as PCI has it), else a pulse of INTx. If nothing is assigned it waits
        in MSI-X, or what the device has instead. Raises ValueError for a vector that the device does not have.
        """
        if not 0 <= vector < self._vectors:
            raise ValueError(
                f"vector {vector}: the device has {self._vectors}: declare msix_vectors, msi_vectors or intx"
            )
        line, vectors = self._listened
        line.fire(vector % vectors)

    def _find_listened(self) -> tuple[_Vectors, int]:
        """Where interrupts go, and how many vectors there are."""
        index = next((i for i in (MSIX, MSI, INTX) if self._lines[i].eventfds), self._messages)
        enabled = max(self._lines[index].eventfds, default=-1) + 1 if index == MSI else 0
        return self._lines[index], enabled or self.counts[index]

    @property
    def message_signalled(self) -> bool:
        """Whether the client listens for MSI or MSI-X: then INTx is not what a device raises."""
        return bool(self._lines[MSI].eventfds or self._lines[MSIX].eventfds)

    def fire(self, index: int, vector: int = 0) -> None:
        """Send one interrupt of this very index, ERR for example. Raises ValueError if there is none."""
        if not 0 <= vector < self.counts[index]:
            raise ValueError(f"{_NAMES[index]} vector {vector}: the device has {self.counts[index]}")
        self._lines[index].fire(vector)

    def assert_(self) -> None:
        """Raise the level of INTx, while its cause stands. Raises ValueError on a device without INTx."""
        if not self.counts[INTX]:
            raise ValueError("the device has no INTx: declare intx = True")
        if not self._intx.asserted:
            self._set_level(True)
        self._intx.deliver(0)

    def deassert(self) -> None:
        """Lower the level of INTx: the cause is gone."""
        self._set_level(False)

    def _set_level(self, asserted: bool) -> None:
        self._intx.asserted, self._intx.in_service = asserted, False
        if self._on_level is not None:
            self._on_level(asserted)

    @property
    def asserted(self) -> bool:
        """The level of INTx, which PCI status bit 3 shows."""
        return self._intx.asserted

    def hold(self, held: Mapping[int, int]) -> None:
        """What the guest holds back by the function's own registers: by index, bit n for vector n; missing: nothing.

        That is bit 10 of the command register (INTX), the mask of MSI, the function mask of MSI-X. What waited and is
        held no more is delivered.
        """
        self._set_held(held)
        for line in self._lines:
            line.deliver_all()

    def _set_held(self, held: Mapping[int, int]) -> None:
        for index, line in enumerate(self._lines):
            line.held = held.get(index, 0)

    def pba(self, index: int = MSIX) -> bytes:
        """The vectors of an index that wait for delivery: bit n for vector n, in whole 64-bit words."""
        bits = sum(1 << vector for vector in self._lines[index].waiting())
        return bits.to_bytes((self.counts[index] + 63) // 64 * 8, "little")

    def stop(self) -> None:
        """The device stands still: whatever device, client or registers do from now on, nothing leaves."""
        for line in self._lines:
            line.stopped = True

    def run(self) -> None:
        """It works again: what waits leaves, and a level that was asserted is not assumed to have arrived before."""
        self._intx.in_service = False
        for line in self._lines:
            line.stopped = False
            line.deliver_all()

    def reset(self) -> None:
        """A device reset: nothing asserted, nothing pending. Eventfds and masks are the client's and stay.

        What was stopped stays so: a guest may reset its function while a migration is under way.
        """
        self._set_level(False)
        for line in self._lines:
            line.pending.clear()

    def release_fds(self) -> None:
        """The client left: close its eventfds, forget its masks; what is asserted or pending awaits the next."""
        for index, line in enumerate(self._lines):
            self._release(index, range(line.count))

    def save(self) -> InterruptState:
        """What a migration carries. Eventfds, masks and what they hold back belong to the connection."""
        return {"asserted": self._intx.asserted, "pending": [sorted(line.pending) for line in self._lines]}

    def load(self, state: object, held: Mapping[int, int]) -> None:
        """Take over what :meth:`save` gave, and what the registers that came with it :meth:`hold`.

        Nothing is fired before :meth:`run`.

        Raises ValueError, with nothing changed, for anything else.
        """
        if not isinstance(state, Mapping) or state.keys() != InterruptState.__annotations__.keys():
            raise ValueError(f"interrupt state has the keys {', '.join(InterruptState.__annotations__)} only")
        asserted = state["asserted"]
        if not isinstance(asserted, bool) or (asserted and not self.counts[INTX]):
            raise ValueError("interrupt state: asserted is a bool, and False without INTx")
        lists = state["pending"]
        if not isinstance(lists, list) or len(lists) != len(_NAMES):
            raise ValueError(f"interrupt state: pending is a list of {len(_NAMES)} lists")
        pending = [
            _load_set(f"pending {name}", vectors, count)
            for name, vectors, count in zip(_NAMES, lists, self.counts, strict=True)
        ]
        for line, vectors in zip(self._lines, pending, strict=True):
            line.pending = vectors
        self._set_held(held)
        self._set_level(asserted)

    # The client's side.

    def set_irqs(self, index: int, flags: int, start: int, count: int, fds: Sequence[OwnedFd]) -> None:
        """Do what a checked SET_IRQS asks for ``count`` vectors from ``start``.

        ``flags`` is one ACTION with DATA_NONE or DATA_EVENTFD. With DATA_EVENTFD come ``count`` fds, or none
        to take the eventfds away; those given are taken out of their owners. TRIGGER with DATA_NONE and count
        0 disables the whole index.

        A vector that loses its eventfd starts over unmasked, as in the kernel's vfio-pci.

        Raises OSError: EINVAL for a vector that is not there, for other flags or an fd that is no eventfd;
        ENOTSUP for a mask or unmask eventfd that nobody would watch. Nothing is done then.
        """
        if not 0 <= index < len(self._lines) or start < 0 or not 0 <= count <= self.counts[index] - start:
            raise OSError(errno.EINVAL, f"no {count} vectors from {start} at interrupt index {index}")
        if fds and (len(fds) != count or not all(is_eventfd(fd.fileno()) for fd in fds)):
            raise OSError(errno.EINVAL, f"{len(fds)} fds for {count} vectors: one eventfd each")
        vectors = range(start, start + count)
        if operation := self._operations.get(flags):
            operation(index, vectors, fds)
        elif flags in (ACTION_MASK | DATA_EVENTFD, ACTION_UNMASK | DATA_EVENTFD):
            self._watch(index, vectors, fds, flags & ~_DATA_BITS)
        else:
            raise OSError(errno.EINVAL, f"SET_IRQS flags {flags:#x}: not one action with one kind of data")

    def _loop_back(self, index: int, vectors: range, fds: Sequence[OwnedFd]) -> None:
        if not vectors:
            self._release(index, range(self.counts[index]))
        for vector in vectors:
            self._lines[index].fire(vector)

    def _assign(self, index: int, vectors: range, fds: Sequence[OwnedFd]) -> None:
        if not fds:
            self._release(index, vectors)
        for vector, fd in zip(vectors, fds, strict=False):  # none, or one each
            self._lines[index].assign(vector, OwnedFd(fd.take()))
        self._listened = self._find_listened()

    def _mask(self, index: int, vectors: range, fds: Sequence[OwnedFd]) -> None:
        self._lines[index].masked.update(vectors)

    def _unmask(self, index: int, vectors: range, fds: Sequence[OwnedFd]) -> None:
        for vector in vectors:
            self._lines[index].unmask(vector)

    def _watch(self, index: int, vectors: range, fds: Sequence[OwnedFd], action: int) -> None:
        if fds and self._on_watch is None:
            raise OSError(errno.ENOTSUP, "eventfds that mask or unmask: nobody here watches them")
        for vector in vectors:
            self._unwatch(index, vector, action)
        for vector, fd in zip(vectors, fds, strict=False):
            self._watched[index, vector, action] = watched = OwnedFd(fd.take())
            self._tell(watched, index, vector, action)

    def _unwatch(self, index: int, vector: int, action: int) -> None:
        if fd := self._watched.pop((index, vector, action), None):
            self._tell(None, index, vector, action)
            fd.close()

    def _tell(self, fd: OwnedFd | None, index: int, vector: int, action: int) -> None:
        if self._on_watch is not None:
            self._on_watch(fd, index, vector, action)

    def _release(self, index: int, vectors: range) -> None:
        """Take away everything that the client gave these vectors or told them."""
        for vector in vectors:
            self._lines[index].release(vector)
            self._unwatch(index, vector, ACTION_MASK)
            self._unwatch(index, vector, ACTION_UNMASK)
        self._listened = self._find_listened()


class _Vectors:
    """The vectors of one index: eventfds, and which are pending, masked (by SET_IRQS) or held (by registers).

    Nothing leaves while the device is ``stopped``.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.eventfds: dict[int, OwnedFd] = {}
        self.masked: set[int] = set()
        self.held = 0
        self.stopped = False
        self.pending: set[int] = set()

    def fire(self, vector: int) -> None:
        self.pending.add(vector)
        self.deliver(vector)

    def deliver(self, vector: int) -> None:
        """Signal the eventfd of a pending vector, if nothing holds it back."""
        fd = self.eventfds.get(vector)
        if fd is not None and vector in self.pending and not self.held_back(vector):
            self.pending.discard(vector)
            _signal(fd.fileno())

    def held_back(self, vector: int) -> bool:
        return self.stopped or vector in self.masked or bool(self.held >> vector & 1)

    def deliver_all(self) -> None:
        for vector in sorted(self.waiting()):
            self.deliver(vector)

    def waiting(self) -> Set[int]:
        """The vectors that are triggered and not delivered."""
        return self.pending

    def assign(self, vector: int, fd: OwnedFd) -> None:
        if replaced := self.eventfds.get(vector):
            replaced.close()
        self.eventfds[vector] = fd
        self.deliver(vector)

    def unmask(self, vector: int) -> None:
        self.masked.discard(vector)
        self.deliver(vector)

    def release(self, vector: int) -> None:
        self.masked.discard(vector)
        if fd := self.eventfds.pop(vector, None):
            fd.close()


class _IntxLine(_Vectors):
    """The INTx pin: a level, and pulses (which are pending like a message until delivered).

    A level that was delivered is in service, and silent until the client's UNMASK, which is the end of the
    interrupt and lets it out again while it stands. A pulse, and a level that went down in between, are news: a
    client that sends no UNMASK hears of them too, and for one that does they are spurious at worst.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.asserted = False
        self.in_service = False

    def deliver(self, vector: int) -> None:
        fd = self.eventfds.get(vector)
        if fd is not None and self.waiting() and not self.held_back(vector):
            self.pending.clear()
            self.in_service = self.asserted
            _signal(fd.fileno())

    def waiting(self) -> Set[int]:
        return {0} if self.pending or (self.asserted and not self.in_service) else set()

    def assign(self, vector: int, fd: OwnedFd) -> None:
        self.in_service = False
        super().assign(vector, fd)

    def unmask(self, vector: int) -> None:
        self.in_service = False
        super().unmask(vector)

    def release(self, vector: int) -> None:
        self.in_service = False
        super().release(vector)


_FULL = (1 << 64) - 2
"""The largest count that an eventfd holds (eventfd(2))."""


def _signal(fd: int) -> None:
    """Signal an eventfd of the client's without waiting for the client.

    O_NONBLOCK is a flag of the open file, which the client shares: setting it would break a client that waits
    in a blocking read. So a blocking eventfd is written only if its counter has room. (A client that fills it
    in between stops its own device only: one client has one server.)
    """
    if os.get_blocking(fd) and _is_full(fd):
        return
    signal_eventfd(fd)


def _is_full(fd: int) -> bool:
    """Whether adding one to an eventfd's counter would wait. What is full is signalled already."""
    with OwnedFd(os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)) as info:
        _, _, count = os.read(info.fileno(), 4096).partition(b"eventfd-count:")
    return int(count.split(None, 1)[0], 16) >= _FULL


def _load_set(what: str, vectors: object, count: int) -> set[int]:
    if not isinstance(vectors, list) or not all(type(v) is int and 0 <= v < count for v in vectors):
        raise ValueError(f"interrupt state: {what} lists vectors below {count}")
    if any(a >= b for a, b in pairwise(vectors)):
        raise ValueError(f"interrupt state: {what} is not in order")
    return set(vectors)
