"""Registers of a device by name: those of its config space, and those of its BARs if it is a known one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches

from vfio_user.device import Device
from vfio_user.devices import BUILT_IN, built_in
from vfio_user.errors import UsageError
from vfio_user.pci import (
    AdvancedErrorReporting,
    Bar,
    Capability,
    ConfigSpace,
    DeviceSerialNumber,
    MsiCapability,
    MsixCapability,
    PcieEndpoint,
    PowerManagement,
    Register,
    VendorSpecific,
    VendorSpecificExtended,
)
from vfio_user.pci.capabilities import CONFIG_SIZE
from vfio_user.tools.config_space import BAR0, HEADER_SIZE, Found, Snapshot, bars
from vfio_user.tools.location import Location, Name, region_name
from vfio_user.wire.constants import PciRegion

logger = logging.getLogger("vfio_user.tools")

_MSI_64, _MSI_MASKING = 1 << 7, 1 << 8
_SOME = 8
"""Names that are said in place of one that is not there."""
_SCANNED = 0x10000
"""Bytes of a BAR in which a device is asked for the names of its registers."""

_DECLARATIONS: Mapping[tuple[int, bool], Callable[[int], Capability]] = {
    (0x01, False): lambda control: PowerManagement(),
    (0x05, False): lambda control: MsiCapability(1, bool(control & _MSI_MASKING), bits64=bool(control & _MSI_64)),
    (0x09, False): lambda control: VendorSpecific(b""),
    (0x10, False): lambda control: PcieEndpoint(),
    (0x11, False): lambda control: MsixCapability(1, 0, 0, 0, 0x800),
    (0x01, True): lambda control: AdvancedErrorReporting(),
    (0x03, True): lambda control: DeviceSerialNumber(0),
    (0x0B, True): lambda control: VendorSpecificExtended(0, 0, b""),
}
"""What declares the registers of a capability: by its id and whether it is an extended one; from its control word."""


class Registers:
    """Where the registers of a device are, by names like ``config.command``, ``msix.control`` and ``bar0.status``.

    ``snapshot``: its config space, None if it has none. ``device``: one whose BARs are like its own, which is of no use
    afterwards; without it, a built-in device of the same ids.
    """

    def __init__(self, snapshot: Snapshot | None, device: Device | None = None) -> None:
        self._places: dict[str, Location] = {}
        if snapshot is not None:
            self._add(PciRegion.CONFIG, _header(snapshot))
            self._add(PciRegion.CONFIG, registers_of_capabilities(snapshot), prefix="")
            device = device or known_device(snapshot.value(0, 2), snapshot.value(2, 2))
        if device is not None:
            self._add_bars(device)

    def _add(self, region: int, registers: Iterable[Register], prefix: str | None = None) -> None:
        head = f"{region_name(region)}." if prefix is None else prefix
        for register in registers:
            self._places[head + register.name] = Location(region, register.offset, register.width)

    def _add_bars(self, device: Device) -> None:
        try:
            for bar in device.bars:
                self._add(bar, _of_bar(device, bar))
        except Exception:  # code of others, which says what is called how, and no more
            logger.info("%r names no registers", device, exc_info=True)
        finally:
            if callable(close := getattr(device, "close", None)):
                close()

    def names(self) -> list[str]:
        """All there are, in the order of their places."""
        return list(self._places)

    def find(self, name: Name) -> Location:
        """Where a register is; those of capabilities may be called ``config.msix.control``, too. Raises UsageError."""
        key = name.name.lower()
        place = self._places.get(key) or self._places.get(key.removeprefix("config."))
        if place is None:
            near = get_close_matches(key, self._places, 4) or self._alike(key)
            known = f"there are: {', '.join(near)}" if near else "those of config space have names, as config.command"
            raise UsageError(f"{name.name!r} is no register of this device; {known}")
        return place if name.width is None else Location(place.region, place.offset, name.width)

    def _alike(self, key: str) -> list[str]:
        """Some of those in the same place."""
        place = key.partition(".")[0]
        return [name for name in self._places if name.startswith(f"{place}.")][:_SOME]


def known_device(vendor_id: int, device_id: int) -> Device | None:
    """A built-in device of such ids, if there is one that can be made without options."""
    for name in BUILT_IN:
        device_class = built_in(name)
        if (device_class.vendor_id, device_class.device_id) == (vendor_id, device_id):
            try:
                return device_class()
            except Exception:  # it needs options, which nobody here knows
                return None
    return None


def _header(snapshot: Snapshot) -> Iterator[Register]:
    """Those of every header of type 0. A 64-bit BAR is one register."""
    declared = ConfigSpace(0xFFFF, 0xFFFF, interrupt_pin=1, rom_size=0x1000)
    for name, offset, width in _runs(lambda offset: declared.names(offset, 1), HEADER_SIZE):
        yield Register(offset, width, name)
    wide = {bar.index for bar in bars(snapshot) if bar.bits == 64}
    for index in range(PciRegion.BAR0, PciRegion.BAR5 + 1):
        if index - 1 not in wide:
            yield Register(BAR0 + 4 * index, Bar(0x1000, bits64=index in wide).width, f"bar{index}")


def _runs(names: Callable[[int], list[str]], size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, width) of the registers that have a name at each of their bytes."""
    there = {offset: found[0] for offset in range(size) if (found := names(offset))}
    for name in dict.fromkeys(there.values()):
        offsets = [offset for offset, other in there.items() if other == name]
        yield name, offsets[0], len(offsets)


def registers_of_capabilities(snapshot: Snapshot) -> Iterator[Register]:
    """Those of the capabilities; of several of one kind, all but the first are called by their offset, too."""
    taken: set[str] = set()
    for found in (*snapshot.capabilities, *snapshot.extended_capabilities):
        capability = _declaration(found, snapshot.value(found.offset + 2, 2))
        name = capability.name if capability else f"capability_{found.id:02x}"
        name = f"{name}@{found.offset:02x}" if name in taken else name
        taken.add(name)
        yield Register(found.offset, 2 if found.version is None else 4, f"{name}.header")
        for register in capability.registers() if capability else ():
            yield Register(found.offset + register.offset, register.width, f"{name}.{register.name}")


def _declaration(found: Found, control: int) -> Capability | None:
    make = _DECLARATIONS.get((found.id, found.offset >= CONFIG_SIZE))
    return make(control) if make else None


def _of_bar(device: Device, bar: int) -> Iterator[Register]:
    """Those that a device declares, and those that it names when it is asked."""
    declared = device.registers.get(bar, ())
    yield from declared
    seen = {register.name for register in declared}
    for offset in range(0, min(device.bars[bar].size, _SCANNED), 4):
        for name in device.register_names(bar, offset, 4):
            if name not in seen:
                seen.add(name)
                wide = list(device.register_names(bar, offset, 8)) == [name]
                yield Register(offset, 8 if wide else 4, name)
