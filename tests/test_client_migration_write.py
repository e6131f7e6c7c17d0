"""Migration data in several messages: on its way at once, and in order."""

from __future__ import annotations

import errno

import pytest

from tests.hostile import Peer, Request, both, offering, pattern, scripted
from vfio_user.errors import CommandError
from vfio_user.wire.constants import Command

pytestmark = both


def test_the_parts_are_pipelined(kind: str) -> None:
    """The first reply is only sent once the second part is there."""
    waiting: list[Request] = []

    def answer_in_pairs(peer: Peer, request: Request) -> None:
        waiting.append(request)
        if len(waiting) == 2:
            for held in (waiting.pop(), waiting.pop()):
                peer.reply(held)

    data = bytes(range(200)) * 4
    answers = {**offering(max_data_xfer_size=4), Command.MIG_DATA_WRITE: answer_in_pairs}
    with scripted(kind, answers) as (client, server):
        client.migration_write_data(data)
        parts = [request.payload[8:] for request in server.of(Command.MIG_DATA_WRITE)]
    assert len(parts) == 200
    assert b"".join(parts) == data


@pytest.mark.parametrize("refused", [0, 1, 63, 64, 99])
def test_a_part_that_is_refused_fails_the_call_and_nothing_else(kind: str, refused: int) -> None:
    def answer(peer: Peer, request: Request) -> None:
        if request.payload[8:] == bytes([refused]) * 4:
            peer.refuse(request, errno.EINVAL)
        else:
            peer.reply(request)

    answers = {**offering(max_data_xfer_size=4), Command.MIG_DATA_WRITE: answer}
    with scripted(kind, answers) as (client, _):
        for _ in range(2):
            with pytest.raises(CommandError) as caught:
                client.migration_write_data(b"".join(bytes([part]) * 4 for part in range(100)))
            assert caught.value.errno == errno.EINVAL
            assert client.region_read(0, 0, 4) == pattern(0, 4)
