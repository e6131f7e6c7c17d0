"""What a conformance report is made of: cases, findings, results. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from vfio_user.live.text import clean

MAX_TEXT = 400
"""Characters of a finding that are shown."""


class Level(StrEnum):
    """How much a breach weighs."""

    MUST = "must"
    """The specification says so, or the connection cannot work without it. A breach fails the check."""
    SHOULD = "should"
    """What the specification leaves open and good peers do; a breach is worth knowing."""


class Verdict(StrEnum):
    """What became of a case."""

    PASSED = "passed"
    MUST = "must"
    SHOULD = "should"
    QUIRK = "quirk"
    """It differs exactly as a known implementation is known to differ."""
    SKIPPED = "skipped"


class Mode(StrEnum):
    """What a case may do to the device; all but SAFE must be asked for."""

    SAFE = "safe"
    """Information, negotiation, reads of config space, memory and eventfds of the checker's own, refused commands."""
    ACTIVE = "active"
    """Reads BARs, writes, masks and triggers interrupts, resets."""
    HOSTILE = "hostile"
    """Malformed input, disconnects in mid-message."""
    MIGRATE = "migrate"
    """Stops, saves, restores and resets the device, logs its DMA."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was not as expected.

    ``code`` is what quirks are recognised by ("errno", "accepted", "closed" ...), with ``value`` where there is a
    number to it.
    """

    code: str
    text: str
    level: Level = Level.MUST
    value: int | None = None


FATAL = frozenset({"closed", "silent", "garbled", "died", "hang", "signal"})
"""Findings that cost the connection, or the peer: no quirk, however well known, makes them less."""


@dataclass(frozen=True, slots=True)
class Quirk:
    """A published deviation of an implementation: in the cases ``cases`` (a pattern), a finding of this ``code``.

    ``values``: those of the finding, where only some are meant.
    """

    peer: str
    cases: str
    code: str
    text: str
    values: frozenset[int] = frozenset()

    def explains(self, case: str, finding: Finding) -> bool:
        return (
            finding.code == self.code
            and (not self.values or finding.value in self.values)
            and any(fnmatchcase(case, pattern) for pattern in self.cases.split())
        )


@dataclass(frozen=True, slots=True)
class Result:
    """One case, and what became of it. ``sent`` and ``came`` are messages, decoded as far as their headers."""

    name: str
    section: str
    level: Level
    verdict: Verdict
    expected: str = ""
    findings: tuple[Finding, ...] = ()
    quirks: tuple[Quirk, ...] = ()
    sent: tuple[str, ...] = ()
    came: tuple[str, ...] = ()
    skipped: str = ""
    seconds: float = 0.0

    @property
    def chapter(self) -> str:
        return self.name.partition("/")[0]

    def as_dict(self) -> dict[str, Any]:
        """JSON's types; the keys are those of the report."""
        return {
            "name": self.name,
            "section": self.section,
            "level": str(self.level),
            "verdict": str(self.verdict),
            "expected": self.expected,
            "findings": [one.text for one in self.findings],
            "quirks": [{"peer": one.peer, "text": one.text} for one in self.quirks],
            "sent": list(self.sent),
            "came": list(self.came),
            "skipped": self.skipped,
            "seconds": round(self.seconds, 6),
        }


def judge(
    name: str, level: Level, findings: Sequence[Finding], quirks: Sequence[Quirk]
) -> tuple[Verdict, tuple[Finding, ...], tuple[Quirk, ...]]:
    """The verdict on a case, its findings at no more than its ``level``, and the quirks that explain any of them."""
    most = None if level is Level.MUST else Level.SHOULD
    findings = [replace(one, text=_shown(one.text), level=most or one.level) for one in findings]
    known = [next((quirk for quirk in quirks if quirk.explains(name, one)), None) for one in findings]
    unknown = {one.level for one, quirk in zip(findings, known, strict=True) if quirk is None or one.code in FATAL}
    explained = tuple(dict.fromkeys(quirk for quirk in known if quirk is not None))
    if Level.MUST in unknown:
        verdict = Verdict.MUST
    elif unknown:
        verdict = Verdict.SHOULD
    else:
        verdict = Verdict.QUIRK if findings else Verdict.PASSED
    return verdict, tuple(findings), explained


def _shown(text: str) -> str:
    """Part of it may be the peer's: one line, not too long, nothing that drives a terminal."""
    text = clean(text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


@dataclass(slots=True)
class Report:
    """The results, in the order of the catalogue, and what the peer is."""

    peer: str
    results: list[Result] = field(default_factory=list)

    def count(self, verdict: Verdict) -> int:
        return Counter(one.verdict for one in self.results)[verdict]

    @property
    def failed(self) -> bool:
        """Whether a must failed."""
        return self.count(Verdict.MUST) > 0

    def as_dict(self) -> dict[str, Any]:
        """``cases`` were run or skipped, ``failed`` are the musts; ``should``, ``quirks``, ``skipped`` are the rest."""
        return {
            "peer": self.peer,
            "cases": len(self.results),
            "passed": self.count(Verdict.PASSED),
            "failed": self.count(Verdict.MUST),
            "should": self.count(Verdict.SHOULD),
            "quirks": self.count(Verdict.QUIRK),
            "skipped": self.count(Verdict.SKIPPED),
            "results": [one.as_dict() for one in self.results],
        }
