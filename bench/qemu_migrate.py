"""``python -m bench.qemu_migrate``: how long a Linux guest stands still when it moves, with our device and without.

Two guests, emulated, of 256 MiB and idle: one moves by QEMU's own ``migrate``, the other has an ``edu`` and moves by
``qemu-migrate``. They do it in turns, each time to a new QEMU; a figure is the median of its turns. The time is that
from the source's event STOP to the destination's RESUME, as the QEMUs stamp them. A row that misses its target says so,
and the exit status stays 0: figures depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.harness import BenchError, running, wait_for_socket
from vfio_user.client.control import ControlClient
from vfio_user.errors import VfioUserError
from vfio_user.live.qemu import DevicePair, Monitor, QemuMigration
from vfio_user.testing.linux import Guest, LinuxMachine, find_guest
from vfio_user.testing.qemu import QemuMachine, find_qemu

MEMORY = 256 << 20
TARGET = 0.3
"""Seconds that a guest may stand still longer because of our device."""
PATIENCE = 60.0


class Arriving(LinuxMachine):
    """A machine into which a running Linux comes."""

    def _greet(self) -> None:
        QemuMachine._greet(self)


@dataclass(frozen=True)
class Hop:
    """Seconds for which a guest stood still, and parts of them by their causes."""

    seconds: float
    causes: Mapping[str, float]


class Plain:
    """A guest that moves by QEMU's own means."""

    def __init__(self, stack: ExitStack, qemu: Path, guest: Guest, folder: Path) -> None:
        self._stack, self._qemu, self._guest = stack, qemu, guest
        self.folder = folder
        self.machine = self._start(LinuxMachine, [])

    def hop(self) -> Hop:
        """Move to a new QEMU."""
        arrived = self._start(Arriving, ["-incoming", "defer"])
        uri = f"unix:{self.folder / 'memory.sock'}"
        arrived.qmp("migrate-incoming", uri=uri)
        self.machine.qmp("migrate", uri=uri)
        return self._arrive(arrived, {})

    def check(self) -> None:
        """The guest is well."""
        self.machine.run("true")

    def _start(self, kind: type[LinuxMachine], extra_args: Sequence[str], devices: Sequence[Path] = ()) -> LinuxMachine:
        machine = kind(self._qemu, self._guest, devices, memory=MEMORY, extra_args=extra_args, timeout=PATIENCE)
        return self._stack.enter_context(machine)

    def _arrive(self, arrived: LinuxMachine, causes: Mapping[str, float]) -> Hop:
        stopped = _moment(self.machine, "STOP")
        hop = Hop(_moment(arrived, "RESUME") - stopped, causes)
        self.machine.close()
        self.machine = arrived
        return hop


class WithEdu(Plain):
    """A guest that has an edu, and moves with it."""

    def __init__(self, stack: ExitStack, qemu: Path, guest: Guest, folder: Path) -> None:
        self._here, self._there = (_serve(stack, folder / name) for name in ("a", "b"))
        super().__init__(stack, qemu, guest, folder)
        self.machine.run(f"echo 1 >/sys/bus/pci/devices/{self.machine.addresses[0]}/enable")

    def hop(self) -> Hop:
        """Move to a new QEMU, and the edu to the other server."""
        arrived = self._start(Arriving, ["-incoming", "defer", "-S"])
        with ExitStack() as stack:
            here, there = (
                stack.enter_context(ControlClient.connect(_control(device), PATIENCE))
                for device in (self._here, self._there)
            )
            source, destination = (
                stack.enter_context(Monitor(name, _monitor(device), PATIENCE))
                for name, device in (("source", self._here), ("destination", self._there))
            )
            job = QemuMigration(source, destination, [DevicePair("edu", here, there)], keep_source=True)
            for _ in job.run():
                pass
        self._here, self._there = self._there, self._here
        return self._arrive(arrived, job.report.causes)

    def _start(self, kind: type[LinuxMachine], extra_args: Sequence[str], devices: Sequence[Path] = ()) -> LinuxMachine:
        device = self._there if kind is Arriving else self._here
        return super()._start(kind, [*extra_args, "-qmp", f"unix:{_monitor(device)},server=on,wait=off"], [device])


def _serve(stack: ExitStack, socket: Path) -> Path:
    """An edu behind ``socket``, its control socket and its guest's monitor beside it."""
    command = [sys.executable, "-m", "vfio_user", "serve", "edu", "--socket-path", str(socket)]
    server = stack.enter_context(running([*command, "--control", str(_control(socket))]))
    wait_for_socket(server, socket)
    return socket


def _control(device: Path) -> Path:
    return device.with_suffix(".ctl")


def _monitor(device: Path) -> Path:
    return device.with_suffix(".qmp")


def _moment(machine: LinuxMachine, event: str) -> float:
    """When something happened, in seconds: the clock of all QEMUs of a host is the same."""
    stamp = machine.wait_event(event, PATIENCE)["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


def measure(rounds: int) -> tuple[list[Hop], list[Hop]]:
    """The hops of both guests, in turns: without our device, with it."""
    qemu, guest = find_qemu(), find_guest()
    if qemu is None or guest is None:
        raise BenchError("no QEMU or no guest: run scripts/fetch_qemu.py --guest")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        plain, ours = (kind(stack, qemu, guest, Path(folder)) for kind in (Plain, WithEdu))
        hops = [(plain.hop(), ours.hop()) for _ in range(rounds)]
        for one in (plain, ours):
            one.check()
    return [pair[0] for pair in hops], [pair[1] for pair in hops]


def report(plain: Sequence[Hop], ours: Sequence[Hop]) -> Iterator[str]:
    """Lines for people, in milliseconds."""
    for name, hops in (("QEMU alone", plain), ("with an edu", ours)):
        seconds = [hop.seconds for hop in hops]
        yield f"{name:<15} {_ms(median(seconds))}  {_ms(min(seconds))} to {_ms(max(seconds)).strip()}"
    for cause in ours[0].causes:
        yield f"  {cause:<13} {_ms(median(hop.causes[cause] for hop in ours))}"
    more = median(hop.seconds for hop in ours) - median(hop.seconds for hop in plain)
    yield f"{'difference':<15} {_ms(more)}  <= {TARGET * 1e3:g} ms {'ok' if more <= TARGET else 'MISS'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:>7.1f} ms"


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.qemu_migrate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    options = parser.parse_args()
    try:
        for line in report(*measure(options.rounds)):
            print(line)
    except (BenchError, VfioUserError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
