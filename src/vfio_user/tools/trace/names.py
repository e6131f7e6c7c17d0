"""What registers are called: those of config space as far as it was read by, those of BARs if the device is known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from vfio_user.device import Device
from vfio_user.devices import BUILT_IN, built_in
from vfio_user.pci import Bar, Capability, ConfigSpace, MsiCapability, MsixCapability, PcieEndpoint, PowerManagement
from vfio_user.pci.capabilities import CONFIG_SIZE
from vfio_user.pci.registers import Register
from vfio_user.wire.constants import PciRegion
from vfio_user.wire.messages import Buffer

MAX_NAMES = 8
"""Registers that a message names."""

_STATUS, _CAP_LIST, _POINTER, _FIRST = 0x06, 0x10, 0x34, 0x40
_MSI_64, _MSI_MASKING = 1 << 7, 1 << 8
_SHAPE = _MSI_64 | _MSI_MASKING
"""The bits of a capability's control word that say which registers it has."""

_HEADER = ConfigSpace(0xFFFF, 0xFFFF, interrupt_pin=1, bars={index: Bar(0x1000) for index in range(6)}, rom_size=0x1000)

_CAPABILITIES: dict[int, Callable[[int], Capability]] = {
    0x01: lambda control: PowerManagement(),
    0x05: lambda control: MsiCapability(1, bool(control & _MSI_MASKING), bits64=bool(control & _MSI_64)),
    0x10: lambda control: PcieEndpoint(),
    0x11: lambda control: MsixCapability(1, 0, 0, 0, 0x800),
}
"""Capabilities whose registers have names, by id and control word."""


class RegisterNames:
    """Names registers by what was :meth:`learned <learn>` from accesses that passed.

    ``device``: whose BARs these are; without one it is a built-in device, if its ids are seen in config space.
    """

    def __init__(self, device: Device | None = None) -> None:
        self._device = device
        self._shadow = bytearray(CONFIG_SIZE)
        self._shape: tuple[tuple[int, int, int], ...] = ()
        self._capabilities: list[Register] = []

    def learn(self, region: int, offset: int, data: Buffer) -> None:
        """Config space reads as ``data`` from ``offset`` on."""
        if region != PciRegion.CONFIG or offset >= CONFIG_SIZE or not len(data):
            return
        part = data[: CONFIG_SIZE - offset]
        if self._shadow[offset : offset + len(part)] == part:
            return
        self._shadow[offset : offset + len(part)] = part
        shape = tuple(self._chain())
        if shape != self._shape:
            self._shape = shape
            self._capabilities = [register for one in shape for register in _placed(*one)]
        if self._device is None and offset < 4:
            self._device = _known_device(self._word(0), self._word(2))

    def names(self, region: int, offset: int, size: int) -> Sequence[str]:
        """The registers that an access touches, as far as they have names."""
        found = self._config(offset, size) if region == PciRegion.CONFIG else self._bar(region, offset, size)
        return found if len(found) <= MAX_NAMES else [*found[:MAX_NAMES], "..."]

    def _config(self, offset: int, size: int) -> list[str]:
        touched = (one for one in self._capabilities if one.offset < offset + size and offset < one.end)
        return [*_HEADER.names(offset, size), *(register.name for register in touched)]

    def _bar(self, region: int, offset: int, size: int) -> list[str]:
        if self._device is None:
            return []
        try:
            return [str(name) for name in self._device.register_names(region, offset, size)]
        except Exception:  # code of others, of which the trace does not depend
            logging.getLogger("vfio_user.tools").info("%r names no registers", self._device, exc_info=True)
            self._device = None
            return []

    def _word(self, offset: int) -> int:
        return int.from_bytes(self._shadow[offset : offset + 2], "little")

    def _chain(self) -> Iterator[tuple[int, int, int]]:
        """Offset, id and shape of each capability; a chain that runs in a circle ends where it closes."""
        offset = self._shadow[_POINTER] & ~3 if self._shadow[_STATUS] & _CAP_LIST else 0
        seen: set[int] = set()
        while offset >= _FIRST and offset not in seen:
            seen.add(offset)
            yield offset, self._shadow[offset], self._word(offset + 2) & _SHAPE
            offset = self._shadow[offset + 1] & ~3


def _known_device(vendor_id: int, device_id: int) -> Device | None:
    """A built-in device of such ids, if there is one that can be made without options."""
    for name in BUILT_IN:
        device_class = built_in(name)
        if (device_class.vendor_id, device_class.device_id) == (vendor_id, device_id):
            try:
                return device_class()
            except Exception:  # it needs options, which nobody here knows
                return None
    return None


def _placed(offset: int, id_: int, control: int) -> Iterator[Register]:
    make = _CAPABILITIES.get(id_)
    capability = make(control) if make else None
    name = capability.name if capability else f"capability_{id_:02x}@{offset:02x}"
    yield Register(offset, 2, f"{name}.header")
    for register in capability.registers() if capability else ():
        yield Register(offset + register.offset, register.width, f"{name}.{register.name}")
