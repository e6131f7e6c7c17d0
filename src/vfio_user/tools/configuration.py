"""Devices to serve, from a file in TOML.

::

    [[device]]
    device = "ivshmem"
    socket-path = "lab.sock"
    control = "lab-control.sock"
    options = { size = "64M", vectors = 2 }
    filters = ["trace"]
    spin = 20

Relative paths, of sockets and of ``./file.py:Class``, are relative to the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfio_user.errors import UsageError
from vfio_user.tools.serving import MICROSECOND, DeviceSpec

MAX_SIZE = 1 << 20
"""Bytes that a file may have: more is no list of devices."""

MAX_SPIN = 1_000_000
"""Microseconds."""

_KEYS: dict[str, tuple[type, str]] = {
    "device": (str, "a string"),
    "socket-path": (str, "a string"),
    "control": (str, "a string"),
    "options": (dict, "a table"),
    "filters": (list, "an array of strings"),
    "spin": (int, f"0 to {MAX_SPIN} microseconds"),
}
"""What a [[device]] may have: the type, and how it is called."""


def read_configuration(path: Path) -> list[DeviceSpec]:
    """The devices of a file. Raises UsageError, which names the file and the table; OSError if it cannot be read."""
    document = _parse(path)
    unknown = sorted(document.keys() - {"device"})
    if unknown:
        raise UsageError(f"{path}: unknown: {', '.join(unknown)}; there are: [[device]]")
    tables = document.get("device")
    if not isinstance(tables, list) or not tables:
        raise UsageError(f"{path}: it needs a [[device]]")
    return [_read_table(table, path.parent, f"{path}: device {number}") for number, table in enumerate(tables, 1)]


def _parse(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise UsageError(f"{path}: more than {MAX_SIZE} bytes")
    try:
        return tomllib.loads(data.decode())
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _read_table(table: object, folder: Path, origin: str) -> DeviceSpec:
    if not isinstance(table, dict):
        raise UsageError(f"{origin} is no table")
    for key, value in table.items():
        _check(key, value, origin)
    if "device" not in table:
        raise UsageError(f"{origin} has no device = NAME")
    path, control = table.get("socket-path"), table.get("control")
    return DeviceSpec(
        device=_locate(table["device"], folder),
        socket_path=None if path is None else folder / path,
        options={key: _text(key, value, origin) for key, value in table.get("options", {}).items()},
        filters=tuple(table.get("filters", ())),
        spin=table["spin"] * MICROSECOND if "spin" in table else None,
        origin=origin,
        control=None if control is None else folder / control,
    )


def _check(key: str, value: object, origin: str) -> None:
    if key not in _KEYS:
        raise UsageError(f"{origin} has no {key!r}; there are: {', '.join(_KEYS)}")
    kind, called = _KEYS[key]
    if type(value) is not kind or not _holds(value):
        raise UsageError(f"{origin}: {key} is {called}")


def _holds(value: object) -> bool:
    """Whether the value of a key is one that its type alone does not rule out."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return not isinstance(value, int) or 0 <= value <= MAX_SPIN


def _locate(device: str, folder: Path) -> str:
    source, found, class_name = device.rpartition(":")
    return f"{folder / source}:{class_name}" if found and source.endswith(".py") else device


def _text(key: str, value: object, origin: str) -> str:
    """A value as ``-o`` would have it: so the device's own parser checks both alike."""
    if isinstance(value, Mapping | list) or not isinstance(value, str | bool | int | float):
        raise UsageError(f"{origin}: option {key} is a string, a number or a boolean")
    return str(value).lower() if isinstance(value, bool) else str(value)
