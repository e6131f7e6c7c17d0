"""What can stand against moving, saving or restoring a guest: a sentence each, with what to change.

QEMU itself compares nothing of a vfio-user device: with one that is missing at the destination, or in another slot,
both sides report success.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence

from vfio_user.errors import CommandError, MigrationError
from vfio_user.live.offer import DeviceOffer, Offer
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.machine import Machine, MachineShape, PluggedFunction
from vfio_user.live.qemu.monitor import MIGRATING
from vfio_user.live.qemu.places import PlacedDevice, ServedDevice, find_used, names, which
from vfio_user.wire.constants import DeviceState

VERSION = 11
"""Major version of the QEMUs with which the recipe was measured."""
INCOMING = "inmigrate"


class Obstacles:
    """What stands against something: ``obstacles``, a sentence each, with what to change."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self.obstacles: list[str] = []
        for machine in machines:
            self._look(_version(machine))
        self._known = not self.obstacles  # of another QEMU nothing else would be true

    def check(self) -> None:
        """Raise MigrationError if something stands against it."""
        if self.obstacles:
            raise MigrationError("; ".join(self.obstacles))

    def _look(self, *parts: Iterable[str]) -> None:
        """Gather what ``parts`` say, and why one of them could not look."""
        for part in parts:
            try:
                self.obstacles += part
            except MigrationError as error:
                self.obstacles.append(str(error))


# Machines


def _version(machine: Machine) -> Iterator[str]:
    found = machine.version()
    if found.major != VERSION:
        yield f"the {machine.name} QEMU is {found}: the recipe is known to work with {VERSION}.x only"


def shape_misfits(here: MachineShape, there: MachineShape) -> Iterator[str]:
    """Between the machine that a guest is of and that into which it is to come."""
    if here.kind != there.kind:
        yield (
            f"the machines differ, {here.kind} and {there.kind}: start the destination with -machine"
            f" {here.kind.removesuffix('-machine')}"
        )
    if here.memory != there.memory:
        yield (
            f"the guest has {here.memory >> 20} MiB of memory, the destination {there.memory >> 20}:"
            f" start it with -m {here.memory}B"
        )
    elif here.backends != there.backends:
        yield (
            f"the guest's memory is {_parts(here)}, the destination's {_parts(there)}: give it the same -object"
            " memory-backend-..."
        )


def _parts(shape: MachineShape) -> str:
    return ", ".join(f"{name} ({size >> 20} MiB)" for name, size in sorted(shape.backends.items())) or "in no object"


def iommu_in_the_way(machine: Machine) -> Iterator[str]:
    """Of a QEMU that is to log what devices write."""
    if iommus := machine.iommus():
        yield (
            f"the guest has an IOMMU ({', '.join(iommus)}): what a device wrote where the guest has unmapped its"
            " memory since would be lost: move it with --cold"
        )


def not_leaving(machine: Machine) -> Iterator[str]:
    """Of a QEMU whose guest is to leave it."""
    yield from (f"the {machine.name} QEMU says: {reason}" for reason in machine.monitor.migration().blocked_reasons)
    if (status := machine.monitor.status().status) not in ("running", "paused"):
        yield f"the {machine.name}'s guest is in state {status}: it must run, or be paused"
    if (going := machine.monitor.migration().status) in MIGRATING:
        yield f"the {machine.name} QEMU is migrating already ({going})"


def not_waiting(machine: Machine) -> Iterator[str]:
    """Of a QEMU into which a guest is to come."""
    if (status := machine.monitor.status().status) != INCOMING:
        yield f"the {machine.name} QEMU waits for no guest (it is {status}): start it with -incoming defer -S"


def unshared(machine: Machine) -> Iterator[str]:
    """Memory that device servers cannot reach."""
    for name in machine.unshared_memory():
        yield f"memory {name} of the {machine.name} QEMU is not shared with the devices: give it share=on"


def unwritable(debugger: Debugger, users: Iterable[str]) -> Iterator[str]:
    """Where MSI-X tables cannot be written: of a QEMU that waits, which is not disturbed by a try."""
    if users := list(users):
        try:
            debugger.check()
        except MigrationError as error:
            yield f"the MSI-X table of {', '.join(users)} cannot be written: {error}"


# Devices


def examine(one: ServedDevice, role: str) -> Generator[str, None, DeviceOffer | None]:
    """Whether a device can be moved; what it is, None for one that cannot."""
    try:
        offer = DeviceOffer.of(one.control)
        state = one.control.migration_get_state()
    except (MigrationError, CommandError) as error:
        yield f"{one.name}: at the {role} {error}"
        return None
    if state is not DeviceState.RUNNING:
        yield f"{one.name}: the device of the {role} is in state {state.name}, not RUNNING"
    if not one.control.status().connected:
        yield f"{one.name}: no QEMU is connected to the {role}'s server"
    return offer


def offer_misfits(name: str, here: DeviceOffer, there: DeviceOffer) -> Iterator[str]:
    """Between a device and the one that is to go on with its state."""
    return (f"{name}: {what}" for what in Offer([here], []).misfits(Offer([there], [])))


def place_used(
    machine: Machine, plugged: Sequence[PluggedFunction], served: Sequence[ServedDevice]
) -> Generator[str, None, list[PlacedDevice]]:
    """Where the devices of a guest that runs are in its machine, of which none may be left out."""
    placed: dict[tuple[int, ...], PlacedDevice] = {}
    for one in served:
        matching = find_used(machine, one.control, plugged)
        if len(matching) != 1:
            yield f"{one.name}: the source's control socket is that of {which(matching)}"
        elif matching[0].path in placed:
            yield f"{one.name}: {matching[0].name} is given twice"
        else:
            placed[matching[0].path] = PlacedDevice(one, matching[0])
    missing = [one for one in plugged if one.path not in placed]
    if missing and len(placed) == len(served):
        yield f"{names(missing)} would be lost: give its control sockets with --device, too"
    return list(placed.values())
