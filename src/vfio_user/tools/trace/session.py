"""A proxy between two ends, each of which is a socket or a command that is run."""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, TracebackType

from vfio_user.errors import UsageError, VfioUserError
from vfio_user.tools.interrupts import END_SIGNALS
from vfio_user.tools.running import GRACE, Command
from vfio_user.tools.serving import raise_fd_limit
from vfio_user.tools.trace.proxy import Proxy, connect, listen
from vfio_user.tools.trace.seen import Observer

SERVER_PATIENCE = 10.0
"""Seconds that a server that was started has until it listens."""
_RETRY = 0.01


@dataclass(frozen=True, slots=True)
class Ends:
    """Where clients come, and where the server is; or commands that find the path in ``VFIO_USER_SOCKET``.

    A command without a path gets one in a temporary folder. Raises UsageError when an end is missing.
    """

    listen: Path | None = None
    connect: Path | None = None
    run: str | None = None
    run_server: str | None = None

    def __post_init__(self) -> None:
        if self.listen is None and self.run is None:
            raise UsageError("where do clients come? Give --listen or --run")
        if self.connect is None and self.run_server is None:
            raise UsageError("where is the server? Give --connect or --run-server")


class TraceSession:
    """Passes on between ``ends`` and tells ``observer``: until a signal, or the end of a command that was started.

    In the main thread only: END_SIGNALS end it, and what it has started before. Raises OSError for a socket that
    cannot be made.
    """

    def __init__(self, ends: Ends, observer: Observer) -> None:
        self._client: Command | None = None
        self._server: Command | None = None
        self._interrupted = False
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="vfio-user-")))
            self.listen_path = ends.listen or folder / "client.sock"
            self.connect_path = ends.connect or folder / "server.sock"
            self._fd_limit = raise_fd_limit()
            listener = listen(self.listen_path)
            stack.callback(self.listen_path.unlink, missing_ok=True)
            self.proxy = stack.enter_context(Proxy(observer, listener, self._connect))
            stack.enter_context(self._handling_signals())
            if ends.run_server is not None:
                self._server = self._start(stack, ends.run_server, self.connect_path)
                self.proxy.watch(self._server, lambda: self.proxy.finish(GRACE))
            if ends.run is not None:
                self._client = self._start(stack, ends.run, self.listen_path)
                self.proxy.watch(self._client, lambda: self.proxy.finish(GRACE))
            self._stack = stack.pop_all()

    def serve(self) -> int:
        """Pass on; the exit status: that of the client that was run, else that of a server that ended by itself.

        Raises OSError when the server cannot be reached.
        """
        try:
            self.proxy.serve()
        except OSError:
            if not self._interrupted:  # a server that was still waited for is not needed any more
                raise
        return self._status()

    def __enter__(self) -> TraceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """One that this process was started to ignore, as by ``nohup``, stays ignored."""
        before = {number: signal.getsignal(number) for number in END_SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._signalled)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, stack: ExitStack, text: str, path: Path) -> Command:
        return stack.enter_context(Command(text, [path.absolute()], self._fd_limit))

    def _connect(self) -> socket.socket:
        """A connection to the server; one that was started may still be on its way."""
        deadline = time.monotonic() + SERVER_PATIENCE
        while True:
            try:
                return connect(self.connect_path)
            except (FileNotFoundError, ConnectionRefusedError):
                server = self._server
                if server is None or self.proxy.stopping or time.monotonic() > deadline or _ended(server, _RETRY):
                    raise

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        """On a terminal Ctrl-C is the client's that runs there; else it ends first, so that nothing is cut off."""
        client = self._client
        if client is None:
            self._interrupted = True
            self.proxy.stop()
        elif not client.hears(number):
            client.end()
            self.proxy.call_later(GRACE, client.insist)

    def _status(self) -> int:
        """End what was started, the client first."""
        server, client = self._server, self._client
        in_vain = server is not None and _ended(server, 0) and not self.proxy.connections
        for command in (client, server):
            if command is not None and not _ended(command, 0):
                command.end()
                _ended(command, GRACE)
        self._stack.close()
        if server is not None and in_vain and server.status:
            raise VfioUserError(f"the server ended with status {server.status} before a client came")
        if client is not None:
            return client.status
        return 0 if server is None or self._interrupted else server.status


def _ended(command: Command, patience: float) -> bool:
    poll = select.poll()
    poll.register(command, select.POLLIN)
    return bool(poll.poll(patience * 1000))
