"""Plays the client's side of a capture against a server, and says what the server does otherwise than the recorded one.

Commands are sent as they were recorded, byte by byte, in their order: each after what had come before it then. The
server's own commands are answered as the recorded client did. Descriptors are made anew: eventfds, and files of the
recorded size, which are empty; what a device reads from such memory itself cannot be what it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from vfio_user.errors import ConnectionClosedError, ProtocolError, UsageError
from vfio_user.fds import OwnedFd, close_all
from vfio_user.filters.settings import errno_name, parse_region
from vfio_user.protocol import Framer, Message, Outgoing
from vfio_user.protocol.framing import DISCARD_LIMIT
from vfio_user.tools.location import Location
from vfio_user.tools.trace.choice import parse_command
from vfio_user.tools.trace.exchanges import Exchanges, Told
from vfio_user.tools.trace.fields import Decoded, decode
from vfio_user.tools.trace.names import RegisterNames
from vfio_user.tools.trace.pcapng import CaptureError
from vfio_user.tools.trace.seen import FdKind, Place, Seen, SeenFd, describe_fd
from vfio_user.transport.blocking import Channel
from vfio_user.wire.commands import Role, command_name
from vfio_user.wire.constants import DEFAULT_DATA_XFER_SIZE, HEADER_SIZE, Command, HeaderFlags
from vfio_user.wire.messages import Header, RegionAccess

MAY_DIFFER: Mapping[tuple[int, str], str] = {
    (Command.VERSION, "minor"): "each server answers with the lower of both versions",
    (Command.VERSION, "capabilities"): "limits are a server's own",
    (Command.VERSION, "fds"): "a twin socket is granted or not",
    (Command.DEVICE_GET_REGION_INFO, "offset"): "where a region lies in its file is its server's business",
    (Command.DEVICE_FEATURE, "stop_copy_length"): "an estimate",
}
"""What two servers of the same device may say differently, and why: a command, and a field of its reply."""

DUE = 64
"""Commands of the server's among which one that comes is looked for: they may come in another order than recorded."""
MAX_UNREPORTED = 1000
"""Differences that one reply may be waited for with: a server may ask without end."""


class Difference(NamedTuple):
    """What is not as recorded: of which message of the capture, counted from 1, in which field.

    ``number`` is 0 for a command of the server's that was not recorded at all.
    """

    number: int
    message: str
    field: str
    recorded: str
    got: str

    def __str__(self) -> str:
        where = f"message {self.number}, " if self.number else ""
        return f"{where}{self.message}: {self.field} is {self.got}, recorded {self.recorded}"


@dataclass(frozen=True, slots=True)
class Ignored:
    """Replies that are not compared: to a command, or to accesses of a region that touch a range of it."""

    command: int | None = None
    region: int = 0
    start: int = 0
    stop: int = 1 << 64

    @classmethod
    def parse(cls, text: str) -> Ignored:
        """A command's name, a region, or a place like ``bar0+0x20:u32``. Raises UsageError."""
        with contextlib.suppress(ValueError):
            return cls(region=parse_region(text))
        if "+" in text or ":" in text:
            place = Location.parse(text)
            return cls(region=place.region, start=place.offset, stop=place.offset + place.width)
        return cls(command=parse_command(text))

    def covers(self, request: Seen) -> bool:
        if self.command is not None:
            return request.header.command == self.command
        if request.header.command not in (Command.REGION_READ, Command.REGION_WRITE):
            return False
        if len(request.payload) < RegionAccess.LAYOUT.size:
            return False
        access = RegionAccess.parse(request.payload)
        return access.region == self.region and access.offset < self.stop and self.start < access.offset + access.count


class _Step(NamedTuple):
    """A recorded message with its number, and the command that it answers, if it is a reply."""

    number: int
    told: Told


class Replay:
    """A recorded connection, and a server to try it on: ``sock`` is connected to that, and this object's.

    ``timeout``: seconds for each reply. ``ignored`` says what is not compared. ``sent`` and ``compared`` count commands
    and replies.
    """

    def __init__(
        self, sock: socket.socket, messages: Iterable[Seen], timeout: float = 5.0, ignored: Sequence[Ignored] = ()
    ) -> None:
        self.sent = self.compared = 0
        self._timeout = timeout
        self._ignored = ignored
        self._names = RegisterNames()
        exchanges = Exchanges()
        self._steps = [_Step(number, exchanges.add(message)) for number, message in enumerate(messages, 1)]
        self._unanswered: OrderedDict[int, _Step] = OrderedDict()
        self._answers: dict[int, Seen] = {}
        self._match_answers()
        largest = max((step.told.message.header.msg_size for step in self._steps), default=0)
        self._room = min(largest, DISCARD_LIMIT) + DEFAULT_DATA_XFER_SIZE
        self._channels = [self._channel(sock)]
        self._replies: dict[tuple[int, int], deque[Seen]] = {}
        self._found: list[Difference] = []

    def _channel(self, sock: socket.socket) -> Channel:
        """With room for what was recorded, and for what is larger, too."""
        return Channel(sock, Framer(self._room))

    def _match_answers(self) -> None:
        """Which recorded reply the client gave to each of the server's commands."""
        asked: dict[tuple[bool, int, int], deque[int]] = {}
        for number, (message, _) in self._steps:
            key = message.place.twin, message.header.msg_id, message.header.command
            if message.is_command and message.place.sender is Role.SERVER:
                self._unanswered[number] = _Step(number, Told(message))
                asked.setdefault(key, deque()).append(number)
            elif not message.is_command and message.place.sender is Role.CLIENT and asked.get(key):
                self._answers[asked[key].popleft()] = message

    def run(self) -> Iterator[Difference]:
        """Play; give each difference when it is found. The last one may be that the server is gone.

        Raises CaptureError for a message that was not captured whole, OSError for descriptors that cannot be made.
        """
        for step in self._steps:
            try:
                self._take(step)
            except (ConnectionClosedError, ProtocolError) as error:
                self._found.append(self._difference(step, "connection", "open", str(error)))
                yield from self._found
                return
            yield from self._found
            self._found.clear()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Steps

    def _take(self, step: _Step) -> None:
        message = step.told.message
        if message.place.sender is Role.CLIENT:
            if message.is_command:
                self._send(step)
        elif message.is_command:
            self._await_command(step)
        elif step.told.request is not None:
            self._await_reply(step)

    def _send(self, step: _Step) -> None:
        message = step.told.message
        if message.fault or HEADER_SIZE + len(message.payload) != message.header.msg_size:
            raise CaptureError(f"message {step.number} was not captured whole: {message.fault}")
        with contextlib.ExitStack() as stack:
            fds = [stack.enter_context(_made_anew(fd)) for fd in message.fds]
            outgoing = Outgoing([message.header.pack(), message.payload], [fd.fileno() for fd in fds])
            self._channels[0].send(outgoing, time.monotonic() + self._timeout)
        self.sent += 1

    def _await_reply(self, step: _Step) -> None:
        recorded, request = step.told
        assert request is not None
        key = recorded.header.msg_id, recorded.header.command
        if not self._serve_until(lambda: bool(self._replies.get(key))):
            self._found.append(self._difference(step, "reply", "there", f"not there after {self._timeout:g} s"))
            return
        got = self._replies[key].popleft()
        self.compared += 1
        self._learn(request, got)
        if not recorded.fault and not any(one.covers(request) for one in self._ignored):
            self._found += self._compare(step, Told(got, request))

    def _learn(self, request: Seen, got: Seen) -> None:
        size = RegionAccess.LAYOUT.size
        if request.header.command == Command.REGION_READ and not got.is_error and len(got.payload) > size:
            access = RegionAccess.parse(got.payload)
            self._names.learn(access.region, access.offset, got.payload[size:])

    def _await_command(self, step: _Step) -> None:
        """The server's command that was recorded here: it has come already, or it must come now."""
        if not self._serve_until(lambda: step.number not in self._unanswered):
            del self._unanswered[step.number]
            self._found.append(self._difference(step, "command", "sent", f"not sent within {self._timeout:g} s"))

    # What comes

    def _serve_until(self, done: Callable[[], bool]) -> bool:
        """Take what the server sends until ``done()``; False: it did not come to that in time."""
        deadline = time.monotonic() + self._timeout
        while not done():
            poll = select.poll()
            by_fd = {channel.fileno(): channel for channel in self._channels}
            for fd in by_fd:
                poll.register(fd, select.POLLIN)
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for fd, _ in poll.poll(left * 1000 + 1):
                self._receive(by_fd[fd])
        return True

    def _receive(self, channel: Channel) -> None:
        twin = channel is not self._channels[0]
        try:
            channel.receive()
        except ConnectionClosedError:
            if not twin:
                raise
            self._channels.remove(channel)
            channel.close()
            return
        while (message := channel.framer.next_message()) is not None:
            self._came(channel, message, Place(1, twin, Role.SERVER))

    def _came(self, channel: Channel, message: Message, place: Place) -> None:
        seen = _seen(message, place)
        fds, message.fds = message.fds, []
        if seen.is_command:
            close_all(fds)
            self._answer(channel, seen)
            return
        if seen.header.command == Command.VERSION and fds and seen.fds[0].kind is FdKind.SOCKET:
            self._channels.append(self._channel(socket.socket(fileno=fds.pop(0).take())))
        close_all(fds)
        self._replies.setdefault((seen.header.msg_id, seen.header.command), deque()).append(seen)

    def _answer(self, channel: Channel, command: Seen) -> None:
        """Answer a command of the server's as the recorded client did."""
        step = self._recorded_command(command)
        answer = self._answers.get(step.number) if step else None
        if step is None and len(self._found) < MAX_UNREPORTED:
            name = f"{command_name(command.header.command)} {_target(Told(command), self._names)}".rstrip()
            self._found.append(Difference(0, name, "command", "none", "sent"))
        elif step is not None and bytes(step.told.message.payload) != bytes(command.payload):
            self._found += self._compare(step, Told(command))
        if command.posted:
            return
        flags, error = (int(HeaderFlags.REPLY | HeaderFlags.ERROR), errno.EINVAL)
        payload = b""
        if answer is not None:
            flags, error, payload = answer.header.flags, answer.header.error_no, bytes(answer.payload)
        header = Header(command.header.msg_id, command.header.command, HEADER_SIZE + len(payload), flags, error)
        channel.send(Outgoing([header.pack(), payload]), time.monotonic() + self._timeout)

    def _recorded_command(self, command: Seen) -> _Step | None:
        """The recorded one that this is: the same, among those that are due, or else the next of its kind."""
        due = islice(self._unanswered.values(), DUE)
        alike = [step for step in due if step.told.message.header.command == command.header.command]
        same = (step for step in alike if bytes(step.told.message.payload) == bytes(command.payload))
        step = next(same, next(iter(alike), None))
        if step is not None:
            del self._unanswered[step.number]
        return step

    # Comparison

    def _compare(self, step: _Step, got: Told) -> Iterator[Difference]:
        recorded = step.told
        command = recorded.message.header.command
        theirs, ours = (_facts(told, decode(told, self._names)) for told in (recorded, got))
        if theirs["error"] != ours["error"]:
            yield self._difference(step, "error", theirs["error"], ours["error"])
            return
        for name in [*theirs, *(ours.keys() - theirs.keys())]:
            if theirs.get(name) != ours.get(name) and (command, name) not in MAY_DIFFER:
                yield self._difference(step, name, *_first_difference(theirs.get(name), ours.get(name)))

    def _difference(self, step: _Step, what: str, recorded: str, got: str) -> Difference:
        message = step.told.message
        name = f"{command_name(message.header.command)} #{message.header.msg_id}"
        target = _target(step.told, self._names)
        return Difference(step.number, f"{name} {target}".rstrip(), what, recorded, got)


def _seen(message: Message, place: Place) -> Seen:
    size = HEADER_SIZE + len(message.payload)
    header = Header(message.msg_id, message.command, size, message.flags, message.error)
    fds = tuple(describe_fd(fd.fileno()) for fd in message.fds)
    return Seen(time.time_ns(), place, header, bytes(message.payload), fds, message.fault)


def _facts(told: Told, decoded: Decoded) -> dict[str, Any]:
    """What is compared of a message. An error that carries no errno reads as EINVAL, as it does for a client."""
    message = told.message
    error = message.header.error_no
    return {
        "error": errno_name(error if error in errno.errorcode else errno.EINVAL) if message.is_error else "none",
        "malformed": decoded.malformed or "no",
        "fds": len(message.fds),
        "data": bytes(decoded.data),
        **decoded.as_json(),
    }


def _first_difference(recorded: Any, got: Any) -> tuple[str, str]:
    """Both in words; of data, where they part."""
    if not isinstance(recorded, bytes) or not isinstance(got, bytes):
        return str(recorded), str(got)
    if len(recorded) != len(got):
        return f"{len(recorded)} bytes", f"{len(got)} bytes"
    at = next(i for i, (one, other) in enumerate(zip(recorded, got, strict=True)) if one != other)
    return f"{recorded[at]:#04x} at byte {at:#x}", f"{got[at]:#04x}"


def _target(told: Told, names: RegisterNames) -> str:
    decoded = decode(told, names)
    return " ".join((decoded.target, *decoded.registers))


def _made_anew(fd: SeenFd) -> OwnedFd:
    """A descriptor of the same kind and size."""
    if fd.kind is FdKind.EVENTFD:
        return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    if fd.kind in (FdKind.SOCKET, FdKind.PIPE):
        ends = socket.socketpair()
        ends[1].close()
        return OwnedFd(ends[0].detach())
    made = OwnedFd(os.memfd_create("replay", os.MFD_CLOEXEC))
    os.ftruncate(made.fileno(), fd.size)
    return made


def connections(messages: Iterable[Seen]) -> dict[int, list[Seen]]:
    """The messages of a capture by connection."""
    found: dict[int, list[Seen]] = {}
    for message in messages:
        found.setdefault(message.place.connection, []).append(message)
    return found


def choose_connection(found: Mapping[int, list[Seen]], wanted: int | None) -> list[Seen]:
    """One of them, by default the first. Raises UsageError for one that is not there, CaptureError for none at all."""
    if not found:
        raise CaptureError("there is no message in it")
    if wanted is not None and wanted not in found:
        raise UsageError(f"there is no connection {wanted}; there are: {', '.join(map(str, sorted(found)))}")
    return found[min(found) if wanted is None else wanted]
