"""For servers that take little while their device stands: what is kept until it runs.

libvfio-user (July 2026) refuses DMA_MAP, DMA_UNMAP, SET_IRQS and resets in STOP and STOP_COPY, and all accesses to
regions in STOP_COPY. Whoever moves a guest needs config space then, and QEMU needs the others when it is programmed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from vfio_user.client.core import Call, ClientCore

MAX_PUT_OFF = 4096
"""Commands that may wait for the device to run."""
MAX_CONFIG_SIZE = 4096

Ask = Callable[[ClientCore], Call[Any]]


class PutOff:
    """Commands that the server does not take now, in order. True: there are some."""

    def __init__(self) -> None:
        self._calls: deque[Ask] = deque()

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, call: Ask) -> bool:
        """Whether there is room for it."""
        if len(self._calls) >= MAX_PUT_OFF:
            return False
        self._calls.append(call)
        return True

    def do(self, ask: Callable[[Ask], object]) -> None:
        """Have all of them done. What one is refused with is raised; those behind it are left."""
        while self._calls:
            ask(self._calls.popleft())


class KeptConfig:
    """Config space as it was when the device came to stand, and what was written to it since.

    ``ahead``: something was, and the server does not know.
    """

    def __init__(self, size: int = 0) -> None:
        self.data = bytearray(min(size, MAX_CONFIG_SIZE))
        self.ahead = False

    def has(self, offset: int, count: int) -> bool:
        return offset + count <= len(self.data)

    def read_into(self, offset: int, data: memoryview) -> None:
        data[:] = self.data[offset : offset + len(data)]

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data
        self.ahead = True
