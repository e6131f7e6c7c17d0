"""The content of namespaces that are memory, which nobody else keeps: it migrates in parts, each behind its NSID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vfio_user.devices.nvme.namespaces import Namespace
from vfio_user.devices.nvme.storage.memory import MemoryStorage

PART = 1 << 20
"""Bytes of memory that are sent at once."""
_HEAD = 4
"""Bytes of the NSID before a part of a namespace's memory."""


class MemoryParts:
    """What has to be sent of the namespaces that are memory, and what is taken over of them."""

    def __init__(self, namespaces: Mapping[int, Namespace]) -> None:
        self._namespaces = namespaces

    @property
    def limit(self) -> int:
        """Bytes that may be sent ahead: as much as it takes, and about once more for what changes meanwhile."""
        return 2 * sum(storage.size for storage in self._storages.values()) + PART

    def begin(self) -> None:
        """A new stream: nothing was sent yet."""
        for storage in self._storages.values():
            storage.mark_all_unsent()

    def next(self) -> bytes:
        """The next part; b"" when all was sent."""
        for number, storage in self._storages.items():
            if storage.unsent():
                return number.to_bytes(_HEAD, "little") + storage.next_part(PART - _HEAD)
        return b""

    def left(self) -> int:
        """About how many bytes are to be sent still."""
        return sum(storage.unsent_bytes() for storage in self._storages.values())

    def take(self, parts: Sequence[bytes]) -> None:
        """Take over what :meth:`next` gave on the other side. Raises ValueError, and then has changed nothing."""
        storages = self._storages
        numbered = [(int.from_bytes(part[:_HEAD], "little"), memoryview(part)[_HEAD:]) for part in parts]
        for number, data in numbered:
            if number not in storages:
                raise ValueError(f"memory of namespace {number}, which is none that is memory")
            storages[number].check(data)
        for number, data in numbered:
            storages[number].apply(data)

    @property
    def _storages(self) -> dict[int, MemoryStorage]:
        everything = ((number, namespace.storage) for number, namespace in self._namespaces.items())
        return {number: storage for number, storage in everything if isinstance(storage, MemoryStorage)}
