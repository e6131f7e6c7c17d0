"""The migration of a :class:`~vfio_user.device.Device`: its state machine, and its state as a stream."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vfio_user.device.contents import apply, collect
from vfio_user.errors import StreamError, UnrecoverableError
from vfio_user.migration import (
    SAVING_STATES,
    LoadedStream,
    StateMachine,
    StreamReader,
    StreamWriter,
    decode_state,
    encode_state,
)
from vfio_user.wire.constants import DeviceState, MigrationFlags

if TYPE_CHECKING:
    from vfio_user.device.device import Device

LOAD_SLACK = 1 << 20
"""Bytes that a stream may be longer than what this device itself would send, pre-copy aside."""


class Migrator:
    """Walks a device through the migration states, and turns it into a stream and back.

    A stream that does not fit leaves the device as it was, in RESUMING. ``on_running`` is called with whether the
    device works for the guest, when that has changed.
    """

    def __init__(self, device: Device, flags: MigrationFlags, on_running: Callable[[bool], None]) -> None:
        self._device = device
        self._on_running = on_running
        self._machine = StateMachine(flags, self._step)
        self._outgoing: StreamWriter | None = None
        self._incoming: StreamReader | None = None
        self._before: dict[str, object] = {}  # what it was when RESUMING began
        self._ahead = 0  # bytes of the outgoing stream that are pre-copy

    @property
    def state(self) -> DeviceState:
        return self._machine.state

    @property
    def running(self) -> bool:
        """Whether the device works for the guest."""
        return self._machine.running

    def set(self, state: DeviceState) -> None:
        """Go to ``state`` arc by arc. Raises TransitionError."""
        with self._telling():
            self._machine.set(state)

    def reset(self) -> None:
        self._outgoing = self._incoming = None
        self._before = {}
        with self._telling():
            self._machine.reset()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell whether the device works, if that has changed: a path that fails may have been gone half of the way."""
        before = self.running
        try:
            yield
        finally:
            if self.running != before:
                self._on_running(self.running)

    def read(self, data: memoryview) -> int:
        """Fill ``data`` with the stream as far as there is some now."""
        stream = self._outgoing
        if stream is None:
            raise self._no_data()
        filled = stream.read_into(data)
        while filled < len(data) and self._send_ahead(stream):
            filled += stream.read_into(data[filled:])
        return filled

    def _send_ahead(self, stream: StreamWriter) -> bool:
        """Put what the running device has for us now into the stream; False when there is nothing."""
        if self.state == DeviceState.STOP_COPY or self._ahead >= self._device.pre_copy_limit:
            return False
        ahead = self._device.pre_copy()
        if ahead:
            stream.add_pre_copy(ahead)
            self._ahead += stream.pending
        return bool(ahead)

    def write(self, data: memoryview) -> None:
        """Take ``data`` as what comes next in the stream. Raises StreamError for what does not belong there."""
        if self._incoming is None:
            raise self._no_data()
        self._incoming.write(data)

    def _no_data(self) -> OSError:
        return OSError(errno.EINVAL, f"no migration data in state {self.state.name}")

    def data_size(self) -> int:
        """Bytes that are still to be read, or would be if the device stopped now."""
        pending = self._outgoing.pending if self._outgoing else 0
        return pending if self.state == DeviceState.STOP_COPY else pending + self._stream_size()

    def _step(self, source: DeviceState, target: DeviceState) -> None:
        """The work of one arc."""
        if target in SAVING_STATES:
            if source not in SAVING_STATES:
                self._outgoing, self._ahead = StreamWriter(self._device.stream_identity), 0
                self._device.pre_copy_start()
            if target == DeviceState.STOP_COPY:
                assert self._outgoing is not None
                self._finish(self._outgoing)
            return
        self._outgoing = None
        if target == DeviceState.RESUMING:
            memory = sum(map(len, self._device.memory.values()))  # of this there can be no more than we have
            limit = memory + 4 * (self._stream_size() - memory) + LOAD_SLACK + 2 * self._device.pre_copy_limit
            self._incoming = StreamReader(self._device.stream_identity, limit)
            self._before = collect(self._device)  # not when it loads: that is downtime
        elif source == DeviceState.RESUMING:
            assert self._incoming is not None
            self._load(self._incoming.finish(), self._before)
            self._incoming, self._before = None, {}

    def _finish(self, stream: StreamWriter) -> None:
        """Add all that is left to say of the device as it is now."""
        for part in self._device.save_parts():
            stream.add_pre_copy(part)
        self._add_state(stream)
        stream.end()

    def _add_state(self, stream: StreamWriter) -> None:
        try:
            stream.add_state(encode_state(collect(self._device)))
        except ValueError as error:
            raise StreamError(f"{type(self._device).__name__} cannot be saved: {error}") from error
        for index, memory in self._device.memory.items():
            stream.add_memory(index, 0, memory)

    def _stream_size(self) -> int:
        """Bytes that a stream of the device as it is now has."""
        stream = StreamWriter(self._device.stream_identity)
        self._add_state(stream)
        stream.end()
        return stream.pending + self._device.parts_size()

    def _load(self, loaded: LoadedStream, before: dict[str, object]) -> None:
        """Have the device become what the stream says, or stay what it was ``before``."""
        try:
            self._check_memory(loaded)
            apply(self._device, decode_state(loaded.state), loaded)
        except (ValueError, KeyError, TypeError, OSError) as error:
            self._restore(before, error)
            raise StreamError(f"the stream does not fit {type(self._device).__name__}: {error}") from error
        for block in loaded.memory:
            self._device.memory[block.region][block.offset : block.offset + len(block.data)] = block.data

    def _restore(self, before: dict[str, object], reason: Exception) -> None:
        """Have the device be what it was before it took something that does not fit."""
        try:
            apply(self._device, before, LoadedStream([], b"", [], self._device.stream_identity.state_version))
        except Exception as error:
            name = type(self._device).__name__
            raise UnrecoverableError(
                f"{name} took half of a stream ({reason}), and not its own state ({error})"
            ) from error

    def _check_memory(self, loaded: LoadedStream) -> None:
        """The stream has the memory of all BARs, from the first byte to the last."""
        sizes = dict.fromkeys(self._device.memory, 0)
        for block in loaded.memory:
            if sizes.get(block.region) != block.offset:
                raise ValueError(f"memory at {block.offset:#x} of BAR {block.region} does not belong there")
            sizes[block.region] += len(block.data)
        for index, size in sizes.items():
            if size != len(self._device.memory[index]):
                raise ValueError(f"BAR {index} has {len(self._device.memory[index]):#x} bytes of memory, not {size:#x}")
