"""Does it fit? Which control socket is which device's, and what stands against moving a guest: before anything changes.

QEMU itself compares nothing of a vfio-user device: with one that is missing at the destination, or in another slot,
both sides report success.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from vfio_user.client.control import ControlClient
from vfio_user.errors import CommandError, MigrationError
from vfio_user.live.offer import DeviceOffer, Offer
from vfio_user.live.qemu.config_image import COMMAND_MEMORY, INTERRUPT_LINE, SIZE, ConfigImage, ConfigWrite
from vfio_user.live.qemu.machine import Machine, PluggedFunction
from vfio_user.wire.constants import DeviceFeature, DeviceState, PciRegion

VERSION = 11
"""Major version of the QEMUs with which the recipe was measured."""
MARK = 0xA5
"""Written to the interrupt line register of a destination's device, which means nothing but to the guest."""
INCOMING = "inmigrate"


class _Numbers(msgspec.Struct, frozen=True):
    major: int
    minor: int
    micro: int


class _Version(msgspec.Struct, frozen=True):
    qemu: _Numbers


@dataclass(frozen=True, slots=True)
class DevicePair:
    """A device to move: ``name`` for messages, the control sockets of its two servers."""

    name: str
    source: ControlClient
    destination: ControlClient


@dataclass(frozen=True, slots=True)
class MovingDevice:
    """A device of which all is known: what it is called, where it is in both machines, who serves it."""

    pair: DevicePair
    function: PluggedFunction


def config_image(control: ControlClient) -> ConfigImage:
    """A device's config space, as its server has it."""
    return ConfigImage(control.region_read(PciRegion.CONFIG, 0, SIZE))


class Plan:
    """What is to move from ``source`` to ``destination``, and what stands against it.

    ``obstacles``: a sentence each, with what to change. ``devices`` are those of ``pairs`` that were found, ``memory``
    is the guest's in bytes. Nothing is changed but some registers of the destination's devices, only for a moment.
    """

    def __init__(
        self,
        source: Machine,
        destination: Machine,
        pairs: Sequence[DevicePair],
        *,
        shared_memory: bool = False,
        logs: bool = True,
    ) -> None:
        self._source, self._destination, self._pairs = source, destination, pairs
        self._logs = logs
        self.obstacles: list[str] = []
        self.devices: list[MovingDevice] = []
        self.memory = 0
        self._look(self._versions)
        if self.obstacles:  # of another QEMU nothing else would be true
            return
        for part in (self._machines, self._states, lambda: self._memory(shared_memory), self._devices):
            self._look(part)

    def check(self) -> None:
        """Raise MigrationError if something stands against it."""
        if self.obstacles:
            raise MigrationError("; ".join(self.obstacles))

    def _look(self, part: Callable[[], Iterable[str]]) -> None:
        try:
            self.obstacles += part()
        except MigrationError as error:
            self.obstacles.append(str(error))

    def _versions(self) -> Iterator[str]:
        for machine in (self._source, self._destination):
            found = machine.monitor.ask(_Version, "query-version").qemu
            if found.major != VERSION:
                number = f"{found.major}.{found.minor}.{found.micro}"
                yield f"the {machine.name} QEMU is {number}: the recipe is known to work with {VERSION}.x only"

    def _machines(self) -> Iterator[str]:
        here, there = self._source.kind(), self._destination.kind()
        if here != there:
            yield (
                f"the machines differ, {here} and {there}: start the destination with -machine"
                f" {here.removesuffix('-machine')}"
            )
        if self._logs and (iommus := self._source.iommus()):
            yield (
                f"the guest has an IOMMU ({', '.join(iommus)}): what a device wrote where the guest has unmapped its"
                " memory since would be lost: move it with --cold"
            )
        blocked = self._source.monitor.migration().blocked_reasons
        yield from (f"the source QEMU says: {reason}" for reason in blocked)

    def _states(self) -> Iterator[str]:
        if (status := self._source.monitor.status().status) not in ("running", "paused"):
            yield f"the source's guest is in state {status}: it must run, or be paused"
        if (going := self._source.monitor.migration().status) in ("setup", "active", "pre-switchover", "device"):
            yield f"the source QEMU is migrating already ({going})"
        if (status := self._destination.monitor.status().status) != INCOMING:
            yield f"the destination QEMU waits for no guest (it is {status}): start it with -incoming defer -S"

    def _memory(self, shared: bool) -> Iterator[str]:
        here, there = self._source.memory_size(), self._destination.memory_size()
        self.memory = here
        if here != there:
            yield f"the source has {here >> 20} MiB of memory, the destination {there >> 20}: start it with -m {here}B"
        for machine in (self._source, self._destination):
            for name in machine.unshared_memory():
                yield f"memory {name} of the {machine.name} QEMU is not shared with the devices: give it share=on"
        if not shared:
            return
        files = self._source.memory_files()
        if "" in files:
            yield "the source's memory is in no named file, which is what shared memory needs: memory-backend-file"
        elif files != self._destination.memory_files():
            yield f"the destination's memory is not the source's: {', '.join(files)}"

    # Devices

    def _devices(self) -> Iterator[str]:
        obstacles = list(self._misfits())
        yield from obstacles
        if obstacles:
            return
        here, there = self._source.plugged(), self._destination.plugged()
        if {one.path for one in here} != {one.path for one in there}:
            yield f"the vfio-user devices differ: {_names(here)} at the source, {_names(there)} at the destination"
            return
        found = {}
        for pair in self._pairs:
            matching = find_source(self._source, pair.source, here)
            if len(matching) != 1:
                yield f"{pair.name}: the source's control socket is that of {_which(matching)}"
                continue
            (function,) = matching
            if function.path in found:
                yield f"{pair.name}: {function.name} is given twice"
            elif not self._is_destination(pair.destination, function):
                yield f"{pair.name}: the destination's control socket is not that of {function.name} there"
            found[function.path] = MovingDevice(pair, function)
        missing = [one for one in here if one.path not in found]
        if missing and len(found) == len(self._pairs):
            yield f"{_names(missing)} would be lost: give its control sockets with --device, too"
        self.devices = list(found.values())

    def _misfits(self) -> Iterator[str]:
        for pair in self._pairs:
            offers = []
            for control, role in ((pair.source, "source"), (pair.destination, "destination")):
                try:
                    offers.append(DeviceOffer.of(control))
                    state = control.migration_get_state()
                    if role == "source" and self._logs and not control.probe(DeviceFeature.DMA_LOGGING_START):
                        yield f"{pair.name}: the source's device does not log what its DMA writes: move it with --cold"
                except (MigrationError, CommandError) as error:
                    yield f"{pair.name}: at the {role} {error}"
                    continue
                if state is not DeviceState.RUNNING:
                    yield f"{pair.name}: the device of the {role} is in state {state.name}, not RUNNING"
                if not control.status().connected:
                    yield f"{pair.name}: no QEMU is connected to the {role}'s server"
            if len(offers) == 2:
                yield from (f"{pair.name}: {what}" for what in Offer(offers[:1], []).misfits(Offer(offers[1:], [])))

    def _is_destination(self, control: ControlClient, plugged: PluggedFunction) -> bool:
        """By a register without effect, which is written through QEMU and read from the server."""
        machine = self._destination
        with machine.numbered(plugged.path) as function:
            before = config_image(control).data[INTERRUPT_LINE]
            machine.config_write(function, ConfigWrite(INTERRUPT_LINE, 1, before ^ MARK))
            try:
                return config_image(control).data[INTERRUPT_LINE] == before ^ MARK
            finally:
                machine.config_write(function, ConfigWrite(INTERRUPT_LINE, 1, before))


def find_source(machine: Machine, control: ControlClient, plugged: Sequence[PluggedFunction]) -> list[PluggedFunction]:
    """Of which device a control socket can be: by where the guest has mapped BARs, which QEMU and server know both."""
    image = config_image(control)
    mapped = {bar.address for bar in image.bars} if image.command & COMMAND_MEMORY else None

    def fits(one: PluggedFunction) -> bool:
        function = machine.locate(one.path)
        return image.number(0, 4) == function.ids and (mapped is None or function.bars <= mapped)

    return [one for one in plugged if fits(one)]


def _names(functions: Iterable[PluggedFunction]) -> str:
    return ", ".join(one.name for one in functions) or "none"


def _which(matching: Sequence[PluggedFunction]) -> str:
    if not matching:
        return "none of its vfio-user devices"
    return f"any of {_names(matching)}, which look the same as long as the guest has not set them up"
