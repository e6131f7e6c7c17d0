"""A command that is run along with a service: it finds the sockets in its environment, and both end together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from vfio_user.tools.serving import DeviceSpec
from vfio_user.tools.shell import Shell

SOCKET_VARIABLE = "VFIO_USER_SOCKET"
"""The first socket's absolute path."""
SOCKETS_VARIABLE = "VFIO_USER_SOCKETS"
"""All of them, one a line: ``for socket in $VFIO_USER_SOCKETS`` takes them apart."""
GRACE = 5.0
"""Seconds that a command has to end after SIGTERM, before SIGKILL."""


class Command:
    """``sh -c text``, with ``sockets`` in its environment and ``fd_limit`` descriptors; a Companion of a service.

    All that it starts ends with it, as far as a :class:`Shell` reaches. Raises OSError when there is no shell. Leaving
    the ``with`` block kills what is left of it.
    """

    def __init__(self, text: str, sockets: Sequence[Path], fd_limit: int, *, grace: float = GRACE) -> None:
        self._grace = grace
        self._asked = False
        self._deadline: float | None = None
        self._shell = Shell(f"ulimit -Sn {fd_limit}; {text}", env=os.environ | _variables(sockets))
        try:
            self._pidfd = os.pidfd_open(self._shell.process.pid)
        except BaseException:
            self._reap()
            raise

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self._pidfd

    def hears(self, number: int) -> bool:
        """On a terminal Ctrl-C is the command's, as it is in a shell: what is served goes on until that has ended."""
        return self._shell.on_terminal and number == signal.SIGINT

    def end(self) -> None:
        """SIGTERM, once; some seconds later :meth:`insist` is due."""
        if not self._asked:
            self._asked = True
            self._deadline = time.monotonic() + self._grace
            self._shell.signal(signal.SIGTERM)

    def patience(self) -> float | None:
        """Seconds until :meth:`insist` is due; None: it is not."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def insist(self) -> None:
        """SIGKILL."""
        self._deadline = None
        self._shell.signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill what is left of it."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
            self._reap()

    @property
    def status(self) -> int:
        """After :meth:`close`: its exit status; 128 and the number of the signal that ended it."""
        status = self._shell.process.returncode
        return status if status >= 0 else 128 - status

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reap(self) -> None:
        self._shell.signal(signal.SIGKILL)  # while the process group is sure to be ours: it is not reaped yet
        self._shell.process.wait()


def _variables(sockets: Sequence[Path]) -> dict[str, str]:
    if not sockets:
        return {}
    return {SOCKET_VARIABLE: str(sockets[0]), SOCKETS_VARIABLE: "\n".join(map(str, sockets))}


@contextmanager
def private_sockets(specs: Sequence[DeviceSpec]) -> Iterator[list[DeviceSpec]]:
    """``specs``, where those without a place have a socket in a temporary folder, which only this user can enter."""
    with TemporaryDirectory(prefix="vfio-user-") as folder:
        yield [
            replace(spec, socket_path=Path(folder, f"{number}.sock"))
            if spec.socket_path is None and spec.fd is None
            else spec
            for number, spec in enumerate(specs)
        ]
