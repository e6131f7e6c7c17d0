"""migrate --exec 'ssh ...', for real: with an sshd of this test's own, which ssh starts and talks to through a pipe."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import subprocess
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

pytestmark = pytest.mark.timeout(120)

MEMORY = 4 << 20
SSHD_CONFIG = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PermitRootLogin yes
"""
SSH_CONFIG = """\
Host host2
    User {user}
    IdentityFile {folder}/user
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
    BatchMode yes
    ProxyCommand sh -c 'echo $$ > {folder}/pid; exec {sshd} -i -f {folder}/sshd_config 2> {folder}/log'
"""


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that runs another on "another host"; beside its configuration is ``pid``, sshd's."""
    folder = tmp_path_factory.mktemp("ssh")
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no ssh and sshd")
    for name in ("host", "user"):
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(make_key, check=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "config").write_text(SSH_CONFIG.format(folder=folder, sshd=sshd, user=getpass.getuser()))
    command = ["ssh", "-F", str(folder / "config"), "host2"]
    if subprocess.run([*command, "true"], capture_output=True, timeout=TIMEOUT).returncode != 0:
        pytest.skip(f"sshd does not let us in: {(folder / 'log').read_text().strip()}")
    return command


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def pair(serve: Serve) -> tuple[Served, Served]:
    return served_pair(serve)


def receiving_there(ssh: list[str], destination: Served, *arguments: str | Path) -> str:
    """What is written after --exec."""
    receive = shlex.join([*COMMAND, "receive", str(destination.path), *map(str, arguments)])
    return shlex.join([*ssh, f"PYTHONPATH={os.environ.get('PYTHONPATH', '')} {receive}"])


def test_a_device_and_its_memory_go_through_ssh(ssh: list[str], pair: tuple[Served, Served], tmp_path: Path) -> None:
    here, there = tmp_path / "memory-here", tmp_path / "memory-there"
    here.write_bytes(os.urandom(MEMORY))
    there.write_bytes(bytes(MEMORY))
    command = receiving_there(ssh, pair[1], "--memory", there)
    done = run("migrate", pair[0].path, "--exec", command, "--memory", here, "--compress", "--downtime", "9999")
    assert (done.returncode, b"completed" in done.stdout) == (0, True), done
    expect_moved(*pair)
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize("what", ["Ctrl-C", "sshd is killed"])
def test_what_ends_it_midway_undoes_it(ssh: list[str], pair: tuple[Served, Served], what: str) -> None:
    command = receiving_there(ssh, pair[1])
    with started("migrate", pair[0].path, "--exec", command, "--bandwidth", "1", "--force") as process:
        pair[1].wait_for("migration_write_data")
        if what == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(int(Path(ssh[2]).with_name("pid").read_text()), signal.SIGKILL)
        _, told = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 1
        assert "failed at stop-and-copy: the source is as it was" in told.splitlines()[-1]
    pair[1].wait_for("reset")
    expect_as_before(*pair)
