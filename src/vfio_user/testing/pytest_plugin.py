"""Fixtures for tests of devices: ``pytest_plugins = ["vfio_user.testing.pytest_plugin"]``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vfio_user.server import ServerBackend
from vfio_user.testing.guest import FakeGuest
from vfio_user.testing.leaks import no_fd_leaks


@pytest.fixture
def fake_guest() -> Iterator[Callable[..., FakeGuest]]:
    """A function that plugs a device into a new FakeGuest; parameters are FakeGuest's.

    The guests are closed after the test, the last one first.
    """
    with contextlib.ExitStack() as guests:

        def plug(device: ServerBackend, **options: Any) -> FakeGuest:
            return guests.enter_context(FakeGuest(device, **options))

        yield plug


@pytest.fixture
def fd_leak_check() -> Iterator[None]:
    """Fail when the test leaves file descriptors open. Ask for it before the fixtures that open some."""
    with no_fd_leaks():
        yield
