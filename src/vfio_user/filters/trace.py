"""``trace``: a line per call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from vfio_user.filters.base import COMMAND_HOOKS, Arguments, Call, Filter, Hook, innermost
from vfio_user.filters.settings import NUMBER, REGION, TEXT, Setting, errno_name, region_name
from vfio_user.server.backend import ServerBackend
from vfio_user.server.dispatch import errno_of
from vfio_user.wire.constants import DmaFlags, DmaUnmapFlags, IrqSetFlags, PciIrq

LOGGER = "vfio_user.trace"
"""The logger that lines go to, as INFO."""

logger = logging.getLogger(LOGGER)

MAX_NAMES = 8
"""Registers that a line names."""

RegisterNames = Callable[[int, int, int], Sequence[str]]
"""``register_names(region, offset, size)`` of a device: the registers that such an access touches."""

_WIDTHS = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
_TRACED = {"connected", "disconnected", "quiesce", *COMMAND_HOOKS}


class Trace(Filter):
    """Logs each call: what was asked for, what came of it, and how long it took.

    ``region``: accesses to this region alone. ``min_us``: calls that took so many microseconds or more. ``bytes``: of
    longer data, how many are shown. ``tag`` is what each line begins with: the device's class unless given.
    """

    name = "trace"
    options: ClassVar[Mapping[str, Setting]] = {
        "region": Setting(REGION, "only accesses to this region, and nothing else"),
        "min_us": Setting(NUMBER, "only calls that took so many microseconds or more"),
        "bytes": Setting(NUMBER, "how many bytes of longer data are shown, 16 by default"),
        "tag": Setting(TEXT, "what each line begins with, the device's class by default"),
    }

    def __init__(
        self,
        backend: ServerBackend,
        *,
        region: int | None = None,
        min_us: int = 0,
        bytes: int = 16,
        tag: str | None = None,
    ) -> None:
        self._region = region
        self._min_us = min_us
        self._bytes = bytes
        self._tag = type(innermost(backend)).__name__ if tag is None else tag
        self._register_names: RegisterNames | None = getattr(backend, "register_names", None)
        super().__init__(backend)

    def wants(self, hook: Hook) -> bool:
        return hook.name in _TRACED and (self._region is None or hook.on_region)

    def around(self, call: Call) -> Any:
        if (self._region is not None and call.region != self._region) or not logger.isEnabledFor(logging.INFO):
            return call()
        told = _TOLD.get(call.hook.name, _NOTHING)
        asked = told.asked(self, call.arguments)  # before the call: data may be valid no longer behind it
        begin = time.perf_counter_ns()
        try:
            result = call()
        except Exception as error:
            self._log(call, asked, f" -> {_failure(error)}", begin)
            raise
        self._log(call, asked, told.answered(self, call.arguments, result), begin)
        return result

    def _log(self, call: Call, asked: str, answered: str, begin: int) -> None:
        taken = (time.perf_counter_ns() - begin) / 1000
        if taken >= self._min_us:
            logger.info("%s %s%s%s, %.0f us", self._tag, call.hook.name, asked, answered, taken)

    def place(self, region: int, offset: int, size: int) -> str:
        """Where an access goes, with the names of the registers there: `` bar0+0x8:u32 factorial``."""
        width = f":{_WIDTHS[size]}" if size in _WIDTHS else f" {size} bytes"
        return " ".join(["", f"{region_name(region)}+{offset:#x}{width}", *self._names(region, offset, size)])

    def _names(self, region: int, offset: int, size: int) -> list[str]:
        """What the device calls the registers there. One that fails to answer is asked no more, but traced on."""
        if self._register_names is None:
            return []
        try:
            names = [str(name) for name in self._register_names(region, offset, size)]
        except Exception:
            logging.getLogger("vfio_user.filters").exception("%s failed to name its registers", self._tag)
            self._register_names = None
            return []
        return names if len(names) <= MAX_NAMES else [*names[:MAX_NAMES], "..."]

    def data(self, data: memoryview) -> str:
        """A register's value as a number, anything else byte by byte."""
        if data.nbytes in _WIDTHS:
            return f" = {int.from_bytes(data, 'little'):#0{2 + 2 * data.nbytes}x}"
        shown = data[: self._bytes].hex(" ")
        return f" = {shown}{' ...' if data.nbytes > self._bytes else ''}"


class _Told(NamedTuple):
    """What a line says of a hook: of its arguments before the call, and of what came of it."""

    asked: Callable[[Trace, Arguments], str]
    answered: Callable[[Trace, Arguments, Any], str] = lambda trace, arguments, result: ""


def _range(address: int, size: int) -> str:
    return f" {address:#x}+{size:#x}"


def _flags(kind: type[DmaFlags | DmaUnmapFlags | IrqSetFlags], value: int) -> str:
    return f" {kind(value).name or value}"


def _dma_map(trace: Trace, arguments: Arguments) -> str:
    flags, offset, address, size, fd = arguments
    return _range(address, size) + _flags(DmaFlags, flags) + (f" fd {fd.fileno()} offset {offset:#x}" if fd else "")


def _set_irqs(trace: Trace, arguments: Arguments) -> str:
    index, flags, start, count, _ = arguments
    name = PciIrq(index).name.lower() if index < len(PciIrq) else f"index {index}"
    return f" {name} {start}+{count}{_flags(IrqSetFlags, flags)}"


_NOTHING = _Told(lambda trace, arguments: "")
_TOLD: Mapping[str, _Told] = {
    "region_read": _Told(
        lambda trace, a: trace.place(a[0], a[1], len(a[2])), lambda trace, a, result: trace.data(a[2])
    ),
    "region_write": _Told(lambda trace, a: trace.place(a[0], a[1], len(a[2])) + trace.data(a[2])),
    "dma_map": _Told(_dma_map),
    "dma_unmap": _Told(lambda trace, a: _range(*a[1:]) + (_flags(DmaUnmapFlags, a[0]) if a[0] else "")),
    "set_irqs": _Told(_set_irqs),
    "quiesce": _Told(lambda trace, a: "", lambda trace, a, result: "" if result is None else " -> later"),
    "migration_set_state": _Told(lambda trace, a: f" {a[0].name}"),
    "migration_data_size": _Told(lambda trace, a: "", lambda trace, a, result: f" = {result}"),
    "migration_read_data": _Told(
        lambda trace, a: f" {len(a[0])} bytes", lambda trace, a, result: f" -> {result} bytes"
    ),
    "migration_write_data": _Told(lambda trace, a: f" {len(a[0])} bytes"),
    "dma_logging_start": _Told(
        lambda trace, a: f" page {a[0]:#x} ranges {len(a[1])}", lambda trace, a, result: f" -> page {result:#x}"
    ),
    "dma_logging_report": _Told(lambda trace, a: f"{_range(a[0], a[1])} page {a[2]:#x}"),
}


def _failure(error: Exception) -> str:
    """The errno that the reply carries; what is no refusal but a bug of the device is named, too."""
    name = errno_name(errno_of(error))
    return name if isinstance(error, OSError) else f"{name} ({type(error).__name__})"
