"""How a migration goes, and how it went."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Step(StrEnum):
    """The steps of a migration, in their order."""

    CHECK = "check"
    LOGGING = "logging"
    PRE_COPY = "pre-copy"
    PAUSE = "pause"
    STOP_COPY = "stop-and-copy"
    LOAD = "load"
    START = "start"


class Status(StrEnum):
    """How a migration ended."""

    COMPLETED = "completed"
    """The destination runs, the source stays behind."""
    FAILED = "failed"
    """The source runs, as if nothing had been."""
    UNCONFIRMED = "unconfirmed"
    """The destination was told to run, and did not say that it does; the source stays stopped."""


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the dirty pages. ``number`` from 1 on; the last one is done while the guest stands still."""

    number: int
    pages: int
    memory_bytes: int
    device_bytes: int
    seconds: float
    left: int
    """Pages that were dirty again when it ended."""
    downtime: float
    """Seconds that the switch-over would take now, as far as this round's rate tells."""
    stopped: bool = False

    @property
    def bandwidth(self) -> float:
        """Bytes per second; 0 for a round that took no time."""
        return (self.memory_bytes + self.device_bytes) / self.seconds if self.seconds > 0 else 0.0

    @property
    def dirty_rate(self) -> float:
        """Pages that became dirty, per second; 0 for a round that took no time."""
        return self.left / self.seconds if self.seconds > 0 else 0.0


@dataclass(slots=True)
class Report:
    """How a migration went. Times in seconds, sizes in bytes. ``step`` is the last that was entered."""

    status: Status = Status.FAILED
    step: Step = Step.CHECK
    error: str | None = None
    rounds: list[Round] = field(default_factory=list)
    device_state_bytes: int = 0
    downtime: float = 0.0
    total: float = 0.0
    causes: dict[str, float] = field(default_factory=dict)
    """What the downtime was spent with, where that is known."""

    @property
    def dirty_pages(self) -> int:
        """Pages that were sent more than once: all that were sent after the first round."""
        return sum(done.pages for done in self.rounds[1:])

    @property
    def failed_step(self) -> Step | None:
        """The step that failed; None when all went well."""
        return None if self.status is Status.COMPLETED else self.step

    def as_json(self) -> dict[str, object]:
        """The report as ``--json`` prints it; times in milliseconds."""
        return {
            "status": str(self.status),
            "failed_step": None if self.failed_step is None else str(self.failed_step),
            "error": self.error,
            "rounds": len(self.rounds),
            "dirty_pages": self.dirty_pages,
            "device_state_bytes": self.device_state_bytes,
            "downtime_ms": round(self.downtime * 1000, 3),
            **({"downtime_causes_ms": _milliseconds(self.causes)} if self.causes else {}),
            "total_ms": round(self.total * 1000, 3),
        }


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value * 1000, 3) for name, value in seconds.items()}
