"""migrate --to and receive --listen: sockets and TLS between them, several at once, and who comes to them."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.cli.main import cli
from vfio_user.errors import CallTimeoutError, UsageError
from vfio_user.tools.places import Certificates, Listener, TlsPlace, UnixPlace, parse_place

from .cli_migrate_support import (
    TIMEOUT,
    Serve,
    Served,
    complaint,
    expect_as_before,
    expect_moved,
    expect_source_runs_on,
    listening,
    report_of,
    run,
    served_pair,
    serving,
    started,
)
from .tls_support import make_certificates

pytestmark = pytest.mark.timeout(120)

RELAY = """
import socket, sys, threading, os

def copy(read, write, end):
    while data := read(1 << 16):
        write(data)
    end()

def write_all(data):
    while data:
        data = data[os.write(1, data):]

peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
up = threading.Thread(target=copy, args=(lambda n: os.read(0, n), peer.sendall, lambda: peer.shutdown(1)))
up.daemon = True
up.start()
copy(peer.recv, write_all, lambda: None)
"""
"""What ``nc -U`` does: a socket's bytes to and from stdin and stdout."""
MEMORY = 4 << 20
HOWEVER_LONG = ("--downtime", "60000")
"""The switch-over may take: how fast this machine is just now is not what is tested."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def pair(serve: Serve) -> tuple[Served, Served]:
    return served_pair(serve)


@pytest.fixture
def memory(tmp_path: Path) -> tuple[Path, Path]:
    """The source's, full of something, and the destination's."""
    here, there = tmp_path / "memory-here", tmp_path / "memory-there"
    here.write_bytes(os.urandom(MEMORY // 2) + bytes(MEMORY // 2))
    there.write_bytes(os.urandom(MEMORY))
    return here, there


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "place"


def ended_well(receiver: subprocess.Popen[str]) -> str:
    """What a receiver said of what it has received."""
    told, complaints = receiver.communicate(timeout=TIMEOUT)
    assert (receiver.returncode, complaints) == (0, "")
    return told


def ended_badly(receiver: subprocess.Popen[str]) -> str:
    """What a receiver complained of."""
    told, complaints = receiver.communicate(timeout=TIMEOUT)
    assert (receiver.returncode, told) == (1, "")
    return complaints


# Through sockets


@pytest.mark.parametrize("compress", [False, True])
def test_memory_goes_through_several_connections(
    pair: tuple[Served, Served], memory: tuple[Path, Path], place: Path, compress: bool
) -> None:
    here, there = memory
    with listening(pair[1].path, "--memory", there, "--memory-pipes", "3", place=place) as receiver:
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        options = [*HOWEVER_LONG, "--memory-pipes", "3", "--json", *(["--compress"] if compress else [])]
        done = run("migrate", pair[0].path, "--to", place, "--memory", here, *options)
        told = ended_well(receiver)
    assert (done.returncode, done.stderr) == (0, b"")
    assert report_of(done)["verified"] is True
    expect_moved(*pair)
    assert here.read_bytes() == there.read_bytes()
    assert told.startswith("received 1 device with 8.0 MiB of state, 4.0 MiB of memory, 2.0 MiB of it zeros, in ")
    assert told.endswith("compressed by zstd: running\n" if compress else "s: running\n")
    assert not place.exists()


def test_memory_goes_through_several_commands(
    pair: tuple[Served, Served], memory: tuple[Path, Path], place: Path
) -> None:
    here, there = memory
    command = shlex.join([sys.executable, "-c", RELAY, str(place)])
    with listening(pair[1].path, "--memory", there, "--memory-pipes", "2", place=place) as receiver:
        options = ("--memory", here, "--memory-pipes", "2", "--json", *HOWEVER_LONG)
        done = run("migrate", pair[0].path, "--exec", command, *options)
        ended_well(receiver)
    assert (done.returncode, done.stderr) == (0, b"")
    expect_moved(*pair)
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize(("ours", "theirs"), [("1", "0"), ("0", "1"), ("1", "2")])
def test_a_receiver_of_more_pipes_takes_fewer_one_of_fewer_refuses_more(
    pair: tuple[Served, Served], place: Path, ours: str, theirs: str
) -> None:
    with listening(pair[1].path, "--memory-pipes", theirs, "--timeout", "0.5", place=place) as receiver:
        done = run("migrate", pair[0].path, "--to", place, "--memory-pipes", ours, "--json")
        if ours < theirs:
            ended_well(receiver)
            assert done.returncode == 0
            expect_moved(*pair)
        else:
            reasons = ("was vfio-user receive told of as many", "the source has 1 more pipes, here are 0")
            assert any(reason in complaint(done) for reason in reasons)
            receiver.communicate(timeout=TIMEOUT)
            assert receiver.returncode == 1
            expect_as_before(*pair)


def test_a_receiver_that_is_interrupted_while_it_waits(pair: tuple[Served, Served], place: Path) -> None:
    with listening(pair[1].path, place=place) as receiver:
        receiver.send_signal(signal.SIGTERM)
        assert ended_badly(receiver) == "vfio-user: interrupted\n"
    assert not place.exists()
    expect_as_before(*pair)


@pytest.mark.parametrize(
    ("whom", "number"), [("source", signal.SIGINT), ("receiver", signal.SIGTERM), ("receiver", signal.SIGKILL)]
)
def test_what_ends_a_side_midway_leaves_the_source_running(
    pair: tuple[Served, Served], memory: tuple[Path, Path], place: Path, whom: str, number: int
) -> None:
    here, there = memory
    with listening(pair[1].path, "--memory", there, "--memory-pipes", "2", place=place) as receiver:
        options = ("--memory", here, "--memory-pipes", "2", "--bandwidth", "1", "--json")
        with started("migrate", pair[0].path, "--to", place, *options) as process:
            pair[1].wait_for("RESUMING")
            {"source": process, "receiver": receiver}[whom].send_signal(number)
            out, told = process.communicate(timeout=TIMEOUT)
        receiver.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert '"status": "failed", "failed_step": "pre-copy"' in out, told
    assert told.startswith("vfio-user: failed at pre-copy: the source is as it was: ")
    expect_source_runs_on(pair[0])
    if number != signal.SIGKILL:
        expect_as_before(*pair)


def test_where_nobody_listens(pair: tuple[Served, Served], place: Path) -> None:
    assert f"{place}: No such file or directory" in complaint(run("migrate", pair[0].path, "--to", place, "--json"))
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(place))
    assert f"{place}: Connection refused" in complaint(run("migrate", pair[0].path, "--to", place, "--json"))
    expect_source_runs_on(pair[0])


def test_a_place_that_was_left_behind_is_taken_one_in_use_is_not(tmp_path: Path, place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(place))
    with Listener(UnixPlace(place)), pytest.raises(OSError, match="in use"):
        Listener(UnixPlace(place))
    assert not place.exists()
    place.write_text("something of value")
    with pytest.raises(OSError, match="in use"):
        Listener(UnixPlace(place))
    assert place.read_text() == "something of value"


def test_the_one_that_speaks_first_is_read_first(place: Path) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(Listener(UnixPlace(place)))
        ends = [stack.enter_context(UnixPlace(place).connect(TIMEOUT)) for _ in range(4)]
        ends[2].sendall(b"2")
        came = [stack.enter_context(sock) for sock in listener.accept(4, TIMEOUT, TIMEOUT)]
        assert came[0].recv(1) == b"2"
        for end in ends:
            end.sendall(b"x")
        assert [sock.recv(1) for sock in came] == [b"x"] * 4


def test_who_says_nothing_is_not_waited_for_for_ever(place: Path) -> None:
    with Listener(UnixPlace(place)) as listener, UnixPlace(place).connect(TIMEOUT) as silent:
        with pytest.raises(CallTimeoutError, match="1 connected, and nothing came"):
            listener.accept(2, 0.1, 0.1)
        assert silent.recv(1) == b""


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and self-signed certificates of two hosts, and of a stranger."""
    return make_certificates(tmp_path_factory.mktemp("certificates"), host="localhost")


def trust(certificates: Path, own: str, peer: str) -> list[str | Path]:
    files = {"--cert": f"{own}.crt", "--key": f"{own}.key", "--ca": f"{peer}.crt"}
    return [part for option, name in files.items() for part in (option, certificates / name)]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as probe:
        return int(probe.getsockname()[1])


def test_through_tls_which_sends_strangers_away(
    pair: tuple[Served, Served], memory: tuple[Path, Path], certificates: Path
) -> None:
    here, there = memory
    place = f"localhost:{free_port()}"
    theirs = ("--memory", there, "--memory-pipes", "1", *trust(certificates, "destination", "source"))
    ours = ("migrate", pair[0].path, "--to", place, "--memory", here, "--memory-pipes", "1", "--json", *HOWEVER_LONG)
    with listening(pair[1].path, *theirs, place=place) as receiver:
        stranger = complaint(run(*ours, *trust(certificates, "stranger", "destination")))
        assert "failed at check: the source is as it was: " in stranger
        deceived = complaint(run(*ours, *trust(certificates, "source", "stranger")))
        assert f"{place}: [SSL: CERTIFICATE_VERIFY_FAILED]" in deceived
        expect_source_runs_on(pair[0])
        done = run(*ours, *trust(certificates, "source", "destination"))
        _, complaints = receiver.communicate(timeout=TIMEOUT)
    assert (done.returncode, done.stderr, receiver.returncode) == (0, b"", 0)
    assert complaints.count("a connection was refused: [SSL: ") == len(complaints.splitlines()) >= 2
    expect_moved(*pair)
    assert here.read_bytes() == there.read_bytes()


def test_a_name_that_is_not_the_receivers(certificates: Path) -> None:
    here = TlsPlace("127.0.0.1", 0, of(certificates, "destination", "source"))
    with here.listen() as listener:
        there = TlsPlace("127.0.0.1", listener.getsockname()[1], of(certificates, "source", "destination"))
        refused: list[OSError] = []

        def accept() -> None:
            try:
                here.accept(listener, TIMEOUT)
            except OSError as error:
                refused.append(error)

        accepting = threading.Thread(target=accept)
        accepting.start()
        with pytest.raises(OSError, match="IP address mismatch"):
            there.connect(TIMEOUT)
        accepting.join(TIMEOUT)
        assert refused


def test_who_does_not_say_who_it_is_is_sent_away(certificates: Path) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(Listener(TlsPlace("localhost", 0, of(certificates, "destination", "source"))))
        port = int(listener.name.rpartition(":")[2])
        silent = stack.enter_context(socket.create_connection(("localhost", port), TIMEOUT))
        came: list[socket.socket] = []
        accepting = threading.Thread(target=lambda: came.extend(listener.accept(1, 0.5, TIMEOUT)))
        accepting.start()
        assert silent.recv(1) == b""
        there = TlsPlace("localhost", port, of(certificates, "source", "destination"))
        known = stack.enter_context(there.connect(TIMEOUT))
        known.sendall(b"x")
        accepting.join(TIMEOUT)
        assert stack.enter_context(came[0]).recv(1) == b"x"


def of(certificates: Path, own: str, peer: str) -> Certificates:
    return Certificates(certificates / f"{own}.crt", certificates / f"{own}.key", certificates / f"{peer}.crt")


def test_certificates_that_are_none(certificates: Path, tmp_path: Path) -> None:
    good = of(certificates, "source", "destination")
    empty = tmp_path / "empty"
    empty.touch()
    for bad in (
        Certificates(empty, good.key, good.trusted),
        Certificates(good.own, certificates / "stranger.key", good.trusted),
        Certificates(good.own, good.key, empty),
    ):
        with pytest.raises(UsageError, match="no certificate, its key"):
            bad.context(server=True)
    with pytest.raises(FileNotFoundError, match="missing"):
        Certificates(good.own, tmp_path / "missing", good.trusted).context(server=False)
    encrypted = tmp_path / "encrypted.key"
    command = f"openssl ec -in {good.key} -aes128 -passout pass:secret -out {encrypted}"
    subprocess.run(command.split(), check=True, capture_output=True, timeout=60)
    with pytest.raises(UsageError, match="the key is encrypted"):
        Certificates(good.own, encrypted, good.trusted).context(server=False)


# What is written


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("localhost:1", "localhost", 1), ("[::1]:65535", "::1", 65535), ("10.0.0.1:0", "10.0.0.1", 0)],
)
def test_a_host_and_a_port(text: str, host: str, port: int) -> None:
    some = Certificates(Path("a"), Path("b"), Path("c"))
    assert parse_place(text, some) == TlsPlace(host, port, some)
    assert str(parse_place(text, some)) == text
    with pytest.raises(UsageError, match="certificates only"):
        parse_place(text)


@given(st.text(st.characters(exclude_characters=":\0", exclude_categories=["Cs"]), min_size=1))
def test_all_else_is_a_path(text: str) -> None:
    assert parse_place(text) == UnixPlace(Path(text))
    with pytest.raises(UsageError, match="certificates are for"):
        parse_place(text, Certificates(Path("a"), Path("b"), Path("c")))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["migrate", "a", "--to", "b:1"], "with certificates only"),
        (["migrate", "a", "--to", "b:1", "--cert", "c"], "belong together"),
        (["migrate", "a", "--to", ":1"], "a host is missing"),
        (["migrate", "a", "--to", "b:65536", "--cert", "c", "--key", "d", "--ca", "e"], "no such port"),
        (["migrate", "a", "--to", "./b", "--cert", "c", "--key", "d", "--ca", "e"], "certificates are for"),
        (["migrate", "a", "--exec", "b", "--cert", "c", "--key", "d", "--ca", "e"], "are for --to"),
        (["migrate", "a", "--exec", "b", "--to", "c"], "not both"),
        (["migrate", "a", "b", "--to", "c"], "give SRC, and --exec or --to"),
        (["migrate", "a", "b", "--compress"], "are for --exec and --to"),
        (["migrate", "a", "b", "--memory-pipes", "1"], "are for --exec and --to"),
        (["migrate", "a", "--to", "b", "--memory-pipes", "65"], "range 0<=x<=64"),
        (["migrate", "a", "b", "--memory", "c"], "not two files"),
        (["migrate", "a", "--to", "b", "--memory", "c@1"], "address of a page"),
        (["receive", "a", "--memory-pipes", "1"], "--listen for more"),
        (["receive", "a", "--listen", "b:1"], "with certificates only"),
        (["receive", "a", "--memory", "c@x"], "no address"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str) -> None:
    with pytest.raises((UsageError, click.UsageError)) as caught:
        cli(arguments, standalone_mode=False)
    assert reason in getattr(caught.value, "message", str(caught.value))


WITHOUT_ZSTD = "import sys; sys.modules['zstandard'] = None; from vfio_user.cli.main import main; main()"


def test_compression_where_a_side_has_none(pair: tuple[Served, Served]) -> None:
    without = [sys.executable, "-c", WITHOUT_ZSTD]
    receiver = shlex.join([*without, "receive", str(pair[1].path)])
    command = [*without, "migrate", str(pair[0].path), "--compress", "--exec", receiver]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"compression 'zstd' is not installed: pip install 'vfio-user[zstd]'" in done.stderr
    assert run(*command[3:]).returncode == 0
    expect_moved(*pair)
