"""``error``: a device that refuses."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping
from errno import EIO
from typing import Any, ClassVar

from vfio_user.filters.base import Call, Filter, Hook
from vfio_user.filters.commands import concerns, per_command, spread
from vfio_user.filters.settings import ERRNO, NUMBER, RATE, REGION, Setting, errno_name
from vfio_user.server.backend import ServerBackend

logger = logging.getLogger("vfio_user.filters")


class Error(Filter):
    """Refuses a share of the commands, which then do not reach the device.

    ``rates``, by command, are 0 to 1. With a ``seed`` the n-th call of a command is refused or not whatever other
    commands come between. Memory and interrupts of a client that left are taken from the device in any case.
    """

    name = "error"
    options: ClassVar[Mapping[str, Setting]] = {
        **per_command(RATE, "the share of these commands that is refused"),
        "errno": Setting(ERRNO, "what the reply says, EIO by default"),
        "region": Setting(REGION, "only accesses to this region; other commands as without it"),
        "seed": Setting(NUMBER, "the same number, the same refusals"),
    }

    def __init__(
        self,
        backend: ServerBackend,
        *,
        errno: int = EIO,
        region: int | None = None,
        seed: int | None = None,
        **rates: float,
    ) -> None:
        self._rates = spread(rates, 1.0)
        self._errno = errno
        self._region = region
        self._dice = {hook: random.Random(None if seed is None else f"{seed} {hook}") for hook in self._rates}
        self._calls: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._owed: dict[tuple[Any, ...], Call] = {}
        super().__init__(backend)

    def wants(self, hook: Hook) -> bool:
        return hook.name in self._rates

    def around(self, call: Call) -> Any:
        if not concerns(call, self._region):
            return call()
        hook = call.hook.name
        self._calls[hook] += 1
        taken = _taken_away(call)
        if self._dice[hook].random() < self._rates[hook]:
            self._refused[hook] += 1
            if taken:
                self._owed[taken] = call
            raise OSError(self._errno, f"{hook} refused by the error filter")
        if taken:
            self._owed.pop(taken, None)
        return call()

    def disconnected(self) -> None:
        """What the server takes from the device when the client leaves was refused, too: that is made up for here."""
        owed, self._owed = self._owed, {}
        for call in owed.values():
            try:
                call()
            except Exception as error:
                logger.debug("%s after the client left: %s", call.hook.name, error)
        self.backend.disconnected()

    def report(self) -> str:
        name = errno_name(self._errno)
        return "\n".join(
            f"{hook}: {self._refused[hook]} of {self._calls[hook]} calls refused with {name}"
            for hook in self._rates
            if self._calls[hook]
        )


def _taken_away(call: Call) -> tuple[Any, ...] | None:
    """What the device may use no more after ``call``: a DMA region, an interrupt index; None: nothing."""
    hook, arguments = call.hook.name, call.arguments
    if hook == "dma_unmap":
        return (hook, *arguments[1:])
    if hook == "set_irqs" and arguments[3] == 0:
        return (hook, arguments[0])
    return None
