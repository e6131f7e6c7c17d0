"""Guest-physical memory, registers of devices included, written through QEMU's gdbstub.

The MSI-X table of a device lives in QEMU, which gives no other way to write it from outside.

Sources: GDB's manual, appendix E (remote serial protocol); QEMU's ``docs/system/gdb.rst`` (``Qqemu.PhyMemMode``).
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

from vfio_user.errors import MigrationError

PIECE = 64
"""Bytes of one write."""
MAX_PACKET = 16384
"""Bytes of an answer: QEMU's own bound is a quarter of that."""


class GdbStub:
    """A connection to a gdbstub that listens at the UNIX socket ``path``; a context manager.

    Leaving it, it says no farewell: a debugger that detaches lets the machine run. Raises MigrationError.
    """

    def __init__(self, path: str, timeout: float = 5.0) -> None:
        self._pending = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self._ask(b"qSupported")
            self._ask(b"?")
            self._command(b"Qqemu.PhyMemMode:1")
        except OSError as error:
            self._socket.close()
            raise MigrationError(f"gdbstub at {path}: {error}") from error
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
            raise MigrationError(f"gdbstub: {error}") from error

    def _command(self, packet: bytes) -> None:
        answer = self._ask(packet)
        if answer != b"OK":
            raise MigrationError(
                f"gdbstub: {packet[:40].decode()} is answered {answer[:40].decode(errors='replace')!r}"
            )

    def _ask(self, packet: bytes) -> bytes:
        self._socket.sendall(b"$%s#%02x" % (packet, sum(packet) % 256))
        answer = self._receive()
        self._socket.sendall(b"+")
        return answer

    def _receive(self) -> bytes:
        """The next packet, without the acknowledgements before it."""
        while True:
            start, end = self._pending.find(b"$"), self._pending.find(b"#")
            if 0 <= start < end <= len(self._pending) - 3:
                packet = bytes(self._pending[start + 1 : end])
                del self._pending[: end + 3]
                return packet
            if len(self._pending) > MAX_PACKET:
                raise MigrationError("this is no gdbstub: what it says has no end")
            more = self._socket.recv(4096)
            if not more:
                raise ConnectionError("QEMU hangs up")
            self._pending += more
