"""Does it fit? What is saved of a machine or restored in one, and what stands against it: before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vfio_user.live.offer import DeviceOffer
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.machine import Machine, MachineShape, PluggedFunction
from vfio_user.live.qemu.obstacles import (
    Obstacles,
    examine,
    not_leaving,
    not_waiting,
    offer_misfits,
    place_used,
    shape_misfits,
    unshared,
    unwritable,
)
from vfio_user.live.qemu.places import PlacedDevice, ServedDevice, find_waiting, names
from vfio_user.live.qemu.snapshot_files import Manifest, SavedDevice


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
        yield from not_leaving(self._source)
        yield from unshared(self._source)

    def _devices(self) -> Iterator[str]:
        offers = {}
        for one in self._served:
            offer = yield from examine(one, "source")
            if offer is None:
                return
            offers[one] = offer
        self.devices = yield from place_used(self._source, self._source.plugged(), self._served)
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
            self._look(self._machine(), not_waiting(destination), unshared(destination), self._devices())
        if not self.obstacles:
            self._look(unwritable(debugger, (one.name for one in manifest.devices if one.msix.size)))

    def _machine(self) -> Iterator[str]:
        yield from shape_misfits(self._manifest.machine, self._destination.shape())

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
            offer = yield from examine(one, "destination")
            if offer is None:
                return
            offers[one] = offer
        for device in saved:
            yield from self._find(device, plugged[device.place], offers)
        if len(self.devices) == len(saved):
            taken = {placed.served for placed in self.devices}
            yield from (f"{one.name} is no device of the destination's" for one in self._served if one not in taken)

    def _find(
        self, device: SavedDevice, function: PluggedFunction, offers: dict[ServedDevice, DeviceOffer]
    ) -> Iterator[str]:
        found = find_waiting(self._destination, function, self._served)
        if not found:
            yield f"no control socket is that of {function.name}: give it with --device"
        elif len(found) > 1:
            yield f"the control socket of {function.name} is given twice: {', '.join(one.name for one in found)}"
        else:
            yield from offer_misfits(function.name, device.offer, offers[found[0]])
            self.devices.append(PlacedDevice(found[0], function))
