"""Fixtures for tests of devices, servers and clients: docs/testing.md.

pytest loads this by an entry point wherever the package is installed, also for tests that have nothing to do with it:
so whatever a fixture needs is imported when it is used, and names begin with ``vfio_user_``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vfio_user.client import Client
    from vfio_user.server import ServerBackend
    from vfio_user.testing.guest import FakeGuest
    from vfio_user.testing.interrupts import AssignedInterrupts
    from vfio_user.testing.qtest import QtestMachine
    from vfio_user.testing.served import ServedDevice

TIMEOUT = 10.0
"""Seconds, for every call and every wait, unless something else is asked for."""


@pytest.fixture
def vfio_user_fd_leak_check() -> Iterator[None]:
    """Fail when the test leaves file descriptors open. Ask for it before the fixtures that open some."""
    from vfio_user.testing.leaks import no_fd_leaks

    with no_fd_leaks():
        yield


@pytest.fixture
def vfio_user_guest() -> Iterator[Callable[..., FakeGuest]]:
    """A function that plugs a device into a new FakeGuest; parameters are FakeGuest's.

    The guests are closed after the test, the last one first.
    """
    from vfio_user.testing.guest import FakeGuest

    with ExitStack() as guests:
        yield lambda device, **options: guests.enter_context(FakeGuest(device, **options))


@pytest.fixture
def vfio_user_server() -> Iterator[Callable[..., ServedDevice]]:
    """A function that serves a device behind a UNIX socket of its own, whose ``path`` it has; options as of Server.

    What went wrong in the server's thread fails the test when it ends.
    """
    from vfio_user.testing.served import ServedDevice

    with ExitStack() as servers:
        yield lambda device, **options: servers.enter_context(ServedDevice(device, **options))


@pytest.fixture
def vfio_user_client(vfio_user_server: Callable[..., ServedDevice]) -> Iterator[Callable[..., Client]]:
    """A function that connects a Client to what ``vfio_user_server`` gave, or to a path; options as of Client.

    The clients leave after the test, before the servers stop.
    """
    from vfio_user.client import Client

    with ExitStack() as clients:

        def connect(server: ServedDevice | str | os.PathLike[str], timeout: float = TIMEOUT, **options: Any) -> Client:
            path = server if isinstance(server, str | os.PathLike) else server.path
            return clients.enter_context(Client.connect(path, timeout, **options))

        yield connect


@pytest.fixture
def vfio_user_memory() -> Callable[..., memoryview]:
    """A function that gives a Client's device memory for its DMA, by default 1 MiB from address 0 on.

    Parameters: the client, ``size`` and ``address`` in bytes, ``shared=False`` for DMA by messages.
    """
    from vfio_user.testing.guest import map_memory

    return map_memory


@pytest.fixture
def vfio_user_interrupts(
    vfio_user_client: Callable[..., Client],
) -> Iterator[Callable[..., AssignedInterrupts]]:
    """A function that listens to the vectors of an interrupt index (PciIrq) of a Client's device.

    What it gives has ``take()``, what was signalled by vector, and ``wait(vector)``.
    """
    from vfio_user.testing.interrupts import AssignedInterrupts

    with ExitStack() as assigned:

        def listen(client: Client, index: int, count: int | None = None) -> AssignedInterrupts:
            interrupts = AssignedInterrupts(client, index, count, timeout=TIMEOUT)
            assigned.callback(interrupts.forget)  # the client may have left
            return interrupts

        yield listen


@pytest.fixture(scope="session")
def vfio_user_qemu_path() -> Path:
    """A QEMU with vfio-user-pci. Without one the test is skipped; with VFIO_USER_REQUIRE_QEMU=1 it fails."""
    from vfio_user.testing.qemu import QemuError, find_qemu

    try:
        found, reason = find_qemu(), "no QEMU with vfio-user-pci: put one on PATH or into VFIO_USER_QEMU"
    except QemuError as error:
        found, reason = None, str(error)
    if found is None:
        (pytest.fail if os.environ.get("VFIO_USER_REQUIRE_QEMU") == "1" else pytest.skip)(reason)
    return found


@pytest.fixture
def vfio_user_qemu(
    vfio_user_qemu_path: Path, vfio_user_server: Callable[..., ServedDevice]
) -> Iterator[Callable[..., QtestMachine]]:
    """A function that plugs devices into a QEMU without a guest, a QtestMachine; options are that one's.

    The n-th device is at ``devfns[n]``. The machines end before the devices' servers do.
    """
    from vfio_user.testing.qtest import QtestMachine

    with ExitStack() as machines:

        def plug(*devices: ServerBackend, **options: Any) -> QtestMachine:
            paths = [vfio_user_server(device).path for device in devices]
            return machines.enter_context(closing(QtestMachine(vfio_user_qemu_path, paths, **options)))

        yield plug


fake_guest, fd_leak_check = vfio_user_guest, vfio_user_fd_leak_check
