"""Runs a client, again and again, against the played server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from vfio_user.fds import close_all
from vfio_user.tools.check.client.played import Conversation, Play
from vfio_user.tools.check.client.rules import RULES, UNKNOWN, World, rule_name, watch
from vfio_user.tools.check.client.scenarios import Outcome, Scenario, scenarios
from vfio_user.tools.check.engine import Progress, Selection
from vfio_user.tools.check.model import Finding, Level, Mode, Quirk, Report, Result, Verdict, judge
from vfio_user.tools.check.raw import Transcript
from vfio_user.tools.running import SOCKET_VARIABLE
from vfio_user.wire.constants import DEFAULT_DATA_XFER_SIZE, MAX_MSG_FDS

_TICK = 0.02
_PLAIN = "server/plain"
_SIGNALS_FROM = 128


class Running(Protocol):
    """A client that runs."""

    def status(self) -> int | None:
        """How it ended: 0 is well, negative a signal; None: it runs."""
        ...

    def end(self) -> None:
        """End it, however it is."""
        ...


Launch = Callable[[Path], Running]
"""Starts a client that connects to the socket at this path."""


class ShellCommand:
    """``sh -c text`` with $VFIO_USER_SOCKET set, in a process group of its own. Its output goes nowhere."""

    def __init__(self, text: str, path: Path) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", text],
            env=os.environ | {SOCKET_VARIABLE: str(path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def status(self) -> int | None:
        status = self._process.poll()
        return None if status is None else _without_shell(status)

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _without_shell(status: int) -> int:
    """A shell says 128 and the signal's number of what a signal ended."""
    return _SIGNALS_FROM - status if status > _SIGNALS_FROM else status


class Listener:
    """A socket at ``path``, which must not be there yet. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(str(path))
        except BaseException:
            self._socket.close()
            raise
        self._socket.listen()

    def accept(self, timeout: float | None) -> socket.socket | None:
        """The next connection; None: there is none in time."""
        self._socket.settimeout(timeout)
        try:
            return self._socket.accept()[0]
        except TimeoutError:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)


@dataclass(slots=True)
class Run:
    """One run of the client: its conversations, and how it ended (None: it did not)."""

    transcript: Transcript = field(default_factory=Transcript)
    conversations: list[Conversation] = field(default_factory=list)
    status: int | None = 0
    seconds: float = 0.0

    @property
    def twisted(self) -> bool:
        return any(one.twisted for one in self.conversations)


class ClientChecker:
    """Plays the server at ``path`` for the client that ``launch`` starts; None: for one that somebody starts.

    ``timeout``: seconds that the client has for each run.
    """

    def __init__(self, path: Path, launch: Launch | None, timeout: float, quirks: Sequence[Quirk] = ()) -> None:
        self._path = path
        self._launch = launch
        self._timeout = timeout
        self._quirks = quirks

    def run(self, selection: Selection, progress: Progress = lambda result: None) -> Report:
        """The report. Raises OSError where no socket can be made at the path."""
        report = Report(str(self._path))
        found: dict[str, list[Finding]] = {}
        with Listener(self._path) as listener:
            for scenario in scenarios():
                # The plain one is run in any case: it is what shows the client's own commands.
                if scenario.name != _PLAIN and not selection.has(scenario.name, scenario.mode):
                    continue
                result = self._scenario(listener, scenario, found)
                if selection.has(scenario.name, scenario.mode):
                    report.results.append(result)
                    progress(result)
        for result in self._rules(found, selection):
            report.results.append(result)
            progress(result)
        return report

    # Scenarios

    def _scenario(self, listener: Listener, scenario: Scenario, found: dict[str, list[Finding]]) -> Result:
        name, level = scenario.name, scenario.level
        expected = scenario.outcome.value
        if self._launch is None and name != _PLAIN:
            return Result(name, scenario.section, level, Verdict.SKIPPED, expected, skipped="needs --run")
        run = self._play(listener, scenario)
        try:
            if scenario.outcome is Outcome.WORKS:
                _apply_rules(run, found)
            if not run.twisted and name != _PLAIN:
                skipped = "the client sends nothing that this is about"
                return Result(name, scenario.section, level, Verdict.SKIPPED, expected, skipped=skipped)
            findings = list(_judge_run(run, scenario))
        finally:
            _close_fds(run)
        verdict, shown, quirks = judge(name, level, findings, self._quirks)
        return Result(
            name,
            scenario.section,
            level,
            verdict,
            expected,
            shown,
            quirks,
            run.transcript.lines("sent"),
            run.transcript.lines("came"),
            seconds=run.seconds,
        )

    def _play(self, listener: Listener, scenario: Scenario) -> Run:
        """Until the client has ended; without ``launch``, one connection until it closes."""
        run = Run()
        began = time.monotonic()
        if self._launch is None:
            sock = listener.accept(None)
            assert sock is not None
            run.conversations.append(Play(sock, _FOREVER, scenario.twist, run.transcript).run())
        else:
            with _running(self._launch, self._path) as client:
                deadline = began + self._timeout
                while (status := client.status()) is None and time.monotonic() < deadline:
                    sock = listener.accept(_TICK)
                    if sock is not None:
                        left = max(_TICK, deadline - time.monotonic())
                        run.conversations.append(Play(sock, left, scenario.twist, run.transcript).run())
                run.status = status
        run.seconds = time.monotonic() - began
        return run

    # Rules

    def _rules(self, found: dict[str, list[Finding]], selection: Selection) -> Iterator[Result]:
        for command, rules in RULES.items():
            for rule in rules:
                name = rule_name(command, rule)
                if selection.has(name, Mode.SAFE):
                    yield self._rule(name, f"VFIO_USER_{command.name}", rule.level, rule.text, found.get(name))
        if selection.has(UNKNOWN, Mode.SAFE):
            yield self._rule(UNKNOWN, "Commands", Level.MUST, "commands of a client's", found.get(UNKNOWN))

    def _rule(self, name: str, section: str, level: Level, text: str, findings: list[Finding] | None) -> Result:
        if findings is None:
            return Result(name, section, level, Verdict.SKIPPED, text, skipped="the client does not send it")
        verdict, shown, quirks = judge(name, level, list(dict.fromkeys(findings)), self._quirks)
        return Result(name, section, level, verdict, text, shown, quirks)


_FOREVER = 86400.0 * 365


@contextmanager
def _running(launch: Launch, path: Path) -> Iterator[Running]:
    client = launch(path)
    try:
        yield client
    finally:
        client.end()


def _apply_rules(run: Run, found: dict[str, list[Finding]]) -> None:
    for conversation in run.conversations:
        for name, findings in watch(conversation, _world(conversation)).items():
            found.setdefault(name, []).extend(
                Finding(one.code, f"{one.text}: {message}", one.level, one.value) for message, one in findings
            )


def _world(conversation: Conversation) -> World:
    return World(
        conversation.regions,
        conversation.irqs,
        conversation.limit("max_data_xfer_size", DEFAULT_DATA_XFER_SIZE),
        conversation.limit("max_msg_fds", MAX_MSG_FDS),
        conversation.capabilities.get("write_multiple") is True,
    )


def _close_fds(run: Run) -> None:
    for conversation in run.conversations:
        for message in (*conversation.messages, *conversation.replies.values()):
            close_all(message.fds)


def _judge_run(run: Run, scenario: Scenario) -> Iterable[Finding]:
    if not run.conversations:
        yield Finding("no-connection", "the client did not connect")
    for conversation in run.conversations:
        if conversation.end == "garbled":
            yield Finding("garbled", "the client sent what is no message")
        if conversation.twisted:
            yield from scenario.look(conversation)
    status = run.status
    if status is None:
        yield Finding("hang", f"the client has not ended after {run.seconds:.1f} s")
    elif status < 0:
        yield Finding("signal", f"the client was ended by {_signal_name(-status)}", value=-status)
    elif status and scenario.outcome is Outcome.WORKS:
        yield Finding("gave-up", f"the client ended with status {status}", value=status)
    elif not status and scenario.outcome is Outcome.NOTICES:
        yield Finding("not-noticed", "the client ended well", Level.SHOULD)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
