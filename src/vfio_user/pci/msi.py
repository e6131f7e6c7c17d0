"""MSI and MSI-X: their capabilities, and the table of MSI-X with its pending bits behind a BAR.

Sources: PCI Local Bus specification 3.0, section 6.8; ``linux/pci_regs.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from vfio_user.pci.bars import NUM_BARS, Bar
from vfio_user.pci.capabilities import Capability
from vfio_user.pci.registers import Buffer, Register, RegisterFile

MSI_ENABLE = 1 << 0
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENABLE = 1 << 15

MAX_MSI_VECTORS = 32
MAX_MSIX_VECTORS = 2048


class MsiCapability(Capability):
    """MSI, with addresses of 64 bits or, without ``bits64``, 32. ``vectors``: a power of two, 1 to 32.

    With ``per_vector_masking`` come a mask register and a pending register, which shows ``pending()``, bit n
    for vector n.
    """

    def __init__(
        self,
        vectors: int = 1,
        per_vector_masking: bool = False,
        *,
        bits64: bool = True,
        pending: Callable[[], int] | None = None,
    ) -> None:
        if vectors.bit_count() != 1 or not 1 <= vectors <= MAX_MSI_VECTORS:
            raise ValueError(f"MSI vectors: a power of two, 1 to {MAX_MSI_VECTORS}, not {vectors}")
        self._address_width = 8 if bits64 else 4
        super().__init__(0x05, self._address_width + (16 if per_vector_masking else 6), "msi")
        self.vectors = vectors
        self.per_vector_masking = per_vector_masking
        self._pending = pending

    def registers(self) -> Sequence[Register]:
        width = self._address_width
        capable = (self.vectors.bit_length() - 1) << 1 | (width == 8) << 7 | self.per_vector_masking << 8
        message = (
            Register(2, 2, "control", reset=capable, writable=MSI_ENABLE | 0b111 << 4),
            Register(4, width, "address", writable=(1 << 8 * width) - 4),
            Register(4 + width, 2, "data", writable=0xFFFF),
        )
        masking = (
            Register(8 + width, 4, "mask", writable=(1 << self.vectors) - 1),
            Register(12 + width, 4, "pending", on_read=self._pending),
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
        for what, bar, offset, _ in self.structures():
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
        for what, index, offset, size in self.structures():
            bar = bars.get(index)
            if bar is None or bar.io or offset + size > bar.size:
                raise ValueError(f"MSI-X {what}: no {size} bytes at {offset:#x} of a memory BAR {index}")
            if not bar.traps(offset, size):
                raise ValueError(
                    f"MSI-X {what}: a client that maps BAR {index} would bypass the device:"
                    f" add ({offset:#x}, {size:#x}) to its trapped ranges"
                )

    def structures(self) -> Iterator[tuple[str, int, int, int]]:
        """(what, BAR, offset, bytes) of the table and the pending bit array."""
        yield "table", self.table_bar, self.table_offset, self.table_size
        yield "PBA", self.pba_bar, self.pba_offset, self.pba_size


_ENTRY_SIZE = 16
_ENTRY_RESET = (1 << 96).to_bytes(_ENTRY_SIZE, "little")
"""Vector control, the last 4 bytes, starts with its mask bit set."""
_ENTRY_WRITABLE = ((1 << 96) | ((1 << 96) - 4)).to_bytes(_ENTRY_SIZE, "little")
"""Address (but for its two low bits), data, and of vector control the mask bit only."""


class MsixTable:
    """The MSI-X table and the pending bit array where ``capability`` puts them.

    The table is storage only. A VMM keeps the table that counts and shows the outcome by SET_IRQS; QEMU does
    not even send the writes. So the mask bits here hold nothing back (the function mask does, which the device
    sees). ``pba()`` gives the bytes of the pending bit array, :meth:`vfio_user.pci.Interrupts.pba`.
    """

    def __init__(self, capability: MsixCapability, pba: Callable[[], bytes]) -> None:
        entries = Register(
            0,
            capability.table_size,
            "table",
            reset=int.from_bytes(_ENTRY_RESET * capability.vectors, "little"),
            writable=int.from_bytes(_ENTRY_WRITABLE * capability.vectors, "little"),
        )
        pending = Register(0, capability.pba_size, "pba", on_read=lambda: int.from_bytes(pba(), "little"))
        self._table = RegisterFile(entries.width, [entries])
        self._areas = (
            (capability.table_bar, capability.table_offset, self._table),
            (capability.pba_bar, capability.pba_offset, RegisterFile(pending.width, [pending])),
        )

    @property
    def bars(self) -> set[int]:
        """The BARs that hold a part of it."""
        return {area[0] for area in self._areas}

    def read_into(self, bar: int, offset: int, data: memoryview) -> bool:
        """Answer a read that touches table or pending bits; what lies beside them reads 0.

        False: the access touches neither, and nothing was done.
        """
        parts = list(self._parts(bar, offset, len(data)))
        if parts:
            data[:] = bytes(len(data))
        for registers, start, part in parts:
            registers.read_into(start, data[part])
        return bool(parts)

    def write(self, bar: int, offset: int, data: Buffer) -> bool:
        """Take a write that touches table or pending bits (which ignore it). False: it touches neither."""
        parts = list(self._parts(bar, offset, len(data)))
        for registers, start, part in parts:
            registers.write(start, data[part])
        return bool(parts)

    def reset(self) -> None:
        """Empty the table: every vector masked."""
        self._table.reset()

    def save(self) -> bytes:
        """The table, 16 bytes per vector. The pending bits belong to the interrupts."""
        return self._table.save()["table"]

    def load(self, data: Buffer) -> None:
        """Take over what :meth:`save` gave. Raises ValueError for another length."""
        self._table.load({"table": bytes(data)})

    def _parts(self, bar: int, offset: int, length: int) -> Iterator[tuple[RegisterFile, int, slice]]:
        """(registers, offset in them, slice of the data) for each area that an access touches."""
        for area_bar, base, registers in self._areas:
            start, stop = max(offset, base), min(offset + length, base + len(registers))
            if area_bar == bar and start < stop:
                yield registers, start - base, slice(start - offset, stop - offset)
