"""Live migration of one device between two servers, with the guest's memory.

The steps, in order; until the last one nothing is lost whatever fails::

    CHECK      do the two devices fit?
    LOGGING    the source logs which pages its DMA dirties
    PRE_COPY   memory, and device data where the device has PRE_COPY, while everything runs
    PAUSE      the guest stops using the device
    STOP_COPY  the source stops; the last dirty pages and the rest of its state move
    LOAD       the destination takes the state
    START      the destination runs, the guest goes on there

When a step fails the source runs again, its log is off and its guest goes on, and the destination is reset, or, if it
does not answer, disconnected: exactly one of the two has memory to work on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from vfio_user.client import Client
from vfio_user.errors import MigrationError, VfioUserError
from vfio_user.live.memory import DirtyRanges, MemoryCopy, MemoryRegion
from vfio_user.wire.constants import PAGE_SIZE, DeviceFeature, DeviceState, MigrationFlags, PciRegion

CHUNK = 1 << 20
IDENTITY = 12
"""Bytes of config space that two devices must share: ids, command and status apart, revision and class."""


class Step(StrEnum):
    CHECK = "check"
    LOGGING = "logging"
    PRE_COPY = "pre-copy"
    PAUSE = "pause"
    STOP_COPY = "stop-and-copy"
    LOAD = "load"
    START = "start"


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the dirty pages. ``number`` from 1 on; the last one is done while the guest stands still."""

    number: int
    pages: int
    device_bytes: int
    seconds: float
    left: int
    """Pages that were dirty again when it ended."""
    stopped: bool = False


@dataclass(slots=True)
class Report:
    """How a migration went. Times in seconds, sizes in bytes."""

    status: str = "failed"
    step: Step = Step.CHECK
    error: str | None = None
    rounds: list[Round] = field(default_factory=list)
    device_state_bytes: int = 0
    downtime: float = 0.0
    total: float = 0.0

    @property
    def dirty_pages(self) -> int:
        """Pages that were copied more than once: all that were sent after the first round."""
        return sum(r.pages for r in self.rounds[1:])


def _nothing() -> None:
    pass


class Migration:
    """Moves a device, and the memory of its guest, from one server to another.

    Both clients have their DMA maps and interrupts in place before :meth:`run`. ``pause`` stops the guest's use of
    the source; ``resume_source`` undoes that after a failure, ``resume_destination`` lets the guest go on at the
    destination. The switch-over comes when what is left takes less than ``downtime`` seconds at the rate measured,
    or after ``max_rounds``. ``bandwidth``, in bytes per second, is what the migration may use of a link.
    """

    def __init__(
        self,
        source: Client,
        destination: Client,
        *,
        memory: Sequence[MemoryRegion] = (),
        guest_dirty: DirtyRanges | None = None,
        pause: Callable[[], None] = _nothing,
        resume_source: Callable[[], None] = _nothing,
        resume_destination: Callable[[], None] = _nothing,
        downtime: float = 0.05,
        max_rounds: int = 30,
        bandwidth: float = float("inf"),
    ) -> None:
        self._source = source
        self._destination = destination
        self._memory = MemoryCopy(memory, PAGE_SIZE, guest_dirty)
        self._pause = pause
        self._resume_source = resume_source
        self._resume_destination = resume_destination
        self._downtime = downtime
        self._max_rounds = max_rounds
        self._bandwidth = bandwidth
        self._pre_copy = False
        self._logging = False
        self._paused_at: float | None = None
        self.report = Report()

    def run(self) -> Generator[Round, None, None]:
        """Migrate; yields each round as it ends, and leaves the outcome in ``report``. Raises MigrationError.

        Giving up the iteration, an interrupt of the keyboard too, is a failure like any other: it is rolled back.
        """
        started = time.monotonic()
        try:
            last = yield from self._steps()
        except BaseException as error:
            self.report.error = str(error) or type(error).__name__
            self._roll_back()
            if isinstance(error, (VfioUserError, OSError)):
                raise MigrationError(f"{self.report.step} failed: {error}") from error
            raise
        finally:
            self.report.total = time.monotonic() - started
        self.report.status = "completed"
        self._release_source()
        yield last

    def _steps(self) -> Generator[Round, None, Round]:
        self._enter(Step.CHECK)
        self._check()
        self._enter(Step.LOGGING)
        if self._memory.regions:
            self._start_logging()
        self._enter(Step.PRE_COPY)
        self._destination.migration_set_state(DeviceState.RESUMING)
        if self._pre_copy:
            self._source.migration_set_state(DeviceState.PRE_COPY)
        yield from self._pre_copy_rounds()
        self._enter(Step.PAUSE)
        self._paused_at = time.monotonic()
        self._pause()
        self._enter(Step.STOP_COPY)
        self._source.migration_set_state(DeviceState.STOP_COPY)
        self._collect()
        last = self._round(stopped=True)
        self._enter(Step.LOAD)
        self._destination.migration_set_state(DeviceState.STOP)
        self._enter(Step.START)
        self._destination.migration_set_state(DeviceState.RUNNING)
        self._resume_destination()
        self.report.downtime = time.monotonic() - self._paused_at
        return last

    def _enter(self, step: Step) -> None:
        self.report.step = step

    def _check(self) -> None:
        """The two are the same device with the same regions, interrupts and migration states."""
        source, destination = self._source, self._destination
        flags = source.migration_flags()
        if destination.migration_flags() != flags:
            raise MigrationError(f"migration states differ: {flags!r} and {destination.migration_flags()!r}")
        self._pre_copy = bool(flags & MigrationFlags.PRE_COPY)
        for what, here, there in (
            ("identity", _identity(source), _identity(destination)),
            ("regions", _geometry(source), _geometry(destination)),
            ("interrupts", _vectors(source), _vectors(destination)),
        ):
            if here != there:
                raise MigrationError(f"{what} of source and destination differ: {here} and {there}")
        for client, role in ((source, "source"), (destination, "destination")):
            state = client.migration_get_state()
            if state != DeviceState.RUNNING:
                raise MigrationError(f"the {role} is in state {state.name}, not RUNNING")

    def _start_logging(self) -> None:
        ranges = [(region.address, region.size) for region in self._memory.regions]
        self._logging = True  # even if the answer is lost: stopping a log that is off does no harm
        chosen = self._source.dma_logging_start(PAGE_SIZE, ranges)
        if chosen > PAGE_SIZE:
            self._memory = MemoryCopy(self._memory.regions, chosen, self._memory.guest_dirty)

    def _collect(self) -> None:
        if self._logging:
            self._memory.collect(self._source.dma_logging_report)

    def _pre_copy_rounds(self) -> Iterator[Round]:
        for _ in range(self._max_rounds):
            done = self._round()
            yield done
            if self._fits(done):
                return

    def _round(self, *, stopped: bool = False) -> Round:
        """Copy what is dirty, and what the device has to say now."""
        started = time.monotonic()
        pages = self._memory.copy(lambda size: self._keep_to_bandwidth(size, started))
        device_bytes = self._move_device_data() if self._pre_copy or stopped else 0
        seconds = time.monotonic() - started
        if not stopped:
            self._collect()
        done = Round(
            len(self.report.rounds) + 1, pages, device_bytes, seconds, self._memory.dirty_pages, stopped=stopped
        )
        self.report.rounds.append(done)
        self.report.device_state_bytes += device_bytes
        return done

    def _keep_to_bandwidth(self, size: int, started: float) -> None:
        early = started + size / self._bandwidth - time.monotonic()
        if early > 0:
            time.sleep(early)

    def _fits(self, done: Round) -> bool:
        """Whether what is left moves within the downtime, at the rate of the round just done."""
        size = done.pages * self._memory.page_size + done.device_bytes
        rate = size / done.seconds if done.seconds > 0 else float("inf")
        left = done.left * self._memory.page_size + self._device_bytes_left()
        return left <= rate * self._downtime

    def _device_bytes_left(self) -> int:
        if not self._source.probe(DeviceFeature.MIG_DATA_SIZE):
            return 0
        return self._source.migration_data_size()

    def _move_device_data(self) -> int:
        """Pass the migration stream on, as far as there is some now."""
        buffer = bytearray(CHUNK)
        moved = 0
        while True:
            count = self._source.migration_read_data_into(buffer)
            if count:
                self._destination.migration_write_data(memoryview(buffer)[:count])
            moved += count
            if count < CHUNK:
                return moved

    def _release_source(self) -> None:
        """The source stays behind, stopped, and logs no more. It is of no use now: what it answers is only noted."""
        try:
            self._source.migration_set_state(DeviceState.STOP)
            if self._logging:
                self._source.dma_logging_stop()
        except (VfioUserError, OSError) as error:
            self.report.error = f"the source, which is not needed any more: {error}"

    def _roll_back(self) -> None:
        """Let the source run on as if nothing had been; each part as far as the peer still answers."""
        if self.report.step is Step.CHECK:
            return
        undo: list[Callable[[], None]] = [
            self._reset_destination,
            lambda: self._source.migration_set_state(DeviceState.RUNNING),
        ]
        if self._logging:
            undo.append(self._source.dma_logging_stop)
        if self._paused_at is not None:
            undo.append(self._resume_source)
        for part in undo:
            try:
                part()
            except (VfioUserError, OSError) as error:
                self.report.error = f"{self.report.error}; while rolling back: {error}"

    def _reset_destination(self) -> None:
        """A destination that cannot be reset is left: what it does then reaches no memory and no interrupt."""
        try:
            self._destination.reset()
        except BaseException:
            self._destination.close()
            raise


def _identity(client: Client) -> str:
    """Vendor and device, revision and class code, as hexadecimal digits."""
    config = client.region_read(PciRegion.CONFIG, 0, IDENTITY)
    return f"{config[1::-1].hex()}:{config[3:1:-1].hex()} class {config[11:8:-1].hex()} revision {config[8]:#x}"


def _geometry(client: Client) -> list[tuple[int, int]]:
    return [(region.size, int(region.flags)) for region in client.regions]


def _vectors(client: Client) -> list[int]:
    return [irq.count for irq in client.irqs]
