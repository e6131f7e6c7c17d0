"""What the tests of the control socket share: a device, served with one, and what goes on around it."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vfio_user import Bar, Client, Device, Server, state
from vfio_user.client.control import ControlClient
from vfio_user.errors import CommandError, ConnectionClosedError
from vfio_user.server import Quiescing
from vfio_user.wire.constants import PciRegion

from .device_support import TIMEOUT, guest_memory
from .support import ALL_CAPABILITIES, RawPeer

BAR0, CONFIG = PciRegion.BAR0, PciRegion.CONFIG
VALUE, DMA_TO, ASK, LEVEL = 0, 8, 16, 24
PAGE, RAM = 4096, 0x100000


class Pad(Device):
    """A register, the level of INTx, DMA of 8 bytes to the address written to DMA_TO, a read that asks by a message."""

    vendor_id, device_id = 0x494F, 0x0C0C
    bars = {0: Bar(0x1000)}
    intx, msix_vectors = True, 4
    value = state(0)

    def __init__(self, **options: object) -> None:
        self.accesses: list[tuple[str, int, int]] = []
        self.quiescing: Quiescing | None = None
        self.quiesced = threading.Event()
        super().__init__(**options)

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        self.accesses.append(("read", offset, len(data)))
        if offset == ASK:
            self.dma.read_into(0, data)
        else:
            data[:] = self.value.to_bytes(8, "little").ljust(len(data), b"\0")[: len(data)]

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        value = int.from_bytes(data, "little")
        self.accesses.append(("write", offset, value))
        if offset == DMA_TO:
            self.dma.write(value, b"\xdd" * 8)
        elif offset == LEVEL:
            (self.irq.assert_ if value else self.irq.deassert)()
        else:
            self.value = value

    def quiesce(self) -> Quiescing | None:
        self.quiesced.set()
        return self.quiescing


class Bench:
    """A served device, with a socket for the primary client and one for control."""

    def __init__(self, folder: Path, server: Server, device: Pad) -> None:
        self.path, self.control_path = folder / "s", folder / "c"
        self.server, self.device = server, device
        self.stack = contextlib.ExitStack()

    def primary(self, timeout: float = TIMEOUT) -> Client:
        return self.stack.enter_context(Client.connect(self.path, timeout))

    def control(self, timeout: float = TIMEOUT) -> ControlClient:
        return self.stack.enter_context(ControlClient.connect(self.control_path, timeout))

    def raw(self, text: bytes | None = ALL_CAPABILITIES) -> RawPeer:
        peer = self.stack.enter_context(RawPeer.connect(self.control_path))
        if text is not None:
            assert peer.version(text).flags == 1
        return peer

    def memory(self, client: Client, pages: int = 16) -> mmap.mmap:
        """Guest memory of ``client`` at RAM, shared by a file."""
        fd = self.stack.enter_context(guest_memory(pages * PAGE))
        shared = mmap.mmap(fd, pages * PAGE)
        client.dma_map(RAM, pages * PAGE, fd, memory=memoryview(shared))
        return shared

    def dirty(self, client: Client, *addresses: int) -> None:
        """Have the device write there."""
        for address in addresses:
            client.region_write(BAR0, DMA_TO, address.to_bytes(8, "little"))


@contextlib.contextmanager
def bench_of(device: Any, **options: Any) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="vu") as name:
        folder = Path(name)
        with Server(device, folder / "s", control=folder / "c", **options) as server:
            thread = threading.Thread(target=server.serve_forever, name="server")
            thread.start()
            bench = Bench(folder, server, device)
            try:
                with bench.stack:
                    yield bench
            finally:
                server.shutdown()
                thread.join(TIMEOUT)
                assert not thread.is_alive(), "the server did not stop"


class Answering:
    """Serves a client's memory in a thread, as a VMM's main loop does."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="memory")

    def _serve(self) -> None:
        with contextlib.suppress(ConnectionClosedError):
            while not self._stop.is_set():
                self._client.serve_dma(0.02)

    def __enter__(self) -> Answering:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


def refusal(call: Callable[[], object]) -> int:
    with pytest.raises(CommandError) as raised:
        call()
    assert raised.value.errno is not None
    return raised.value.errno


def wait_until(true: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    """Ask until it is so: each question is a command to the server, which paces this."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to be"
