"""Does it fit? What moves from one machine to another, and what stands against it: all before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vfio_user.client.control import ControlClient
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.machine import Machine, PluggedFunction
from vfio_user.live.qemu.obstacles import (
    Obstacles,
    examine,
    iommu_in_the_way,
    not_leaving,
    not_waiting,
    offer_misfits,
    place_used,
    shape_misfits,
    unshared,
    unwritable,
)
from vfio_user.live.qemu.places import ServedDevice, config_image, find_waiting, names
from vfio_user.wire.constants import DeviceFeature


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
                iommu_in_the_way(source) if logs else (),
                not_leaving(source),
                not_waiting(destination),
                unshared(source),
                unshared(destination),
                self._shared_files() if shared_memory else self._same_files(),
                self._devices(),
            )
        if not self.obstacles:
            self._look(unwritable(debugger, self._users_of_msix()))

    def _machines(self) -> Iterator[str]:
        here = self._source.shape()
        self.memory = here.memory
        yield from shape_misfits(here, self._destination.shape())

    def _shared_files(self) -> Iterator[str]:
        files = self._source.memory_files()
        if "" in files:
            yield "the source's memory is in no named file, which is what shared memory needs: memory-backend-file"
        elif files != self._destination.memory_files():
            yield f"the destination's memory is not the source's: {', '.join(files)}"

    def _same_files(self) -> Iterator[str]:
        if self._source.mapped_files() & self._destination.mapped_files():
            yield (
                "both QEMUs have their memory in the same file, and would write over each other's:"
                " move it with --shared-memory, or give the destination a file of its own"
            )

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
        for placed in (yield from place_used(self._source, here, [pair.here for pair in self._pairs])):
            pair = pairs[placed.served]
            if not find_waiting(self._destination, placed.function, [pair.there]):
                yield f"{pair.name}: the destination's control socket is not that of {placed.function.name} there"
            self.devices.append(MovingDevice(pair, placed.function))

    def _users_of_msix(self) -> Iterator[str]:
        return (one.function.name for one in self.devices if config_image(one.pair.source).uses_msix)

    def _misfits(self) -> Iterator[str]:
        for pair in self._pairs:
            here = yield from examine(pair.here, "source")
            if here and self._logs and not pair.source.probe(DeviceFeature.DMA_LOGGING_START):
                yield f"{pair.name}: the source's device does not log what its DMA writes: move it with --cold"
            there = yield from examine(pair.there, "destination")
            if here and there:
                yield from offer_misfits(pair.name, here, there)
