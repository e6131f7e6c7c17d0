"""What the tests of devices share: a device served in a thread, eventfds and guest memory that are cleaned up."""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vfio_user import Client, Server, ServerBackend

TIMEOUT = 10.0


@contextlib.contextmanager
def serving(backend: ServerBackend, **options: Any) -> Iterator[Path]:
    """``backend`` served by a thread; the path of its socket."""
    with tempfile.TemporaryDirectory() as folder, Server(backend, Path(folder) / "s", **options) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Path(folder) / "s"
        finally:
            server.shutdown()
            thread.join(TIMEOUT)
            assert not thread.is_alive()


@contextlib.contextmanager
def attached(backend: ServerBackend, **options: Any) -> Iterator[Client]:
    """A client of ``backend``."""
    with serving(backend, **options) as path, Client.connect(path, TIMEOUT) as client:
        yield client


class Event:
    """An eventfd."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def take(self) -> int:
        """The signals since the last call."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def wait(self) -> int:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        assert poll.poll(TIMEOUT * 1000), "no signal in time"
        return self.take()

    def signal(self) -> None:
        os.eventfd_write(self.fd, 1)


@contextlib.contextmanager
def events(count: int) -> Iterator[list[Event]]:
    made = [Event() for _ in range(count)]
    try:
        yield made
    finally:
        for event in made:
            os.close(event.fd)


@contextlib.contextmanager
def guest_memory(size: int) -> Iterator[int]:
    """A memfd of ``size`` bytes."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)
