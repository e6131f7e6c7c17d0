"""Cases: what is sent and what is expected, as data; and the few that need a procedure."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from vfio_user.tools.check.expect import Expectation, Findings, envelope
from vfio_user.tools.check.facts import Facts, Need
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.raw import NoMessageError, RawConnection, Received

Blob = bytes | Callable[[Facts], bytes]
"""A payload, or how it follows from what the server is."""

MEMORY_SIZE = 1 << 20
"""Bytes of the memory that DMA_MAP brings."""


class BreachError(Exception):
    """Ends a case with this finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


class FdKind(Enum):
    """What a file descriptor that is sent stands for."""

    MEMORY = "memfd"
    EVENT = "eventfd"
    PIPE = "pipe"
    SOCKET = "socket"

    def make(self, stack: ExitStack) -> int:
        """A new descriptor of this kind, which lives as long as ``stack``."""
        if self is FdKind.MEMORY:
            fd = os.memfd_create("check")
            stack.callback(os.close, fd)
            os.ftruncate(fd, MEMORY_SIZE)
            return fd
        if self is FdKind.EVENT:
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, fd)
            return fd
        if self is FdKind.PIPE:
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            stack.callback(os.close, writer)
            return reader
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        return stack.enter_context(theirs).fileno()


class Session:
    """What a running case has: a negotiated connection (unless it asked for a bare one), what the server is.

    ``stack`` closes what the case makes. ``reconnect`` replaces ``wire`` by a new connection.
    """

    def __init__(self, wire: RawConnection, facts: Facts, reconnect: Callable[[bool], RawConnection]) -> None:
        self.wire = wire
        self.facts = facts
        self.stack = ExitStack()
        self._reconnect = reconnect

    def reconnect(self, *, negotiate: bool = True) -> RawConnection:
        """Leave, and come back. Raises NoMessageError where the server does not take another client."""
        self.wire.close()
        self.wire = self._reconnect(negotiate)
        return self.wire

    def fd(self, kind: FdKind) -> int:
        return kind.make(self.stack)

    def ask(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0, msg_id: int | None = None
    ) -> Received | NoMessageError:
        """Send a command and wait for what comes."""
        try:
            self.wire.post(command, payload, fds, flags=flags, msg_id=msg_id)
            return self.wire.read()
        except NoMessageError as error:
            return error

    def expect(
        self, expectation: Expectation, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0
    ) -> Findings:
        """Send a command and judge what comes."""
        msg_id = self.wire.next_id()
        answer = self.ask(command, payload, fds, flags=flags, msg_id=msg_id)
        if isinstance(answer, Received):
            yield from envelope(answer, msg_id, command)
        yield from expectation.judge(answer, self.facts)


class Step(Protocol):
    def run(self, session: Session) -> Findings:
        """Do it; what was found wrong. May raise NoMessageError."""
        ...

    def __str__(self) -> str:
        """What is expected."""
        ...


@dataclass(frozen=True, slots=True)
class Ask:
    """A command, and what its answer may be."""

    command: int
    payload: Blob
    expect: Expectation
    fds: tuple[FdKind, ...] = ()
    flags: int = 0

    def __str__(self) -> str:
        return str(self.expect)

    def run(self, session: Session) -> Findings:
        payload = self.payload if isinstance(self.payload, bytes) else self.payload(session.facts)
        fds = [session.fd(kind) for kind in self.fds]
        yield from session.expect(self.expect, self.command, payload, fds, flags=self.flags)


@dataclass(frozen=True, slots=True)
class Do:
    """What no table says: a function that does it, and what it expects in words."""

    text: str
    function: Callable[[Session], Findings]

    def __str__(self) -> str:
        return self.text

    def run(self, session: Session) -> Findings:
        yield from self.function(session)


class Start(Enum):
    """The connection that a case begins with."""

    SHARED = "any"
    """One that other cases use, too: the case leaves nothing behind."""
    FRESH = "fresh"
    """Its own, negotiated."""
    BARE = "bare"
    """Its own, where nothing was said yet."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case. The name is ``chapter/subject/variant``; ``section`` is the specification's.

    ``level``: the most that a breach weighs. ``ends``: the connection need not be alive afterwards.
    """

    name: str
    section: str
    steps: tuple[Step, ...]
    level: Level = Level.MUST
    mode: Mode = Mode.SAFE
    start: Start = Start.SHARED
    needs: tuple[Need, ...] = ()
    ends: bool = False

    @property
    def expected(self) -> str:
        return "; ".join(dict.fromkeys(map(str, self.steps)))

    def missing(self, facts: Facts) -> str:
        """Why it cannot be asked of this server; "": it can."""
        return next(filter(None, (need(facts) for need in self.needs)), "")

    def run(self, session: Session) -> Iterator[Finding]:
        for step in self.steps:
            yield from step.run(session)
