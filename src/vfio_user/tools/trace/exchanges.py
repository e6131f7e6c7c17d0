"""Which command a reply answers, and how long that took."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from vfio_user.tools.trace.seen import Seen
from vfio_user.wire.commands import Role

MAX_PENDING = 4096
"""Commands without a reply that are remembered; beyond that the oldest is forgotten."""
KEPT = 4096
"""Bytes of a command's payload that are kept until its reply."""


_Key = tuple[int, bool, bool, int, int]
"""Connection, twin socket, whether the client asks, id and command."""


class Told(NamedTuple):
    """A message and, if it is a reply, the command that it answers; None where that was not seen."""

    message: Seen
    request: Seen | None = None

    @property
    def latency(self) -> int | None:
        """Nanoseconds from the command to this reply; None for a command, and where no times were recorded."""
        return self.message.time - self.request.time if self.request and self.message.time else None


class Exchanges:
    """Pairs replies with commands by place, id and command: an id may be in use again before its reply has come."""

    def __init__(self) -> None:
        self._pending: dict[_Key, deque[Seen]] = {}
        self._count = 0

    def add(self, message: Seen) -> Told:
        """What is known of a message that was seen."""
        is_command = message.is_command
        connection, twin, sender = message.place
        key = connection, twin, (sender is Role.CLIENT) is is_command, message.header.msg_id, message.header.command
        if not is_command:
            return Told(message, self._take(key))
        if not message.posted:
            self._remember(key, message)
        return Told(message)

    def forget(self, connection: int) -> None:
        """Nothing more comes on a connection."""
        for key in [key for key in self._pending if key[0] == connection]:
            self._count -= len(self._pending.pop(key))

    def _remember(self, key: _Key, message: Seen) -> None:
        if self._count >= MAX_PENDING:
            self._take(next(iter(self._pending)))
        self._pending.setdefault(key, deque()).append(message.kept(KEPT))
        self._count += 1

    def _take(self, key: _Key) -> Seen | None:
        waiting = self._pending.get(key)
        if waiting is None:
            return None
        self._count -= 1
        first = waiting.popleft()
        if not waiting:
            del self._pending[key]
        return first
