"""migrate --exec 'ssh ...', for real: with an sshd of this test's own, which ssh starts and talks to through a pipe."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cli_migrate_support import (
    COMMAND,
    TIMEOUT,
    Serve,
    Served,
    expect_as_before,
    expect_moved,
    run,
    served_pair,
    serving,
    started,
)
from .ssh_support import OtherHost, other_host

pytestmark = pytest.mark.timeout(120)

MEMORY = 4 << 20


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> OtherHost:
    return other_host(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def pair(serve: Serve) -> tuple[Served, Served]:
    return served_pair(serve)


def receiving_there(ssh: OtherHost, destination: Served, *arguments: str | Path) -> str:
    """What is written after --exec."""
    receive = shlex.join([*COMMAND, "receive", str(destination.path), *map(str, arguments)])
    return shlex.join([*ssh.command, f"PYTHONPATH={os.environ.get('PYTHONPATH', '')} {receive}"])


def test_a_device_and_its_memory_go_through_ssh(ssh: OtherHost, pair: tuple[Served, Served], tmp_path: Path) -> None:
    here, there = tmp_path / "memory-here", tmp_path / "memory-there"
    here.write_bytes(os.urandom(MEMORY))
    there.write_bytes(bytes(MEMORY))
    command = receiving_there(ssh, pair[1], "--memory", there)
    done = run("migrate", pair[0].path, "--exec", command, "--memory", here, "--compress", "--downtime", "9999")
    assert (done.returncode, b"completed" in done.stdout) == (0, True), done
    expect_moved(*pair)
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize("what", ["Ctrl-C", "sshd is killed"])
def test_what_ends_it_midway_undoes_it(ssh: OtherHost, pair: tuple[Served, Served], what: str) -> None:
    command = receiving_there(ssh, pair[1])
    with started("migrate", pair[0].path, "--exec", command, "--bandwidth", "1", "--force") as process:
        pair[1].wait_for("migration_write_data")
        if what == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            ssh.cut()
        _, told = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 1
        assert "failed at stop-and-copy: the source is as it was" in told.splitlines()[-1]
    pair[1].wait_for("reset")
    expect_as_before(*pair)
