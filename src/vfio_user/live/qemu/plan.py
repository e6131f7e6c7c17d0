"""Does it fit? What stands against moving, saving or restoring a guest: found out before anything changes.

QEMU itself compares nothing of a vfio-user device: with one that is missing at the destination, or in another slot,
both sides report success.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vfio_user.client.control import ControlClient
from vfio_user.errors import CommandError, MigrationError
from vfio_user.live.offer import DeviceOffer, Offer
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.machine import Machine, MachineShape, PluggedFunction
from vfio_user.live.qemu.monitor import MIGRATING
from vfio_user.live.qemu.places import PlacedDevice, ServedDevice, config_image, find_used, find_waiting, names, which
from vfio_user.live.qemu.snapshot_files import Manifest, SavedDevice
from vfio_user.wire.constants import DeviceFeature, DeviceState

VERSION = 11
"""Major version of the QEMUs with which the recipe was measured."""
INCOMING = "inmigrate"


@dataclass(frozen=True, slots=True)
class DevicePair:
    """A device to move: ``name`` for messages, the control sockets of its two servers."""

    name: str
    source: ControlClient
    destination: ControlClient

    @property
    def here(self) -> ServedDevice:
        return ServedDevice(self.name, self.source)

    @property
    def there(self) -> ServedDevice:
        return ServedDevice(self.name, self.destination)


@dataclass(frozen=True, slots=True)
class MovingDevice:
    """A device of which all is known: what it is called, where it is in both machines, who serves it."""

    pair: DevicePair
    function: PluggedFunction


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


class Plan(Obstacles):
    """What is to move from ``source`` to ``destination``, and what stands against it.

    ``devices`` are those of ``pairs`` that were found, ``memory`` is the guest's in bytes. Nothing is changed but some
    registers of the destination's devices, only for a moment; ``debugger`` is the destination's.
    """

    def __init__(
        self,
        source: Machine,
        destination: Machine,
        pairs: Sequence[DevicePair],
        debugger: Debugger,
        *,
        shared_memory: bool = False,
        logs: bool = True,
    ) -> None:
        super().__init__([source, destination])
        self._source, self._destination, self._pairs = source, destination, pairs
        self._logs = logs
        self.devices: list[MovingDevice] = []
        self.memory = 0
        if self._known:
            self._look(
                self._machines(),
                _iommus(source) if logs else (),
                _leaving(source),
                _waiting(destination),
                _unshared(source),
                _unshared(destination),
                self._shared_files() if shared_memory else (),
                self._devices(),
            )
        if not self.obstacles:
            self._look(_unwritable(debugger, self._users_of_msix()))

    def _machines(self) -> Iterator[str]:
        here = self._source.shape()
        self.memory = here.memory
        yield from _shape_misfits(here, self._destination.shape())

    def _shared_files(self) -> Iterator[str]:
        files = self._source.memory_files()
        if "" in files:
            yield "the source's memory is in no named file, which is what shared memory needs: memory-backend-file"
        elif files != self._destination.memory_files():
            yield f"the destination's memory is not the source's: {', '.join(files)}"

    def _devices(self) -> Iterator[str]:
        obstacles = list(self._misfits())
        yield from obstacles
        if obstacles:
            return
        here, there = self._source.plugged(), self._destination.plugged()
        if {one.path for one in here} != {one.path for one in there}:
            yield f"the vfio-user devices differ: {names(here)} at the source, {names(there)} at the destination"
            return
        pairs = {pair.here: pair for pair in self._pairs}
        for placed in (yield from _place(self._source, here, [pair.here for pair in self._pairs])):
            pair = pairs[placed.served]
            if not find_waiting(self._destination, placed.function, [pair.there]):
                yield f"{pair.name}: the destination's control socket is not that of {placed.function.name} there"
            self.devices.append(MovingDevice(pair, placed.function))

    def _users_of_msix(self) -> Iterator[str]:
        return (one.function.name for one in self.devices if config_image(one.pair.source).uses_msix)

    def _misfits(self) -> Iterator[str]:
        for pair in self._pairs:
            here = yield from _examine(pair.here, "source")
            if here and self._logs and not pair.source.probe(DeviceFeature.DMA_LOGGING_START):
                yield f"{pair.name}: the source's device does not log what its DMA writes: move it with --cold"
            there = yield from _examine(pair.there, "destination")
            if here and there:
                yield from _offer_misfits(pair.name, here, there)


class SavePlan(Obstacles):
    """What is to be saved of ``source``, and what stands against it. Nothing is changed.

    ``devices`` are those of ``served`` that were found, ``offers`` what each of them is; ``qemu`` is QEMU's version and
    ``shape`` the machine's, None where it is not known.
    """

    def __init__(self, source: Machine, served: Sequence[ServedDevice]) -> None:
        super().__init__([source])
        self._source, self._served = source, served
        self.qemu = ""
        self.shape: MachineShape | None = None
        self.devices: list[PlacedDevice] = []
        self.offers: list[DeviceOffer] = []
        if self._known:
            self._look(self._machine(), self._devices())

    def _machine(self) -> Iterator[str]:
        self.qemu, self.shape = str(self._source.version()), self._source.shape()
        yield from _leaving(self._source)
        yield from _unshared(self._source)

    def _devices(self) -> Iterator[str]:
        offers = {}
        for one in self._served:
            offer = yield from _examine(one, "source")
            if offer is None:
                return
            offers[one] = offer
        self.devices = yield from _place(self._source, self._source.plugged(), self._served)
        self.offers = [offers[placed.served] for placed in self.devices]


class RestorePlan(Obstacles):
    """Who is to take which part of a snapshot at the ``destination``, and what stands against it.

    ``devices``: those of the snapshot, in its order, as far as they were found; ``memory`` in bytes. Nothing is changed
    but some registers of the destination's devices, only for a moment; ``debugger`` is the destination's.
    """

    def __init__(
        self, manifest: Manifest, destination: Machine, served: Sequence[ServedDevice], debugger: Debugger
    ) -> None:
        super().__init__([destination])
        self._manifest, self._destination, self._served = manifest, destination, served
        self.memory = manifest.machine.memory
        self.devices: list[PlacedDevice] = []
        if self._known:
            self._look(self._machine(), _waiting(destination), _unshared(destination), self._devices())
        if not self.obstacles:
            self._look(_unwritable(debugger, (one.name for one in manifest.devices if one.msix.size)))

    def _machine(self) -> Iterator[str]:
        yield from _shape_misfits(self._manifest.machine, self._destination.shape())

    def _devices(self) -> Iterator[str]:
        saved = self._manifest.devices
        plugged = {one.path: one for one in self._destination.plugged()}
        if {one.place for one in saved} != plugged.keys():
            yield (
                f"the vfio-user devices differ: {', '.join(one.name for one in saved) or 'none'} in the snapshot,"
                f" {names(plugged.values())} at the destination"
            )
            return
        offers = {}
        for one in self._served:
            offer = yield from _examine(one, "destination")
            if offer is None:
                return
            offers[one] = offer
        for device in saved:
            yield from self._find(device, plugged[device.place], offers)

    def _find(
        self, device: SavedDevice, function: PluggedFunction, offers: dict[ServedDevice, DeviceOffer]
    ) -> Iterator[str]:
        found = find_waiting(self._destination, function, self._served)
        if not found:
            yield f"no control socket is that of {function.name}: give it with --device"
        elif len(found) > 1:
            yield f"the control socket of {function.name} is given twice: {', '.join(one.name for one in found)}"
        else:
            yield from _offer_misfits(function.name, device.offer, offers[found[0]])
            self.devices.append(PlacedDevice(found[0], function))


# Machines


def _version(machine: Machine) -> Iterator[str]:
    found = machine.version()
    if found.major != VERSION:
        yield f"the {machine.name} QEMU is {found}: the recipe is known to work with {VERSION}.x only"


def _shape_misfits(here: MachineShape, there: MachineShape) -> Iterator[str]:
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


def _iommus(machine: Machine) -> Iterator[str]:
    if iommus := machine.iommus():
        yield (
            f"the guest has an IOMMU ({', '.join(iommus)}): what a device wrote where the guest has unmapped its"
            " memory since would be lost: move it with --cold"
        )


def _leaving(machine: Machine) -> Iterator[str]:
    """Of a QEMU whose guest is to leave it."""
    yield from (f"the {machine.name} QEMU says: {reason}" for reason in machine.monitor.migration().blocked_reasons)
    if (status := machine.monitor.status().status) not in ("running", "paused"):
        yield f"the {machine.name}'s guest is in state {status}: it must run, or be paused"
    if (going := machine.monitor.migration().status) in MIGRATING:
        yield f"the {machine.name} QEMU is migrating already ({going})"


def _waiting(machine: Machine) -> Iterator[str]:
    """Of a QEMU into which a guest is to come."""
    if (status := machine.monitor.status().status) != INCOMING:
        yield f"the {machine.name} QEMU waits for no guest (it is {status}): start it with -incoming defer -S"


def _unshared(machine: Machine) -> Iterator[str]:
    for name in machine.unshared_memory():
        yield f"memory {name} of the {machine.name} QEMU is not shared with the devices: give it share=on"


def _unwritable(debugger: Debugger, users: Iterable[str]) -> Iterator[str]:
    """Where MSI-X tables cannot be written: of a QEMU that waits, which is not disturbed by a try."""
    if users := list(users):
        try:
            debugger.check()
        except MigrationError as error:
            yield f"the MSI-X table of {', '.join(users)} cannot be written: {error}"


# Devices


def _examine(one: ServedDevice, role: str) -> Generator[str, None, DeviceOffer | None]:
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


def _offer_misfits(name: str, here: DeviceOffer, there: DeviceOffer) -> Iterator[str]:
    return (f"{name}: {what}" for what in Offer([here], []).misfits(Offer([there], [])))


def _place(
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
