"""A QEMU's QMP socket: what the recipe asks it, typed and within a time.

The client is ``qemu.qmp`` (the extra ``qemu`` of this package), QEMU's own, behind calls that block.

Sources: QEMU's ``docs/interop/qmp-spec.rst``, ``qapi/run-state.json``, ``qapi/migration.json``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Coroutine, Iterator, Mapping
from struct import Struct
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from qemu.qmp import ConnectError, ExecuteError, QMPClient, Runstate

from vfio_user.errors import MigrationError

T = TypeVar("T")

POLL = 0.02
"""Seconds between two looks at a QEMU in which nothing seems to happen."""
MIGRATING = ("setup", "active", "pre-switchover", "device")
"""What a MigrationInfo's status is while memory or machine are on their way."""
_CREDENTIALS = Struct("3i")
"""What SO_PEERCRED gives: process, user, group (unix(7))."""
ENDED = ("completed", "failed", "cancelled", "none")
"""What it is when QEMU does nothing of that kind any more."""
USUAL_CAPABILITIES = ("pause-before-switchover", "events", "x-ignore-shared")
"""Of migration, what a QEMU has not before anybody asks for it: as far as it is changed here."""


class MonitorError(MigrationError):
    """A QEMU could not be asked, or its answer is none."""


class RefusedError(MonitorError):
    """QEMU answered with an error."""


class ClosedError(MonitorError):
    """QEMU is gone, or its monitor is: what was asked last may have been done."""


class AbsentError(MonitorError):
    """Nobody listens at a QMP socket."""


class LateError(MonitorError, TimeoutError):
    """QEMU did not answer in time: what was asked may be done yet."""


class RunState(msgspec.Struct, frozen=True):
    """query-status."""

    status: str
    running: bool


class RamProgress(msgspec.Struct, frozen=True, rename="kebab"):
    """``ram`` of query-migrate: bytes and, where the name says so, pages."""

    transferred: int
    remaining: int
    normal: int
    duplicate: int
    dirty_sync_count: int
    page_size: int


class MigrationInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """query-migrate; nothing of it is there before the first migration."""

    status: str = "none"
    ram: RamProgress | None = None
    error_desc: str = ""
    blocked_reasons: list[str] = []


class Capability(msgspec.Struct, frozen=True):
    """Of migration, as query-migrate-capabilities tells it and migrate-set-capabilities takes it."""

    capability: str
    state: bool


class _FdSet(msgspec.Struct, frozen=True, rename="kebab"):
    fdset_id: int


class Monitor:
    """A connection to a QMP socket; a context manager. ``name`` is what errors call this QEMU.

    ``timeout`` in seconds bounds the connecting and each command. Raises MonitorError where there is no QMP.
    """

    def __init__(self, name: str, path: str | os.PathLike[str], timeout: float = 10.0) -> None:
        self.name = name
        self.path = os.fspath(path)
        self.timeout = timeout
        self._client = QMPClient(name)
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # which has Ctrl-C end what is under way
        self._open = True
        try:
            self._process = self._run(self._connect(), self.path)
        except LateError as error:
            self._end()
            raise LateError(f"{self.path} says nothing: is it a QMP socket, and free of another client?") from error
        except BaseException:
            self._end()
            raise

    async def _connect(self) -> int:
        """The process that listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            try:
                await asyncio.get_running_loop().sock_connect(sock, self.path)
            except OSError as error:
                raise ConnectError("no connection", error) from error
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            await self._client.connect(sock)
        except BaseException:
            sock.close()
            raise
        return int(_CREDENTIALS.unpack(credentials)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave; QEMU goes on as it is. Closing twice is fine."""
        if not self._open:
            return
        with contextlib.suppress(MonitorError):
            self._run(self._client.disconnect(), "disconnect")
        self._end()

    def _end(self) -> None:
        self._open = False
        self._runner.close()

    @property
    def process(self) -> int:
        """The process that listens there: QEMU, unless its socket was made, or is passed on, by another. 0: unknown."""
        return self._process

    def execute(self, command: str, **arguments: Any) -> object:
        """Have a command done; what it returns. ``_`` in the names of arguments stands for QMP's ``-``."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._run(self._client.execute(command, named), command)

    def ask(self, kind: type[T], command: str, **arguments: Any) -> T:
        """The same, of which the answer must be a ``kind``."""
        answer = self.execute(command, **arguments)
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise MonitorError(f"the {self.name} QEMU answers {command} with what it must not: {error}") from error

    def hmp(self, line: str) -> str:
        """Have a line of the human monitor's done; what it prints."""
        return self.ask(str, "human-monitor-command", command_line=line).strip()

    def set_capabilities(self, wanted: Mapping[str, bool]) -> None:
        """Switch capabilities of migration on and off."""
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
        self.execute("migrate-set-capabilities", capabilities=capabilities)

    @contextlib.contextmanager
    def lent(self, fd: int) -> Iterator[str]:
        """An open file, given to QEMU for as long as the block lasts: as an URI for ``migrate``, ``migrate-incoming``.

        So the file needs no path that QEMU could find, and no permission for it. The descriptor's access mode must be
        that with which QEMU would open it.
        """
        self._send(fd)
        fdset = self.ask(_FdSet, "add-fd").fdset_id
        try:
            yield f"file:/dev/fdset/{fdset}"
        finally:
            with contextlib.suppress(MonitorError):
                self.execute("remove-fd", fdset_id=fdset)

    def give(self, fd: int, name: str) -> None:
        """An open descriptor is QEMU's from now on, under a name."""
        self._send(fd)
        self.execute("getfd", fdname=name)

    def _send(self, fd: int) -> None:
        """To be taken by the next command that takes one."""

        async def send() -> None:
            self._client.send_fd_scm(fd)

        self._run(send(), "a descriptor")

    def quit(self) -> None:
        """End this QEMU, and wait for that. Raises ClosedError where it was not reached: it may be there still."""
        with contextlib.suppress(LateError):
            self.status()  # who answers is there, and has ended when the connection does
        deadline = time.monotonic() + self.timeout
        with contextlib.suppress(ClosedError):
            self.execute("quit")
            while time.monotonic() < deadline:
                self.wait_event(POLL)
            raise LateError(f"the {self.name} QEMU does not end within {self.timeout:g} s")

    def status(self) -> RunState:
        """Whether the guest runs."""
        return self.ask(RunState, "query-status")

    def migration(self) -> MigrationInfo:
        """How far a migration is."""
        return self.ask(MigrationInfo, "query-migrate")

    def wait_event(self, timeout: float) -> None:
        """Return when something happens in QEMU, ``timeout`` seconds later at most. Raises ClosedError."""

        async def any_event() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._client.events.get(), timeout)

        self._client.events.clear()
        self._check_alive()
        self._run(any_event(), "events")
        self._check_alive()

    def _check_alive(self) -> None:
        if self._client.runstate is not Runstate.RUNNING:
            raise ClosedError(f"the {self.name} QEMU: its monitor is gone")

    def _run(self, work: Coroutine[Any, Any, T], what: str) -> T:
        if not self._open:
            work.close()
            raise ClosedError(f"the {self.name} QEMU: {what}: this monitor was closed")
        try:
            return self._runner.run(asyncio.wait_for(work, self.timeout))
        except ExecuteError as error:
            raise RefusedError(f"the {self.name} QEMU: {what}: {error}") from error
        except TimeoutError as error:
            raise LateError(f"the {self.name} QEMU: {what}: no answer within {self.timeout:g} s") from error
        except ConnectError as error:
            absent = isinstance(error.exc, (FileNotFoundError, ConnectionRefusedError))
            raise (AbsentError if absent else MonitorError)(
                f"the {self.name} QEMU: {what}: {_reason(error.exc)}"
            ) from error
        except Exception as error:  # the library's reader ends with whatever a peer's nonsense makes json raise
            raise ClosedError(f"the {self.name} QEMU: {what}: its monitor is gone") from error


class EndedMonitor(Monitor):
    """Of a QEMU that is known to have ended: whatever it is asked, it is gone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.timeout = 0.0
        self._process = 0

    def close(self) -> None:
        """There is nothing to leave."""

    def quit(self) -> None:
        """It has."""

    def execute(self, command: str, **arguments: Any) -> object:
        """Raises ClosedError."""
        raise ClosedError(f"the {self.name} QEMU: {command}: it has ended")

    def wait_event(self, timeout: float) -> None:
        """Raises ClosedError."""
        raise ClosedError(f"the {self.name} QEMU has ended")


def _reason(error: Exception) -> str:
    """Why there is no connection."""
    if isinstance(error, EOFError):
        return "it hangs up: is another client connected already?"
    return getattr(error, "strerror", None) or "is it a QMP socket? What it says is no greeting"
