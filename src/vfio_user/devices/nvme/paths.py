"""What users name storages by: which have sizes of their own, and what makes a serial number."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence

from vfio_user.devices.nvme.storage import Storage, open_storage

logger = logging.getLogger("vfio_user.devices.nvme")

MEMORY = "memory:"
_MEMORY_SIZE = 64 << 20


def is_there(path: str) -> bool:
    """Whether a storage has a size without being told."""
    return is_uri(path) or os.path.exists(path)


def is_uri(path: str) -> bool:
    """Whether it names something that is in no file system, and the same from everywhere."""
    return "://" in path


def check_distinct(paths: Sequence[str]) -> None:
    """Raise ValueError where two are the same storage, which could not be acquired twice."""
    places = [path if is_uri(path) else os.path.realpath(path) for path in paths if path != MEMORY]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{place} is given twice")


def serial_of(paths: Sequence[str]) -> str:
    """Of a controller whose storages are at ``paths``: the first one keeps it from one server to the next, but for
    memory, which is new every time.
    """
    first = paths[0] if paths else MEMORY
    named = first if is_uri(first) else os.path.abspath(first)
    unique = uuid.uuid4() if first == MEMORY else uuid.uuid5(uuid.NAMESPACE_URL, named)
    return unique.hex[:16].upper()


def identity_of(controller: str, name: str) -> uuid.UUID:
    """What tells a namespace from all others: the controller's qualified name and its storage's ``name`` make it; as
    of memory nothing is the same when there is another, that has a new one.
    """
    if name == MEMORY:
        return uuid.uuid4()
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{controller}#{name if is_uri(name) else os.path.realpath(name)}")


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
