"""Captures played against servers: the same answers, or the first that is another, and what is left out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfio_user import Client, Device, ServerBackend
from vfio_user.device import Bar, register
from vfio_user.devices.edu import DMA_COMMAND, DMA_COUNT, DMA_DESTINATION, DMA_SOURCE, Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.errors import UsageError
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.tools.replay import MAY_DIFFER, Difference, Ignored, Replay, choose_connection, connections
from vfio_user.tools.trace import CaptureError, Seen, connect, read_capture
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS
from vfio_user.wire.constants import DmaFlags, IrqSetFlags

from .device_support import events, guest_memory, serving
from .trace_support import SERVER, TIMEOUT, VECTORS, Recorder, seen, traced

GPIO_OF_THE_RUST_CLIENT = 3
"""Its connection in the recorded vectors."""


@contextmanager
def replaying(
    backend: ServerBackend, messages: list[Seen], *, timeout: float = TIMEOUT, ignored: tuple[str, ...] = ()
) -> Iterator[Replay]:
    with (
        no_fd_leaks(),
        serving(backend) as path,
        Replay(connect(path), messages, timeout, list(map(Ignored.parse, ignored))) as replay,
    ):
        yield replay


def differences(backend: ServerBackend, messages: list[Seen], **options: object) -> list[str]:
    with replaying(backend, messages, **options) as replay:  # type: ignore[arg-type]
        return list(map(str, replay.run()))


def rust_client() -> list[Seen]:
    return connections(read_capture(VECTORS))[GPIO_OF_THE_RUST_CLIENT]


def test_our_server_answers_the_recorded_rust_client_as_its_own_server_did() -> None:
    messages = rust_client()
    with replaying(Gpio(), messages) as replay:
        assert list(replay.run()) == []
    assert replay.sent == replay.compared == len(messages) // 2 == 23


def test_another_device_answers_otherwise() -> None:
    with replaying(Edu(), rust_client()) as replay:
        first = next(replay.run())
    assert first == Difference(6, "DEVICE_GET_REGION_INFO #2", "flags", "0", "READ|WRITE")
    assert str(first) == "message 6, DEVICE_GET_REGION_INFO #2: flags is READ|WRITE, recorded 0"


def test_errors_without_errno_read_as_einval_and_the_known_quirks_are_found() -> None:
    messages = connections(read_capture(VECTORS))[1]
    found = differences(Gpio(), messages)
    assert [text.partition(":")[0] for text in found] == [
        "message 74, DMA_UNMAP #36",  # the crate takes 4 for ALL
        *["message 76, REGION_READ #37 bar2+0x40+0x0"] * 3,  # nothing read is answered without payload
    ]


class Registers(Device):
    """Eight counters that count reads, from ``start`` on."""

    vendor_id, device_id = 0x494F, 0x0DC9
    bars = {0: Bar(0x100)}
    value = register(0x10, writable=0xFFFFFFFF)

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.reads = start

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        if offset == 0x20:
            self.reads += 1
            data[:] = self.reads.to_bytes(len(data), "little")
        else:
            super().bar_read(bar, offset, data)


def recorded(backend: ServerBackend, folder: Path, use: object) -> list[Seen]:
    """What is said while ``use(client)`` runs."""
    recorder = Recorder()
    with traced(backend, folder, recorder) as path:
        with Client.connect(path, TIMEOUT) as client:
            use(client)  # type: ignore[operator]
        recorder.wait_for(recorder.ended, 1)
    return recorder.messages


def count(client: Client) -> None:
    client.region_write(0, 0x10, b"\1\2\3\4")
    assert client.region_read(0, 0x10, 4) == b"\1\2\3\4"
    client.region_read(0, 0x20, 4)
    client.region_read(0, 0x20, 4)
    client.region_write(0, 0x10, b"\5\6\7\x08", posted=True)
    client.region_read(0, 0x10, 4)


def test_the_first_difference_names_register_and_byte(tmp_path: Path) -> None:
    messages = recorded(Registers(), tmp_path, count)
    assert differences(Registers(), messages) == []
    first, second = differences(Registers(0x500), messages)
    assert (
        first.endswith("REGION_READ #18 bar0+0x20:u32: data is 0x01 at byte 0x1, recorded 0x00") or "bar0+0x20" in first
    )
    assert "bar0+0x20:u32" in second


@pytest.mark.parametrize("what", ["bar0+0x20:u32", "bar0", "0", "region_read", "bar0+0x22:u8"])
def test_what_is_ignored(what: str, tmp_path: Path) -> None:
    messages = recorded(Registers(), tmp_path, count)
    assert differences(Registers(7), messages, ignored=(what,)) == []
    assert differences(Registers(7), messages, ignored=("config", "bar0+0x24:u32", "dma_map")) != []


def test_what_can_be_ignored() -> None:
    assert Ignored.parse("set_irqs") == Ignored(command=8)
    assert Ignored.parse("bar2+0x10:u8") == Ignored(region=2, start=16, stop=17)
    with pytest.raises(UsageError):
        Ignored.parse("sieve")


def test_interrupts_and_memory_are_made_anew(tmp_path: Path) -> None:
    with events(1) as (event,), guest_memory(1 << 20) as memory:

        def use(client: Client) -> None:
            client.set_irqs(0, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, 0, 1, [event.fd])
            client.dma_map(0x10000, 1 << 20, memory)
            client.region_write(0, 0x60, b"\1\0\0\0")
            client.region_read(0, 0x24, 4)
            client.dma_unmap(0x10000, 1 << 20)

        messages = recorded(Edu(), tmp_path, use)
    assert [list(map(str, message.fds)) for message in messages if message.is_command and message.fds] == [
        ["eventfd"],
        ["memfd(0x100000)"],
    ]
    assert differences(Edu(), messages) == []


def copy(client: Client, memory: bytearray) -> None:
    """Has edu read 16 bytes of guest memory by messages, and write them back behind."""
    client.dma_map(0x1000, 0x1000, memory=memory, flags=DmaFlags.READ | DmaFlags.WRITE)
    for source, destination, command in ((0x1000, 0x40000, 1), (0x40000, 0x1800, 3)):
        for offset, value in (
            (DMA_SOURCE, source),
            (DMA_DESTINATION, destination),
            (DMA_COUNT, 16),
            (DMA_COMMAND, command),
        ):
            client.region_write(0, offset, value.to_bytes(8, "little"))
        deadline = time.monotonic() + TIMEOUT
        while client.region_read(0, DMA_COMMAND, 4)[0] & 1:
            assert time.monotonic() < deadline


def test_what_the_server_asks_for_is_answered_as_it_was(tmp_path: Path) -> None:
    """By the twin socket, if the server grants one now."""
    memory = bytearray(b"0123456789abcdef" * 256)
    messages = recorded(Edu(), tmp_path, lambda client: copy(client, memory))
    assert sum(message.place.twin for message in messages) >= 3
    edu = Edu()
    assert differences(edu, messages, ignored=("bar0+0x98:u32",)) == []
    assert bytes(edu.buffer[:16]) == b"0123456789abcdef"


def test_what_the_server_writes_otherwise_is_a_difference(tmp_path: Path) -> None:
    class Wrong(Edu):
        def _move(self, start: int, guest: int, count: int, to_guest: bool) -> None:
            self.buffer[start] ^= to_guest
            super()._move(start, guest, count, to_guest)

    memory = bytearray(b"0123456789abcdef" * 256)
    messages = recorded(Edu(), tmp_path, lambda client: copy(client, memory))
    (found,) = differences(Wrong(), messages, ignored=("bar0+0x98:u32",))
    assert "DMA_WRITE" in found
    assert found.endswith("0x1800+0x10: data is 0x31, recorded 0x30 at byte 0x0")


def test_what_the_server_asks_for_no_more_is_a_difference(tmp_path: Path) -> None:
    class Lazy(Edu):
        def _transfer(self) -> None:
            self.dma_command &= ~1

    memory = bytearray(b"0123456789abcdef" * 256)
    messages = recorded(Edu(), tmp_path, lambda client: copy(client, memory))
    with replaying(Lazy(), messages, timeout=0.2, ignored=("bar0+0x98:u32",)) as replay:
        first = next(replay.run())
    assert (first.field, first.recorded, first.got) == ("command", "sent", "not sent within 0.2 s")
    assert "DMA_READ" in first.message


@contextmanager
def scripted(*answers: bytes | None) -> Iterator[socket.socket]:
    """A socket to a server that has said all of this already; None: it closes."""
    ours, theirs = socket.socketpair()
    with theirs:
        for answer in answers:
            if answer is not None:
                theirs.sendall(answer)
        if None in answers:
            theirs.shutdown(socket.SHUT_WR)
        yield ours


ACCESS = m.RegionAccess(0, 0, 4).pack()
EXCHANGE = [
    seen(ACCESS, command=9, msg_id=5),
    seen(ACCESS + b"\1\0\0\0", command=9, msg_id=5, flags=1, place=SERVER),
]
GOOD = m.Header(5, 9, 36, 1, 0).pack() + ACCESS + b"\1\0\0\0"


@pytest.mark.parametrize(
    ("answers", "field", "got"),
    [
        ((m.Header(5, 9, 16, 0x21, errno.EIO).pack(),), "error", "EIO"),
        ((m.Header(5, 9, 32, 1, 0).pack() + ACCESS,), "data", "0 bytes"),
        ((m.Header(5, 9, 19, 1, 0).pack() + b"abc",), "malformed", "RegionAccess takes 16 bytes, 3 came"),
        ((GOOD[:20], None), "connection", "the peer closed the connection in mid-message"),
        ((None,), "connection", "the peer closed"),
        ((b"\xff" * 64,), "connection", "a message of 4294967295 bytes, at most 1052640 are taken"),
        ((), "reply", "not there after 0.2 s"),
        ((m.Header(6, 9, 16, 1, 0).pack(),), "reply", "not there after 0.2 s"),
    ],
)
def test_servers_that_answer_badly_or_not_at_all(answers: tuple[bytes | None, ...], field: str, got: str) -> None:
    with no_fd_leaks(), scripted(*answers) as sock, Replay(sock, EXCHANGE, 0.2) as replay:
        first = next(replay.run())
    assert first.field == field
    assert first.got.startswith(got.partition("at most")[0])


def test_a_server_that_asks_for_what_was_never_asked_for() -> None:
    ask = m.Header(1, 11, 32, 0, 0).pack() + m.DmaAccess(0x5000, 8).pack()
    with scripted(ask, GOOD) as sock, Replay(sock, EXCHANGE, TIMEOUT) as replay:
        (found,) = replay.run()
    assert str(found) == "DMA_READ 0x5000+0x8: command is sent, recorded none"


def test_a_server_that_never_stops_asking() -> None:
    """Its deadline ends the wait, not its silence."""
    ask = m.Header(1, 11, 32, 0x10, 0).pack() + m.DmaAccess(0x5000, 8).pack()
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def spam() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                theirs.sendall(ask)

    thread = threading.Thread(target=spam)
    with theirs, Replay(ours, EXCHANGE, 0.2) as replay:
        thread.start()
        found = list(replay.run())
        over.set()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert found[-1].got == "not there after 0.2 s"


def test_a_message_that_was_not_captured_whole_is_not_sent() -> None:
    cut = EXCHANGE[0]._replace(payload=b"", fault="16 bytes were not captured")
    with (
        scripted(GOOD) as sock,
        Replay(sock, [cut], TIMEOUT) as replay,
        pytest.raises(CaptureError, match="message 1 was not captured whole: 16 bytes"),
    ):
        list(replay.run())


def test_choosing_a_connection() -> None:
    found = connections(read_capture(VECTORS))
    assert choose_connection(found, None) == found[1]
    with pytest.raises(UsageError, match="no connection 9; there are: 1, 2, 3, 4"):
        choose_connection(found, 9)
    with pytest.raises(CaptureError, match="no message"):
        choose_connection({}, None)


def test_what_may_differ_has_a_reason_each() -> None:
    assert all(command in COMMANDS and reason for (command, _), reason in MAY_DIFFER.items())


# The command


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vfio_user", "replay", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_as_a_command() -> None:
    with serving(Gpio()) as path:
        done = run(VECTORS, path, "--connection", "3")
        assert (done.returncode, done.stdout, done.stderr) == (0, "23 commands sent, 23 replies as recorded\n", "")
    with serving(Edu()) as path:
        done = run(VECTORS, path, "--connection", "3")
        assert done.returncode == 1
        assert done.stdout == "message 6, DEVICE_GET_REGION_INFO #2: flags is READ|WRITE, recorded 0\n"
        assert done.stderr == f"vfio-user: {path} does not answer as recorded in {VECTORS}\n"
        every = run(VECTORS, path, "--connection", "3", "--all", "--json", "--ignore", "get_region_info")
        found = json.loads(every.stdout)
        assert (found["sent"], found["compared"]) == (23, 23)
        assert {"number": 24, "message": "REGION_READ #11 config+0x0:u32 vendor_id device_id", "field": "data"} in [
            {name: one[name] for name in ("number", "message", "field")} for one in found["differences"]
        ]


def test_as_a_command_with_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    for arguments, status, reason in (
        ([tmp_path / "none", "s"], 1, f"vfio-user: {tmp_path}/none: No such file or directory"),
        ([tmp_path / "text", "s"], 1, f"vfio-user: {tmp_path}/text: it is neither a pcapng capture nor recorded"),
        ([VECTORS, tmp_path / "s"], 1, f"vfio-user: {tmp_path}/s: No such file or directory"),
        ([VECTORS, "s", "--connection", "9"], 2, "there is no connection 9"),
        ([VECTORS, "s", "--ignore", "sieve"], 2, "no command 'sieve'"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (status, "")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1 or status == 2
    assert not os.path.exists("s")
