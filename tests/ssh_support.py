"""Another host, of which the tests make believe: an sshd of their own, which ssh starts and talks to through a pipe."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

TIMEOUT = 60
NAME = "hostB"
FETCHED = Path(__file__).resolve().parent.parent / ".qemu/sshd"
PLACES = ("/usr/sbin", "/usr/local/sbin")
SSHD_CONFIG = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
SSH_CONFIG = """\
Host {name}
    User {user}
    IdentityFile {folder}/user
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
    BatchMode yes
    ProxyCommand setsid sh -c 'echo $$ > {folder}/pid; exec {sshd} -i -f {folder}/sshd_config 2> {folder}/log'
"""


@dataclass(frozen=True)
class OtherHost:
    """``command`` runs another one there, or with ``-N`` none; ``folder`` has the configuration of both ends."""

    command: list[str]
    folder: Path

    @property
    def log(self) -> str:
        """What sshd said last."""
        return (self.folder / "log").read_text().strip()

    def cut(self) -> None:
        """The connection that was made last is gone, at the other end first."""
        os.killpg(int((self.folder / "pid").read_text()), signal.SIGKILL)


def other_host(folder: Path) -> OtherHost:
    """Make the keys, and see that it lets us in; the test is skipped where it cannot be."""
    sshd = str(FETCHED) if FETCHED.exists() else shutil.which("sshd", path=":".join((os.environ["PATH"], *PLACES)))
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no ssh and sshd: run scripts/fetch_qemu.py --sshd")
    for name in ("host", "user"):
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(make_key, check=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    config = folder / "config"
    config.write_text(SSH_CONFIG.format(name=NAME, folder=folder, sshd=sshd, user=getpass.getuser()))
    host = OtherHost(["ssh", "-F", str(config), NAME], folder)
    if subprocess.run([*host.command, "true"], capture_output=True, timeout=TIMEOUT).returncode != 0:
        pytest.skip(f"sshd does not let us in: {host.log}")
    return host
