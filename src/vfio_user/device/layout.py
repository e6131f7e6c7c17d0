"""From what a device class declares to the parts of its PCI function.

Each function reads the declaration from a class, to check it when the class is built, or from a device that is being
made, whose options may have changed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, TypeAlias

from vfio_user.pci import Bar, Capability, ConfigSpace, MsiCapability, MsixCapability
from vfio_user.pci.config_space import MIN_ROM
from vfio_user.wire.constants import PAGE_SIZE, MigrationFlags

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
    _check_types(declaration)
    _check_ids(declaration)
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


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("vendor_id", "device_id", "subsystem_vendor_id", "subsystem_id", "revision", "class_code"), int),
    **dict.fromkeys(("intx", "msi_vectors", "msi_masking", "msix_vectors", "pre_copy_limit", "state_version"), int),
    "msix_bar": (int, NoneType),
    "migration": int,
    "rom": (bytes, bytearray),
    "bars": Mapping,
    "capabilities": Sequence,
}
"""What the attributes of a device class must be."""


_BITS = {
    "vendor_id": 16,
    "device_id": 16,
    "subsystem_vendor_id": 16,
    "subsystem_id": 16,
    "revision": 8,
    "class_code": 24,
}
_NO_VENDORS = {0: "an empty slot", 1: "a device that is not ready", NO_ID: "no device"}
"""What these values of the vendor id tell whoever looks for devices."""


def _check_ids(declaration: Declaration) -> None:
    for name in ("vendor_id", "device_id"):
        if getattr(declaration, name) == NO_ID:
            remedy = "give it one, and not 0xffff (or abstract=True to a class that is a base of others)"
            raise ValueError(f"{name} is not set: {remedy}")
    if meaning := _NO_VENDORS.get(declaration.vendor_id):
        raise ValueError(f"vendor_id {declaration.vendor_id:#06x} means {meaning}: choose another")
    for name, bits in _BITS.items():
        value = getattr(declaration, name)
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} {value:#x} does not fit in {bits} bits")


def _check_types(declaration: Declaration) -> None:
    for name, kind in _TYPES.items():
        value = getattr(declaration, name)
        if not isinstance(value, kind):
            first = kind[0] if isinstance(kind, tuple) else kind
            article = "an" if first is int else "a"
            raise ValueError(f"{name} is {value!r}: it must be {article} {first.__name__}")
    bars: Iterable[tuple[object, object]] = declaration.bars.items()
    for index, bar in bars:
        if not isinstance(index, int) or not isinstance(bar, Bar):
            raise ValueError(f"bars: {index!r} is {bar!r}: it must be a Bar(size), by its index, 0 to 5")
    for capability in declaration.capabilities:
        if not isinstance(capability, Capability):
            raise ValueError(f"capabilities: {capability!r} is no instance of Capability: write (PcieEndpoint(),)")
        if isinstance(capability, (MsiCapability, MsixCapability)):
            raise ValueError(f"capabilities: {capability.name!r} comes by {capability.name}_vectors: drop it here")
    if not 0 <= declaration.state_version < 1 << 32:
        raise ValueError(f"state_version {declaration.state_version}: 0 to {(1 << 32) - 1} are possible")
    if declaration.migration and not declaration.migration & MigrationFlags.STOP_COPY:
        raise ValueError(f"migration is {declaration.migration!r}: add MigrationFlags.STOP_COPY")


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
