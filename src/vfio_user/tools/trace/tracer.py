"""The observer of ``vfio-user trace``: pairs, chooses, writes, counts, and hands lines to whoever prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from vfio_user.tools.trace.capture import CaptureWriter
from vfio_user.tools.trace.choice import Choice
from vfio_user.tools.trace.exchanges import Exchanges, Told
from vfio_user.tools.trace.fields import decode
from vfio_user.tools.trace.figures import Figures
from vfio_user.tools.trace.lines import Part, Style, hex_dump, message_json, message_parts
from vfio_user.tools.trace.names import RegisterNames
from vfio_user.tools.trace.seen import Observer, Place, Seen
from vfio_user.wire.constants import Command, PciRegion
from vfio_user.wire.messages import RegionAccess

SHOWN = 16
"""Bytes of longer data that a line shows."""

Print = Callable[[list[Part]], None]
"""Takes a line in parts."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How messages are shown. ``hex_data``: all data, in lines of its own; ``quiet``: no message at all."""

    as_json: bool = False
    hex_data: bool = False
    quiet: bool = False


@dataclass
class Tracer(Observer):
    """Prints what it sees by ``print_line``, as far as ``choice`` takes it.

    The capture and the figures have everything, whatever is chosen to be shown.
    """

    print_line: Print
    choice: Choice = field(default_factory=Choice)
    manner: Manner = field(default_factory=Manner)
    names: RegisterNames = field(default_factory=RegisterNames)
    capture: CaptureWriter | None = None
    figures: Figures = field(default_factory=Figures)

    def __post_init__(self) -> None:
        self._exchanges = Exchanges()
        self._start = 0
        self._connection: int | None = None
        self.complaints: list[str] = []
        """What made no sense, a line each."""

    def seen(self, message: Seen) -> None:
        if self.capture is not None:
            self.capture.add(message)
        if message.place.connection != self._connection:
            self._begin(message)
        told = self._exchanges.add(message)
        self.figures.add(told)
        self._learn(told)
        if not self.manner.quiet:
            self._show_chosen(told)

    def _begin(self, message: Seen) -> None:
        """The first message of a connection."""
        self._start = self._start or message.time
        if self._connection is not None:
            self._note(f"connection {message.place.connection}", Style.TIME)
        self._connection = message.place.connection

    def left(self, connection: int) -> None:
        self._exchanges.forget(connection)

    def unclear(self, place: Place, reason: str) -> None:
        complaint = f"what {place} sent is no vfio-user: {reason}"
        self.complaints.append(complaint)
        if self.manner.as_json and not self.manner.quiet:
            self.print_line([Part(json.dumps({"complaint": complaint}))])
        self._note(complaint, Style.ERROR)

    def _note(self, text: str, style: Style) -> None:
        """A line that is about no message; JSON has none."""
        if not self.manner.quiet and not self.manner.as_json:
            self.print_line([Part(f"-- {text}", style)])

    def _learn(self, told: Told) -> None:
        """What config space reads as says where its registers are."""
        message, request = told
        if message.header.command != Command.REGION_READ or request is None or message.is_error or message.fault:
            return
        size = RegionAccess.LAYOUT.size
        if len(message.payload) > size:
            access = RegionAccess.parse(message.payload)
            if access.region == PciRegion.CONFIG:
                self.names.learn(access.region, access.offset, message.payload[size:])

    def _show_chosen(self, told: Told) -> None:
        if not self.choice.takes(told):
            return
        if not self.choice.waits_for_reply:
            self._show(told)
        elif not told.message.is_command and self.choice.takes_reply(told):
            if told.request is not None:
                self._show(Told(told.request))
            self._show(told)

    def _show(self, told: Told) -> None:
        decoded = decode(told, self.names)
        if self.manner.as_json:
            self.print_line([Part(message_json(told, decoded, with_data=self.manner.hex_data))])
            return
        self.print_line(list(message_parts(told, decoded, start=self._start, shown=SHOWN)))
        if self.manner.hex_data:
            for line in hex_dump(decoded.data):
                self.print_line([Part(line)])
