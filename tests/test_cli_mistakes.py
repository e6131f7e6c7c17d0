"""What people type by mistake, and sockets that are not what they were taken for: a line that says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from vfio_user import Client
from vfio_user.cli.main import cli
from vfio_user.devices.edu import Edu
from vfio_user.testing.served import ServedDevice

from .cli_migrate_support import run

pytestmark = pytest.mark.timeout(60)

LIVENESS = 4


@pytest.fixture
def control(tmp_path: Path) -> Path:
    """The control socket of ``edu``."""
    return tmp_path / "control"


@pytest.fixture
def edu(control: Path) -> Iterator[Path]:
    """Where an edu is served."""
    with ServedDevice(Edu(), control=control) as served:
        yield served.path


def told(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str]:
    """The exit status, and the last line on stderr."""
    done = run(*arguments, stdin=stdin)
    *_, line = done.stderr.decode().splitlines()
    return done.returncode, line.removeprefix("vfio-user: ")


def test_what_a_control_socket_has_given_the_device_takes(edu: Path, control: Path, tmp_path: Path) -> None:
    """By the one its regions can be read only, by the other all is possible: it is the same device."""
    with Client.connect(edu) as client:
        client.region_write(0, LIVENESS, (1234).to_bytes(4, "little"))
        assert run("save", control, tmp_path / "saved").returncode == 0
        client.region_write(0, LIVENESS, bytes(4))
    assert run("restore", edu, tmp_path / "saved").returncode == 0
    with Client.connect(edu) as client:
        assert client.region_read(0, LIVENESS, 4) == (~1234 & 0xFFFF_FFFF).to_bytes(4, "little")


def test_a_server_that_serves_another(edu: Path) -> None:
    with Client.connect(edu):
        for command in ("info", "bench"):
            status, line = told(command, edu, "--timeout", "0.5")
            assert (status, line.startswith(f"{edu}: "), "does it serve another client?" in line) == (1, True, True)


@pytest.mark.parametrize(("command", "status"), [("exit 3", 3), ("head -c 1 >/dev/null; echo hello; exit 4", 4)])
def test_a_command_that_carries_nothing(edu: Path, command: str, status: int) -> None:
    found = told("migrate", edu, "--exec", command, "--timeout", "2")
    assert (found[0], f"the command ended with status {status}" in found[1]) == (1, True), found


def test_a_program_without_an_end(edu: Path) -> None:
    """It is read before a device is held for it, and not without bound."""
    with open("/dev/zero", "rb") as zeros:
        program = zeros.read((1 << 20) + 1)
    assert told("shell", "/nowhere", stdin=program) == (2, "a program of more than 1 MiB on standard input")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["read", "EDU", "bar0+0", "--device", "nosuch"], "no device 'nosuch'"),
        (["write", "EDU", "bar0+0=0", "--device", "nosuch"], "no device 'nosuch'"),
        (["serve", "edu", "--socket-path", "x", "--fd", "3"], "edu takes --socket-path or --fd, not both"),
        (["proxy", "a", "--socket-path", "./a", "--control", "b"], "UPSTREAM, --socket-path and --control are three"),
        (["proxy", "a", "--socket-path", "b", "--control", "b"], "UPSTREAM, --socket-path and --control are three"),
        (["guest", "--socket", "/nowhere", "true"], "/nowhere: no socket is there"),
    ],
)
def test_wrong_usage(edu: Path, arguments: list[str], line: str) -> None:
    status, found = told(*(edu if argument == "EDU" else argument for argument in arguments))
    assert (status, found.startswith(line)) == (2, True), found


@pytest.mark.parametrize(("command", "option"), [("check", "--junit"), ("bench", "--html")])
def test_a_report_that_could_not_be_written(command: str, option: str) -> None:
    """That is found out before anything is asked of anybody."""
    where = "/nowhere/report"
    assert told(command, "/nowhere/socket", option, where) == (1, f"{where}: No such file or directory")


@pytest.mark.parametrize("command", ["info FILE", "restore /nowhere FILE", "replay FILE /nowhere", "trace --read FILE"])
def test_what_may_not_be_read_is_no_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Whoever opens it says so, with exit status 1: root, whom nothing is forbidden, reads it here."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    done = CliRunner().invoke(cli, command.replace("FILE", str(secret)).split())
    assert done.exit_code == 1, done.output
