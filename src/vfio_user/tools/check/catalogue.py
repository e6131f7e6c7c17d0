"""All cases there are, in the order of the reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vfio_user.tools.check.cases import Case
from vfio_user.tools.check.chapters import (
    dma,
    features,
    header,
    hostile,
    info,
    irqs,
    logging,
    migration,
    negotiation,
    regions,
    sizes,
)
from vfio_user.tools.check.client.rules import RULES, UNKNOWN, rule_name
from vfio_user.tools.check.client.scenarios import scenarios
from vfio_user.tools.check.model import Level, Mode

_CHAPTERS = (negotiation, header, sizes, info, regions, dma, irqs, features, migration, logging, hostile)


class Entry(NamedTuple):
    """A case, as a list of them shows it."""

    name: str
    section: str
    level: Level
    mode: Mode
    expected: str


def server_cases() -> tuple[Case, ...]:
    """What a server is asked."""
    return tuple(case for chapter in _CHAPTERS for case in chapter.cases())


def server_entries() -> Iterator[Entry]:
    for case in server_cases():
        yield Entry(case.name, case.section, case.level, case.mode, case.expected)


def client_entries() -> Iterator[Entry]:
    """What a client is shown, and what it must keep to."""
    for scenario in scenarios():
        yield Entry(scenario.name, scenario.section, scenario.level, scenario.mode, scenario.outcome.value)
    for command, rules in RULES.items():
        for rule in rules:
            yield Entry(rule_name(command, rule), f"VFIO_USER_{command.name}", rule.level, Mode.SAFE, rule.text)
    yield Entry(UNKNOWN, "Commands", Level.MUST, Mode.SAFE, "commands of a client's")
