"""Moves the device through the migration states, as a VMM does: what the cases of migration are written with."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from vfio_user.tools.check.cases import BreachError, Session
from vfio_user.tools.check.expect import Findings, Served
from vfio_user.tools.check.facts import needs_reset
from vfio_user.tools.check.model import Finding
from vfio_user.tools.check.raw import NoMessageError, Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import Command, DeviceFeature, DeviceState, FeatureFlags

HEAD = m.Feature.LAYOUT.size
CHUNK = 64 << 10
MAX_STREAM = 4 << 30
_SET_STATE = FeatureFlags.SET | DeviceFeature.MIG_DEVICE_STATE
_GET_STATE = FeatureFlags.GET | DeviceFeature.MIG_DEVICE_STATE


def state_request(state: int) -> bytes:
    """The payload that sets a device state."""
    data = m.FeatureDeviceState(state).pack()
    return m.Feature(HEAD + len(data), _SET_STATE).pack() + data


class Mover:
    """The device of a session. Calls raise BreachError where the device does not do what it must."""

    def __init__(self, session: Session) -> None:
        self.session = session

    # States

    def state(self) -> int:
        request = m.Feature(HEAD + m.FeatureDeviceState.LAYOUT.size, _GET_STATE).pack()
        payload = self._succeed(Command.DEVICE_FEATURE, request, "GET MIG_DEVICE_STATE", HEAD + 8)
        return m.FeatureDeviceState.parse(payload, HEAD).device_state

    def try_set(self, state: int) -> Received:
        """Ask for a state; the reply, whatever it is."""
        return self._answer(Command.DEVICE_FEATURE, state_request(state))

    def set(self, state: DeviceState) -> None:
        """Ask for a state, and see that the device is in it."""
        self._check(self.try_set(state), f"SET {state.name}")
        now = self.state()
        if now != state:
            raise BreachError(Finding("state", f"the device is in state {now} after SET {state.name}", value=now))

    def settle(self) -> Findings:
        """Back to RUNNING, by a reset if nothing else leads there."""
        if self.state() == DeviceState.RUNNING:
            return
        if self.try_set(DeviceState.RUNNING).is_error and not needs_reset(self.session.facts):
            self.session.ask(Command.DEVICE_RESET)
        now = self.state()
        if now != DeviceState.RUNNING:
            yield Finding("stuck", f"the device does not come back to RUNNING, it is in state {now}", value=now)

    def reset(self) -> None:
        self._succeed(Command.DEVICE_RESET, b"", "DEVICE_RESET", 0)

    # The stream

    def read(self, size: int) -> bytes:
        """One MIG_DATA_READ; what came of the stream."""
        request = m.MigData(m.MigData.LAYOUT.size + size, size).pack()
        reply = self._answer(Command.MIG_DATA_READ, request)
        self._check(reply, f"MIG_DATA_READ of {size} bytes")
        if len(reply.payload) < m.MigData.LAYOUT.size:
            raise BreachError(Finding("size", f"a payload of {len(reply.payload)} bytes"))
        answer = m.MigData.parse(reply.payload)
        data = reply.payload[m.MigData.LAYOUT.size :]
        if answer.size > size or len(data) < answer.size:
            text = f"{size} bytes asked for, {answer.size} announced, {len(data)} came"
            raise BreachError(Finding("data-size", text, value=answer.size))
        return data[: answer.size]

    def read_all(self, chunk: int = CHUNK) -> bytes:
        """The stream to its end, which a short reply is."""
        chunk = min(chunk, self.session.facts.max_data)
        return b"".join(self._pieces(chunk))

    def _pieces(self, chunk: int) -> Iterator[bytes]:
        total = 0
        while True:
            piece = self.read(chunk)
            total += len(piece)
            yield piece
            if len(piece) < chunk:
                return
            if total > MAX_STREAM:
                raise BreachError(Finding("endless", f"the stream does not end in {MAX_STREAM} bytes"))

    def save(self) -> bytes:
        """From any state to STOP_COPY, and all of the stream."""
        self.set(DeviceState.STOP_COPY)
        return self.read_all()

    def try_write(self, data: bytes) -> Received:
        request = m.MigData(m.MigData.LAYOUT.size + len(data), len(data)).pack()
        return self._answer(Command.MIG_DATA_WRITE, request + data)

    def write(self, data: bytes, chunk: int = CHUNK) -> None:
        chunk = min(chunk, self.session.facts.max_data)
        for start in range(0, len(data), chunk):
            part = data[start : start + chunk]
            self._check(self.try_write(part), f"MIG_DATA_WRITE of {len(part)} bytes")

    def load(self, data: bytes, chunk: int = CHUNK) -> None:
        """From any state to RUNNING by way of RESUMING."""
        self.set(DeviceState.RESUMING)
        self.write(data, chunk)
        self.set(DeviceState.RUNNING)

    def recover(self, data: bytes) -> None:
        """After what may have damaged the device: a reset, and the state that it had."""
        if not needs_reset(self.session.facts):
            self.reset()
        self.load(data)

    # Commands

    def _answer(self, command: int, payload: bytes) -> Received:
        answer = self.session.ask(command, payload)
        if isinstance(answer, NoMessageError):
            raise answer
        return answer

    def _succeed(self, command: int, payload: bytes, what: str, size: int) -> bytes:
        reply = self._answer(command, payload)
        self._check(reply, what)
        for finding in Served("", size).judge(reply, self.session.facts):
            raise BreachError(finding)
        return reply.payload

    @staticmethod
    def _check(reply: Received, what: str) -> None:
        if reply.is_error:
            number = reply.header.error_no
            name = errno.errorcode.get(number, str(number))
            raise BreachError(Finding("refused", f"{what} is refused with {name}", value=number))
