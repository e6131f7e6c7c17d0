"""What a device wrote arrives though QEMU maps its memory anew while the guest moves, or the guest does not move."""

from __future__ import annotations

import pytest

from vfio_user.devices.edu import Edu
from vfio_user.errors import MigrationError
from vfio_user.live.report import Status, Step
from vfio_user.testing.qtest import QtestMachine

from . import migrate_support, test_qemu_migrate
from .migrate_support import BUFFER, INCOMING, PAGE, TO_GUEST, Bench, Served, Side, dma
from .proxy_support import Proxied
from .test_qemu_migrate import PATTERN, TARGET, at, moved_whole, use

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

bench = test_qemu_migrate.bench

BIOS = 0xF0000
ROM, RAM = 0x00, 0x30


def pam(machine: QtestMachine, what: int) -> None:
    """Have ROM or RAM at BIOS (PAM0 of the host bridge of a Q35): QEMU merges RAM there with its neighbours."""
    machine.outl(0xCF8, 0x8000_0090)
    machine.outb(0xCFC, what)


@pytest.fixture(params=[Served, Proxied], ids=["served", "proxied"])
def pair(request: pytest.FixtureRequest, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> tuple[Side, Side]:
    monkeypatch.setattr(migrate_support, "Served", request.param)
    source = bench.side("s", [Edu()])
    use(source.machine)
    return source, bench.side("d", [Edu()], extra_args=INCOMING)


def test_marks_survive_that_regions_are_split_and_merged(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    machine, job = source.machine, bench.migration(source, destination)
    for _ in job.run():
        dma(machine, BUFFER, TARGET, PAGE, TO_GUEST)  # into pages that QEMU has sent already
        for what in (RAM, ROM, RAM):
            pam(machine, what)
            if what == RAM:
                dma(machine, BUFFER, BIOS, PAGE, TO_GUEST)
    assert job.report.status is Status.COMPLETED
    assert destination.machine.read(TARGET, PAGE) == PATTERN
    assert destination.machine.read(BIOS, PAGE) == PATTERN
    assert moved_whole(destination.machine)


def test_a_guest_does_not_move_without_what_was_written_to_memory_that_is_gone(
    bench: Bench, pair: tuple[Side, Side]
) -> None:
    source, destination = pair

    def write_and_unmap() -> None:
        pam(source.machine, RAM)
        dma(source.machine, BUFFER, BIOS, PAGE, TO_GUEST)
        pam(source.machine, ROM)

    job = bench.migration(source, destination, check=at(lambda: job, Step.PRE_COPY, write_and_unmap))
    with pytest.raises(MigrationError, match="not mapped any more: move it with --cold"):
        list(job.run())
    assert (source.runs, destination.runs) == (True, False)
    other = bench.side("c", [Edu()], extra_args=INCOMING)
    list(bench.migration(source, other, cold=True).run())
    pam(other.machine, RAM)
    assert other.machine.read(BIOS, PAGE) == PATTERN
