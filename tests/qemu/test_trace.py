"""A proxy between a real QEMU and our devices: QEMU notices nothing, every message makes sense, and plays again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.trace_support import TIMEOUT, Recorder, running
from vfio_user import ServerBackend
from vfio_user.devices.edu import Edu
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.tools.replay import Ignored, Replay
from vfio_user.tools.trace import CaptureWriter, FdKind, Place, Proxy, Seen, Tracer, connect, listen, read_capture
from vfio_user.tools.trace.lines import plain
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import Command, PciRegion

from .conftest import MachineFactory, servers
from .test_devices import BUFFER, DMA_COMMAND, EDU_BAR, MEMORY_BAR, MIB, RAM, TO_GUEST, transfer

pytestmark = pytest.mark.qemu

TEXT = b"through the proxy"


class Traces(Recorder):
    """Keeps messages, the lines about them, and a capture."""

    def __init__(self, capture: Path) -> None:
        super().__init__()
        self.capture = capture
        self.lines: list[str] = []
        self.writer = CaptureWriter(capture)
        self._tracer = Tracer(lambda parts: self.lines.append(plain(parts)), capture=self.writer)

    def seen(self, message: Seen) -> None:
        self._tracer.seen(message)
        super().seen(message)

    def unclear(self, place: Place, reason: str) -> None:
        raise AssertionError(f"{place}: {reason}")

    def has(self, *texts: str) -> bool:
        """Whether there is a line with all of ``texts``."""
        return any(all(text in line for text in texts) for line in self.lines)


Behind = Callable[[ServerBackend], Path]


@pytest.fixture
def traces(tmp_path: Path) -> Iterator[Traces]:
    traces = Traces(tmp_path / "c.pcapng")
    yield traces
    traces.writer.close()


@pytest.fixture
def behind(tmp_path: Path, traces: Traces) -> Iterator[Behind]:
    """A function that serves a device behind a proxy; the proxy's path. Name it before ``machine``."""
    (tmp_path / "servers").mkdir()
    proxies: list[Proxy] = []
    with servers(tmp_path / "servers") as serve, ExitStack() as stack:

        def start(device: ServerBackend) -> Path:
            server = serve(device).path
            proxy = Proxy(traces, listen(tmp_path / "proxy"), lambda: connect(server))
            proxies.append(stack.enter_context(running(proxy)))
            return tmp_path / "proxy"

        yield start
    assert [proxy.failure for proxy in proxies] == [None] * len(proxies)


@pytest.mark.parametrize("anonymous", [False, True], ids=["memfd", "messages"])
def test_edu_behind_a_proxy(
    behind: Behind, machine: MachineFactory, traces: Traces, anonymous: bool, tmp_path: Path
) -> None:
    """With anonymous RAM every byte goes by DMA_READ and DMA_WRITE: then the capture has all that a replay needs."""
    m = machine([behind(Edu())], anonymous_ram=anonymous)
    m.map_bar(m.devfns[0], 0, EDU_BAR)
    m.write(RAM, TEXT)
    transfer(m, RAM, BUFFER, len(TEXT), 0)
    transfer(m, BUFFER, RAM + 0x1000, len(TEXT), TO_GUEST)
    assert m.read(RAM + 0x1000, len(TEXT)) == TEXT
    m.close()
    traces.wait_for(traces.ended, 1)

    assert traces.has("DEVICE_SET_IRQS", "DATA_EVENTFD|ACTION_TRIGGER index=intx start=0 count=1 fds=[eventfd]")
    assert traces.has("REGION_WRITE posted bar0+0x98:u64 dma_command = 0x0000000000000001")
    assert traces.has("REGION_READ ok config+0x", "msi.control")
    assert traces.has("DMA_MAP", "fds=[memfd(") is not anonymous
    from_server = {message.header.command for message in traces.messages if message.place.sender is Role.SERVER}
    assert (Command.DMA_READ in from_server) is anonymous

    captured = list(read_capture(traces.capture))
    assert [message.header for message in captured] == [message.header for message in traces.messages]
    if anonymous:
        device = Edu()
        assert replayed(device, captured, tmp_path) == []
        assert bytes(device.buffer[: len(TEXT)]) == TEXT


def replayed(device: ServerBackend, captured: list[Seen], folder: Path) -> list[str]:
    """How the same device answers QEMU's side otherwise; how often it was polled is a matter of time."""
    ignored = [Ignored(region=PciRegion.BAR0, start=DMA_COMMAND, stop=DMA_COMMAND + 8)]
    (folder / "again").mkdir()
    with servers(folder / "again") as serve, Replay(connect(serve(device).path), captured, TIMEOUT, ignored) as replay:
        return list(map(str, replay.run()))


def test_memory_that_qemu_maps_through_the_proxy(behind: Behind, machine: MachineFactory, traces: Traces) -> None:
    device = Ivshmem(size=MIB, vectors=2)
    m = machine([behind(device)])
    m.map_bar(m.devfns[0], 2, MEMORY_BAR)
    m.write(MEMORY_BAR, b"shared")
    m.readl(MEMORY_BAR)
    assert bytes(device.memory[2][:6]) == b"shared"
    assert traces.has("DEVICE_GET_REGION_INFO ok", "READ|WRITE|MMAP", "index=bar2", f"fds=[memfd({MIB:#x})]")


def test_a_machine_after_another(behind: Behind, machine: MachineFactory, traces: Traces) -> None:
    path = behind(Edu())
    for count in (1, 2):
        m = machine([path])
        m.map_bar(m.devfns[0], 0, EDU_BAR)
        assert m.readl(EDU_BAR) == 0x010000ED
        m.close()
        traces.wait_for(traces.ended, count)
    assert {fd.kind for message in traces.messages for fd in message.fds} >= {FdKind.EVENTFD, FdKind.MEMFD}
