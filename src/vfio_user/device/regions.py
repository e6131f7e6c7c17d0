"""The regions of a device: what stands behind its BARs, and who answers an access."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Mapping

from vfio_user.fds import OwnedFd
from vfio_user.pci import Bar, Capability, ConfigSpace, MsiCapability, MsixCapability, MsixTable
from vfio_user.wire.constants import PAGE_SIZE, PCI_NUM_REGIONS, PciRegion

Access = Callable[[int, int, memoryview], None]
"""An access to (region, offset, data): a read fills the data, a write takes it."""


def layout(
    bars: Mapping[int, Bar], msi_vectors: int, msix_vectors: int, msix_bar: int | None
) -> tuple[dict[int, Bar], list[Capability]]:
    """All BARs, the one that MSI-X needs included, and the capabilities that the vectors ask for."""
    bars = dict(bars)
    capabilities: list[Capability] = []
    if msi_vectors:
        capabilities.append(MsiCapability(msi_vectors))
    if msix_vectors:
        pending = _round_up(16 * msix_vectors, PAGE_SIZE // 2)
        index = _free_bar(bars) if msix_bar is None else msix_bar
        if index not in bars:
            size = _round_up(pending + msix_vectors // 8 + 8, PAGE_SIZE)
            bars[index] = Bar(1 << (size - 1).bit_length())
        capabilities.append(MsixCapability(msix_vectors, index, 0, index, pending))
    return bars, capabilities


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _free_bar(bars: Mapping[int, Bar]) -> int:
    taken = {index + part for index, bar in bars.items() for part in range(2 if bar.bits64 else 1)}
    for index in range(6):
        if index not in taken:
            return index
    raise ValueError("no BAR is left for the MSI-X table: set msix_bar to one that has room")


class BarMemory:
    """The memory of the BARs that have some, in files that a client can map and whose size it cannot change."""

    def __init__(self, bars: Mapping[int, Bar]) -> None:
        self._files = {index: _memory_file(f"bar{index}", bar.size) for index, bar in bars.items() if bar.memory}
        self.views = {index: memoryview(mmap.mmap(fd.fileno(), bars[index].size)) for index, fd in self._files.items()}

    def fileno(self, bar: int) -> int | None:
        """The descriptor of a BAR's memory; None where it has none."""
        return self._files[bar].fileno() if bar in self._files else None


def _memory_file(name: str, size: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create(f"vfio-user-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class AccessTable:
    """Who answers an access to a region: config space, the MSI-X table, a BAR's memory, or the device's own code."""

    def __init__(
        self,
        config: ConfigSpace,
        msix: MsixTable | None,
        memory: Mapping[int, memoryview],
        bar_read: Access,
        bar_write: Access,
    ) -> None:
        self._config, self._memory = config, memory
        tables = {c.table_bar for c in config.capabilities if isinstance(c, MsixCapability)}

        def serve(
            index: int, own: Access, table: Callable[[int, int, memoryview], bool] | None, move: Access
        ) -> Access:
            return self._answer(index, own, table if index in tables else None, move)

        regions = range(PCI_NUM_REGIONS)
        self.readers = [serve(n, bar_read, msix.read_into if msix else None, self._copy_out) for n in regions]
        self.writers = [serve(n, bar_write, msix.write if msix else None, self._copy_in) for n in regions]
        self.readers[PciRegion.CONFIG] = lambda region, offset, data: config.read_into(offset, data)
        self.writers[PciRegion.CONFIG] = lambda region, offset, data: config.write(offset, data)

    def _answer(
        self, index: int, own: Access, table: Callable[[int, int, memoryview], bool] | None, move: Access
    ) -> Access:
        """The shortest way for this BAR: where nothing stands behind it, the device's own code itself."""
        bar, has_memory = self._config.bars.get(index), index in self._memory
        if bar is None or (table is None and not has_memory):
            return own

        def access(region: int, offset: int, data: memoryview) -> None:
            if table is not None and table(region, offset, data):
                return
            (move if has_memory and not bar.traps(offset, len(data)) else own)(region, offset, data)

        return access

    def _copy_out(self, region: int, offset: int, data: memoryview) -> None:
        data[:] = self._memory[region][offset : offset + len(data)]

    def _copy_in(self, region: int, offset: int, data: memoryview) -> None:
        self._memory[region][offset : offset + len(data)] = data
