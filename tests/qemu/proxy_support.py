"""Devices whose servers have no control socket, and proxies in front of them that have one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vfio_user import ServerBackend
from vfio_user.client.control import ControlClient
from vfio_user.testing.served import ServedDevice
from vfio_user.tools.proxy import ProxyBackend

from .migrate_support import TIMEOUT, Served


class Proxied(Served):
    """As :class:`Served`, of a device that is served elsewhere."""

    def __init__(self, device: ServerBackend, folder: Path, name: str) -> None:
        self.upstream = ServedDevice(device)
        self._backend = ProxyBackend(self.upstream.path)
        super().__init__(self._backend, folder, name)
        self.device = device

    def stop(self) -> None:
        super().stop()
        self._backend.close()
        self.upstream.stop()


class ProxiedByCommand:
    """The same by ``vfio-user proxy`` before ``vfio-user serve edu``, whatever ``device`` is."""

    def __init__(self, device: ServerBackend, folder: Path, name: str) -> None:
        self.path, self.control_path = folder / f"{name}.sock", folder / f"{name}.ctl"
        upstream = folder / f"{name}.up"
        self._server = _started("serve", "edu", "--socket-path", upstream)
        self._proxy = _started("proxy", upstream, "--socket-path", self.path, "--control", self.control_path)

    def control(self) -> ControlClient:
        return ControlClient.connect(self.control_path, TIMEOUT)

    def stop(self) -> None:
        for process in (self._proxy, self._server):
            process.terminate()
            _, said = process.communicate(timeout=TIMEOUT)
            assert (process.returncode, said) == (0, "")


def _started(*arguments: object) -> subprocess.Popen[str]:
    """A command that says something once it listens."""
    command = [sys.executable, "-m", "vfio_user", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process
