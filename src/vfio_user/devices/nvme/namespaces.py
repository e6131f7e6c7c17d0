"""A namespace: blocks of one size, behind them a storage."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from vfio_user.devices.nvme.command import CommandError, check
from vfio_user.devices.nvme.constants import Status
from vfio_user.devices.nvme.storage.base import Storage

BLOCK_SIZES = (512, 4096)
"""Bytes of a block that FORMAT NVM offers, by the number of the LBA format."""


MAX_NAMESPACES = 256
"""NN: the highest NSID that there may be."""


class Namespace:
    """Blocks from 0 to ``blocks``. ``number`` is the NSID, ``identity`` what tells it from all others anywhere."""

    def __init__(self, number: int, storage: Storage, block_size: int, identity: uuid.UUID) -> None:
        self.number = number
        self.storage = storage
        self.identity = identity
        self.busy = 0
        """Commands under way elsewhere."""
        self.formatting = False
        self.format(block_size)

    def format(self, block_size: int) -> None:
        """Count in blocks of another size. Raises ValueError where that does not divide the storage."""
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"blocks of {block_size} bytes: there are {' and '.join(map(str, BLOCK_SIZES))}")
        if not self.storage.size or self.storage.size % block_size:
            raise ValueError(f"{self.storage.name}: {self.storage.size} bytes are no whole blocks of {block_size}")
        if block_size % self.storage.block_size:
            raise ValueError(f"{self.storage.name}: it wants blocks of {self.storage.block_size} bytes: -o block_size=")
        self.block_size = block_size
        self.blocks = self.storage.size // block_size

    def span(self, start: int, count: int) -> tuple[int, int]:
        """(offset, length) in bytes of ``count`` blocks. Raises CommandError where they are not all there."""
        if start + count > self.blocks:
            raise CommandError(Status.LBA_OUT_OF_RANGE)
        return start * self.block_size, count * self.block_size


def active_namespace(namespaces: Mapping[int, Namespace], number: int) -> Namespace:
    """The namespace of that NSID. Raises CommandError: there is none now, or there never is (6.1.5)."""
    namespace = namespaces.get(number)
    if namespace is None:
        check(0 < number <= MAX_NAMESPACES, Status.INVALID_NAMESPACE_OR_FORMAT)
        raise CommandError(Status.INVALID_FIELD)
    return namespace
