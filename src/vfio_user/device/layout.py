"""From what a device class declares to the parts of its PCI function.

Each function reads the declaration from a class, to check it when the class is built, or from a device that is being
made, whose options may have changed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from vfio_user.pci import Bar, Capability, ConfigSpace, MsiCapability, MsixCapability
from vfio_user.pci.config_space import MIN_ROM
from vfio_user.wire.constants import PAGE_SIZE

if TYPE_CHECKING:
    from vfio_user.device.device import Device

    Declaration: TypeAlias = Device | type[Device]

NO_ID = 0xFFFF
"""What reads where no device is."""


def irq_counts(declaration: Declaration) -> tuple[int, int, int, int, int]:
    """Vectors of INTX, MSI, MSIX, ERR and REQ."""
    return (int(declaration.intx), declaration.msi_vectors, declaration.msix_vectors, 1, 1)


def config_space(
    declaration: Declaration,
    *,
    msi_pending: Callable[[], int] | None = None,
    on_flr: Callable[[], None] = lambda: None,
) -> ConfigSpace:
    """Config space with all BARs and capabilities, also those that the vectors ask for.

    Raises ValueError for what cannot be carried out.
    """
    for name in ("vendor_id", "device_id"):
        if getattr(declaration, name) == NO_ID:
            raise ValueError(f"{name} is not set: give it one (or abstract=True to a class that is a base of others)")
    bars, capabilities = dict(declaration.bars), list(declaration.capabilities)
    if declaration.msi_vectors:
        capabilities.append(MsiCapability(declaration.msi_vectors, declaration.msi_masking, pending=msi_pending))
    if declaration.msix_vectors:
        capabilities.append(_msix(bars, declaration.msix_vectors, declaration.msix_bar))
    return ConfigSpace(
        declaration.vendor_id,
        declaration.device_id,
        revision=declaration.revision,
        class_code=declaration.class_code,
        subsystem_vendor_id=declaration.subsystem_vendor_id,
        subsystem_id=declaration.subsystem_id,
        interrupt_pin=int(declaration.intx),
        bars=bars,
        rom_size=_rom_size(declaration.rom),
        capabilities=capabilities,
        on_flr=on_flr,
    )


def msix_of(capabilities: tuple[Capability, ...]) -> MsixCapability | None:
    """The MSI-X capability, if there is one."""
    return next((one for one in capabilities if isinstance(one, MsixCapability)), None)


def _rom_size(rom: bytes) -> int:
    return max(MIN_ROM, 1 << (len(rom) - 1).bit_length()) if rom else 0


def _msix(bars: dict[int, Bar], vectors: int, wished: int | None) -> MsixCapability:
    """Table and pending bits in ``wished``, or in a BAR of their own, which is added to ``bars``."""
    pending = _round_up(16 * vectors, PAGE_SIZE // 2)
    index = _free_bar(bars) if wished is None else wished
    if index not in bars:
        size = _round_up(pending + vectors // 8 + 8, PAGE_SIZE)
        bars[index] = Bar(1 << (size - 1).bit_length())
    return MsixCapability(vectors, index, 0, index, pending)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _free_bar(bars: Mapping[int, Bar]) -> int:
    taken = {index + part for index, bar in bars.items() for part in range(2 if bar.bits64 else 1)}
    for index in range(6):
        if index not in taken:
            return index
    raise ValueError("no BAR is left for the MSI-X table: set msix_bar to one that has room")
