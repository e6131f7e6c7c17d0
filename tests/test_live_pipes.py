"""Byte pipes to other processes, and TLS."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

from vfio_user import DeviceState
from vfio_user.devices.edu import Edu
from vfio_user.errors import MigrationError, UsageError
from vfio_user.fds import OwnedFd
from vfio_user.live import Status
from vfio_user.live.pipes import FdPipe, Pipe, SocketPipe, TlsPipe
from vfio_user.live.remote import RemoteDestination

from .live_remote_support import (
    MEMORY,
    TIMEOUT,
    Guest,
    Receiver,
    expect_moved,
    expect_not_moved,
    fd_pipes,
    fill,
    guest,
    local,
    migration,
    socket_pipes,
    two_guests,
)
from .tls_support import make_certificates


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Guest, Guest]]:
    with two_guests(tmp_path) as both:
        yield both


# ---------------------------------------------------------------- another process


RECEIVE = """
import os, sys
from mmap import mmap
from vfio_user import Client
from vfio_user.live import LocalDestination, MemoryRegion
from vfio_user.live.pipes import FdPipe
from vfio_user.live.remote import receive

path, fd, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Client.connect(path, 10.0) as client:
    client.dma_map(0, size, fd)
    memory = memoryview(mmap(fd, size))
    arrival = receive(FdPipe.standard(), LocalDestination([client], [MemoryRegion(0, memory)]), timeout=10.0)
    print(arrival.confirmed, client.migration_get_state().name, file=sys.stderr)
    sys.stdin.close()
"""


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Starts a process that receives on its stdin and stdout, for a server here; gives it and its memory."""
    from vfio_user import Server

    with ExitStack() as stack:
        server = stack.enter_context(Server(Edu(), tmp_path / "remote"))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stack.callback(thread.join, TIMEOUT)
        stack.callback(server.shutdown)
        fd = stack.enter_context(OwnedFd(os.memfd_create("remote")))
        os.ftruncate(fd.fileno(), MEMORY)

        def start() -> tuple[subprocess.Popen[bytes], FdPipe, memoryview]:
            process = subprocess.Popen(
                [sys.executable, "-c", RECEIVE, tmp_path / "remote", str(fd.fileno()), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[fd.fileno()],
            )
            stack.callback(process.wait, TIMEOUT)
            stack.callback(process.kill)
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            stack.callback(process.stderr.close)
            pipe = FdPipe(OwnedFd.duplicate(process.stdout.fileno()), OwnedFd.duplicate(process.stdin.fileno()))
            process.stdin.close()
            process.stdout.close()
            stack.callback(pipe.close)
            return process, pipe, memoryview(mmap(fd.fileno(), MEMORY))

        yield start


def test_a_process_receives_on_its_standard_streams(tmp_path: Path, remote: Callable[[], Any]) -> None:
    with guest(tmp_path / "source") as source:
        fill(source)
        process, pipe, memory = remote()
        list(migration(source, RemoteDestination(pipe, timeout=TIMEOUT)).run())
        assert process.wait(TIMEOUT) == 0
        assert process.stderr.read() == b"True RUNNING\n"
        assert memory == source.memory
        assert source.state == DeviceState.STOP


@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGKILL, TIMEOUT), (signal.SIGSTOP, 0.5)])
def test_a_process_that_ends_or_stops_leaves_the_source_running(
    tmp_path: Path, remote: Callable[[], Any], number: int, timeout: float
) -> None:
    with guest(tmp_path / "source") as source:
        fill(source)
        process, pipe, _ = remote()
        to = RemoteDestination(pipe, timeout=TIMEOUT)
        job = migration(source, to, pause=lambda: process.send_signal(number))
        running = job.run()
        next(running)
        to._link._timeout = timeout  # the process takes its time to begin; from here on it does not
        with pytest.raises(MigrationError):
            list(running)
        assert job.report.status is Status.FAILED
        assert source.state == DeviceState.RUNNING
        assert source.liveness == 0x1234


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and self-signed certificates of two hosts, and of a stranger."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def context(certificates: Path, own: str, peer: str) -> ssl.SSLContext:
    purpose = ssl.Purpose.CLIENT_AUTH if own == "destination" else ssl.Purpose.SERVER_AUTH
    made = ssl.create_default_context(purpose, cafile=certificates / f"{peer}.crt")
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(certificates / f"{own}.crt", certificates / f"{own}.key")
    return made


def shake_hands(certificates: Path, client: str, *, trusting: Sequence[str] = ("source", "destination")) -> Any:
    """Both ends of a TLS connection; an end whose handshake failed is the exception."""
    here, there = socket.socketpair()
    ends: list[Any] = [None, None]

    def accept() -> None:
        there.settimeout(TIMEOUT)
        try:
            ends[1] = context(certificates, "destination", trusting[0]).wrap_socket(there, server_side=True)
        except OSError as error:
            ends[1] = error
            there.close()

    thread = threading.Thread(target=accept)
    thread.start()
    here.settimeout(TIMEOUT)
    try:
        ends[0] = context(certificates, client, trusting[1]).wrap_socket(here, server_hostname="destination")
    except OSError as error:
        ends[0] = error
        here.close()
    thread.join()
    return ends


def test_through_tls_with_both_certificates_checked(sides: tuple[Guest, Guest], certificates: Path) -> None:
    source, destination = sides
    fill(source)
    here, there = shake_hands(certificates, "source")
    with TlsPipe(here) as one, TlsPipe(there) as other:
        receiver = Receiver(other, local(destination))
        list(migration(source, RemoteDestination(one, timeout=TIMEOUT)).run())
        arrival = receiver.ended()
    assert arrival is not None
    assert arrival.confirmed
    expect_moved(source, destination)


@contextmanager
def tls_pipes(certificates: Path) -> Iterator[tuple[Pipe, Pipe]]:
    here, there = shake_hands(certificates, "source")
    with TlsPipe(here) as one, TlsPipe(there) as other:
        yield one, other


@pytest.mark.parametrize("kind", ["socket", "fds", "tls"])
def test_more_than_a_pipe_holds_goes_through_it(kind: str, request: pytest.FixtureRequest) -> None:
    data = os.urandom(16 << 20)
    with ExitStack() as stack:
        if kind == "tls":
            pipes: Any = tls_pipes(request.getfixturevalue("certificates"))
        else:
            pipes = {"socket": socket_pipes, "fds": fd_pipes}[kind]()
        one, other = stack.enter_context(pipes)
        deadline = time.monotonic() + 50
        got = bytearray()

        def take() -> None:
            space = memoryview(bytearray(1 << 16))
            while count := other.receive(space, deadline):
                got.extend(space[:count])

        thread = threading.Thread(target=take)
        thread.start()
        one.send([data[:100], data[100:5000], data[5000:]], deadline)
        assert one.sent == len(data)
        one.close()
        thread.join(50)
        assert got == data
        with pytest.raises(ConnectionError, match="the pipe is closed"):
            one.send([b"x"], deadline)
        with pytest.raises(ConnectionError, match="the pipe is closed"):
            one.receive(memoryview(bytearray(1)), deadline)


def test_a_pair_of_descriptors_is_left_as_it_was() -> None:
    with OwnedFd(os.open("/dev/null", os.O_RDONLY)) as reader, ExitStack() as stack:
        ends = [stack.enter_context(OwnedFd(fd)) for fd in os.pipe()]
        with FdPipe(OwnedFd.duplicate(reader.fileno()), OwnedFd.duplicate(ends[1].fileno())):
            assert not os.get_blocking(ends[1].fileno())
        assert os.get_blocking(ends[1].fileno())


def test_a_stranger_is_not_let_in(sides: tuple[Guest, Guest], certificates: Path) -> None:
    source, destination = sides
    fill(source)
    here, there = shake_hands(certificates, "stranger")
    assert isinstance(there, ssl.SSLError)
    if not isinstance(here, Exception):  # in TLS 1.3 a client learns of it when it reads
        with TlsPipe(here) as pipe, pytest.raises(MigrationError, match="check failed"):
            list(migration(source, RemoteDestination(pipe, timeout=TIMEOUT)).run())
    expect_not_moved(source, destination)
    here, there = shake_hands(certificates, "source", trusting=("source", "stranger"))
    assert isinstance(here, ssl.SSLError)
    if not isinstance(there, Exception):
        there.close()


def test_tls_without_a_checked_certificate_is_refused() -> None:
    unchecked = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    here, there = socket.socketpair()
    with here, there:
        with (
            unchecked.wrap_socket(here, server_side=True, do_handshake_on_connect=False) as sock,
            pytest.raises(UsageError, match="CERT_REQUIRED"),
        ):
            TlsPipe(sock)
        with (
            unchecked.wrap_socket(there, server_side=True, do_handshake_on_connect=False) as sock,
            pytest.raises(UsageError, match="needs a TlsPipe"),
        ):
            SocketPipe(sock)
