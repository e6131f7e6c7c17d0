"""QEMU's gdbstub, for as long as it takes: the one way to write a device's MSI-X table from outside.

Source: QEMU's ``hmp-commands.hx`` (``gdbserver``), ``qapi/char.json``, ``qapi/misc.json`` (``getfd``).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from vfio_user.live.qemu.gdbstub import GdbStub
from vfio_user.live.qemu.monitor import Monitor, MonitorError, RefusedError

_CHARDEV = "vfio-user-gdb"
"""What QEMU calls the socket of its gdbstub meanwhile."""
_BY_PATH = "gdb"
"""What it calls one that it makes itself."""


class _Chardev(msgspec.Struct, frozen=True):
    label: str
    filename: str


class Debugger:
    """The gdbstub of a QEMU whose guest stands still: one that runs would be stopped by it.

    ``path`` is one for a socket that QEMU makes and this process reaches; by default QEMU is given a socket, for which
    it must be on this host. ``timeout`` in seconds bounds each answer. Every call raises MigrationError.
    """

    def __init__(self, monitor: Monitor, timeout: float, path: str | None = None) -> None:
        self._monitor = monitor
        self._timeout = timeout
        self._path = path

    def check(self) -> None:
        """Raise MigrationError, which says what to change, unless memory could be written now."""
        with self._attached():
            pass

    def write(self, address: int, data: bytes) -> None:
        """Write guest-physical memory, registers of devices included."""
        with self._attached() as stub:
            stub.write(address, data)

    @contextmanager
    def _attached(self) -> Iterator[GdbStub]:
        self._clear()
        with ExitStack() as stack:
            place: str | socket.socket
            if self._path is None:
                place, option = stack.enter_context(self._given_socket()), f"chardev:{_CHARDEV}"
            else:
                place, option = self._path, f"unix:{self._path},server=on,wait=off"
            stack.callback(self._monitor.hmp, "gdbserver none")
            said = self._monitor.hmp(f"gdbserver {option}")
            if not said.startswith("Waiting for gdb"):
                reason = said.removeprefix("gdbstub: ")
                raise MonitorError(f"the {self._monitor.name} QEMU does not start its gdbstub: {reason}")
            yield stack.enter_context(GdbStub(place, self._timeout))

    def _clear(self) -> None:
        """Remove what a controller that was killed has left. Raises MonitorError for a gdbstub of somebody else's."""
        known = {one.label: one.filename for one in self._monitor.ask(list[_Chardev], "query-chardev")}
        other = known.get(_BY_PATH)
        if other is not None and (self._path is None or self._path not in other):
            raise MonitorError(
                f"the {self._monitor.name} QEMU has a gdbstub at {other.removeprefix('disconnected:')}, and can have"
                " one only: end it first, by gdbserver none in its human monitor"
            )
        if other is not None or _CHARDEV in known:
            with suppress(MonitorError):
                self._monitor.hmp("gdbserver none")
        if _CHARDEV in known:
            with suppress(MonitorError):
                self._monitor.execute("chardev-remove", id=_CHARDEV)

    @contextmanager
    def _given_socket(self) -> Iterator[socket.socket]:
        """A socket of which QEMU has the other end, as a character device."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._give(theirs)
            address = {"type": "fd", "data": {"str": _CHARDEV}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            self._monitor.execute("chardev-add", id=_CHARDEV, backend=backend)
            try:
                yield ours
            finally:
                with suppress(MonitorError):  # it went with the gdbstub, if there was one
                    self._monitor.execute("chardev-remove", id=_CHARDEV)

    def _give(self, end: socket.socket) -> None:
        try:
            self._monitor.give(end.fileno(), _CHARDEV)
        except RefusedError as error:
            raise MonitorError(
                f"the {self._monitor.name} QEMU cannot be handed a socket (is its monitor forwarded, as by ssh?):"
                f" name one that it makes and that is reached here, too, with --gdb: {error}"
            ) from error
