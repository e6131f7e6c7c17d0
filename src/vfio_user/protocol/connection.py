"""The state of one connection, the same for both roles: who may say what, which replies are awaited.

This file does not know who handles a command, nor how bytes travel: it judges incoming messages and composes
outgoing ones. What it hands out to be sent is an :class:`Outgoing`: buffers and descriptors for one sendmsg.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vfio_user.errors import MessageError, UnexpectedReplyError, UsageError
from vfio_user.protocol.framing import Framer, Message
from vfio_user.wire.commands import COMMANDS, CommandSpec, Role, command_name
from vfio_user.wire.constants import HEADER_SIZE, Command, HeaderFlags
from vfio_user.wire.messages import Buffer, Header

_pack_header = Header.LAYOUT.pack
_REPLY = int(HeaderFlags.REPLY)
_REPLY_ERROR = int(HeaderFlags.REPLY | HeaderFlags.ERROR)
_NO_REPLY = int(HeaderFlags.NO_REPLY)
_VERSION = int(Command.VERSION)

MAX_PENDING = 1024
"""Commands of one side that may await their replies at once."""
MAX_ABANDONED = 64


class Outgoing(NamedTuple):
    """One message to send: its buffers in order, and the numbers of the descriptors that travel with it."""

    buffers: Sequence[Buffer]
    fds: Sequence[int] = ()


class Connection:
    """One side of a connection.

    Incoming messages go through :meth:`check`, which raises a ProtocolError for what the peer may not say now. A
    reply that passed is matched to its command. The peer's first command must be VERSION, and there is only one.
    """

    def __init__(self, role: Role, max_size: int, commands: Mapping[int, CommandSpec] = COMMANDS) -> None:
        self.role = role
        self.commands = commands
        self.framer = Framer(max_size)
        self.negotiated = False
        self._next_id = 0
        self._pending: dict[int, int] = {}
        self._abandoned: dict[int, int] = {}

    # What this side says

    def command(
        self, command: int, parts: Sequence[Buffer] = (), fds: Sequence[int] = (), *, posted: bool = False
    ) -> tuple[int, Outgoing]:
        """Compose a command: its id, and what to send. Unless ``posted``, its reply is awaited from now on."""
        if len(self._pending) >= MAX_PENDING:
            raise UsageError(f"{MAX_PENDING} commands await their replies already")
        msg_id = self._allocate_id()
        if not posted:
            self._pending[msg_id] = command
        size = HEADER_SIZE + sum(map(len, parts))
        header = _pack_header(msg_id, command, size, _NO_REPLY if posted else 0, 0)
        return msg_id, Outgoing((header, *parts), fds)

    def _allocate_id(self) -> int:
        while True:
            msg_id = self._next_id
            self._next_id = (msg_id + 1) & 0xFFFF
            if msg_id not in self._pending and msg_id not in self._abandoned:
                return msg_id

    def abandon(self, msg_id: int) -> None:
        """Await the reply no longer; should it come after all, it is dropped without a word."""
        command = self._pending.pop(msg_id, None)
        if command is not None:
            self._abandoned[msg_id] = command
            while len(self._abandoned) > MAX_ABANDONED:
                del self._abandoned[next(iter(self._abandoned))]

    @staticmethod
    def reply(request: Message, parts: Sequence[Buffer] = (), fds: Sequence[int] = ()) -> Outgoing:
        size = HEADER_SIZE + sum(map(len, parts))
        return Outgoing((_pack_header(request.msg_id, request.command, size, _REPLY, 0), *parts), fds)

    @staticmethod
    def error_reply(request: Message, error: int) -> Outgoing:
        """The answer to a command that failed: a header and nothing else."""
        return Outgoing((_pack_header(request.msg_id, request.command, HEADER_SIZE, _REPLY_ERROR, error),))

    # What the peer says

    def check(self, message: Message) -> bool:
        """Judge an incoming message: whether somebody must look at it. Raises MessageError, UnexpectedReplyError.

        A reply that passes is the one to a pending command, which is pending no longer; a late one to an abandoned
        command passes but is of no interest.
        """
        if message.is_command:
            self._check_command(message)
            return True
        if not message.is_reply:
            raise MessageError(f"{message!r} is neither a command nor a reply")
        return self._check_reply(message)

    def _check_reply(self, message: Message) -> bool:
        if self._abandoned.get(message.msg_id) == message.command:
            del self._abandoned[message.msg_id]
            return False
        expected = self._pending.get(message.msg_id)
        if expected is None:
            raise UnexpectedReplyError(f"{message!r} answers nothing that was asked")
        if expected != message.command:
            raise UnexpectedReplyError(f"{message!r} answers a {command_name(expected)}")
        del self._pending[message.msg_id]
        if message.fault:
            raise MessageError(message.fault)
        return True

    def _check_command(self, message: Message) -> None:
        row = self.commands.get(message.command)
        if self.role is Role.SERVER and not self.negotiated and message.command != _VERSION:
            raise MessageError(f"{command_name(message.command)} before VERSION")
        if row is None:
            if message.command in COMMANDS and COMMANDS[message.command].sender is not self.role:
                raise MessageError(f"{command_name(message.command)} is not served here", errno.EPERM)
            raise MessageError(f"{message.command} is no command")
        if row.sender is self.role:
            raise MessageError(f"a {self.role.value} does not take {row.command.name}")
        if self.negotiated and message.command == _VERSION:
            raise MessageError("VERSION again: it was negotiated already")
        if message.fault:
            raise MessageError(message.fault)
        if len(message.fds) > row.request_fds:
            raise MessageError(
                f"{row.command.name} takes {row.request_fds} file descriptors at most, {len(message.fds)} came"
            )
        if len(message.payload) < row.request.LAYOUT.size:
            raise MessageError(
                f"{row.command.name} takes {row.request.LAYOUT.size} bytes at least, {len(message.payload)} came"
            )

    def close(self) -> None:
        """Close the descriptors that came and that no message took."""
        self.framer.close()
