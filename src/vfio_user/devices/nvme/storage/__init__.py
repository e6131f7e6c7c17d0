"""What is behind a namespace: files and block devices, memory, network block devices."""

from __future__ import annotations

from collections.abc import Callable

from vfio_user.devices.nvme.storage.base import SECTOR, Storage, Views
from vfio_user.devices.nvme.storage.file import FileStorage
from vfio_user.devices.nvme.storage.memory import MemoryStorage
from vfio_user.devices.nvme.storage.nbd import NbdStorage

__all__ = ["SECTOR", "FileStorage", "MemoryStorage", "NbdStorage", "Storage", "Views", "open_storage"]

Opener = Callable[[str, int | None, bool, bool], Storage]
"""Takes the path, the size, and whether it is read-only and shared."""


def open_storage(path: str, *, size: int | None = None, read_only: bool = False, shared: bool = False) -> Storage:
    """What ``path`` names: ``memory:``, an NBD URI, or else a file or block device.

    ``size``, in bytes, is what a new file or memory gets, and anything else must have. ``shared``: others may write
    it at the same time, who know that they do.

    Raises OSError, which names the path, for what cannot be opened, and ValueError for what is no disk.
    """
    scheme, colon, _ = path.partition(":")
    return _OPENERS.get(scheme + colon, _file)(path, size, read_only, shared)


def _file(path: str, size: int | None, read_only: bool, shared: bool) -> Storage:
    return FileStorage(path, size=size, read_only=read_only, shared=shared)


def _memory(path: str, size: int | None, read_only: bool, shared: bool) -> Storage:
    if size is None:
        raise ValueError(f"{path} needs a size: -o size=1G")
    if shared:
        raise ValueError(f"{path} is nobody else's: it cannot be shared")
    return MemoryStorage(path, size=size, read_only=read_only)


def _nbd(path: str, size: int | None, read_only: bool, shared: bool) -> Storage:
    return NbdStorage(path, size=size, read_only=read_only)  # who shares it is the server's affair


_OPENERS: dict[str, Opener] = {
    "memory:": _memory,
    "nbd:": _nbd,
    "nbds:": _nbd,
    "nbd+unix:": _nbd,
    "nbds+unix:": _nbd,
    "nbd+vsock:": _nbd,
    "nbds+vsock:": _nbd,
}
