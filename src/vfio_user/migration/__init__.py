"""Migration of a device: its states and the paths between them, and the data stream that carries its state."""

from __future__ import annotations

from vfio_user.migration.states import (
    ARCS,
    RUNNING_STATES,
    SAVING_STATES,
    Arc,
    StateMachine,
    arcs,
    path,
    states,
)
from vfio_user.migration.stream import (
    LoadedStream,
    MemoryBlock,
    StreamIdentity,
    StreamReader,
    StreamWriter,
    decode_state,
    encode_state,
)

__all__ = [
    "ARCS",
    "RUNNING_STATES",
    "SAVING_STATES",
    "Arc",
    "LoadedStream",
    "MemoryBlock",
    "StateMachine",
    "StreamIdentity",
    "StreamReader",
    "StreamWriter",
    "arcs",
    "decode_state",
    "encode_state",
    "path",
    "states",
]
