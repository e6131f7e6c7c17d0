"""What moves, in words: enough to tell whether it fits at the other side, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import msgspec

from vfio_user.client import Client
from vfio_user.errors import CommandError, MigrationError
from vfio_user.wire.constants import DeviceState, MigrationFlags, PciRegion

IDENTITY = 12
"""Bytes of config space that two devices must share: ids, revision and class; command and status aside."""

MAX_DEVICES, MAX_MEMORY_REGIONS = 64, 1024
"""Of one guest: what comes from elsewhere is bounded before it is looked at."""


class DeviceOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device, as its client sees it."""

    identity: str
    """Vendor and device id, class code, revision, in hexadecimal digits."""
    regions: list[tuple[int, int]]
    """Size and flags of each."""
    irqs: list[int]
    """Vectors of each interrupt index."""
    migration: int
    """MigrationFlags."""

    @classmethod
    def of(cls, client: Client) -> DeviceOffer:
        """Ask a device. Raises MigrationError for one that cannot migrate."""
        try:
            flags = client.migration_flags()
        except CommandError as error:
            raise MigrationError(f"the device cannot migrate: {error}") from error
        config = client.region_read(PciRegion.CONFIG, 0, IDENTITY)
        return cls(
            identity=f"{config[1::-1].hex()}:{config[3:1:-1].hex()} class {config[11:8:-1].hex()} rev {config[8]:02x}",
            regions=[(region.size, int(region.flags)) for region in client.regions],
            irqs=[irq.count for irq in client.irqs],
            migration=int(flags),
        )

    def misfits(self, other: DeviceOffer) -> Iterator[tuple[str, str]]:
        """What of it differs from another one, and how.

        Whether regions can be written or mapped is the socket's affair: by a control socket they cannot.
        """
        if self.identity != other.identity:
            yield "identity", f"differs: {self.identity} and {other.identity}"
        for index, sizes in enumerate(zip_longest(self._sizes(), other._sizes(), fillvalue=0)):
            if sizes[0] != sizes[1]:
                yield f"region {index}", f"differs: {sizes[0]:#x} and {sizes[1]:#x} bytes"
        for index, vectors in enumerate(zip_longest(self.irqs, other.irqs, fillvalue=0)):
            if vectors[0] != vectors[1]:
                yield f"interrupt index {index}", f"differs: {vectors[0]} and {vectors[1]} vectors"
        if self.migration != other.migration:
            names = " and ".join(str(MigrationFlags(flags)) for flags in (self.migration, other.migration))
            yield "migration", f"differs: {names}"

    def _sizes(self) -> list[int]:
        return [size for size, _ in self.regions]


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A guest's devices, and where its memory is: (address, size) in bytes."""

    devices: list[DeviceOffer]
    memory: list[tuple[int, int]]

    def all_have(self, flag: MigrationFlags) -> bool:
        """Whether every device has such states."""
        return all(device.migration & flag for device in self.devices)

    def misfits(self, own: Offer) -> Iterator[str]:
        """What of this offer differs from ``own``, a sentence each."""
        if len(self.devices) != len(own.devices):
            yield f"{len(self.devices)} devices are to move, the destination has {len(own.devices)}"
        for number, (here, there) in enumerate(zip(self.devices, own.devices, strict=False)):
            yield from (f"{what} of device {number} {differs}" for what, differs in here.misfits(there))
        if self.memory != own.memory:
            yield f"guest memory differs: {_spans(self.memory)} and {_spans(own.memory)}"

    def check(self, own: Offer) -> None:
        """Raise MigrationError unless it fits ``own``."""
        if found := list(self.misfits(own)):
            raise MigrationError("; ".join(found))


def _spans(memory: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{size:#x} bytes at {address:#x}" for address, size in memory) or "none"


def check_state(clients: Sequence[Client], role: str, *allowed: DeviceState) -> None:
    """Raise MigrationError unless every device is in a state that is ``allowed``."""
    for number, client in enumerate(clients):
        state = client.migration_get_state()
        if state not in allowed:
            names = " or ".join(one.name for one in allowed)
            raise MigrationError(f"device {number} of the {role} is in state {state.name}, not {names}")
