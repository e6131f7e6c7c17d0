"""Machines of older kinds move, and from one version of QEMU to another.

``VFIO_USER_QEMUS`` in the environment: other QEMUs than the one that all tests run with, by their paths with ``:``
between them. Each of these moves to itself, and from and to that one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from vfio_user.devices.edu import Edu
from vfio_user.testing.linux import Guest
from vfio_user.testing.qemu import QemuError
from vfio_user.testing.qtest import QtestMachine

from .disk_support import linux_with_disk, read_disk, write_disk
from .migrate_support import BAR, BUFFER, INCOMING, PAGE, TO_GUEST, Bench, Side, dma
from .nvme_support import MIB, complaints, create_image
from .test_qemu_migrate import PATTERN, TARGET, moved_whole, use

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

OLDER = ("pc-q35-11.0", "pc-q35-10.2", "pc-q35-10.1", "pc-q35-10.0")
OTHERS = [path for path in os.environ.get("VFIO_USER_QEMUS", "").split(":") if path]
OURS = "ours"
PAIRS = [pair for other in OTHERS for pair in ((other, other), (OURS, other), (other, OURS))]
WAYS: dict[str, dict[str, Any]] = {"live": {}, "cold": {"cold": True}, "shared memory": {"shared_memory": True}}
PATIENCE = 60.0
MSI, MSI_ADDRESS, MSI_DATA = 0x40, 0x50_0000, 0x4321

Start = Callable[..., Side]
needs_others = pytest.mark.skipif(not OTHERS, reason="VFIO_USER_QEMUS names no other QEMUs")
for_each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-to-".join(Path(path).name for path in pair))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[[Path], Bench]]:
    """Starts machines of a QEMU."""
    with ExitStack() as servers, ExitStack() as machines:

        def with_qemu(qemu: Path) -> Bench:
            def start(*arguments: Any, **options: Any) -> QtestMachine:
                machine = QtestMachine(qemu, *arguments, **options)
                machines.callback(end, machine)
                return machine

            return Bench(servers, start, tmp_path)

        yield with_qemu


def end(machine: QtestMachine) -> None:
    with suppress(QemuError):  # it has ended already
        machine.close()


def chosen(pair: tuple[str, str], qemu: Path) -> list[Path]:
    return [qemu if path == OURS else Path(path) for path in pair]


def move(source: Side, destination: Side, bench: Bench, **options: Any) -> None:
    """Move an edu that works and has MSI set up; nothing of that is lost."""
    machine = source.machine
    use(machine)
    for offset, value, width in ((4, MSI_ADDRESS, 4), (8, 0, 4), (12, MSI_DATA, 2), (2, 0x81, 2)):
        machine.config_write(machine.devfns[0], MSI + offset, value, width)
    dma(machine, BUFFER, TARGET, PAGE, TO_GUEST)
    list(bench.migration(source, destination, **options).run())
    arrived = destination.machine
    assert destination.runs
    assert not source.runs
    assert moved_whole(arrived)
    assert arrived.read(TARGET, PAGE) == PATTERN
    arrived.writel(BAR + 0x60, 1)
    arrived.wait_until("the message", lambda: arrived.readl(MSI_ADDRESS) == MSI_DATA)


@pytest.mark.parametrize("kind", OLDER)
def test_a_machine_of_another_kind_moves(bench: Callable[[Path], Bench], qemu: Path, kind: str) -> None:
    with_qemu, args = bench(qemu), ["-machine", f"{kind},memory-backend=ram"]
    source = with_qemu.side("s", [Edu()], extra_args=args)
    move(source, with_qemu.side("d", [Edu()], extra_args=[*args, *INCOMING]), with_qemu)


@needs_others
@for_each_pair
@pytest.mark.parametrize("way", WAYS)
def test_a_machine_moves_to_another_version(
    bench: Callable[[Path], Bench], qemu: Path, pair: tuple[str, str], way: str, tmp_path: Path
) -> None:
    here, there = map(bench, chosen(pair, qemu))
    shared = way == "shared memory"
    file = f"memory-backend-file,id=file,size=64M,share=on,mem-path={tmp_path / 'ram'}"
    args = ["-object", file, "-machine", "memory-backend=file"] if shared else []
    options = {"anonymous_ram": shared}
    source = here.side("s", [Edu()], extra_args=args, **options)
    move(source, there.side("d", [Edu()], extra_args=[*args, *INCOMING], **options), here, **WAYS[way])


@needs_others
@for_each_pair
def test_linux_moves_to_another_version_with_its_disk(
    qemu: Path, guest: Guest, pair: tuple[str, str], tmp_path: Path
) -> None:
    """MSI-X, by the gdbstub."""
    image, (here, there) = create_image(tmp_path / "disk.img", 16 * MIB), chosen(pair, qemu)
    with (
        linux_with_disk(here, guest, tmp_path, "a", image) as linux,
        linux_with_disk(there, guest, tmp_path, "b", image, arriving=True) as arrived,
    ):
        written = write_disk(linux)
        command = [sys.executable, "-m", "vfio_user", "qemu-migrate", "--from", "a.qmp", "--to", "b.qmp"]
        subprocess.run([*command, "--device", "a0.ctl:b0.ctl"], cwd=tmp_path, check=True, timeout=PATIENCE)
        assert read_disk(arrived) == written
        assert complaints(linux.console + arrived.console) == []
