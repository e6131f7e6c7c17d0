"""Threads for what has to wait: for a disk, for a server of the network."""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

logger = logging.getLogger("vfio_user.devices.nvme")

Work = Callable[[], int]
"""Done by a worker: returns a result, or raises."""
Landed = Callable[[int, BaseException | None], None]
"""Done by the thread that gave the work, with what came of it."""


@dataclass(eq=False, slots=True)
class Job:
    """Work that a thread has, or will have. ``moving``: it reads or writes the guest's memory."""

    work: Work
    landed: Landed
    moving: bool = False
    done: bool = False
    result: int = 0
    error: BaseException | None = None


class Workers:
    """At most ``threads`` threads. ``call_home`` is called by any of them: have :meth:`land` called, by your own.

    A job belongs to whoever gave it until it has landed; what a worker does of it ends before. Threads are of our own
    making, as those of an executor would have the process wait for a storage that hangs, and would keep what was
    cancelled as long as they are busy.
    """

    def __init__(self, threads: int, call_home: Callable[[], None]) -> None:
        self._most = threads
        self._call_home = call_home
        self._threads = 0
        self._waiting: deque[Job] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()  # wakes a thread: True to look what waits, False to end
        self._ended = threading.Condition()
        self._arrived: list[Job] = []
        self._under_way: set[Job] = set()
        self._landing = 0  # of these, what is told of at this moment

    def __len__(self) -> int:
        """Jobs that have not landed."""
        return len(self._under_way)

    @property
    def left(self) -> int:
        """Jobs that nobody was told of yet; from within a completion, its own is none of them."""
        return len(self._under_way) - self._landing

    def start(self, work: Work, landed: Landed, *, moving: bool = False) -> Job:
        """Have ``work`` done as soon as a thread is free."""
        job = Job(work, landed, moving)
        self._under_way.add(job)
        self._waiting.append(job)
        waiting = len(self._waiting)  # counted first: a thread that takes a call now may take its job before we look
        if self._calls.qsize() < waiting:  # each cancelled job has left a call
            self._calls.put(True)
        if self._threads < min(self._most, len(self._under_way)):
            self._threads += 1
            threading.Thread(target=self._run, name=f"vfio-user-nvme-{self._threads}", daemon=True).start()
        return job

    def cancel(self, job: Job) -> bool:
        """Forget a job that no thread has begun; False where one has, and it will land."""
        try:
            self._waiting.remove(job)
        except ValueError:
            return False
        self._under_way.remove(job)
        return True

    def _run(self) -> None:
        while self._calls.get():
            try:
                job = self._waiting.popleft()
            except IndexError:
                continue
            self._do(job)
            del job  # or the memory that it reads or writes would be kept until there is another one

    def _do(self, job: Job) -> None:
        try:
            job.result = job.work()
        except BaseException as error:
            job.error = error
        with self._ended:
            job.done = True
            self._arrived.append(job)
            first = len(self._arrived) == 1
            self._ended.notify()
        if first:
            self._call_home()

    def land(self) -> None:
        """Tell of the jobs that ended. What fails with one is logged: the others have to land, too."""
        with self._ended:
            arrived, self._arrived = self._arrived, []
            self._landing += len(arrived)
        for job in arrived:
            try:
                job.landed(job.result, job.error)
            except Exception:
                logger.exception("a command could not be ended")
            finally:
                self._under_way.remove(job)
                self._landing -= 1

    def wait(self, timeout: float, *, moving: bool = False) -> None:
        """Wait until no worker is at anything, or, with ``moving``, at the guest's memory.

        Raises OSError(ETIMEDOUT) where that takes longer, in seconds.
        """
        with self._ended:
            if not self._ended.wait_for(lambda: not self.undone(moving=moving), timeout):
                left = self.undone(moving=moving)
                raise OSError(errno.ETIMEDOUT, f"{left} commands are still at the storage after {timeout:g} s")

    def undone(self, *, moving: bool = False) -> int:
        """Jobs that have not been done, begun or not; with ``moving``, those at the guest's memory."""
        return sum(not job.done and (job.moving or not moving) for job in self._under_way)

    def close(self) -> None:
        """End the threads, when they are done with what they are at; what none has begun is forgotten."""
        self._waiting.clear()
        for _ in range(self._threads):
            self._calls.put(False)
