"""``delay``: a slow device."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from vfio_user.errors import UsageError
from vfio_user.filters.base import Call, Filter, Hook
from vfio_user.filters.commands import concerns, per_command, spread
from vfio_user.filters.settings import DURATION, MAX_DELAY, NUMBER, REGION, Setting
from vfio_user.server.backend import ServerBackend


class Delay(Filter):
    """Sleeps before a command is served, with all that comes behind it waiting.

    ``delays``, by command, and ``jitter`` are in seconds, MAX_DELAY at most. A sleep is at least that long; the kernel
    adds its timer slack, about 50 µs.
    """

    name = "delay"
    options: ClassVar[Mapping[str, Setting]] = {
        **per_command(DURATION, "how long the command takes at least"),
        "jitter": Setting(DURATION, "a random time of up to this comes on top"),
        "region": Setting(REGION, "only accesses to this region; other commands as without it"),
        "seed": Setting(NUMBER, "the same number, the same jitter"),
    }

    def __init__(
        self,
        backend: ServerBackend,
        *,
        jitter: float = 0.0,
        region: int | None = None,
        seed: int | None = None,
        **delays: float,
    ) -> None:
        self._delays = spread(delays, MAX_DELAY)
        if not 0 <= jitter <= MAX_DELAY:
            raise UsageError(f"jitter={jitter}: 0 to {MAX_DELAY} seconds are possible")
        self._jitter = jitter
        self._region = region
        self._random = random.Random(seed)
        super().__init__(backend)

    def wants(self, hook: Hook) -> bool:
        return hook.name in self._delays

    def around(self, call: Call) -> Any:
        if concerns(call, self._region):
            seconds = self._delays[call.hook.name] + self._jitter * self._random.random()
            if seconds:
                time.sleep(seconds)
        return call()
