"""Two QEMUs without a guest, the servers of their devices, and what the test makes of them as a guest would."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vfio_user import Server, ServerBackend
from vfio_user.client.control import ControlClient
from vfio_user.live.qemu import DevicePair, Monitor, QemuMigration
from vfio_user.testing.qemu import QemuError
from vfio_user.testing.qtest import QtestMachine

TIMEOUT = 10.0
INCOMING = ("-incoming", "defer", "-S")
BAR = 0xE000_0000
LIVENESS = 0x4
BUFFER = 0x40000
PAGE = 4096
TO_GUEST, FROM_GUEST = 3, 1

MachineFactory = Callable[..., QtestMachine]


class Served:
    """A device with a control socket, served by a thread until it is stopped, which its clients see as its death."""

    def __init__(self, device: ServerBackend, folder: Path, name: str) -> None:
        self.device = device
        self.path, self.control_path = folder / f"{name}.sock", folder / f"{name}.ctl"
        self._server = Server(device, self.path, control=self.control_path)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def control(self) -> ControlClient:
        return ControlClient.connect(self.control_path, TIMEOUT)

    def stop(self) -> None:
        if self.alive:
            self._server.shutdown()
            self._thread.join(TIMEOUT)
            assert not self._thread.is_alive()
            self._server.close()


def qmp_args(path: Path) -> list[str]:
    """A monitor for whoever manages the machine, beside the test's own."""
    return ["-qmp", f"unix:{path},server=on,wait=off"]


@contextlib.contextmanager
def machines(qemu: Path) -> Iterator[MachineFactory]:
    """Starts machines without guests, which end with it; those that have ended already are no fault."""
    with ExitStack() as stack:

        def start(*arguments: Any, **options: Any) -> QtestMachine:
            machine = QtestMachine(qemu, *arguments, **options)
            stack.callback(_end, machine)
            return machine

        yield start


def _end(machine: QtestMachine) -> None:
    with contextlib.suppress(QemuError):
        machine.close()


@dataclass
class Side:
    """A QEMU and its devices' servers."""

    machine: QtestMachine
    monitor: Path
    servers: Sequence[Served]

    @property
    def runs(self) -> bool:
        """Whether the guest would; a QEMU that is gone runs nothing."""
        with contextlib.suppress(Exception):
            return bool(self.machine.qmp("query-status")["running"])
        return False


class Bench:
    """Starts both sides, and connects a controller to them; ends everything."""

    def __init__(self, stack: ExitStack, machine: MachineFactory, folder: Path) -> None:
        self._stack, self._machine, self._folder = stack, machine, folder
        self._monitors: dict[Path, Monitor] = {}

    def side(
        self, name: str, devices: Sequence[ServerBackend], *, extra_args: Sequence[str] = (), **options: Any
    ) -> Side:
        servers = []
        for number, device in enumerate(devices):
            servers.append(Served(device, self._folder, f"{name}{number}"))
            self._stack.callback(servers[-1].stop)
        qmp = self._folder / f"{name}.qmp"
        sockets = [served.path for served in servers]
        machine = self._machine(sockets, extra_args=[*qmp_args(qmp), *extra_args], **options)
        return Side(machine, qmp, servers)

    def monitor(self, name: str, side: Side, timeout: float = TIMEOUT) -> Monitor:
        """The only one: a QMP socket takes a client at a time."""
        if side.monitor not in self._monitors:
            self._monitors[side.monitor] = self._stack.enter_context(Monitor(name, side.monitor, timeout))
        return self._monitors[side.monitor]

    def pairs(self, source: Side, destination: Side) -> list[DevicePair]:
        return [
            DevicePair(f"device {number}", *(self.control(served) for served in both))
            for number, both in enumerate(zip(source.servers, destination.servers, strict=False))
        ]

    def control(self, served: Served) -> ControlClient:
        return self._stack.enter_context(served.control())

    def migration(self, source: Side, destination: Side, **options: Any) -> QemuMigration:
        pairs = options.pop("pairs", None) or self.pairs(source, destination)
        return QemuMigration(
            self.monitor("source", source),
            self.monitor("destination", destination),
            pairs,
            **{"keep_source": True, "timeout": TIMEOUT, **options},
        )


# An edu, as a guest drives it


def dma(machine: QtestMachine, source: int, destination: int, count: int, command: int, bar: int = BAR) -> None:
    """Have an edu move data, and wait for that."""
    for register, value in ((0x80, source), (0x88, destination), (0x90, count), (0x98, command)):
        machine.writel(bar + register, value)
    machine.wait_until("DMA", lambda: not machine.readl(bar + 0x98) & 1)


def live(machine: QtestMachine, value: int, bar: int = BAR) -> bool:
    """Whether an edu does its work."""
    machine.writel(bar + LIVENESS, value)
    return machine.readl(bar + LIVENESS) == ~value & 0xFFFF_FFFF
