"""What moving, saving and restoring a guest have in common: steps, and what each costs while the guest stands still."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vfio_user.live.report import Report, Step


class Job:
    """Something that is done in steps, between which ``check`` is called, and may raise. ``report``: how it goes."""

    def __init__(self, report: Report, check: Callable[[], None]) -> None:
        self.report = report
        self._interrupt = check

    def _enter(self, step: Step) -> None:
        self._interrupt()
        self.report.step = step

    @contextmanager
    def _timed(self, cause: str) -> Iterator[None]:
        """What the guest stands still for, and how long."""
        self._interrupt()
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.report.causes[cause] = self.report.causes.get(cause, 0.0) + spent
