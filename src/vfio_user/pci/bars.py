"""Base address registers as declarations, and the MSI-X table that lives behind one.

Source: PCI Local Bus specification 3.0, sections 6.2.5 (base addresses) and 6.8.2 (MSI-X structures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from mmap import PAGESIZE
from typing import TYPE_CHECKING

from vfio_user.pci.registers import Buffer, Register, RegisterFile

if TYPE_CHECKING:
    from vfio_user.pci.capabilities import MsixCapability

NUM_BARS = 6

_IO_SPACE = 0x1
_MEMORY_64 = 0x4
_PREFETCHABLE = 0x8

_MIN_IO, _MAX_IO = 4, 256
_MIN_MEMORY, _MAX_MEMORY_32, _MAX_MEMORY_64 = 16, 1 << 31, 1 << 63

Range = tuple[int, int]
"""(offset, size), in bytes."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: how many bytes of which space it claims, and whether memory stands behind it.

    ``memory`` makes it mmap-able by the client, but for the pages of the ``trapped`` ranges, whose accesses
    still come as messages. Raises ValueError for a declaration that no PCI bus could carry out.
    """

    size: int
    io: bool = field(default=False, kw_only=True)
    prefetchable: bool = field(default=False, kw_only=True)
    bits64: bool = field(default=False, kw_only=True)
    memory: bool = field(default=False, kw_only=True)
    trapped: tuple[Range, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        smallest, largest = self._limits()
        if self.size.bit_count() != 1 or not smallest <= self.size <= largest:
            raise ValueError(f"{self}: the size must be a power of two, {smallest:#x} to {largest:#x}")
        if self.io and (self.prefetchable or self.bits64 or self.memory):
            raise ValueError(f"{self}: I/O space is never prefetchable, bits64 or memory: drop these")
        if self.trapped and not self.memory:
            raise ValueError(f"{self}: only memory=True needs trapped: without it every access is a message")
        for offset, size in self.trapped:
            if offset < 0 or size < 1 or offset + size > self.size:
                raise ValueError(f"{self}: trapped ({offset:#x}, {size:#x}) is not a range inside the BAR")
        if self.memory and not self.mmap_areas:
            raise ValueError(f"{self}: trapped leaves no page to map: drop memory=True")

    @property
    def flags(self) -> int:
        """The read-only low bits of the register."""
        if self.io:
            return _IO_SPACE
        return _MEMORY_64 * self.bits64 | _PREFETCHABLE * self.prefetchable

    @property
    def width(self) -> int:
        """Bytes of the register: 8 if it takes the next one too."""
        return 8 if self.bits64 else 4

    @property
    def address_mask(self) -> int:
        """The bits of the address that can be written: the size as a guest measures it."""
        return (1 << 8 * self.width) - self.size

    @property
    def mmap_areas(self) -> tuple[Range, ...]:
        """What may be mapped, as (offset, size) of whole pages in order; empty without ``memory``."""
        return tuple(self._untrapped_pages()) if self.memory else ()

    @property
    def sparse_areas(self) -> tuple[Range, ...]:
        """:attr:`mmap_areas` as region information wants it: empty also where the whole BAR may be mapped."""
        return () if self.mmap_areas == ((0, self.size),) else self.mmap_areas

    def traps(self, offset: int, size: int) -> bool:
        """Whether every access to this range arrives as a message."""
        return not any(offset < at + length and at < offset + size for at, length in self.mmap_areas)

    def _limits(self) -> tuple[int, int]:
        if self.io:
            return _MIN_IO, _MAX_IO
        largest = _MAX_MEMORY_64 if self.bits64 else _MAX_MEMORY_32
        return (PAGESIZE if self.memory else _MIN_MEMORY), largest

    def _untrapped_pages(self) -> Iterator[Range]:
        free = 0
        for offset, size in sorted(self.trapped):
            start = offset // PAGESIZE * PAGESIZE
            if start > free:
                yield free, start - free
            free = max(free, -(-(offset + size) // PAGESIZE) * PAGESIZE)
        if free < self.size:
            yield free, self.size - free


_ENTRY_SIZE = 16
_ENTRY_RESET = (1 << 96).to_bytes(_ENTRY_SIZE, "little")
"""Vector control, the last 4 bytes, starts with its mask bit set."""
_ENTRY_WRITABLE = ((1 << 96) | ((1 << 96) - 4)).to_bytes(_ENTRY_SIZE, "little")
"""Address (but for its two low bits), data, and of vector control the mask bit only."""


class MsixTable:
    """The MSI-X table and the pending bit array where ``capability`` puts them.

    The table is storage only. A VMM keeps the table that counts and shows the outcome by SET_IRQS; QEMU does
    not even send the writes. So the mask bits here hold nothing back. ``pba()`` gives the bytes of the
    pending bit array, :meth:`vfio_user.pci.Interrupts.pba`.
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
        return self._table.save()

    def load(self, data: Buffer) -> None:
        """Take over what :meth:`save` gave. Raises ValueError for another length."""
        self._table.load(data)

    def _parts(self, bar: int, offset: int, length: int) -> Iterator[tuple[RegisterFile, int, slice]]:
        """(registers, offset in them, slice of the data) for each area that an access touches."""
        for area_bar, base, registers in self._areas:
            start, stop = max(offset, base), min(offset + length, base + len(registers))
            if area_bar == bar and start < stop:
                yield registers, start - base, slice(start - offset, stop - offset)
