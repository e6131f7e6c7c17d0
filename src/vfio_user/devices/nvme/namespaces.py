"""Namespaces: blocks of one size, behind them a storage; and which of them a controller has."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

from vfio_user.devices.nvme.command import CommandError, check
from vfio_user.devices.nvme.complaints import Complaints
from vfio_user.devices.nvme.constants import Status
from vfio_user.devices.nvme.paths import identity_of
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
        check_block_size(block_size)
        if not self.storage.size or self.storage.size % block_size:
            raise ValueError(f"{self.storage.name}: {self.storage.size} bytes are no whole blocks of {block_size}")
        if block_size % self.storage.block_size:
            raise ValueError(f"{self.storage.name}: it wants blocks of {self.storage.block_size} bytes: -o block_size=")
        self.block_size = block_size
        self.blocks = self.storage.size // block_size

    def fits(self, block_size: int) -> bool:
        """Whether it could count in blocks of that size."""
        return not self.storage.size % block_size and not block_size % self.storage.block_size

    def span(self, start: int, count: int) -> tuple[int, int]:
        """(offset, length) in bytes of ``count`` blocks. Raises CommandError where they are not all there."""
        if start + count > self.blocks:
            raise CommandError(Status.LBA_OUT_OF_RANGE)
        return start * self.block_size, count * self.block_size


class Namespaces(dict[int, Namespace]):
    """The namespaces of a controller, by NSID, whose storages are closed with it.

    A dict itself, as every I/O command looks into it. Workers may acquire, release and flush all of them while one is
    added: these return 0, as what workers do returns a result.
    """

    def __init__(self, block_size: int, complaints: Complaints) -> None:
        """``block_size``: of those to come. ``complaints`` hears of what could not be made durable."""
        super().__init__()
        self._block_size = block_size
        self._complaints = complaints

    def free_number(self) -> int:
        """The lowest NSID that is free. Raises ValueError where there is none."""
        number = next((n for n in range(1, MAX_NAMESPACES + 1) if n not in self), None)
        if number is None:
            raise ValueError(f"there are {MAX_NAMESPACES} namespaces already")
        return number

    def add(self, number: int, storage: Storage, controller: str, *, acquire: bool) -> Namespace:
        """Attach a storage under a free number. ``controller``: its qualified name, of which the identity is made;
        ``acquire``: it is in use, and so is what is added.

        Raises OSError for a storage that cannot be had, ValueError for one that is no namespace: then it is closed.
        """
        try:
            namespace = Namespace(number, storage, self._block_size, identity_of(controller, storage.name))
            if acquire:
                storage.acquire()
        except BaseException:
            storage.close()
            raise
        self[number] = namespace
        return namespace

    def remove(self, number: int) -> None:
        """Detach one, at which nothing is under way.

        Raises KeyError for one that is not there, OSError where it is detached, but perhaps not all durable.
        """
        storage = self.pop(number).storage
        try:
            storage.release()
        finally:
            storage.close()

    def acquire(self) -> int:
        """Make all storages this process's own. Raises OSError where one cannot be had: then none is."""
        try:
            for namespace in tuple(self.values()):
                namespace.storage.acquire()
        except OSError:
            self.release()
            raise
        return 0

    def release(self) -> int:
        """Make everything durable, and leave it to others."""
        for namespace in tuple(self.values()):
            try:
                namespace.storage.release()
            except OSError as error:
                self._complaints.about(f"{namespace.storage.name}: what was written is not safe", error, logging.ERROR)
        return 0

    def flush(self) -> int:
        """Make everything durable. Raises OSError."""
        for namespace in tuple(self.values()):
            namespace.storage.flush()
        return 0

    def close(self) -> None:
        """Close the storages: nothing is under way, or ever will be."""
        for namespace in self.values():
            namespace.storage.close()


def check_block_size(block_size: int) -> None:
    """Raise ValueError for blocks that no namespace has."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"blocks of {block_size} bytes: there are {' and '.join(map(str, BLOCK_SIZES))}")


def active_namespace(namespaces: Mapping[int, Namespace], number: int) -> Namespace:
    """The namespace of that NSID. Raises CommandError: there is none now, or there never is (6.1.5)."""
    namespace = namespaces.get(number)
    if namespace is None:
        check(0 < number <= MAX_NAMESPACES, Status.INVALID_NAMESPACE_OR_FORMAT)
        raise CommandError(Status.INVALID_FIELD)
    return namespace
