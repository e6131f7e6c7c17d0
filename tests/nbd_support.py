"""NBD servers for the tests: found, or skipped where they may be missing; ended after a test."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from vfio_user.devices.nvme.storage import libnbd

HOME = Path(__file__).resolve().parent.parent / ".qemu"
TIMEOUT = 20.0


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where CI is to run it."""
    required = os.environ.get("CI") == "true"
    (pytest.fail if required else pytest.skip)(f"no {what}: run scripts/fetch_nbd.py")


def program(name: str) -> Path:
    """qemu-nbd, qemu-img or nbdkit: the fetched one, else one on PATH."""
    if (HOME / name).exists():
        return HOME / name
    return Path(shutil.which(name) or missing(name))


def nbdkit_module(kind: str, name: str) -> Path | str:
    """A plugin or filter of the nbdkit that :func:`program` finds; by its name where that one knows its own."""
    return next(HOME.glob(f"nbd/usr/lib/*/nbdkit/{kind}s/nbdkit-{name}-{kind}.so"), name)


def load_libnbd() -> None:
    """Have libnbd in this process: the machine's own, or the fetched one, with what it needs and the machine lacks."""
    try:
        ctypes.CDLL(libnbd.LIBRARY)
    except OSError:
        fetched = next(HOME.glob(f"libnbd/usr/lib/*/{libnbd.LIBRARY}"), None)
        _load(fetched or missing("libnbd"))


def library_path() -> dict[str, str]:
    """What a process's environment needs in addition, to find libnbd."""
    return {"LD_LIBRARY_PATH": str(next(HOME.glob("libnbd/usr/lib/*-linux-*"), ""))}


def _load(library: Path) -> None:
    # A library that is in the process already is not looked for elsewhere.
    for _ in range(50):
        try:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            lacking = library.parent / str(error).partition(":")[0]
            if lacking == library or not lacking.exists():
                raise
            _load(lacking)
        else:
            return


class NbdServer:
    """A server that listens on a UNIX socket; :meth:`start` and :meth:`end` it as often as wanted."""

    def __init__(self, command: list[str | Path], path: Path) -> None:
        self._command = command
        self.path = path
        self.start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        before = self._listening()
        self.process = subprocess.Popen(self._command)
        deadline = time.monotonic() + TIMEOUT
        while self._listening() == before:
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.01)

    def _listening(self) -> int:
        """How many servers take, or took, connections at the path: looked up, for one that is made would count."""
        listening = " ".join(("00010000", "0001", "01"))  # flags __SO_ACCEPTCON, SOCK_STREAM, unconnected
        lines = Path("/proc/net/unix").read_text().splitlines()
        return sum(listening in line and line.endswith(str(self.path)) for line in lines)

    def end(self) -> None:
        """At once, as in a power cut."""
        self.process.kill()
        self.process.wait(TIMEOUT)

    def stand_in(self) -> NbdServer:
        """Another such server, at the path of this one, which is not ended."""
        return NbdServer(self._command, self.path)

    def stop_answering(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class Servers:
    """Starts servers in a folder; they end with the test."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack

    def nbdkit(
        self, plugin: str, *arguments: str | Path, filters: Sequence[str] = (), options: Sequence[str] = ()
    ) -> NbdServer:
        chosen = [f"--filter={nbdkit_module('filter', name)}" for name in filters]
        path = self._path()
        command = [program("nbdkit"), "-f", "-U", path, *options, *chosen, nbdkit_module("plugin", plugin), *arguments]
        return self._started(command, path)

    def qemu_nbd(self, image: Path, *options: str, persistent: bool = True) -> NbdServer:
        path = self._path()
        lasting = ["--persistent"] if persistent else []
        return self._started([program("qemu-nbd"), *lasting, "-k", path, *options, image], path)

    def stand_in(self, server: NbdServer) -> NbdServer:
        """Another one, that has the address of ``server`` now: who has connections to that does not notice."""
        other = server.stand_in()
        self._stack.callback(other.end)
        return other

    def _path(self) -> Path:
        return self._folder / f"{len(os.listdir(self._folder))}.sock"

    def _started(self, command: list[str | Path], path: Path) -> NbdServer:
        server = NbdServer(command, path)
        self._stack.callback(server.end)
        return server


def garbage_server(path: Path) -> socket.socket:
    """A socket that takes connections, and knows no NBD."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    return listening
