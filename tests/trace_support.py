"""What the tests of trace and replay share: a proxy between two sockets, observers, messages."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vfio_user import ServerBackend
from vfio_user.tools.trace import Observer, Place, Proxy, Seen, SeenFd, connect, listen
from vfio_user.wire.commands import Role
from vfio_user.wire.messages import Header

from .device_support import serving

TIMEOUT = 10.0
VECTORS = Path(__file__).parent / "data" / "rust-vfio-user.jsonl"
CLIENT, SERVER = Place(1, False, Role.CLIENT), Place(1, False, Role.SERVER)


class Recorder(Observer):
    """Keeps what it is told; ``changed`` is notified of it."""

    def __init__(self) -> None:
        self.messages: list[Seen] = []
        self.unclear_places: list[tuple[Place, str]] = []
        self.connections: list[int] = []
        self.ended: list[int] = []
        self._changed = threading.Condition()

    def _note(self, kept: list[Any], what: object) -> None:
        with self._changed:
            kept.append(what)
            self._changed.notify_all()

    def connected(self, connection: int) -> None:
        self._note(self.connections, connection)

    def seen(self, message: Seen) -> None:
        self._note(self.messages, message.kept(1 << 30))

    def unclear(self, place: Place, reason: str) -> None:
        self._note(self.unclear_places, (place, reason))

    def left(self, connection: int) -> None:
        self._note(self.ended, connection)

    def wait_for(self, kept: list[Any], count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(kept) >= count, TIMEOUT), kept


def seen(
    payload: bytes = b"",
    *,
    command: int = 9,
    msg_id: int = 1,
    flags: int = 0,
    error: int = 0,
    place: Place = CLIENT,
    fds: tuple[SeenFd, ...] = (),
    time: int = 1_000_000_000,
) -> Seen:
    return Seen(time, place, Header(msg_id, command, 16 + len(payload), flags, error), payload, fds)


@contextlib.contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """Serves in a thread; in the end it is stopped, and must not have raised."""
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            proxy.serve()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=serve, name="proxy")
    with proxy:
        thread.start()
        try:
            yield proxy
        finally:
            proxy.stop()
            thread.join(TIMEOUT)
            assert not thread.is_alive()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def between(observer: Observer) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's and a server's socket with a proxy between them."""
    client, from_client = socket.socketpair()
    server, to_server = socket.socketpair()
    proxy = Proxy(observer)
    proxy.join(from_client, to_server)
    with client, server, running(proxy):
        for sock in (client, server):
            sock.settimeout(TIMEOUT)
        yield client, server


@contextlib.contextmanager
def traced(backend: ServerBackend, folder: Path, observer: Observer) -> Iterator[Path]:
    """``backend`` behind a server behind a proxy; the path where clients come."""
    with serving(backend) as path:
        proxy = Proxy(observer, listen(folder / "trace"), lambda: connect(path))
        with running(proxy):
            yield folder / "trace"
