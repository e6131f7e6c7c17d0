"""``vfio-user trace`` as a process: between real peers, with peers that are none, from files, on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfio_user import Client
from vfio_user.devices.edu import Edu
from vfio_user.errors import CommandError
from vfio_user.tools.trace import dissector_path, read_capture

from .device_support import serving
from .support import RawPeer, message
from .trace_support import VECTORS

COMMAND = [sys.executable, "-m", "vfio_user", "trace"]
VFIO_USER = f"{sys.executable} -m vfio_user"
TIMEOUT = 60
EDU_ID = b"\xed\0\0\1"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        stdin=subprocess.DEVNULL,
    )


class Tracing:
    """``vfio-user trace`` between ``path`` and a server; :meth:`end` gives status, stdout and stderr."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self.path = path

    def end(self, number: signal.Signals | None = signal.SIGINT) -> tuple[int, str, str]:
        if number is not None:
            self.process.send_signal(number)
        out, error = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, out, error


@contextmanager
def tracing(folder: Path, server: Path, *arguments: str | Path, stdout: int = subprocess.PIPE) -> Iterator[Tracing]:
    path = folder / "trace.sock"
    command = [*COMMAND, "--listen", path, "--connect", server, *arguments]
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == f"{path} is passed on to {server}\n"
            yield Tracing(process, path)
        finally:
            process.kill()


@contextmanager
def saying(folder: Path, handle: Callable[[socket.socket], None]) -> Iterator[Path]:
    """A server of one connection that does what ``handle`` does."""

    def serve() -> None:
        with contextlib.suppress(TimeoutError), listener.accept()[0] as sock:
            sock.settimeout(TIMEOUT)
            handle(sock)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "server.sock"))
        listener.listen()
        listener.settimeout(TIMEOUT)
        thread = threading.Thread(target=serve)
        thread.start()
        yield folder / "server.sock"
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def test_commands_at_both_ends(tmp_path: Path) -> None:
    done = run(
        *("--run-server", f"{VFIO_USER} serve edu --socket-path $VFIO_USER_SOCKET >{tmp_path}/said"),
        *("--run", f"{VFIO_USER} read $VFIO_USER_SOCKET config bar0 bar0+0x8; exit 3"),
        *("--write", tmp_path / "c.pcapng", "--stats"),
    )
    assert (done.returncode, done.stderr) == (3, "")
    lines = done.stdout.splitlines()
    for expected in (
        "config+0x0:u32 = 0x11e81234",  # the client's own
        "REGION_READ config+0x0:u32 vendor_id device_id",
        "REGION_READ ok bar0+0x0:u32 identification = 0x010000ed",
        "REGION_READ ok bar0+0x8:u32 factorial = 0x00000000",
        "DEVICE_GET_INFO ok argsz=16 flags=RESET|PCI num_regions=9 num_irqs=5",
    ):
        assert any(expected in line for line in lines), expected
    table = lines[-6:]
    assert table[0].split() == ["command", "count", "errors", "bytes", "p50", "p99", "max"]
    assert table[-1].split()[:3] == ["REGION_READ", "3", "0"]
    assert len(list(read_capture(tmp_path / "c.pcapng"))) == 2 * (1 + 1 + 9 + 5 + 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_the_figures(number: signal.Signals, tmp_path: Path) -> None:
    capture = tmp_path / "c.pcapng"
    with (
        serving(Edu()) as server,
        tracing(tmp_path, server, "--quiet", "--stats", "--write", capture) as trace,
        Client.connect(trace.path, TIMEOUT) as client,
    ):
        assert client.region_read(0, 0, 4) == EDU_ID
        status, out, error = trace.end(number)
    assert (status, error) == (0, "")
    assert out.splitlines()[-1].split()[:3] == ["REGION_READ", "1", "0"]
    assert not trace.path.exists()
    assert list(read_capture(capture))[-1].header.command == 9


def test_refusals_and_json(tmp_path: Path) -> None:
    with serving(Edu()) as server, tracing(tmp_path, server, "--errors", "--json", "--stats") as trace:
        with Client.connect(trace.path, TIMEOUT) as client:
            with pytest.raises(CommandError):
                client.region_read(5, 0x10, 4)
            assert client.region_read(0, 0, 4) == EDU_ID
        status, out, _ = trace.end()
    asked, refused, figures = map(json.loads, out.splitlines())
    assert status == 0
    assert (asked["type"], asked["target"]) == ("command", "bar5+0x10:u32")
    assert (refused["type"], refused["error"], refused["id"]) == ("reply", "EINVAL", asked["id"])
    assert figures["stats"]["REGION_READ"] | {"p50": 0, "p99": 0, "max": 0} == {
        "count": 2,
        "errors": 1,
        "bytes": 32 + 16 + 32 + 36,
        "p50": 0,
        "p99": 0,
        "max": 0,
    }


def test_a_server_that_is_no_vfio_user_server(tmp_path: Path) -> None:
    page = b"HTTP/1.1 400 Bad Request\r\n\r\n"

    def answer(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(page)

    capture = tmp_path / "c.pcapng"
    with saying(tmp_path, answer) as server, tracing(tmp_path, server, "--write", capture) as trace:
        with RawPeer.connect(trace.path) as peer:
            peer.post(1, b"\0\0\2\0")
            assert peer.socket.recv(100) == page
            assert peer.at_end()
        status, out, error = trace.end()
    assert status == 1
    assert error.startswith("vfio-user: what the server of connection 1 sent is no vfio-user: a message of ")
    assert error.count("\n") == 1
    assert [line.split()[2] for line in out.splitlines()] == ["#100", "the"]
    assert [message.header.command for message in read_capture(capture)] == [1]


def test_a_peer_that_stops_in_mid_message(tmp_path: Path) -> None:
    def answer(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(message(100, 1, bytes(30), 1)[:20])

    with saying(tmp_path, answer) as server, tracing(tmp_path, server) as trace:
        with RawPeer.connect(trace.path) as peer:
            peer.post(1, b"\0\0\2\0")
            with pytest.raises(EOFError):
                peer.read()
        status, _, error = trace.end()
    assert (status, error) == (
        1,
        "vfio-user: what the server of connection 1 sent is no vfio-user: it ended in mid-message, 26 bytes short\n",
    )


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with tracing(tmp_path, tmp_path / "nowhere") as trace, RawPeer.connect(trace.path) as peer:
        assert peer.at_end()
        status, _, error = trace.end(None)
    assert (status, error) == (1, f"vfio-user: {tmp_path}/nowhere: No such file or directory\n")


def test_a_server_that_does_not_start() -> None:
    done = run("--run-server", "exit 7", "--run", "sleep 60")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vfio-user: the server ended with status 7 before a client came\n"


@pytest.mark.parametrize(
    ("client", "status"),
    [("exit 5", 5), ("exit 0", 0), ("kill -KILL $$", 137), (f"{VFIO_USER} info $VFIO_USER_SOCKET >&2; exit 6", 6)],
    ids=["five", "zero", "killed", "used"],
)
def test_the_status_is_that_of_the_client(client: str, status: int) -> None:
    serve = f"{VFIO_USER} serve edu --socket-path $VFIO_USER_SOCKET >&2"
    assert run("--run-server", serve, "--run", client, "--quiet").returncode == status


def test_a_server_that_ends_by_itself(tmp_path: Path) -> None:
    """Its status is that of the trace when no client was started."""
    one_message = (
        "import os, socket\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(os.environ['VFIO_USER_SOCKET'])\n"
        "listener.listen()\n"
        "listener.accept()[0].recv(100)\n"
        "raise SystemExit(9)\n"
    )
    (tmp_path / "server.py").write_text(one_message)
    process = subprocess.Popen(
        [*COMMAND, "--listen", str(tmp_path / "s"), "--run-server", f"{sys.executable} {tmp_path}/server.py"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"{tmp_path}/s is passed on to ")
        with RawPeer.connect(tmp_path / "s") as peer:
            peer.post(13)
            assert peer.at_end()
        assert process.wait(TIMEOUT) == 9


def test_a_signal_while_the_server_is_waited_for(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--listen", str(tmp_path / "s"), "--run-server", "exec sleep 60"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        process.stderr.readline()
        with RawPeer.connect(tmp_path / "s") as peer:
            process.send_signal(signal.SIGTERM)
            assert peer.at_end()
        assert process.wait(TIMEOUT) == 0
        assert process.stderr.read() == ""


def test_a_reader_that_goes_away_takes_nothing_along(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with serving(Edu()) as server, tracing(tmp_path, server, stdout=writer) as trace:
        os.close(writer)
        os.close(reader)
        with Client.connect(trace.path, TIMEOUT) as client:
            assert client.region_read(0, 0, 4) == EDU_ID
        status, _, error = trace.end()
    assert status == 1
    assert error == "ERROR vfio_user.tools: tracing has stopped, what passes goes on: [Errno 32] Broken pipe\n"


def test_a_capture_that_the_disk_does_not_take(tmp_path: Path) -> None:
    done = run("--listen", tmp_path / "s", "--connect", tmp_path / "t", "--write", "/dev/full")
    assert (done.returncode, done.stderr) == (1, "vfio-user: /dev/full: No space left on device\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "where do clients come?"),
        (["--listen", "a"], "where is the server?"),
        (["--read", "a", "--connect", "b"], "--read shows a capture"),
        (["--read", "a", "--write", "b"], "--read shows a capture"),
        (["--read", str(VECTORS), "--command", "sieve"], "no command 'sieve'"),
        (["--read", str(VECTORS), "--region", "bar7"], "--region bar7"),
        (["--read", str(VECTORS), "--device", "sieve"], "no device 'sieve'"),
        (["--read", str(VECTORS), "--slow", "-1"], "--slow"),
        (["--read", str(VECTORS), "--from", "nobody"], "--from"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


# Captures


def test_a_capture_is_shown_again() -> None:
    done = run("--read", VECTORS, "--command", "region_write", "--region", "config", "--from", "client")
    assert (done.returncode, done.stderr) == (0, "")
    shown = [line.split(maxsplit=2)[2] for line in done.stdout.splitlines() if not line.startswith("--")]
    assert shown == [
        "#21    REGION_WRITE config+0x4:u16 command = 0x0001",
        "#23    REGION_WRITE config+0x18:u32 bar2 = 0xffffffff",
        "#47    REGION_WRITE posted config+0x4:u16 command = 0x0003",
        "#12    REGION_WRITE config+0x4:u16 command = 0x0003",
        "#13    REGION_WRITE config+0x4:u16 command = 0x0003",
    ]


def test_data_as_hexadecimal_digits() -> None:
    done = run("--read", VECTORS, "--command", "region_read", "--region", "bar0", "--hex")
    assert "    00000000  00 07 0e 15 1c 23 2a 31 38 3f 46 4d 54 5b 62 69  .....#*18?FMT[bi" in done.stdout.splitlines()


def test_a_capture_that_is_cut(tmp_path: Path) -> None:
    whole = tmp_path / "c.pcapng"
    with serving(Edu()) as server, tracing(tmp_path, server, "--quiet", "--write", whole) as trace:
        with Client.connect(trace.path, TIMEOUT):
            pass
        trace.end()
    count = len(list(read_capture(whole)))
    os.truncate(whole, whole.stat().st_size - 5)
    done = run("--read", whole, "--json")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == count - 1
    assert done.stderr.startswith(f"vfio-user: {whole}: it is cut off in the block at byte ")
    assert run("--read", tmp_path / "none").stderr == f"vfio-user: {tmp_path}/none: No such file or directory\n"


def test_where_the_dissector_is() -> None:
    done = run("--dissector")
    assert (done.returncode, done.stdout) == (0, f"{dissector_path()}\n")


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)]
)
def test_colours_are_for_terminals(environment: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    settings = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
    process = subprocess.Popen(
        [*COMMAND, "--read", str(VECTORS), "--command", "device_reset"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        env=settings,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(TIMEOUT) == 0
    assert b"DEVICE_RESET" in shown
    assert (b"\x1b[" in shown) is coloured
