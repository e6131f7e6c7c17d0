"""The fuzz targets, driven by hypothesis and by recorded traffic with bytes changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzz import client, server
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.wire.commands import COMMANDS
from vfio_user.wire.messages import Header

VECTORS = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "rust-vfio-user.jsonl").read_text().splitlines()
]
REQUESTS = [bytes.fromhex(vector["request_hex"]) for vector in VECTORS]
REPLIES = [bytes.fromhex(vector["reply_hex"]) for vector in VECTORS if vector["reply_hex"]]


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A header that is right more often than chance would have it, and some payload."""
    payload = draw(st.binary(max_size=80))
    command = draw(st.sampled_from([*COMMANDS, 0, 14, 99]))
    size = draw(st.sampled_from([16 + len(payload)] * 4 + [0, 15, 2**32 - 1, 1 << 21]))
    flags = draw(st.sampled_from([0, 0, 0, 1, 0x10, 0x21, 0xFFFFFFFF]))
    return Header(draw(st.integers(0, 3)), command, size, flags, draw(st.integers(0, 2**32 - 1))).pack() + payload


def mutated(recorded: list[bytes]) -> st.SearchStrategy[bytes]:
    """A recorded message with some of its bytes changed."""
    return st.tuples(
        st.sampled_from(recorded), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4)
    ).map(lambda drawn: change(*drawn))


def change(message: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(message)
    for position, value in changes:
        changed[position % len(changed)] = value
    return bytes(changed)


streams = st.lists(messages() | mutated(REQUESTS), max_size=5).map(b"".join) | st.binary(max_size=300)


@settings(max_examples=300, deadline=None)
@given(piece=st.integers(0, 255), stream=streams)
def test_a_server_answers_any_bytes(piece: int, stream: bytes) -> None:
    server.run(bytes([piece]) + stream)


@settings(max_examples=300, deadline=None)
@given(
    choice=st.integers(0, len(client.CALLS) - 1),
    piece=st.integers(0, 255),
    stream=st.lists(messages() | mutated(REPLIES), max_size=5).map(b"".join) | st.binary(max_size=300),
)
def test_a_client_reads_any_bytes(choice: int, piece: int, stream: bytes) -> None:
    client.run(bytes([choice, piece]) + stream)


def test_the_targets_do_reach_the_code() -> None:
    get_info = next(request for request in REQUESTS if request[2] == 4)
    assert len(server.run(b"\0" + get_info + get_info)) == 2
    version = next(reply for reply in REPLIES if reply[2] == 1)
    assert client.run(b"\0\0" + version) == "done"
    assert client.run(b"\0\0") == "more was needed"


@pytest.mark.parametrize("piece", [0, 6, 255])
def test_a_bad_message_costs_one_reply(piece: int) -> None:
    bad = Header(7, 99, 16, 0, 0).pack()
    good = next(request for request in REQUESTS if request[2] == 4)
    replies = [Header.parse(reply) for reply in server.run(bytes([piece]) + bad + good)]
    assert [(reply.msg_id, reply.error_no) for reply in replies] == [(7, 22), (Header.parse(good).msg_id, 0)]
