"""A config space as bytes: what a VMM must be told of it again, and where the device's BARs and tables are.

Sources: PCI Local Bus Specification 3.0, sections 6.1 (header), 6.2.5 (BARs), 6.7 and 6.8 (capabilities, MSI, MSI-X);
PCI Bus Power Management Interface Specification 1.2, section 3.2.4 (PMCSR).

Of what is beyond 256 bytes a VMM keeps nothing of its own but the list: it is in the device's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SIZE = 256
COMMAND, STATUS, CACHE_LINE_SIZE, BAR0, ROM, CAPABILITIES = 0x04, 0x06, 0x0C, 0x10, 0x30, 0x34
INTERRUPT_LINE, INTERRUPT_PIN = 0x3C, 0x3D
COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_DISABLE = 1 << 1, 1 << 2, 1 << 10
STATUS_CAPABILITIES = 0x10
BAR_COUNT, BAR_IO, BAR_64BIT, ROM_ENABLED = 6, 1, 4, 1
CAP_POWER, CAP_MSI, CAP_MSIX = 0x01, 0x05, 0x11
POWER_CONTROL, POWER_STATE, POWER_NO_SOFT_RESET = 4, 0x3, 1 << 3
POWER_EVENT = 1 << 15
"""A write of 1 clears it."""
MSI_ENABLE, MSI_64BIT, MSI_MASKABLE = 1 << 0, 1 << 7, 1 << 8
MSIX_VECTORS, MSIX_FUNCTION_MASK, MSIX_ENABLE = 0x7FF, 1 << 14, 1 << 15
MSIX_ENTRY = 16
_MOST_CAPABILITIES = (SIZE - 0x40) // 4
_SHORTEST = {CAP_POWER: 8, CAP_MSI: 12, CAP_MSIX: 12}
"""Bytes of the capabilities that are asked for, at least: a longer one that leaves the config space is cut."""


@dataclass(frozen=True, slots=True)
class ConfigWrite:
    """A write of ``width`` bytes, 1, 2 or 4."""

    offset: int
    width: int
    value: int


@dataclass(frozen=True, slots=True)
class BarAddress:
    """Where a BAR is mapped."""

    bar: int
    address: int
    io: bool


@dataclass(frozen=True, slots=True)
class MsixTable:
    """Where a device's MSI-X table is, and how it is enabled. ``offset`` in bytes, into the BAR."""

    bar: int
    offset: int
    vectors: int
    control: int

    @property
    def size(self) -> int:
        return self.vectors * MSIX_ENTRY


@dataclass(frozen=True, slots=True)
class ConfigImage:
    """The first 256 bytes of a function's config space."""

    data: bytes

    def number(self, offset: int, width: int) -> int:
        """The register of ``width`` bytes at ``offset``."""
        return int.from_bytes(self.data[offset : offset + width], "little")

    @property
    def command(self) -> int:
        return self.number(COMMAND, 2)

    @property
    def has_intx(self) -> bool:
        return self.data[INTERRUPT_PIN] != 0

    @property
    def message_signalled(self) -> bool:
        """Whether the guest has enabled MSI or MSI-X: then INTx is out of use."""
        at = self._capability(CAP_MSI)
        msi = at is not None and bool(self.number(at + 2, 2) & MSI_ENABLE)
        return msi or self.uses_msix

    @property
    def uses_msix(self) -> bool:
        """Whether the guest has enabled MSI-X."""
        return self.msix is not None and bool(self.msix.control & MSIX_ENABLE)

    @property
    def sleep(self) -> ConfigWrite | None:
        """What has put the device to sleep, where it has no BAR mapped any more; None: it is awake."""
        at = self._capability(CAP_POWER)
        control = 0 if at is None else self.number(at + POWER_CONTROL, 2)
        if at is None or not control & POWER_STATE:
            return None
        return ConfigWrite(at + POWER_CONTROL, 2, control & ~POWER_EVENT)

    @property
    def bars(self) -> tuple[BarAddress, ...]:
        """The BARs that have an address."""
        found, bar = [], 0
        while bar < BAR_COUNT:
            number, low = bar, self.number(BAR0 + 4 * bar, 4)
            bar += 1
            io = bool(low & BAR_IO)
            address = low & (~0x3 if io else ~0xF)
            if not io and low & BAR_64BIT and bar < BAR_COUNT:
                address |= self.number(BAR0 + 4 * bar, 4) << 32
                bar += 1
            if address:
                found.append(BarAddress(number, address, io))
        return tuple(found)

    def address_of(self, bar: int) -> int | None:
        """Where a memory BAR is mapped, None: nowhere."""
        return next((one.address for one in self.bars if one.bar == bar and not one.io), None)

    @property
    def msix(self) -> MsixTable | None:
        at = self._capability(CAP_MSIX)
        if at is None:
            return None
        control, table = self.number(at + 2, 2), self.number(at + 4, 4)
        return MsixTable(table & 7, table & ~7, (control & MSIX_VECTORS) + 1, control)

    def writes(self) -> Iterator[ConfigWrite]:
        """What makes the copy of a VMM that was just started equal to this; after it comes :meth:`msix_control`."""
        offsets = [offset for offset in range(BAR0, BAR0 + 4 * BAR_COUNT, 4) if self.number(offset, 4)]
        if self.data[ROM] & ROM_ENABLED:
            offsets.append(ROM)
        yield from (self._write(offset, 4) for offset in offsets)
        yield self._write(INTERRUPT_LINE, 1)
        yield self._write(CACHE_LINE_SIZE, 1)
        yield self._write(COMMAND, 2)
        yield from (write for write in self._msi() if write.offset + write.width <= SIZE)

    def msix_control(self) -> Iterator[ConfigWrite]:
        """What enables MSI-X, as far as it was enabled."""
        at = self._capability(CAP_MSIX)
        if at is not None:
            yield self._write(at + 2, 2)

    def _msi(self) -> Iterator[ConfigWrite]:
        """Address, data and mask, and then control, which has effects."""
        at = self._capability(CAP_MSI)
        if at is None:
            return
        control = self.number(at + 2, 2)
        data = at + (12 if control & MSI_64BIT else 8)
        yield self._write(at + 4, 4)
        if control & MSI_64BIT:
            yield self._write(at + 8, 4)
        yield self._write(data, 2)
        if control & MSI_MASKABLE:
            yield self._write(data + 4, 4)
        yield self._write(at + 2, 2)

    def _write(self, offset: int, width: int) -> ConfigWrite:
        return ConfigWrite(offset, width, self.number(offset, width))

    def _capability(self, wanted: int) -> int | None:
        """Where a capability is, if the device has it and all of it can be in the image."""
        if not self.number(STATUS, 2) & STATUS_CAPABILITIES:
            return None
        at = self.data[CAPABILITIES] & ~3
        for _ in range(_MOST_CAPABILITIES):
            if not 0x40 <= at < SIZE:
                return None
            if self.data[at] == wanted:
                return at if at + _SHORTEST[wanted] <= SIZE else None
            at = self.data[at + 1] & ~3
        return None
