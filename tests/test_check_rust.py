"""The report of a server that answers as the Rust crate was recorded: its quirks are named as its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user.fds import close_all
from vfio_user.tools.check import Mode, Verdict
from vfio_user.tools.check.model import FATAL
from vfio_user.wire import messages as m
from vfio_user.wire.constants import HEADER_SIZE, Command, HeaderFlags

from .check_support import TIMEOUT, by_name, check
from .device_support import guest_memory
from .test_vectors import Vector, receive, recorded

RUST = "the Rust crate vfio_user"
_ENOUGH = 80
"""Bytes of region information with the two areas of the recorded device."""
_FIXED: dict[int, int] = {
    Command.DEVICE_GET_INFO: 16,
    Command.DEVICE_GET_REGION_INFO: 32,
    Command.DEVICE_GET_IRQ_INFO: 16,
}


class RecordedServer(threading.Thread):
    """Answers what was recorded; all else with an error reply as the crate sends it: a header, errno 0."""

    def __init__(self, path: Path, vectors: list[Vector], memory: int) -> None:
        super().__init__()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._memory = memory
        self._replies = {self._key(vector.request): vector for vector in vectors if vector.reply}

    @staticmethod
    def _key(request: bytes) -> tuple[int, bytes]:
        """What is asked for, without the id, the flags, the proposal; of the room for the answer, if it is enough."""
        header, payload = m.Header.parse(request), request[HEADER_SIZE:]
        if header.command == Command.VERSION:
            return header.command, b""
        fixed = _FIXED.get(header.command)
        if fixed is None:
            return header.command, payload
        enough = int.from_bytes(payload[:4], "little") >= _ENOUGH
        return header.command, (b"all" if enough else b"") + payload[4:fixed]

    def _find(self, request: bytes) -> Vector | None:
        command, asked = self._key(request)
        return self._replies.get((command, asked)) or self._replies.get((command, asked.removeprefix(b"all")))

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock, contextlib.suppress(ConnectionError):
                    self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        while (message := receive(sock))[0]:
            request, fds = message
            close_all(fds)
            vector = self._find(request)
            if vector is None:
                header = m.Header.parse(request)
                error = int(HeaderFlags.REPLY | HeaderFlags.ERROR)
                sock.sendall(m.Header(header.msg_id, header.command, HEADER_SIZE, error, 0).pack())
            else:
                socket.send_fds(sock, [request[:2] + vector.reply[2:]], [self._memory] * vector.fds_back)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join(TIMEOUT)
        assert not self.is_alive()


@pytest.fixture(params=["gpio/", "sparse/"])
def rust(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    prefix = request.param
    with guest_memory(0x400000) as memory:
        server = RecordedServer(tmp_path / "rust.sock", [*recorded(f"rustclient/{prefix}"), *recorded(prefix)], memory)
        server.start()
        try:
            yield prefix, tmp_path / "rust.sock"
        finally:
            server.close()


def test_what_the_crate_is_known_for_is_named_and_what_it_does_right_passes(rust: tuple[str, Path]) -> None:
    prefix, path = rust
    report = check(path, "info/device", "info/region", "info/irq", "header/unknown", modes=frozenset({Mode.SAFE}))
    found = by_name(report)
    assert found["info/device"].verdict is Verdict.PASSED
    assert found["info/irq/intx"].verdict is Verdict.PASSED
    for name in ("header/unknown/99-empty", "info/irq/none/largest"):
        assert found[name].verdict is Verdict.QUIRK, found[name]
        assert [quirk.peer for quirk in found[name].quirks] == [RUST]
    if prefix == "sparse/":
        assert [finding.code for finding in found["info/region/bar0/fixed"].findings] == ["no-fd-yet", "caps-absent"]
        assert found["info/region/bar0/fixed"].verdict is Verdict.QUIRK
        assert found["info/region/bar0/as-told"].verdict is Verdict.PASSED
        assert [finding.code for finding in found["info/region/bar1/fixed"].findings] == ["no-fd"]
        assert found["info/region/bar1/fixed"].quirks[0].peer == RUST
    worst = {one.name for one in report.results if one.verdict is Verdict.MUST}
    assert worst <= {"info/region/config/size", "info/region/bar1/mmap"}  # the recorded device's own
    assert not any(finding.code in FATAL for one in report.results for finding in one.findings)
