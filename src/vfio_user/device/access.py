"""Who answers an access to a region of a device, and the memory behind its BARs."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence

from vfio_user.device.files import memory_file
from vfio_user.fds import OwnedFd
from vfio_user.pci import Bar, ConfigSpace, MsixTable, RegisterFile
from vfio_user.wire.constants import PCI_NUM_REGIONS, PciRegion

Access = Callable[[int, int, memoryview], None]
"""An access to (region, offset, data): a read fills the data, a write takes it."""

Layer = Callable[[int, int, memoryview], bool]
"""Something that lies over the rest of a BAR. False: the access is none of its business."""


class BarMemory:
    """The memory of the BARs that have some. ``given`` may name the file of a BAR; others get one of their own."""

    def __init__(self, bars: Mapping[int, Bar], given: Callable[[int], OwnedFd | None]) -> None:
        self._files = {
            index: given(index) or memory_file(f"bar{index}", bar.size) for index, bar in bars.items() if bar.memory
        }
        self.views = {index: memoryview(mmap.mmap(fd.fileno(), bars[index].size)) for index, fd in self._files.items()}

    def fileno(self, bar: int) -> int | None:
        """The descriptor of a BAR's memory; None where it has none."""
        return self._files[bar].fileno() if bar in self._files else None


Answers = tuple[Sequence[Access], Sequence[Access]]
"""Who reads a region and who writes it, by its index."""


class AccessTable:
    """Who answers an access to a region.

    Over a BAR lie, from the top, the table of MSI-X, the declared registers and its memory; below them is the device's
    own code, ``bar_read`` and ``bar_write``. A BAR without any of these is served by that code directly. ``awake`` is
    what holds in D0; ``asleep``, in D3hot, has config space only.

    An access goes to the topmost that it touches, as a whole: beside a register it reads 0. Only where memory begins or
    ends it is cut in two.
    """

    def __init__(
        self,
        config: ConfigSpace,
        msix: MsixTable | None,
        registers: Mapping[int, RegisterFile],
        memory: Mapping[int, memoryview],
        rom: bytes,
        own: tuple[Access, Access],
        config_write: Access,
    ) -> None:
        self._config, self._msix, self._registers, self._memory = config, msix, registers, memory
        readers, writers = ([one] * PCI_NUM_REGIONS for one in own)
        for index in config.bars:
            for read, write in self._layers(index):
                readers[index], writers[index] = _over(read, readers[index]), _over(write, writers[index])
            if edges := _edges(config.bars[index]):
                readers[index], writers[index] = _cut(edges, readers[index]), _cut(edges, writers[index])
        readers[PciRegion.ROM] = _reader_of(rom)
        no_readers: list[Access] = [_read_ones] * PCI_NUM_REGIONS
        no_writers: list[Access] = [_ignore] * PCI_NUM_REGIONS
        for table in (readers, no_readers):
            table[PciRegion.CONFIG] = lambda region, offset, data: config.read_into(offset, data)
        for table in (writers, no_writers):
            table[PciRegion.CONFIG] = config_write
        self.awake: Answers = (readers, writers)
        self.asleep: Answers = (no_readers, no_writers)

    def view(self, region: int, offset: int, count: int) -> memoryview | None:
        """The memory that is all there is to such an access; None: ask the reader."""
        plain = region in self._memory and region not in self._registers and not self._has_table(region)
        areas = self._config.bars[region].mmap_areas if plain else ()
        if not any(at <= offset and offset + count <= at + size for at, size in areas):
            return None
        return self._memory[region][offset : offset + count]

    def _has_table(self, index: int) -> bool:
        return self._msix is not None and index in self._msix.bars

    def _layers(self, index: int) -> Iterator[tuple[Layer, Layer]]:
        """(reader, writer) of what lies over the device's own code in a BAR, from the bottom."""
        if index in self._memory:
            yield self._copy_out, self._copy_in
        if index in self._registers:
            yield _layer_of(self._registers[index].read_into), _layer_of(self._registers[index].write)
        if self._msix is not None and self._has_table(index):
            yield self._msix.read_into, self._msix.write

    def _copy_out(self, region: int, offset: int, data: memoryview) -> bool:
        if self._config.bars[region].traps(offset, len(data)):
            return False
        data[:] = self._memory[region][offset : offset + len(data)]
        return True

    def _copy_in(self, region: int, offset: int, data: memoryview) -> bool:
        if self._config.bars[region].traps(offset, len(data)):
            return False
        self._memory[region][offset : offset + len(data)] = data
        return True


def _layer_of(access: Callable[[int, memoryview], bool]) -> Layer:
    return lambda region, offset, data: access(offset, data)


def _over(layer: Layer, below: Access) -> Access:
    def access(region: int, offset: int, data: memoryview) -> None:
        if not layer(region, offset, data):
            below(region, offset, data)

    return access


def _edges(bar: Bar) -> list[int]:
    """Where mapped memory begins and ends inside a BAR."""
    return sorted({edge for offset, size in bar.mmap_areas for edge in (offset, offset + size)} - {0, bar.size})


def _cut(edges: Sequence[int], whole: Access) -> Access:
    def access(region: int, offset: int, data: memoryview) -> None:
        start, end = offset, offset + len(data)
        for edge in (*(edge for edge in edges if start < edge < end), end):
            whole(region, start, data[start - offset : edge - offset])
            start = edge

    return access


def _reader_of(rom: bytes) -> Access:
    def read(region: int, offset: int, data: memoryview) -> None:
        data[:] = rom[offset : offset + len(data)].ljust(len(data), b"\xff")

    return read


def _read_ones(region: int, offset: int, data: memoryview) -> None:
    """What a bus reads where nobody answers."""
    data[:] = b"\xff" * len(data)


def _ignore(region: int, offset: int, data: memoryview) -> None:
    """What becomes of a write that nobody takes."""
