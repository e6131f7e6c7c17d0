"""What has a controller stand still though it is enabled: reasons, and what follows when they come and go."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from enum import Flag, auto

from vfio_user.devices.nvme.constants import CQE_SIZE, SQE_SIZE
from vfio_user.devices.nvme.doorbells import BUFFER
from vfio_user.devices.nvme.execution import Executor
from vfio_user.devices.nvme.queues import Ring
from vfio_user.devices.nvme.workers import Work
from vfio_user.dma.memory import GuestMemory

logger = logging.getLogger("vfio_user.devices.nvme")

QUIESCE_TIMEOUT = 20.0
"""Seconds that the storage may take for what is under way when all must stand still."""
BUS_MASTER_TIMEOUT = 1.0
"""Seconds that it may take where the host waits for it with a write to config space: less than a VMM's patience."""

Spans = Iterable[tuple[int, int]]
"""(address, size) in bytes, in the guest's memory."""


class Halt(Flag):
    """Why nothing new is begun."""

    MIGRATION = auto()
    """The device is stopped."""
    QUIESCE = auto()
    """Somebody waits for what is under way."""
    BUS_MASTER = auto()
    """The host does not allow it DMA, by the PCI command register, or has it sleep."""
    MEMORY = auto()
    """Some of the queues' memory was taken away: until all of it is back, or the host rings."""
    CLIENT = auto()
    """The client left. The next one may be another guest's, with other memory in the same place: until it rings."""


_HOST_RINGS = Halt.MEMORY | Halt.CLIENT
"""What is over when the host rings: it knows of the queues, and where they are."""
_WITHHOLDING = Halt.BUS_MASTER | _HOST_RINGS
"""Where nothing is completed, as that is DMA: it is not allowed, it would miss, or hit somebody else."""


class Standstill:
    """Holds an executor as long as there is a reason to. ``go_on`` is called when the last one is gone.

    What is under way ends all the same; it is completed if that can be, else when it can be again.
    """

    def __init__(self, executor: Executor, memory: GuestMemory, go_on: Callable[[], None]) -> None:
        self._executor = executor
        self._memory = memory
        self._go_on = go_on
        self._reasons = Halt(0)

    def halt(self, reason: Halt) -> None:
        """Begin nothing new."""
        self._reasons |= reason
        self._follow()

    def resume(self, reasons: Halt) -> None:
        """Those are no reasons any more."""
        before, self._reasons = self._reasons, self._reasons & ~reasons
        self._follow()
        if before and not self._reasons:
            self._go_on()

    def _follow(self) -> None:
        self._executor.held = bool(self._reasons)
        self._executor.withheld = bool(self._reasons & _WITHHOLDING)

    def host_rings(self) -> None:
        """The host knows where its queues are, whatever came in between; or it begins anew, with others."""
        self.resume(_HOST_RINGS)

    # What is under way

    def quiesce(self, *, moving: bool) -> None:
        """Let what is at the guest's memory end, or, without ``moving``, all that is under way; what waits is carried
        out afterwards. Raises OSError(ETIMEDOUT).
        """
        if self._executor.idle():
            return
        self.halt(Halt.QUIESCE)
        try:
            self._executor.quiesce(QUIESCE_TIMEOUT, moving=moving)
        finally:
            self.resume(Halt.QUIESCE)

    def end_all(self) -> None:
        """Wait for what is under way and complete it, what was withheld, too: none of it travels. To be called while
        there is a reason to stand still. Raises OSError: ETIMEDOUT; EBUSY where there is no memory to complete it in.
        """
        self._executor.withheld = bool(self._reasons & _HOST_RINGS)
        try:
            self._executor.quiesce(QUIESCE_TIMEOUT)
        finally:
            self._follow()
        if self._executor.kept:
            raise OSError(errno.EBUSY, f"{self._executor.kept} commands cannot be completed: their queues are nowhere")

    def have_done(self, work: Work, *, undo: Work | None = None) -> None:
        """Have a worker do ``work`` while all stands still: a storage that hangs does not have the server hang. If it
        succeeds when nobody waits for it any more, the worker does ``undo``.

        Raises what it raises, and OSError(ETIMEDOUT).
        """
        errors: list[BaseException | None] = []
        waiting, deciding = True, threading.Lock()

        def worked() -> int:
            result = work()
            with deciding:
                return result if waiting or undo is None else undo()

        self._executor.quiesce(QUIESCE_TIMEOUT)  # such work of before, which is not undone yet
        self._executor.workers.start(worked, lambda result, error: errors.append(error))
        try:
            self._executor.quiesce(QUIESCE_TIMEOUT)
        finally:
            with deciding:
                waiting = False
        for error in filter(None, errors):
            raise error

    # The bus master bit

    def follow_bus_master(self, allowed: bool) -> None:
        """The host allows DMA, or does not."""
        if allowed:
            self.resume(Halt.BUS_MASTER)
        elif not self._reasons & Halt.BUS_MASTER:
            self._end_dma()

    def _end_dma(self) -> None:
        """The host allows no DMA any more, or put the device to sleep. What is under way is completed when DMA is
        allowed again: where it goes by messages, a client that waits for its write may not answer them. Workers are
        done with moving data before its write is, if they can be.
        """
        self.halt(Halt.BUS_MASTER)
        if not self._executor.submissions:
            return
        try:
            self._executor.workers.wait(BUS_MASTER_TIMEOUT, moving=True)
        except OSError as error:
            logger.warning("DMA goes on without the bus master bit: %s", error)

    # The memory of the queues

    def mapped(self) -> None:
        """The guest has more memory than before."""
        if self._reasons & Halt.MEMORY:
            self.look_for_memory()

    def unmapped(self, address: int, size: int) -> None:
        """The guest's memory there is gone."""
        if not self._reasons & Halt.MEMORY and _overlaps(_queue_memory(self._executor), address, size):
            self.halt(Halt.MEMORY)

    def look_for_memory(self) -> None:
        """The queues may be others than before."""
        there = _is_mapped(self._memory, _queue_memory(self._executor))
        (self.resume if there else self.halt)(Halt.MEMORY)


def _queue_memory(executor: Executor) -> Iterator[tuple[int, int]]:
    """Where the queues of a controller are, and the buffers that mirror their doorbells."""
    for entry_size, queues in ((SQE_SIZE, executor.submissions), (CQE_SIZE, executor.completions)):
        for queue in queues.values():
            yield from _pieces(queue.ring, entry_size)
    if executor.doorbells is not None:
        yield executor.doorbells.shadow, BUFFER
        yield executor.doorbells.events, BUFFER


def _pieces(ring: Ring, entry_size: int) -> Iterator[tuple[int, int]]:
    for number, address in enumerate(ring.pieces):
        yield address, entry_size * min(ring.per_piece, ring.size - number * ring.per_piece)


def _overlaps(spans: Spans, address: int, size: int) -> bool:
    """Whether there are bytes of ``spans`` among ``size`` from ``address`` on."""
    return any(start < address + size and address < start + length for start, length in spans)


def _is_mapped(memory: GuestMemory, spans: Spans) -> bool:
    """Whether all of it is somewhere, in whatever way it can be reached."""
    return all(_is_there(memory, address, size) for address, size in spans)


def _is_there(memory: GuestMemory, address: int, size: int) -> bool:
    try:
        with memory.view(address, size):
            return True
    except OSError as error:
        return error.errno != errno.EFAULT
