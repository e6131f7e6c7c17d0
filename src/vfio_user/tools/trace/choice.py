"""Which messages are shown."""

from __future__ import annotations

from dataclasses import dataclass

from vfio_user.errors import UsageError
from vfio_user.tools.trace.exchanges import Told
from vfio_user.tools.trace.fields import regions_of
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import Command


@dataclass(frozen=True, slots=True)
class Choice:
    """Every condition that is given must hold. ``commands`` and ``regions`` are any of those; ``slow`` is nanoseconds.

    ``errors`` and ``slow`` are known with the reply: then a command waits for that, and is shown along with it.
    """

    commands: frozenset[int] = frozenset()
    regions: frozenset[int] = frozenset()
    sender: Role | None = None
    errors: bool = False
    slow: int = 0

    @property
    def waits_for_reply(self) -> bool:
        return self.errors or self.slow > 0

    def takes(self, told: Told) -> bool:
        """Whether a message is shown, as far as it alone says: with its reply :meth:`takes_reply` decides."""
        message = told.message
        return (
            (not self.commands or message.header.command in self.commands)
            and (self.sender is None or message.place.sender is self.sender)
            and (not self.regions or bool(self.regions & regions_of(told)))
        )

    def takes_reply(self, told: Told) -> bool:
        """Whether a reply, and the command that it answers, are worth showing."""
        return (not self.errors or told.message.is_error) and (told.latency or 0) >= self.slow


def parse_command(text: str) -> int:
    """A command's number, from its name in any case or the number. Raises UsageError."""
    if text.isascii() and text.isdecimal() and len(text) <= 5:
        return int(text)
    name = text.upper().replace("-", "_")
    for candidate in (name, f"DEVICE_{name}"):
        if candidate in Command.__members__:
            return Command[candidate]
    raise UsageError(f"no command {text!r}; there are: {', '.join(command.name.lower() for command in Command)}")
