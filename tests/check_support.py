"""What the tests of ``vfio-user check`` share: a server in a thread whose replies are twisted, clients in threads."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from vfio_user.errors import VfioUserError
from vfio_user.fds import close_all
from vfio_user.tools.check import SERVER_QUIRKS, Mode, Report, Result, Selection, ServerChecker, select, server_cases
from vfio_user.tools.check.client.played import Play, Twist
from vfio_user.tools.check.raw import Transcript

TIMEOUT = 10.0
EVERYTHING = frozenset(Mode)


class TwistedServer:
    """Serves the plain device at ``path``, one client after another, with another device for each."""

    def __init__(self, path: Path, twist: Twist) -> None:
        self.path = path
        self._twist = twist
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                conversation = Play(sock, TIMEOUT, self._twist, Transcript()).run()
                for message in conversation.messages:
                    close_all(message.fds)

    def stop(self) -> None:
        """No client is taken any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def close(self) -> None:
        self.stop()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def twisted(path: Path, twist: Twist) -> Iterator[TwistedServer]:
    server = TwistedServer(path, twist)
    try:
        yield server
    finally:
        server.close()


def check(path: Path, *only: str, modes: frozenset[Mode] = EVERYTHING, timeout: float = TIMEOUT) -> Report:
    """A report of the server at ``path``."""
    return ServerChecker(path, timeout, SERVER_QUIRKS).run(select(server_cases(), Selection(modes, only)))


def by_name(report: Report) -> dict[str, Result]:
    return {one.name: one for one in report.results}


def not_passed(report: Report) -> dict[str, list[str]]:
    """What each case found that was run and is not as expected."""
    return {one.name: [finding.text for finding in one.findings] for one in report.results if one.findings}


CRASHED = -6


class ThreadClient:
    """A client that runs in a thread: ends with 0, with 1 after an error on purpose, as crashed after any other."""

    def __init__(self, work: Callable[[Path], None], path: Path) -> None:
        self._status: int | None = None
        self._work = work
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(path,), daemon=True)
        self._thread.start()

    def _run(self, path: Path) -> None:
        try:
            self._work(path)
            self._status = 0
        except (VfioUserError, OSError) as error:
            self.error, self._status = error, 1
        except BaseException as error:
            self.error, self._status = error, CRASHED

    def status(self) -> int | None:
        return self._status

    def end(self) -> None:
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
