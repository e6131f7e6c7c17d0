"""Guest-physical memory, registers of devices included, written through QEMU's gdbstub.

The MSI-X table of a device lives in QEMU, which gives no other way to write it from outside.

Sources: GDB's manual, appendix E (remote serial protocol); QEMU's ``docs/system/gdb.rst`` (``Qqemu.PhyMemMode``).
"""

from __future__ import annotations

import socket
import time
from types import TracebackType
from typing import Self

from vfio_user.errors import MigrationError

PIECE = 64
"""Bytes of one write."""
MAX_PACKET = 16384
"""Bytes of an answer: QEMU's own bound is a quarter of that."""

_LEAST = 1e-3
"""Seconds to wait: none would mean for ever."""


class GdbStub:
    """A connection to a gdbstub, which listens at a UNIX socket or is at the other end of ``place``; a context manager.

    ``timeout`` in seconds bounds each answer. Leaving, it closes the socket and says no farewell: a debugger that
    detaches lets the machine run. Raises MigrationError.
    """

    def __init__(self, place: str | socket.socket, timeout: float = 5.0) -> None:
        self._pending = bytearray()
        self._timeout = timeout
        self._socket = place if isinstance(place, socket.socket) else socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            if isinstance(place, str):
                self._socket.connect(place)
            self._ask(b"qSupported")
            self._ask(b"?")
            self._command(b"Qqemu.PhyMemMode:1")
        except OSError as error:
            self._socket.close()
            where = f"gdbstub at {place}" if isinstance(place, str) else "gdbstub"
            raise MigrationError(f"{where}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def write(self, address: int, data: bytes) -> None:
        """Write at a guest-physical address."""
        try:
            for at in range(0, len(data), PIECE):
                piece = data[at : at + PIECE]
                self._command(b"M%x,%x:%s" % (address + at, len(piece), piece.hex().encode()))
        except OSError as error:
            raise MigrationError(f"gdbstub: {error.strerror or error}") from error

    def _command(self, packet: bytes) -> None:
        answer = self._ask(packet)
        if answer != b"OK":
            raise MigrationError(
                f"gdbstub: {packet[:40].decode()} is answered {answer[:40].decode(errors='replace')!r}"
            )

    def _ask(self, packet: bytes) -> bytes:
        deadline = time.monotonic() + self._timeout
        self._socket.settimeout(self._timeout)
        self._socket.sendall(b"$%s#%02x" % (packet, sum(packet) % 256))
        answer = self._receive(deadline)
        self._socket.sendall(b"+")
        return answer

    def _receive(self, deadline: float) -> bytes:
        """The next packet, without the acknowledgements before it. Raises TimeoutError, however much comes."""
        while True:
            start, end = self._pending.find(b"$"), self._pending.find(b"#")
            if 0 <= start < end <= len(self._pending) - 3:
                packet = bytes(self._pending[start + 1 : end])
                del self._pending[: end + 3]
                return packet
            if len(self._pending) > MAX_PACKET:
                raise MigrationError("this is no gdbstub: what it says has no end")
            self._socket.settimeout(max(deadline - time.monotonic(), _LEAST))
            more = self._socket.recv(4096)
            if not more:
                raise ConnectionError("QEMU hangs up")
            self._pending += more
