"""A machine without a guest moves from one real QEMU to another with its devices, and nothing is lost on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from vfio_user import Bar, Device
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.errors import MigrationError
from vfio_user.live.qemu import DevicePair, EndedMonitor, QemuMigration
from vfio_user.live.report import Status, Step
from vfio_user.testing.qtest import QtestMachine
from vfio_user.wire.constants import DeviceState

from .migrate_support import (
    BAR,
    BUFFER,
    FROM_GUEST,
    INCOMING,
    LIVENESS,
    PAGE,
    TO_GUEST,
    Bench,
    Side,
    dma,
    live,
    machines,
)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

PATTERN = bytes(range(256)) * (PAGE // 256)
TARGET = 0x20_0000


@pytest.fixture
def bench(qemu: Path, tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as servers, machines(qemu) as start:
        yield Bench(servers, start, tmp_path)


@pytest.fixture
def pair(bench: Bench) -> tuple[Side, Side]:
    """A guest with an edu that it has used, and where it can go."""
    source = bench.side("s", [Edu()])
    destination = bench.side("d", [Edu()], extra_args=INCOMING)
    use(source.machine)
    return source, destination


def use(machine: QtestMachine, slot: int = 0, bar: int = BAR) -> None:
    machine.map_bar(machine.devfns[slot], 0, bar)
    machine.writel(bar + LIVENESS, 0x1234_5678)
    machine.write(0x10_0000, PATTERN)
    dma(machine, 0x10_0000, BUFFER, PAGE, FROM_GUEST, bar)


def moved_whole(machine: QtestMachine, bar: int = BAR) -> bool:
    """Whether an edu that was used has its registers and its buffer, and goes on working."""
    if machine.readl(bar + LIVENESS) != ~0x1234_5678 & 0xFFFF_FFFF:
        return False
    dma(machine, BUFFER, 0x30_0000, PAGE, TO_GUEST, bar)
    return machine.read(0x30_0000, PAGE) == PATTERN and live(machine, 0x77, bar)


def at(job: Callable[[], QemuMigration], moment: str, action: Callable[[], None]) -> Callable[[], None]:
    """Calls ``action``, once, when a migration comes to a step, or is done with a part of the downtime."""
    done: list[str] = []

    def check() -> None:
        report = job().report
        if not done and moment in (report.step, *report.causes):
            done.append(moment)
            action()

    return check


def test_a_machine_moves_with_its_device_and_the_pages_that_it_wrote(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    job = bench.migration(source, destination)
    for _ in job.run():
        dma(source.machine, BUFFER, TARGET, PAGE, TO_GUEST)  # into pages that QEMU has sent already
    assert destination.machine.read(TARGET, PAGE) == PATTERN
    assert moved_whole(destination.machine)
    assert destination.runs
    assert not source.runs
    assert job.report.status is Status.COMPLETED
    assert set(job.report.causes) == {"stop", "push", "save", "switch", "load", "programming", "start"}


def test_without_the_push_those_pages_are_lost(
    bench: Bench, pair: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfio_user.live.qemu.handover.SourceDevice.push", lambda *_: 0)
    source, destination = pair
    for _ in bench.migration(source, destination).run():
        dma(source.machine, BUFFER, TARGET, PAGE, TO_GUEST)
    assert destination.machine.read(TARGET, PAGE) == bytes(PAGE)


def test_a_destination_that_was_started_without_s_waits_all_the_same(bench: Bench) -> None:
    source = bench.side("s", [Edu()])
    destination = bench.side("d", [Edu()], extra_args=["-incoming", "defer"])
    use(source.machine)
    seen = []
    job = bench.migration(source, destination, check=at(lambda: job, "switch", lambda: seen.append(destination.runs)))
    list(job.run())
    assert seen == [False]
    assert destination.runs


def test_a_paused_guest_stays_paused(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    source.machine.qmp("stop")
    list(bench.migration(source, destination).run())
    assert not destination.runs
    assert moved_whole(destination.machine)


def test_a_guest_that_is_paused_during_the_pre_copy_stays_paused(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    source.machine.write(0x100_0000, os.urandom(1 << 20))
    pause = at(lambda: job, "pre-copy", lambda: source.machine.qmp("stop"))
    job = bench.migration(source, destination, check=pause, bandwidth=2 << 20)
    list(job.run())
    assert not destination.runs
    assert moved_whole(destination.machine)


def test_with_force_the_guest_stands_still_however_long_it_takes(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    source.machine.write(0x100_0000, os.urandom(1 << 20))
    done: list[bool] = []

    def make_dirty() -> None:
        ram = source.machine.qmp("query-migrate").get("ram", {})
        if not done and ram.get("transferred", 0) > 1 << 16:
            done.append(True)
            source.machine.write(0x40_0000, os.urandom(5 << 20))

    options = {"force": True, "max_passes": 1, "downtime": 0.0, "bandwidth": 3 << 19, "timeout": 1.0}
    job = bench.migration(source, destination, check=make_dirty, **options)
    list(job.run())
    assert job.report.causes["stop"] > 1.0, job.report
    assert moved_whole(destination.machine)


def test_two_devices_are_told_apart_whatever_the_order(bench: Bench) -> None:
    source = bench.side("s", [Edu(), Edu()])
    destination = bench.side("d", [Edu(), Edu()], extra_args=INCOMING)
    for slot, bar in enumerate((BAR, BAR + 0x100_0000)):
        use(source.machine, slot, bar)
    source.machine.writel(BAR + 0x100_0000 + LIVENESS, 0x55)
    pairs = bench.pairs(source, destination)[::-1]
    list(bench.migration(source, destination, pairs=pairs).run())
    assert destination.machine.readl(BAR + LIVENESS) == ~0x1234_5678 & 0xFFFF_FFFF
    assert destination.machine.readl(BAR + 0x100_0000 + LIVENESS) == ~0x55 & 0xFFFF_FFFF


def test_the_guest_is_between_the_two_ports_of_config_space(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    source.machine.outl(0xCF8, 0x8000_0810)
    list(bench.migration(source, destination).run())
    assert destination.machine.inl(0xCF8) == 0x8000_0810
    assert destination.machine.inl(0xCFC) == BAR


def test_bus_mastering_that_was_switched_off_hides_no_page(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    for _ in bench.migration(source, destination).run():
        dma(source.machine, BUFFER, TARGET, PAGE, TO_GUEST)
        source.machine.enable(source.machine.devfns[0], bus_master=False)
    assert destination.machine.read(TARGET, PAGE) == PATTERN
    assert destination.machine.config_read(destination.machine.devfns[0], 4, 2) & 7 == 3


def test_an_interrupt_that_stands_stands_there_too_and_goes(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    for side in pair:
        side.machine.irq_intercept_in()
    source.machine.writel(BAR + 0x60, 1)
    line = _line_of(source.machine)
    list(bench.migration(source, destination).run())
    source.machine.wait_irq(line, level=False)  # else QEMU would hold it for ever at the other side
    destination.machine.wait_irq(line)
    destination.machine.writel(BAR + 0x64, 1)
    destination.machine.wait_irq(line, level=False)


def _line_of(machine: QtestMachine) -> int:
    machine.wait_until("an interrupt", lambda: machine.readl(0x0) is not None and any(machine.irq_levels.values()))
    return next(line for line, level in machine.irq_levels.items() if level and line)


def test_msi_is_programmed_again(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    devfn = source.machine.devfns[0]
    msi = _capability(source.machine, devfn, 0x05)
    for offset, value, width in ((4, 0x50_0000, 4), (8, 0, 4), (12, 0x4321, 2), (2, 0x81, 2)):
        source.machine.config_write(devfn, msi + offset, value, width)
    list(bench.migration(source, destination).run())
    destination.machine.writel(BAR + 0x60, 1)
    destination.machine.wait_until("the message", lambda: destination.machine.readl(0x50_0000) == 0x4321)


def _capability(machine: QtestMachine, devfn: int, wanted: int) -> int:
    at = machine.config_read(devfn, 0x34, 1)
    while at and machine.config_read(devfn, at, 1) != wanted:
        at = machine.config_read(devfn, at + 1, 1)
    assert at
    return at


def test_an_interrupt_that_stands_comes_anew_after_a_failure(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    source.machine.irq_intercept_in()
    source.machine.writel(BAR + 0x60, 1)
    line = _line_of(source.machine)
    job = bench.migration(source, destination, check=at(lambda: job, "load", destination.machine._process.kill))
    with pytest.raises(MigrationError):
        list(job.run())
    source.machine.wait_irq(line)
    source.machine.writel(BAR + 0x64, 1)
    source.machine.wait_irq(line, level=False)


# What fails

MOMENTS = ["pre-copy", "pause", "stop", "push", "save", "switch", "load", "programming"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", ["the destination's server", "the destination's QEMU", "the controller's patience"])
def test_what_dies_at_the_destination_lets_the_source_run_on(
    bench: Bench, pair: tuple[Side, Side], moment: str, victim: str
) -> None:
    source, destination = pair

    def strike() -> None:
        if "server" in victim:
            destination.servers[0].stop()
        elif "QEMU" in victim:
            destination.machine._process.kill()
        else:
            raise KeyboardInterrupt

    job = bench.migration(source, destination, check=at(lambda: job, moment, strike))
    with pytest.raises((MigrationError, KeyboardInterrupt)):
        list(job.run())
    assert job.report.status is Status.FAILED
    assert source.runs
    assert not destination.runs
    assert moved_whole(source.machine)
    assert source.machine.qmp("query-migrate-parameters")["downtime-limit"] == 300


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_source_server_that_dies_ends_it_only_as_long_as_it_is_needed(
    bench: Bench, pair: tuple[Side, Side], moment: str
) -> None:
    source, destination = pair
    job = bench.migration(source, destination, check=at(lambda: job, moment, source.servers[0].stop))
    if MOMENTS.index(moment) >= MOMENTS.index("save"):
        list(job.run())
        assert moved_whole(destination.machine)
        assert not source.runs
    else:
        with pytest.raises(MigrationError):
            list(job.run())
        assert source.runs
        assert not destination.runs


def test_a_source_qemu_that_dies_after_the_switch_is_no_loss(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    job = bench.migration(source, destination, check=at(lambda: job, "switch", source.machine._process.kill))
    list(job.run())
    assert moved_whole(destination.machine)


def test_after_a_failure_the_next_attempt_succeeds(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    job = bench.migration(source, destination, check=at(lambda: job, "load", destination.machine._process.kill))
    with pytest.raises(MigrationError):
        list(job.run())
    second = bench.side("e", [Edu()], extra_args=INCOMING)
    list(bench.migration(source, second).run())
    assert moved_whole(second.machine)
    assert not source.runs
    assert bench.control(source.servers[0]).migration_get_state() is DeviceState.STOP
    assert job.report.step is Step.LOAD


def interrupted(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def test_an_interrupt_when_all_is_done_undoes_nothing(
    bench: Bench, pair: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = pair
    monkeypatch.setattr("vfio_user.live.qemu.migration.Outgoing.release", interrupted)
    job = bench.migration(source, destination)
    with pytest.raises(KeyboardInterrupt):
        list(job.run())
    assert (job.report.status, job.report.error) == (Status.COMPLETED, None)
    assert destination.runs
    assert not source.runs


def test_a_folder_that_cannot_be_removed_undoes_nothing(
    bench: Bench, pair: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = pair
    remove = os.rmdir

    def read_only(path: str, **options: int) -> None:
        if Path(path).name.startswith("vfio-user-"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        remove(path, **options)

    monkeypatch.setattr(os, "rmdir", read_only)
    job = bench.migration(source, destination, keep_source=False)
    list(job.run())
    assert job.report.status is Status.COMPLETED
    assert destination.runs
    assert not source.runs


@pytest.mark.parametrize("moment", ["pre-copy", "pause"])
def test_a_guest_that_is_reset_during_the_pre_copy_is_told(bench: Bench, pair: tuple[Side, Side], moment: str) -> None:
    source, destination = pair
    control = bench.control(source.servers[0])

    def reset() -> None:
        source.machine.qmp("system_reset")
        source.machine.wait_until("the reset", lambda: control.migration_get_state() is DeviceState.RUNNING)

    job = bench.migration(source, destination, check=at(lambda: job, moment, reset))
    with pytest.raises(MigrationError, match=r"device 0 of the source was reset .* try again"):
        list(job.run())
    assert source.runs


KILLED = """
import os, signal, sys
from vfio_user.client.control import ControlClient
from vfio_user.live.qemu import DevicePair, Monitor, QemuMigration

class Mortal(Monitor):
    def execute(self, command, **arguments):
        if command == "cont":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(command, **arguments)

def check():
    if moment in (job.report.step, *job.report.causes):
        os.kill(os.getpid(), signal.SIGKILL)

source, destination, here, there, moment = sys.argv[1:]
pair = DevicePair("edu", ControlClient.connect(here), ControlClient.connect(there))
job = QemuMigration(Monitor("source", source), Mortal("destination", destination), [pair], check=check)
list(job.run())
"""
"""A controller that is killed at a moment, or else where it would let the guest go on at the destination."""


@pytest.mark.parametrize("moment", [*MOMENTS, "the last"])
def test_after_a_controller_was_killed_recover_has_exactly_one_guest_run(
    bench: Bench, pair: tuple[Side, Side], moment: str
) -> None:
    source, destination = pair
    for side in pair:
        side.machine.irq_intercept_in()
    source.machine.writel(BAR + 0x60, 1)
    line = _line_of(source.machine)
    sockets = [source.monitor, destination.monitor, *(side.servers[0].control_path for side in pair)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *sockets, moment], timeout=30, check=False)
    assert killed.returncode == -signal.SIGKILL
    status = bench.migration(source, destination).recover()
    assert (status is Status.COMPLETED) == (moment == "the last")
    alive, other = (destination, source) if moment == "the last" else (source, destination)
    assert alive.runs
    assert not other.runs
    alive.machine.readl(0)  # what the line did before is known now
    alive.machine.wait_irq(line)
    assert moved_whole(alive.machine)


def test_recover_without_a_destination_lets_the_source_run_on(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    sockets = [source.monitor, destination.monitor, *(side.servers[0].control_path for side in pair)]
    subprocess.run([sys.executable, "-c", KILLED, *sockets, "load"], timeout=30, check=False)
    destination.machine.close()
    arguments = ["--from", source.monitor, "--to", destination.monitor, "--recover"]
    arguments += ["--device", f"{source.servers[0].control_path}:{destination.servers[0].control_path}"]
    command = [sys.executable, "-m", "vfio_user", "qemu-migrate", *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert said == "the guest runs at the source\n"
    assert source.runs
    assert moved_whole(source.machine)


def test_recover_after_all_went_well_says_where_the_guest_is(bench: Bench, pair: tuple[Side, Side]) -> None:
    """The source's QEMU has ended."""
    source, destination = pair
    list(bench.migration(source, destination, keep_source=False).run())
    again = QemuMigration(EndedMonitor("source"), bench.monitor("destination", destination), bench.pairs(*pair))
    assert again.recover() is Status.COMPLETED
    assert destination.runs


def test_recover_of_what_is_nowhere_changes_nothing(bench: Bench, pair: tuple[Side, Side]) -> None:
    """A source's name that is mistyped, say, before anything began."""
    source, destination = pair
    mistyped = QemuMigration(EndedMonitor("source"), bench.monitor("destination", destination), bench.pairs(*pair))
    with pytest.raises(MigrationError, match="the source QEMU"):
        mistyped.recover()
    assert source.runs
    assert destination.machine.qmp("query-status")["status"] == "inmigrate"


def test_recover_does_not_believe_that_a_destination_has_ended_which_has_its_devices(
    bench: Bench, pair: tuple[Side, Side]
) -> None:
    source, destination = pair
    list(bench.migration(source, destination).run())
    mistyped = QemuMigration(bench.monitor("source", source), EndedMonitor("destination"), bench.pairs(*pair))
    with pytest.raises(MigrationError, match="a QEMU is connected to the server of device 0 at the destination"):
        mistyped.recover()
    assert destination.runs
    assert not source.runs


# What is refused


class OtherEdu(Edu):
    revision = 0x11


def refused(bench: Bench, source: Side, destination: Side, **options: object) -> str:
    """Why a migration is refused; nothing has changed then."""
    job = bench.migration(source, destination, **options)
    with pytest.raises(MigrationError) as error:
        list(job.run())
    assert job.report.step is Step.CHECK
    assert source.runs
    return str(error.value)


def test_what_does_not_fit_is_refused_before_anything_changes(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, _ = pair
    small = bench.side("small", [Edu()], extra_args=INCOMING, memory=32 << 20)
    assert "start it with -m 67108864B" in refused(bench, source, small)
    running = bench.side("running", [Edu()])
    assert "start it with -incoming defer -S" in refused(bench, source, running)
    empty = bench.side("empty", [], extra_args=INCOMING)
    gpio = bench.side("gpio", [Gpio()], extra_args=INCOMING)
    assert "device 0: at the destination the device cannot migrate" in refused(bench, source, gpio)
    other = bench.side("other", [OtherEdu()], extra_args=INCOMING)
    assert "identity of device 0 differs" in refused(bench, source, other)
    assert other.machine.qmp("query-status")["status"] == "inmigrate"
    pairs = [DevicePair("edu", bench.control(source.servers[0]), bench.control(pair[1].servers[0]))]
    assert "01.0 at the source, none at the destination" in refused(bench, source, empty, pairs=pairs)


def test_a_device_that_was_forgotten_is_named(bench: Bench) -> None:
    source = bench.side("s", [Edu(), Edu()])
    destination = bench.side("d", [Edu(), Edu()], extra_args=INCOMING)
    use(source.machine)
    use(source.machine, 1, BAR + 0x100_0000)
    pairs = bench.pairs(source, destination)
    assert "02.0 would be lost" in refused(bench, source, destination, pairs=pairs[:1])
    twice = [pairs[0], DevicePair("again", pairs[0].source, pairs[0].destination)]
    assert "01.0 is given twice" in refused(bench, source, destination, pairs=twice)
    crossed = [DevicePair("crossed", pairs[0].source, pairs[1].destination), pairs[1]]
    assert "crossed: the destination's control socket is not that of 01.0" in refused(
        bench, source, destination, pairs=crossed
    )


def test_devices_that_cannot_be_told_apart_yet_are_refused(bench: Bench) -> None:
    source = bench.side("s", [Edu(), Edu()])
    destination = bench.side("d", [Edu(), Edu()], extra_args=INCOMING)
    assert "look the same as long as the guest has not set them up" in refused(bench, source, destination)


def test_memory_that_the_devices_do_not_share_is_refused(bench: Bench) -> None:
    source = bench.side("s", [Edu()], anonymous_ram=True)
    destination = bench.side("d", [Edu()], extra_args=INCOMING)
    assert "of the source QEMU is not shared with the devices" in refused(bench, source, destination)


class Messenger(Device):
    """A device that signals by MSI-X."""

    vendor_id, device_id = 0x494F, 0x0C0E
    bars = {0: Bar(PAGE)}
    msix_vectors = 2


def test_a_table_of_messages_that_could_not_be_written_is_found_before_anything_changes(bench: Bench) -> None:
    """A machine without a processor has nothing to debug."""
    source = bench.side("s", [Messenger()])
    destination = bench.side("d", [Messenger()], extra_args=INCOMING)
    devfn = source.machine.devfns[0]
    source.machine.map_bar(devfn, 0, BAR)
    assert bench.migration(source, destination).plan().obstacles == []  # the guest does not use it
    source.machine.config_write(devfn, _capability(source.machine, devfn, 0x11) + 2, 0x8000, 2)
    said = refused(bench, source, destination)
    assert "the MSI-X table of 01.0 cannot be written: the destination QEMU does not start its gdbstub: current" in said
    assert destination.machine.qmp("query-status")["status"] == "inmigrate"
    running = bench.side("r", [Messenger()])  # which a debugger would stop: it is not tried
    assert "table" not in refused(bench, source, running)


def test_a_machine_of_another_version_is_refused(bench: Bench, pair: tuple[Side, Side]) -> None:
    other = bench.side("o", [Edu()], extra_args=["-machine", "pc-q35-10.1,memory-backend=ram", *INCOMING])
    assert "start the destination with -machine pc-q35-11.1" in refused(bench, pair[0], other)


def test_a_name_that_is_too_long_for_a_socket_is_refused(
    bench: Bench, pair: tuple[Side, Side], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert "too long for a socket: name another folder with TMPDIR" in refused(bench, *pair)
    assert bench.migration(*pair, uri="tcp:127.0.0.1:1").plan().obstacles == []


def test_a_way_that_no_qemu_knows_is_refused(bench: Bench, pair: tuple[Side, Side]) -> None:
    assert "foo is no way from one QEMU to another" in refused(bench, *pair, uri="foo")


# Memory that both have


def in_file(file: Path) -> list[str]:
    """A machine's memory."""
    backend = f"memory-backend-file,id=file,size=64M,share=on,mem-path={file}"
    return ["-object", backend, "-machine", "memory-backend=file"]


def test_shared_memory_is_not_copied(bench: Bench, tmp_path: Path) -> None:
    ram = in_file(tmp_path / "ram")
    source = bench.side("s", [Edu()], anonymous_ram=True, extra_args=ram)
    destination = bench.side("d", [Edu()], anonymous_ram=True, extra_args=[*ram, *INCOMING])
    use(source.machine)
    source.machine.write(0x60_0000, PATTERN * 256)
    job = bench.migration(source, destination, shared_memory=True)
    for _ in job.run():
        dma(source.machine, BUFFER, TARGET, PAGE, TO_GUEST)
    assert destination.machine.read(TARGET, PAGE) == PATTERN
    assert destination.machine.read(0x60_0000, PAGE) == PATTERN
    assert moved_whole(destination.machine)
    assert "push" not in job.report.causes
    assert sum(done.memory_bytes for done in job.report.rounds) < 1 << 20


def test_a_guest_that_moved_in_shared_memory_is_copied_the_next_time(bench: Bench, tmp_path: Path) -> None:
    ram, other = in_file(tmp_path / "ram"), in_file(tmp_path / "other")
    source = bench.side("s", [Edu()], anonymous_ram=True, extra_args=ram)
    destination = bench.side("d", [Edu()], anonymous_ram=True, extra_args=[*ram, *INCOMING])
    third = bench.side("e", [Edu()], anonymous_ram=True, extra_args=[*other, *INCOMING])
    use(source.machine)
    before = destination.machine.qmp("query-migrate-capabilities")
    list(bench.migration(source, destination, shared_memory=True).run())
    assert destination.machine.qmp("query-migrate-capabilities") == before
    destination.machine.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
    list(bench.migration(destination, third).run())
    assert moved_whole(third.machine)


@pytest.mark.parametrize("cold", [False, True])
def test_memory_that_both_have_is_not_copied_over_itself(bench: Bench, tmp_path: Path, cold: bool) -> None:
    """The destination would write to it while the guest runs, and the guest would be torn."""
    ram = in_file(tmp_path / "ram")
    source = bench.side("s", [Edu()], anonymous_ram=True, extra_args=ram)
    destination = bench.side("d", [Edu()], anonymous_ram=True, extra_args=[*ram, *INCOMING])
    use(source.machine)
    assert "move it with --shared-memory" in refused(bench, source, destination, cold=cold)


def test_memory_that_is_not_the_same_is_not_taken_for_shared(bench: Bench, pair: tuple[Side, Side]) -> None:
    assert "is in no named file" in refused(bench, *pair, shared_memory=True)


# A guest that stops first


def test_a_cold_move_copies_all_that_a_device_wrote(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    dma(source.machine, BUFFER, TARGET, PAGE, TO_GUEST)
    job = bench.migration(source, destination, cold=True)
    list(job.run())
    assert destination.machine.read(TARGET, PAGE) == PATTERN
    assert moved_whole(destination.machine)
    assert list(job.report.causes) == ["stop", "memory", "save", "switch", "load", "programming", "start"]
    (memory,) = job.report.rounds
    assert memory.stopped
    assert memory.memory_bytes > memory.pages > 0


@pytest.mark.parametrize("moment", ["stop", "memory", "load"])
def test_a_cold_move_that_fails_lets_the_source_run_on(bench: Bench, pair: tuple[Side, Side], moment: str) -> None:
    source, destination = pair
    job = bench.migration(
        source, destination, cold=True, check=at(lambda: job, moment, destination.machine._process.kill)
    )
    with pytest.raises(MigrationError):
        list(job.run())
    assert source.runs
    assert moved_whole(source.machine)


def test_a_guest_with_an_iommu_moves_cold(bench: Bench) -> None:
    iommu = ["-device", "intel-iommu,intremap=off"]
    source = bench.side("s", [Edu()], extra_args=iommu)
    destination = bench.side("d", [Edu()], extra_args=[*iommu, *INCOMING])
    use(source.machine)
    assert "has an IOMMU (intel-iommu)" in refused(bench, source, destination)
    list(bench.migration(source, destination, cold=True).run())
    assert moved_whole(destination.machine)


# By command


def test_the_command_moves_a_guest_and_tells_what_it_cost(
    bench: Bench, pair: tuple[Side, Side], tmp_path: Path
) -> None:
    source, destination = pair
    html = tmp_path / "report.html"
    arguments = ["--from", source.monitor, "--to", destination.monitor, "--json", "--html", html]
    arguments += ["--device", f"{source.servers[0].control_path}:{destination.servers[0].control_path}"]
    command = [sys.executable, "-m", "vfio_user", "qemu-migrate", *map(str, arguments)]
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=30, check=True)
    plan = json.loads(planned.stdout)
    assert ([device["place"] for device in plan["devices"]], plan["obstacles"]) == (["01.0"], [])
    assert source.runs
    moved = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert set(json.loads(moved.stdout)["downtime_causes_ms"]) >= {"stop", "push", "save", "switch", "programming"}
    assert "programming" in html.read_text(encoding="utf-8")
    assert moved.stderr == ""
    assert moved_whole(destination.machine)
    assert not source.runs  # it was told to quit


def test_the_command_refuses_in_one_line(bench: Bench, pair: tuple[Side, Side]) -> None:
    source, destination = pair
    command = [sys.executable, "-m", "vfio_user", "qemu-migrate", "--from", source.monitor, "--to"]
    control = source.servers[0].control_path
    for to, device, reason in (
        (control, f"{control}:{control}", "is it a QMP socket"),
        (destination.monitor, f"{source.servers[0].path}:{control}", "is no control socket"),
        (destination.monitor, f"{control}:nowhere", "nowhere: No such file"),
    ):
        arguments = [*map(str, command), str(to), "--device", device, "--timeout", "1"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert reason in done.stderr
    assert source.runs
