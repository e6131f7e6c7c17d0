"""QEMU's passes over the memory of its guest, as rounds of a report."""

from __future__ import annotations

import time

from vfio_user.live.qemu.monitor import MigrationInfo
from vfio_user.live.report import Round


class Passes:
    """Those of one migration, which begins now."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._number, self._bytes, self._pages = 0, 0, 0
        self.device_bytes = 0
        """Of devices, sent in this pass so far."""
        self.time_for_the_rest = float("inf")
        """Seconds, at the rate of the pass before; infinity as long as nothing tells."""

    def see(self, info: MigrationInfo, *, stopped: bool = False) -> Round | None:
        """A pass that has ended since the last look; ``stopped``: all that was sent while the guest stood still."""
        ram = info.ram
        if ram is None or not (stopped or ram.dirty_sync_count > self._number + 1):
            return None
        now = time.monotonic()
        sent, pages = ram.transferred - self._bytes, ram.normal + ram.duplicate - self._pages
        seconds = max(now - self._since, 1e-6)
        self.time_for_the_rest = ram.remaining * seconds / sent if sent else 0.0
        done = Round(
            number=self._number + 1,
            pages=pages,
            memory_bytes=sent,
            device_bytes=self.device_bytes,
            seconds=seconds,
            left=ram.remaining // ram.page_size,
            downtime=self.time_for_the_rest,
            stopped=stopped,
        )
        self._number = ram.dirty_sync_count - 1
        self._bytes, self._pages, self._since, self.device_bytes = ram.transferred, ram.normal + ram.duplicate, now, 0
        return done
