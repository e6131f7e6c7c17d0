"""What ``migrate`` and ``receive`` do, as a library: a migration that can be interrupted, and what it came to."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from types import TracebackType

from vfio_user.client import Client
from vfio_user.errors import VfioUserError
from vfio_user.fds import OwnedFd
from vfio_user.live import Destination, Offer
from vfio_user.live.pipes import FdPipe
from vfio_user.tools.interrupts import Interrupts
from vfio_user.wire.constants import DeviceState


class Stoppable:
    """A destination that asks before each step whether there was an interrupt: not after it was told to start."""

    def __init__(self, destination: Destination, interrupts: Interrupts) -> None:
        self._destination = destination
        self._interrupts = interrupts

    def check(self, offer: Offer) -> None:
        """Here nothing has changed yet, and here is waited for a network, or for somebody to type a password."""
        with self._interrupts.at_once():
            self._destination.check(offer)

    def begin(self) -> None:
        self._interrupts.check()
        self._destination.begin()

    def write_memory(self, address: int, data: memoryview) -> None:
        self._interrupts.check()
        self._destination.write_memory(address, data)

    def write_device(self, number: int, data: memoryview) -> None:
        self._interrupts.check()
        self._destination.write_device(number, data)

    def settle(self) -> None:
        self._interrupts.check()
        self._destination.settle()

    def load(self) -> None:
        self._interrupts.check()
        self._destination.load()

    def start(self) -> None:
        self._interrupts.check()
        self._destination.start()

    def abort(self) -> None:
        """What is undone is not interrupted."""
        self._destination.abort()


class StoppablePipe(FdPipe):
    """This process's stdin and stdout, as a pipe whose waits for the peer are interrupted at once."""

    def __init__(self, interrupts: Interrupts) -> None:
        super().__init__(OwnedFd.duplicate(0), OwnedFd.duplicate(1))
        self._interrupts = interrupts

    def receive(self, space: memoryview, deadline: float) -> int:
        with self._interrupts.at_once():
            return super().receive(space, deadline)


def moved(sources: Sequence[Client], destinations: Sequence[Client]) -> bool:
    """Whether it is so, asked anew: every destination runs and no source does; one that is gone by now does not."""
    return _states(destinations) <= {DeviceState.RUNNING} and _states(sources) <= {DeviceState.STOP, None}


def _states(clients: Sequence[Client]) -> set[DeviceState | None]:
    """The states that devices are in; None of one that does not answer."""
    states: set[DeviceState | None] = set()
    for client in clients:
        try:
            states.add(client.migration_get_state())
        except (VfioUserError, OSError):
            states.add(None)
    return states


_SHIELDED = "trap '' INT HUP; exec /bin/sh -c \"$1\""
"""What is ignored stays so when a program takes the place of another; a single command takes that of the shell."""


class Remote:
    """A shell command whose stdin and stdout are ``pipe``; leaving the block closes that, and what runs yet is ended.

    Ctrl-C on a terminal reaches all that runs there: the command ignores it, since it carries what is undone then. It
    has a process group of its own, except on a terminal, where it may ask for a password.
    """

    def __init__(self, command: str, grace: float) -> None:
        self._grace = grace
        self._own_group = not os.isatty(0)
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SHIELDED, "sh", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0 if self._own_group else None,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._process.stdin as writer, self._process.stdout as reader:
            self.pipe = FdPipe(OwnedFd.duplicate(reader.fileno()), OwnedFd.duplicate(writer.fileno()))

    def wait(self) -> int:
        """Close the pipe; the command's exit status, or that of being killed if it does not end in time."""
        self.pipe.close()
        for insist in (signal.SIGTERM, signal.SIGKILL):
            try:
                return self._process.wait(self._grace)
            except subprocess.TimeoutExpired:
                self._signal(insist)
        return self._process.wait()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()

    def _signal(self, number: int) -> None:
        if self._own_group:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)
