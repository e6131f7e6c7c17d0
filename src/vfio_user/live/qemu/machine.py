"""What there is in a QEMU: its vfio-user devices, their place on the PCI bus, and their config space.

Sources: QEMU's ``qapi/qom.json``, ``qapi/pci.json``, ``hmp-commands.hx``; the PCI Local Bus Specification 3.0, section
3.2.2.3.2 (configuration mechanism #1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Annotated

import msgspec

from vfio_user.live.qemu.config_image import COMMAND, POWER_STATE, ConfigWrite
from vfio_user.live.qemu.monitor import Monitor, MonitorError, RefusedError

DRIVER = "vfio-user-pci"
CONFIG_ADDRESS, CONFIG_DATA, CONFIG_ENABLE = 0xCF8, 0xCFC, 1 << 31
BUS_NUMBERS, _SPARE_BUS = 0x18, 0x80
HMP_WIDTHS = {1: "b", 2: "h", 4: "w"}
_PERIPHERALS = ("/machine/peripheral", "/machine/peripheral-anon")
_DEEPEST = 32
"""Bridges above a device: more cannot be, by the number of buses that there are for them."""
_WORDS = 1024
"""Of memory that are asked for at once: what QEMU prints of them is 12 KiB."""

Path = tuple[int, ...]
"""Where a function is whatever numbers its buses have: slot and function, as one number, of each bridge and its own."""


class _Property(msgspec.Struct, frozen=True):
    name: str
    type: str


class _Region(msgspec.Struct, frozen=True):
    bar: int
    size: int
    address: int = -1


class _Bus(msgspec.Struct, frozen=True):
    number: int
    secondary: int


class _Bridge(msgspec.Struct, frozen=True):
    bus: _Bus
    devices: list[_PciDevice] = []


class _Id(msgspec.Struct, frozen=True):
    vendor: int
    device: int


class _PciDevice(msgspec.Struct, frozen=True):
    bus: int
    slot: int
    function: int
    id: _Id
    regions: list[_Region] = []
    pci_bridge: _Bridge | None = None

    @property
    def devfn(self) -> int:
        return self.slot << 3 | self.function


class _PciBus(msgspec.Struct, frozen=True):
    bus: int
    devices: list[_PciDevice]


class _Backend(msgspec.Struct, frozen=True):
    size: int
    share: bool
    id: str = ""


class _MemorySize(msgspec.Struct, frozen=True, rename="kebab"):
    base_memory: int
    plugged_memory: int = 0


class Version(msgspec.Struct, frozen=True):
    """Of a QEMU."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"


class _Versions(msgspec.Struct, frozen=True):
    qemu: Version


Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Text = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^[ -~]*\Z")]
"""Of which nothing can drive a terminal."""


class MachineShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a machine must be the same where its guest goes to, besides its devices."""

    kind: Text
    """The machine's type with its version: ``pc-q35-11.1-machine``."""
    memory: Bytes
    backends: dict[Text, Bytes]
    """The objects that its memory is in: QEMU sends it by their ids."""


@dataclass(frozen=True, slots=True)
class PluggedFunction:
    """A vfio-user device of a machine. ``name`` is its id, or where it is."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class PciFunction:
    """A function on its bus, as the guest numbers it.

    ``ids``: vendor and, above it, device; ``bars``: the addresses of those that are mapped. Both as QEMU has them.
    """

    bus: int
    devfn: int
    ids: int = 0
    bars: frozenset[int] = frozenset()

    def config_address(self, offset: int) -> int:
        """What goes to the port 0xcf8 to select a register."""
        return CONFIG_ENABLE | self.bus << 16 | self.devfn << 8 | offset & ~3


class Machine:
    """The machine behind a monitor. Every call raises MonitorError."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    @property
    def name(self) -> str:
        return self.monitor.name

    # What it is

    def version(self) -> Version:
        """Of QEMU."""
        return self.monitor.ask(_Versions, "query-version").qemu

    def shape(self) -> MachineShape:
        """The machine's type and memory."""
        size = self.monitor.ask(_MemorySize, "query-memory-size-summary")
        return MachineShape(
            kind=self.monitor.ask(str, "qom-get", path="/machine", property="type"),
            memory=size.base_memory + size.plugged_memory,
            backends={one.id: one.size for one in self.monitor.ask(list[_Backend], "query-memdev")},
        )

    def unshared_memory(self) -> list[str]:
        """Ids of the RAM that device servers cannot map."""
        backends = self.monitor.ask(list[_Backend], "query-memdev")
        return [backend.id for backend in backends if not backend.share]

    def memory_files(self) -> list[str]:
        """The named file behind each of its RAM; empty text for what has none."""
        files = []
        for backend in self.monitor.ask(list[_Backend], "query-memdev"):
            try:
                files.append(self.monitor.ask(str, "qom-get", path=f"/objects/{backend.id}", property="mem-path"))
            except RefusedError:
                files.append("")
        return files

    def mapped_files(self) -> set[tuple[str, str]]:
        """Device and inode of the named files that its memory is in, as far as its process can be looked at from here:
        the same name may be another file's on another host.
        """
        names = {os.path.realpath(name) for name in self.memory_files() if name}
        try:
            maps = FilePath(f"/proc/{self.monitor.process}/maps").read_text(errors="replace").splitlines()
        except OSError:
            return set()
        mappings = (line.split(maxsplit=5) for line in maps)
        return {(fields[3], fields[4]) for fields in mappings if fields[-1] in names}

    def iommus(self) -> list[str]:
        """The drivers of what stands between its devices and the guest's memory."""
        kinds = (one.type[len("child<") : -1] for folder in _PERIPHERALS for one in self._children(folder))
        return [kind for kind in kinds if "iommu" in kind]

    def plugged(self) -> list[PluggedFunction]:
        """Its vfio-user devices."""
        return [
            self._function(f"{folder}/{one.name}", one.name)
            for folder in _PERIPHERALS
            for one in self._children(folder)
            if one.type == f"child<{DRIVER}>"
        ]

    def locate(self, path: Path) -> PciFunction:
        """The function at ``path`` with the bus number that it has now."""
        for bus in self.monitor.ask(list[_PciBus], "query-pci"):
            found = _descend(bus.devices, path)
            if found is not None:
                bars = frozenset(region.address for region in found.regions if region.address > 0)
                return PciFunction(found.bus, found.devfn, found.id.device << 16 | found.id.vendor, bars)
        raise MonitorError(f"the {self.name} QEMU has no PCI function at {path_text(path)}: are its bridges set up?")

    def _children(self, folder: str) -> list[_Property]:
        return self.monitor.ask(list[_Property], "qom-list", path=folder)

    def _function(self, node: str, name: str) -> PluggedFunction:
        path: list[int] = []
        bridge = node
        while len(path) < _DEEPEST:
            try:
                path.insert(0, self.monitor.ask(int, "qom-get", path=bridge, property="addr"))
            except RefusedError:
                break  # the host bridge has no address
            bus = self.monitor.ask(str, "qom-get", path=bridge, property="parent_bus")
            bridge = bus.rpartition("/")[0]
        where = path_text(tuple(path))
        return PluggedFunction(where if name.startswith("device[") else f"{name} at {where}", tuple(path))

    # What a guest's processor could do, by the human monitor

    def port_read(self, port: int, width: int = 4) -> int:
        """Read an I/O port."""
        text = self.monitor.hmp(f"i /{HMP_WIDTHS[width]} {port:#x}")
        found = re.search(r"= (0x[0-9a-f]{2,8})$", text)
        if found is None:
            raise MonitorError(f"the {self.name} QEMU reads a port as {text[:60]!r}")
        return int(found[1], 16)

    def port_write(self, port: int, value: int, width: int = 4) -> None:
        """Write an I/O port."""
        complaint = self.monitor.hmp(f"o /{HMP_WIDTHS[width]} {port:#x} {value:#x}")
        if complaint:
            raise MonitorError(f"the {self.name} QEMU refuses a write to port {port:#x}: {complaint}")

    def memory_words(self, address: int, count: int) -> list[int]:
        """Read words of 4 bytes at a guest-physical address; a device sees it as reads of its registers."""
        words: list[int] = []
        for at in range(0, count, _WORDS):
            wanted = min(_WORDS, count - at)
            text = self.monitor.hmp(f"xp /{wanted}xw {address + 4 * at:#x}")
            found = re.findall(r"(?<=\s)0x[0-9a-f]{8}", text)
            if len(found) != wanted:
                raise MonitorError(f"the {self.name} QEMU does not read memory at {address + 4 * at:#x}: {text[:60]!r}")
            words += [int(word, 16) for word in found]
        return words

    def config_address(self) -> int:
        """What the port 0xcf8 holds: which register the guest's processor has selected."""
        return self.port_read(CONFIG_ADDRESS)

    @contextmanager
    def borrowed_ports(self, address: int | None = None) -> Iterator[None]:
        """The ports of config space are ours within; they hold what they held, or ``address``, afterwards."""
        before = self.config_address() if address is None else address
        try:
            yield
        finally:
            self.port_write(CONFIG_ADDRESS, before)

    def config_read(self, function: PciFunction, offset: int, width: int = 4) -> int:
        """Read a function's register. Within :meth:`borrowed_ports`, as the next two."""
        self.port_write(CONFIG_ADDRESS, function.config_address(offset))
        return self.port_read(CONFIG_DATA + offset % 4, width)

    def config_write(self, function: PciFunction, write: ConfigWrite) -> None:
        """Write a function's register."""
        self.port_write(CONFIG_ADDRESS, function.config_address(write.offset))
        self.port_write(CONFIG_DATA + write.offset % 4, write.value, write.width)

    @contextmanager
    def numbered(self, path: Path) -> Iterator[PciFunction]:
        """The function at ``path`` of a machine that never ran: within, the bridges above it have bus numbers."""
        bridges = [PciFunction(_SPARE_BUS + level if level else 0, devfn) for level, devfn in enumerate(path[:-1])]
        with self.borrowed_ports():
            for number, bridge in enumerate(bridges, start=_SPARE_BUS + 1):
                self.config_write(bridge, ConfigWrite(BUS_NUMBERS, 4, 0xFF << 16 | number << 8 | bridge.bus))
            try:
                yield PciFunction(_SPARE_BUS + len(bridges) if bridges else 0, path[-1])
            finally:
                for bridge in reversed(bridges):
                    self.config_write(bridge, ConfigWrite(BUS_NUMBERS, 4, 0))

    @contextmanager
    def commanded(self, function: PciFunction, command: int, bits: int) -> Iterator[None]:
        """The COMMAND register, which is ``command``, has ``bits`` set within."""
        if command & bits == bits:
            yield
            return
        with self.borrowed_ports():
            self.config_write(function, ConfigWrite(COMMAND, 2, command | bits))
        try:
            yield
        finally:
            with self.borrowed_ports():
                self.config_write(function, ConfigWrite(COMMAND, 2, command))

    @contextmanager
    def awake(self, function: PciFunction, sleep: ConfigWrite | None) -> Iterator[None]:
        """A function that ``sleep`` has put to sleep, if it is not None, is awake within, and its BARs are mapped."""
        if sleep is None:
            yield
            return
        with self.borrowed_ports():
            self.config_write(function, replace(sleep, value=sleep.value & ~POWER_STATE))
        try:
            yield
        finally:
            with self.borrowed_ports():
                self.config_write(function, sleep)

    def barrier(self, function: PciFunction) -> None:
        """Return when the server of a function has all that QEMU sent it: two round trips, the second for interrupts.

        What QEMU posts to a server stays in order with what it asks it; of COMMAND it has not all bits itself.
        """
        with self.borrowed_ports():
            for _ in range(2):
                self.config_read(function, COMMAND)


def path_text(path: Path) -> str:
    """``02.0/00.0``: below the bridge in slot 2."""
    return "/".join(f"{devfn >> 3:02x}.{devfn & 7}" for devfn in path)


def _descend(devices: Sequence[_PciDevice], path: Path) -> _PciDevice | None:
    """Where ``path`` leads from a root bus."""
    found: _PciDevice | None = None
    for devfn in path:
        found = next((device for device in devices if device.devfn == devfn), None)
        if found is None:
            return None
        devices = found.pci_bridge.devices if found.pci_bridge else []
    return found
