"""A Linux guest that moves between two sets of servers, from QEMU to QEMU, and who can be lost on the way."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vfio_user import ServerBackend
from vfio_user.errors import MigrationError
from vfio_user.live.qemu import DevicePair, Monitor, QemuMigration
from vfio_user.live.report import Report, Status
from vfio_user.live.text import report_text
from vfio_user.testing.linux import Guest, GuestProcess, LinuxMachine
from vfio_user.testing.qemu import Deadline, QemuMachine

from .migrate_support import INCOMING, TIMEOUT, Served, qmp_args
from .test_qemu_migrate import KILLED, at

HOPS = int(os.environ.get("VFIO_USER_HOPS", "10"))
"""How often each guest moves."""
MEMORY, BANDWIDTH = 128 << 20, 1 << 30
"""Of the guest, and what may be sent of it in a second: a move is to cost little."""
PATIENCE = 60.0

PROGRESS = """
    for file in {files}; do
        until read -r before <$file; do usleep 1000; done
        until read -r now <$file && test $now -gt $((before + 1)); do usleep 1000; done
    done
"""
"""Ends when the number in each file has grown by more than one: what was in the middle of something has begun anew."""


class ArrivingLinux(LinuxMachine):
    """A machine into which a running Linux comes."""

    def _greet(self) -> None:
        QemuMachine._greet(self)


class Travels:
    """A Linux guest and two sets of servers, between which it goes back and forth.

    ``makers`` make its devices, anew for each server. ``linux`` is the machine that the guest is in.
    """

    linux: LinuxMachine

    def __init__(
        self,
        stack: ExitStack,
        qemu: Path,
        guest: Guest,
        folder: Path,
        makers: Sequence[Callable[[], ServerBackend]],
        *,
        cold: bool = False,
    ) -> None:
        self._stack, self._qemu, self._guest, self._folder, self._makers = stack, qemu, guest, folder, makers
        self._cold = cold
        self._served = self._started = 0
        self._here, self._there = ([self._serve(make) for make in makers] for _ in range(2))
        self._monitors: dict[LinuxMachine, Path] = {}
        self._options: dict[str, Any] = {}
        self._processes: list[GuestProcess] = []
        self._consoles: list[str] = []

    def boot(self, *, behind_port: bool = False, **options: Any) -> LinuxMachine:
        self._options = {"behind_port": behind_port, "memory": MEMORY, **options}
        self.linux = self._start(LinuxMachine, self._here, [])
        return self.linux

    @property
    def devices(self) -> list[ServerBackend]:
        """Those that the guest has now."""
        return [served.device for served in self._here]

    @property
    def addresses(self) -> Sequence[str]:
        """Where the guest has its devices."""
        return self.linux.port_addresses[0] if self.linux.port_addresses else self.linux.addresses

    @property
    def console(self) -> str:
        """What the kernel printed so far, wherever it was."""
        return "\n".join(filter(None, [*self._consoles, self.linux.console]))

    def start(self, command: str) -> GuestProcess:
        """Run a command in the background of the guest, which it leaves with the guest."""
        self._processes.append(self.linux.start(command))
        return self._processes[-1]

    def wait_progress(self, *files: str) -> None:
        """Return when the guest has got on with all that counts what it does in these files."""
        self.linux.run(PROGRESS.format(files=" ".join(files)))

    def hop(self) -> Report:
        """Move the guest to the other servers, and a QEMU of its own; the one that it leaves ends."""
        arrived = self._await_guest()
        with self._migration(arrived) as job:
            list(job.run())
        self._arrive(arrived)
        return job.report

    def hop_without(self, victim: str, moment: str) -> bool:
        """Begin to, and lose somebody when that part of the downtime is over. Whether the guest has moved.

        Exactly one of the two machines runs then. Whoever was lost is there again the next time.
        """
        arrived = self._await_guest()
        if victim == "the controller":
            return self._settle(arrived, moved=self._recovered(arrived, moment))
        strike = partial(self._lose, victim, arrived)
        with (
            self._migration(arrived, check=at(lambda: job, moment, strike)) as job,
            contextlib.suppress(MigrationError, KeyboardInterrupt),
        ):
            list(job.run())
        return self._settle(arrived, moved=job.report.status is Status.COMPLETED)

    def _lose(self, victim: str, arrived: LinuxMachine) -> None:
        if victim == "the user's patience":
            raise KeyboardInterrupt
        if victim == "the destination's QEMU":
            arrived._process.kill()
        else:
            servers = {"the source's server": self._here, "the destination's server": self._there}[victim]
            servers[0].stop()

    def _recovered(self, arrived: LinuxMachine, moment: str) -> bool:
        """Have another controller end what one began that was killed. Whether the guest has moved.

        For a guest with one device. ``moment`` may be "the last": all but the guest runs at the destination.
        """
        sockets = [self._monitors[self.linux], self._monitors[arrived]]
        sockets += [servers[0].control_path for servers in (self._here, self._there)]
        command = [sys.executable, "-c", KILLED, *map(str, sockets), moment]
        assert subprocess.run(command, timeout=PATIENCE, check=False).returncode == -signal.SIGKILL
        with self._migration(arrived) as job:
            return job.recover() is Status.COMPLETED

    def _settle(self, arrived: LinuxMachine, *, moved: bool) -> bool:
        """See that exactly one machine runs; go on with it."""
        assert (_runs(self.linux), _runs(arrived)) == (not moved, moved)
        if moved:
            self._arrive(arrived)
        else:
            arrived._dispose(TIMEOUT)
        return moved

    def reboot(self) -> None:
        """Have the guest start anew at once, whatever it was about to do."""
        linux = self.linux
        linux.qmp("set-action", reboot="reset")
        command = base64.b64encode(b"echo b >/proc/sysrq-trigger").decode()
        linux._send("shell", f"{linux._ident()} {command}", "reboot", Deadline(PATIENCE))
        linux.wait_event("RESET", PATIENCE, reason="guest-reset")
        assert linux._receive("shell", "boot", Deadline(PATIENCE)) == "ready"
        linux.qmp("set-action", reboot="shutdown")  # a panic ends it again, at once

    # Machines and servers

    def _serve(self, make: Callable[[], ServerBackend]) -> Served:
        self._served += 1
        served = Served(make(), self._folder, f"device{self._served}")
        self._stack.callback(served.stop)
        return served

    def _start(self, kind: type[LinuxMachine], servers: Sequence[Served], extra_args: Sequence[str]) -> LinuxMachine:
        self._started += 1
        options = dict(self._options)
        sockets = [served.path for served in servers]
        places: dict[str, Any] = {"ports": [sockets]} if options.pop("behind_port") else {"devices": sockets}
        monitor = self._folder / f"{self._started}.qmp"
        args = [*options.pop("extra_args", ()), *qmp_args(monitor), *extra_args]
        machine = self._stack.enter_context(kind(self._qemu, self._guest, **places, extra_args=args, **options))
        self._monitors[machine] = monitor
        return machine

    def _arrive(self, arrived: LinuxMachine) -> None:
        self._consoles.append(self.linux.console)
        arrived._next_id = self.linux._next_id
        self.linux._dispose(TIMEOUT)
        self.linux, self._here, self._there = arrived, self._there, self._here
        for process in self._processes:
            process._machine = arrived

    def _await_guest(self) -> LinuxMachine:
        """Where the guest can go."""
        self._there = [
            served if served.alive else self._serve(make)
            for served, make in zip(self._there, self._makers, strict=True)
        ]
        return self._start(ArrivingLinux, self._there, INCOMING)

    @contextmanager
    def _migration(self, arrived: LinuxMachine, **options: Any) -> Iterator[QemuMigration]:
        with ExitStack() as stack:
            pairs = [
                DevicePair(one.path.name, *(stack.enter_context(served.control()) for served in (one, other)))
                for one, other in zip(self._here, self._there, strict=True)
            ]
            source = stack.enter_context(Monitor("source", self._monitors[self.linux], TIMEOUT))
            destination = stack.enter_context(Monitor("destination", self._monitors[arrived], TIMEOUT))
            options = {"cold": self._cold, "bandwidth": BANDWIDTH, "timeout": PATIENCE, **options}
            yield QemuMigration(source, destination, pairs, **options)


class Worker(Protocol):
    """A guest that uses its devices without a pause, and sees in the end that all was well."""

    @property
    def world(self) -> Travels: ...
    def work(self) -> None: ...
    def go_on(self) -> None: ...
    def end(self) -> None: ...


def keep_moving(guest: Worker, hops: int = HOPS) -> None:
    """Let it work, and move meanwhile."""
    guest.work()
    for _ in range(hops):
        print(report_text(guest.world.hop()))
        guest.go_on()
    guest.end()


def lose_all(guest: Worker, losses: Sequence[tuple[str, str, bool]]) -> None:
    """Let it work, and lose on each of its ways somebody at a moment; the last says whether it moves all the same."""
    guest.work()
    for victim, moment, moves in losses:
        assert guest.world.hop_without(victim, moment) == moves, f"without {victim}, after {moment}"
        guest.go_on()
    guest.end()


def _runs(machine: LinuxMachine) -> bool:
    """Whether the guest does; a QEMU that is gone runs nothing."""
    with contextlib.suppress(Exception):
        return bool(machine.qmp("query-status")["running"])
    return False
