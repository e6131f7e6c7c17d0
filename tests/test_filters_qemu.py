"""What a real QEMU makes of a device in filters: it reads all ones, works on, or does not start."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user.devices.edu import Edu
from vfio_user.filters import Filter, Stats, apply_filters, trace
from vfio_user.testing.qemu import find_qemu
from vfio_user.testing.qtest import QemuError, QtestMachine

from .device_support import serving

pytestmark = pytest.mark.qemu

BAR = 0xE000_0000
ID, LIVENESS = 0x00, 0x04
ONES, IDENTIFICATION, WRITTEN = 0xFFFFFFFF, 0x010000ED, 0x12345678


@pytest.fixture(scope="module")
def qemu() -> Path:
    found = find_qemu()
    if found is None:
        required = os.environ.get("CI") == "true" or os.environ.get("VFIO_USER_REQUIRE_QEMU") == "1"
        (pytest.fail if required else pytest.skip)("no QEMU with vfio-user-pci: run scripts/fetch_qemu.py")
    return found


@contextlib.contextmanager
def machine(qemu: Path, *specs: str) -> Iterator[tuple[QtestMachine, list[Filter]]]:
    """A machine with a filtered edu in it, its BAR mapped."""
    device, filters = apply_filters(Edu(), specs)
    with serving(device) as path, QtestMachine(qemu, [path]) as m:
        m.map_bar(m.devfns[0], 0, BAR)
        yield m, filters


def used(m: QtestMachine) -> tuple[int, int]:
    """What the registers read after one was written: its complement is what it reads as."""
    m.writel(BAR + LIVENESS, WRITTEN)
    return m.readl(BAR + LIVENESS), m.readl(BAR + ID)


@pytest.mark.parametrize(
    ("spec", "liveness"),
    [
        ("delay:all=1ms,jitter=1ms", WRITTEN ^ ONES),
        ("trap", WRITTEN ^ ONES),
        ("readonly", 0),
        ("readonly:config=yes", 0),
        ("error:region_write=100%,region=bar0", 0),
        ("error:dma_map=100%", WRITTEN ^ ONES),
        ("error:dma_unmap=100%", WRITTEN ^ ONES),
        ("error:reset=100%", WRITTEN ^ ONES),
        ("error:device_feature=100%", WRITTEN ^ ONES),
    ],
)
def test_qemu_lives_with(qemu: Path, spec: str, liveness: int) -> None:
    with machine(qemu, spec) as (m, _):
        assert [used(m) for _ in range(3)] == [(liveness, IDENTIFICATION)] * 3


def test_a_read_that_is_refused_reads_all_ones(qemu: Path) -> None:
    with machine(qemu, "stats", "error:region_read=50%,region=bar0,seed=1") as (m, (stats, _)):
        assert isinstance(stats, Stats)
        refused = stats.summary()["region_read"].errors
        read = [m.readl(BAR + ID) for _ in range(20)]
        assert set(read) == {ONES, IDENTIFICATION}
        assert read.count(ONES) == stats.summary()["region_read"].errors - refused


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("error:set_irqs=100%", "Failed to set up TRIGGER eventfd"),
        ("error:region_read=100%,region=config", "failed to read device config space"),
    ],
)
def test_qemu_does_not_start_with(qemu: Path, spec: str, says: str) -> None:
    with pytest.raises(QemuError, match=says), machine(qemu, spec):
        pass


def test_a_trace_of_qemu(qemu: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, trace.LOGGER)
    with machine(qemu, "trace") as (m, _):
        used(m)
    lines = [record.getMessage().rpartition(",")[0] for record in caplog.records if record.name == trace.LOGGER]
    assert lines[0] == "Edu connected"
    assert lines[-1] == "Edu disconnected"
    assert "Edu region_write bar0+0x4:u32 liveness = 0x12345678" in lines
    assert "Edu region_read bar0+0x4:u32 liveness = 0xedcba987" in lines
    assert "Edu reset" in lines
    assert "Edu set_irqs intx 0+1 DATA_EVENTFD|ACTION_TRIGGER" in lines
    assert any(line.startswith("Edu dma_map ") and "READ|WRITE fd" in line for line in lines)
