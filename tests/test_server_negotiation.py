"""VERSION over a socket: protocol.md, section 3, and rows 7, 8, 21, 24, 25, 26 of section 0."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.support import (
    ALL_CAPABILITIES,
    ERROR,
    HEADER,
    NO_REPLY,
    REPLY,
    TWIN_CAPABILITIES,
    RecordingBackend,
    Serving,
    assert_quiet,
    eventfds,
    message,
    recording,
    serving,
)


@pytest.fixture
def served(caplog: pytest.LogCaptureFixture) -> Iterator[Serving]:
    with recording(RecordingBackend()) as backend, serving(backend) as served:
        yield served
    assert_quiet(caplog)


def version(text: bytes = b"", *, major: int = 0, minor: int = 2) -> bytes:
    return struct.pack("<HH", major, minor) + text


def test_row07_the_reply(served: Serving) -> None:
    reply = served.connect().version(ALL_CAPABILITIES)
    assert (reply.flags, reply.error, reply.fds) == (REPLY, 0, [])
    assert reply.payload[:4] == struct.pack("<HH", 0, 2)
    assert len(reply.payload) <= 4 + len(ALL_CAPABILITIES)
    assert json.loads(reply.payload[4:-1]) == {
        "capabilities": {
            "max_msg_fds": 8,
            "max_data_xfer_size": 1048576,
            "max_dma_maps": 65535,
            "pgsizes": 4096,
            "write_multiple": True,
            "migration": {"pgsize": 4096},
        }
    }
    assert b" " not in reply.payload[4:]


def test_row07_a_request_without_json_gets_a_reply_without(served: Serving) -> None:
    peer = served.connect()
    assert peer.version(b"").payload == struct.pack("<HH", 0, 2)
    peer.check_alive()


@pytest.mark.parametrize("text", [b"{}\0", b'{"capabilities":{}}\0', b'{"capabilities":{"max_msg_fds":7}}   \0'])
def test_row07_never_longer_than_the_clients(served: Serving, text: bytes) -> None:
    reply = served.connect().version(text)
    assert len(reply.payload) <= 4 + len(text)
    assert set(json.loads(reply.payload[4:-1]).get("capabilities", {})) <= {"max_msg_fds"}


@pytest.mark.parametrize(("minor", "answer"), [(0, 0), (1, 1), (2, 2), (3, 2), (7, 2), (65535, 2)])
def test_row21_minor_version(served: Serving, minor: int, answer: int) -> None:
    peer = served.connect()
    assert peer.version(minor=minor).payload[:4] == struct.pack("<HH", 0, answer)
    peer.check_alive()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(version(ALL_CAPABILITIES, major=1), id="major 1"),
        pytest.param(version(ALL_CAPABILITIES, major=65535), id="major 65535"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0\0\2", id="cut in the minor"),
        pytest.param(version(b"{}"), id="no NUL"),
        pytest.param(version(b"\0"), id="NUL alone"),
        pytest.param(version(b"[]\0"), id="no object"),
        pytest.param(version(b"not JSON\0"), id="no JSON"),
        pytest.param(version(b'{"a":"\xff\xfe"}\0'), id="no UTF-8"),
        pytest.param(version(b'{"capabilities":[]}\0'), id="capabilities no object"),
        pytest.param(version(b'{"capabilities":{"max_msg_fds":NaN}}\0'), id="NaN"),
        pytest.param(version(b'{"capabilities":{"max_msg_fds":true}}\0'), id="bool"),
        pytest.param(version(b'{"capabilities":{"max_msg_fds":1025}}\0'), id="max_msg_fds 1025"),
        pytest.param(version(b'{"capabilities":{"max_msg_fds":-1}}\0'), id="max_msg_fds -1"),
        pytest.param(version(b'{"capabilities":{"max_data_xfer_size":0}}\0'), id="max_data_xfer_size 0"),
        pytest.param(version(b'{"capabilities":{"max_data_xfer_size":"1"}}\0'), id="string"),
        pytest.param(version(b'{"capabilities":{"pgsizes":2048}}\0'), id="pgsizes 2048"),
        pytest.param(version(b'{"a":' + b"[" * 60000 + b"\0"), id="deep"),
        pytest.param(version(b'{"a":' + b"[" * 30000 + b"]" * 30000 + b"}\0"), id="deep and whole"),
        pytest.param(version(b'{"a":"' + b"x" * 500_000 + b'"}\0'), id="huge"),
        pytest.param(version(b'{"a":"' + b"x" * (2 << 20) + b'"}\0'), id="larger than any message"),
    ],
)
def test_row08_failed_negotiation_is_answered_and_closed(served: Serving, payload: bytes) -> None:
    peer = served.connect()
    assert peer.refused(1, payload) == errno.EINVAL
    assert peer.at_end()
    served.client().check_alive()


def test_row08_no_reply_does_not_count_for_version(served: Serving) -> None:
    assert served.connect().refused(1, version(b"\0"), flags=NO_REPLY) == errno.EINVAL
    peer = served.connect()
    assert peer.call(1, version(), flags=NO_REPLY).flags == REPLY
    peer.check_alive()


@pytest.mark.parametrize("command", [*range(2, 20), 0, 65535])
def test_row24_anything_before_version(served: Serving, command: int) -> None:
    for flags in (0, NO_REPLY):
        peer = served.connect()
        assert peer.refused(command, bytes(40), flags=flags) == errno.EINVAL
        assert peer.at_end()


@pytest.mark.parametrize("flags", [REPLY, REPLY | ERROR, 2, 15])
def test_row24_no_command_before_version(served: Serving, flags: int) -> None:
    peer = served.connect()
    assert peer.refused(1, version(), flags=flags) == errno.EINVAL
    assert peer.at_end()


def test_row24_what_follows_a_failed_negotiation_is_not_served(served: Serving) -> None:
    peer = served.connect()
    peer.send(message(1, 1, version(b"\0")) + message(2, 1, version()) + message(3, 13))
    assert peer.read().error == errno.EINVAL
    assert peer.at_end()
    assert isinstance(served.server.backend, RecordingBackend)
    assert not served.server.backend.called("reset")


@pytest.mark.parametrize("text", [b"", ALL_CAPABILITIES, b"\0"])
def test_row24_a_second_version(served: Serving, text: bytes) -> None:
    peer = served.client()
    assert peer.refused(1, version(text)) == errno.EINVAL
    peer.check_alive()


def test_descriptors_with_version(served: Serving) -> None:
    peer = served.connect()
    with eventfds(1) as fds:
        assert peer.refused(1, version(), fds) == errno.EINVAL
    assert peer.at_end()


@pytest.mark.parametrize("size", [0, 15, (64 << 20) + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("negotiated", [False, True])
def test_sizes_that_cannot_be_framed_close(served: Serving, size: int, negotiated: bool) -> None:
    """protocol.md, section 3: no reply, just close."""
    peer = served.client() if negotiated else served.connect()
    peer.send(HEADER.pack(1, 1, size, 0, 0) + bytes(100))
    assert peer.at_end()
    served.client().check_alive()


def test_version_in_single_bytes(served: Serving) -> None:
    peer = served.connect()
    for byte in message(1, 1, version(ALL_CAPABILITIES)):
        peer.send(bytes([byte]))
    assert peer.read().flags == REPLY
    peer.check_alive()


def test_row25_good_values_that_others_refuse(served: Serving) -> None:
    text = (
        b'{"capabilities":{"max_msg_fds":0,"max_data_xfer_size":1024,"migration":{},"pgsizes":18446744073709547520}}\0'
    )
    reply = served.connect().version(text)
    assert reply.flags == REPLY
    assert json.loads(reply.payload[4:-1])["capabilities"]["max_data_xfer_size"] == 1048576


def test_row26_twin_socket(served: Serving) -> None:
    peer = served.connect()
    reply = peer.version(TWIN_CAPABILITIES)
    assert json.loads(reply.payload[4:-1])["capabilities"]["twin_socket"] == {"supported": True, "fd_index": 0}
    (fd,) = reply.fds
    with socket.socket(fileno=os.dup(fd)) as twin:
        assert (twin.family, twin.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
    peer.check_alive()


@pytest.mark.parametrize(
    "text",
    [
        b'{"capabilities":{"twin_socket":{"supported":true}}}\0',  # no room for the answer
        b'{"capabilities":{"max_msg_fds":0,"twin_socket":{"supported":true}}}' + b" " * 40 + b"\0",
        b'{"capabilities":{"twin_socket":{"supported":false}}}' + b" " * 40 + b"\0",
    ],
)
def test_row26_twin_socket_not_granted(served: Serving, text: bytes) -> None:
    peer = served.connect()
    reply = peer.version(text)
    assert (reply.flags, reply.fds) == (REPLY, [])
    assert b"twin_socket" not in reply.payload
    peer.check_alive()


def test_a_server_of_small_transfers_takes_version_data(caplog: pytest.LogCaptureFixture) -> None:
    """max_data_xfer_size bounds the data of one message, not every message."""
    with recording(RecordingBackend()) as backend, serving(backend, max_data_xfer_size=64) as served:
        peer = served.client()
        assert peer.refused(9, struct.pack("<QII", 0, 0, 65)) == errno.EINVAL
        assert len(peer.region_read(0, 0, 64)) == 64
        assert peer.refused(10, struct.pack("<QII", 0, 0, 65) + bytes(65)) == errno.EINVAL
        peer.region_write(0, 0, bytes(64))
    assert_quiet(caplog)
