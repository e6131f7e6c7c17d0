"""What is logged of things that can happen a hundred thousand times a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_INTERVAL = 1.0


class Complaints:
    """Log lines by subject: the first at once, then one a second at most, which says how many were left out.

    A guest that does the same wrong thing again and again, or a storage that fails, does not fill a disk with them.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._last: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def about(self, subject: str, problem: object, level: int = logging.WARNING) -> None:
        """Log ``subject`` and ``problem``, of which only the first makes it a subject of its own."""
        now = self._clock()
        if now - self._last.get(subject, -_INTERVAL) < _INTERVAL:
            self._left_out[subject] = self._left_out.get(subject, 0) + 1
            return
        self._last[subject] = now
        more = self._left_out.pop(subject, 0)
        self._logger.log(level, "%s: %s%s", subject, problem, f" (and {more} times more before)" if more else "")
