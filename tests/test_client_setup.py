"""Connecting: VERSION, what the device is, the twin socket; and every way in which a server can get it wrong.

Tests whose names have ``row_NN`` assert that row of protocol.md's section 0, the client's column.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import (
    CLIENTS,
    SET_UP,
    Handler,
    Peer,
    Request,
    both,
    device_info,
    irq_info,
    message,
    offering,
    prepared,
    region_info,
    scripted,
    version_answer,
)
from vfio_user.client import RegionDescription
from vfio_user.client.core import MAX_IRQS, MAX_REGIONS
from vfio_user.errors import (
    CallTimeoutError,
    CommandError,
    ConnectionClosedError,
    MessageError,
    NegotiationError,
    ProtocolError,
    UsageError,
)
from vfio_user.fds import OwnedFd
from vfio_user.testing import no_fd_leaks
from vfio_user.wire import messages as m
from vfio_user.wire.capabilities import Capabilities, TwinSocketCapability
from vfio_user.wire.constants import Command, IoFdType, RegionFlags

pytestmark = both


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


def answering(payload: bytes, fds: Sequence[int] = ()) -> Handler:
    return lambda peer, request: peer.reply(request, payload, fds)


# VERSION


def test_row_21_version_0_2_is_offered(kind: str) -> None:
    with scripted(kind) as (client, server):
        assert client.version == (0, 2)
    assert server.requests[0].payload[:4] == struct.pack("<HH", 0, 2)


@pytest.mark.parametrize("minor", [0, 1, 2])
def test_row_21_any_minor_up_to_its_own_is_accepted(kind: str, minor: int) -> None:
    with scripted(kind, {Command.VERSION: answering(version_answer(version=(0, minor)))}) as (client, _):
        assert client.version == (0, minor)


@pytest.mark.parametrize("version", [(0, 3), (1, 0), (0xFFFF, 0xFFFF)])
def test_row_21_any_other_version_is_refused(kind: str, version: tuple[int, int]) -> None:
    with (
        pytest.raises(NegotiationError, match=f"version {version[0]}.{version[1]}"),
        scripted(kind, {Command.VERSION: answering(version_answer(version=version))}),
    ):
        pass


def test_row_08_a_failed_negotiation_raises_and_closes(kind: str) -> None:
    with (
        pytest.raises(CommandError, match="VERSION refused") as caught,
        scripted(kind, {Command.VERSION: lambda peer, request: peer.refuse(request, errno.EPROTO)}),
    ):
        pass
    assert caught.value.errno == errno.EPROTO


def test_row_24_version_comes_first_and_once(kind: str) -> None:
    with scripted(kind) as (client, server):
        client.reset()
    commands = [request.command for request in server.requests]
    assert commands.index(Command.VERSION) == 0
    assert commands.count(Command.VERSION) == 1


def test_row_26_twin_socket_and_write_multiple_are_proposed(kind: str) -> None:
    with scripted(kind) as (_, server):
        text = server.requests[0].payload[4:]
    assert text.endswith(b"\0")
    proposed = json.loads(text[:-1])["capabilities"]
    assert proposed["twin_socket"] == {"supported": True}
    assert proposed["write_multiple"] is True
    assert proposed["max_msg_fds"] == 253


def test_row_07_unknown_keys_are_ignored_and_json_is_optional(kind: str) -> None:
    text = b'{"new": [1], "capabilities": {"max_msg_fds": 3, "unheard_of": {"a": null}}}\0'
    with scripted(kind, {Command.VERSION: answering(version_answer(text))}) as (client, _):
        assert client.capabilities == Capabilities(max_msg_fds=3)
    with scripted(kind, {Command.VERSION: answering(b"\0\0\1\0")}) as (client, _):
        assert client.capabilities == Capabilities()
        assert client.version == (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"\0",
        b"{\0",
        b"[]\0",
        b"\xff\xfe\0",
        b'{"capabilities": []}\0',
        b'{"capabilities": {"max_msg_fds": true}}\0',
        b'{"capabilities": {"max_msg_fds": 1.5}}\0',
        b'{"capabilities": {"max_msg_fds": "8"}}\0',
        b'{"capabilities": {"max_msg_fds": 1025}}\0',
        b'{"capabilities": {"max_data_xfer_size": 0}}\0',
        b'{"capabilities": {"max_data_xfer_size": -1}}\0',
        b'{"capabilities": {"max_data_xfer_size": 1e999}}\0',
        b'{"capabilities": {"max_data_xfer_size": NaN}}\0',
        b'{"capabilities": {"max_data_xfer_size": 99999999999999999999}}\0',
        b'{"capabilities": {"max_dma_maps": 0}}\0',
        b'{"capabilities": {"pgsizes": 2048}}\0',
        b'{"capabilities": {"migration": {"pgsize": "x"}}}\0',
        b'{"capabilities": {"twin_socket": {"supported": 1}}}\0',
        b'{"capabilities": {"twin_socket": {"supported": true, "fd_index": -1}}}\0',
        b'{"a":' * 5000 + b"\0",
        b"[" * 60000 + b"\0",
        b" " * (64 << 10) + b"{}\0",
    ],
    ids=lambda text: text[:48].decode(errors="replace").rstrip("\0"),
)
def test_row_25_capabilities_that_break_a_rule_are_refused(kind: str, text: bytes) -> None:
    with (
        pytest.raises(NegotiationError),
        scripted(kind, {Command.VERSION: answering(version_answer(text))}),
    ):
        pass


def test_row_25_migration_without_page_size_is_fine(kind: str) -> None:
    text = b'{"capabilities": {"migration": {}, "max_data_xfer_size": 1024}}\0'
    with scripted(kind, {Command.VERSION: answering(version_answer(text))}) as (client, _):
        assert client.capabilities.data_xfer_size == 1024


@pytest.mark.parametrize("size", [1, 100])
def test_a_small_transfer_size_of_our_own_leaves_room_for_everything_else(kind: str, size: int) -> None:
    areas = [(page * 0x1000, 0x1000) for page in range(16)]

    def regions(peer: Peer, request: Request) -> None:
        asked = m.RegionInfo.parse(request.payload)
        chain = m.pack_sparse_areas(areas)
        if asked.argsz < 32 + len(chain):
            peer.reply(request, region_info(asked.index, argsz=32 + len(chain)))
        else:
            peer.reply(
                request,
                region_info(asked.index, argsz=32 + len(chain), flags=3 | RegionFlags.CAPS, cap_offset=32) + chain,
            )

    text = version_answer(b'{"capabilities": {}}' + b" " * 300 + b"\0")
    answers: dict[int, Handler] = {Command.VERSION: answering(text), Command.DEVICE_GET_REGION_INFO: regions}
    with scripted(kind, answers, proposal=Capabilities(max_data_xfer_size=size)) as (client, server):
        assert client.regions[0].sparse_areas == tuple(areas)
        assert len(client.region_read(0, 0, 200)) == 200
        assert len(server.of(Command.REGION_READ)) == 200 // size


def test_the_callers_limits_are_checked_before_anything_is_sent(kind: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(UsageError, match="max_write"):
        CLIENTS[kind](ours, max_write=0)
    assert ours.fileno() == -1


# The twin socket


def twin(fds: Sequence[int], **offer: Any) -> dict[int, Handler]:
    text = version_answer(Capabilities(twin_socket=TwinSocketCapability(supported=True, **offer)))
    return {Command.VERSION: answering(text, fds)}


@pytest.mark.parametrize("index", [0, 1, 252])
def test_a_twin_socket_that_does_not_come_is_refused(kind: str, index: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fds = [ours.fileno()] if index else []
        with pytest.raises(NegotiationError, match=f"at fd {index}, {len(fds)} came"):
            scripted(kind, twin(fds, fd_index=index)).__enter__()


@pytest.mark.parametrize("wrong", ["pipe", "eventfd", "memfd", "datagram", "inet"])
def test_a_twin_socket_of_another_kind_is_refused(kind: str, wrong: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram, socket.socket() as inet:
        pipe = os.pipe()
        made = {
            "pipe": pipe[0],
            "eventfd": os.eventfd(0),
            "memfd": os.memfd_create("x"),
            "datagram": datagram.fileno(),
            "inet": inet.fileno(),
        }
        try:
            with pytest.raises(NegotiationError, match="twin socket is"), scripted(kind, twin([made[wrong]])):
                pass
        finally:
            for fd in {*pipe, made["eventfd"], made["memfd"]}:
                os.close(fd)


@pytest.mark.parametrize("state", ["unconnected", "listening", "hung up"])
def test_a_twin_socket_that_leads_nowhere_ends_the_connection(kind: str, state: str, tmp_path: Path) -> None:
    useless, other = socket.socketpair()
    with useless, other, socket.socket(socket.AF_UNIX) as fresh:
        if state == "listening":
            fresh.bind(str(tmp_path / "s"))
            fresh.listen()
        other.close()
        fd = useless.fileno() if state == "hung up" else fresh.fileno()
        silent: dict[int, Handler] = {Command.DEVICE_RESET: lambda peer, request: None}
        with (
            pytest.raises((ConnectionClosedError, CallTimeoutError)),
            scripted(kind, {**twin([fd]), **silent}, timeout=0.3) as (client, _),
        ):
            client.reset()


def test_more_fds_than_the_twin_socket_are_refused_and_closed(kind: str) -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        pytest.raises(MessageError, match="1 file descriptors at most, 3 came"),
        scripted(kind, twin([ours.fileno()] * 3)),
    ):
        pass


# The device


@pytest.mark.parametrize(
    ("regions", "irqs"), [(MAX_REGIONS + 1, 0), (0, MAX_IRQS + 1), (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0)]
)
def test_counts_of_regions_and_interrupts_are_bounded(kind: str, regions: int, irqs: int) -> None:
    with (
        pytest.raises(MessageError, match="at most"),
        scripted(kind, {Command.DEVICE_GET_INFO: answering(device_info(regions, irqs))}),
    ):
        pass


def test_a_device_without_regions_and_interrupts(kind: str) -> None:
    with scripted(kind, {Command.DEVICE_GET_INFO: answering(device_info(0, 0))}) as (client, _):
        assert client.regions == ()
        assert client.irqs == ()
        assert client.info.num_regions == 0


@pytest.mark.parametrize("command", [Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_IRQ_INFO])
def test_an_answer_about_another_index_is_refused(kind: str, command: Command) -> None:
    wrong = region_info(7) if command == Command.DEVICE_GET_REGION_INFO else irq_info(7)
    with pytest.raises(MessageError, match="of index 0 answered for 7"), scripted(kind, {command: answering(wrong)}):
        pass


SETUP_COMMANDS = [
    Command.VERSION,
    Command.DEVICE_GET_INFO,
    Command.DEVICE_GET_REGION_INFO,
    Command.DEVICE_GET_IRQ_INFO,
]


@pytest.mark.parametrize("command", SETUP_COMMANDS)
@pytest.mark.parametrize("size", ["empty", "short"])
def test_set_up_replies_that_are_too_short_are_refused(kind: str, command: Command, size: str) -> None:
    good = {
        Command.VERSION: b"\0\0\1\0",
        Command.DEVICE_GET_INFO: device_info(),
        Command.DEVICE_GET_REGION_INFO: region_info(0),
        Command.DEVICE_GET_IRQ_INFO: irq_info(0),
    }
    payload = good[command][:-1] if size == "short" else b""
    with (
        pytest.raises(MessageError, match=f"{command.name} answered with {len(payload)} bytes"),
        scripted(kind, {command: answering(payload)}),
    ):
        pass


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.DEVICE_GET_INFO, device_info() + b"\0"),
        (Command.DEVICE_GET_REGION_INFO, region_info(0) + b"\0"),
        (Command.DEVICE_GET_IRQ_INFO, irq_info(0) + bytes(1000)),
    ],
)
def test_set_up_replies_that_are_too_long_are_refused(kind: str, command: Command, payload: bytes) -> None:
    with pytest.raises(MessageError, match=f"{command.name} answered"), scripted(kind, {command: answering(payload)}):
        pass


@pytest.mark.parametrize("command", SETUP_COMMANDS)
def test_an_error_in_the_set_up_is_raised_with_its_errno(kind: str, command: Command) -> None:
    with (
        pytest.raises(CommandError, match=f"{command.name} refused") as caught,
        scripted(kind, {command: lambda peer, request: peer.refuse(request, errno.EACCES)}),
    ):
        pass
    assert caught.value.errno == errno.EACCES


def test_every_prefix_of_the_set_up_ends_in_a_closed_connection(kind: str) -> None:
    stream = b"".join(SET_UP)
    for length in range(len(stream)):
        with prepared(stream[:length]) as sock, pytest.raises(ConnectionClosedError):
            CLIENTS[kind](sock)
    with prepared(stream) as sock, CLIENTS[kind](sock) as client:
        assert client.regions[0].sparse_areas == ((0x1000, 0x1000),)


# Region info and its capabilities


def sparse(
    chain: bytes, *, fds: Sequence[int] = (), size: int = 0x10000, cap_offset: int = 32, flags: int = 0xF
) -> dict[int, Handler]:
    """One region whose info, at the second asking, has the capabilities ``chain``."""

    def answer(peer: Peer, request: Request) -> None:
        asked = m.RegionInfo.parse(request.payload)
        if asked.argsz < 32 + len(chain):
            peer.reply(request, region_info(asked.index, argsz=32 + len(chain), flags=7, size=size))
            return
        head = region_info(asked.index, argsz=32 + len(chain), flags=flags, cap_offset=cap_offset, size=size)
        peer.reply(request, head + chain, fds)

    return {Command.DEVICE_GET_INFO: answering(device_info(1, 0)), Command.DEVICE_GET_REGION_INFO: answer}


def cap(identity: int, following: int, body: bytes = b"") -> bytes:
    return struct.pack("<HHI", identity, 1, following) + body


GOOD_AREAS = struct.pack("<IIQQ", 1, 0, 0x1000, 0x2000)


def test_the_sparse_capability_is_found_behind_others(kind: str) -> None:
    chain = cap(9, 48, bytes(8)) + cap(0xFFFF, 56) + cap(1, 0, GOOD_AREAS)
    with scripted(kind, sparse(chain)) as (client, _):
        assert client.regions[0].sparse_areas == ((0x1000, 0x2000),)


@pytest.mark.parametrize(
    ("chain", "cap_offset", "flags"), [(b"", 0, 7), (cap(9, 0), 32, 0xF), (cap(1, 0, GOOD_AREAS), 0, 0xF)]
)
def test_no_sparse_capability_means_the_whole_region(kind: str, chain: bytes, cap_offset: int, flags: int) -> None:
    with scripted(kind, sparse(chain, cap_offset=cap_offset, flags=flags)) as (client, _):
        assert client.regions[0].sparse_areas == ()


@pytest.mark.parametrize(
    ("chain", "cap_offset"),
    [
        pytest.param(cap(9, 32, bytes(8)), 32, id="loops to itself"),
        pytest.param(cap(9, 40) + cap(9, 32), 32, id="loops over two"),
        pytest.param(cap(9, 40) + cap(9, 39), 32, id="goes back"),
        pytest.param(cap(9, 8), 32, id="goes back before the capabilities"),
        pytest.param(cap(9, 0xFFFFFFF8), 32, id="leaves the payload at the far end"),
        pytest.param(cap(9, 41), 32, id="leaves the payload by a byte"),
        pytest.param(cap(9, 0), 33, id="starts too near to the end"),
        pytest.param(cap(9, 0), 0xFFFFFFFF, id="starts outside"),
        pytest.param(cap(9, 0), 16, id="starts inside the fixed part"),
        pytest.param(cap(1, 0), 32, id="areas are missing"),
        pytest.param(cap(1, 0, struct.pack("<II", 1, 0)), 32, id="one area too few"),
        pytest.param(cap(1, 0, struct.pack("<II", 0xFFFFFFFF, 0) + bytes(16)), 32, id="2^32 - 1 areas"),
        pytest.param(
            cap(1, 0, struct.pack("<II", 0x10000001, 0) + bytes(16)), 32, id="areas that overflow to 16 bytes"
        ),
    ],
)
def test_capability_chains_that_break_a_rule_are_refused(kind: str, chain: bytes, cap_offset: int) -> None:
    """Section 15: two inputs crashed the Rust client, one looped for ever."""
    with pytest.raises(MessageError), scripted(kind, sparse(chain, cap_offset=cap_offset)):
        pass


@pytest.mark.parametrize(
    "area", [(0xF000, 0x1001), (0x10000, 1), (1 << 63, 1 << 63), ((1 << 64) - 1, 2), (0, 1 << 64 - 1)]
)
def test_sparse_areas_outside_of_their_region_are_refused(kind: str, area: tuple[int, int]) -> None:
    chain = cap(1, 0, struct.pack("<IIQQ", 1, 0, *area))
    with pytest.raises(MessageError, match="leaves it"), scripted(kind, sparse(chain)):
        pass


@pytest.mark.parametrize("argsz", [(1 << 16) + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("command", [Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_REGION_IO_FDS])
def test_an_argsz_without_bound_is_refused(kind: str, command: Command, argsz: int) -> None:
    info = region_info(0, argsz=argsz) if command == Command.DEVICE_GET_REGION_INFO else io_fds_head(argsz, 1)
    with (
        pytest.raises(MessageError, match=f"{argsz} bytes, at most"),
        scripted(kind, {command: answering(info)}) as (client, _),
    ):
        client.region_io_fds(0)


@pytest.mark.parametrize("command", [Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_REGION_IO_FDS])
def test_an_argsz_that_grows_with_every_answer_is_refused(kind: str, command: Command, file: int) -> None:
    """Each answer of a region's info may bring a descriptor: asked for ever, they would use up all there are."""

    asked = []

    def grow(peer: Peer, request: Request) -> None:
        argsz = struct.unpack_from("<I", request.payload)[0] + 16
        asked.append(argsz)
        info = region_info(0, argsz=argsz) if command == Command.DEVICE_GET_REGION_INFO else io_fds_head(argsz, 1)
        peer.reply(request, info, [file])

    with pytest.raises(MessageError, match="and once"), scripted(kind, {command: grow}) as (client, _):
        client.region_io_fds(0)
    assert len(asked) == 2


# Region fds


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("region")
    os.ftruncate(fd, 0x10000)
    os.pwrite(fd, b"in the file", 0x2000)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_row_13_the_fd_may_come_with_any_answer(kind: str, which: str, file: int) -> None:
    chain = cap(1, 0, GOOD_AREAS)

    def answer(peer: Peer, request: Request) -> None:
        asked = m.RegionInfo.parse(request.payload)
        argsz = 32 + len(chain)
        if asked.argsz < argsz:
            peer.reply(request, region_info(0, argsz=argsz, flags=7), [file] if which != "second" else [])
        else:
            head = region_info(0, argsz=argsz, flags=0xF, cap_offset=32)
            peer.reply(request, head + chain, [file] if which != "first" else [])

    answers: dict[int, Handler] = {
        Command.DEVICE_GET_INFO: answering(device_info(1, 0)),
        Command.DEVICE_GET_REGION_INFO: answer,
    }
    with scripted(kind, answers) as (client, _):
        [area] = client.regions[0].map()
        assert area[:2] == (0x1000, 0x2000)
        assert bytes(area.memory[0x1000:0x100B]) == b"in the file"
        area.memory[0:3] = b"new"
        assert os.pread(file, 3, 0x1000) == b"new"


def test_row_13_a_region_that_says_mmap_without_an_fd_cannot_be_mapped(kind: str) -> None:
    with scripted(kind, sparse(cap(1, 0, GOOD_AREAS))) as (client, _):
        assert client.regions[0].flags & RegionFlags.MMAP
        assert client.regions[0].mmap_areas == ()
        assert client.regions[0].map() == ()


def test_the_whole_region_is_mapped_where_no_area_is_named(kind: str, file: int) -> None:
    with scripted(kind, sparse(b"", fds=[file], flags=7, cap_offset=0)) as (client, _):
        [area] = client.regions[0].map()
        assert area[:2] == (0, 0x10000)
        assert not area.memory.readonly


def test_a_region_that_cannot_be_written_is_mapped_read_only(kind: str, file: int) -> None:
    with scripted(kind, sparse(b"", fds=[file], flags=5, cap_offset=0)) as (client, _):
        assert client.regions[0].map()[0].memory.readonly


@pytest.mark.parametrize("flags", [RegionFlags.MMAP, RegionFlags.MMAP | RegionFlags.WRITE, RegionFlags.READ, 0])
def test_what_cannot_be_read_is_never_mapped(kind: str, flags: int, file: int) -> None:
    """Memory without permissions would crash whoever looks at it."""
    with scripted(kind, sparse(b"", fds=[file], flags=flags, cap_offset=0)) as (client, _):
        assert client.regions[0].map() == ()


@pytest.mark.parametrize(
    ("size", "area"),
    [(0x10001, None), (1 << 40, None), ((1 << 64) - 1, None), (0x10000, (0x1000, 0)), (1 << 20, (0xFFFF, 2))],
)
def test_an_area_that_leaves_its_file_is_not_mapped(
    kind: str, size: int, area: tuple[int, int] | None, file: int
) -> None:
    """Touching it would be SIGBUS."""
    chain = b"" if area is None else cap(1, 0, struct.pack("<IIQQ", 1, 0, *area))
    flags, cap_offset = (7, 0) if area is None else (0xF, 32)
    with scripted(kind, sparse(chain, fds=[file], size=size, flags=flags, cap_offset=cap_offset)) as (client, _):
        with pytest.raises(OSError, match="region 0") as caught:
            client.regions[0].map()
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("area", [(0x800, 0x1000), (0x1000, 1), (0, 0)])
def test_a_description_with_an_area_outside_of_it_is_not_mapped(kind: str, area: tuple[int, int], file: int) -> None:
    """The same for both clients: what a caller made itself is checked where it is mapped."""
    with OwnedFd.duplicate(file) as fd:
        region = RegionDescription(0, 0x1000, RegionFlags(7), sparse_areas=(area,), fd=fd)
        with pytest.raises(OSError, match="is not in it"):
            region.map()


def test_a_region_larger_than_any_address_space_is_not_mapped(kind: str) -> None:
    """Behind a device file there is no size to compare with."""
    with open("/dev/zero", "r+b") as zero:
        answers = sparse(b"", fds=[zero.fileno()], size=(1 << 64) - 1, flags=7, cap_offset=0)
        with scripted(kind, answers) as (client, _):
            with pytest.raises(OSError, match="region 0") as caught:
                client.regions[0].map()
            assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("wrong", ["pipe", "eventfd", "socket", "directory"])
def test_a_region_fd_of_the_wrong_kind_cannot_be_mapped(kind: str, wrong: str) -> None:
    pipe, pair = os.pipe(), socket.socketpair()
    made = {
        "pipe": pipe[0],
        "eventfd": os.eventfd(0),
        "socket": pair[0].fileno(),
        "directory": os.open("/", os.O_RDONLY),
    }
    try:
        with scripted(kind, sparse(b"", fds=[made[wrong]], flags=7, cap_offset=0)) as (client, _):
            with pytest.raises(OSError, match="Errno"):
                client.regions[0].map()
            assert client.region_read(0, 0, 4)
    finally:
        pair[0].close()
        pair[1].close()
        for fd in (*pipe, made["eventfd"], made["directory"]):
            os.close(fd)


def test_more_fds_than_one_with_a_region_are_refused_and_closed(kind: str, file: int) -> None:
    with (
        pytest.raises(MessageError, match="1 file descriptors at most, 2 came"),
        scripted(kind, sparse(b"", fds=[file, file])),
    ):
        pass


@pytest.mark.parametrize("command", [Command.DEVICE_GET_INFO, Command.DEVICE_GET_IRQ_INFO])
def test_fds_with_a_reply_that_has_none_are_refused_and_closed(kind: str, command: Command, file: int) -> None:
    payload = device_info() if command == Command.DEVICE_GET_INFO else irq_info(0)
    with (
        pytest.raises(MessageError, match="0 file descriptors at most"),
        scripted(kind, {command: answering(payload, [file])}),
    ):
        pass


# Region I/O fds


def io_fds_head(argsz: int, count: int, index: int = 0) -> bytes:
    return m.RegionIoFds(argsz, 0, index, count).pack()


def io_fds(entries: bytes, count: int, fds: Sequence[int] = (), argsz: int | None = None) -> dict[int, Handler]:
    """What a server says of region 0; with ``argsz``: in the answer that has the entries."""
    size = 16 + len(entries)

    def answer(peer: Peer, request: Request) -> None:
        if m.RegionIoFds.parse(request.payload).argsz < size:
            peer.reply(request, io_fds_head(size, count))
        else:
            peer.reply(request, io_fds_head(size if argsz is None else argsz, count) + entries, fds)

    return {Command.DEVICE_GET_REGION_IO_FDS: answer}


def test_row_03_io_fd_entries_of_48_bytes(kind: str) -> None:
    fds = [os.eventfd(1), os.eventfd(2)]
    entries = [
        m.IoFd(0x10, 4, 1, IoFdType.IOEVENTFD, 5, 0, 0, 0xABCD),
        m.IoFd(0x20, 8, 0, IoFdType.IOREGIONFD, 0, 0, 0x1234, 0),
        m.IoFd(0x30, 2, 0, IoFdType.IOEVENTFD_SHADOW, 0, 1, 0x40, 7),
        m.IoFd(0x40, 2, m.NO_FD_INDEX, IoFdType.IOEVENTFD),
    ]
    try:
        packed = b"".join(entry.pack() for entry in entries)
        with scripted(kind, io_fds(packed, 4, fds)) as (client, _):
            event, region, shadow, none = client.region_io_fds(0)
            assert (event.type, event.offset, event.size, event.flags, event.datamatch) == (0, 0x10, 4, 5, 0xABCD)
            assert (region.type, region.user_data, region.datamatch) == (1, 0x1234, 0)
            assert (shadow.type, shadow.shadow_offset, shadow.datamatch) == (2, 0x40, 7)
            assert none.fd is None
            assert region.shadow_fd is None
            os.eventfd_write(event.fd.fileno(), 40)
            os.eventfd_write(region.fd.fileno(), 20)
            os.eventfd_write(shadow.shadow_fd.fileno(), 400)
            os.eventfd_write(shadow.fd.fileno(), 200)
            assert [os.eventfd_read(fd) for fd in fds] == [221, 442]
            for described in (event, region, shadow):
                described.fd.close()
            shadow.shadow_fd.close()
    finally:
        for fd in fds:
            os.close(fd)


def test_row_03_io_fd_entries_of_40_bytes(kind: str) -> None:
    fd = os.eventfd(0)
    event = struct.pack("<QQIIIIQ", 0x10, 4, 0, IoFdType.IOEVENTFD, 5, 0, 0xABCD)
    region = struct.pack("<QQIIIIQ", 0x20, 8, 0, IoFdType.IOREGIONFD, 0, 0, 0x1234)
    try:
        with scripted(kind, io_fds(event + region, 2, [fd])) as (client, _):
            first, second = client.region_io_fds(0)
            assert (first.datamatch, first.shadow_offset, first.flags) == (0xABCD, 0, 5)
            assert (second.user_data, second.datamatch) == (0x1234, 0)
            assert first.fd.fileno() != second.fd.fileno()
            first.fd.close()
            second.fd.close()
    finally:
        os.close(fd)


def test_a_region_without_io_fds(kind: str) -> None:
    with scripted(kind, io_fds(b"", 0)) as (client, _):
        assert client.region_io_fds(0) == ()


ENTRY = m.IoFd(0, 4, 0, IoFdType.IOEVENTFD).pack()


@pytest.mark.parametrize(
    ("entries", "count", "argsz"),
    [
        pytest.param(ENTRY, 2, None, id="24 bytes each"),
        pytest.param(ENTRY, 7, None, id="no whole entries"),
        pytest.param(ENTRY, 0xFFFFFFFF, None, id="2^32 - 1 of them"),
        pytest.param(ENTRY, 1, 0, id="argsz below the header"),
        pytest.param(ENTRY, 1, 15, id="argsz cuts the header"),
        pytest.param(ENTRY[:40] * 2, 2, 32, id="argsz says less than comes"),
        pytest.param(ENTRY * 254, 254, None, id="more than there can be fds"),
        pytest.param(m.IoFd(0, 4, 0, 3).pack(), 1, None, id="unknown type"),
        pytest.param(m.IoFd(0, 4, 1, 0).pack(), 1, None, id="an fd that did not come"),
        pytest.param(ENTRY + m.IoFd(0, 4, 0xFFFFFFFE, 0).pack(), 2, None, id="the second's fd did not come"),
        pytest.param(m.IoFd(0, 4, 0, 2, 0, 9).pack(), 1, None, id="a shadow that did not come"),
    ],
)
def test_io_fds_that_break_a_rule_are_refused(kind: str, entries: bytes, count: int, argsz: int | None) -> None:
    fd = os.eventfd(0)
    try:
        with scripted(kind, io_fds(entries, count, [fd], argsz)) as (client, _):
            with pytest.raises(MessageError):
                client.region_io_fds(0)
            client.reset()
    finally:
        os.close(fd)


@pytest.mark.parametrize("entries", [b"", ENTRY[:47]])
def test_io_fds_that_are_announced_and_do_not_come_are_refused(kind: str, entries: bytes) -> None:
    answers: dict[int, Handler] = {
        Command.DEVICE_GET_REGION_IO_FDS: lambda peer, request: peer.reply(request, io_fds_head(64, 1) + entries)
    }
    with scripted(kind, answers) as (client, _), pytest.raises(MessageError, match=r"announced|asks for"):
        client.region_io_fds(0)


def test_io_fds_of_another_region_are_refused(kind: str) -> None:
    answers: dict[int, Handler] = {Command.DEVICE_GET_REGION_IO_FDS: answering(io_fds_head(16, 0, index=1))}
    with scripted(kind, answers) as (client, _), pytest.raises(MessageError, match="of index 0 answered for 1"):
        client.region_io_fds(0)


# Connecting by path


def test_connect_says_what_connect_2_says(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CLIENTS[kind].connect(str(tmp_path / "nothing"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(ConnectionRefusedError):
        CLIENTS[kind].connect(str(tmp_path / "dead"))


def test_connect_where_nobody_accepts(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(CallTimeoutError, match="nobody accepts"):
            CLIENTS[kind].connect(path, timeout=0.1)


def test_connect_where_nobody_answers(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "mute")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(CallTimeoutError):
            CLIENTS[kind].connect(path, timeout=0.1)


def test_what_a_server_offers_unasked_is_no_harm(kind: str) -> None:
    with scripted(kind, offering(write_multiple=True), proposal=Capabilities()) as (client, server):
        client.region_write_multi([(0, 0, b"ab")])
        assert json.loads(server.requests[0].payload[4:].rstrip(b"\0")) == {"capabilities": {}}


def test_a_protocol_error_in_the_set_up_closes_the_socket(kind: str) -> None:
    with prepared(message(0, Command.VERSION, b"")) as sock:
        with pytest.raises(ProtocolError):
            CLIENTS[kind](sock)
        assert sock.fileno() == -1
