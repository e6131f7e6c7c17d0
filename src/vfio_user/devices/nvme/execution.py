"""Commands on their way: fetched from the queues in turn, carried out here or by workers, completed."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from enum import Enum
from typing import Final, Protocol

from vfio_user.devices.nvme.command import FUSE_MASK, FUSED_FIRST, FUSED_SECOND, Command, CommandError, Entry
from vfio_user.devices.nvme.constants import STATUS_DO_NOT_RETRY, AsyncEvent, IoOpcode, Status
from vfio_user.devices.nvme.doorbells import DoorbellBuffers, head_of, tail_of
from vfio_user.devices.nvme.namespaces import Namespace
from vfio_user.devices.nvme.queues import CompletionQueue, SubmissionQueue
from vfio_user.devices.nvme.workers import Landed, Work, Workers

logger = logging.getLogger("vfio_user.devices.nvme")

MAX_BURST = 64
"""Commands of one queue before the others have their turn, and before interrupts are sent."""
FUSED = 2
"""Places for completions that two fused commands need: nothing needs more."""
MAX_SECONDS = 0.01
"""Before the client is served again: one with many queues, or with shadow doorbells, may never have nothing for us."""
MAX_JOBS = 256
"""Commands that workers have, or will have: further ones wait in their queues."""
MAX_PATIENCE = 2.0
"""Seconds that all wait for commands before those that no worker has begun are interrupted."""


class Later(Enum):
    """What a command's handler returns when it completes later."""

    LATER = 0


LATER: Final = Later.LATER
Handler = Callable[[SubmissionQueue, Command], int | Later]
"""Carries a command out: the result, dword 0 of the completion. Raises CommandError, or what the storage raises."""
Problems = tuple[BaseException | None, BaseException | None]
FusedHandler = Callable[[Command, Command], Callable[[], Problems] | None]
"""What a worker is to do for two fused commands, which gives what each fails with; None: they must wait for others."""

TogetherHandler = Callable[[Sequence[Entry], Container[int]], tuple[int, int]]
"""Carries out commands that wait one behind the other, at one go. It is given them, and the identifiers of those that
are under way; it says how many of them, from the first on, are done, and how many behind those are not for it."""


def one_by_one(entries: Sequence[Entry], busy: Container[int]) -> tuple[int, int]:
    """The TogetherHandler that leaves all of them to others."""
    return 0, len(entries)


class Controller(Protocol):
    """What an executor tells its controller."""

    def completed(self, queue: CompletionQueue) -> None:
        """There are new completions in a queue."""

    def failed(self, queue: SubmissionQueue, command: Command, status: int) -> None:
        """A command completed with an error."""

    def storage_failed(self, number: int, error: OSError) -> None:
        """What is behind namespace ``number`` failed with a command."""

    def come_back(self) -> None:
        """Have :meth:`Executor.work` called again, after whatever else there is to do."""

    def fatal(self, reason: str) -> None:
        """The controller cannot go on."""

    def invalid_doorbell(self, event: AsyncEvent) -> None:
        """The host rang for a queue that is not there, or with what cannot be."""


class Executor:
    """The queues of a controller, and the commands that are under way.

    All of it belongs to the thread that serves the client; ``workers`` do what has to wait.
    """

    def __init__(self, controller: Controller, workers: Workers) -> None:
        self._controller = controller
        self.workers = workers
        self._handlers: tuple[Mapping[int, Handler], Mapping[int, Handler]] = ({}, {})
        self._fused: FusedHandler = lambda first, second: None
        self._together: TogetherHandler = one_by_one
        self._when: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._told: dict[CompletionQueue, None] = {}
        self._working = False
        self.leaving: set[SubmissionQueue] = set()
        """Queues that are being deleted, and whose last commands are under way."""
        self._alone = False  # two fused commands are under way, and no others may be
        self._before: SubmissionQueue | None = None  # whose fused commands wait: no others overtake them
        self.submissions: dict[int, SubmissionQueue] = {}
        self.completions: dict[int, CompletionQueue] = {}
        self.doorbells: DoorbellBuffers | None = None
        self.on_end: Callable[[SubmissionQueue, int], None] | None = None
        """Hears of every command that is completed."""
        self.pin = False
        """Whether interrupts go by a pin: then the host has to ring for every completion that it takes."""
        self.burst = MAX_BURST
        self.enabled = False
        """Whether there is a host that may have commands carried out."""
        self.watched = False
        """Whether :meth:`look` is called again and again before anyone sleeps."""
        self.held = False
        """Whether nothing new is to be begun all the same: a migration has the device stand still."""
        self.hurried = False
        """Whether all wait for what is under way: long work that can be interrupted is."""
        self.withheld = False
        """Whether what workers have done is not to be completed either: there is nobody to be told."""
        self._kept: list[Callable[[], None]] = []  # completions, meanwhile
        self._turn = 0

    def handle(
        self,
        admin: Mapping[int, Handler],
        io: Mapping[int, Handler],
        fused: FusedHandler,
        together: TogetherHandler = one_by_one,
    ) -> None:
        """Who carries out what, by opcode; of the I/O queues ``together`` is asked first."""
        self._handlers, self._fused, self._together = (admin, io), fused, together

    # Fetching

    def work(self) -> bool:
        """Carry out what waits in the queues, as long as there is something and it may be done; whether there was."""
        if self._working:  # DMA by messages serves the client meanwhile, who rings
            return False
        self._working = True
        worked = False
        try:
            until = time.monotonic() + MAX_SECONDS
            while time.monotonic() < until:
                if not self.enabled or self.held or not self._serve_all(until):
                    return worked
                worked = True
            self._controller.come_back()
        except OSError as error:
            self._controller.fatal(f"the memory of a submission queue or of doorbells is gone: {error}")
        finally:
            self._working = False
            self.send_interrupts()
            self._settle()
        return True

    def look(self, last: bool) -> bool:
        """Carry out what the host wrote doorbells into memory for; whether there was something.

        ``last``: nobody looks again for a while, and the host has to ring.
        """
        return self._is_rung(last) and self.work()

    def look_away(self) -> None:
        """Nobody may call :meth:`look` again: the host has to ring from now on."""
        self._is_rung(last=True)

    def _is_rung(self, last: bool) -> bool:
        doorbells = self.doorbells
        if doorbells is None or not self._watches(doorbells) or not self.enabled or self.held:
            return False
        rung = False
        try:
            for number, queue in self.submissions.items():
                if number:
                    tail = tail_of(number)
                    rung |= (doorbells.look_on(tail, queue.tail) if last else doorbells.read(tail)) != queue.tail
        except OSError as error:
            self._controller.fatal(f"the memory of doorbells is gone: {error}")
            return False
        return rung

    def _serve_all(self, until: float) -> bool:
        """A burst of every queue in turn (4.13, round robin). False: there is nothing to be done now."""
        served = False
        queues = tuple(self.submissions.values())
        self._turn = (self._turn + 1) % len(queues)  # another one is the first each time: time may be up after it
        for queue in (*queues[self._turn :], *queues[: self._turn]):
            if queue.head != queue.tail or self.doorbells is not None:
                served |= self._serve(queue, until)
        return served

    def _serve(self, queue: SubmissionQueue, until: float) -> bool:
        """A burst of commands of one queue, cut off at ``until``. False: there is nothing to be done now."""
        if self.doorbells is not None and queue.number:
            self._look_at(queue, self.doorbells)
        room = queue.completions.room
        if queue.number and (self._alone or self._before not in (None, queue)):
            return False
        if self._before is queue:
            self._before = None
        if queue.number:  # commands of the host for the controller, ABORT say, do not wait for the storage
            room = min(room, MAX_JOBS - len(self.workers))
        count = min(queue.waiting, room, self.burst)
        if count <= 0:
            return False
        served = self._carry_out_all(queue, queue.peek(count), until)
        self.send_interrupts()
        return served

    def _carry_out_all(self, queue: SubmissionQueue, entries: Sequence[Entry], until: float) -> bool:
        """Commands, those that are alike at one go. False: the next one must wait for others."""
        position, single = 0, 0 if queue.number and len(entries) > 1 else len(entries)
        while position < len(entries) and self._goes_on(queue) and time.monotonic() < until:
            if position == single:
                done, others = self._together(entries[position:], queue.busy)
                if done:
                    self._fetched(queue, done)
                    self._complete_all(queue, [entry[2] for entry in entries[position : position + done]])
                    position += done
                single = position + others
                continue
            command = Command._make(entries[position])
            position += 1
            if command.flags & FUSE_MASK:
                return self._serve_fused(queue, command)
            self._fetched(queue)
            self._carry_out(queue, command)
        return True

    def _goes_on(self, queue: SubmissionQueue) -> bool:
        """Whether one more command may be fetched: the client is served meanwhile, where DMA goes by messages."""
        return queue.alive and self.enabled and not self.held

    @staticmethod
    def _fetched(queue: SubmissionQueue, count: int = 1) -> None:
        queue.head = (queue.head + count) % queue.ring.size
        queue.completions.promised += count

    def _carry_out(self, queue: SubmissionQueue, command: Command) -> None:
        try:
            handler = self._handlers[queue.number > 0].get(command.opcode)
            if handler is None:
                raise CommandError(Status.INVALID_OPCODE)
            if command.cid in queue.busy:
                raise CommandError(Status.COMMAND_ID_CONFLICT)
            result = handler(queue, command)
        except Exception as error:
            self.refuse(queue, command, error)
        else:
            if result is not LATER:
                self.complete(queue, command.cid, 0, result)

    def _serve_fused(self, queue: SubmissionQueue, first: Command) -> bool:
        """A command that is one of two (4.10, 6.1.1); False: they must wait.

        They are submitted together: where the second is not there yet it never will.
        """
        second = queue.entry(1) if queue.waiting > 1 else None
        if first.fuse != FUSED_FIRST or second is None or second.fuse != FUSED_SECOND or not queue.number:
            self._fetched(queue)
            reserved = first.fuse == FUSE_MASK or not queue.number
            self.refuse(queue, first, CommandError(Status.INVALID_FIELD if reserved else Status.ABORTED_MISSING_FUSED))
            return True
        if queue.completions.room < FUSED:
            return False
        try:
            if first.cid == second.cid or not queue.busy.keys().isdisjoint((first.cid, second.cid)):
                raise CommandError(Status.COMMAND_ID_CONFLICT)
            work = self._fused(first, second)
        except Exception as error:
            self._fetched(queue, FUSED)
            self._end_both(queue, (first, second), first_failed(error))
            return True
        if work is None:
            self._before = queue
            return False
        self._fetched(queue, FUSED)
        self._start_fused(queue, (first, second), work)
        return True

    def _start_fused(self, queue: SubmissionQueue, pair: tuple[Command, Command], work: Callable[[], Problems]) -> None:
        """Have a worker do ``work`` for two commands while no other one is under way."""
        found: list[Problems] = []

        def worked() -> int:
            found.append(work())
            return 0

        def landed(result: int, error: BaseException | None) -> None:
            if self._keeps(queue, landed, result, error):
                return
            self._alone = False
            for command in pair:
                queue.busy.pop(command.cid, None)
            self._end_both(queue, pair, found[0] if error is None else first_failed(error))

        self._alone = True
        job = self.workers.start(worked, landed)
        queue.busy.update((command.cid, job) for command in pair)

    def _end_both(self, queue: SubmissionQueue, pair: tuple[Command, Command], problems: Problems) -> None:
        for command, problem in zip(pair, problems, strict=True):
            if problem is None:
                self.complete(queue, command.cid, 0)
            else:
                self.refuse(queue, command, problem)

    # Doorbells

    def ring(self, number: int, value: int, *, head: bool) -> bool:
        """A doorbell register is written: the head of a completion queue, or the tail of a submission queue.

        False where that is nothing to be followed by :meth:`work`: it cannot be, or nobody waited for the place that
        the host made.
        """
        queue = (self.completions if head else self.submissions).get(number)
        if self.doorbells is not None and number and queue is not None:
            return True  # a call only: what counts is in memory, and may be newer
        places = queue.room if isinstance(queue, CompletionQueue) else 0
        if queue is None:
            self._controller.invalid_doorbell(AsyncEvent.INVALID_DOORBELL_REGISTER)
        elif not (queue.take_head(value) if isinstance(queue, CompletionQueue) else queue.take_tail(value)):
            self._controller.invalid_doorbell(AsyncEvent.INVALID_DOORBELL_VALUE)
        else:
            return places < FUSED or self.doorbells is not None
        return False

    def mirror(self, doorbells: DoorbellBuffers) -> None:
        """The host writes doorbells into memory from now on; those of queues that exist already go on from where they
        are, whatever is in that memory. Raises OSError.
        """
        admin = self.submissions.get(0)
        doorbells.look_on(0, 0)  # the admin queue's, of which nobody makes use: is there such memory?
        for number, queue in self.submissions.items():
            if number:
                doorbells.write(tail_of(number), queue.tail)
                doorbells.write(head_of(queue.completions.number), queue.completions.head)
        if self.submissions.get(0) is admin:  # no reset came meanwhile, where that goes by messages
            self.doorbells = doorbells

    def _look_at(self, queue: SubmissionQueue, doorbells: DoorbellBuffers) -> None:
        """How far the host has come with a queue pair; where there is nothing to do now, it is to ring for more."""
        tail = tail_of(queue.number)
        queue.take_tail(doorbells.read(tail))
        if not queue.waiting and not self._watches(doorbells):
            queue.take_tail(doorbells.look_on(tail, queue.tail))
        completions = queue.completions
        head = head_of(completions.number)
        completions.take_head(doorbells.read(head))
        if self.pin or (queue.waiting and completions.room < FUSED):
            completions.take_head(doorbells.look_on(head, completions.head))

    def _watches(self, doorbells: DoorbellBuffers) -> bool:
        """Whether :meth:`look` sees what the host writes there, so that it need not ring."""
        return self.watched and doorbells.mapped is not None

    # Completing

    def complete(self, queue: SubmissionQueue, cid: int, status: int, result: int = 0) -> None:
        """Post the completion of a fetched command; ``status`` is the status field without its phase tag."""
        completions = queue.completions
        completions.promised -= 1
        if self.on_end is not None:
            self.on_end(queue, cid)
        if not queue.alive:
            return
        try:
            completions.post(result, queue.head, queue.number, cid, status)
        except OSError as error:
            self._controller.fatal(f"the memory of completion queue {completions.number} is gone: {error}")
        else:
            self._told[completions] = None

    def _complete_all(self, queue: SubmissionQueue, cids: Sequence[int]) -> None:
        """As :meth:`complete`, for commands that ended well and have no results."""
        completions = queue.completions
        completions.promised -= len(cids)
        try:
            completions.post_done(queue.head, queue.number, cids)
        except OSError as error:
            self._controller.fatal(f"the memory of completion queue {completions.number} is gone: {error}")
        else:
            self._told[completions] = None

    def answer(self, cid: int, result: int, status: int = 0) -> bool:
        """Complete an admin command whose place was not promised; False where there is none."""
        queue = self.submissions.get(0)
        if queue is None or queue.completions.room <= 0:
            return False
        queue.completions.promised += 1
        self.complete(queue, cid, status, result)
        return True

    def refuse(self, queue: SubmissionQueue, command: Command, error: BaseException) -> None:
        """Complete a fetched command with what an error comes to."""
        self._end(queue, command, self._status_of(error, command), getattr(error, "result", 0))

    def _status_of(self, error: BaseException, command: Command) -> int:
        if isinstance(error, OSError):
            self._controller.storage_failed(command.nsid, error)
        return status_of(error, command)

    def _end(self, queue: SubmissionQueue, command: Command, status: int, result: int = 0) -> None:
        self.complete(queue, command.cid, status, result)
        if status and queue.alive:
            self._controller.failed(queue, command, status)

    def send_interrupts(self) -> None:
        """Tell of the completions that were posted since it was last called."""
        while self._told:
            queue, _ = self._told.popitem()
            self._controller.completed(queue)

    # What takes longer

    def later(
        self,
        queue: SubmissionQueue,
        command: Command,
        work: Work,
        *,
        namespace: Namespace | None = None,
        moving: bool = False,
        ended: Callable[[], object] | None = None,
        finish: Callable[[], object] | None = None,
        deliver: Callable[[], object] | None = None,
    ) -> Later:
        """Have a worker do ``work``, ``moving`` if it reads or writes the guest's memory, and complete the command.

        Before that, do here: ``ended``, whatever came of it; ``finish`` if it went well; and ``deliver``, which writes
        to the guest's memory, if the host still waits for it.
        """

        def landed(result: int, error: BaseException | None) -> None:
            if self._keeps(queue, landed, result, error):
                return
            if namespace is not None:
                namespace.busy -= 1
            del queue.busy[command.cid]
            if ended is not None:
                ended()
            try:
                if error is not None:
                    raise error
                if finish is not None:
                    finish()
                if deliver is not None and queue.alive:
                    deliver()
            except BaseException as problem:
                self.refuse(queue, command, problem)
            else:
                self.complete(queue, command.cid, 0, result)

        if namespace is not None:
            namespace.busy += 1
        queue.busy[command.cid] = self.workers.start(work, landed, moving=moving)
        return LATER

    def _keeps(self, queue: SubmissionQueue, landed: Landed, result: int, error: BaseException | None) -> bool:
        """Whether a command is not to be completed now; then it is as soon as it may be."""
        if self.withheld and queue.alive:
            self._kept.append(lambda: landed(result, error))
            return True
        return False

    @property
    def kept(self) -> int:
        """Commands that have ended and are not to be completed now."""
        return len(self._kept)

    def _complete_kept(self) -> None:
        kept, self._kept = self._kept, []
        for complete in kept:
            complete()

    def abort(self, queue: SubmissionQueue, cid: int) -> bool:
        """Abort a command that a worker was to have; False where it is too late for that, or there is none."""
        return self._call_off(queue, cid, Status.ABORT_REQUESTED)

    def _call_off(self, queue: SubmissionQueue, cid: int, status: Status) -> bool:
        job = queue.busy.get(cid)
        if job is None or not self.workers.cancel(job):
            return False
        job.landed(0, CommandError(status, retry=True))
        return True

    def when(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        """Do ``action`` as soon as ``condition`` holds; it may when a job has landed."""
        if condition():
            action()
        else:
            self._when.append((condition, action))

    def land(self) -> None:
        """Complete what workers have done, and go on."""
        if not self.withheld:
            self._complete_kept()
        self.workers.land()
        self._settle()
        self.work()

    def _settle(self) -> None:
        """Do what waited for something to end."""
        waiting, self._when = self._when, []
        for condition, action in waiting:
            self.when(condition, action)

    def idle(self) -> bool:
        """Whether nothing is under way: with a worker, or here, where DMA by messages serves the client meanwhile."""
        return not self.workers and not self._working

    def quiesce(self, timeout: float, *, moving: bool = False) -> None:
        """Wait until nothing is under way, or, with ``moving``, nothing at the guest's memory; complete that if it may
        be, and begin nothing new. Commands that would take longer than MAX_PATIENCE are interrupted where they can be:
        the host sends them again.

        Raises OSError(ETIMEDOUT).
        """
        held, self.held = self.held, True
        deadline = time.monotonic() + timeout
        try:
            self.land()
            try:
                self._wait(min(MAX_PATIENCE, timeout), moving)
            except TimeoutError:
                self._hurry(moving)
                self._wait(max(0.0, deadline - time.monotonic()), moving)
        finally:
            self.held, self.hurried = held, False

    def _wait(self, timeout: float, moving: bool) -> None:
        """Until nothing is left, and what has ended has landed. Raises OSError(ETIMEDOUT)."""
        deadline = time.monotonic() + timeout
        while self.workers.undone(moving=True) if moving else self.workers.left:
            self.workers.wait(max(0.0, deadline - time.monotonic()), moving=moving)
            self.land()  # what lands may have begun something else: a shutdown its flush
        self.land()

    def _hurry(self, moving: bool) -> None:
        """Interrupt what is waited for, as far as it can be."""
        self.hurried = True
        for queue in (*self.submissions.values(), *self.leaving):
            for cid, job in list(queue.busy.items()):
                if job.moving or not moving:
                    self._call_off(queue, cid, Status.COMMAND_INTERRUPTED)

    def clear(self) -> None:
        """Forget all queues: a reset. What is under way elsewhere ends without a completion."""
        self.enabled = False
        queues = [*self.submissions.values(), *self.leaving]
        self.submissions, self.completions, self.leaving = {}, {}, set()
        for queue in queues:
            queue.alive = False
            for cid in list(queue.busy):
                self.abort(queue, cid)  # what no worker has begun never will be
        self._complete_kept()
        self._before = None
        self.doorbells = None
        self._told.clear()
        self._when.clear()

    def take_out(self, number: int) -> SubmissionQueue:
        """Fetch no more from a submission queue, which is ``leaving`` until its last command has ended."""
        queue = self.submissions.pop(number)
        self.leaving.add(queue)
        if self._before is queue:
            self._before = None
        return queue

    def forget_windows(self) -> None:
        """The guest's memory is laid out anew."""
        rings = [queue.ring for queue in self.submissions.values()]
        rings += [queue.ring for queue in self.completions.values()]
        for ring in rings:
            ring.forget_windows()
        if self.doorbells is not None:
            self.doorbells.forget_windows()


_WRITING = frozenset({IoOpcode.WRITE, IoOpcode.WRITE_ZEROES, IoOpcode.DATASET_MANAGEMENT, IoOpcode.FLUSH})
_STATUS_OF_ERRNO = {
    errno.ENOSPC: Status.CAPACITY_EXCEEDED,
    errno.EDQUOT: Status.CAPACITY_EXCEEDED,
    errno.EFBIG: Status.CAPACITY_EXCEEDED,
    errno.EFAULT: Status.DATA_TRANSFER_ERROR,
    errno.EROFS: Status.NAMESPACE_WRITE_PROTECTED,
    errno.EPERM: Status.NAMESPACE_WRITE_PROTECTED,
    errno.EACCES: Status.NAMESPACE_WRITE_PROTECTED,
}
_MEDIA = frozenset({errno.EIO, errno.EILSEQ, errno.EBADMSG})
"""What a disk says of itself; anything else is a storage that is not there, and may be back."""


def first_failed(error: BaseException) -> Problems:
    """What two fused commands fail with if the first one does."""
    return error, CommandError(Status.ABORTED_FAILED_FUSED, retry=True)


def second_failed(error: BaseException) -> Problems:
    """What they fail with if the second one does: then the first has done nothing either."""
    return CommandError(Status.ABORTED_FAILED_FUSED, retry=True), error


def status_of(error: BaseException, command: Command) -> int:
    """The status field, without its phase tag, of a command that ended with ``error``."""
    if isinstance(error, CommandError):
        return error.status | (0 if error.retry else STATUS_DO_NOT_RETRY)
    if not isinstance(error, OSError):
        logger.error("command %#x failed", command.opcode, exc_info=error)
        return Status.INTERNAL_ERROR | STATUS_DO_NOT_RETRY
    if error.errno in _MEDIA:
        return Status.WRITE_FAULT if command.opcode in _WRITING else Status.UNRECOVERED_READ_ERROR
    return _STATUS_OF_ERRNO.get(error.errno or 0, Status.NAMESPACE_NOT_READY)
