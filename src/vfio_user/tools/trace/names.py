"""What registers are called: those of config space as far as it was read by, those of BARs if the device is known."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vfio_user.device import Device
from vfio_user.pci import Bar, ConfigSpace, Register
from vfio_user.pci.capabilities import EXTENDED_CONFIG_SIZE
from vfio_user.tools.config_space import Snapshot
from vfio_user.tools.registers import known_device, registers_of_capabilities
from vfio_user.wire.constants import PciRegion
from vfio_user.wire.messages import Buffer

MAX_NAMES = 8
"""Registers that a message names."""

_HEADER = ConfigSpace(0xFFFF, 0xFFFF, interrupt_pin=1, bars={index: Bar(0x1000) for index in range(6)}, rom_size=0x1000)


class RegisterNames:
    """Names registers by what was :meth:`learned <learn>` from accesses that passed.

    ``device``: whose BARs these are; without one it is a built-in device, if its ids are seen in config space.
    """

    def __init__(self, device: Device | None = None) -> None:
        self._device = device
        self._shadow = bytearray(EXTENDED_CONFIG_SIZE)
        self._capabilities: list[Register] = []

    def learn(self, region: int, offset: int, data: Buffer) -> None:
        """Config space reads as ``data`` from ``offset`` on."""
        if region != PciRegion.CONFIG or offset >= len(self._shadow) or not len(data):
            return
        part = data[: len(self._shadow) - offset]
        if self._shadow[offset : offset + len(part)] == part:
            return
        self._shadow[offset : offset + len(part)] = part
        snapshot = Snapshot(bytes(self._shadow))
        self._capabilities = list(registers_of_capabilities(snapshot))
        if self._device is None and offset < 4:
            self._device = known_device(snapshot.value(0, 2), snapshot.value(2, 2))

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
