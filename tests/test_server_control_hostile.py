"""Control clients that are slow, silent, too many, out of their mind or gone: the primary client does not notice."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from vfio_user import Bar, DeviceState
from vfio_user.client.control import AccessMode, ControlStatus
from vfio_user.server.control import MAX_CLIENTS
from vfio_user.wire.constants import Command, ControlCommand, DeviceFeature, PciIrq

from .control_support import BAR0, CONFIG, VALUE, Bench, Pad, bench_of, wait_until
from .device_support import TIMEOUT
from .support import ALL_CAPABILITIES, RawPeer, access, assert_quiet, message, open_fds

pytestmark = pytest.mark.timeout(60)

CONTROL_CAPABILITIES = b'{"capabilities":{"max_data_xfer_size":1048576,"x_control":{"version":1}}}\0'
VERSION = message(1, Command.VERSION, struct.pack("<HH", 0, 2) + CONTROL_CAPABILITIES)
UNTOUCHED = ControlStatus(AccessMode.PASS, 0, 0, 0, DeviceState.RUNNING, True)


@pytest.fixture
def device() -> Pad:
    return Pad()


@pytest.fixture
def bench(device: Pad, caplog: pytest.LogCaptureFixture) -> Iterator[Bench]:
    with bench_of(device) as one:
        yield one
    assert_quiet(caplog)


def connect(bench: Bench) -> socket.socket:
    sock = bench.stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    sock.settimeout(TIMEOUT)
    sock.connect(str(bench.control_path))
    return sock


def set_state(state: DeviceState) -> bytes:
    payload = struct.pack("<IIIi", 16, 1 << 17 | DeviceFeature.MIG_DEVICE_STATE, state, -1)
    return message(2, Command.DEVICE_FEATURE, payload)


COMMANDS = {
    "state": set_state(DeviceState.STOP),
    "access": message(2, ControlCommand.CONTROL_ACCESS, struct.pack("<I", AccessMode.HOLD)),
    "trigger": message(2, Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, 0x21, PciIrq.MSIX, 0, 1)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_gone_at_every_byte(bench: Bench, name: str) -> None:
    """A command that is not whole was not given."""
    primary, watcher = bench.primary(), bench.control()
    whole = VERSION + COMMANDS[name]
    before = open_fds()
    for length in [*range(0, len(VERSION), 7), *range(len(VERSION), len(whole))]:
        with connect(bench) as sock:
            sock.sendall(whole[:length])
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):  # until the server has let go
                pass
        assert watcher.status() == UNTOUCHED
    assert open_fds() <= before
    assert bench.device.irq.pba() == bytes(8)
    assert primary.region_read(BAR0, VALUE, 4) == bytes(4)


@pytest.mark.parametrize("seed", range(5))
def test_garbage(bench: Bench, seed: int) -> None:
    primary, watcher = bench.primary(), bench.control()
    randomness = random.Random(seed)
    for begin in (b"", VERSION):
        for _ in range(20):
            with connect(bench) as sock:
                sock.sendall(begin + randomness.randbytes(randomness.randrange(1, 400)))
    assert watcher.status() == UNTOUCHED
    assert primary.region_read(BAR0, VALUE, 4) == bytes(4)


def test_commands_of_any_number_with_any_payload(bench: Bench) -> None:
    """Well framed, negotiated, and nonsense: each has an answer, and the connection lives on."""
    bench.primary()
    randomness = random.Random(7)
    peer = bench.raw(CONTROL_CAPABILITIES)
    numbers = [*Command, *ControlCommand, 0, 14, 0x8000, 0xFFFF]
    for _ in range(300):
        number = randomness.choice(numbers)
        if number in (ControlCommand.CONTROL_ACCESS, Command.VERSION):
            continue
        answer = peer.call(number, b"\xff" * randomness.randrange(0, 60))
        assert answer.flags & 0x20 or number in (ControlCommand.CONTROL_STATUS, Command.DEVICE_GET_INFO)
    assert struct.unpack("<IIQQII", peer.ok(ControlCommand.CONTROL_STATUS))[0] == AccessMode.PASS


def test_a_reply_that_nobody_awaits(bench: Bench) -> None:
    peer = bench.raw(CONTROL_CAPABILITIES)
    peer.send(message(9, Command.REGION_READ, b"", 1))
    assert peer.read().error == errno.EINVAL
    peer.ok(ControlCommand.CONTROL_STATUS)


def test_a_message_that_cannot_be_framed_ends_the_connection(bench: Bench) -> None:
    peer = bench.raw(CONTROL_CAPABILITIES)
    peer.send(struct.pack("<HHIII", 1, Command.DEVICE_GET_INFO, 3, 0, 0))
    assert peer.at_end()
    bench.control()


def test_one_that_never_reads_delays_nobody(bench: Bench) -> None:
    """It asks for a lot, takes no answer, and is asked to wait itself: the server keeps no more than one answer."""
    primary, other = bench.primary(), bench.control()
    sock = connect(bench)
    sock.sendall(VERSION)
    sock.setblocking(False)
    request = message(2, Command.REGION_READ, access(BAR0, 0, 4096))
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 64 << 20:
            sent += sock.send(request * 100)
            assert primary.region_read(CONFIG, 0, 2) == b"\x4f\x49"
    assert sent < 8 << 20
    assert other.status() == UNTOUCHED
    bench.device.accesses.clear()
    assert primary.region_read(BAR0, VALUE, 4) == bytes(4)
    assert len(bench.device.accesses) == 1  # its commands are not served on


def test_a_large_answer_goes_out_piece_by_piece(bench: Bench) -> None:
    """Of an answer that the client does not take at once the rest is kept for it, as it was."""
    primary, watcher = bench.primary(), bench.control()
    sock = connect(bench)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer = RawPeer(sock)
    peer.version(ALL_CAPABILITIES)
    size = 1 << 20
    report = struct.pack("<IIQQQ", 32 + size, 1 << 16 | DeviceFeature.DMA_LOGGING_REPORT, 0, size * 8 * 4096, 4096)
    primary.dma_map(0, 1 << 35)
    watcher.dma_logging_start(4096)
    peer.post(Command.DEVICE_FEATURE, report)
    assert watcher.region_read(CONFIG, 0, 2) == primary.region_read(CONFIG, 0, 2)
    answer = peer.read()
    assert not answer.flags & 0x20
    assert len(answer.payload) == 32 + size
    peer.ok(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))


def test_what_is_kept_of_an_answer_is_what_was_read() -> None:
    """The device's memory may be another by the time that the client takes the rest."""
    size = 8 << 20

    class Wide(Pad):
        bars = {0: Bar(0x1000), 2: Bar(size, memory=True)}

    with bench_of(Wide(), max_data_xfer_size=size) as bench:
        primary = bench.primary()
        primary.region_write(2, 0, b"\x11" * size)
        peer = bench.raw(b'{"capabilities":{"max_data_xfer_size":8388608}}\0')
        peer.post(Command.REGION_READ, access(2, 0, size))
        peer.socket.recv(1, socket.MSG_PEEK)  # it is on its way
        primary.region_write(2, 0, b"\x22" * size)
        assert peer.read().payload[16:] == b"\x11" * size


def test_a_flood_of_commands_has_no_more_than_its_turn(bench: Bench) -> None:
    primary = bench.primary()
    sock = connect(bench)
    sock.sendall(VERSION)
    sock.sendall(message(2, Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0), 0x10) * 20_000)
    for _ in range(50):
        assert primary.region_read(CONFIG, 0, 2) == b"\x4f\x49"
    peer = RawPeer(sock)
    while peer.read().command != Command.VERSION:
        pass
    peer.ok(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))


def test_too_many_clients_wait_for_others_to_leave(bench: Bench) -> None:
    primary = bench.primary()
    crowd = [bench.raw(None) for _ in range(MAX_CLIENTS)]  # silent ones
    late = RawPeer(connect(bench))
    late.send(VERSION)
    assert primary.region_read(CONFIG, 0, 2) == b"\x4f\x49"
    late.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        late.socket.recv(1)
    late.socket.settimeout(TIMEOUT)
    crowd[0].close()
    assert late.read().command == Command.VERSION


def test_no_descriptor_leaks(bench: Bench) -> None:
    control = bench.control()
    before = open_fds()
    for _ in range(200):
        bench.raw().close()
    wait_until(lambda: control.status().held == 0 and open_fds() <= before)


def test_a_client_for_whom_there_is_no_descriptor_is_turned_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    primary, before, accept = bench.primary(), open_fds(), socket.socket.accept
    outcomes = iter([errno.EMFILE, 0, errno.ENFILE, 0, errno.ECONNABORTED])

    def failing(listener: socket.socket) -> tuple[socket.socket, object]:
        if number := next(outcomes, 0):
            raise OSError(number, os.strerror(number))
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", failing)
    for _ in range(2):
        with connect(bench) as sock:
            assert sock.recv(1) == b""
    assert primary.region_read(CONFIG, 0, 2) == b"\x4f\x49"
    bench.control().close()
    wait_until(lambda: primary.region_read(CONFIG, 0, 2) == b"\x4f\x49" and open_fds() <= before)


def test_the_server_ends_with_clients_there(device: Pad) -> None:
    before = open_fds()
    with bench_of(device) as bench:
        peers = [bench.raw(CONTROL_CAPABILITIES) for _ in range(3)]
        peers[0].send(b"\0" * 7)
        bench.server.shutdown()
    assert open_fds() <= before
    assert not os.path.exists(bench.control_path)
