"""The capabilities JSON of VERSION (specification, section "Version Data Format")."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from vfio_user.errors import NegotiationError
from vfio_user.wire.constants import (
    CONTROL_VERSION,
    DEFAULT_DATA_XFER_SIZE,
    DEFAULT_DMA_MAPS,
    DEFAULT_MSG_FDS,
    MAX_MSG_FDS,
    NEGOTIABLE_MSG_FDS,
    PAGE_SIZE,
)

MAX_JSON_SIZE = 64 << 10
"""Longest capabilities JSON that is looked at, in bytes. All that is known today fits in 300."""

_U63 = (1 << 63) - 1
Positive = Annotated[int, msgspec.Meta(ge=1, le=_U63)]
Size = Annotated[int, msgspec.Meta(ge=0, le=_U63)]


class MigrationCapability(msgspec.Struct, frozen=True, omit_defaults=True):
    """The ``migration`` object of older versions, which QEMU and libvfio-user still send."""

    pgsize: Size | UnsetType = UNSET
    max_bitmap_size: Size | UnsetType = UNSET


class TwinSocketCapability(msgspec.Struct, frozen=True, omit_defaults=True):
    """``twin_socket``: a second socket for server-to-client commands; ``fd_index`` only in the reply."""

    supported: bool = False
    fd_index: Annotated[int, msgspec.Meta(ge=0, le=MAX_MSG_FDS - 1)] | UnsetType = UNSET


class ControlCapability(msgspec.Struct, frozen=True, omit_defaults=True):
    """``x_control``: the extension of a control socket (docs/control.md), which only such a one grants."""

    version: Positive | UnsetType = UNSET


class Capabilities(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one side states; UNSET: the key was not there, and the specification's default holds."""

    max_msg_fds: Annotated[int, msgspec.Meta(ge=0, le=NEGOTIABLE_MSG_FDS)] | UnsetType = UNSET
    max_data_xfer_size: Positive | UnsetType = UNSET
    max_dma_maps: Positive | UnsetType = UNSET
    pgsizes: int | UnsetType = UNSET
    write_multiple: bool | UnsetType = UNSET
    twin_socket: TwinSocketCapability | UnsetType = UNSET
    migration: MigrationCapability | UnsetType = UNSET
    x_control: ControlCapability | UnsetType = UNSET

    @property
    def msg_fds(self) -> int:
        """File descriptors that this side takes with one message."""
        return DEFAULT_MSG_FDS if self.max_msg_fds is UNSET else self.max_msg_fds

    @property
    def data_xfer_size(self) -> int:
        """Bytes of data that this side takes with one message."""
        return DEFAULT_DATA_XFER_SIZE if self.max_data_xfer_size is UNSET else self.max_data_xfer_size

    @property
    def dma_maps(self) -> int:
        return DEFAULT_DMA_MAPS if self.max_dma_maps is UNSET else self.max_dma_maps

    @property
    def wants_twin_socket(self) -> bool:
        return self.twin_socket is not UNSET and self.twin_socket.supported

    @property
    def has_control(self) -> bool:
        """Whether this side speaks our version of the control extension."""
        return self.x_control is not UNSET and self.x_control.version == CONTROL_VERSION


class _VersionData(msgspec.Struct, frozen=True):
    capabilities: Capabilities | UnsetType = UNSET


_decoder = msgspec.json.Decoder(_VersionData)


def parse_capabilities(text: bytes) -> Capabilities | None:
    """What the text behind a VERSION says: JSON and its NUL, or nothing at all, which reads as None.

    Raises NegotiationError for anything else: a missing NUL, no JSON, wrong types, values out of range.
    """
    if not text:
        return None
    if text[-1] != 0:
        raise NegotiationError("the version data does not end with a NUL")
    if len(text) > MAX_JSON_SIZE:
        raise NegotiationError(f"version data of {len(text)} bytes: at most {MAX_JSON_SIZE} are looked at")
    try:
        data = _decoder.decode(text[:-1].decode())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise NegotiationError(f"version data: {error}") from error
    capabilities = Capabilities() if data.capabilities is UNSET else data.capabilities
    _check_page_sizes(capabilities)
    return capabilities


def _check_page_sizes(capabilities: Capabilities) -> None:
    pgsizes = capabilities.pgsizes
    if pgsizes is not UNSET and (not 0 < pgsizes < 1 << 64 or pgsizes % PAGE_SIZE):
        raise NegotiationError(f"pgsizes {pgsizes:#x}: 64 bits for sizes from {PAGE_SIZE} on, at least one set")
    pgsize = capabilities.migration.pgsize if capabilities.migration is not UNSET else UNSET
    if pgsize is not UNSET and pgsize and (pgsize < PAGE_SIZE or pgsize & (pgsize - 1)):
        raise NegotiationError(f"migration.pgsize {pgsize}: a power of two from {PAGE_SIZE} on")


def pack_capabilities(capabilities: Capabilities | None, *, room: int = 0) -> bytes:
    """Compact JSON, ``room`` spaces for an answer that may not be longer, and its NUL; nothing for None."""
    if capabilities is None:
        return b""
    return b'{"capabilities":' + msgspec.json.encode(capabilities) + b"}" + b" " * room + b"\0"


def pack_answer(answer: Capabilities | None, length: int) -> bytes:
    """What :func:`negotiate` agreed to, as an answer to version data of ``length`` bytes, and not longer than that."""
    text = pack_capabilities(answer)
    return text if len(text) <= length else b"{}\0"


def _common(proposed: int | UnsetType, supported: int) -> int | UnsetType:
    return UNSET if proposed is UNSET else min(proposed, supported)


def negotiate(
    proposed: Capabilities | None,
    length: int,
    *,
    max_data_xfer_size: int,
    max_dma_maps: int,
    twin_socket: bool,
    control: bool = False,
) -> Capabilities | None:
    """What a server answers to ``proposed``, whose version data was ``length`` bytes long.

    Only keys that were proposed, and never more bytes than were proposed: QEMU refuses a longer answer. So a twin
    socket is granted only where its answer fits, and the server's own ``max_data_xfer_size`` is lowered to the
    client's where its digits do not.
    """
    if proposed is None:
        return None
    own_size = UNSET if proposed.max_data_xfer_size is UNSET else max_data_xfer_size
    pgsize = proposed.migration.pgsize if proposed.migration is not UNSET else UNSET
    answer = Capabilities(
        max_msg_fds=_common(proposed.max_msg_fds, MAX_MSG_FDS),
        max_data_xfer_size=own_size,
        max_dma_maps=_common(proposed.max_dma_maps, max_dma_maps),
        pgsizes=proposed.pgsizes,
        write_multiple=proposed.write_multiple or UNSET,
        migration=MigrationCapability(pgsize=PAGE_SIZE) if pgsize else UNSET,
        x_control=proposed.x_control if control and proposed.has_control else UNSET,
    )
    lowered = msgspec.structs.replace(
        answer, max_data_xfer_size=_common(proposed.max_data_xfer_size, max_data_xfer_size)
    )
    granted = TwinSocketCapability(supported=True, fd_index=0)
    candidates = [answer, lowered]
    if twin_socket and proposed.wants_twin_socket and proposed.msg_fds > 0:
        candidates[:0] = [msgspec.structs.replace(c, twin_socket=granted) for c in (answer, lowered)]
    return next((c for c in candidates if len(pack_capabilities(c)) <= length), Capabilities())
