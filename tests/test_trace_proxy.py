"""The pass-through: bytes and descriptors go on untouched and in order, whatever they are; whole messages are seen."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user import Client, Device
from vfio_user.device import Bar
from vfio_user.devices.edu import Edu
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.tools.trace import FdKind, Observer, Place, Proxy, Seen, connect, listen
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import Command, DmaFlags

from .support import RawPeer, eventfds, memfd, message
from .trace_support import CLIENT, SERVER, TIMEOUT, Recorder, between, running, traced

MIB = 1 << 20


def exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := sock.recv(count - len(data))):
        data += part
    return data


def test_messages_are_seen_and_passed_on() -> None:
    recorder = Recorder()
    with between(recorder) as (client, server):
        request, reply = message(7, 9, b"where"), message(7, 9, b"what", 1)
        client.sendall(request)
        assert exactly(server, len(request)) == request
        server.sendall(reply)
        assert exactly(client, len(reply)) == reply
        recorder.wait_for(recorder.messages, 2)
    asked, answered = recorder.messages
    assert (asked.place, asked.header.msg_id, bytes(asked.payload)) == (CLIENT, 7, b"where")
    assert (answered.place, answered.is_command, bytes(answered.payload)) == (SERVER, False, b"what")
    assert asked.time < answered.time
    assert recorder.unclear_places == []


MESSAGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=8)
"""Messages as (size of the payload, descriptors)."""


@given(messages=MESSAGES, pieces=st.lists(st.integers(1, 60), min_size=1, max_size=20))
@settings(max_examples=60)
def test_bytes_and_descriptors_come_out_as_they_went_in(messages: list[tuple[int, int]], pieces: list[int]) -> None:
    """The reader takes header and payload by reads of their own, as libvfio-user does: descriptors come with theirs."""
    recorder = Recorder()
    with no_fd_leaks(), between(recorder) as (client, server), eventfds(2) as fds, RawPeer(server.dup()) as reader:
        rest = cycle(pieces)
        for number, (size, count) in enumerate(messages):
            data = message(number, 9, bytes([number]) * size)
            first = min(len(data), 16 + next(rest)) if count else min(len(data), next(rest))
            socket.send_fds(client, [data[:first]], fds[:count])
            data = data[first:]
            while data:
                sent = client.send(data[: next(rest)])
                data = data[sent:]
        for number, (size, count) in enumerate(messages):
            came = reader.read()
            assert (came.msg_id, came.payload, len(came.fds)) == (number, bytes([number]) * size, count)
        recorder.wait_for(recorder.messages, len(messages))
    assert [(len(m.payload), [fd.kind for fd in m.fds]) for m in recorder.messages] == [
        (size, [FdKind.EVENTFD] * count) for size, count in messages
    ]


def test_descriptors_stay_with_their_message_behind_others_in_the_same_bytes() -> None:
    """All of it is in the proxy's socket before that reads: one recvmsg gives three messages and the descriptor."""
    recorder = Recorder()
    client, from_client = socket.socketpair()
    server, to_server = socket.socketpair()
    with client, RawPeer(server) as reader, memfd(0x3000) as fd:
        client.send(message(1, 9, b"a") + message(2, 9, b"b"))
        socket.send_fds(client, [message(3, 2, b"with it")], [fd])
        proxy = Proxy(recorder)
        proxy.join(from_client, to_server)
        with running(proxy):
            assert [len(reader.read().fds) for _ in range(3)] == [0, 0, 1]
    assert [m.fds for m in recorder.messages] == [(), (), ((FdKind.MEMFD, 0x3000),)]


@pytest.mark.parametrize("kind", ["file", "pipe", "socket", "device"])
def test_kinds_of_descriptors(kind: str, tmp_path: Path) -> None:
    recorder = Recorder()
    (tmp_path / "file").write_bytes(b"12345")
    reader, writer = os.pipe()
    sockets = socket.socketpair()
    with between(recorder) as (client, server), open(tmp_path / "file") as file, open("/dev/null") as null:
        fd = {"file": file.fileno(), "pipe": reader, "socket": sockets[0].fileno(), "device": null.fileno()}[kind]
        socket.send_fds(client, [message(1, 2)], [fd])
        assert len(exactly(server, 16)) == 16
        recorder.wait_for(recorder.messages, 1)
    for end in sockets:
        end.close()
    os.close(reader)
    os.close(writer)
    assert [str(fd) for fd in recorder.messages[0].fds] == ["file(0x5)" if kind == "file" else kind]


def test_a_large_message_to_a_slow_reader() -> None:
    recorder = Recorder()
    data = os.urandom(9 * MIB)
    whole = message(1, 18, data) + message(2, 13)
    with between(recorder) as (client, server):
        sender = threading.Thread(target=client.sendall, args=(whole,))
        sender.start()
        came = b"".join(exactly(server, min(1 << 18, len(whole) - at)) for at in range(0, len(whole), 1 << 18))
        sender.join(TIMEOUT)
        assert came == whole
        recorder.wait_for(recorder.messages, 2)
    assert recorder.messages[0].payload == data
    assert recorder.messages[1].header.command == 13


def test_both_directions_at_once_when_nobody_reads_yet() -> None:
    recorder = Recorder()
    data = message(1, 18, bytes(2 * MIB))
    with between(recorder) as (client, server):
        senders = [threading.Thread(target=sock.sendall, args=(data,)) for sock in (client, server)]
        readers = [threading.Thread(target=exactly, args=(sock, len(data))) for sock in (client, server)]
        for thread in senders:
            thread.start()
        for thread in readers:
            thread.start()
        for thread in senders + readers:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        recorder.wait_for(recorder.messages, 2)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", bytes(64), b"\xff" * 64, struct.pack("<HHIII", 1, 9, 15, 0, 0)],
    ids=["http", "zeros", "ones", "too-small"],
)
def test_what_is_no_vfio_user_passes_all_the_same(garbage: bytes) -> None:
    recorder = Recorder()
    good = message(1, 13)
    with between(recorder) as (client, server), memfd() as fd:
        client.sendall(good + garbage)
        assert exactly(server, len(good + garbage)) == good + garbage
        socket.send_fds(client, [b"more"], [fd])
        with RawPeer(server.dup()):
            data, fds, _, _ = socket.recv_fds(server, 100, 4)
        assert (data, len(fds)) == (b"more", 1)
        os.close(fds[0])
        server.sendall(good)
        assert exactly(client, len(good)) == good
        recorder.wait_for(recorder.messages, 2)
    assert [place for place, _ in recorder.unclear_places] == [CLIENT]


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 30])
def test_an_end_in_mid_message_is_told_and_passed_on(cut: int) -> None:
    recorder = Recorder()
    whole = message(1, 10, bytes(16))
    with between(recorder) as (client, server):
        client.sendall(whole[:cut])
        client.close()
        assert exactly(server, 100) == whole[:cut]
        server.close()
        recorder.wait_for(recorder.ended, 1)
    ((place, reason),) = recorder.unclear_places
    assert place == CLIENT
    assert ("mid-header" if cut < 16 else f"{32 - cut} bytes short") in reason


def test_a_half_close_passes_and_the_other_half_goes_on() -> None:
    recorder = Recorder()
    with between(recorder) as (client, server):
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(message(1, 13, b"", 1))
        assert len(exactly(client, 16)) == 16
        assert recorder.ended == []
        server.close()
        assert client.recv(1) == b""
        recorder.wait_for(recorder.ended, 1)


def test_whoever_sends_to_one_that_is_gone_finds_out() -> None:
    with between(Recorder()) as (client, server):
        server.close()
        with pytest.raises(ConnectionError):
            client.sendall(bytes(64 * MIB))


def test_a_server_that_goes_with_bytes_unread() -> None:
    """Its socket is reset, which is an end as good as any."""
    recorder = Recorder()
    with between(recorder) as (client, server):
        client.sendall(message(1, 13))
        recorder.wait_for(recorder.messages, 1)
        server.close()
        assert client.recv(1) == b""
        client.close()
        recorder.wait_for(recorder.ended, 1)


def test_an_observer_that_fails_is_told_no_more_and_nothing_else_stops(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Observer):
        calls = 0

        def seen(self, message: Seen) -> None:
            Faulty.calls += 1
            raise RuntimeError("no paper")

    data = message(1, 13)
    client, from_client = socket.socketpair()
    server, to_server = socket.socketpair()
    proxy = Proxy(Faulty())
    proxy.join(from_client, to_server)
    with client, server, running(proxy):
        server.settimeout(TIMEOUT)
        for _ in range(3):
            client.sendall(data)
            assert exactly(server, 16) == data
    assert Faulty.calls == 1
    assert str(proxy.failure) == "no paper"
    assert "tracing has stopped, what passes goes on: no paper" in caplog.text


class Asker(Device):
    """Reads guest memory by message when BAR 0 is written, and keeps what came."""

    vendor_id, device_id = 0x494F, 0x0DC9
    bars = {0: Bar(0x1000)}

    def __init__(self) -> None:
        super().__init__()
        self.read = b""

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        self.defer(self._ask)

    def _ask(self) -> None:
        data = self.dma.read(0x1000, 16)
        self.dma.write(0x1010, data[::-1])
        self.read = data

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        data[:] = self.read[: len(data)].ljust(len(data), b"\0")


def test_the_twin_socket_is_looked_into_as_well(tmp_path: Path) -> None:
    recorder, memory = Recorder(), bytearray(b"0123456789abcdef" * 256)
    with no_fd_leaks(), traced(Asker(), tmp_path, recorder) as path:
        with Client.connect(path, TIMEOUT) as client:
            assert client.capabilities.wants_twin_socket
            client.dma_map(0x1000, 0x1000, memory=memory, flags=DmaFlags.READ | DmaFlags.WRITE)
            client.region_write(0, 0, b"\1\0\0\0")
            deadline = time.monotonic() + TIMEOUT
            while client.region_read(0, 0, 16) != b"0123456789abcdef":  # the DMA comes after the reply
                assert time.monotonic() < deadline
        recorder.wait_for(recorder.ended, 1)
    assert memory[16:32] == b"fedcba9876543210"
    on_twin = [(m.header.command, m.place.sender, m.is_command) for m in recorder.messages if m.place.twin]
    assert on_twin[:2] == [(Command.DMA_READ, Role.SERVER, True), (Command.DMA_READ, Role.CLIENT, False)]
    assert (Command.DMA_WRITE, Role.SERVER, True) in on_twin
    version = next(m for m in recorder.messages if m.header.command == Command.VERSION and not m.is_command)
    assert [fd.kind for fd in version.fds] == [FdKind.SOCKET]


def test_one_client_after_another(tmp_path: Path) -> None:
    recorder = Recorder()
    with no_fd_leaks(), traced(Edu(), tmp_path, recorder) as path:
        for _ in range(3):
            with Client.connect(path, TIMEOUT) as client:
                assert client.region_read(0, 0, 4) == b"\xed\0\0\1"
        recorder.wait_for(recorder.ended, 3)
    assert recorder.connections == recorder.ended == [1, 2, 3]
    assert {m.place.connection for m in recorder.messages} == {1, 2, 3}


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="nowhere"),
        running(Proxy(Observer(), listen(tmp_path / "s"), lambda: connect(tmp_path / "nowhere"))),
        RawPeer.connect(tmp_path / "s") as peer,
    ):
        assert peer.at_end()


def test_where_clients_come(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen(path):
        with pytest.raises(OSError, match="in use") as refused:
            listen(path)
        assert refused.value.filename == str(path)
    with listen(path):  # what the first one left is replaced
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="in use"):
        listen(tmp_path / "file")
    with pytest.raises(OSError, match="too long"):
        listen(tmp_path / ("x" * 200))


def test_a_stopped_proxy_keeps_no_descriptors() -> None:
    with no_fd_leaks(), between(Recorder()) as (client, server), memfd() as fd:
        socket.send_fds(client, [message(1, 2, bytes(32))[:20]], [fd])
        with RawPeer(server.dup()):
            _, fds, _, _ = socket.recv_fds(server, 100, 4)
        for received in fds:
            os.close(received)


def test_places_are_told_apart() -> None:
    assert str(Place(2, True, Role.SERVER)) == "the server of connection 2, twin socket"
