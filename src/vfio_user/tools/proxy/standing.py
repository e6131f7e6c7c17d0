"""For servers that take little while their device stands: what is kept until it runs.

libvfio-user (July 2026) refuses DMA_MAP, DMA_UNMAP, SET_IRQS and resets in STOP and STOP_COPY, and all accesses to
regions in STOP_COPY. Whoever moves a guest needs config space then, and QEMU needs the others when it is programmed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vfio_user.client.core import Call, ClientCore
from vfio_user.errors import CommandError

MAX_PUT_OFF = 4096
"""Commands that may wait for the device to run."""
MAX_CONFIG_SIZE = 4096

Ask = Callable[[ClientCore], Call[Any]]


class PutOff:
    """Commands that the server does not take now, in order. True: there are some."""

    def __init__(self) -> None:
        self._calls: list[tuple[Ask, bool]] = []

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, call: Ask, *, resets: bool = False) -> bool:
        """Whether there is room for it. ``resets``: a reset undoes it."""
        if len(self._calls) >= MAX_PUT_OFF:
            return False
        self._calls.append((call, resets))
        return True

    def reset(self) -> None:
        """The device was reset: forget what that undid."""
        self._calls = [entry for entry in self._calls if not entry[1]]

    def do(self, ask: Callable[[Ask], object]) -> list[CommandError]:
        """Have all of them done, whatever one is refused with, and leave none. Returns the refusals.

        Whatever else ``ask`` raises is raised: the server is gone then.
        """
        refusals, calls = [], self._calls
        self._calls = []
        for call, _ in calls:
            try:
                ask(call)
            except CommandError as error:
                refusals.append(error)
        return refusals


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
