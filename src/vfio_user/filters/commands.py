"""Options that are given per command: ``region_read=5ms,all=1ms``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vfio_user.errors import UsageError
from vfio_user.filters.base import COMMAND_HOOKS, Call
from vfio_user.filters.settings import Form, Setting, no_such


def _names() -> dict[str, tuple[str, ...]]:
    """What each name means, the general ones first: ``all``, a command of the wire, a hook."""
    names: dict[str, tuple[str, ...]] = {"all": tuple(COMMAND_HOOKS)}
    for hook in COMMAND_HOOKS.values():
        assert hook.command is not None
        command = hook.command.name.lower()
        names[command] = (*names.get(command, ()), hook.name)
    return names | {name: (name,) for name in COMMAND_HOOKS}


COMMAND_NAMES: Final[Mapping[str, tuple[str, ...]]] = _names()
"""What may be written for a command, and the hooks that it means. Of two that mean the same hook the later counts."""


def per_command(form: Form, help: str) -> dict[str, Setting]:
    """One option for each command."""
    return dict.fromkeys(COMMAND_NAMES, Setting(form, help))


def spread(values: Mapping[str, float], most: float) -> dict[str, float]:
    """By hook, what was given by command.

    Raises UsageError for a name that is none, a value outside 0 to ``most``, and where nothing was given: such a
    filter would do nothing.
    """
    for name, value in values.items():
        if name not in COMMAND_NAMES:
            raise no_such("command", name, COMMAND_NAMES)
        if not 0 <= value <= most:
            raise UsageError(f"{name}={value}: 0 to {most} is possible")
    if not values:
        raise UsageError("name a command, or all")
    return {hook: values[name] for name, hooks in COMMAND_NAMES.items() if name in values for hook in hooks}


def concerns(call: Call, region: int | None) -> bool:
    """Whether an option ``region`` lets a call through to the filter: it limits accesses only, None limits nothing."""
    return region is None or call.region in (None, region)
