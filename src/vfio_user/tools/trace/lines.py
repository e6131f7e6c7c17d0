"""A message as a line: for people, or as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple

from vfio_user.filters.settings import errno_name
from vfio_user.histogram import duration
from vfio_user.tools.location import WIDTHS
from vfio_user.tools.trace.exchanges import Told
from vfio_user.tools.trace.fields import Decoded
from vfio_user.wire.commands import Role, command_name

_NANOSECOND = 1e-9
_HEX_ROW = 16

ARROWS = {
    (Role.CLIENT, False): "->",
    (Role.SERVER, False): "<-",
    (Role.CLIENT, True): "=>",
    (Role.SERVER, True): "<=",
}
"""By sender, and by whether it is on the twin socket: a double line there."""


class Style(Enum):
    """What a part of a line is, for who gives it a colour."""

    TIME = "time"
    ARROW = "arrow"
    COMMAND = "command"
    TARGET = "target"
    PLAIN = "plain"
    ERROR = "error"
    LATENCY = "latency"


class Part(NamedTuple):
    text: str
    style: Style = Style.PLAIN


def message_parts(told: Told, decoded: Decoded, *, start: int, shown: int) -> Iterator[Part]:
    """A line about a message, part by part. ``start``: when the trace began; ``shown``: bytes of data, at most."""
    message = told.message
    header = message.header
    yield Part(f"{(message.time - start) * _NANOSECOND:12.6f}", Style.TIME)
    yield Part(ARROWS[message.place.sender, message.place.twin], Style.ARROW)
    yield Part(f"#{header.msg_id:<5} {command_name(header.command)}", Style.COMMAND)
    if not message.is_command:
        yield Part(error_text(header.error_no), Style.ERROR) if message.is_error else Part("ok")
    elif message.posted:
        yield Part("posted")
    if decoded.target:
        yield Part(" ".join((decoded.target, *decoded.registers)), Style.TARGET)
    else:
        shown_fields = (field for field in decoded.fields if not (field.unused and message.is_command))
        yield from (Part(f"{field.name}={field.text}") for field in shown_fields)
    if len(decoded.data):
        yield Part(data_text(decoded.data, shown))
    if message.fds:
        yield Part(f"fds=[{' '.join(map(str, message.fds))}]")
    if decoded.malformed:
        yield Part(f"({decoded.malformed})", Style.ERROR)
    if told.latency is not None:
        yield Part(duration(told.latency * _NANOSECOND), Style.LATENCY)


def error_text(error: int) -> str:
    """The name of an errno; 0, which some servers send, is none."""
    return errno_name(error) if error else "no errno"


def data_text(data: bytes | bytearray | memoryview, shown: int) -> str:
    """A register's value as a number, anything else byte by byte, up to ``shown`` bytes."""
    if len(data) in WIDTHS.values():
        return f"= {int.from_bytes(data, 'little'):#0{2 + 2 * len(data)}x}"
    return f"= {bytes(data[:shown]).hex(' ')}{' ...' if len(data) > shown else ''}"


def hex_dump(data: bytes | bytearray | memoryview) -> Iterator[str]:
    """All of ``data``, sixteen bytes a line: offset, hexadecimal digits, characters."""
    for offset in range(0, len(data), _HEX_ROW):
        row = bytes(data[offset : offset + _HEX_ROW])
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        yield f"    {offset:08x}  {row.hex(' '):<{3 * _HEX_ROW}} {text}"


def message_json(told: Told, decoded: Decoded, *, with_data: bool) -> str:
    """A message as one JSON object."""
    message = told.message
    header = message.header
    found: dict[str, Any] = {
        "time": message.time * _NANOSECOND,
        "connection": message.place.connection,
        "socket": "twin" if message.place.twin else "main",
        "sender": message.place.sender.value,
        "type": "command" if message.is_command else "reply",
        "id": header.msg_id,
        "command": command_name(header.command),
        "size": header.msg_size,
        "fields": decoded.as_json(),
    }
    latency = told.latency
    optional = {
        "posted": True if message.is_command and message.posted else None,
        "error": error_text(header.error_no) if message.is_error else None,
        "latency_us": None if latency is None else latency / 1000,
        "target": decoded.target,
        "registers": list(decoded.registers),
        "fds": [{"kind": fd.kind.name.lower(), "size": fd.size} for fd in message.fds],
        "malformed": decoded.malformed,
        "data": bytes(decoded.data).hex() if with_data or len(decoded.data) in WIDTHS.values() else None,
    }
    return json.dumps(found | {name: value for name, value in optional.items() if value not in (None, "", [])})


def plain(parts: Iterable[Part]) -> str:
    return " ".join(part.text for part in parts)
