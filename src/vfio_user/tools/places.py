"""Where a receiver waits for a migration: a UNIX socket, or a host and a port, which is for TLS alone."""

from __future__ import annotations

import logging
import re
import select
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from vfio_user.errors import CallTimeoutError, UsageError
from vfio_user.transport.listener import BoundSocket

logger = logging.getLogger(__name__)

_HOST_AND_PORT = re.compile(r"(?:\[(?P<literal>[^]/]+)\]|(?P<host>[^:/]*)):(?P<port>\d{1,5})")
_BACKLOG = 128


class Place(Protocol):
    """A receiver listens there and accepts, a sender connects to it. Every call raises OSError."""

    def listen(self) -> socket.socket: ...

    def left(self) -> None:
        """Nobody listens any more."""

    def accept(self, listener: socket.socket, timeout: float) -> socket.socket:
        """The connection that is waiting there. ``timeout``: seconds in which it must say who it is."""

    def connect(self, timeout: float) -> socket.socket:
        """A connection to there, made in ``timeout`` seconds."""


@dataclass(frozen=True, slots=True)
class UnixPlace:
    """A socket in the file system, for this user alone: what connects to it is not asked who it is."""

    path: Path

    def listen(self) -> socket.socket:
        return BoundSocket(self.path, mode=0o600).socket

    def left(self) -> None:
        self.path.unlink(missing_ok=True)

    def accept(self, listener: socket.socket, timeout: float) -> socket.socket:
        return listener.accept()[0]

    def connect(self, timeout: float) -> socket.socket:
        with ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(timeout)
            sock.connect(str(self.path))
            stack.pop_all()
        return sock

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM format: what this side shows, the key to it, and who must have signed what the other side shows."""

    own: Path
    key: Path
    trusted: Path

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Both sides check each other. Raises OSError for a file that cannot be read, UsageError for what is in it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        for path in (self.own, self.key, self.trusted):
            path.open().close()  # what ssl says names no file
        try:
            context.load_cert_chain(self.own, self.key, password=_no_password)
            context.load_verify_locations(self.trusted)
        except ssl.SSLError as error:
            raise UsageError(
                f"{self.own}, {self.key}, {self.trusted}: no certificate, its key and who signs: {error.strerror}"
            ) from error
        return context


def _no_password() -> str:
    """OpenSSL would ask on the terminal, also where nobody sits."""
    raise UsageError("the key is encrypted: give one that is not, in a file that nobody else can read")


@dataclass(frozen=True, slots=True)
class TlsPlace:
    """A host's name or address, for which the receiver's certificate must be made, and a port."""

    host: str
    port: int
    certificates: Certificates

    def listen(self) -> socket.socket:
        self.certificates.context(server=True)  # what is wrong there is told now
        family, *_ = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)

    def left(self) -> None:
        """A port needs no tidying up."""

    def accept(self, listener: socket.socket, timeout: float) -> socket.socket:
        sock, _ = listener.accept()
        with ExitStack() as stack:
            stack.enter_context(sock)
            sock.settimeout(timeout)
            secure = self.certificates.context(server=True).wrap_socket(sock, server_side=True)
            stack.pop_all()
        return secure

    def connect(self, timeout: float) -> socket.socket:
        context = self.certificates.context(server=False)
        with ExitStack() as stack:
            sock = stack.enter_context(socket.create_connection((self.host, self.port), timeout))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            secure = context.wrap_socket(sock, server_hostname=self.host)
            stack.pop_all()
        return secure

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_place(text: str, certificates: Certificates | None = None) -> Place:
    """``HOST:PORT``, ``[ADDRESS]:PORT`` or the path of a UNIX socket. Raises UsageError."""
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None:
        if certificates is not None:
            raise UsageError(f"{text} is a UNIX socket, certificates are for HOST:PORT")
        return UnixPlace(Path(text))
    host = match["literal"] or match["host"]
    if not host:
        raise UsageError(f"{text}: a host is missing, 0.0.0.0 for any of this one")
    if certificates is None:
        raise UsageError(f"{text}: through a network it goes with certificates only: --cert, --key and --ca")
    if int(match["port"]) > 65535:
        raise UsageError(f"{text}: there is no such port")
    return TlsPlace(host, int(match["port"]), certificates)


class Listener:
    """Listens at a place, for one migration; a context manager."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._socket = place.listen()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._place.left()

    @property
    def name(self) -> str:
        """The place, with the port that the system has chosen where 0 was asked for."""
        if isinstance(self._place, TlsPlace):
            return str(replace(self._place, port=self._socket.getsockname()[1]))
        return str(self._place)

    def accept(self, count: int, timeout: float, patience: float) -> list[socket.socket]:
        """The connections of one migration, at most ``count``; the first is the one on which the source speaks first.

        Waits for one to come as long as it takes; from then on ``patience`` seconds for one to speak, and from then on
        ``timeout`` seconds for the others. Who does not say in ``timeout`` seconds who it is, or is not whom we trust,
        is sent away. Raises CallTimeoutError.
        """
        came: list[socket.socket] = []
        speaking: socket.socket | None = None
        deadline = float("inf")
        with ExitStack() as stack:
            while speaking is None or len(came) < count:
                listening = [self._socket] if len(came) < count else []
                for sock in _readable([*listening, *([] if speaking else came)], deadline):
                    if sock is not self._socket:
                        speaking, deadline = speaking or sock, time.monotonic() + timeout
                    elif (accepted := self._accept(timeout)) is not None:
                        came.append(stack.enter_context(accepted))
                        deadline = min(deadline, time.monotonic() + patience)
                if time.monotonic() >= deadline:
                    break
            if speaking is None:
                raise CallTimeoutError(f"{len(came)} connected, and nothing came from there: timed out")
            stack.pop_all()
        return sorted(came, key=lambda sock: sock is not speaking)

    def _accept(self, timeout: float) -> socket.socket | None:
        try:
            return self._place.accept(self._socket, timeout)
        except OSError as error:
            logger.warning("a connection was refused: %s", error.strerror or error)
            return None


def _readable(socks: Sequence[socket.socket], deadline: float) -> list[socket.socket]:
    """Those of ``socks`` from which something can be read; none at ``deadline``, by time.monotonic."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLIN)
    wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic()) * 1000
    ready = {fd for fd, _ in poll.poll(wait)}
    return [sock for sock in socks if sock.fileno() in ready]
