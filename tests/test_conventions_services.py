"""``vfio-user serve`` under a service manager: sockets that it opened, and what it is told; as systemd does both."""

from __future__ import annotations

import configparser
import fcntl
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import Client
from vfio_user.errors import UsageError
from vfio_user.testing import no_fd_leaks
from vfio_user.tools.activation import inherited_sockets, placed
from vfio_user.tools.notify import READY, STOPPING, Notifier
from vfio_user.tools.serving import DeviceSpec

COMMAND = [sys.executable, "-m", "vfio_user"]
UNITS = Path(__file__).parent.parent / "src/vfio_user/share/systemd"
TIMEOUT = 30.0
EDU_ID, GPIO_VENDOR = b"\xed\x00\x00\x01", b"\x4f\x49"


@contextmanager
def activated(
    command: Sequence[object], sockets: Sequence[socket.socket] = (), **env: str
) -> Iterator[subprocess.Popen[str]]:
    """A command that a service manager has started, with ``sockets`` from descriptor 3 on; killed at the end."""
    copies = " ".join(f"{number}<&{sock.fileno()}" for number, sock in enumerate(sockets, 3))
    process = subprocess.Popen(
        ["bash", "-c", f'LISTEN_PID=${{LISTEN_PID-$$}} exec "$@" {copies}', "bash", *map(str, command)],
        env={**os.environ, "LISTEN_FDS": str(len(sockets)), **env} if sockets else {**os.environ, **env},
        pass_fds=[sock.fileno() for sock in sockets],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def listening(*paths: Path) -> Iterator[list[socket.socket]]:
    """Sockets above the numbers that are given to the command, so that none is overwritten before it is copied."""
    with ExitStack() as stack:
        sockets = []
        for path in paths:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as low:
                high = stack.enter_context(socket.socket(fileno=fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10)))
            high.bind(str(path))
            high.listen()
            sockets.append(high)
        yield sockets


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """The socket at which a service manager hears how its services are."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1))
        sock.settimeout(TIMEOUT)
        yield sock


# Sockets that were passed


def test_devices_take_the_sockets_that_were_passed(tmp_path: Path) -> None:
    edu_path, gpio_path = tmp_path / "edu", tmp_path / "gpio"
    command = [*COMMAND, "serve", "edu", "--", "gpio"]
    with listening(edu_path, gpio_path) as sockets, activated(command, sockets) as process:
        with Client.connect(edu_path, TIMEOUT) as edu, Client.connect(gpio_path, TIMEOUT) as gpio:
            assert edu.region_read(0, 0, 4) == EDU_ID
            assert gpio.region_read(7, 0, 2) == GPIO_VENDOR
        with Client.connect(edu_path, TIMEOUT) as edu:
            assert edu.region_read(0, 0, 4) == EDU_ID
        process.terminate()
        assert process.communicate(timeout=TIMEOUT) == ("", "")
        assert process.returncode == 0
    assert edu_path.is_socket(), "it is the service manager's"


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="no systemd-socket-activate")
def test_systemd_passes_its_sockets(tmp_path: Path) -> None:
    edu_path, gpio_path = tmp_path / "edu", tmp_path / "gpio"
    sockets = [f"--listen={path}" for path in (edu_path, gpio_path)]
    names = "--fdname=one:two"
    with activated(["systemd-socket-activate", *sockets, names, *COMMAND, "serve", "edu", "--", "gpio"]) as process:
        assert process.stderr is not None
        assert [process.stderr.readline().split()[0] for _ in sockets] == ["Listening", "Listening"]
        with Client.connect(gpio_path, TIMEOUT) as gpio, Client.connect(edu_path, TIMEOUT) as edu:
            assert edu.region_read(0, 0, 4) == EDU_ID
            assert gpio.region_read(7, 0, 2) == GPIO_VENDOR
        process.terminate()
        assert process.wait(TIMEOUT) == 0


def test_a_connection_is_served_to_its_end() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)  # as systemd leaves it
    with theirs, activated([*COMMAND, "serve", "edu"], [theirs]) as process:
        theirs.close()
        with Client(ours, TIMEOUT) as client:
            assert client.region_read(0, 0, 4) == EDU_ID
        assert process.wait(TIMEOUT) == 0


def test_what_is_run_along_has_no_part_in_it(tmp_path: Path) -> None:
    command = [*COMMAND, "serve", "edu", "--run", "ls -l /proc/$$/fd; env"]
    with listening(tmp_path / "edu") as sockets:
        with activated(command, sockets, NOTIFY_SOCKET="/nowhere/notify") as process:
            output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0
    assert "PATH=" in output
    assert not re.search("LISTEN_|NOTIFY_SOCKET", output)
    assert "socket:" not in output


@pytest.mark.parametrize(
    ("devices", "env", "reason"),
    [
        (["edu"], {"LISTEN_FDS": "2"}, "descriptor 4: Bad file descriptor"),
        (["edu"], {"LISTEN_FDS": "many"}, "LISTEN_FDS='many' in the environment is no number from 1 on"),
        (["edu"], {"LISTEN_FDS": "9" * 50}, f"LISTEN_FDS='{'9' * 40}' in the environment is no number from 1 on"),
        (["edu"], {"LISTEN_PID": "me"}, "LISTEN_PID='me' in the environment is no number from 1 on"),
        (["edu"], {"LISTEN_PID": "1"}, "edu needs one of --socket-path and --fd (or --run)"),
        (["edu", "--", "gpio"], {}, "device 2: gpio needs one of --socket-path and --fd (or --run)"),
        (["edu", "--socket-path", "x"], {}, "1 sockets were passed for 0 devices without --socket-path and --fd"),
    ],
)
def test_what_no_service_manager_passes_is_refused(
    devices: list[str], env: dict[str, str], reason: str, tmp_path: Path
) -> None:
    with listening(tmp_path / "a") as sockets, activated([*COMMAND, "serve", *devices], sockets, **env) as process:
        output, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("vfio-user: ")
    assert reason in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("kind", ["file", "datagram", "tcp"])
def test_a_descriptor_that_is_no_stream_socket_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        no_fd_leaks(),
        open(os.devnull) as file,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        socket.socket(socket.AF_INET) as tcp,
    ):
        number = {"file": file.fileno(), "datagram": datagram.fileno(), "tcp": tcp.fileno()}[kind]
        monkeypatch.setattr("vfio_user.tools.activation.FIRST", number)
        environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
        with pytest.raises(UsageError, match=rf"LISTEN_FDS in the environment: descriptor {number}\b.*ocket"):
            inherited_sockets(environ)
        os.fstat(number)  # whoever passed it may close it
        assert environ == {}


@given(st.dictionaries(st.sampled_from(["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"]), st.text(max_size=12)))
def test_whatever_is_in_the_environment_is_taken_or_refused(environ: dict[str, str]) -> None:
    with suppress(UsageError):
        assert inherited_sockets(environ) == []
    assert environ == {}


def test_sockets_go_to_those_without_a_place_in_order() -> None:
    a, b, c = DeviceSpec("edu"), DeviceSpec("edu", fd=4), DeviceSpec("edu")
    assert [spec.fd for spec in placed([a, b, c], [3, 4, 5])] == [3, 4, 5]
    assert [spec.fd for spec in placed([a, b, c], [3])] == [3, 4, None]
    with pytest.raises(UsageError, match="3 sockets were passed for 2 devices"):
        placed([a, b, c], [3, 5, 6])


# What the service manager is told


@pytest.mark.parametrize("abstract", [False, True])
def test_it_says_when_it_serves_and_when_it_ends(tmp_path: Path, abstract: bool) -> None:
    address = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    path = tmp_path / "edu"
    command = [*COMMAND, "serve", "edu", "--socket-path", path]
    with manager(address) as heard, activated(command, NOTIFY_SOCKET=address) as process:
        assert heard.recv(4096).decode().splitlines() == [READY, f"STATUS=Serving edu at {path}"]
        with Client.connect(path, TIMEOUT) as client:
            assert client.region_read(0, 0, 4) == EDU_ID
            process.terminate()
            assert heard.recv(4096).decode() == STOPPING
        assert process.wait(TIMEOUT) == 0
        heard.setblocking(False)
        with pytest.raises(BlockingIOError):
            heard.recv(4096)


def test_a_manager_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "edu"
    command = [*COMMAND, "serve", "edu", "--socket-path", path, "--run", "true"]
    with activated(command, NOTIFY_SOCKET=str(tmp_path / "gone")) as process:
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    lines = errors.splitlines()
    assert [re.sub(".*: (READY|STOPPING).*", r"\1", line) for line in lines] == ["READY", "STOPPING"]
    assert all(line.startswith(f"WARNING vfio_user.tools: NOTIFY_SOCKET={tmp_path}/gone: ") for line in lines)


@pytest.mark.parametrize("address", ["vsock:2:1234", "relative", "/with\0zero", "/" + "long" * 50, "@"])
def test_an_address_that_is_none_is_a_warning(address: str, caplog: pytest.LogCaptureFixture) -> None:
    Notifier(address)(READY)
    assert [(record.levelno, record.name) for record in caplog.records] == [(logging.WARNING, "vfio_user.tools")]


def test_a_manager_that_does_not_listen_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vfio_user.tools.notify.PATIENCE", 0.01)
    with manager(str(tmp_path / "notify")):
        notify = Notifier(str(tmp_path / "notify"))
        for _ in range(1000):  # more than a socket keeps
            notify(READY)
            if caplog.records:
                break
    assert "could not be told: timed out" in caplog.text


def test_a_state_is_one_line(tmp_path: Path) -> None:
    with manager(str(tmp_path / "notify")) as heard:
        Notifier(str(tmp_path / "notify"))(READY, "STATUS=of a path\nMAINPID=1")
        assert heard.recv(4096) == b"READY=1\nSTATUS=of a path MAINPID=1"


def test_without_a_manager_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    Notifier.of_environment({})(READY)
    Notifier.of_environment({"NOTIFY_SOCKET": ""})(READY)
    assert not caplog.records


# The units


def unit(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(delimiters="=", strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # as typeshed has it, it cannot be
    parser.read(UNITS / name)
    return parser


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for path in UNITS.iterdir():
        text = path.read_text().replace("/usr/bin/vfio-user", sys.executable)
        (tmp_path / path.name.replace("@.", "@edu.")).write_text(text)
    units = sorted(tmp_path.iterdir())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if "Failed to" in done.stderr and "manager" in done.stderr:
        pytest.skip(f"systemd-analyze cannot run here: {done.stderr}")
    assert (len(units), done.stderr) == (2, "")


def test_what_the_units_say_works(tmp_path: Path) -> None:
    service, sock = unit("vfio-user@.service")["Service"], unit("vfio-user@.socket")["Socket"]
    path = Path(sock["ListenStream"].replace("%t", str(tmp_path)).replace("%i", "edu"))
    path.parent.mkdir()
    device = service["Environment"].removeprefix("DEVICE=").replace("%i", "edu")
    words = [{"$DEVICE": device, "$OPTIONS": ""}.get(word, word) for word in shlex.split(service["ExecStart"])]
    assert words[0] == "/usr/bin/vfio-user"
    command = [*COMMAND, *filter(None, words[1:])]
    notify = str(tmp_path / "notify")
    with (
        manager(notify) as heard,
        listening(path) as sockets,
        activated(command, sockets, NOTIFY_SOCKET=notify) as process,
    ):
        assert service["Type"] == "notify"
        assert heard.recv(4096).decode().startswith(READY)
        with Client.connect(path, TIMEOUT) as client:
            assert client.region_read(0, 0, 4) == EDU_ID
        process.terminate()
        assert heard.recv(4096).decode() == STOPPING
        assert process.wait(TIMEOUT) == 0
