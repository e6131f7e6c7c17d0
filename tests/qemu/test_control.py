"""The control socket beside a real QEMU: push while it migrates, and what becomes of register accesses."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vfio_user import DeviceState, Server
from vfio_user.client.control import AccessMode, ControlClient
from vfio_user.devices.edu import Edu
from vfio_user.errors import CommandError
from vfio_user.testing.qtest import QtestMachine

from .conftest import MachineFactory

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

TIMEOUT = 10.0
EDU_BAR, RAM, PAGE = 0xE000_0000, 0x10_0000, 4096
LIVENESS, ID = 0x04, 0x010000ED
SOURCE, DESTINATION, COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
BUFFER, START, TO_GUEST, FROM_GUEST = 0x40000, 1, 2, 0
PATTERN = b"written by the device, through the file. ".ljust(64, b"!") * 64
COMMAND, COMMAND_MEMORY = 4, 2


class Side(NamedTuple):
    """A machine with edu in it, and the control socket of edu's server."""

    machine: QtestMachine
    control: ControlClient

    def transfer(self, direction: int, address: int, size: int = PAGE) -> None:
        m = self.machine
        guest_first = direction == FROM_GUEST
        m.writeq(EDU_BAR + SOURCE, address if guest_first else BUFFER)
        m.writeq(EDU_BAR + DESTINATION, BUFFER if guest_first else address)
        m.writeq(EDU_BAR + COUNT, size)
        m.writeq(EDU_BAR + DMA_COMMAND, START | direction)
        m.wait_until("the transfer", lambda: not m.readq(EDU_BAR + DMA_COMMAND) & START)

    def status(self) -> str:
        return str(self.machine.qmp("query-migrate").get("status"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """The socket of an edu that is served, with ``control`` beside it; name it before ``machine``."""
    with Server(Edu(), tmp_path / "edu", control=tmp_path / "control") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield tmp_path
        finally:
            server.shutdown()
            thread.join(TIMEOUT)
            assert not thread.is_alive()


@pytest.fixture
def side(server: Path, machine: MachineFactory) -> Iterator[Side]:
    with ControlClient.connect(server / "control", TIMEOUT) as control:
        m = machine([server / "edu"])
        m.map_bar(m.devfns[0], 0, EDU_BAR)
        yield Side(m, control)


@pytest.mark.parametrize("pushed", [True, False])
def test_what_the_device_wrote_through_the_file_arrives_with_a_push(
    side: Side, machine: MachineFactory, tmp_path: Path, pushed: bool
) -> None:
    """And without one it does not: QEMU does not see it."""
    m, control = side
    pages = [RAM + number * 3 * PAGE for number in range(32)]
    m.write(RAM, PATTERN)
    side.transfer(FROM_GUEST, RAM)
    m.write(RAM, bytes(PAGE))
    assert control.dma_logging_start(PAGE) == PAGE
    target = machine(extra_args=["-incoming", "defer", "-S"], devices=[])
    target.qmp("migrate-incoming", uri=f"unix:{tmp_path / 'stream'}")
    m.qmp("migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}])
    m.qmp("migrate", uri=f"unix:{tmp_path / 'stream'}")
    m.wait_until("the pause", lambda: side.status() == "pre-switchover")
    for page in pages:
        side.transfer(TO_GUEST, page)
    control.set_access(AccessMode.DUMMY)
    control.migration_set_state(DeviceState.STOP)
    assert control.status().dirty_pages == len(pages)
    if pushed:
        assert control.push() == len(pages)
        assert control.status().dirty_pages == 0
    m.qmp("migrate-continue", state="pre-switchover")
    m.wait_until("the end", lambda: side.status() == "completed")
    target.wait_until("the end", lambda: target.qmp("query-migrate").get("status") == "completed")
    arrived = [target.read(page, PAGE) for page in pages]
    assert arrived == [PATTERN if pushed else bytes(PAGE)] * len(pages)


def test_push_tells_that_the_guest_switched_bus_mastering_off(side: Side) -> None:
    m, control = side
    control.dma_logging_start(PAGE)
    side.transfer(TO_GUEST, RAM)
    m.config_write(m.devfns[0], COMMAND, COMMAND_MEMORY, 2)
    control.migration_set_state(DeviceState.STOP)
    with pytest.raises(CommandError) as refused:
        control.push()
    assert refused.value.errno == errno.ENODEV
    m.config_write(m.devfns[0], COMMAND, COMMAND_MEMORY | 4, 2)  # config space is served in every state
    assert control.push() == 1


def test_pass_and_dummy(side: Side) -> None:
    m, control = side
    m.writel(EDU_BAR + LIVENESS, 1)
    control.migration_set_state(DeviceState.STOP)
    assert m.readl(EDU_BAR) == ID
    control.set_access(AccessMode.DUMMY)
    assert m.readl(EDU_BAR) == 0
    m.writel(EDU_BAR + LIVENESS, 2)
    assert int(m.qmp("human-monitor-command", **{"command-line": f"xp /1xw {EDU_BAR:#x}"}).split()[-1], 16) == 0
    assert m.config_read(m.devfns[0], 0) == 0x11E8_1234
    control.migration_set_state(DeviceState.RUNNING)
    assert m.readl(EDU_BAR + LIVENESS) == 0xFFFF_FFFE


def test_hold(side: Side) -> None:
    """A read that nobody answers holds QEMU's main loop up until the device runs again; nothing is lost."""
    m, control = side
    control.set_access(AccessMode.HOLD)
    control.migration_set_state(DeviceState.STOP)
    m.writel(EDU_BAR + LIVENESS, 2)  # posted
    read: list[int] = []
    reader = threading.Thread(target=lambda: read.append(m.readl(EDU_BAR + LIVENESS)))
    reader.start()
    while control.status().held < 2:
        assert reader.is_alive()
    assert not read
    control.migration_set_state(DeviceState.RUNNING)
    reader.join(TIMEOUT)
    assert read == [0xFFFF_FFFD]
    assert control.status().held == 0
