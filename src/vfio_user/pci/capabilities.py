"""PCI capabilities as declarations: what they put into config space, and where.

Sources: PCI Local Bus specification 3.0, sections 6.7 (the list) and 6.8 (MSI, MSI-X); ``linux/pci_regs.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from vfio_user.pci.bars import NUM_BARS, Bar
from vfio_user.pci.registers import Register

MSI_ENABLE = 1 << 0
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENABLE = 1 << 15

MAX_MSI_VECTORS = 32
MAX_MSIX_VECTORS = 2048

_FIRST = 0x40
_END = 0x100
_ALIGNMENT = 4
_HEADER_SIZE = 2


class Capability:
    """One capability of the list: ``length`` bytes that begin with its ``id`` and a pointer to the next.

    Subclasses declare what follows in :meth:`registers`. ``name`` goes before the names of these registers in
    config space, with a dot between: ``"msix.control"``.
    """

    def __init__(self, id: int, length: int, name: str) -> None:
        if not 0 <= id <= 0xFF or not _HEADER_SIZE <= length <= _END - _FIRST:
            raise ValueError(f"capability {name!r}: an id of one byte and 2 to 192 bytes, not {id:#x} and {length}")
        self.id = id
        self.length = length
        self.name = name

    def registers(self) -> Sequence[Register]:
        """The registers behind the two bytes of the header, with offsets from the start of the capability."""
        return ()

    def check(self, bars: Mapping[int, Bar]) -> None:
        """Raise ValueError if this capability does not go with the function's BARs."""


class MsiCapability(Capability):
    """MSI with 64-bit addresses. ``vectors``: a power of two, 1 to 32.

    With ``per_vector_masking`` come a mask register and a pending register, which shows ``pending()``, bit n
    for vector n.
    """

    def __init__(
        self,
        vectors: int = 1,
        per_vector_masking: bool = False,
        *,
        pending: Callable[[], int] | None = None,
    ) -> None:
        if vectors.bit_count() != 1 or not 1 <= vectors <= MAX_MSI_VECTORS:
            raise ValueError(f"MSI vectors: a power of two, 1 to {MAX_MSI_VECTORS}, not {vectors}")
        super().__init__(0x05, 0x18 if per_vector_masking else 0x0E, "msi")
        self.vectors = vectors
        self.per_vector_masking = per_vector_masking
        self._pending = pending

    def registers(self) -> Sequence[Register]:
        capable = (self.vectors.bit_length() - 1) << 1 | 1 << 7 | self.per_vector_masking << 8
        message = (
            Register(0x02, 2, "control", reset=capable, writable=MSI_ENABLE | 0b111 << 4),
            Register(0x04, 8, "address", writable=(1 << 64) - 4),
            Register(0x0C, 2, "data", writable=0xFFFF),
        )
        masking = (
            Register(0x10, 4, "mask", writable=(1 << self.vectors) - 1),
            Register(0x14, 4, "pending", on_read=self._pending),
        )
        return message + masking if self.per_vector_masking else message


class MsixCapability(Capability):
    """MSI-X: 1 to 2048 vectors, with table and pending bit array (PBA) in memory BARs, at multiples of 8."""

    def __init__(self, vectors: int, table_bar: int, table_offset: int, pba_bar: int, pba_offset: int) -> None:
        if not 1 <= vectors <= MAX_MSIX_VECTORS:
            raise ValueError(f"MSI-X vectors: 1 to {MAX_MSIX_VECTORS}, not {vectors}")
        super().__init__(0x11, 0x0C, "msix")
        self.vectors = vectors
        self.table_bar, self.table_offset = table_bar, table_offset
        self.pba_bar, self.pba_offset = pba_bar, pba_offset
        for what, bar, offset, _ in self._structures():
            if not 0 <= bar < NUM_BARS or offset % 8 or not 0 <= offset < 1 << 32:
                raise ValueError(f"MSI-X {what} at {offset:#x} of BAR {bar}: BARs are 0 to 5, offsets multiples of 8")
        if table_bar == pba_bar and -self.pba_size < pba_offset - table_offset < self.table_size:
            raise ValueError(f"MSI-X table and PBA overlap in BAR {pba_bar}: move the PBA out of the table")

    @property
    def table_size(self) -> int:
        """Bytes of the table: 16 per vector."""
        return 16 * self.vectors

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bit array: whole 64-bit words."""
        return (self.vectors + 63) // 64 * 8

    def registers(self) -> Sequence[Register]:
        return (
            Register(0x02, 2, "control", reset=self.vectors - 1, writable=MSIX_FUNCTION_MASK | MSIX_ENABLE),
            Register(0x04, 4, "table", reset=self.table_offset | self.table_bar),
            Register(0x08, 4, "pba", reset=self.pba_offset | self.pba_bar),
        )

    def check(self, bars: Mapping[int, Bar]) -> None:
        for what, index, offset, size in self._structures():
            bar = bars.get(index)
            if bar is None or bar.io or offset + size > bar.size:
                raise ValueError(f"MSI-X {what}: no {size} bytes at {offset:#x} of a memory BAR {index}")
            if not bar.traps(offset, size):
                raise ValueError(
                    f"MSI-X {what}: a client that maps BAR {index} would bypass the device:"
                    f" add ({offset:#x}, {size:#x}) to its trapped ranges"
                )

    def _structures(self) -> Iterator[tuple[str, int, int, int]]:
        yield "table", self.table_bar, self.table_offset, self.table_size
        yield "PBA", self.pba_bar, self.pba_offset, self.pba_size


def first_capability(capabilities: Sequence[Capability]) -> int:
    """The offset of the first capability in config space; 0 without any."""
    return _FIRST if capabilities else 0


def capability_registers(capabilities: Sequence[Capability]) -> Iterator[Register]:
    """The registers of a list of capabilities, one behind the other and chained, by offset in config space.

    Raises ValueError if the list does not fit below 0x100.
    """
    offset = _FIRST
    for position, capability in enumerate(capabilities):
        end = -(-(offset + capability.length) // _ALIGNMENT) * _ALIGNMENT
        if end > _END:
            raise ValueError(f"capability {capability.name!r} ends at {end:#x}, behind {_END:#x}: drop one")
        following = end if position + 1 < len(capabilities) else 0
        yield Register(offset, _HEADER_SIZE, f"{capability.name}.header", reset=capability.id | following << 8)
        for register in capability.registers():
            yield _placed(capability, register, offset)
        offset = end


def _placed(capability: Capability, register: Register, base: int) -> Register:
    if register.offset < _HEADER_SIZE or register.end > capability.length:
        raise ValueError(f"{register} is not inside the {capability.length} bytes of {capability.name!r}")
    return replace(register, offset=base + register.offset, name=f"{capability.name}.{register.name}")
