"""Threads for what has to wait: for a disk, for a server of the network."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

logger = logging.getLogger("vfio_user.devices.nvme")

Work = Callable[[], int]
"""Done by a worker: returns a result, or raises."""
Landed = Callable[[int, BaseException | None], None]
"""Done by the thread that gave the work, with what came of it."""


@dataclass(eq=False, slots=True)
class Job:
    """Work that a thread has, or will have."""

    landed: Landed
    future: Future[None] | None = None
    result: int = 0
    error: BaseException | None = None


class Workers:
    """At most ``threads`` threads. ``call_home`` is called by any of them: have :meth:`land` called, by your own.

    A job belongs to whoever gave it until it has landed; what a worker does of it ends before.
    """

    def __init__(self, threads: int, call_home: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(threads, "vfio-user-nvme")
        self._call_home = call_home
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

    def start(self, work: Work, landed: Landed) -> Job:
        """Have ``work`` done as soon as a thread is free."""
        job = Job(landed)
        self._under_way.add(job)
        job.future = self._pool.submit(self._do, job, work)
        return job

    def cancel(self, job: Job) -> bool:
        """Forget a job that no thread has begun; False where one has, and it will land."""
        assert job.future is not None
        if job not in self._under_way or not job.future.cancel():
            return False
        self._under_way.remove(job)
        return True

    def _do(self, job: Job, work: Work) -> None:
        try:
            job.result = work()
        except BaseException as error:
            job.error = error
        with self._ended:
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

    def wait(self, timeout: float) -> None:
        """Wait until no worker is at anything. Raises OSError(ETIMEDOUT) where that takes longer, in seconds."""
        with self._ended:
            if not self._ended.wait_for(lambda: len(self._arrived) + self._landing == len(self._under_way), timeout):
                left = len(self._under_way) - len(self._arrived)
                raise OSError(errno.ETIMEDOUT, f"{left} commands are still at the storage after {timeout:g} s")

    def close(self) -> None:
        """End the threads, when they are done with what they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)
