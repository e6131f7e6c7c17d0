#!/usr/bin/env python3
"""Write docs/migration-failures.md: the table that tests/test_live_failures.py proves, row by row."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "migration-failures.md"

sys.path.insert(0, str(ROOT))

from tests.live_failures import FAILURES, MOMENTS, Failure, Outcome  # noqa: E402

MARKS = {
    Outcome.SOURCE: "source",
    Outcome.LATER: "source, later",
    Outcome.DESTINATION: "destination",
    Outcome.LOST: "lost",
    Outcome.UNCONFIRMED: "none",
}
MEANINGS = {
    Outcome.SOURCE: "the source runs on as if nothing had been: its log is off, its guest goes on, the destination is"
    " reset, or, if it does not answer, disconnected. The report says at which step and why.",
    Outcome.LATER: "the same, as soon as the server of the source goes on: what undoes the migration waits in its"
    " socket.",
    Outcome.DESTINATION: "the migration succeeds: the source was not needed any more. The report notes what it did.",
    Outcome.LOST: "the source's device died, and its state with it; nothing is claimed. The destination is reset, the"
    " guest's other devices run on, and so does the guest, to deal with that.",
    Outcome.UNCONFIRMED: "the destination may run, so the source must not: it stays stopped, with all its state, and"
    " the report's status is `unconfirmed`. Whoever can find out decides.",
}


def page() -> Iterator[str]:
    yield "# What a failing migration comes to"
    yield ""
    yield "Written by `scripts/make_failures.py` from the table that `tests/test_live_failures.py` proves: for each"
    yield "cell there is a test that has a guest at work with two devices migrate, lets this happen at that step, and"
    yield "looks at both sides, at the data and at the report. The cell says who has the guest afterwards; where it is"
    yield "empty, this cannot happen."
    yield ""
    yield f"| | {' | '.join(MOMENTS)} |"
    yield "|---" * (len(MOMENTS) + 1) + "|"
    yield from map(_row, FAILURES.values())
    yield ""
    for outcome, mark in MARKS.items():
        yield f"- **{mark}**: {MEANINGS[outcome]}"


def _row(failure: Failure) -> str:
    cells = (MARKS[failure.outcomes[moment]] if moment in failure.outcomes else "" for moment in MOMENTS)
    return f"| {failure.what} | {' | '.join(cells)} |"


def text() -> str:
    return "\n".join(page()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
