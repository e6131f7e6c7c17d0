"""A QEMU moves with devices whose servers know nothing of control sockets: proxies before them do."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.proxy_support import Strict
from vfio_user.devices.edu import Edu
from vfio_user.errors import MigrationError
from vfio_user.live.report import Status
from vfio_user.testing.linux import Guest

from . import migrate_support, test_qemu_migrate, travel_support
from .conftest import Compiler
from .migrate_support import BAR, BUFFER, INCOMING, PAGE, TO_GUEST, Bench, Side, dma
from .proxy_support import Proxied, ProxiedByCommand
from .test_qemu_migrate import PATTERN, TARGET, at, moved_whole, use
from .test_qemu_migrate_linux import EduGuest, WatchedEdu
from .travel_support import Travels, keep_moving

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

bench, pair = test_qemu_migrate.bench, test_qemu_migrate.pair


@pytest.fixture(autouse=True)
def _proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (migrate_support, travel_support):
        monkeypatch.setattr(module, "Served", Proxied)


def test_a_machine_moves_with_its_device_and_the_pages_that_it_wrote(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    job = bench.migration(source, destination)
    for _ in job.run():
        dma(source.machine, BUFFER, TARGET, PAGE, TO_GUEST)  # into pages that QEMU has sent already
    assert destination.machine.read(TARGET, PAGE) == PATTERN
    assert moved_whole(destination.machine)
    assert (source.runs, destination.runs, job.report.status) == (False, True, Status.COMPLETED)


def test_a_server_that_takes_little_while_it_stands_moves_too(bench: Bench) -> None:
    """It refuses what libvfio-user refuses in STOP and STOP_COPY; the interrupt stands while it moves."""
    source = bench.side("s", [Strict(Edu())])
    destination = bench.side("d", [Strict(Edu())], extra_args=INCOMING)
    for side in (source, destination):
        side.machine.irq_intercept_in()
    use(source.machine)
    source.machine.writel(BAR + 0x60, 1)
    source.machine.wait_until("an interrupt", lambda: source.machine.readl(0x0) is not None and bool(lines(source)))
    (line,) = lines(source)
    for _ in bench.migration(source, destination).run():
        dma(source.machine, BUFFER, TARGET, PAGE, TO_GUEST)
    destination.machine.wait_irq(line)
    destination.machine.writel(BAR + 0x64, 1)
    destination.machine.wait_irq(line, level=False)
    assert destination.machine.read(TARGET, PAGE) == PATTERN
    assert moved_whole(destination.machine)


def lines(side: Side) -> list[int]:
    """The interrupt lines that are up, but the timer's."""
    return [line for line, level in side.machine.irq_levels.items() if level and line]


@pytest.mark.parametrize("moment", ["pre-copy", "push", "load", "programming"])
def test_a_server_that_dies_behind_its_proxy_leaves_one_guest(
    bench: Bench, pair: tuple[Side, Side], moment: str
) -> None:
    source, destination = pair
    (behind,) = destination.servers
    assert isinstance(behind, Proxied)
    job = bench.migration(source, destination, check=at(lambda: job, moment, behind.upstream.stop))
    with pytest.raises(MigrationError):
        list(job.run())
    assert (source.runs, destination.runs) == (True, False)
    assert moved_whole(source.machine)


def test_servers_proxies_and_the_controller_are_programs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(migrate_support, "Served", ProxiedByCommand)
    source, destination = bench.side("s", [Edu()]), bench.side("d", [Edu()], extra_args=INCOMING)
    use(source.machine)
    control = source.servers[0].control_path
    said = command("info", control)
    assert "1234:11e8" in said
    assert command("read", control, "bar0+4:u32") == "bar0+0x4:u32 = 0xedcba987\n"
    command("save", control, tmp_path / "saved")
    pair = f"{control}:{destination.servers[0].control_path}"
    command("qemu-migrate", "--from", source.monitor, "--to", destination.monitor, "--device", pair)
    assert moved_whole(destination.machine)


def command(*arguments: object) -> str:
    words = [sys.executable, "-m", "vfio_user", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


def test_linux_moves_there_and_back_while_it_uses_the_device(
    qemu: Path, guest: Guest, compiled: Compiler, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        world = Travels(stack, qemu, guest, tmp_path, [WatchedEdu])
        keep_moving(EduGuest(world, compiled, behind_port=False), hops=2)
