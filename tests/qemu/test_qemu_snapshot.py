"""A machine without a guest is saved from a real QEMU with its devices, and restored in others, as it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from vfio_user import Bar, Device, DeviceState, ServerBackend
from vfio_user.client.control import ControlClient
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.devices.nvme import Nvme
from vfio_user.errors import CallTimeoutError, MigrationError
from vfio_user.live import UnconfirmedError
from vfio_user.live.qemu import LateError, Monitor, QemuRestore, QemuSave, ServedDevice
from vfio_user.live.qemu.snapshot_files import MANIFEST, MANIFEST_SUM, MEMORY, SnapshotWriter
from vfio_user.live.report import Status
from vfio_user.pci import PcieEndpoint, PowerManagement, VendorSpecific
from vfio_user.pci.capabilities import EXTENDED_CONFIG_SIZE
from vfio_user.pci.express import AdvancedErrorReporting, VendorSpecificExtended
from vfio_user.testing.linux import Guest, LinuxMachine
from vfio_user.testing.qtest import QtestMachine
from vfio_user.wire.constants import PciRegion

from .conftest import Compiler
from .migrate_support import (
    BAR,
    BUFFER,
    INCOMING,
    LIVENESS,
    PAGE,
    TIMEOUT,
    TO_GUEST,
    Bench,
    Served,
    Side,
    dma,
    machines,
    qmp_args,
)
from .test_qemu_migrate import PATTERN, TARGET, OtherEdu, _capability, _line_of, moved_whole, use
from .travel_support import ArrivingLinux

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

COMMAND = [sys.executable, "-m", "vfio_user"]
PATIENCE = 60.0
COMPLAINTS = ("BUG", "WARNING", "nobody cared", "hung_task", "I/O error", "Call Trace", "timeout")


class World(Bench):
    """Machines to save and to restore."""

    def __init__(self, stack: ExitStack, machine: Callable[..., QtestMachine], folder: Path) -> None:
        super().__init__(stack, machine, folder)
        self.folder = folder / "snapshot"
        self._count = 0

    def source(self, *devices: ServerBackend, **options: Any) -> Side:
        """A guest that has used its edus."""
        side = self.side("s", devices or [Edu()], **options)
        for slot, address in enumerate(side.machine.devfns):
            assert address
            use(side.machine, slot, BAR + slot * 0x100_0000)
        return side

    def destination(self, *devices: ServerBackend, **options: Any) -> Side:
        """Where a guest can go."""
        self._count += 1
        extra = [*options.pop("extra_args", ()), *INCOMING]
        return self.side(f"d{self._count}-", devices or [Edu()], extra_args=extra, **options)

    def devices(self, side: Side) -> list[ServedDevice]:
        return [ServedDevice(f"device {number}", self.control(one)) for number, one in enumerate(side.servers)]

    def save(self, side: Side, **options: Any) -> QemuSave:
        return QemuSave(
            self.monitor("source", side),
            options.pop("devices", None) or self.devices(side),
            options.pop("folder", self.folder),
            **{"timeout": TIMEOUT, **options},
        )

    def restore(self, side: Side, **options: Any) -> QemuRestore:
        devices = options.pop("devices", None) or self.devices(side)
        return QemuRestore(self.monitor("destination", side), devices, self.folder, **{"timeout": TIMEOUT, **options})

    @property
    def leftovers(self) -> list[str]:
        """What there is beside sockets."""
        here = self.folder.parent
        return sorted(one.name for one in here.iterdir() if not one.is_socket() and one.name != "run.py")


@pytest.fixture
def world(qemu: Path, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as servers, machines(qemu) as start:
        yield World(servers, start, tmp_path)


def at(job: Callable[[], QemuSave | QemuRestore], moment: str, action: Callable[[], object]) -> Callable[[], None]:
    """Calls ``action``, once, when a step begins, or a part of the standstill is over."""
    done: list[str] = []

    def check() -> None:
        report = job().report
        if not done and moment in (report.step, *report.causes):
            done.append(moment)
            action()

    return check


def interrupt() -> None:
    raise KeyboardInterrupt


# What goes well


def test_a_guest_is_saved_goes_on_and_is_restored_as_often_as_one_likes(world: World) -> None:
    source = world.source()
    dma(source.machine, BUFFER, TARGET, PAGE, TO_GUEST)
    job = world.save(source)
    job.run()
    assert source.runs
    assert job.report.status is Status.COMPLETED
    assert list(job.report.causes) == ["stop", "save", "memory", "start"]
    assert job.report.memory_bytes == (world.folder / MEMORY).stat().st_size
    source.machine.write(TARGET, bytes(PAGE))
    source.machine.writel(BAR + LIVENESS, 0)  # the snapshot is not the source's any more
    for _ in range(2):
        destination = world.destination()
        restored = world.restore(destination)
        restored.run()
        assert destination.runs
        assert destination.machine.read(TARGET, PAGE) == PATTERN
        assert moved_whole(destination.machine)
        assert list(restored.report.causes) == ["memory", "load", "programming", "start"]
    assert source.runs


def test_only_its_owner_may_read_it_and_nothing_else_is_left(world: World) -> None:
    previous = os.umask(0)
    try:
        world.save(world.source()).run()
    finally:
        os.umask(previous)
    assert world.leftovers == ["snapshot"]
    assert stat.S_IMODE(world.folder.stat().st_mode) == 0o700
    found = {one.name: stat.S_IMODE(one.stat().st_mode) for one in world.folder.iterdir()}
    names = [MANIFEST, MANIFEST_SUM, MEMORY, "device-0.config", "device-0.msix", "device-0.state"]
    assert found == dict.fromkeys(sorted(names), 0o600)
    subprocess.run(["sha256sum", "--quiet", "-c", MANIFEST_SUM], cwd=world.folder, timeout=30, check=True)


def test_the_sources_settings_are_as_they_were(world: World) -> None:
    source = world.source()
    enabled = [{"capability": name, "state": True} for name in ("multifd", "x-ignore-shared")]
    source.machine.qmp("migrate-set-capabilities", capabilities=enabled)
    source.machine.qmp("migrate-set-parameters", **{"max-bandwidth": 12345678})
    queries = ("query-migrate-capabilities", "query-migrate-parameters", "query-fdsets")
    before = [source.machine.qmp(query) for query in queries]
    world.save(source).run()
    assert [source.machine.qmp(query) for query in queries] == before
    destination = world.destination()
    world.restore(destination).run()
    assert moved_whole(destination.machine)


def test_devices_are_found_whatever_their_order(world: World) -> None:
    source = world.source(Edu(), Edu())
    second = BAR + 0x100_0000
    source.machine.writel(second + LIVENESS, 0x55)
    world.save(source, devices=world.devices(source)[::-1]).run()
    destination = world.destination(Edu(), Edu())
    world.restore(destination, devices=world.devices(destination)[::-1]).run()
    assert destination.machine.readl(BAR + LIVENESS) == ~0x1234_5678 & 0xFFFF_FFFF
    assert destination.machine.readl(second + LIVENESS) == ~0x55 & 0xFFFF_FFFF


def test_a_guest_that_was_paused_stays_so_and_one_may_be_restored_paused(world: World) -> None:
    source = world.source()
    world.save(source).run()
    paused = world.destination()
    world.restore(paused, paused=True).run()
    assert not paused.runs
    paused.machine.qmp("cont")
    assert moved_whole(paused.machine)
    source.machine.qmp("stop")
    world.folder = world.folder.with_name("second")
    world.save(source).run()
    assert not source.runs
    destination = world.destination()
    world.restore(destination).run()
    assert not destination.runs
    assert moved_whole(destination.machine)


def test_with_end_the_qemu_ends_when_all_is_saved(world: World) -> None:
    source = world.source()
    world.save(source, end=True).run()
    assert source.machine._process.wait(TIMEOUT) == 0
    destination = world.destination()
    world.restore(destination).run()
    assert moved_whole(destination.machine)


def test_an_interrupt_that_stands_stands_on_both_sides(world: World) -> None:
    source, destination = world.source(), world.destination()
    for side in (source, destination):
        side.machine.irq_intercept_in()
    source.machine.writel(BAR + 0x60, 1)
    line = _line_of(source.machine)
    world.save(source).run()
    world.restore(destination).run()
    for side in (source, destination):
        side.machine.readl(0)  # what the line did before is known now
        side.machine.wait_irq(line)
        side.machine.writel(BAR + 0x64, 1)
        side.machine.wait_irq(line, level=False)


def test_what_the_guest_has_programmed_is_programmed_again(world: World) -> None:
    """MSI, COMMAND without bus mastering, and the guest between the two ports of config space."""
    source = world.source()
    devfn = source.machine.devfns[0]
    msi = _capability(source.machine, devfn, 0x05)
    for offset, value, width in ((4, 0x50_0000, 4), (8, 0, 4), (12, 0x4321, 2), (2, 0x81, 2)):
        source.machine.config_write(devfn, msi + offset, value, width)
    source.machine.enable(devfn, bus_master=False)
    source.machine.outl(0xCF8, 0x8000_0810)
    world.save(source).run()
    destination = world.destination()
    world.restore(destination).run()
    for machine in (source.machine, destination.machine):
        assert machine.inl(0xCF8) == 0x8000_0810
        assert machine.inl(0xCFC) == BAR
        assert machine.config_read(devfn, 4, 2) & 7 == 3
        machine.enable(devfn)
        machine.writel(BAR + 0x60, 1)
        machine.wait_until("the message", partial(_holds, machine, 0x50_0000, 0x4321))


def _holds(machine: QtestMachine, address: int, value: int) -> bool:
    return machine.readl(address) == value


class Express(Device):
    """A device with something to write in all parts of its config space."""

    vendor_id, device_id = 0x494F, 0x0C0D
    bars = {0: Bar(0x1000)}
    msix_vectors = 4
    capabilities = (
        PcieEndpoint(),
        PowerManagement(),
        VendorSpecific(bytes(8), b"\xff" * 8),
        AdvancedErrorReporting(),
        VendorSpecificExtended(0x77, 1, bytes(16), b"\xff" * 16),
    )


ECAM = 0xB000_0000


def test_the_guest_goes_on_when_qemu_is_through_with_its_migration(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU refuses cont for a moment after it has said "completed": here for three looks at it, instead of few µs."""
    source = world.source()
    monitor, execute = world.monitor("source", source), Monitor.execute
    looks: list[str] = []

    def slowly(self: Monitor, command: str, **arguments: Any) -> object:
        assert command != "cont" or len(looks) == 3, "QEMU would have refused"
        if command == "query-status" and self.migration().status == "completed" and len(looks) < 3:
            looks.append(command)
            return {"status": "finish-migrate", "running": False}
        return execute(self, command, **arguments)

    monkeypatch.setattr(Monitor, "execute", slowly)
    world.save(source).run()
    assert monitor.status().running


def config_space(machine: QtestMachine) -> list[int]:
    """All of a device's, as the guest sees it."""
    machine.config_write(0, 0x60, ECAM | 1)  # the host bridge's PCIEXBAR
    return [machine.readl(ECAM | machine.devfns[0] << 12 | offset) for offset in range(0, EXTENDED_CONFIG_SIZE, 4)]


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "asleep"])
def test_all_of_config_space_is_as_it_was(world: World, asleep: bool) -> None:
    source = world.side("s", [Express()])
    devfn = source.machine.devfns[0]
    source.machine.map_bar(devfn, 0, BAR)
    source.machine.map_bar(devfn, 1, BAR + 0x1000)
    fresh = config_space(source.machine)
    config = ECAM | devfn << 12
    for capability, offset, value in ((0x10, 8, 0x205F), (0x09, 4, 0x1234_5678)):
        source.machine.writew(config + _capability(source.machine, devfn, capability) + offset, value & 0xFFFF)
    aer = next(offset for offset in range(0x100, 0x200, 4) if fresh[offset // 4] & 0xFFFF == 1)
    vsec = next(offset for offset in range(0x100, 0x200, 4) if fresh[offset // 4] & 0xFFFF == 0x0B)
    for offset, value in ((aer + 8, 0x61010), (aer + 0xC, 0), (aer + 0x14, 0x11C1), (vsec + 8, 0x89AB_CDEF)):
        source.machine.writel(config + offset, value)
    power = _capability(source.machine, devfn, 0x01)
    if asleep:
        source.machine.config_write(devfn, power + 4, 3, 2)
    written = config_space(source.machine)
    assert sum(one != other for one, other in zip(fresh, written, strict=True)) == 6 + asleep
    world.save(source).run()
    destination = world.destination(Express())
    world.restore(destination).run()
    for machine in (source.machine, destination.machine):
        assert config_space(machine) == written
        (region, *_) = next(
            one["regions"] for one in machine.qmp("query-pci")[0]["devices"] if one["slot"] == devfn >> 3
        )
        assert region["address"] == (-1 if asleep else BAR)  # QEMU, too, knows whether it sleeps
        machine.config_write(devfn, power + 4, 0, 2)
        assert machine.config_read(devfn, 0x10) == BAR


def test_a_guest_with_an_iommu_is_saved_too(world: World) -> None:
    iommu = ["-device", "intel-iommu,intremap=off"]
    world.save(world.source(extra_args=iommu)).run()
    destination = world.destination(extra_args=iommu)
    world.restore(destination).run()
    assert moved_whole(destination.machine)


def test_the_device_of_a_copy_is_not_taken_for_that_of_the_guest(world: World) -> None:
    source, copy = world.source(), world.destination()
    world.save(source).run()
    world.restore(copy).run()
    world.folder = world.folder.with_name("second")
    with pytest.raises(MigrationError, match=r"device 0 is not 01\.0, but another guest's that looks the same"):
        world.save(source, devices=world.devices(copy)).run()
    assert world.leftovers == ["snapshot"]
    for side in (source, copy):
        assert side.runs
        assert moved_whole(side.machine)


# Saving that fails


@pytest.mark.parametrize("patience", [20.0, 0.5])
def test_a_qemu_that_does_not_answer_for_a_while_lets_the_guest_go_on(world: World, patience: float) -> None:
    """As it is with memory on a disk that is slow: in time, or when the controller has said what is left to do."""
    source = world.source()
    world.monitor("source", source, timeout=0.5)
    number = source.machine._process.pid
    wake = threading.Timer(2.0, os.kill, (number, signal.SIGCONT))

    def strike() -> None:
        os.kill(number, signal.SIGSTOP)
        if patience > 1:
            wake.start()

    job = world.save(source, check=at(lambda: job, "save", strike), timeout=patience)
    with pytest.raises(MigrationError, match="no answer within") as failure:
        job.run()
    assert ("--recover" in str(failure.value)) == (patience < 1)
    os.kill(number, signal.SIGCONT)
    source.machine.wait_until("the guest", lambda: source.runs)
    assert moved_whole(source.machine)


@pytest.mark.parametrize("moment", ["pause", "stop", "save", "memory"])
@pytest.mark.parametrize("victim", ["the controller's patience", "the server"])
def test_a_guest_that_is_not_saved_goes_on_and_nothing_is_left(world: World, moment: str, victim: str) -> None:
    source = world.source()
    before = source.machine.qmp("query-migrate-parameters")
    strike = source.servers[0].stop if "server" in victim else interrupt
    job = world.save(source, end=True, check=at(lambda: job, moment, strike))
    if moment in ("save", "memory") and "server" in victim:
        job.run()  # it is not needed any more
        assert job.report.status is Status.COMPLETED
        return
    with pytest.raises((MigrationError, KeyboardInterrupt)):
        job.run()
    assert job.report.status is Status.FAILED
    assert source.runs
    assert "server" in victim or moved_whole(source.machine)
    assert source.machine.qmp("query-migrate-parameters") == before
    assert world.leftovers == []


@pytest.mark.parametrize("moment", ["pause", "stop", "save"])
def test_a_qemu_that_dies_leaves_no_snapshot(world: World, moment: str) -> None:
    source = world.source()
    job = world.save(source, check=at(lambda: job, moment, source.machine._process.kill))
    with pytest.raises(MigrationError, match=r"not saved: .* its monitor is gone"):
        job.run()
    assert world.leftovers == []


@pytest.mark.parametrize("victim", ["the server", "the QEMU"])
def test_who_dies_when_all_is_saved_is_told_and_the_snapshot_is_whole(world: World, victim: str) -> None:
    source = world.source()
    strike = source.servers[0].stop if victim == "the server" else source.machine._process.kill
    job = world.save(source, check=at(lambda: job, "memory", strike))
    with pytest.raises(MigrationError, match=r"saved to .*, but the source does not go on"):
        job.run()
    destination = world.destination()
    world.restore(destination).run()
    assert moved_whole(destination.machine)


def test_a_file_into_which_qemu_cannot_write_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    source = world.source()
    sealed = os.memfd_create("full", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    create = SnapshotWriter.create

    def full(self: SnapshotWriter, name: str) -> BinaryIO:
        return open(f"/proc/self/fd/{sealed}", "wb") if name == MEMORY else create(self, name)

    monkeypatch.setattr(SnapshotWriter, "create", full)
    with pytest.raises(MigrationError, match="not saved: the source QEMU's migration failed"):
        world.save(source).run()
    os.close(sealed)
    assert source.runs
    assert moved_whole(source.machine)
    assert world.leftovers == []


def arguments(side: Side, folder: Path) -> list[str]:
    return [
        *(*COMMAND, "qemu-save", "--from", str(side.monitor)),
        *(*("--device", str(side.servers[0].control_path)), str(folder)),
    ]


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_full_disk_is_told_in_a_line(world: World) -> None:
    source = world.source()
    command = [sys.executable, "-c", LIMITED, *arguments(source, world.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "vfio-user: not saved: File too large\n")
    assert source.runs
    assert moved_whole(source.machine)
    assert world.leftovers == []


class WaitingEdu(Edu):
    """Does not give its state before it may."""

    def __init__(self, **options: object) -> None:
        self.asked, self.may = threading.Event(), threading.Event()
        super().__init__(**options)

    def save(self) -> dict[str, object]:
        self.asked.set()
        assert self.may.wait(TIMEOUT)
        return super().save()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_lets_the_guest_go_on(world: World, number: signal.Signals) -> None:
    device = WaitingEdu()
    source = world.source(device)
    with subprocess.Popen(arguments(source, world.folder), stderr=subprocess.PIPE, text=True) as command:
        assert device.asked.wait(TIMEOUT)
        command.send_signal(number)
        device.may.set()
        _, said = command.communicate(timeout=30)
    assert (command.returncode, said) == (1, f"vfio-user: interrupted by {number.name}\n")
    assert source.runs
    assert moved_whole(source.machine)
    assert world.leftovers == []


def test_an_interrupt_is_looked_at_between_two_pieces_of_a_state(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_user.live.source.CHUNK", 4096)
    source = world.source()
    looks: list[object] = []

    def check() -> None:
        causes = job.report.causes
        looks.extend([None] if "stop" in causes and "save" not in causes else [])
        if len(looks) > 2:  # those before it begins
            raise KeyboardInterrupt

    job = world.save(source, check=check)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert "memory" not in job.report.causes
    assert moved_whole(source.machine)


KILLED = """
import os, signal, sys
from pathlib import Path
from vfio_user.client.control import ControlClient
from vfio_user.live.qemu import Monitor, QemuSave, ServedDevice

def check():
    if moment in (job.report.step, *job.report.causes):
        os.kill(os.getpid(), signal.SIGKILL)

source, control, folder, moment = sys.argv[1:]
served = [ServedDevice("edu", ControlClient.connect(control))]
job = QemuSave(Monitor("source", source), served, Path(folder), check=check)
job.run()
"""


@pytest.mark.parametrize("moment", ["pause", "stop", "save", "memory", "start"])
def test_after_a_controller_was_killed_recover_has_the_guest_go_on(world: World, moment: str) -> None:
    source = world.source()
    places = [source.monitor, source.servers[0].control_path, world.folder]
    killed = subprocess.run([sys.executable, "-c", KILLED, *places, moment], timeout=30, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not world.folder.exists()
    said = subprocess.run(
        [*arguments(source, world.folder), "--recover"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    assert said == "the guest runs\n"
    assert source.runs
    assert moved_whole(source.machine)
    subprocess.run(arguments(source, world.folder), capture_output=True, timeout=30, check=True)


def test_a_guest_that_has_left_is_not_woken(world: World) -> None:
    source, destination = world.source(), world.side("m", [Edu()], extra_args=INCOMING)
    list(world.migration(source, destination).run())
    with pytest.raises(MigrationError, match="device 0 is in state STOP: its guest has moved away"):
        world.save(source).recover()
    assert not source.runs


def test_what_cannot_be_saved_is_refused_before_anything_changes(world: World) -> None:
    source = world.source(Edu(), Edu())
    devices = world.devices(source)

    def refused(**options: Any) -> str:
        with pytest.raises(MigrationError) as error:
            world.save(source, **options).run()
        assert source.runs
        return str(error.value)

    assert "02.0 would be lost" in refused(devices=devices[:1])
    assert "01.0 is given twice" in refused(devices=[devices[0], devices[0]])
    other = world.side("o", [Edu(), Gpio()])
    assert "the device cannot migrate" in refused(devices=world.devices(other))
    world.folder.mkdir()
    assert refused() == f"not saved: {world.folder}: it is there already"
    (world.folder / "file").touch()
    assert "there already" in refused(folder=world.folder / "file")
    assert "File name too long" in refused(folder=world.folder / ("long" * 80))
    assert refused(folder=world.folder / "none" / "here").endswith("none: No such file or directory")
    assert sorted(os.listdir(world.folder)) == ["file"]


# Restoring that fails


@pytest.fixture
def saved(world: World) -> Side:
    """A guest that was saved, and whose QEMU has ended."""
    source = world.source()
    world.save(source, end=True).run()
    return source


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("moment", ["load", "memory", "programming", "start"])
@pytest.mark.parametrize("victim", ["the server", "the QEMU", "the controller's patience"])
def test_a_destination_that_fails_ends_and_the_snapshot_is_as_it_was(world: World, moment: str, victim: str) -> None:
    failing = world.destination()
    strikes = {"the server": failing.servers[0].stop, "the QEMU": failing.machine._process.kill}
    job = world.restore(failing, check=at(lambda: job, moment, strikes.get(victim, interrupt)))
    with pytest.raises((MigrationError, KeyboardInterrupt)):
        job.run()
    assert job.report.status is not Status.COMPLETED
    assert not failing.runs
    failing.machine._process.wait(TIMEOUT)
    destination = world.destination()
    world.restore(destination).run()
    assert moved_whole(destination.machine)


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("silent", ["the device", "the guest"])
def test_who_was_told_to_run_and_does_not_answer_may_run(
    world: World, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    destination = world.destination()
    execute, set_state = Monitor.execute, ControlClient.migration_set_state

    def unheard(self: Monitor, command: str, **options: Any) -> object:
        done = execute(self, command, **options)
        if command == "cont":
            raise LateError("no answer within 5 s")
        return done

    def hung(self: ControlClient, state: DeviceState) -> None:
        set_state(self, state)
        if state is DeviceState.RUNNING:
            raise CallTimeoutError("no reply within 5 s")

    if silent == "the guest":
        monkeypatch.setattr(Monitor, "execute", unheard)
    else:
        monkeypatch.setattr(ControlClient, "migration_set_state", hung)
    job = world.restore(destination)
    with pytest.raises(UnconfirmedError, match=r"unconfirmed: .* was told to .* did not answer"):
        job.run()
    assert job.report.status is Status.UNCONFIRMED
    assert destination.runs == (silent == "the guest")
    assert moved_whole(destination.machine)  # which was not ended


@pytest.mark.usefixtures("saved")
def test_a_damaged_snapshot_is_refused_and_the_destination_waits_on(world: World) -> None:
    destination = world.destination()
    for file in sorted(world.folder.iterdir()):
        data = file.read_bytes()
        if not data:
            continue
        for damaged in (None, data[:-1], data[: len(data) // 2], b"", bytes([data[0] ^ 1]) + data[1:], data + b"\n"):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(MigrationError, match=f"not restored: .*{file.name}"):
                world.restore(destination).run()
            assert destination.machine.qmp("query-status")["status"] == "inmigrate"
            file.write_bytes(data)
    world.restore(destination).run()
    assert moved_whole(destination.machine)


def rewrite(folder: Path, **changes: object) -> None:
    """Change a manifest, as somebody would who has the sums right."""
    manifest = {**json.loads((folder / MANIFEST).read_text()), **changes}
    text = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_SUM).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")


@pytest.mark.usefixtures("saved")
def test_a_stream_that_qemu_does_not_take_is_told_with_its_words(world: World) -> None:
    data = (world.folder / MEMORY).read_bytes()[:5000]
    (world.folder / MEMORY).write_bytes(data)
    rewrite(world.folder, memory={"name": MEMORY, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    destination = world.destination()
    with pytest.raises(MigrationError, match=r"not restored: the destination QEMU's migration failed: load of migr"):
        world.restore(destination).run()
    destination.machine._process.wait(TIMEOUT)


@pytest.mark.usefixtures("saved")
def test_where_it_does_not_fit_it_is_refused_before_anything_changes(world: World) -> None:
    def refused(side: Side, **options: Any) -> str:
        job = world.restore(side, **options)
        before = side.machine.qmp("query-status")
        with pytest.raises(MigrationError) as error:
            job.run()
        assert side.machine.qmp("query-status") == before
        return str(error.value)

    assert "start it with -m 67108864B" in refused(world.destination(memory=32 << 20))
    assert "start it with -incoming defer -S" in refused(world.side("running", [Edu()]))
    assert "identity of device 0 differs" in refused(world.destination(OtherEdu()))
    assert "the device cannot migrate" in refused(world.destination(Gpio()))
    old = world.destination(extra_args=["-machine", "pc-q35-10.1,memory-backend=ram"])
    assert "start the destination with -machine pc-q35-11.1" in refused(old)
    two = world.destination(Edu(), Edu())
    assert "01.0 in the snapshot, 01.0, 02.0 at the destination" in refused(two)
    one = world.destination()
    assert "no control socket is that of 01.0" in refused(one, devices=world.devices(two)[1:])
    assert "01.0 is given twice" in refused(one, devices=world.devices(one) * 2)
    stranger = ServedDevice("stranger", world.control(two.servers[0]))
    assert "stranger is no device of the destination's" in refused(one, devices=[*world.devices(one), stranger])
    ram = ["-object", "memory-backend-memfd,id=other,size=64M,share=on", "-machine", "memory-backend=other"]
    assert "the guest's memory is ram (64 MiB)" in refused(world.destination(anonymous_ram=True, extra_args=ram))
    world.restore(one).run()
    assert moved_whole(one.machine)


def test_a_table_of_messages_that_could_not_be_written_is_found_before_anything_changes(world: World) -> None:
    source = world.side("s", [Express()])
    source.machine.map_bar(source.machine.devfns[0], 1, BAR)
    source.machine.writel(BAR, 0xFEE0_0000)
    world.save(source).run()
    destination = world.destination(Express())
    with pytest.raises(MigrationError, match=r"the MSI-X table of 01\.0 cannot be written: the destination QEMU"):
        world.restore(destination).run()
    assert destination.machine.qmp("query-status")["status"] == "inmigrate"


# By command


def test_the_commands_save_and_restore(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = world.source(), world.destination()
    monkeypatch.chdir(world.folder.parent)  # a path that is none to QEMU
    save = arguments(source, Path("snapshot"))
    restore = [*COMMAND, "qemu-restore", "--to", str(destination.monitor)]
    restore += ["--device", str(destination.servers[0].control_path), "snapshot"]

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert done.stderr == ""
        return done.stdout

    assert run(*save, "--dry-run").splitlines()[1:] == ["memory: 64 MiB", "nothing stands against it"]
    planned = json.loads(run(*save, "--dry-run", "--json"))
    assert (planned["memory_bytes"], planned["obstacles"], len(planned["devices"])) == (64 << 20, [], 1)
    assert world.leftovers == []
    told = json.loads(run(*save, "--json"))
    assert (told["status"], list(told["downtime_causes_ms"])) == ("completed", ["stop", "save", "memory", "start"])
    assert source.runs
    assert run(*restore, "--dry-run").splitlines()[1:] == ["memory: 64 MiB", "nothing stands against it"]
    assert destination.machine.qmp("query-status")["status"] == "inmigrate"
    assert "restored: the guest goes on" in run(*restore)
    assert moved_whole(destination.machine)
    again = subprocess.run(restore, capture_output=True, text=True, timeout=30, check=False)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1), again.stderr
    assert "waits for no guest" in again.stderr
    failed = subprocess.run([*save, "--json"], capture_output=True, text=True, timeout=30, check=False)
    assert (failed.returncode, failed.stderr) == (1, "vfio-user: not saved: snapshot: it is there already\n")
    assert json.loads(failed.stdout)["error"] == "snapshot: it is there already"


# With Linux in it


UIO = r"""
    echo uio_pci_generic >/sys/bus/pci/devices/{0}/driver_override
    echo {0} >/sys/bus/pci/drivers/uio_pci_generic/bind
    printf '\006' | dd of=/sys/bus/pci/devices/{0}/config bs=1 seek=4 conv=notrunc 2>/dev/null
"""
"""Has a driver for programs that drive a device, which may do DMA."""


class DrivenEdu(Edu):
    """Tells of the rounds that edu_loop does with it."""

    def __init__(self, **options: object) -> None:
        self._round = threading.Event()
        super().__init__(**options)

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        super().region_write(region, offset, data)
        if (region, offset) == (PciRegion.BAR0, LIVENESS):
            self._round.set()

    def goes_on(self) -> bool:
        """Whether some more are done from now on."""
        for _ in range(3):
            self._round.clear()
            if not self._round.wait(PATIENCE):
                return False
        return True


@pytest.mark.timeout(180)
def test_linux_goes_on_where_it_was_saved(qemu: Path, guest: Guest, compiled: Compiler, tmp_path: Path) -> None:
    """An edu behind a root port that does DMA and INTx all the time, and an nvme with MSI-X."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    snapshot, sums = tmp_path / "snapshot", "dd if=/dev/nvme0n1 iflag=direct bs=64k count=16 2>/dev/null | sha256sum"

    with ExitStack() as stack, ExitStack() as servers_here:

        def served(name: str, stack: ExitStack, edu: Edu) -> list[Served]:
            nvme = stack.enter_context(closing(Nvme(path=str(disk))))
            found = [Served(device, tmp_path, f"{name}{number}") for number, device in enumerate([nvme, edu])]
            for one in found:
                stack.callback(one.stop)
            return found

        def machine(kind: type[LinuxMachine], name: str, servers: list[Served], *more: str) -> LinuxMachine:
            return stack.enter_context(
                kind(
                    *(qemu, guest, [servers[0].path]),
                    ports=[[servers[1].path]],
                    memory=128 << 20,
                    modules=["uio_pci_generic", "nvme"],
                    files={"/bin/edu_loop": compiled("edu_loop")},
                    extra_args=[*qmp_args(tmp_path / f"{name}.qmp"), *more],
                )
            )

        def devices(servers: list[Served]) -> list[ServedDevice]:
            return [ServedDevice(one.path.name, stack.enter_context(one.control())) for one in servers]

        driven, driven_there = DrivenEdu(), DrivenEdu()
        here = served("here", servers_here, driven)
        linux = machine(LinuxMachine, "here", here)
        ((edu,),) = linux.port_addresses
        linux.run(UIO.format(edu))
        linux.wait_until("test -b /dev/nvme0n1")
        checksum = linux.run(sums)
        uio = linux.run(f"touch /tmp/go; ls /sys/bus/pci/devices/{edu}/uio").strip()
        loop = linux.start(f"edu_loop /sys/bus/pci/devices/{edu} /dev/{uio} /tmp/go")
        assert driven.goes_on(), loop.wait()
        with Monitor("source", tmp_path / "here.qmp", TIMEOUT) as monitor:
            job = QemuSave(monitor, devices(here), snapshot, timeout=PATIENCE)
            job.run()
            print(job.report.as_json())
        assert driven.goes_on()
        assert linux.run(sums) == checksum
        linux.run("touch /tmp/later")
        linux._process.kill()
        linux._dispose(TIMEOUT)
        servers_here.close()

        there = served("there", stack, driven_there)
        arrived = machine(ArrivingLinux, "there", there, *INCOMING)
        with Monitor("destination", tmp_path / "there.qmp", TIMEOUT) as monitor:
            gdb = str(tmp_path / "gdb")
            QemuRestore(monitor, devices(there)[::-1], snapshot, gdb=gdb, timeout=PATIENCE).run()
        arrived._next_id = linux._next_id
        loop._machine = arrived
        arrived.run("test ! -e /tmp/later")
        assert driven_there.goes_on()
        assert arrived.run(sums) == checksum
        assert int(arrived.run("grep -c nvme0q /proc/interrupts")) > 0
        arrived.run("rm /tmp/go")
        assert int(loop.wait()) > 5
        console = linux.console + arrived.console
        assert not [line for line in console.splitlines() if any(word in line for word in COMPLAINTS)]
