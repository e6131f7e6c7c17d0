"""A real QEMU for the tests: found, or skipped where it may be missing, and machines that are closed after a test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vfio_user.testing.qtest import QemuError, QtestMachine, find_qemu

MachineFactory = Callable[..., QtestMachine]


@pytest.fixture(scope="session")
def qemu() -> Path:
    """The path of a QEMU with vfio-user-pci. Without one the test is skipped; where CI is to run it, it fails."""
    try:
        found, reason = find_qemu(), "no QEMU with vfio-user-pci: run scripts/fetch_qemu.py"
    except QemuError as error:
        found, reason = None, str(error)
    if found is None:
        required = os.environ.get("CI") == "true" or os.environ.get("VFIO_USER_REQUIRE_QEMU") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    return found


@pytest.fixture
def machine(qemu: Path) -> Iterator[MachineFactory]:
    """Makes :class:`QtestMachine` objects, with its arguments but the first; they are closed when the test ends."""
    with contextlib.ExitStack() as machines:

        def start(devices: Sequence[Any] = (), **options: Any) -> QtestMachine:
            return machines.enter_context(QtestMachine(qemu, devices, **options))

        yield start
