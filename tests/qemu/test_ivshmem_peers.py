"""ivshmem between two QEMUs without guests: memory that both have, and messages that interrupt the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfio_user.devices.ivshmem import Group, Ivshmem
from vfio_user.testing.qtest import QtestMachine

from .conftest import serving

pytestmark = pytest.mark.qemu

REGISTER_BAR, TABLE_BAR, MEMORY_BAR = 0xE000_0000, 0xE010_0000, 0x8_0000_0000
POSITION, DOORBELL = REGISTER_BAR + 8, REGISTER_BAR + 12
CAPABILITIES, MSIX, MSIX_ENABLE = 0x34, 0x11, 0x8000
INBOX = 0x10_0000
"""Where in RAM the messages of MSI-X arrive, 16 bytes for each vector."""
MIB, VECTORS = 1 << 20, 3


def map_all(m: QtestMachine) -> None:
    """Map the device's BARs, and have its vectors write ``0x100 + vector`` into RAM."""
    (devfn,) = m.devfns
    for bar, address in enumerate((REGISTER_BAR, TABLE_BAR, MEMORY_BAR)):
        m.map_bar(devfn, bar, address)
    for vector in range(VECTORS):
        for at, value in ((0, INBOX + 16 * vector), (4, 0), (8, 0x100 + vector), (12, 0)):
            m.writel(TABLE_BAR + 16 * vector + at, value)
    at = m.config_read(devfn, CAPABILITIES, 1)
    while m.config_read(devfn, at, 1) != MSIX:
        at = m.config_read(devfn, at + 1, 1)
    m.config_write(devfn, at + 2, MSIX_ENABLE, 2)


def wait_message(m: QtestMachine, vector: int) -> None:
    m.wait_until(f"message {vector}", lambda: m.readl(INBOX + 16 * vector) == 0x100 + vector)
    m.writel(INBOX + 16 * vector, 0)


def messages(m: QtestMachine) -> list[int]:
    return [vector for vector in range(VECTORS) if m.readl(INBOX + 16 * vector)]


def test_two_qemus_share_memory_and_ring_each_other(tmp_path: Path, qemu: Path) -> None:
    group = Group()
    with serving(tmp_path) as serve:
        paths = [serve(Ivshmem(group=group, size=MIB, vectors=VECTORS)) for _ in range(2)]
        with QtestMachine(qemu, [paths[0]]) as a, QtestMachine(qemu, [paths[1]]) as b:
            for m in (a, b):
                map_all(m)
            assert [m.readl(POSITION) for m in (a, b)] == [0, 1]
            for round_ in range(10):
                vector = round_ % VECTORS
                data = bytes([round_]) * 4000
                a.write(MEMORY_BAR + 5, data)
                a.writel(DOORBELL, 1 << 16 | vector)
                wait_message(b, vector)
                assert b.read(MEMORY_BAR + 5, len(data)) == data
                b.writeq(MEMORY_BAR + MIB - 8, ~round_ & (1 << 64) - 1)
                b.writel(DOORBELL, vector)
                wait_message(a, vector)
                assert a.readq(MEMORY_BAR + MIB - 8) == ~round_ & (1 << 64) - 1
            a.writel(DOORBELL, 2 << 16)  # nobody
            a.writel(DOORBELL, 1 << 16 | VECTORS)
            a.writel(DOORBELL, 1 << 16 | 2)
            wait_message(b, 2)
            assert [messages(m) for m in (a, b)] == [[], []]


def test_a_qemu_that_comes_later_finds_memory_and_rings_of_before(tmp_path: Path, qemu: Path) -> None:
    group = Group()
    with serving(tmp_path) as serve:
        paths = [serve(Ivshmem(group=group, size=MIB, vectors=VECTORS)) for _ in range(2)]
        with QtestMachine(qemu, [paths[0]]) as a:
            map_all(a)
            for round_ in range(3):
                a.writel(MEMORY_BAR, round_ + 1)
                with QtestMachine(qemu, [paths[1]]) as b:
                    map_all(b)
                    assert (b.readl(POSITION), b.readl(MEMORY_BAR)) == (1, round_ + 1)
                    a.writel(DOORBELL, 1 << 16 | round_)
                    wait_message(b, round_)
                a.writel(DOORBELL, 1 << 16)  # nobody is there
                assert a.readl(POSITION) == 0
