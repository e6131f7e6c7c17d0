"""Reads that wait one behind the other, carried out together."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from vfio_user.devices.nvme.command import CommandError, Entry
from vfio_user.devices.nvme.constants import IoOpcode
from vfio_user.devices.nvme.data import Ranges, log_written, prp_ranges, views_of
from vfio_user.devices.nvme.identify import MAX_DATA
from vfio_user.devices.nvme.logs import Health
from vfio_user.devices.nvme.namespaces import Namespace
from vfio_user.dma.memory import GuestMemory

MAX_BYTES = 4 << 20
"""That are moved in one go: no client waits longer for it than for a few commands."""
MAX_VIEWS = 1024
"""Pieces of guest memory that the kernel takes in one call (UIO_MAXIOV of linux/uio.h)."""
_READ = int(IoOpcode.READ)


@dataclass(slots=True)
class _Extent:
    """Blocks that follow each other, in bytes of the namespace, and where they go: what some commands ask for."""

    namespace: Namespace
    offset: int
    end: int
    views: list[memoryview]
    ranges: Ranges
    commands: int = 1


class Reads:
    """READ commands (6.9) of which nothing is special: PRPs, memory that is mapped, blocks that are there.

    First all of them are looked at, then data is moved, in as few calls as it takes, then completions are written. In
    turns it would take twice as long: much data leaves nothing else in the processor's caches.
    """

    def __init__(self, memory: GuestMemory, namespaces: Mapping[int, Namespace], health: Health) -> None:
        self._memory = memory
        self._namespaces = namespaces
        self._health = health

    def carry_out(self, entries: Sequence[Entry], busy: Container[int], page_size: int) -> tuple[int, int]:
        """Of the commands that ``entries`` begin with: how many are done, and how many of those behind them must go the
        usual way, one by one. ``busy``: identifiers of commands that are under way.
        """
        extents, usual = self._gather(entries, busy, page_size)
        done = 0
        for extent in extents:
            if not extent.namespace.storage.read_now(extent.offset, extent.views):
                return done, extent.commands
            log_written(self._memory, extent.ranges)
            self._health.reads += extent.commands
            self._health.bytes_read += extent.end - extent.offset
            done += extent.commands
        return done, usual

    def _gather(self, entries: Sequence[Entry], busy: Container[int], page_size: int) -> tuple[list[_Extent], int]:
        """What to read for as many as can be done together; 1 if that ends at a command of another kind, else 0."""
        extents: list[_Extent] = []
        extent: _Extent | None = None
        memory, namespaces, left = self._memory, self._namespaces, MAX_BYTES
        for opcode, flags, cid, nsid, _, _, prp1, prp2, low, high, count, _, _, _ in entries:
            namespace = namespaces.get(nsid)
            if opcode != _READ or flags or cid in busy or namespace is None or namespace.formatting:
                return extents, 1
            start, blocks = low | high << 32, (count & 0xFFFF) + 1
            offset, length = start * namespace.block_size, blocks * namespace.block_size
            if start + blocks > namespace.blocks or length > MAX_DATA:
                return extents, 1
            try:
                ranges = prp_ranges(memory, prp1, prp2, length, page_size)
            except CommandError:
                return extents, 1
            views = views_of(memory, ranges, write=True)
            if views is None:
                return extents, 1
            if extent is not None and extent.end == offset and extent.namespace is namespace:
                extent.end += length
                extent.views += views
                extent.ranges += ranges
                extent.commands += 1
            else:
                extent = _Extent(namespace, offset, offset + length, views, ranges)
                extents.append(extent)
            left -= length
            if left <= 0 or len(extent.views) > MAX_VIEWS // 2:
                break
        return extents, 0
