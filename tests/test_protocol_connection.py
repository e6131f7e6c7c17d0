"""The state of a connection in both roles: who may say what, and which reply belongs to which command."""

from __future__ import annotations

import errno
import os

import pytest

from tests.support import ERROR, HEADER, NO_REPLY, REPLY
from vfio_user.errors import MessageError, UnexpectedReplyError, UsageError
from vfio_user.fds import OwnedFd
from vfio_user.protocol import Connection, Message, Outgoing
from vfio_user.protocol.connection import MAX_ABANDONED, MAX_PENDING
from vfio_user.wire.commands import COMMANDS, Role
from vfio_user.wire.constants import Command

MAX_SIZE = 4096


def connection(role: Role = Role.SERVER, *, negotiated: bool = True) -> Connection:
    made = Connection(role, MAX_SIZE)
    made.negotiated = negotiated
    return made


def incoming(
    command: int, payload: bytes = b"", *, msg_id: int = 1, flags: int = 0, fault: str | None = None
) -> Message:
    return Message(msg_id, command, flags, 0, memoryview(payload), fault=fault)


def reply_to(msg_id: int, command: int, *, fault: str | None = None) -> Message:
    return incoming(command, msg_id=msg_id, flags=REPLY, fault=fault)


def request_of(command: int) -> bytes:
    return bytes(COMMANDS[command].request.LAYOUT.size)


def raw(outgoing: Outgoing) -> bytes:
    return b"".join(bytes(part) for part in outgoing.buffers)


def test_what_a_command_looks_like() -> None:
    client = connection(Role.CLIENT)
    msg_id, outgoing = client.command(Command.REGION_WRITE, [b"head", bytearray(b"data"), memoryview(b"!")], [5])
    assert raw(outgoing) == HEADER.pack(msg_id, 10, 25, 0, 0) + b"headdata!"
    assert outgoing.fds == [5]
    msg_id, outgoing = client.command(Command.REGION_WRITE, posted=True)
    assert raw(outgoing) == HEADER.pack(msg_id, 10, 16, NO_REPLY, 0)


def test_what_replies_look_like() -> None:
    request = incoming(9, msg_id=0xABCD, flags=NO_REPLY | 0xFFFFFF00)
    assert raw(Connection.reply(request, [b"abc"], [3])) == HEADER.pack(0xABCD, 9, 19, REPLY, 0) + b"abc"
    assert Connection.reply(request, [b"abc"], [3]).fds == [3]
    assert raw(Connection.error_reply(request, 0xBEEF)) == HEADER.pack(0xABCD, 9, 16, REPLY | ERROR, 0xBEEF)


def test_ids_wrap_around_those_that_are_pending() -> None:
    client = connection(Role.CLIENT)
    kept = {client.command(Command.REGION_READ)[0] for _ in range(3)}
    seen = [client.command(Command.REGION_READ, posted=True)[0] for _ in range(2 * 65536)]
    assert not kept & set(seen)
    assert set(seen) == set(range(65536)) - kept
    assert seen[:65533] == seen[65533 : 2 * 65533]
    for msg_id in kept:
        assert client.check(reply_to(msg_id, 9))
    assert kept <= {client.command(Command.REGION_READ, posted=True)[0] for _ in range(65536)}


def test_pending_commands_are_bounded() -> None:
    client = connection(Role.CLIENT)
    ids = [client.command(Command.REGION_READ)[0] for _ in range(MAX_PENDING)]
    with pytest.raises(UsageError, match=str(MAX_PENDING)):
        client.command(Command.REGION_READ)
    client.check(reply_to(ids[500], 9))
    client.command(Command.REGION_READ)


@pytest.mark.parametrize(("role", "command"), [(Role.CLIENT, 9), (Role.SERVER, 11)])
def test_a_reply_is_taken_once(role: Role, command: int) -> None:
    side = connection(role)
    first, _ = side.command(command)
    second, _ = side.command(command)
    assert side.check(reply_to(second, command))
    assert side.check(reply_to(first, command))
    with pytest.raises(UnexpectedReplyError, match="answers nothing"):
        side.check(reply_to(first, command))


@pytest.mark.parametrize("role", Role)
def test_replies_that_nobody_awaits(role: Role) -> None:
    side = connection(role)
    msg_id, _ = side.command(9 if role is Role.CLIENT else 11)
    for other in (msg_id + 1, 65535):
        with pytest.raises(UnexpectedReplyError) as caught:
            side.check(reply_to(other, 9))
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(UnexpectedReplyError, match="answers a"):
        side.check(reply_to(msg_id, 10))
    assert side.check(reply_to(msg_id, 9 if role is Role.CLIENT else 11))


def test_no_reply_to_a_posted_command() -> None:
    client = connection(Role.CLIENT)
    msg_id, _ = client.command(Command.REGION_WRITE, posted=True)
    with pytest.raises(UnexpectedReplyError):
        client.check(reply_to(msg_id, 10))


def test_a_late_reply_to_an_abandoned_command_is_dropped_once() -> None:
    server = connection()
    msg_id, _ = server.command(Command.DMA_READ)
    server.abandon(msg_id)
    server.abandon(msg_id)
    with pytest.raises(UnexpectedReplyError):
        server.check(reply_to(msg_id, 12))
    assert server.check(reply_to(msg_id, 11)) is False
    with pytest.raises(UnexpectedReplyError):
        server.check(reply_to(msg_id, 11))


def test_ids_of_abandoned_commands_rest_and_are_bounded() -> None:
    server = connection()
    ids = []
    for _ in range(MAX_ABANDONED + 3):
        msg_id, _ = server.command(Command.DMA_READ)
        server.abandon(msg_id)
        ids.append(msg_id)
    again = {server.command(Command.DMA_READ, posted=True)[0] for _ in range(65536)}
    assert again == set(range(65536)) - set(ids[3:])
    with pytest.raises(UnexpectedReplyError):
        server.check(reply_to(ids[0], 11))
    assert server.check(reply_to(ids[3], 11)) is False


def test_a_faulty_reply_is_pending_no_longer() -> None:
    client = connection(Role.CLIENT)
    msg_id, _ = client.command(Command.REGION_READ)
    with pytest.raises(MessageError, match="too large"):
        client.check(reply_to(msg_id, 9, fault="too large"))
    with pytest.raises(UnexpectedReplyError):
        client.check(reply_to(msg_id, 9))


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("command", COMMANDS)
def test_directions(role: Role, command: int) -> None:
    side = connection(role, negotiated=command != Command.VERSION)
    message = incoming(command, request_of(command))
    if COMMANDS[command].sender is role:
        with pytest.raises(MessageError, match=f"a {role.value} does not take {COMMANDS[command].command.name}"):
            side.check(message)
    else:
        assert side.check(message)


@pytest.mark.parametrize("command", [0, 14, 19, 65535])
@pytest.mark.parametrize("role", Role)
def test_unknown_commands(role: Role, command: int) -> None:
    with pytest.raises(MessageError, match="is no command"):
        connection(role).check(incoming(command))


@pytest.mark.parametrize("kind", range(2, 16))
def test_neither_a_command_nor_a_reply(kind: int) -> None:
    with pytest.raises(MessageError, match="neither"):
        connection().check(incoming(9, bytes(16), flags=kind))


@pytest.mark.parametrize("command", [*(set(COMMANDS) - {Command.VERSION}), 0, 14])
def test_row24_nothing_before_version(command: int) -> None:
    server = connection(negotiated=False)
    with pytest.raises(MessageError, match="before VERSION"):
        server.check(incoming(command, bytes(64)))
    assert server.check(incoming(Command.VERSION, bytes(4)))


def test_row24_version_once() -> None:
    with pytest.raises(MessageError, match="again"):
        connection().check(incoming(Command.VERSION, bytes(4)))


@pytest.mark.parametrize("command", [row for row in COMMANDS if COMMANDS[row].sender is Role.CLIENT])
def test_a_command_without_its_fixed_part(command: int) -> None:
    server = connection(negotiated=command != Command.VERSION)
    size = COMMANDS[command].request.LAYOUT.size
    assert server.check(incoming(command, bytes(size)))
    for short in {0, size - 1} - {-1, size}:
        with pytest.raises(MessageError, match=f"takes {size} bytes at least, {short} came"):
            server.check(incoming(command, bytes(short)))


@pytest.mark.parametrize("command", [row for row in COMMANDS if COMMANDS[row].sender is Role.CLIENT])
def test_descriptors_with_commands_that_take_none(command: int) -> None:
    most = COMMANDS[command].request_fds
    message = incoming(command, request_of(command))
    # The numbers are never used: take() ends the ownership before anything could be closed.
    message.fds = [OwnedFd(1000 + number) for number in range(most + 1)]
    try:
        with pytest.raises(MessageError, match=f"takes {most} file descriptors at most, {most + 1} came"):
            connection(negotiated=command != Command.VERSION).check(message)
    finally:
        for fd in message.fds:
            fd.take()


def test_a_faulty_command_is_refused() -> None:
    with pytest.raises(MessageError, match="descriptors were lost"):
        connection().check(incoming(9, bytes(16), fault="descriptors were lost"))


def test_close_closes_what_nobody_took() -> None:
    side = connection()
    fd = OwnedFd(os.memfd_create("stray"))
    side.framer.feed(HEADER.pack(1, 8, 40, 0, 0), [fd])
    side.close()
    assert fd.closed
