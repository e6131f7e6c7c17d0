"""How far a migration is, also within a round, and how long it may take yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from vfio_user.live.engine import Migration
from vfio_user.live.report import Step

_BEFORE_THE_PAUSE = (Step.CHECK, Step.LOGGING, Step.PRE_COPY)

_ENOUGH = 0.5
"""Seconds of a round after which its own rate is told rather than that of the one before."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a migration is at one moment. Times in seconds."""

    step: Step
    number: int
    """Of the round at work, from 1 on."""
    pages: int
    """What the round has to send."""
    left: int
    """What of it is not yet sent."""
    page_size: int
    bandwidth: float | None
    """Bytes per second; None while nothing has moved that would tell."""
    dirty_rate: float | None
    """Pages per second that became dirty in the round before; None in the first."""
    downtime: float | None
    """What the switch-over would have taken after the round before; None in the first."""
    to_go: float | None
    """About how long until the switch-over; infinity if it does not come so, None while nothing tells."""

    @property
    def share(self) -> float:
        """Of the round's pages those that are sent, 0 to 1."""
        return 1 - self.left / self.pages if self.pages else 1.0


def time_to_go(
    left: float, *, pages: float, rate: float, dirty_rate: float, downtime: float, rounds: int, force: bool = False
) -> float:
    """Seconds until what is dirty goes in ``downtime`` seconds, if all goes on as it does.

    ``left`` pages of this round are to be sent, at ``rate`` a second; meanwhile ``dirty_rate`` become dirty, of
    ``pages`` that the round had, and so on for ``rounds`` rounds, this one included. Infinity if that is not enough,
    unless the switch-over comes by ``force`` then.
    """
    if rate <= 0:
        return float("inf")
    total = left / rate
    for _ in range(rounds - 1):
        pages *= dirty_rate / rate
        if pages / rate <= downtime:
            return total
        total += pages / rate
    return total if force or pages * dirty_rate / rate**2 <= downtime else float("inf")


class Watch:
    """Looks at a migration that runs in another thread, or between its rounds. Changes nothing about it."""

    def __init__(self, migration: Migration, clock: Callable[[], float] = time.monotonic) -> None:
        self._migration = migration
        self._clock = clock
        self._number = 0
        self._pages = 0
        self._mark = (0.0, 0)

    def look(self) -> Progress:
        """How far it is now. To be called a few times per second: rates are taken from one call to the next."""
        migration, now = self._migration, self._clock()
        rounds, left = migration.report.rounds, migration.pages_left
        before = rounds[-1] if rounds else None
        number = before.number + 1 if before else 1
        fresh = number != self._number or left > self._pages
        if fresh:
            self._number, self._pages = number, max(left, before.left if before else 0)
        if fresh or left == self._pages:
            self._mark = now, left
        bandwidth = self._bandwidth(now, left) or (before.bandwidth if before else None)
        return Progress(
            step=migration.report.step,
            number=number,
            pages=self._pages,
            left=left,
            page_size=migration.page_size,
            bandwidth=bandwidth,
            dirty_rate=before.dirty_rate if before else None,
            downtime=before.downtime if before else None,
            to_go=self._to_go(left, bandwidth, before.dirty_rate if before else 0.0),
        )

    def _bandwidth(self, now: float, left: int) -> float:
        """Bytes per second since the round was first seen; 0 as long as that is too short to tell."""
        since, from_left = self._mark
        seconds = now - since
        return (from_left - left) * self._migration.page_size / seconds if seconds >= _ENOUGH else 0.0

    def _to_go(self, left: int, bandwidth: float | None, dirty_rate: float) -> float | None:
        if bandwidth is None:
            return None
        rate = bandwidth / self._migration.page_size
        if self._migration.report.step not in _BEFORE_THE_PAUSE:
            return left / rate if rate else None
        return time_to_go(
            left,
            pages=self._pages,
            rate=rate,
            dirty_rate=dirty_rate,
            downtime=self._migration.downtime,
            rounds=self._migration.max_rounds - self._number + 1,
            force=self._migration.force,
        )
