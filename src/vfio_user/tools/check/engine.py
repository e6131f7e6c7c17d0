"""Runs cases against a server: each with a connection, a deadline, and a look at whether the server is still there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from vfio_user.errors import MessageError, UsageError
from vfio_user.tools.check.cases import BreachError, Case, Session, Start
from vfio_user.tools.check.expect import envelope
from vfio_user.tools.check.facts import PROPOSAL, Facts, gather, told_capabilities, version, version_data
from vfio_user.tools.check.model import Finding, Level, Mode, Quirk, Report, Result, Verdict, judge
from vfio_user.tools.check.raw import NoMessageError, RawConnection, Transcript
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS, CONTROL_COMMANDS
from vfio_user.wire.constants import CONTROL_VERSION, Command

Progress = Callable[[Result], None]

_NEGOTIATION = "version/standard"
_LOST = frozenset({"closed", "silent", "garbled", "id", "command", "type", "out-of-step"})
"""Findings after which the connection is of no use."""
_VMM_SECTIONS = frozenset(
    {f"VFIO_USER_{COMMANDS[number].command.name}" for number in COMMANDS.keys() - CONTROL_COMMANDS.keys()}
    | {"VFIO_USER_DEVICE_SET_IRQS", "Client Disconnection"}
)
"""Sections about what a control socket does not take, or would do to the device's other client."""


class ServerGoneError(Exception):
    """The server takes no further connection."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which cases are run. ``modes``: what they may do to the device; ``only``: patterns of names, none: all."""

    modes: frozenset[Mode] = frozenset({Mode.SAFE})
    only: tuple[str, ...] = ()

    def has(self, name: str, mode: Mode) -> bool:
        return mode in self.modes and self.names(name)

    def names(self, name: str) -> bool:
        """A pattern without wildcards means all below it, too: ``dma/map`` is ``dma/map/*``."""
        return not self.only or any(
            fnmatchcase(name, one) or name.startswith(one.rstrip("/") + "/") for one in self.only
        )


class ServerChecker:
    """Runs cases against the server at ``path``. ``timeout``: seconds for each answer."""

    def __init__(self, path: str | os.PathLike[str], timeout: float, quirks: Sequence[Quirk] = ()) -> None:
        self._path = os.fspath(path)
        self._timeout = timeout
        self._quirks = quirks
        self._shared: RawConnection | None = None
        self._facts: Facts | None = None
        self._gone = ""

    # All of them

    def run(self, cases: Sequence[Case], progress: Progress = lambda result: None) -> Report:
        """The report, in the order of ``cases``. Raises OSError where nobody listens at the path.

        Those that share a connection are run first: a server that leaves with its first client answers them all.
        """
        results: dict[str, Result] = {}
        try:
            self._meet()
            for case in sorted(cases, key=_turn):
                results[case.name] = self._result(case)
                progress(results[case.name])
        except NoMessageError as error:
            hint = " (does it serve another client?)" if error.code == "silent" else ""
            finding = Finding(error.code, f"the negotiation failed: {error}{hint}")
            first = Result(_NEGOTIATION, "VFIO_USER_VERSION", Level.MUST, Verdict.MUST, "an answer", (finding,))
            return Report(self._path, [first])
        finally:
            self._drop_shared()
        identity = self._facts.identity if self._facts else "?"
        return Report(f"{self._path} ({identity})", [results[case.name] for case in cases])

    def _meet(self) -> None:
        """Learn what the server is, on the connection that is shared from then on."""
        wire = RawConnection.connect(self._path, self._timeout)
        try:
            capabilities = _negotiate(wire)
            self._facts = gather(wire, capabilities)
        except BaseException:
            wire.close()
            raise
        self._shared = wire

    # One

    def _result(self, case: Case) -> Result:
        assert self._facts is not None
        result = Result(case.name, case.section, case.level, Verdict.SKIPPED, case.expected)
        reason = self._gone or case.missing(self._facts) or _not_here(case, self._facts)
        if reason:
            return replace(result, skipped=reason)
        transcript = Transcript()
        began = time.monotonic()
        try:
            findings = tuple(self._findings(case, transcript))
        except ServerGoneError as error:
            self._gone = f"the server takes no connection any more ({error})"
            return replace(result, skipped=self._gone)
        verdict, findings, quirks = judge(case.name, case.level, findings, self._quirks)
        return replace(
            result,
            verdict=verdict,
            findings=findings,
            quirks=quirks,
            sent=transcript.lines("sent"),
            came=transcript.lines("came"),
            seconds=time.monotonic() - began,
        )

    def _findings(self, case: Case, transcript: Transcript) -> list[Finding]:
        session = self._session(case, transcript)
        findings: list[Finding] = []
        try:
            findings += _run(case, session)
            if not case.ends and _LOST.isdisjoint(one.code for one in findings):
                findings += _fence(session)
        except NoMessageError as error:
            findings.append(Finding(error.code, str(error)))
        finally:
            session.stack.close()
            in_step = _LOST.isdisjoint(one.code for one in findings)
            if session.wire is not self._shared or not in_step or case.mode is Mode.HOSTILE:
                session.wire.close()
                self._drop_shared()
        if any(one.code in ("closed", "silent") for one in findings) or case.mode is Mode.HOSTILE:
            findings += self._death()
        return findings

    def _death(self) -> list[Finding]:
        """Whether the server still takes a client, after a connection that ended otherwise than expected."""
        try:
            self._open(Transcript(), negotiate=True).close()
        except (ServerGoneError, NoMessageError) as error:
            self._gone = f"the server is gone ({error})"
            return [Finding("died", f"the server takes no other client after this: {error}")]
        return []

    # Connections

    def _session(self, case: Case, transcript: Transcript) -> Session:
        assert self._facts is not None

        def reconnect(negotiate: bool) -> RawConnection:
            try:
                return self._open(transcript, negotiate=negotiate)
            except ServerGoneError as error:
                raise NoMessageError("closed", f"no further connection: {error}") from error

        if case.start is Start.SHARED:
            if self._shared is None:
                self._shared = self._open(transcript, negotiate=True)
            self._shared.transcript = transcript
            return Session(self._shared, self._facts, reconnect)
        self._drop_shared()
        wire = self._open(transcript, negotiate=case.start is Start.FRESH)
        return Session(wire, self._facts, reconnect)

    def _open(self, transcript: Transcript, *, negotiate: bool) -> RawConnection:
        """A new connection. Raises ServerGoneError; NoMessageError when the negotiation fails."""
        try:
            wire = RawConnection.connect(self._path, self._timeout)
        except OSError as error:
            raise ServerGoneError(error.strerror or str(error)) from error
        try:
            if negotiate:
                _negotiate(wire)
        except NoMessageError as error:
            wire.close()
            raise ServerGoneError(f"no answer to VERSION: {error}") from error
        except BaseException:
            wire.close()
            raise
        wire.transcript = transcript
        return wire

    def _drop_shared(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None


def _not_here(case: Case, facts: Facts) -> str:
    """Why a case is not asked of a control socket; "": it is, or this is none."""
    if facts.control and (case.section in _VMM_SECTIONS or case.mode in (Mode.ACTIVE, Mode.MIGRATE)):
        return "a control socket leaves that to the VMM"
    return ""


def _run(case: Case, session: Session) -> Iterator[Finding]:
    try:
        yield from case.run(session)
    except BreachError as breach:
        yield breach.finding
    except MessageError as error:
        yield Finding("malformed", f"an answer that cannot be read: {error}")
    except UsageError as error:
        yield Finding("malformed", f"what the server says of itself leads to what cannot be asked: {error}")


def _turn(case: Case) -> tuple[bool, bool, bool]:
    """Shared connections first, what may kill the server last."""
    return case.mode is Mode.HOSTILE, case.mode is Mode.MIGRATE, case.start is not Start.SHARED


def _negotiate(wire: RawConnection) -> dict[str, object]:
    """The capabilities that the server answers with. Raises NoMessageError when there is no proper answer."""
    wire.post(Command.VERSION, version(version_data({**PROPOSAL, "x_control": {"version": CONTROL_VERSION}})))
    reply = wire.read()
    if reply.is_error:
        raise NoMessageError("refused", f"VERSION 0.2 is refused: {reply}")
    try:
        return told_capabilities(reply.payload[m.Version.LAYOUT.size :])
    except ValueError:  # no data, or a finding of the cases on VERSION
        return {}


def _fence(session: Session) -> list[Finding]:
    """A command that everybody answers: the stream is in step, and nothing came that nobody asked for."""
    msg_id = session.wire.post(Command.DEVICE_GET_INFO, m.DeviceInfo(m.DeviceInfo.LAYOUT.size).pack())
    reply = session.wire.read()
    found = list(envelope(reply, msg_id, Command.DEVICE_GET_INFO))
    return [Finding("out-of-step", f"the next command: {one.text}", one.level) for one in found]


def select(cases: Iterable[Case], selection: Selection) -> list[Case]:
    return [case for case in cases if selection.has(case.name, case.mode)]


def chapters(names: Collection[str]) -> list[str]:
    """The first parts of the names, in order, each once."""
    return list(dict.fromkeys(name.partition("/")[0] for name in names))
