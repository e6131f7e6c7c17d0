"""A real QEMU for the tests, and a Linux in it: found, or skipped where they may be missing; ended after a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from vfio_user import Server, ServerBackend
from vfio_user.testing.linux import Guest, LinuxMachine, find_guest
from vfio_user.testing.qemu import QemuError, find_qemu
from vfio_user.testing.qtest import QtestMachine
from vfio_user.testing.workbench import COMPILER, PROGRAMS, build

MachineFactory = Callable[..., QtestMachine]
LinuxFactory = Callable[..., LinuxMachine]
Compiler = Callable[[str], Path]
Serve = Callable[[ServerBackend], Path]

TIMEOUT = 10.0
OWN = Path(__file__).parent / "guest"


def _missing(reason: str) -> NoReturn:
    """Skip the test, or fail it where CI is to run it."""
    required = os.environ.get("CI") == "true" or os.environ.get("VFIO_USER_REQUIRE_QEMU") == "1"
    (pytest.fail if required else pytest.skip)(reason)


@pytest.fixture(scope="session")
def qemu() -> Path:
    """The path of a QEMU with vfio-user-pci. Without one the test is skipped; where CI is to run it, it fails."""
    try:
        return find_qemu() or _missing("no QEMU with vfio-user-pci: run scripts/fetch_qemu.py")
    except QemuError as error:
        _missing(str(error))


@pytest.fixture(scope="session")
def guest() -> Guest:
    """A Linux to run in it, as :func:`qemu`."""
    try:
        return find_guest() or _missing("no guest: run scripts/fetch_qemu.py --guest")
    except QemuError as error:
        _missing(str(error))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """Compiles a program for the guest, by its name without ``.c``: the package's, or one of ``tests/qemu/guest``."""
    folder = tmp_path_factory.mktemp("guest")

    def compile_(name: str) -> Path:
        program = folder / name
        if not program.exists():
            if shutil.which(COMPILER[0]) is None:
                _missing("no C compiler for the guest's programs")
            build(next(path for path in (PROGRAMS / f"{name}.c", OWN / f"{name}.c") if path.exists()), folder)
        return program

    return compile_


@pytest.fixture
def machine(qemu: Path) -> Iterator[MachineFactory]:
    """Makes :class:`QtestMachine` objects, with its arguments but the first; they are closed when the test ends."""
    with contextlib.ExitStack() as machines:

        def start(devices: Sequence[Any] = (), **options: Any) -> QtestMachine:
            return machines.enter_context(QtestMachine(qemu, devices, **options))

        yield start


# Linux

_running: list[LinuxMachine] = []
"""Whose consoles to show when a test fails."""


@contextlib.contextmanager
def linux_machines(qemu: Path, guest: Guest) -> Iterator[LinuxFactory]:
    with contextlib.ExitStack() as machines:

        def start(devices: Sequence[Any] = (), **options: Any) -> LinuxMachine:
            machine = machines.enter_context(LinuxMachine(qemu, guest, devices, **options))
            _running.append(machine)
            machines.callback(_running.remove, machine)
            return machine

        yield start


@pytest.fixture
def linux(qemu: Path, guest: Guest) -> Iterator[LinuxFactory]:
    """Boots :class:`LinuxMachine` objects, with its arguments but the first two; they end with the test."""
    with linux_machines(qemu, guest) as start:
        yield start


@pytest.fixture(scope="module")
def shared_linux(qemu: Path, guest: Guest) -> Iterator[LinuxFactory]:
    """The same for a machine that the tests of a module share."""
    with linux_machines(qemu, guest) as start:
        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the guests' consoles with the report of a test that failed, where the error has them not in it anyway."""
    report = yield
    if report.failed and call.excinfo is not None and not call.excinfo.errisinstance(QemuError):
        report.sections += [(f"End of the console of the guest in QEMU {m.pid}", m.console_tail) for m in _running]
    return report


# Devices


class ServedInThread:
    """A device behind a socket, served by a thread until it is stopped."""

    def __init__(self, device: ServerBackend, path: Path) -> None:
        self.path = path
        self._server = Server(device, path)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        self._server.close()


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[Callable[[ServerBackend], ServedInThread]]:
    """A function that serves a device from a socket in ``folder``; what it serves stops at the end.

    Enter it before the machines: QEMU must be gone before its servers stop.
    """
    with contextlib.ExitStack() as stack:

        def start(device: ServerBackend) -> ServedInThread:
            served = ServedInThread(device, folder / f"{len(os.listdir(folder))}.sock")
            stack.callback(served.stop)
            return served

        yield start


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Serve]:
    """The same, of which only the path is wanted."""
    with servers(folder) as start:
        yield lambda device: start(device).path
