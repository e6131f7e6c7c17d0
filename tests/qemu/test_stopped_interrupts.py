"""A device that a migration has stopped, in a real QEMU: its interrupts wait until it runs again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user import DeviceState
from vfio_user.client.control import AccessMode
from vfio_user.devices.edu import Edu
from vfio_user.testing.qtest import QtestMachine

from .conftest import MachineFactory
from .migrate_support import BAR, Served

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

IRQ_RAISE, IRQ_ACK = 0x60, 0x64


@pytest.fixture
def edu(tmp_path: Path) -> Iterator[Served]:
    """Name it before ``machine``: QEMU must be gone before its server stops."""
    with Served(Edu(), tmp_path, "edu") as served:
        yield served


def raised(machine: QtestMachine) -> list[int]:
    """The lines that are up, but for the timer's."""
    return [line for line, up in machine.irq_levels.items() if up and line]


@pytest.mark.parametrize("state", [DeviceState.STOP, DeviceState.STOP_COPY])
def test_a_line_that_was_lowered_stays_down_until_the_device_runs(
    edu: Served, machine: MachineFactory, state: DeviceState
) -> None:
    """QEMU lowers it, and says so, at any access to a BAR; a guest that has moved must not find it up for ever."""
    m = machine([edu.path])
    m.map_bar(m.devfns[0], 0, BAR)
    m.irq_intercept_in()
    m.writel(BAR + IRQ_RAISE, 1)
    m.wait_until("the interrupt", lambda: m.readl(0) is not None and bool(raised(m)))
    (line,) = raised(m)
    with edu.control() as control:
        control.set_access(AccessMode.HOLD)
        control.migration_set_state(state)
        control.set_access(AccessMode.DUMMY)
        m.qmp("human-monitor-command", **{"command-line": f"xp /1xw {BAR:#x}"})
        for _ in range(2):  # round trips to QEMU and to the device, in which it could come again
            m.wait_irq(line, level=False)
            control.migration_get_state()
            m.config_read(m.devfns[0], 0, 4)
        assert not m.irq_levels[line]
        control.migration_set_state(DeviceState.RUNNING)
        control.set_access(AccessMode.PASS)
        m.wait_irq(line)
        m.writel(BAR + IRQ_ACK, 1)
        m.wait_irq(line, level=False)
