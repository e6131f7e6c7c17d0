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
from contextlib import ExitStack
from functools import partial

from vfio_user.client import Client
from vfio_user.errors import MigrationError, VfioUserError
from vfio_user.live.destination import Destination, UnconfirmedError, nothing
from vfio_user.live.memory import DirtyMemory, DirtyRanges, MemoryRegion
from vfio_user.live.report import Report, Round, Status, Step
from vfio_user.live.source import Source
from vfio_user.wire.constants import PAGE_SIZE

_TICK = 1e-6
"""Seconds that a round takes at least: no clock tells less."""
_SAMPLE = 1 << 16
"""Bytes of a round that tell of a link."""


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
        self.downtime = downtime
        self.max_rounds = max_rounds
        self.force = force
        self._bandwidth = bandwidth
        self._paused_at: float | None = None
        self._sent, self._sending = 0, 0.0  # bytes, and seconds
        self.report = Report()

    @property
    def pages_left(self) -> int:
        """Pages that are still to be sent: what a progress display shows while :meth:`run` is at work."""
        return self._memory.pages

    @property
    def page_size(self) -> int:
        """Bytes of such a page."""
        return self._memory.page_size

    def run(self) -> Generator[Round, None, None]:
        """Migrate; yields each round as it ends, and leaves the outcome in ``report``. Raises MigrationError.

        Giving up the iteration, an interrupt of the keyboard too, is a failure like any other: it is rolled back.
        """
        started = time.monotonic()
        try:
            last = yield from self._steps()
        except BaseException as error:
            self._give_up(error)
            if isinstance(error, (VfioUserError, OSError)):
                kind = UnconfirmedError if self.report.status is Status.UNCONFIRMED else MigrationError
                raise kind(f"{self.report.step} failed: {error}") from error
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
        for _ in range(self.max_rounds):
            done = self._round(self._source.read_ahead())
            yield done
            if done.downtime <= self.downtime:
                return
            if not done.memory_bytes + done.device_bytes and not done.left:
                break  # nothing is left to be sent ahead: another round changes nothing
        if not self.force:
            raise MigrationError(f"it does not converge: {self._verdict(self.report.rounds[-1])}")

    def _verdict(self, done: Round) -> str:
        return (
            f"after {done.number} rounds {done.left} pages are dirty again, {done.dirty_rate:.0f} a second;"
            f" at {self._rate / 2**20:.1f} MiB/s the switch-over would take {done.downtime * 1000:.0f} ms,"
            f" {self.downtime * 1000:.0f} ms are allowed"
        )

    def _round(self, device_data: Iterable[tuple[int, memoryview]], *, stopped: bool = False) -> Round:
        """Send what is dirty, and what the devices have to say now; see what is dirty again."""
        started = time.monotonic()
        memory_bytes, device_bytes = self._send(device_data, started)
        seconds = time.monotonic() - started
        if memory_bytes + device_bytes >= _SAMPLE:
            self._sent += memory_bytes + device_bytes
            self._sending += seconds
        if not stopped:
            self._memory.collect(self._source.logs)
        done = Round(
            number=len(self.report.rounds) + 1,
            pages=-(-memory_bytes // self._memory.page_size),
            memory_bytes=memory_bytes,
            device_bytes=device_bytes,
            seconds=seconds,
            left=self._memory.pages,
            downtime=0.0 if stopped else self._time_for_the_rest(),
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

    @property
    def _rate(self) -> float:
        """Bytes per second; as many as are allowed where nothing has moved yet that would tell.

        A round with a few bytes tells how long an answer takes, and nothing of the link.
        """
        return self._sent / max(self._sending, _TICK) if self._sent else self._bandwidth

    def _time_for_the_rest(self) -> float:
        """Seconds at that rate."""
        return (self._memory.pages * self._memory.page_size + self._source.bytes_left()) / self._rate

    def _keep_to_bandwidth(self, size: int, started: float) -> None:
        early = started + size / self._bandwidth - time.monotonic()
        if early > 0:
            time.sleep(early)

    def _release_source(self) -> None:
        """The source stays behind, stopped, and logs no more. It is of no use now: what it answers is only noted."""
        self._undo("the source, which is not needed any more", self._source.leave)
        if self._source.logging:
            self._undo("the source, which is not needed any more", self._source.stop_logging)

    def _give_up(self, error: BaseException) -> None:
        """Roll back, unless the destination may have the guest: then the source must not have it, too."""
        self.report.error = str(error) or type(error).__name__
        if isinstance(error, UnconfirmedError):
            self.report.status = Status.UNCONFIRMED
        elif self.report.step is not Step.CHECK:
            self._roll_back()

    def _roll_back(self) -> None:
        """Let the source run on as if nothing had been; each part as far as the peer still answers.

        Whatever one part raises, another Ctrl-C too, the others are done. A destination that cannot run yet comes
        last: it may take its time, and the guest stands still.
        """
        abort = partial(self._undo, "while rolling back", self._destination.abort)
        with ExitStack() as parts:
            if self.report.step is not Step.START:
                parts.callback(abort)
            if self._paused_at is not None:
                parts.callback(self._undo, "while rolling back", self._resume)
            if self._source.logging:
                parts.callback(self._undo, "while rolling back", self._source.stop_logging)
            parts.callback(self._undo, "while rolling back", self._source.run)
            if self.report.step is Step.START:
                abort()
                if self.report.status is Status.UNCONFIRMED:
                    parts.pop_all()

    def _undo(self, when: str, part: Callable[[], None]) -> None:
        try:
            part()
        except (VfioUserError, OSError) as error:
            if isinstance(error, UnconfirmedError):
                self.report.status = Status.UNCONFIRMED
            before = f"{self.report.error}; " if self.report.error else ""
            self.report.error = f"{before}{when}: {error}"
