"""The keep alive timer (5.21.1.15, 7.12)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class KeepAlive:
    """``expired`` is called, in a thread of its own, when the host was silent for too long."""

    def __init__(self, expired: Callable[[], None]) -> None:
        self._expired = expired
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._seconds = 0.0
        self._deadline = 0.0

    @property
    def overdue(self) -> bool:
        """Whether the host has been silent for too long, and somebody waits for it."""
        return self._timer is not None and time.monotonic() >= self._deadline

    def set(self, milliseconds: int) -> None:
        """How long the host may be silent; 0: for ever."""
        self.stop()
        self._seconds = milliseconds / 1000
        if milliseconds:
            self.restart()
            self._arm(self._seconds)

    def restart(self) -> None:
        """The host is there."""
        self._deadline = time.monotonic() + self._seconds

    def watch(self) -> None:
        """Look again when it is due, after ``expired`` has found that the host is there."""
        with self._lock:
            if self._timer is not None:
                self._arm(max(0.0, self._deadline - time.monotonic()))

    def stop(self) -> None:
        """Wait no longer, until :meth:`set`."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _arm(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._look)
        self._timer.daemon = True
        self._timer.start()

    def _look(self) -> None:
        with self._lock:
            if self._timer is not threading.current_thread():
                return
            left = self._deadline - time.monotonic()
            if left > 0:
                self._arm(left)
        if left <= 0:
            self._expired()
