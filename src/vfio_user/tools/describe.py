"""A device class in some lines, for people who want to know what it is and what can be set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vfio_user.device import Bar, Device, Option
from vfio_user.errors import UsageError
from vfio_user.tools.info import flag_names
from vfio_user.tools.load import load_device, make_device
from vfio_user.wire.constants import MigrationFlags

Row = tuple[str, str]
"""What is described, and its description."""

_INTERRUPTS = ("INTx", "{} MSI", "{} MSI-X")
"""By index, which is PciIrq's."""
_UNITS = (("GiB", 30), ("MiB", 20), ("KiB", 10))


def summary(name: str) -> str:
    """The first line of a device's documentation; of one that cannot be loaded, why."""
    try:
        return _first_line(load_device(name))
    except UsageError as error:
        return f"cannot be loaded: {error}"


def facts(name: str, options: Mapping[str, str]) -> list[Row]:
    """What a device with such options is; of one that cannot be built with them, why."""
    try:
        device = make_device(name, options)
    except UsageError as error:
        return [("not built", str(error))]
    return [
        ("device", f"{device.vendor_id:04x}:{device.device_id:04x}, class {device.class_code:06x}"),
        *((f"bar{index}", _bar(bar)) for index, bar in sorted(device.bars.items())),
        *([("rom", _size(len(device.rom)))] if device.rom else []),
        *([("registers", ", ".join(device.declared_registers))] if device.declared_registers else []),
        ("interrupts", ", ".join(_interrupts(device)) or "none"),
        ("migration", ", ".join(flag_names(device.migration, MigrationFlags)) or "not supported"),
    ]


def option_rows(name: str) -> list[Row]:
    """The options of a device: name, type and default; what they mean. Raises UsageError."""
    return [
        (f"{key}={_kind(one)}", f"{one.help}{_default(one)}") for key, one in load_device(name).declared_options.items()
    ]


def title(name: str) -> str:
    """The first line of a device's documentation. Raises UsageError if it cannot be loaded."""
    return _first_line(load_device(name))


def _kind(one: Option) -> str:
    return "TEXT" if one.default is None else type(one.default).__name__.upper()


def _default(one: Option) -> str:
    return "" if one.default is None or one.default == "" else f" [default: {one.default}]"


def _first_line(device_class: type[Device]) -> str:
    lines = (device_class.__doc__ or "").strip().splitlines()
    return lines[0] if lines else device_class.__name__


def _bar(bar: Bar) -> str:
    kinds = {
        "I/O ports": bar.io,
        "memory that clients map": bar.memory,
        "64 bits": bar.bits64,
        "prefetchable": bar.prefetchable,
    }
    return ", ".join([_size(bar.size), *(kind for kind, holds in kinds.items() if holds)])


def _size(size: int) -> str:
    return next(
        (f"{size >> shift} {unit}" for unit, shift in _UNITS if size >> shift << shift == size), f"{size} bytes"
    )


def _interrupts(device: Device) -> Iterator[str]:
    for irq, text in zip(device.irqs, _INTERRUPTS, strict=False):
        if irq.count:
            yield text.format(irq.count)
