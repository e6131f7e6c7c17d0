"""Live migration of the devices of one guest, with its memory.

The steps, in order; until the last one nothing is lost whatever fails::

    CHECK      do the two sides fit?
    LOGGING    the source logs which pages its DMA dirties
    PRE_COPY   memory, and device data where a device has PRE_COPY, while everything runs
    PAUSE      the guest stops using its devices
    STOP_COPY  the devices stop; the last dirty pages and the rest of their state move
    LOAD       the destination takes the state
    START      the destination runs, the guest goes on there

When a step fails the source runs again, its logs are off and its guest goes on, and the destination is reset, or, if it
does not answer, disconnected: exactly one of the two has memory to work on. One failure is different: where the
destination was told to start and did not answer, it may run, and so the source must not (:class:`UnconfirmedError`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from vfio_user.client import Client
from vfio_user.errors import MigrationError, VfioUserError
from vfio_user.live.destination import Destination, UnconfirmedError, nothing
from vfio_user.live.memory import DirtyMemory, DirtyRanges, MemoryRegion
from vfio_user.live.report import Report, Round, Status, Step
from vfio_user.live.source import Source
from vfio_user.wire.constants import PAGE_SIZE

_TICK = 1e-6
"""Seconds that a round takes at least: no clock tells less."""


class Migration:
    """Moves the devices of a guest, and its memory, to a destination.

    The devices of ``clients`` run, and have their DMA maps and interrupts. ``memory`` is the guest's, as it is here;
    ``guest_dirty`` tells what the guest's processors wrote since it was asked before. ``pause`` stops the guest's use
    of its devices; ``resume`` undoes that after a failure.

    The switch-over comes when what is left takes less than ``downtime`` seconds at the rate measured. When it is not so
    after ``max_rounds``, the migration fails and says by how much; with ``force`` it switches over all the same.
    ``bandwidth``, in bytes per second, is what the migration may use of a link. Raises ValueError for no rounds at all.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        destination: Destination,
        *,
        memory: Sequence[MemoryRegion] = (),
        guest_dirty: DirtyRanges | None = None,
        pause: Callable[[], None] = nothing,
        resume: Callable[[], None] = nothing,
        downtime: float = 0.05,
        max_rounds: int = 30,
        force: bool = False,
        bandwidth: float = float("inf"),
    ) -> None:
        if max_rounds < 1:
            raise ValueError(f"{max_rounds} rounds: the memory must be sent once at least")
        self._source = Source(clients)
        self._destination = destination
        self._regions = memory
        self._guest_dirty = guest_dirty
        self._memory = DirtyMemory(memory, PAGE_SIZE, guest_dirty)
        self._pause = pause
        self._resume = resume
        self._downtime = downtime
        self._max_rounds = max_rounds
        self._force = force
        self._bandwidth = bandwidth
        self._paused_at: float | None = None
        self.report = Report()

    @property
    def pages_left(self) -> int:
        """Pages that are still to be sent: what a progress display shows while :meth:`run` is at work."""
        return self._memory.pages

    def run(self) -> Generator[Round, None, None]:
        """Migrate; yields each round as it ends, and leaves the outcome in ``report``. Raises MigrationError.

        Giving up the iteration, an interrupt of the keyboard too, is a failure like any other: it is rolled back.
        """
        started = time.monotonic()
        try:
            last = yield from self._steps()
        except BaseException as error:
            self.report.error = str(error) or type(error).__name__
            if isinstance(error, UnconfirmedError):
                self.report.status = Status.UNCONFIRMED
                raise
            self._roll_back()
            if isinstance(error, (VfioUserError, OSError)):
                raise MigrationError(f"{self.report.step} failed: {error}") from error
            raise
        finally:
            self.report.total = time.monotonic() - started
        self.report.status = Status.COMPLETED
        self._release_source()
        yield last

    def _steps(self) -> Generator[Round, None, Round]:
        self.report.step = Step.CHECK
        self._destination.check(self._source.offer(self._regions))
        self.report.step = Step.LOGGING
        if self._regions:
            page_size = self._source.start_logging(self._regions)
            self._memory = DirtyMemory(self._regions, page_size, self._guest_dirty)
        self.report.step = Step.PRE_COPY
        self._destination.begin()
        self._source.start_ahead()
        yield from self._rounds()
        self.report.step = Step.PAUSE
        self._paused_at = time.monotonic()
        self._pause()
        self.report.step = Step.STOP_COPY
        self._source.stop()
        self._memory.collect(self._source.logs)
        last = self._round(self._source.read_rest(), stopped=True)
        self.report.step = Step.LOAD
        self._destination.load()
        self.report.step = Step.START
        self._destination.start()
        self.report.downtime = time.monotonic() - self._paused_at
        return last

    def _rounds(self) -> Iterator[Round]:
        for _ in range(self._max_rounds):
            done = self._round(self._source.read_ahead())
            yield done
            if done.downtime <= self._downtime:
                return
        if not self._force:
            raise MigrationError(f"it does not converge: {self._verdict(self.report.rounds[-1])}")

    def _verdict(self, done: Round) -> str:
        return (
            f"after {done.number} rounds {done.left} pages are dirty again, {done.dirty_rate:.0f} a second;"
            f" at {done.bandwidth / 2**20:.1f} MiB/s the switch-over would take {done.downtime * 1000:.0f} ms,"
            f" {self._downtime * 1000:.0f} ms are allowed"
        )

    def _round(self, device_data: Iterable[tuple[int, memoryview]], *, stopped: bool = False) -> Round:
        """Send what is dirty, and what the devices have to say now; see what is dirty again."""
        started = time.monotonic()
        memory_bytes, device_bytes = self._send(device_data, started)
        seconds = time.monotonic() - started
        if not stopped:
            self._memory.collect(self._source.logs)
        done = Round(
            number=len(self.report.rounds) + 1,
            pages=-(-memory_bytes // self._memory.page_size),
            memory_bytes=memory_bytes,
            device_bytes=device_bytes,
            seconds=seconds,
            left=self._memory.pages,
            downtime=0.0 if stopped else self._time_for_the_rest((memory_bytes + device_bytes) / max(seconds, _TICK)),
            stopped=stopped,
        )
        self.report.rounds.append(done)
        self.report.device_state_bytes += device_bytes
        return done

    def _send(self, device_data: Iterable[tuple[int, memoryview]], started: float) -> tuple[int, int]:
        """The bytes of memory and of the devices that went."""
        memory_bytes = device_bytes = 0
        for address, piece in self._memory.take():
            self._destination.write_memory(address, piece)
            memory_bytes += len(piece)
            self._keep_to_bandwidth(memory_bytes, started)
        for number, data in device_data:
            self._destination.write_device(number, data)
            device_bytes += len(data)
            self._keep_to_bandwidth(memory_bytes + device_bytes, started)
        self._destination.settle()
        return memory_bytes, device_bytes

    def _time_for_the_rest(self, rate: float) -> float:
        """Seconds at ``rate`` bytes per second; 0 where nothing has moved yet that would tell."""
        left = self._memory.pages * self._memory.page_size + self._source.bytes_left()
        return left / rate if rate else 0.0

    def _keep_to_bandwidth(self, size: int, started: float) -> None:
        early = started + size / self._bandwidth - time.monotonic()
        if early > 0:
            time.sleep(early)

    def _release_source(self) -> None:
        """The source stays behind, stopped, and logs no more. It is of no use now: what it answers is only noted."""
        self._undo("the source, which is not needed any more", self._source.leave)
        if self._source.logging:
            self._undo("the source, which is not needed any more", self._source.stop_logging)

    def _roll_back(self) -> None:
        """Let the source run on as if nothing had been; each part as far as the peer still answers."""
        if self.report.step is Step.CHECK:
            return
        self._undo("while rolling back", self._destination.abort)
        self._undo("while rolling back", self._source.run)
        if self._source.logging:
            self._undo("while rolling back", self._source.stop_logging)
        if self._paused_at is not None:
            self._undo("while rolling back", self._resume)

    def _undo(self, when: str, part: Callable[[], None]) -> None:
        try:
            part()
        except (VfioUserError, OSError) as error:
            before = f"{self.report.error}; " if self.report.error else ""
            self.report.error = f"{before}{when}: {error}"
