"""Work that other threads hand to the one that serves the client."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable

from vfio_user.fds import OwnedFd, signal_eventfd, take_signals
from vfio_user.server.backend import Link

logger = logging.getLogger("vfio_user.device")


class PostedWork:
    """What was posted waits for a client to be there, and for ``may_run``: a device that is stopped stands still."""

    def __init__(self, may_run: Callable[[], bool]) -> None:
        self._may_run = may_run
        self._work: deque[Callable[[], object]] = deque()
        self._bell = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def post(self, work: Callable[[], object]) -> None:
        """From any thread."""
        self._work.append(work)
        signal_eventfd(self._bell.fileno())

    def watch(self, link: Link) -> None:
        """Do what is posted while a client is connected."""
        link.watch(self._bell.fileno(), self._rung)

    def run(self) -> None:
        """Do what was posted so far, if it may be done now. What fails is logged, and the rest is done."""
        for _ in range(len(self._work) if self._may_run() else 0):
            try:
                self._work.popleft()()
            except Exception:
                logger.exception("posted work failed")

    def _rung(self) -> None:
        take_signals(self._bell.fileno())
        self.run()
