"""What users name storages by: which have sizes of their own, and what makes a serial number."""

from __future__ import annotations

import logging
import os
import uuid

from vfio_user.devices.nvme.storage import Storage, open_storage

logger = logging.getLogger("vfio_user.devices.nvme")

MEMORY = "memory:"
_MEMORY_SIZE = 64 << 20


def is_there(path: str) -> bool:
    """Whether a storage has a size without being told."""
    return "://" in path or os.path.exists(path)


def serial_of(path: str) -> str:
    """A serial number that a file keeps from one server to the next; memory is new every time."""
    unique = uuid.uuid4() if path == MEMORY else uuid.uuid5(uuid.NAMESPACE_URL, os.path.abspath(path))
    return unique.hex[:16].upper()


def open_path(path: str, size: int, *, read_only: bool, shared: bool) -> Storage:
    """What is at a path, nobody's yet; ``size`` in bytes, 0: as it is. Raises what :func:`open_storage` does."""
    wanted = size or (_MEMORY_SIZE if path == MEMORY else None)
    storage = open_storage(path, size=wanted, read_only=read_only, shared=shared)
    try:
        storage.acquire()
        storage.release()
    except OSError as error:  # it may well be that its owner's guest migrates to here
        logger.warning("%s: no guest can use it until its owner lets go of it: %s", path, error)
    return storage
