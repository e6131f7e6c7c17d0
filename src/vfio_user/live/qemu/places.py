"""Which control socket is which device's, and where a device is in a machine.

Nothing says so: a server does not know where its device is plugged in, and QEMU not who serves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

from vfio_user.client.control import ControlClient
from vfio_user.live.qemu.config_image import COMMAND_MEMORY, INTERRUPT_LINE, SIZE, ConfigImage, ConfigWrite
from vfio_user.live.qemu.machine import Machine, PciFunction, PluggedFunction
from vfio_user.wire.constants import PciRegion

MARK = 0xA5
"""Written to a device's interrupt line register, which means nothing but to the guest."""


@dataclass(frozen=True, slots=True)
class ServedDevice:
    """A device of one side: ``name`` for messages, the control socket of its server."""

    name: str
    control: ControlClient


@dataclass(frozen=True, slots=True)
class PlacedDevice:
    """A device of one side of which it is known where it is in its machine."""

    served: ServedDevice
    function: PluggedFunction


def config_image(control: ControlClient) -> ConfigImage:
    """A device's config space, as its server has it."""
    return ConfigImage(control.region_read(PciRegion.CONFIG, 0, SIZE))


def find_used(machine: Machine, control: ControlClient, plugged: Sequence[PluggedFunction]) -> list[PluggedFunction]:
    """Of which device of a running guest a control socket can be.

    By where the guest has mapped BARs, which QEMU and server know both. So it is with a device of another guest that is
    a copy of this one: :func:`marked` tells them apart, as soon as the guest stands still.
    """
    image = config_image(control)
    mapped = {bar.address for bar in image.bars} if image.command & COMMAND_MEMORY else None

    def fits(one: PluggedFunction) -> bool:
        function = machine.locate(one.path)
        return image.number(0, 4) == function.ids and (mapped is None or function.bars <= mapped)

    return [one for one in plugged if fits(one)]


def marked(machine: Machine, function: PciFunction, controls: Sequence[ControlClient]) -> list[bool]:
    """Which control sockets are those of a device whose guest stands still, or never ran.

    By a register without effect, which is written through QEMU and read from the servers; then it is as before. Within
    :meth:`Machine.borrowed_ports`.
    """
    line = machine.config_read(function, INTERRUPT_LINE, 1)
    before = list(map(_line, controls))
    machine.config_write(function, ConfigWrite(INTERRUPT_LINE, 1, line ^ MARK))
    try:
        after = list(map(_line, controls))
    finally:
        machine.config_write(function, ConfigWrite(INTERRUPT_LINE, 1, line))
    return [old != new == line ^ MARK for old, new in zip(before, after, strict=True)]


def find_waiting(machine: Machine, plugged: PluggedFunction, served: Sequence[ServedDevice]) -> list[ServedDevice]:
    """Which control sockets are those of a device of a machine that waits for its guest."""
    with machine.numbered(plugged.path) as function:
        found = marked(machine, function, [one.control for one in served])
    return list(compress(served, found))


def names(functions: Iterable[PluggedFunction]) -> str:
    """For messages."""
    return ", ".join(one.name for one in functions) or "none"


def which(matching: Sequence[PluggedFunction]) -> str:
    """What :func:`find_used` has found, if it is not one."""
    if not matching:
        return "none of its vfio-user devices"
    return f"any of {names(matching)}, which look the same as long as the guest has not set them up"


def _line(control: ControlClient) -> int:
    return config_image(control).data[INTERRUPT_LINE]
