"""What a failure at each step of a migration comes to: the table that the tests prove and the manual shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from vfio_user.live import Step

ROUND_1, ROUND_2 = f"{Step.PRE_COPY}, first round", f"{Step.PRE_COPY}, later rounds"
MOMENTS = (
    str(Step.CHECK),
    str(Step.LOGGING),
    ROUND_1,
    ROUND_2,
    str(Step.PAUSE),
    str(Step.STOP_COPY),
    str(Step.LOAD),
    str(Step.START),
)
"""When something can fail, in order."""


class Outcome(Enum):
    """Who has the guest afterwards."""

    SOURCE = "the source runs on"
    LATER = "the source runs on, when it does"
    DESTINATION = "the destination runs"
    LOST = "the source is gone; the destination is reset"
    UNCONFIRMED = "the source stays stopped"


CHECK, LOGGING, FIRST, LATER_ROUNDS, PAUSE, STOP_COPY, LOAD, START = MOMENTS
ALL = MOMENTS
UP_TO_STOP_COPY = MOMENTS[:6]


@dataclass(frozen=True)
class Failure:
    """Something that fails, and by moment what comes of it; at other moments it cannot happen.

    ``exact``: the report names the very step; otherwise that one, or the one that first notices.
    """

    what: str
    outcomes: Mapping[str, Outcome]
    exact: bool = False


def always(outcome: Outcome, *moments: str) -> dict[str, Outcome]:
    return dict.fromkeys(moments, outcome)


WHEN_NOT_NEEDED_ANY_MORE = always(Outcome.DESTINATION, LOAD, START)

FAILURES = {
    "source killed": Failure(
        "the source's server is killed",
        always(Outcome.LOST, *UP_TO_STOP_COPY) | WHEN_NOT_NEEDED_ANY_MORE,
    ),
    "source stopped": Failure(
        "the source's server does not answer (SIGSTOP)",
        always(Outcome.LATER, *UP_TO_STOP_COPY) | WHEN_NOT_NEEDED_ANY_MORE,
    ),
    "source refuses": Failure(
        "the source refuses a command",
        always(Outcome.SOURCE, CHECK, LOGGING, FIRST, LATER_ROUNDS, STOP_COPY),
        exact=True,
    ),
    "destination killed": Failure("the destination's server is killed", always(Outcome.SOURCE, *ALL)),
    "destination stopped": Failure("the destination's server does not answer", always(Outcome.SOURCE, *ALL)),
    "destination refuses": Failure(
        "the destination refuses a command",
        always(Outcome.SOURCE, CHECK, FIRST, LATER_ROUNDS, STOP_COPY, LOAD, START),
        exact=True,
    ),
    "version": Failure("the destination refuses the stream's version", always(Outcome.SOURCE, FIRST, STOP_COPY)),
    "corrupt": Failure("a bit of the stream is flipped", always(Outcome.SOURCE, FIRST, LATER_ROUNDS, STOP_COPY)),
    "truncated": Failure("the stream's end is cut off", always(Outcome.SOURCE, FIRST, LATER_ROUNDS, STOP_COPY)),
    "callback": Failure(
        "a callback of the VMM's raises",
        always(Outcome.SOURCE, FIRST, LATER_ROUNDS, PAUSE, STOP_COPY, LOAD, START),
        exact=True,
    ),
    "interrupted": Failure("Ctrl-C", always(Outcome.SOURCE, *ALL), exact=True),
    "given up": Failure(
        "the iteration is given up, between two rounds", always(Outcome.SOURCE, LATER_ROUNDS), exact=True
    ),
    "unconfirmed": Failure("the answer to the order to start is lost", always(Outcome.UNCONFIRMED, START), exact=True),
}
"""What can fail, by name."""
