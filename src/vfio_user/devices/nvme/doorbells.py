"""Where a host says how far its queues have come: doorbell registers, and buffers that mirror them (3.1.24, 7.13)."""

from __future__ import annotations

import sys
import threading

from vfio_user.dma.memory import GuestMemory

STRIDE = 8
"""Bytes of the two doorbells of a queue pair: the submission queue's tail, the completion queue's head."""
HEAD = 4
"""Where the completion queue's head is in there."""
BUFFER = 4096
"""Bytes of each of the two buffers that are looked at: a page, of the smallest size (5.8)."""


class DoorbellBuffers:
    """The doorbells of the I/O queues as they stand in guest memory, and what the host must pass to ring for real.

    ``shadow`` and ``events`` are the addresses of two pages. A host writes a doorbell into the first, and its register
    only if that passes the value in the second, as one does that is added to while nobody looks.
    """

    def __init__(self, memory: GuestMemory, shadow: int, events: int) -> None:
        self._memory = memory
        self.shadow = shadow
        self.events = events
        self._fence = threading.Lock()
        self._mapped: memoryview | None = None

    @property
    def mapped(self) -> memoryview | None:
        """The doorbells themselves, number by number; None where they can be had by messages only."""
        if self._mapped is None and sys.byteorder == "little":
            window = self._memory.window(self.shadow, BUFFER)
            self._mapped = None if window is None else window.cast("I")
        return self._mapped

    def forget_windows(self) -> None:
        """The guest's memory is laid out anew: what was looked up is not to be used any more."""
        self._mapped = None

    def read(self, offset: int) -> int:
        """The doorbell at ``offset``. Raises OSError."""
        mapped = self._mapped or self.mapped
        if mapped is not None:
            return mapped[offset >> 2]
        return int.from_bytes(self._memory.read(self.shadow + offset, 4), "little")

    def write(self, offset: int, value: int) -> None:
        """Set the doorbell at ``offset``, which the host does not use yet. Raises OSError."""
        self._memory.write(self.shadow + offset, value.to_bytes(4, "little"))

    def look_on(self, offset: int, value: int) -> int:
        """Have the host ring for real when it passes ``value``; what the doorbell says after that. Raises OSError."""
        self._memory.write(self.events + offset, value.to_bytes(4, "little"))
        # A processor may do our read before our write is seen, and then either side waits for the other. Taking a lock
        # is an atomic exchange, which orders the two; Python has no other fence.
        with self._fence:
            return self.read(offset)


def tail_of(queue: int) -> int:
    """The offset of a submission queue's doorbell."""
    return queue * STRIDE


def head_of(queue: int) -> int:
    """The offset of a completion queue's doorbell."""
    return queue * STRIDE + HEAD
