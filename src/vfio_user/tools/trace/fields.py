"""A message taken apart: its fields by name, as values and as people read them.

Everything is read from the tables of ``wire``: COMMANDS says which structure a payload has, the structure what its
fields are called; here stands only how a field is shown, and what follows the fixed part.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum, IntFlag
from itertools import islice
from typing import Any, NamedTuple

from vfio_user.errors import MessageError
from vfio_user.filters.settings import region_name
from vfio_user.tools.location import WIDTHS
from vfio_user.tools.trace.exchanges import Told
from vfio_user.tools.trace.names import RegisterNames
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS, CommandSpec
from vfio_user.wire.constants import (
    REGION_INFO_CAP_SPARSE_MMAP,
    Command,
    DeviceFeature,
    DeviceFlags,
    DeviceState,
    DmaFlags,
    DmaUnmapFlags,
    FeatureFlags,
    IoFdType,
    IrqInfoFlags,
    IrqSetFlags,
    MigrationFlags,
    PciIrq,
    RegionFlags,
)

MAX_ENTRIES = 64
"""Of a list in a message, how many are taken apart."""

_WIDTH_NAMES = {size: name for name, size in WIDTHS.items()}


class Field(NamedTuple):
    """One field: its name in the structure, its value as JSON has it, and as people read it.

    ``unused``: it has the value of a field that a command leaves to the reply.
    """

    name: str
    value: Any
    text: str
    unused: bool = False


class Decoded(NamedTuple):
    """A message taken apart. ``target`` is what an access goes to, in one word; ``data`` the bulk bytes in it."""

    fields: list[Field]
    target: str = ""
    registers: tuple[str, ...] = ()
    data: m.Buffer = b""
    malformed: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {field.name: field.value for field in self.fields}


Show = Callable[[Any], tuple[Any, str]]
"""Gives a field's value as JSON has it, and its text."""


def flags_text(kind: type[IntFlag], value: int) -> str:
    """The names of the bits that are set, with | between; a bit without one as hexadecimal digits; 0 for none."""
    names = [str(flag.name) for flag in kind if value & flag]
    rest = value & ~sum(kind)
    return "|".join([*names, *([hex(rest)] if rest else [])]) or "0"


def _number(value: int) -> tuple[int, str]:
    return value, str(value)


def _hex(value: int) -> tuple[int, str]:
    return value, hex(value)


def _bytes(value: bytes) -> tuple[str, str]:
    return value.hex(), value.hex()


def _text(show: Callable[[int], str]) -> Show:
    def both(value: int) -> tuple[str, str]:
        text = show(value)
        return text, text

    return both


def _flags(kind: type[IntFlag]) -> Show:
    return _text(lambda value: flags_text(kind, value))


def _name(kind: type[IntEnum], small: bool = False) -> Show:
    def show(value: int) -> str:
        name = kind(value).name if value in set(kind) else str(value)
        return name.lower() if small else name

    return _text(show)


_IRQ, _REGION, _STATE = _name(PciIrq, small=True), _text(region_name), _name(DeviceState)

_SHOWN: Mapping[tuple[type[m.Payload], str], Show] = {
    (m.DmaMap, "flags"): _flags(DmaFlags),
    (m.DmaUnmap, "flags"): _flags(DmaUnmapFlags),
    (m.DeviceInfo, "flags"): _flags(DeviceFlags),
    (m.RegionInfo, "flags"): _flags(RegionFlags),
    (m.RegionInfo, "index"): _REGION,
    (m.RegionInfo, "cap_offset"): _number,
    (m.RegionIoFds, "index"): _REGION,
    (m.IoFd, "type"): _name(IoFdType),
    (m.IrqInfo, "flags"): _flags(IrqInfoFlags),
    (m.IrqInfo, "index"): _IRQ,
    (m.IrqSet, "flags"): _flags(IrqSetFlags),
    (m.IrqSet, "index"): _IRQ,
    (m.RegionAccess, "region"): _REGION,
    (m.WriteMultiEntry, "region"): _REGION,
    (m.WriteMultiEntry, "data"): _bytes,
    (m.FeatureMigration, "flags"): _flags(MigrationFlags),
    (m.FeatureDeviceState, "device_state"): _STATE,
    (m.MigData, "size"): _number,
    (m.DirtyBitmapInfo, "size"): _number,
}
"""How a field is shown, where that is not what its name says."""

_HEXADECIMAL = {"offset", "address", "size", "iova", "length", "page_size", "user_data", "shadow_offset", "datamatch"}


_PLANS: Mapping[type[m.Payload], tuple[tuple[str, Show, object], ...]] = {
    layout: tuple(
        (one.name, _SHOWN.get((layout, one.name), _hex if one.name in _HEXADECIMAL else _number), one.default)
        for one in dataclasses.fields(layout)  # type: ignore[arg-type]  # every Payload is a dataclass
    )
    for layout in m.Payload.__subclasses__()
}
"""Of each field of a structure: its name, how it is shown, and its default."""


def _fields_of(payload: m.Payload) -> Iterator[Field]:
    for name, show, default in _PLANS[type(payload)]:
        value = getattr(payload, name)
        yield Field(name, *show(value), value == default)


def decode(told: Told, names: RegisterNames) -> Decoded:
    """Take a message apart. What makes no sense in it is ``malformed``, and the rest is there all the same."""
    message = told.message
    row = COMMANDS.get(message.header.command)
    if row is None:
        return Decoded([], data=message.payload, malformed=message.fault)
    if not len(message.payload):
        return _of_request(told, row, names)._replace(malformed=message.fault)
    layout = row.request if message.is_command else row.reply
    try:
        fixed = layout.parse(message.payload)
    except MessageError as error:
        return Decoded([], data=message.payload, malformed=str(error))
    taken = _Taken(told, fixed, message.payload[layout.LAYOUT.size :], list(_fields_of(fixed)))
    malformed = message.fault
    try:
        _TAILS.get(type(fixed), _no_tail)(taken)
    except (MessageError, ValueError) as error:
        malformed = malformed or str(error)
    target, registers = _target(fixed, names)
    return Decoded(taken.fields, target, registers, taken.data, malformed)


def _of_request(told: Told, row: CommandSpec, names: RegisterNames) -> Decoded:
    """A message without payload: of a reply it is said what had been asked for."""
    if told.request is None or len(told.request.payload) < row.request.LAYOUT.size:
        return Decoded([])
    asked = row.request.parse(told.request.payload)
    target, registers = _target(asked, names)
    if not target and isinstance(asked, m.Feature):
        target = _feature_name(asked)
    return Decoded([], target, registers)


def place_name(region: int, offset: int, size: int) -> str:
    """``bar0+0x8:u32``; of more bytes than a register has, ``bar0+0x8+0x100``."""
    return f"{region_name(region)}+{offset:#x}" + (f":{_WIDTH_NAMES[size]}" if size in _WIDTH_NAMES else f"+{size:#x}")


def _target(fixed: m.Payload, names: RegisterNames) -> tuple[str, tuple[str, ...]]:
    """What an access goes to, and the registers there."""
    if isinstance(fixed, m.RegionAccess):
        region, offset, count = fixed.region, fixed.offset, fixed.count
        return place_name(region, offset, count), tuple(names.names(region, offset, count))
    if isinstance(fixed, m.DmaAccess):
        return f"{fixed.address:#x}+{fixed.count:#x}", ()
    return "", ()


@dataclasses.dataclass
class _Taken:
    """A message while it is taken apart: what the fixed part gave, and what the tail adds to it."""

    told: Told
    fixed: Any
    tail: m.Buffer
    fields: list[Field]
    data: m.Buffer = b""

    @property
    def is_reply(self) -> bool:
        return not self.told.message.is_command

    def add(self, name: str, value: Any, text: str) -> None:
        self.fields.append(Field(name, value, text))

    def add_struct(self, layout: type[m.Payload], prefix: str = "") -> Any:
        """Take a structure from the front of the tail; its fields get ``prefix`` where names would be there twice."""
        parsed = layout.parse(self.tail)
        self.fields += (one._replace(name=prefix + one.name) for one in _fields_of(parsed))
        self.tail = self.tail[layout.LAYOUT.size :]
        return parsed

    def add_list(self, name: str, layout: type[m.Payload], count: int) -> None:
        """Take ``count`` structures; what is too much to show is left out."""
        size = layout.LAYOUT.size
        if count * size > len(self.tail):
            raise MessageError(f"{count} {name} announced, {len(self.tail)} bytes came")
        entries = [list(_fields_of(layout.parse(self.tail, size * i))) for i in range(min(count, MAX_ENTRIES))]
        self.add_entries(name, entries, count)

    def add_entries(self, name: str, entries: list[list[Field]], count: int) -> None:
        """Add a list of structures, of which there are ``count``."""
        text = " ".join("(" + " ".join(f"{f.name}={f.text}" for f in entry) + ")" for entry in entries)
        more = "" if count <= len(entries) else f" and {count - len(entries)} more"
        self.add(name, [{f.name: f.value for f in entry} for entry in entries], f"[{text}{more}]")


def _no_tail(taken: _Taken) -> None:
    taken.data = taken.tail


def _version(taken: _Taken) -> None:
    text = bytes(taken.tail).rstrip(b"\0").decode(errors="replace").strip()
    if not text:
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        taken.add("version_data", text, repr(text))
        raise MessageError("the version data is no JSON") from None
    found = value.get("capabilities", value) if isinstance(value, dict) else value
    taken.add("capabilities", found, json.dumps(found, separators=(",", ":")))


def _dma_unmap(taken: _Taken) -> None:
    if taken.fixed.flags & DmaUnmapFlags.GET_DIRTY_BITMAP and len(taken.tail):
        taken.add_struct(m.DirtyBitmapInfo, "bitmap_")
        _bitmap(taken)


def _bitmap(taken: _Taken) -> None:
    if taken.is_reply and len(taken.tail):
        dirty = int.from_bytes(taken.tail, "little").bit_count()
        taken.add("dirty_pages", dirty, str(dirty))
        taken.data = taken.tail


def _region_info(taken: _Taken) -> None:
    if not taken.is_reply or not taken.fixed.flags & RegionFlags.CAPS:
        return
    payload = taken.told.message.payload
    for header, at in islice(m.parse_capability_chain(payload, taken.fixed.cap_offset), MAX_ENTRIES):
        if header.id == REGION_INFO_CAP_SPARSE_MMAP:
            areas = m.parse_sparse_areas(payload, at)
            text = " ".join(f"{offset:#x}+{size:#x}" for offset, size in areas)
            taken.add("sparse_areas", [{"offset": offset, "size": size} for offset, size in areas], f"[{text}]")
        else:
            taken.add("capability", header.id, str(header.id))


def _region_io_fds(taken: _Taken) -> None:
    """Entries have 48 bytes in C and 40 in the specification: how many there are says which."""
    count = taken.fixed.count
    if not taken.is_reply or not count or not len(taken.tail):
        return
    stride = len(taken.tail) // count
    parse = m.IoFd.parse if stride >= m.IoFd.LAYOUT.size else m.IoFd.parse_short
    entries = [list(_fields_of(parse(taken.tail, stride * i))) for i in range(min(count, MAX_ENTRIES))]
    taken.add_entries("io_fds", entries, count)


def _write_multi(taken: _Taken) -> None:
    if not taken.is_reply:
        taken.add_list("writes", m.WriteMultiEntry, taken.fixed.count)


def _mig_data(taken: _Taken) -> None:
    """The C server pads: ``size`` counts."""
    taken.data = taken.tail[: taken.fixed.size]


def _feature_name(feature: m.Feature) -> str:
    index, operation = feature.index, flags_text(FeatureFlags, feature.operation)
    name = DeviceFeature(index).name if index in set(DeviceFeature) else f"feature {index}"
    return f"{operation} {name}"


def _feature(taken: _Taken) -> None:
    feature: m.Feature = taken.fixed
    shown = _feature_name(feature)
    taken.fields[-1] = Field("feature", shown, shown)
    if feature.operation & FeatureFlags.PROBE or not len(taken.tail):
        return
    _FEATURES.get(feature.index, _no_tail)(taken)


def _logging_start(taken: _Taken) -> None:
    control = taken.add_struct(m.LoggingControl)
    taken.add_list("ranges", m.LoggingRange, control.num_ranges)


def _logging_report(taken: _Taken) -> None:
    taken.add_struct(m.LoggingReport)
    _bitmap(taken)


def _structure(layout: type[m.Payload]) -> Callable[[_Taken], None]:
    def take(taken: _Taken) -> None:
        taken.add_struct(layout)

    return take


_FEATURES: Mapping[int, Callable[[_Taken], None]] = {
    DeviceFeature.MIGRATION: _structure(m.FeatureMigration),
    DeviceFeature.MIG_DEVICE_STATE: _structure(m.FeatureDeviceState),
    DeviceFeature.DMA_LOGGING_START: _logging_start,
    DeviceFeature.DMA_LOGGING_REPORT: _logging_report,
    DeviceFeature.MIG_DATA_SIZE: _structure(m.FeatureDataSize),
}

_TAILS: Mapping[type[m.Payload], Callable[[_Taken], None]] = {
    m.Version: _version,
    m.DmaUnmap: _dma_unmap,
    m.RegionInfo: _region_info,
    m.RegionIoFds: _region_io_fds,
    m.WriteMulti: _write_multi,
    m.MigData: _mig_data,
    m.Feature: _feature,
}
"""What follows a fixed part, where that is more than data."""


def regions_of(told: Told) -> set[int]:
    """The regions that a command, or what a reply answers, is about."""
    about = told.request or told.message
    row = COMMANDS.get(about.header.command)
    if row is None or len(about.payload) < row.request.LAYOUT.size or not about.is_command:
        return set()
    fixed = row.request.parse(about.payload)
    if isinstance(fixed, m.RegionAccess):
        return {fixed.region}
    if isinstance(fixed, m.RegionInfo | m.RegionIoFds):
        return {fixed.index}
    if about.header.command == Command.REGION_WRITE_MULTI:
        stride = m.WriteMultiEntry.LAYOUT.size
        places = range(m.WriteMulti.LAYOUT.size, len(about.payload) - stride + 1, stride)
        return {m.WriteMultiEntry.parse(about.payload, at).region for at in places}
    return set()
