"""What ``migrate``, ``receive`` and ``resume`` do, as a library: migrations that can be interrupted, and their ways."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from vfio_user.client import Client
from vfio_user.errors import MigrationError, VfioUserError
from vfio_user.fds import OwnedFd
from vfio_user.live import Destination, Offer, RemoteDestination
from vfio_user.live.pipes import FdPipe, Pipe, SocketPipe, TlsPipe
from vfio_user.live.stream import codec
from vfio_user.tools.interrupts import Interrupts
from vfio_user.tools.places import Place
from vfio_user.tools.shell import Shell
from vfio_user.wire.constants import DeviceState, MigrationFlags


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


class _StoppablePipe(Pipe):
    """A pipe whose waits for the peer are interrupted at once."""

    interrupts: Interrupts

    def receive(self, space: memoryview, deadline: float) -> int:
        with self.interrupts.at_once():
            return super().receive(space, deadline)


class _StoppableFdPipe(_StoppablePipe, FdPipe): ...


class _StoppableSocketPipe(_StoppablePipe, SocketPipe): ...


class _StoppableTlsPipe(_StoppablePipe, TlsPipe): ...


def standard_pipe(interrupts: Interrupts) -> Pipe:
    """This process's stdin and stdout, as a pipe whose waits are interrupted at once."""
    pipe = _StoppableFdPipe(OwnedFd.duplicate(0), OwnedFd.duplicate(1))
    pipe.interrupts = interrupts
    return pipe


def stoppable_pipe(sock: socket.socket, interrupts: Interrupts) -> Pipe:
    """A connected socket, as a pipe whose waits are interrupted at once."""
    pipe = _StoppableTlsPipe(sock) if isinstance(sock, ssl.SSLSocket) else _StoppableSocketPipe(sock)
    pipe.interrupts = interrupts
    return pipe


def pipe_of(sock: socket.socket) -> Pipe:
    """A connected socket, as a pipe."""
    return TlsPipe(sock) if isinstance(sock, ssl.SSLSocket) else SocketPipe(sock)


_LAST_WORDS = 1.0
"""Seconds that a command has to end once its stream has."""
_SHIELDED = "trap '' INT HUP; exec /bin/sh -c \"$1\""
"""What is ignored stays so when a program takes the place of another; a single command takes that of the shell."""


class _CommandPipe(FdPipe):
    """Stdin and stdout of a command: whoever cannot run it, or is not let in, says so by its status."""

    process: subprocess.Popen[bytes]

    def epilogue(self) -> str:
        try:
            return f": the command ended with status {self.process.wait(_LAST_WORDS)}"
        except subprocess.TimeoutExpired:
            return ""


class Remote:
    """A shell command whose stdin and stdout are ``pipe``; leaving the block closes that, and what runs yet is ended.

    Ctrl-C on a terminal reaches all that runs there: the command ignores it, since it carries what is undone then.
    """

    def __init__(self, command: str, grace: float) -> None:
        self._grace = grace
        self._shell = Shell(_SHIELDED, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        process = self._shell.process
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin as writer, process.stdout as reader:
            self.pipe = _CommandPipe(OwnedFd.duplicate(reader.fileno()), OwnedFd.duplicate(writer.fileno()))
        self.pipe.process = process

    def wait(self) -> int:
        """Close the pipe; the command's exit status, or that of being killed if it does not end in time."""
        self.pipe.close()
        for insist in (signal.SIGTERM, signal.SIGKILL):
            try:
                return self._shell.process.wait(self._grace)
            except subprocess.TimeoutExpired:
                self._shell.signal(insist)
        return self._shell.process.wait()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()


@dataclass(frozen=True, slots=True)
class Target:
    """Where a migration goes: a destination, and the clients or the commands that are behind it."""

    destination: Destination
    clients: Sequence[Client] = ()
    commands: Sequence[Remote] = ()

    def reached(self, sources: Sequence[Client]) -> bool:
        """Whether it is so, asked anew: every destination runs, no source does, every command has ended well.

        A source that is gone by now does not run; a destination that is gone does not either.
        """
        moved = _states(self.clients) <= {DeviceState.RUNNING} and _states(sources) <= {DeviceState.STOP, None}
        return moved and all(command.wait() == 0 for command in self.commands)


def _states(clients: Sequence[Client]) -> set[DeviceState | None]:
    """The states that devices are in; None of one that does not answer."""
    states: set[DeviceState | None] = set()
    for client in clients:
        try:
            states.add(client.migration_get_state())
        except (VfioUserError, OSError):
            states.add(None)
    return states


@dataclass(frozen=True, slots=True)
class Carrier:
    """What carries a migration to another process: stdin and stdout of a shell command, or connections to a place.

    ``memory_pipes``: how many more of them, for memory alone. With ``compress`` what goes is compressed.
    """

    via: str | Place
    memory_pipes: int = 0
    compress: bool = False

    def opened(self, stack: ExitStack, timeout: float, patience: float) -> Target:
        """A destination at the other end, for as long as ``stack`` is not left.

        ``timeout``: seconds for each connection, or for a command to end. ``patience``: seconds for each answer. Raises
        OSError, and UsageError where compression is not known here.
        """
        if self.compress:
            codec("zstd")  # before anything is started
        count = 1 + self.memory_pipes
        commands: list[Remote] = []
        pipes: list[Pipe] = []
        if isinstance(self.via, str):
            commands = [stack.enter_context(Remote(self.via, timeout)) for _ in range(count)]
            pipes = [command.pipe for command in commands]
        else:
            pipes = [stack.enter_context(_connected(self.via, number, count, timeout)) for number in range(count)]
        destination = RemoteDestination(pipes[0], memory_pipes=pipes[1:], compress=self.compress, timeout=patience)
        return Target(stack.enter_context(destination), commands=commands)


def _connected(place: Place, number: int, count: int, timeout: float) -> Pipe:
    try:
        return pipe_of(place.connect(timeout))
    except OSError as error:
        if number == 0:
            raise
        why = f"connection {number + 1} of {count}: {error.strerror or error}"
        raise MigrationError(f"{place}: {why}; was vfio-user receive told of as many memory pipes?") from error


_LOST = {
    DeviceState.RESUMING: "has only a part of another one's state",
    DeviceState.ERROR: "is in an error",
}
"""In which states a device has none of its own to run on with, and why."""


def wake(clients: Sequence[Client], *, reset: bool = False) -> None:
    """Let the devices run that a migration has left stopped. With ``reset``, those that have lost their state, too.

    Raises MigrationError if one of them runs already, or would have to be reset: then nothing has changed.
    """
    states = [client.migration_get_state() for client in clients]
    for number, state in enumerate(states):
        if state == DeviceState.RUNNING:
            raise MigrationError(f"device {number} runs already")
        if state in _LOST and not reset:
            raise MigrationError(f"device {number} {_LOST[state]}: it can be reset only")
    for client, state in zip(clients, states, strict=True):
        if state in _LOST:
            client.reset()
    together = all(client.migration_flags() & MigrationFlags.P2P for client in clients)
    for target in (DeviceState.RUNNING_P2P, DeviceState.RUNNING) if together else (DeviceState.RUNNING,):
        for client in clients:
            client.migration_set_state(target)
