"""A machine moves to another host, of which nothing is reached but by the sockets that a real ssh forwards."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ssh_support import OtherHost, other_host
from vfio_user.devices.edu import Edu
from vfio_user.errors import MigrationError
from vfio_user.live.qemu import DevicePair, Monitor, NamedControl, QemuMigration
from vfio_user.live.report import Status
from vfio_user.testing.linux import Guest
from vfio_user.testing.qemu import QemuError
from vfio_user.testing.qtest import QtestMachine

from .disk_support import linux_with_disk, read_disk, write_disk
from .migrate_support import BAR, INCOMING, LIVENESS, TIMEOUT, Bench, Side, live
from .nvme_support import MIB, complaints, create_image
from .test_qemu_migrate import at

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

PATIENCE = 60.0
VALUE = 0x1234_5678
SOCKETS = ("b.qmp", "b0.ctl")


@dataclass
class TwoHosts:
    """Two folders, each with the sockets of a host. Commands run in ``here``, and reach ``there`` by ssh alone.

    As QEMUs run in them, too, a name without a folder is another socket on either host.
    """

    ssh: OtherHost
    here: Path
    there: Path

    @contextmanager
    def forwarding(
        self, *names: str, option: str = "-L", instead: Mapping[str, str] | None = None
    ) -> Iterator[Callable[[int], None]]:
        """Sockets ``names`` of the other host are here too, as the how-to has it; yields what sends ssh a signal.

        ``instead``: what of the other host it is, where it is not the one of the same name.
        """
        theirs = dict(zip(names, names, strict=True)) | dict(instead or {})
        forwards = [word for name in names for word in (option, f"{self.here / name}:{self.there / theirs[name]}")]
        ssh, master = self.ssh.command[:-1], ["-S", str(self.here / "ssh"), self.ssh.command[-1]]
        # What it says is not captured: it goes on in the background.
        run([*ssh, "-fNM", "-o", "ExitOnForwardFailure=yes", *forwards, *master], check=True)
        said = run([*ssh, "-O", "check", *master], stderr=subprocess.PIPE, check=True).stderr
        pid = int(re.findall(r"pid=(\d+)", said)[0])
        try:
            yield lambda number: os.kill(pid, number)
        finally:
            with suppress(ProcessLookupError):  # it was to end
                os.kill(pid, signal.SIGCONT)
            run([*ssh, "-O", "exit", *master], stderr=subprocess.DEVNULL)
            for name in names:
                (self.here / name).unlink()  # ssh leaves them

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The ``qemu-migrate`` of the how-to."""
        command = [sys.executable, "-m", "vfio_user", "qemu-migrate", "--from", "a.qmp", "--to", "b.qmp"]
        command += ["--device", "a0.ctl:b0.ctl", *arguments]
        return run(command, cwd=self.here, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def complaint(self) -> str:
        """The one line in which a dry run refuses."""
        done = self.command("--dry-run", "--timeout", "2")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
        return done.stderr

    @contextmanager
    def job(self, *, timeout: float = TIMEOUT, **options: Any) -> Iterator[QemuMigration]:
        """The same in this process."""
        with ExitStack() as stack, chdir(self.here):
            source, destination = (
                stack.enter_context(Monitor(*names, timeout))
                for names in (("source", "a.qmp"), ("destination", "b.qmp"))
            )
            controls = [stack.enter_context(NamedControl.connect(name, timeout)) for name in ("a0.ctl", "b0.ctl")]
            controls[0].name, controls[1].name = "the source's a0.ctl", "the destination's b0.ctl"
            pair = DevicePair("edu", *controls)
            yield QemuMigration(source, destination, [pair], uri=tcp(), timeout=timeout, keep_source=True, **options)


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, text=True, timeout=PATIENCE, **options)


def tcp() -> str:
    """Where the other host's QEMU can take memory."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return f"tcp:127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> OtherHost:
    return other_host(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def hosts(tmp_path: Path, ssh: OtherHost) -> TwoHosts:
    hosts = TwoHosts(ssh, tmp_path / "A", tmp_path / "B")
    for folder in (hosts.here, hosts.there):
        folder.mkdir()
    return hosts


@pytest.fixture
def sides(qemu: Path, hosts: TwoHosts) -> Iterator[tuple[Side, Side]]:
    """A machine with an edu that has kept a value, and where it can go."""
    with ExitStack() as servers, ExitStack() as machines:

        def side(folder: Path, name: str, *extra_args: str) -> Side:
            def start(*arguments: Any, **options: Any) -> QtestMachine:
                machine = QtestMachine(qemu, *arguments, **options)
                machines.callback(end, machine)
                return machine

            with chdir(folder):
                return Bench(servers, start, folder).side(name, [Edu()], extra_args=extra_args)

        source = side(hosts.here, "a")
        source.machine.map_bar(source.machine.devfns[0], 0, BAR)
        source.machine.writel(BAR + LIVENESS, VALUE)
        yield source, side(hosts.there, "b", *INCOMING)


def end(machine: QtestMachine) -> None:
    with suppress(QemuError):  # it has ended already
        machine.close()


def is_whole(machine: QtestMachine) -> bool:
    """Whether the edu is there with what it kept, and works."""
    return machine.readl(BAR + LIVENESS) == ~VALUE & 0xFFFF_FFFF and live(machine, 0x77)


# It moves


@pytest.mark.parametrize("option", ["-L", "-R"], ids=["ssh from here", "ssh from there"])
def test_a_machine_moves(hosts: TwoHosts, sides: tuple[Side, Side], option: str) -> None:
    source, destination = sides
    with hosts.forwarding(*SOCKETS, option=option):
        planned = hosts.command("--dry-run")
        assert "nothing stands against it" in planned.stdout, planned
        done = hosts.command("--uri", tcp())
    assert "completed: the destination runs" in done.stdout, done
    assert destination.runs
    assert is_whole(destination.machine)
    assert not source.runs


def test_its_memory_goes_through_ssh_too(hosts: TwoHosts, sides: tuple[Side, Side]) -> None:
    source, destination = sides
    source.machine.write(0x20_0000, b"memory")
    with hosts.forwarding(*SOCKETS, "memory"):
        done = hosts.command("--uri", "unix:memory")
    assert "completed: the destination runs" in done.stdout, done
    assert destination.machine.read(0x20_0000, 6) == b"memory"
    assert is_whole(destination.machine)


# It does not


def test_what_is_wrong_with_a_forward_is_said_before_anything_changes(
    hosts: TwoHosts, sides: tuple[Side, Side]
) -> None:
    source, destination = sides
    assert "b.qmp: No such file" in hosts.complaint()
    with hosts.forwarding("b.qmp"):
        assert "b0.ctl: No such file" in hosts.complaint()
    with hosts.forwarding(*SOCKETS, instead={"b.qmp": "nothing"}):
        assert "b.qmp: it hangs up" in hosts.complaint()
    with hosts.forwarding(*SOCKETS, instead={"b.qmp": "b0.ctl"}):
        assert "b.qmp says nothing: is it a QMP socket" in hosts.complaint()
    with hosts.forwarding(*SOCKETS, instead={"b0.ctl": "nothing"}):
        assert "b0.ctl: it hangs up" in hosts.complaint()
    with hosts.forwarding(*SOCKETS) as send:
        send(signal.SIGKILL)
        assert "b.qmp: Connection refused" in hosts.complaint()
    assert source.runs
    assert is_whole(source.machine)
    assert destination.machine.qmp("query-status")["status"] == "inmigrate"


@pytest.mark.parametrize("moment", ["pre-copy", "stop", "save", "switch", "programming"])
def test_when_the_connection_is_cut_the_source_runs_on(hosts: TwoHosts, sides: tuple[Side, Side], moment: str) -> None:
    source, destination = sides
    with (
        hosts.forwarding(*SOCKETS),
        hosts.job(check=at(lambda: job, moment, hosts.ssh.cut)) as job,
        pytest.raises(MigrationError, match=r"the destination( QEMU|'s b0\.ctl): "),
    ):
        list(job.run())
    assert job.report.status is Status.FAILED
    assert "the destination QEMU may still be there: see that it ends" in str(job.report.error)
    assert source.runs
    assert is_whole(source.machine)
    assert not destination.runs


def test_a_connection_that_hangs_is_as_good_as_cut(hosts: TwoHosts, sides: tuple[Side, Side]) -> None:
    source, destination = sides
    with (
        hosts.forwarding(*SOCKETS) as send,
        hosts.job(timeout=2, check=at(lambda: job, "switch", lambda: send(signal.SIGSTOP))) as job,
        pytest.raises(MigrationError, match="the destination"),
    ):
        list(job.run())
    assert source.runs
    assert is_whole(source.machine)
    assert not destination.runs


def test_when_it_is_cut_at_the_last_moment_recover_knows_who_has_the_guest(
    hosts: TwoHosts, sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = sides
    execute = Monitor.execute

    def cut_at_cont(monitor: Monitor, command: str, **arguments: Any) -> object:
        if command == "cont":
            hosts.ssh.cut()
        return execute(monitor, command, **arguments)

    with hosts.forwarding(*SOCKETS), hosts.job() as job, monkeypatch.context() as patch:
        patch.setattr(Monitor, "execute", cut_at_cont)
        with pytest.raises(MigrationError):
            list(job.run())
    assert job.report.status is Status.UNCONFIRMED
    assert not source.runs
    with hosts.forwarding(*SOCKETS):
        assert hosts.command("--recover").stdout == "the guest runs at the destination\n"
    assert destination.runs
    assert is_whole(destination.machine)
    assert not source.runs


# MSI-X, by the gdbstub


def test_a_device_with_msix_needs_the_gdbstub_forwarded(
    hosts: TwoHosts, qemu: Path, guest: Guest, tmp_path: Path
) -> None:
    image = create_image(tmp_path / "disk.img", 16 * MIB)
    with (
        linux_with_disk(qemu, guest, hosts.here, "a", image) as linux,
        linux_with_disk(qemu, guest, hosts.there, "b", image, arriving=True) as arrived,
    ):
        written = write_disk(linux)
        with hosts.forwarding(*SOCKETS):
            for options, reason in (([], "cannot be handed a socket"), (["--gdb", "b.gdb"], "b.gdb: No such file")):
                done = hosts.command("--uri", tcp(), *options)
                assert "failed at check" in done.stdout, done
                assert reason in done.stderr
        assert read_disk(linux) == written
        with hosts.forwarding(*SOCKETS, "b.gdb"):
            done = hosts.command("--uri", tcp(), "--gdb", "b.gdb")
        assert "completed: the destination runs" in done.stdout, done
        assert read_disk(arrived) == written
        assert complaints(linux.console + arrived.console) == []
