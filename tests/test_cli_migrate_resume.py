"""A source whose migration ended nobody knows how, and what lets it run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user import Client, DeviceState

from .cli_migrate_support import (
    TIMEOUT,
    Serve,
    Served,
    child_of,
    complaint,
    expect_moved,
    expect_source_runs_on,
    receiving,
    served_pair,
    serving,
    started,
)

pytestmark = pytest.mark.timeout(120)


SLOW = """
import sys, time
from vfio_user import Bar, Device, DeviceState, MigrationFlags


class Slow(Device):
    vendor_id, device_id = 0x1234, 0x5678
    bars = {2: Bar(4096, memory=True)}
    migration = MigrationFlags.STOP_COPY

    def migration_set_state(self, state):
        print("asked to be", state.name, file=sys.stderr, flush=True)
        if state == DeviceState.RUNNING:
            time.sleep(1)
        super().migration_set_state(state)
"""
"""Says what it was asked to be, and takes its time to run."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def pair(serve: Serve) -> tuple[Served, Served]:
    return served_pair(serve)


def resume(*arguments: str | Path, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vfio_user", "resume", *map(str, arguments)]
    return subprocess.run(command, stdin=stdin, capture_output=True, timeout=TIMEOUT, check=False)


def put_into(served: Served, state: DeviceState) -> None:
    with Client.connect(served.path, TIMEOUT) as client:
        client.migration_set_state(state)


def test_a_source_whose_answer_was_lost_runs_again_when_it_is_told_to(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    source, destination = (serve(name, f"{tmp_path}/slow.py:Slow") for name in ("source", "destination"))
    source.mark()
    with started("migrate", source.path, "--exec", f"exec {receiving(destination)}", "--json") as process:
        destination.wait_for("asked to be RUNNING")
        os.kill(child_of(process), signal.SIGKILL)
        out, told = process.communicate(timeout=TIMEOUT)
    report = json.loads(out)
    assert (process.returncode, report["status"], report["failed_step"]) == (1, "unconfirmed", "start"), told
    line = told.splitlines()[-1]
    assert line.startswith("vfio-user: unconfirmed at start: the destination may run, the source stays stopped: ")
    assert line.endswith("; if it does not run, vfio-user resume lets SRC")
    assert source.state() != DeviceState.RUNNING
    assert destination.state() == DeviceState.RUNNING, "it was told to, so it does"
    destination.close()  # what somebody does who wants the source to go on
    assert resume(source.path, "--yes").returncode == 0
    expect_source_runs_on(source)


@pytest.mark.parametrize("state", [DeviceState.STOP, DeviceState.STOP_COPY, DeviceState.PRE_COPY])
def test_from_whatever_state_a_killed_migration_has_left(serve: Serve, state: DeviceState) -> None:
    source = serve("source", "edu")
    put_into(source, state)
    assert (done := resume(source.path, "--yes")).returncode == 0, done
    assert (done.stdout, done.stderr) == (b"", b"")
    assert source.state() == DeviceState.RUNNING


def test_a_moved_device_stays_stopped_until_somebody_is_sure(pair: tuple[Served, Served]) -> None:
    with started("migrate", pair[0].path, pair[1].path) as process:
        process.communicate(timeout=TIMEOUT)
    done = resume(pair[0].path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"vfio-user: only when you know that nothing runs at the other side" in done.stderr
    expect_moved(*pair)


@pytest.mark.parametrize(("answer", "state"), [(b"n\n", DeviceState.STOP), (b"y\n", DeviceState.RUNNING)])
def test_on_a_terminal_it_asks(serve: Serve, answer: bytes, state: DeviceState) -> None:
    source = serve("source", "edu")
    put_into(source, DeviceState.STOP)
    master, slave = os.openpty()
    with open(master, "r+b", buffering=0) as terminal, open(slave, "rb"):
        terminal.write(answer)
        done = resume(source.path, stdin=slave)
    assert b"nothing runs at the other side" in done.stdout
    assert done.returncode == (0 if state == DeviceState.RUNNING else 1)
    assert source.state() == state


def test_all_of_a_group_or_none(serve: Serve) -> None:
    stopped, running, half = (serve(name, "edu") for name in ("stopped", "running", "half"))
    put_into(stopped, DeviceState.STOP)
    put_into(half, DeviceState.RESUMING)
    assert "device 1 runs already" in complaint(resume(stopped.path, running.path, "--yes"))
    assert "device 1 has only a part of another one's state" in complaint(resume(stopped.path, half.path, "--yes"))
    assert stopped.state() == DeviceState.STOP
    assert half.state() == DeviceState.RESUMING
    assert resume(half.path, "--yes", "--reset").returncode == 0
    assert half.state() == DeviceState.RUNNING
    assert "No such file" in complaint(resume(stopped.path, "nobody", "--yes"))
    put_into(running, DeviceState.STOP)
    assert resume(stopped.path, running.path, "--yes").returncode == 0
    assert stopped.state() == running.state() == DeviceState.RUNNING
