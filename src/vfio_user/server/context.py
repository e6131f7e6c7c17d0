"""What the handlers of one connection share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from vfio_user.dma.bitmap import clear_bitmap
from vfio_user.dma.iova import IovaTable
from vfio_user.errors import MessageError
from vfio_user.migration.states import RUNNING_STATES
from vfio_user.server.backend import Irq, Region, ServerBackend
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.constants import (
    DEFAULT_DATA_XFER_SIZE,
    DEFAULT_DMA_MAPS,
    AccessMode,
    DeviceState,
    PciRegion,
    RegionFlags,
)
from vfio_user.wire.messages import Buffer

logger = logging.getLogger("vfio_user.server")

T = TypeVar("T")


class Reply(NamedTuple):
    """What a handler answers: the parts of the payload in order, and descriptors that stay the backend's."""

    parts: Sequence[Buffer] = ()
    fds: Sequence[int] = ()


class DmaMapping(NamedTuple):
    """How a DMA region was mapped; two that are equal are the same region. ``file`` is (st_dev, st_ino)."""

    flags: int
    offset: int
    file: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What this server takes: bytes of data in one message, and DMA regions."""

    data_xfer_size: int = DEFAULT_DATA_XFER_SIZE
    dma_maps: int = DEFAULT_DMA_MAPS


@dataclass(slots=True)
class AccessGate:
    """What becomes of the primary client's accesses to BARs while the device does not run: a control socket decides.

    ``quiescing``: how many control clients wait for DMA to stop; until it has, what might start some is held.
    """

    mode: AccessMode = AccessMode.PASS
    quiescing: int = 0

    def now(self, standing: bool) -> AccessMode:
        """What holds for a device that stands still, or does not."""
        if self.quiescing:
            return AccessMode.HOLD
        return self.mode if standing else AccessMode.PASS


_KEPT_FROM = 256 << 10
"""Bytes from which on a buffer for replies is kept."""

NO_ACCESS = -1
"""The limit of a region that cannot be read, or written: no access ends before it."""


@dataclass(slots=True)
class Context:
    """One connection: its backend, what the client stated, what it mapped."""

    backend: ServerBackend
    limits: Limits
    client: Capabilities = field(default_factory=Capabilities)
    maps: IovaTable[DmaMapping] = field(default_factory=IovaTable)
    irqs_in_use: set[int] = field(default_factory=set)
    readable: list[int] = field(default_factory=list)
    """By region: where a read must end at the latest, in bytes; NO_ACCESS where none may be."""
    writable: list[int] = field(default_factory=list)
    features: dict[int, int] = field(default_factory=dict)
    """By index, the operations that the backend has for the features that were asked for; 65,536 at most."""
    loading: bool = False
    """Whether the device is RESUMING: migration data may be written."""
    gate: AccessGate = field(default_factory=AccessGate)
    access: AccessMode = AccessMode.PASS
    """What becomes of an access to a BAR now. All but PASS goes past the device: no limit lets it through."""

    depth: int = 0
    """DMA requests that await their replies, each in a hook of a command that came while the one before waited."""
    _reply_buffers: dict[int, bytearray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refresh_access()

    def reply_buffer(self, size: int, *, zeroed: bool = False) -> memoryview:
        """``size`` bytes for a reply, holding anything unless ``zeroed``, to be used until that reply is sent.

        A large buffer is kept for the next one: the kernel takes longer to provide 32 MiB than a device to fill
        them. There is one at each depth, as a reply may be made while another one is being made.
        """
        if size < _KEPT_FROM:
            return memoryview(bytearray(size))
        buffer = self._reply_buffers.get(self.depth)
        if buffer is None or len(buffer) < size:
            self._reply_buffers[self.depth] = buffer = bytearray(size)
        elif zeroed:
            clear_bitmap(memoryview(buffer)[:size])
        return memoryview(buffer)[:size]

    def drop_reply_buffers(self) -> None:
        """Give the memory back. The next reply takes new buffers."""
        self._reply_buffers.clear()

    def region(self, index: int) -> Region:
        return _element(self.backend.regions, index, "region")

    def irq(self, index: int) -> Irq:
        return _element(self.backend.irqs, index, "interrupt index")

    @property
    def migratable(self) -> bool:
        try:
            return self.backend.migration_flags() != 0
        except OSError:
            return False

    def refresh_access(self) -> None:
        """Work out who may be read and written, from the regions' flags and the migration state.

        In STOP_COPY the state is on its way: a BAR that changed now would be lost, and is not accessed. Config
        space is served in every state.
        """
        state = self.state()
        self.loading = state == DeviceState.RESUMING
        self.access = self.gate.now(state is not None and state not in RUNNING_STATES)
        frozen = state == DeviceState.STOP_COPY or self.access is not AccessMode.PASS
        self.readable = self.access_limits(RegionFlags.READ, frozen)
        self.writable = self.access_limits(RegionFlags.WRITE, frozen)

    def state(self) -> int | None:
        """The migration state. A device that fails to say it has none: nobody waits for the answer."""
        try:
            return self.backend.migration_get_state() if self.migratable else None
        except OSError:
            return None
        except Exception:
            logger.exception("the device failed to say its migration state")
            return None

    def access_limits(self, flag: int, frozen: bool = False) -> list[int]:
        """By region: where an access of a kind (RegionFlags) must end; ``frozen``: none is but to config space."""
        return [
            region.size if region.flags & flag and not (frozen and index != PciRegion.CONFIG) else NO_ACCESS
            for index, region in enumerate(self.backend.regions)
        ]


def _element(items: Sequence[T], index: int, what: str) -> T:
    if index >= len(items):
        raise MessageError(f"{what} {index}: there are {len(items)}")
    return items[index]


def check_argsz(argsz: int, least: int) -> None:
    if argsz < least:
        raise MessageError(f"argsz {argsz}: at least {least} is needed")
