"""``trap`` and ``readonly``: what a client may reach, and change."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from vfio_user.filters.base import Call, Filter, Hook, live
from vfio_user.filters.settings import FLAG, Setting
from vfio_user.server.backend import Region, ServerBackend
from vfio_user.wire.constants import DeviceState, PciRegion


def trapped(regions: Sequence[Region]) -> list[Region]:
    """``regions`` without the descriptors that lead around the server: each access is a message."""
    return [replace(region, fd=None, offset=0, sparse_areas=(), io_fds=()) for region in regions]


class Trap(Filter):
    """Offers no memory to map and no ioeventfds: every access is a message, which other filters see."""

    name = "trap"
    regions = live(lambda self: trapped(self.backend.regions), "The wrapped backend's, without descriptors.")

    def wants(self, hook: Hook) -> bool:
        return False


class ReadOnly(Trap):
    """A device that its client cannot change, config space excepted: EPERM.

    Writes to BARs and ROM are refused, and loading a migration stream; a reset is not offered; regions are trapped,
    as memory that is mapped could be written. ``config``: writes to config space are refused, too. Saving the device is
    possible.
    """

    name = "readonly"
    options: ClassVar[Mapping[str, Setting]] = {"config": Setting(FLAG, "refuse writes to config space, too")}
    resettable = live(lambda self: False, "It is not: a reset changes the device.")

    def __init__(self, backend: ServerBackend, *, config: bool = False) -> None:
        self._config = config
        super().__init__(backend)

    def wants(self, hook: Hook) -> bool:
        return hook.name in _CHANGES

    def around(self, call: Call) -> Any:
        if _CHANGES[call.hook.name](self._config, *call.arguments):
            raise PermissionError(errno.EPERM, f"{call.hook.name} refused by the readonly filter")
        return call()


_CHANGES: Mapping[str, Callable[..., bool]] = {
    "region_write": lambda config, region, offset, data: config or region != PciRegion.CONFIG,
    "reset": lambda config: True,
    "migration_set_state": lambda config, state: state == DeviceState.RESUMING,
    "migration_write_data": lambda config, data: True,
}
"""Whether a call changes the device: what a hook is called with, behind the option ``config``."""
