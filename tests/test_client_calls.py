"""The client's calls: what goes out, which replies are taken, and what a wrong reply is called.

Tests whose names have ``row_NN`` assert that row of protocol.md's section 0, the client's column.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.hostile import (
    ERROR,
    REPLY,
    Handler,
    Peer,
    Request,
    both,
    message,
    offering,
    pattern,
    scripted,
)
from vfio_user.errors import (
    CommandError,
    ConnectionClosedError,
    FramingError,
    MessageError,
    UnexpectedReplyError,
    UsageError,
    VfioUserError,
)
from vfio_user.testing import no_fd_leaks
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import Capabilities
from vfio_user.wire.constants import (
    Command,
    DeviceFeature,
    DeviceState,
    DmaFlags,
    DmaUnmapFlags,
    FeatureFlags,
    IrqSetFlags,
    MigrationFlags,
)

pytestmark = both

Call = Callable[[Any], object]


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


CALLS: dict[Command, Call] = {
    Command.REGION_READ: lambda client: client.region_read(0, 0x10, 8),
    Command.REGION_WRITE: lambda client: client.region_write(0, 0x10, b"12345678"),
    Command.REGION_WRITE_MULTI: lambda client: client.region_write_multi([(0, 0, b"1"), (0, 8, b"2")]),
    Command.DMA_MAP: lambda client: client.dma_map(0, 0x1000, memory=bytearray(0x1000)),
    Command.DMA_UNMAP: lambda client: client.dma_unmap(0, 0x1000),
    Command.DEVICE_SET_IRQS: lambda client: client.set_irqs(0, 0x21, 0, 1),
    Command.DEVICE_RESET: lambda client: client.reset(),
    Command.DEVICE_FEATURE: lambda client: client.migration_set_state(DeviceState.STOP),
    Command.MIG_DATA_READ: lambda client: client.migration_read_data(8),
    Command.MIG_DATA_WRITE: lambda client: client.migration_write_data(b"12345678"),
}
each_call = pytest.mark.parametrize("command", CALLS, ids=lambda command: command.name)
MULTI = offering(write_multiple=True)


# Replies that are errors


@each_call
@pytest.mark.parametrize("payload", [b"", b"\xff" * 7, bytes(5000)], ids=len)
def test_row_01_an_error_is_raised_whatever_its_payload(kind: str, command: Command, payload: bytes) -> None:
    refused: dict[int, Handler] = {command: lambda peer, request: peer.refuse(request, errno.EBUSY, payload)}
    with scripted(kind, {**MULTI, **refused}) as (client, _):
        with pytest.raises(CommandError, match=command.name) as caught:
            CALLS[command](client)
        assert caught.value.errno == errno.EBUSY
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, VfioUserError)
        assert client.version == (0, 2)
        assert client.regions[0].size
        CALLS[Command.DMA_MAP if command == Command.DEVICE_RESET else Command.DEVICE_RESET](client)


@pytest.mark.parametrize(
    ("sent", "raised"),
    [(0, errno.EINVAL), (4096, errno.EINVAL), (0xFFFFFFFF, errno.EINVAL), (4095, 4095), (1, errno.EPERM)],
)
def test_row_01_an_error_without_an_errno_is_einval(kind: str, sent: int, raised: int) -> None:
    answers: dict[int, Handler] = {Command.DEVICE_RESET: lambda peer, request: peer.refuse(request, sent)}
    with scripted(kind, answers) as (client, _):
        with pytest.raises(CommandError) as caught:
            client.reset()
        assert caught.value.errno == raised


def test_row_01_an_errno_without_the_flag_is_no_error(kind: str) -> None:
    answers: dict[int, Handler] = {Command.DEVICE_RESET: lambda peer, request: peer.reply(request, error=errno.EIO)}
    with scripted(kind, answers) as (client, _):
        client.reset()


def test_an_error_with_descriptors_closes_them(kind: str) -> None:
    fd = os.eventfd(0)
    try:
        answers: dict[int, Handler] = {
            Command.DEVICE_RESET: lambda peer, request: peer.reply(request, b"", [fd, fd], flags=REPLY | ERROR, error=5)
        }
        with scripted(kind, answers) as (client, _), pytest.raises(CommandError):
            client.reset()
    finally:
        os.close(fd)


# Replies that are wrong


@each_call
def test_a_reply_with_another_id_ends_the_connection(kind: str, command: Command) -> None:
    wrong: dict[int, Handler] = {command: lambda peer, r: peer.reply(r, r.payload, msg_id=r.msg_id ^ 0x8000)}
    with scripted(kind, {**MULTI, **wrong}) as (client, _):
        with pytest.raises(UnexpectedReplyError, match="answers nothing that was asked"):
            CALLS[command](client)
        with pytest.raises(ConnectionClosedError):
            client.reset()


@each_call
def test_a_reply_to_another_command_ends_the_connection(kind: str, command: Command) -> None:
    wrong: dict[int, Handler] = {command: lambda peer, r: peer.reply(r, r.payload, command=Command.VERSION)}
    with scripted(kind, {**MULTI, **wrong}) as (client, _):
        with pytest.raises(UnexpectedReplyError, match=f"VERSION reply.*answers a {command.name}"):
            CALLS[command](client)
        with pytest.raises(ConnectionClosedError):
            client.reset()


@pytest.mark.parametrize("flags", [2, 3, 0xF, 0xFFFFFFFE])
def test_what_is_neither_command_nor_reply_is_refused_and_not_taken_for_the_reply(kind: str, flags: int) -> None:
    def strange(peer: Peer, request: Request) -> None:
        if not flags & 0x10:
            answer = peer.ask(Command.DEVICE_RESET, b"", msg_id=request.msg_id, flags=flags)
            assert (answer.flags, answer.error) == (REPLY | ERROR, errno.EINVAL)
        else:
            peer.raw(message(request.msg_id, Command.DEVICE_RESET, flags=flags))
        peer.reply(request)

    with scripted(kind, {Command.DEVICE_RESET: strange}) as (client, _):
        client.reset()


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.REGION_READ, struct.pack("<QII", 0x10, 0, 8)),
        (Command.REGION_READ, struct.pack("<QII", 0x10, 0, 8) + bytes(7)),
        (Command.REGION_READ, struct.pack("<QII", 0x10, 0, 8) + bytes(9)),
        (Command.REGION_READ, struct.pack("<QII", 0x10, 0, 7) + bytes(8)),
        (Command.REGION_READ, struct.pack("<QII", 0x10, 1, 8) + bytes(8)),
        (Command.REGION_READ, struct.pack("<QII", 0x11, 0, 8) + bytes(8)),
        (Command.REGION_READ, struct.pack("<QII", 0x10, 0, 0xFFFFFFF8) + bytes(8)),
        (Command.REGION_READ, b""),
        (Command.REGION_READ, bytes(15)),
        (Command.REGION_READ, struct.pack("<QII", 0x10, 0, 8) + bytes(1 << 16)),
        (Command.REGION_WRITE, b""),
        (Command.REGION_WRITE, bytes(15)),
        (Command.REGION_WRITE, struct.pack("<QII", 0x10, 0, 7)),
        (Command.REGION_WRITE, struct.pack("<QII", 0x10, 0, 8) + b"x"),
        (Command.REGION_WRITE_MULTI, b""),
        (Command.REGION_WRITE_MULTI, struct.pack("<Q", 1)),
        (Command.REGION_WRITE_MULTI, struct.pack("<Q", 3)),
        (Command.REGION_WRITE_MULTI, struct.pack("<Q", (1 << 64) - 1)),
        (Command.REGION_WRITE_MULTI, struct.pack("<QQ", 2, 2)),
        (Command.DMA_MAP, b"x"),
        (Command.DMA_UNMAP, b""),
        (Command.DMA_UNMAP, bytes(23)),
        (Command.DEVICE_SET_IRQS, b"x"),
        (Command.DEVICE_RESET, b"x"),
        (Command.DEVICE_FEATURE, b""),
        (Command.DEVICE_FEATURE, bytes(7)),
        (Command.DEVICE_FEATURE, struct.pack("<IIII", 16, FeatureFlags.GET | 2, 1, 0)),
        (Command.DEVICE_FEATURE, struct.pack("<IIII", 16, FeatureFlags.SET | 1, 1, 0)),
        (Command.DEVICE_FEATURE, struct.pack("<IIIII", 16, FeatureFlags.SET | 2, 1, 0, 0)),
        (Command.MIG_DATA_READ, b""),
        (Command.MIG_DATA_READ, struct.pack("<II", 17, 9) + bytes(9)),
        (Command.MIG_DATA_READ, struct.pack("<II", 16, 8) + bytes(7)),
        (Command.MIG_DATA_READ, struct.pack("<II", 16, 8) + bytes(9)),
        (Command.MIG_DATA_READ, struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF) + bytes(8)),
        (Command.MIG_DATA_WRITE, b"x"),
    ],
    ids=lambda value: value.name if isinstance(value, Command) else value[:24].hex() or "empty",
)
def test_a_reply_with_wrong_contents_is_refused_and_the_connection_lives(
    kind: str, command: Command, payload: bytes
) -> None:
    wrong: dict[int, Handler] = {command: lambda peer, request: peer.reply(request, payload)}
    with scripted(kind, {**MULTI, **wrong}) as (client, _):
        with pytest.raises(MessageError, match=r"\d"):
            CALLS[command](client)
        CALLS[Command.REGION_READ if command == Command.DEVICE_RESET else Command.DEVICE_RESET](client)


@each_call
@pytest.mark.parametrize("size", [0, 1, 15, (64 << 20) + 1, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF])
def test_a_size_that_cannot_be_framed_ends_the_connection(kind: str, command: Command, size: int) -> None:
    wrong: dict[int, Handler] = {command: lambda peer, request: peer.reply(request, size=size)}
    with scripted(kind, {**MULTI, **wrong}) as (client, _):
        with pytest.raises(FramingError, match=f"message of {size} bytes"):
            CALLS[command](client)
        with pytest.raises(ConnectionClosedError):
            client.reset()


def test_a_reply_that_is_larger_than_anything_asked_for_is_skipped(kind: str) -> None:
    huge = bytes(3 << 20)
    answers: dict[int, Handler] = {Command.REGION_READ: lambda peer, request: peer.reply(request, huge)}
    with scripted(kind, answers) as (client, _):
        with pytest.raises(MessageError, match=f"message of {16 + len(huge)} bytes"):
            client.region_read(0, 0, 4)
        client.reset()


def test_descriptors_with_a_reply_that_has_none_are_refused_and_closed(kind: str) -> None:
    fd = os.eventfd(0)
    try:
        answers: dict[int, Handler] = {Command.DEVICE_RESET: lambda peer, request: peer.reply(request, b"", [fd])}
        with scripted(kind, answers) as (client, _), pytest.raises(MessageError, match="0 file descriptors at most"):
            client.reset()
    finally:
        os.close(fd)


# Regions


def test_row_16_reads_are_split_by_the_smaller_transfer_size(kind: str) -> None:
    with scripted(kind, offering(max_data_xfer_size=100)) as (client, server):
        assert client.region_read(1, 7, 250) == pattern(7, 250)
        asked = [m.RegionAccess.parse(request.payload) for request in server.of(Command.REGION_READ)]
    assert [(r.offset, r.region, r.count) for r in asked] == [(7, 1, 100), (107, 1, 100), (207, 1, 50)]
    with scripted(kind, proposal=Capabilities(max_data_xfer_size=64)) as (client, server):
        buffer = bytearray(65)
        client.region_read_into(0, 0, buffer)
        assert bytes(buffer) == pattern(0, 65)
        assert len(server.of(Command.REGION_READ)) == 2


@pytest.mark.parametrize(
    ("server_size", "max_write", "pieces"),
    [(100, None, [100, 100, 50]), (100, 80, [80, 80, 80, 10]), (100, 999, [100, 100, 50])],
)
def test_row_16_writes_are_split_by_transfer_size_and_max_write(
    kind: str, server_size: int, max_write: int | None, pieces: list[int]
) -> None:
    data = bytes(range(250))
    with scripted(kind, offering(max_data_xfer_size=server_size), max_write=max_write) as (client, server):
        client.region_write(1, 5, data)
        client.region_write_multi([(1, 5, data)])
        client.migration_write_data(data)
        region = [request.payload for request in server.of(Command.REGION_WRITE)]
        migration = [request.payload for request in server.of(Command.MIG_DATA_WRITE)]
    heads = [m.RegionAccess.parse(payload) for payload in region]
    assert [head.count for head in heads] == pieces * 2
    assert [head.offset for head in heads[: len(pieces)]] == [5 + sum(pieces[:i]) for i in range(len(pieces))]
    assert b"".join(payload[16:] for payload in region) == data * 2
    assert [m.MigData.parse(payload) for payload in migration] == [m.MigData(8 + size, size) for size in pieces]
    assert b"".join(payload[8:] for payload in migration) == data


def test_writes_are_pipelined(kind: str) -> None:
    """The first reply is only sent once the second write is there."""
    waiting: list[Request] = []

    def answer_in_pairs(peer: Peer, request: Request) -> None:
        waiting.append(request)
        if len(waiting) == 2:
            for held in (waiting.pop(), waiting.pop()):  # and not in order, either
                peer.reply(held, held.payload[:16])

    answers = {**offering(max_data_xfer_size=4), Command.REGION_WRITE: answer_in_pairs}
    with scripted(kind, answers) as (client, server):
        client.region_write(0, 0, bytes(4 * 200))
        assert len(server.of(Command.REGION_WRITE)) == 200


def test_a_pipelined_write_that_is_refused_fails_the_call_and_nothing_else(kind: str) -> None:
    def refuse_the_third(peer: Peer, request: Request) -> None:
        if m.RegionAccess.parse(request.payload).offset == 8:
            peer.refuse(request, errno.ENOSPC)
        else:
            peer.reply(request, request.payload[:16])

    answers = {**offering(max_data_xfer_size=4), Command.REGION_WRITE: refuse_the_third}
    with scripted(kind, answers) as (client, _):
        for _ in range(3):
            with pytest.raises(CommandError) as caught:
                client.region_write(0, 0, bytes(4 * 64))
            assert caught.value.errno == errno.ENOSPC
            assert client.region_read(0, 0, 4) == pattern(0, 4)


def test_a_pipelined_write_that_is_answered_for_another_place(kind: str) -> None:
    def confuse(peer: Peer, request: Request) -> None:
        peer.reply(request, m.RegionAccess(0, 0, 4).pack())

    with scripted(kind, {**offering(max_data_xfer_size=4), Command.REGION_WRITE: confuse}) as (client, _):
        with pytest.raises(MessageError, match="another place"):
            client.region_write(0, 0, bytes(8))
        client.reset()


def test_posted_writes_await_nothing(kind: str) -> None:
    with scripted(kind, offering(max_data_xfer_size=4)) as (client, server):
        client.region_write(0, 0, bytes(4 * 100), posted=True)
        client.region_read(0, 0, 4)
        writes = server.of(Command.REGION_WRITE)
        assert len(writes) == 100
        assert all(request.posted for request in writes)
        assert not server.requests[-1].posted


def test_nothing_is_sent_for_no_bytes(kind: str) -> None:
    with scripted(kind, MULTI) as (client, server):
        before = len(server.requests)
        client.region_write(0, 0, b"")
        client.region_write_multi([])
        client.region_write_multi([(0, 0, b""), (0, 1, b"")])
        assert client.region_read(0, 0, 0) == b""
        assert client.migration_read_data(0) == b""
        client.migration_write_data(b"")
        client.reset()
        assert [request.command for request in server.requests[before:]] == [Command.DEVICE_RESET]


def test_row_22_write_multi_where_the_server_has_it(kind: str) -> None:
    writes = [(index % 2, index, bytes([index & 0xFF]) * (index % 8 + 1)) for index in range(450)]
    with scripted(kind, MULTI) as (client, server):
        client.region_write_multi(writes)
        requests = server.of(Command.REGION_WRITE_MULTI)
        assert server.of(Command.REGION_WRITE) == []
    assert [struct.unpack_from("<Q", request.payload)[0] for request in requests] == [200, 200, 50]
    came = []
    for request in requests:
        assert len(request.payload) % 24 == 8
        for offset, region, count, data in struct.iter_unpack("<QII8s", request.payload[8:]):
            came.append((region, offset, data[:count]))
    assert came == writes


def test_row_22_write_multi_is_bounded_by_the_transfer_size(kind: str) -> None:
    with scripted(kind, offering(write_multiple=True, max_data_xfer_size=64)) as (client, server):
        client.region_write_multi([(0, index, b"x") for index in range(5)])
        counts = [struct.unpack_from("<Q", request.payload)[0] for request in server.of(Command.REGION_WRITE_MULTI)]
    assert counts == [2, 2, 1]


@pytest.mark.parametrize(
    ("answers", "data"), [({}, b"ab"), (offering(write_multiple=False), b"ab"), (MULTI, b"nine long")]
)
def test_row_22_single_writes_elsewhere(kind: str, answers: dict[int, Handler], data: bytes) -> None:
    with scripted(kind, answers) as (client, server):
        client.region_write_multi([(0, 4, data), (1, 8, b""), (1, 8, memoryview(b"x"))])
        payloads = [request.payload for request in server.of(Command.REGION_WRITE)]
        assert server.of(Command.REGION_WRITE_MULTI) == []
    assert payloads == [struct.pack("<QII", 4, 0, len(data)) + data, struct.pack("<QII", 8, 1, 1) + b"x"]


def test_buffers_of_any_item_size(kind: str) -> None:
    words = memoryview(bytearray(16)).cast("I")
    with scripted(kind) as (client, server):
        client.region_read_into(0, 0, words)
        assert words.tobytes() == pattern(0, 16)
        client.region_write(0, 0, words)
        client.device_feature(FeatureFlags.SET | 7, words)
        client.set_irqs(0, 0x22, 0, 16, data=words)
        assert client.migration_read_data_into(words) == 16
        client.migration_write_data(words)
        assert server.of(Command.REGION_WRITE)[0].payload[16:] == pattern(0, 16)
        assert server.of(Command.DEVICE_FEATURE)[0].payload[8:] == pattern(0, 16)
        assert server.of(Command.DEVICE_SET_IRQS)[0].payload[20:] == pattern(0, 16)


# DMA and interrupts


def test_row_04_dma_map_sets_no_flags_that_were_not_asked_for(kind: str) -> None:
    file = os.memfd_create("x")
    try:
        with scripted(kind) as (client, server):
            client.dma_map(0x1000, 0x2000, file, offset=0x4000)
            client.dma_map(0x8000, 0x1000)
            client.dma_map(0x9000, 0x1000, flags=DmaFlags.READ | DmaFlags.FILE_IO)
            maps = [(m.DmaMap.parse(request.payload), len(request.fds)) for request in server.of(Command.DMA_MAP)]
        assert maps == [
            (m.DmaMap(32, 3, 0x4000, 0x1000, 0x2000), 1),
            (m.DmaMap(32, 3, 0, 0x8000, 0x1000), 0),
            (m.DmaMap(32, 9, 0, 0x9000, 0x1000), 0),
        ]
    finally:
        os.close(file)


def test_row_05_unmap_offers_the_dirty_bitmap_and_all(kind: str) -> None:
    def unmap(peer: Peer, request: Request) -> None:
        peer.reply(request, request.payload + (b"\x81" + bytes(7) if len(request.payload) > 24 else b""))

    with scripted(kind, {Command.DMA_UNMAP: unmap}) as (client, server):
        assert client.dma_unmap(0x1000, 0x1000) == b""
        assert client.dma_unmap(0, 0x10000, page_size=0x1000) == b"\x81" + bytes(7)
        client.dma_unmap_all()
        sent = [request.payload for request in server.of(Command.DMA_UNMAP)]
    assert sent == [
        struct.pack("<IIQQ", 24, 0, 0x1000, 0x1000),
        struct.pack("<IIQQQQ", 48, DmaUnmapFlags.GET_DIRTY_BITMAP, 0, 0x10000, 0x1000, 8),
        struct.pack("<IIQQ", 24, DmaUnmapFlags.ALL, 0, 0),
    ]


@pytest.mark.parametrize("size", [0, 7, 9, 4096])
def test_a_dirty_bitmap_of_another_size_is_refused(kind: str, size: int) -> None:
    def bitmap(peer: Peer, request: Request) -> None:
        peer.reply(request, request.payload + bytes(size))

    with scripted(kind, {Command.DMA_UNMAP: bitmap, Command.DEVICE_FEATURE: bitmap}) as (client, _):
        with pytest.raises(MessageError, match="bitmap"):
            client.dma_unmap(0, 0x10000, page_size=0x1000)
        with pytest.raises(MessageError):
            client.dma_logging_report(0, 0x10000, 0x1000)


@pytest.mark.parametrize(("most", "messages"), [(8, [8, 8, 4]), (1, [1] * 20), (0, [1] * 20), (1024, [20])])
def test_eventfds_are_split_by_max_msg_fds(kind: str, most: int, messages: list[int]) -> None:
    fd = os.eventfd(0)
    try:
        with scripted(kind, offering(max_msg_fds=most)) as (client, server):
            client.set_irqs(2, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, 4, 20, [fd] * 20)
            sent = server.of(Command.DEVICE_SET_IRQS)
            assert [len(request.fds) for request in sent] == messages
            heads = [m.IrqSet.parse(request.payload) for request in sent]
    finally:
        os.close(fd)
    assert [head.count for head in heads] == messages
    assert [head.start for head in heads] == [4 + sum(messages[:i]) for i in range(len(messages))]


def test_set_irqs_with_more_fds_than_one_sendmsg_carries(kind: str) -> None:
    fd = os.eventfd(0)
    try:
        with scripted(kind, offering(max_msg_fds=1024)) as (client, server):
            client.set_irqs(2, 0x24, 0, 300, [fd] * 300)
            assert [len(request.fds) for request in server.of(Command.DEVICE_SET_IRQS)] == [253, 47]
            with pytest.raises(UsageError, match="cannot be sent"):
                client.set_irqs(2, 0x24, 0, 1, [fd] * 300)  # a lie about the count: nothing that could be split
            client.reset()
    finally:
        os.close(fd)


# Features and migration


def feature_data(data: bytes) -> Handler:
    """Answer a GET with ``data``, whatever was asked."""

    def answer(peer: Peer, request: Request) -> None:
        flags = struct.unpack_from("<I", request.payload, 4)[0]
        peer.reply(request, struct.pack("<II", 8 + len(data), flags) + data)

    return answer


def test_features_read_what_the_server_says(kind: str) -> None:
    answers = {Command.DEVICE_FEATURE: feature_data(struct.pack("<Q", 5))}
    with scripted(kind, answers) as (client, _):
        assert client.migration_flags() == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
        assert client.migration_get_state() == DeviceState.RUNNING_P2P
        assert client.migration_data_size() == 5
        assert client.device_feature(FeatureFlags.GET | 99) == struct.pack("<Q", 5)


@pytest.mark.parametrize("state", [8, 0xFFFFFFFF])
def test_a_state_that_is_none_is_refused(kind: str, state: int) -> None:
    answers = {Command.DEVICE_FEATURE: feature_data(struct.pack("<II", state, 0))}
    with scripted(kind, answers) as (client, _), pytest.raises(MessageError, match=f"{state} is no device state"):
        client.migration_get_state()


@pytest.mark.parametrize("call", ["migration_flags", "migration_get_state", "migration_data_size"])
@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_feature_of_another_size_is_refused(kind: str, call: str, size: int) -> None:
    with (
        scripted(kind, {Command.DEVICE_FEATURE: feature_data(bytes(size))}) as (client, _),
        pytest.raises(MessageError, match=r"\d bytes"),
    ):
        getattr(client, call)()


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTTY])
def test_row_19_einval_and_enotty_mean_not_supported(kind: str, error: int) -> None:
    with scripted(kind, {Command.DEVICE_FEATURE: lambda peer, r: peer.refuse(r, error)}) as (client, server):
        assert client.probe(DeviceFeature.MIGRATION) is False
        assert client.probe(0xFFFF) is False
        assert m.Feature.parse(server.requests[-1].payload).flags == FeatureFlags.PROBE | 0xFFFF


def test_probe_of_what_is_there_and_of_what_fails(kind: str) -> None:
    with scripted(kind) as (client, _):
        assert client.probe(DeviceFeature.DMA_LOGGING_START) is True
    with scripted(kind, {Command.DEVICE_FEATURE: lambda peer, r: peer.refuse(r, errno.EIO)}) as (client, _):
        with pytest.raises(CommandError) as caught:
            client.probe(DeviceFeature.MIGRATION)
        assert caught.value.errno == errno.EIO


def test_row_09_the_page_size_chosen_is_what_the_reply_says(kind: str) -> None:
    def choose(peer: Peer, request: Request) -> None:
        head, count = request.payload[:8], struct.unpack_from("<I", request.payload, 16)[0]
        peer.reply(request, head + struct.pack("<QII", 0x10000, count, 0) + request.payload[24:])

    with scripted(kind, {Command.DEVICE_FEATURE: choose}) as (client, server):
        assert client.dma_logging_start(0x1000, [(0, 0x10000), (1 << 40, 0x20000)]) == 0x10000
        assert client.dma_logging_start(0x1000) == 0x10000
        sent = [request.payload[8:] for request in server.of(Command.DEVICE_FEATURE)]
    assert sent == [
        struct.pack("<QIIQQQQ", 0x1000, 2, 0, 0, 0x10000, 1 << 40, 0x20000),
        struct.pack("<QII", 0x1000, 0, 0),
    ]


@pytest.mark.parametrize("chosen", [0, 3, 0x1001, (1 << 64) - 1])
def test_row_09_a_page_size_that_is_no_power_of_two_is_refused(kind: str, chosen: int) -> None:
    answers = {Command.DEVICE_FEATURE: feature_data(struct.pack("<QII", chosen, 0, 0))}
    with scripted(kind, answers) as (client, _), pytest.raises(MessageError, match=f"pages of {chosen} bytes"):
        client.dma_logging_start(0x1000)


@pytest.mark.parametrize(
    ("length", "page_size", "size"),
    [(0x1000, 0x1000, 8), (65 * 0x1000, 0x1000, 16), (1, 0x1000, 8), (1 << 30, 0x1000, 32768)],
)
def test_row_15_a_report_is_the_bits_as_they_came(kind: str, length: int, page_size: int, size: int) -> None:
    bits = bytes(n & 0xFF for n in range(size))

    def report(peer: Peer, request: Request) -> None:
        assert m.Feature.parse(request.payload).argsz == 8 + 24 + size
        assert request.payload[8:] == struct.pack("<QQQ", 0x5000, length, page_size)
        peer.reply(request, request.payload + bits)

    with scripted(kind, {Command.DEVICE_FEATURE: report}) as (client, _):
        assert client.dma_logging_report(0x5000, length, page_size) == bits
        client.reset()


def test_a_report_that_is_larger_than_any_other_message(kind: str) -> None:
    """1 TiB in pages of 64 KiB: 2 MiB of bitmap, twice the transfer size."""
    bits = os.urandom(1 << 21)
    answers: dict[int, Handler] = {Command.DEVICE_FEATURE: lambda peer, r: peer.reply(r, r.payload + bits)}
    with scripted(kind, answers) as (client, _):
        assert client.dma_logging_report(0, 1 << 40, 1 << 16) == bits
        client.reset()


def test_logging_is_stopped(kind: str) -> None:
    with scripted(kind) as (client, server):
        client.dma_logging_stop()
        assert server.requests[-1].payload == struct.pack("<II", 8, FeatureFlags.SET | DeviceFeature.DMA_LOGGING_STOP)


def test_row_11_padding_behind_migration_data_is_dropped(kind: str) -> None:
    """libvfio-user pads to the size that was asked for."""

    def pad(peer: Peer, request: Request) -> None:
        size = m.MigData.parse(request.payload).size
        peer.reply(request, struct.pack("<II", 18, 10) + b"0123456789" + bytes(size - 10))

    with scripted(kind, {Command.MIG_DATA_READ: pad}) as (client, _):
        assert client.migration_read_data(100) == b"0123456789"
        buffer = bytearray(b"\xff" * 12)
        assert client.migration_read_data_into(buffer) == 10
        assert buffer == b"0123456789\xff\xff"


def test_migration_data_is_read_until_it_is_short(kind: str) -> None:
    sizes = iter([100, 100, 30])

    def produce(peer: Peer, request: Request) -> None:
        asked, size = m.MigData.parse(request.payload), next(sizes)
        assert asked.argsz == 8 + asked.size
        peer.reply(request, struct.pack("<II", 8 + size, size) + bytes([size]) * size)

    answers = {**offering(max_data_xfer_size=100), Command.MIG_DATA_READ: produce}
    with scripted(kind, answers) as (client, _):
        assert client.migration_read_data(1000) == bytes([100]) * 200 + bytes([30]) * 30
        assert next(sizes, None) is None


# Usage


HUGE = 1 << 64


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda c: c.region_read(0, 0, -1), id="read: negative count"),
        pytest.param(lambda c: c.region_read(0, 0, 1 << 70), id="read: count without bound"),
        pytest.param(lambda c: c.region_read(0, -1, 4), id="read: negative offset"),
        pytest.param(lambda c: c.region_read(0, HUGE, 4), id="read: offset above 2^64"),
        pytest.param(lambda c: c.region_read(-1, 0, 4), id="read: negative region"),
        pytest.param(lambda c: c.region_read(1 << 32, 0, 4), id="read: region above 2^32"),
        pytest.param(lambda c: c.region_write(0, HUGE, b"x"), id="write: offset above 2^64"),
        pytest.param(lambda c: c.region_write_multi([(0, -1, b"x")]), id="multi: negative offset"),
        pytest.param(lambda c: c.dma_map(0, HUGE), id="map: size above 2^64"),
        pytest.param(lambda c: c.dma_map(-1, 4096), id="map: negative address"),
        pytest.param(lambda c: c.dma_map(0, 4096, -1), id="map: negative fd"),
        pytest.param(lambda c: c.dma_map(0, 4096, 99999), id="map: fd that is none"),
        pytest.param(lambda c: c.dma_map(0, 4096, 1 << 40), id="map: fd that cannot be one"),
        pytest.param(lambda c: c.dma_map(0, 4096, 99999, memory=bytearray(4096)), id="map: fd that is none, memory"),
        pytest.param(lambda c: c.dma_map(0, 4096, 1 << 40, memory=bytearray(4096)), id="map: no fd, memory"),
        pytest.param(lambda c: c.dma_map(0, 4096, memory=bytearray(4095)), id="map: memory too small"),
        pytest.param(lambda c: c.dma_map(0, 4, memory=memoryview(b"1234")), id="map: memory read-only"),
        pytest.param(lambda c: c.dma_unmap(0, -1), id="unmap: negative size"),
        pytest.param(lambda c: c.dma_unmap(0, 4096, page_size=0), id="unmap: page size 0"),
        pytest.param(lambda c: c.dma_unmap(0, 4096, page_size=-4096), id="unmap: negative page size"),
        pytest.param(lambda c: c.dma_unmap(0, 0, page_size=4096), id="unmap: bitmap for nothing"),
        pytest.param(lambda c: c.set_irqs(-1, 0, 0, 0), id="irqs: negative index"),
        pytest.param(lambda c: c.set_irqs(0, 0x24, 0, 1, [-1]), id="irqs: negative fd"),
        pytest.param(lambda c: c.set_irqs(0, 0x24, 0, 1, [99999]), id="irqs: fd that is none"),
        pytest.param(lambda c: c.set_irqs(0, 0x24, 0, 1, [1 << 40]), id="irqs: fd that cannot be one"),
        pytest.param(lambda c: c.device_feature(-1), id="feature: negative flags"),
        pytest.param(lambda c: c.migration_set_state(-1), id="state: negative"),
        pytest.param(lambda c: c.migration_read_data(-1), id="migration: negative size"),
        pytest.param(lambda c: c.dma_logging_start(-1), id="logging: negative page size"),
        pytest.param(lambda c: c.dma_logging_start(4096, [(0, HUGE)]), id="logging: range above 2^64"),
        pytest.param(lambda c: c.dma_logging_report(0, 4096, 4095), id="report: page size no power of two"),
        pytest.param(lambda c: c.dma_logging_report(0, 0, 4096), id="report: of nothing"),
        pytest.param(lambda c: c.dma_logging_report(0, 1 << 63, 4096), id="report: without bound"),
        pytest.param(lambda c: c.dma_logging_report(-1, 4096, 4096), id="report: negative address"),
    ],
)
def test_what_cannot_be_sent_is_a_usage_error_and_sends_nothing(kind: str, call: Call) -> None:
    with scripted(kind) as (client, server):
        client.reset()
        before = len(server.requests)
        with pytest.raises(UsageError) as caught:
            call(client)
        assert isinstance(caught.value, ValueError)
        assert client.region_read(0, 0, 4) == pattern(0, 4)
        assert [request.command for request in server.requests[before:]] == [Command.REGION_READ]


def test_row_34_an_fd_given_to_dma_map_stays_usable(kind: str) -> None:
    file = os.memfd_create("x")
    try:
        os.ftruncate(file, 4096)
        with scripted(kind) as (client, _):
            client.dma_map(0, 4096, file)
            assert os.pwrite(file, b"still there", 0) == 11
            client.dma_unmap(0, 4096)
            assert os.pread(file, 11, 0) == b"still there"
            client.dma_map(0, 4096, file)
        assert os.fstat(file).st_size == 4096
    finally:
        os.close(file)


@pytest.mark.parametrize("memory", [None, bytearray(4096)])
def test_a_map_that_is_refused_leaves_no_descriptor_behind(kind: str, memory: bytearray | None) -> None:
    def refuse(peer: Peer, request: Request) -> None:
        request.close()
        peer.refuse(request, errno.EEXIST)

    file = os.memfd_create("x")
    try:
        answers: dict[int, Handler] = {Command.DMA_MAP: refuse}
        with scripted(kind, answers) as (client, _):
            with no_fd_leaks():
                for _ in range(3):
                    with pytest.raises(CommandError):
                        client.dma_map(0, 4096, file, memory=memory)
            client.reset()
    finally:
        os.close(file)


@pytest.mark.parametrize(
    "second",
    [
        {"address": 0x800, "size": 0x1000},
        {"address": 0x0, "size": 0x2000},
        {"address": 0x5000, "size": 0},
        {"address": (1 << 64) - 0x1000, "size": 0x2000},
        {"address": 0x5000, "size": 0x1000, "offset": (1 << 63) - 0x800},
        {"address": 0x5000, "size": 0x1000, "offset": (1 << 64) - 1},
    ],
    ids=str,
)
def test_a_server_that_maps_what_it_must_refuse_is_told_so(kind: str, second: dict[str, int]) -> None:
    def accept(peer: Peer, request: Request) -> None:
        request.close()
        peer.reply(request)

    file = os.memfd_create("x")
    try:
        with scripted(kind, {Command.DMA_MAP: accept}) as (client, _):
            client.dma_map(0, 0x1000, file)
            with no_fd_leaks(), pytest.raises(MessageError, match="must refuse"):
                client.dma_map(fd=file, **second)
            client.reset()
    finally:
        os.close(file)


# Use after close


@each_call
def test_use_after_close(kind: str, command: Command) -> None:
    with scripted(kind) as (client, _):
        client.close()
        with pytest.raises(ConnectionClosedError, match="closed"):
            CALLS[command](client)
        with pytest.raises(ConnectionClosedError):
            client.serve_dma()
        with pytest.raises(ConnectionClosedError):
            client.fileno()
        client.close()


def test_the_server_is_gone(kind: str) -> None:
    with scripted(kind, {Command.DEVICE_RESET: lambda peer, request: peer.sock.close()}) as (client, _):
        with pytest.raises(ConnectionClosedError):
            client.reset()
        with pytest.raises(ConnectionClosedError):
            client.region_write(0, 0, b"x", posted=True)


def test_ids_are_never_used_twice_at_once(kind: str) -> None:
    """65,536 ids, and more calls than that: those that are not free are passed over."""
    with scripted(kind) as (client, server):
        client._core.connection._next_id = 0xFFFF
        client.reset()
        client.reset()
        assert [request.msg_id for request in server.of(Command.DEVICE_RESET)] == [0xFFFF, 0]
