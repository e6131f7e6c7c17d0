"""What a client must keep to, whatever it does: rules for each of its commands, and a watcher that applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from vfio_user.dma.iova import IovaTable
from vfio_user.errors import MessageError
from vfio_user.fds import is_eventfd, is_mappable
from vfio_user.tools.check.client.played import Conversation
from vfio_user.tools.check.expect import Findings
from vfio_user.tools.check.facts import told_capabilities
from vfio_user.tools.check.model import Finding, Level
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS, CommandSpec, Role, Tail
from vfio_user.wire.constants import (
    IRQ_ACTION_MASK,
    IRQ_DATA_MASK,
    PAGE_SIZE,
    TYPE_MASK,
    Command,
    DmaFlags,
    DmaUnmapFlags,
    FeatureFlags,
    HeaderFlags,
    IrqSetFlags,
)


@dataclass(slots=True)
class World:
    """What the client was told, and what it did so far.

    ``regions``: (size, flags) by index. ``irqs``: counts by index. ``maps``: what is mapped.
    """

    regions: tuple[tuple[int, int], ...]
    irqs: tuple[int, ...]
    max_data: int
    max_fds: int
    write_multiple: bool
    maps: IovaTable[None] = field(default_factory=IovaTable)
    count: int = 0


Look = Callable[[Received, World], Findings]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule for one command: what holds for each of its messages. ``name`` is the rest of the case's."""

    name: str
    text: str
    look: Look
    level: Level = Level.MUST


def rule_name(command: Command, rule: Rule) -> str:
    return f"client/{command.name.lower()}/{rule.name}"


# For every command


def _size(row: CommandSpec) -> Look:
    fixed = row.request.LAYOUT.size

    def look(message: Received, world: World) -> Findings:
        came = len(message.payload)
        if came < fixed:
            yield Finding("short", f"a payload of {came} bytes, {fixed} at least", value=came)
        elif came > fixed and row.request_tail in (Tail.NONE, Tail.EXTENSIBLE):
            yield Finding("long", f"a payload of {came} bytes, not {fixed}", Level.SHOULD, came)
        elif row.request_tail is Tail.DATA:
            request = row.request.parse(message.payload)
            announced = getattr(request, "count", getattr(request, "size", 0))
            if came - fixed != announced:
                yield Finding("data", f"{announced} bytes announced, {came - fixed} came", value=came - fixed)

    return look


def _header(row: CommandSpec) -> Look:
    def look(message: Received, world: World) -> Findings:
        flags = message.header.flags
        if flags & TYPE_MASK:
            yield Finding("type", f"flags {flags:#x} do not say that this is a command", value=flags)
        if flags & ~(TYPE_MASK | HeaderFlags.NO_REPLY):
            yield Finding("flags", f"flags {flags:#x} have bits that a command has not", Level.SHOULD, flags)
        if flags & HeaderFlags.NO_REPLY and not row.posted:
            yield Finding("no-reply", f"NO_REPLY for a {row.command.name}, which asks for an answer", Level.SHOULD)
        if message.header.error_no:
            yield Finding("error", f"errno {message.header.error_no} in a command", Level.SHOULD)

    return look


def _fds(row: CommandSpec) -> Look:
    def look(message: Received, world: World) -> Findings:
        count = len(message.fds)
        if count > row.request_fds:
            yield Finding("fds", f"{count} file descriptors, {row.request_fds} at most", value=count)
        elif count > world.max_fds:
            yield Finding("max-msg-fds", f"{count} file descriptors, max_msg_fds is {world.max_fds}", value=count)

    return look


def _argsz(fixed: int) -> Look:
    def look(message: Received, world: World) -> Findings:
        argsz = int.from_bytes(message.payload[:4], "little")
        if argsz < fixed:
            yield Finding("argsz", f"argsz is {argsz}, {fixed} at least", value=argsz)

    return look


# VERSION

_CAPABILITY_TYPES: dict[str, type] = {
    "max_msg_fds": int,
    "max_data_xfer_size": int,
    "max_dma_maps": int,
    "pgsizes": int,
    "write_multiple": bool,
    "twin_socket": dict,
}


def _version(message: Received, world: World) -> Findings:
    version = m.Version.parse(message.payload)
    if version.major:
        yield Finding("major", f"version {version.major}.{version.minor}", value=version.major)


def _first(message: Received, world: World) -> Findings:
    if world.count:
        yield Finding("order", f"VERSION is message {world.count + 1}")


def _json(message: Received, world: World) -> Findings:
    text = message.payload[m.Version.LAYOUT.size :]
    if not text:
        return
    if text[-1] != 0:
        yield Finding("nul", "the version data does not end with a NUL")
    try:
        capabilities = told_capabilities(text)
    except ValueError as error:
        yield Finding("json", f"the version data cannot be read: {error}")
        return
    for name, value in capabilities.items():
        wanted = _CAPABILITY_TYPES.get(name)
        if wanted is not None and (not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool)):
            yield Finding("capability-type", f"{name} is {value!r}")


# Information


def _zeros(layout: type[m.Payload], *names: str) -> Look:
    def look(message: Received, world: World) -> Findings:
        request = layout.parse(message.payload)
        for name in names:
            if getattr(request, name):
                yield Finding("not-zero", f"{name} is {getattr(request, name):#x}, not 0")

    return look


def _region_index(message: Received, world: World) -> Findings:
    index = int.from_bytes(message.payload[8:12], "little")
    if index >= len(world.regions):
        yield Finding("index", f"region {index}, there are {len(world.regions)}", value=index)


def _irq_index(message: Received, world: World) -> Findings:
    index = int.from_bytes(message.payload[8:12], "little")
    if index >= len(world.irqs):
        yield Finding("index", f"interrupt index {index}, there are {len(world.irqs)}", value=index)


# Interrupts


def _irq_flags(message: Received, world: World) -> Findings:
    flags = m.IrqSet.parse(message.payload).flags
    one = (flags & IRQ_DATA_MASK).bit_count() == 1 == (flags & IRQ_ACTION_MASK).bit_count()
    if not one or flags & ~(IRQ_DATA_MASK | IRQ_ACTION_MASK):
        yield Finding("irq-flags", f"flags {flags:#x}: one DATA, one ACTION and nothing else", value=flags)


def _irq_range(message: Received, world: World) -> Findings:
    request = m.IrqSet.parse(message.payload)
    most = world.irqs[request.index] if request.index < len(world.irqs) else 0
    if request.start + request.count > most and (request.start or request.count):
        yield Finding("range", f"interrupts {request.start}+{request.count} of index {request.index}: it has {most}")


def _irq_data(message: Received, world: World) -> Findings:
    request = m.IrqSet.parse(message.payload)
    tail = len(message.payload) - m.IrqSet.LAYOUT.size
    if request.flags & IrqSetFlags.DATA_EVENTFD:
        if message.fds and len(message.fds) != request.count:
            yield Finding("fd-count", f"{request.count} interrupts, {len(message.fds)} file descriptors")
        if not all(is_eventfd(fd.fileno()) for fd in message.fds):
            yield Finding("no-eventfd", "a file descriptor is no eventfd")
    elif message.fds:
        yield Finding("fds", "file descriptors without DATA_EVENTFD")
    booleans = request.count if request.flags & IrqSetFlags.DATA_BOOL else 0
    if tail != booleans:
        yield Finding("data", f"{tail} bytes of data, {booleans} belong there", value=tail)


# Regions


def _access(message: Received, world: World) -> Findings:
    access = m.RegionAccess.parse(message.payload)
    yield from _place(world, access.region, access.offset, access.count)
    if access.count > world.max_data:
        yield Finding("max-data", f"{access.count} bytes, max_data_xfer_size is {world.max_data}", value=access.count)


def _place(world: World, region: int, offset: int, count: int) -> Findings:
    if region >= len(world.regions):
        yield Finding("index", f"region {region}, there are {len(world.regions)}", value=region)
    elif offset + count > world.regions[region][0]:
        yield Finding("range", f"{offset:#x}+{count:#x} leaves region {region} of {world.regions[region][0]:#x} bytes")


def _multi(message: Received, world: World) -> Findings:
    count = m.WriteMulti.parse(message.payload).count
    entries = message.payload[m.WriteMulti.LAYOUT.size :]
    if not world.write_multiple:
        yield Finding("not-granted", "write_multiple was not granted")
    if len(entries) != count * m.WriteMultiEntry.LAYOUT.size:
        yield Finding("data", f"{count} writes announced, {len(entries)} bytes came")
        return
    for offset, region, size, _ in m.WriteMultiEntry.LAYOUT.iter_unpack(entries):
        yield from _place(world, region, offset, size)
        if not 0 < size <= 8:
            yield Finding("write-size", f"a write of {size} bytes: 1 to 8", value=size)


# DMA


def _map_flags(message: Received, world: World) -> Findings:
    flags = m.DmaMap.parse(message.payload).flags
    if not flags & (DmaFlags.READ | DmaFlags.WRITE):
        yield Finding("no-access", f"flags {flags:#x}: neither readable nor writable", Level.SHOULD, flags)
    if flags & ~(DmaFlags.READ | DmaFlags.WRITE):
        yield Finding("map-flags", f"flags {flags:#x}: the specification has 1 and 2", Level.SHOULD, flags)


def _map_range(message: Received, world: World) -> Findings:
    request = m.DmaMap.parse(message.payload)
    if not request.size or request.address + request.size > 1 << 64:
        yield Finding("range", f"{request.address:#x}+{request.size:#x} is no range of addresses")
    elif (request.address | request.size) % PAGE_SIZE:
        yield Finding("page", f"{request.address:#x}+{request.size:#x} is not in pages", Level.SHOULD)
    elif world.maps.overlapping(request.address, request.size):
        yield Finding("overlap", f"{request.address:#x}+{request.size:#x} overlaps what is mapped")


def _map_fd(message: Received, world: World) -> Findings:
    request = m.DmaMap.parse(message.payload)
    if not message.fds and request.offset:
        yield Finding("offset", f"offset {request.offset:#x} without a file descriptor", Level.SHOULD)
    for fd in message.fds:
        if not is_mappable(fd.fileno()):
            yield Finding("bad-fd", "the file descriptor cannot be mapped")
        elif request.offset % PAGE_SIZE:
            yield Finding("offset", f"offset {request.offset:#x} is no multiple of the page size")


def _unmap_range(message: Received, world: World) -> Findings:
    request = m.DmaUnmap.parse(message.payload)
    if request.flags == DmaUnmapFlags.ALL:
        return
    found = world.maps.overlapping(request.address, request.size) if request.size else []
    if [(address, size) for address, size, _ in found] != [(request.address, request.size)]:
        text = f"{request.address:#x}+{request.size:#x} is not one region that was mapped"
        yield Finding("no-such-map", text, value=len(found))


def _unmap_flags(message: Received, world: World) -> Findings:
    flags = m.DmaUnmap.parse(message.payload).flags
    if flags not in (0, DmaUnmapFlags.GET_DIRTY_BITMAP, DmaUnmapFlags.ALL):
        yield Finding("unmap-flags", f"flags {flags:#x}", value=flags)


# Features and migration


def _operation(message: Received, world: World) -> Findings:
    request = m.Feature.parse(message.payload)
    operation = request.operation
    if operation & ~sum(FeatureFlags) or not (operation & FeatureFlags.PROBE or operation.bit_count() == 1):
        yield Finding("operation", f"flags {request.flags:#x}: one of GET and SET, or PROBE", value=request.flags)


def _data_argsz(message: Received, world: World) -> Findings:
    request = m.MigData.parse(message.payload)
    if request.argsz < m.MigData.LAYOUT.size + request.size:
        yield Finding("argsz", f"argsz is {request.argsz} for {request.size} bytes of data", value=request.argsz)
    if request.size > world.max_data:
        yield Finding("max-data", f"{request.size} bytes, max_data_xfer_size is {world.max_data}", value=request.size)


_HAS_ARGSZ = {
    Command.DMA_MAP,
    Command.DMA_UNMAP,
    Command.DEVICE_GET_INFO,
    Command.DEVICE_GET_REGION_INFO,
    Command.DEVICE_GET_REGION_IO_FDS,
    Command.DEVICE_GET_IRQ_INFO,
    Command.DEVICE_SET_IRQS,
    Command.DEVICE_FEATURE,
}

_OWN: dict[int, tuple[Rule, ...]] = {
    Command.VERSION: (
        Rule("first", "it comes first, and once", _first),
        Rule("major", "major version 0", _version),
        Rule("json", "JSON, a NUL, capabilities of the right types", _json),
    ),
    Command.DEVICE_GET_INFO: (
        Rule("zeros", "all other fields are 0", _zeros(m.DeviceInfo, "flags", "num_regions", "num_irqs"), Level.SHOULD),
    ),
    Command.DEVICE_GET_REGION_INFO: (
        Rule("index", "a region that there is", _region_index),
        Rule(
            "zeros",
            "all other fields are 0",
            _zeros(m.RegionInfo, "flags", "cap_offset", "size", "offset"),
            Level.SHOULD,
        ),
    ),
    Command.DEVICE_GET_REGION_IO_FDS: (
        Rule("index", "a region that there is", _region_index),
        Rule("zeros", "flags and count are 0", _zeros(m.RegionIoFds, "flags", "count")),
    ),
    Command.DEVICE_GET_IRQ_INFO: (
        Rule("index", "an interrupt index that there is", _irq_index),
        Rule("zeros", "all other fields are 0", _zeros(m.IrqInfo, "flags", "count"), Level.SHOULD),
    ),
    Command.DEVICE_SET_IRQS: (
        Rule("flags", "one DATA, one ACTION", _irq_flags),
        Rule("range", "interrupts that there are", _irq_range),
        Rule("data", "eventfds or booleans as announced", _irq_data),
    ),
    Command.REGION_READ: (Rule("place", "inside the region, no more than max_data_xfer_size", _access),),
    Command.REGION_WRITE: (Rule("place", "inside the region, no more than max_data_xfer_size", _access),),
    Command.REGION_WRITE_MULTI: (Rule("entries", "writes inside their regions, of 1 to 8 bytes", _multi),),
    Command.DMA_MAP: (
        Rule("flags", "readable or writable, no other flags", _map_flags),
        Rule("range", "pages of the address space that are not mapped yet", _map_range),
        Rule("file", "a file that can be mapped", _map_fd),
    ),
    Command.DMA_UNMAP: (
        Rule("range", "exactly what was mapped", _unmap_range),
        Rule("flags", "no flags but libvfio-user's", _unmap_flags),
    ),
    Command.DEVICE_FEATURE: (Rule("operation", "one of GET and SET, or PROBE", _operation),),
    Command.MIG_DATA_READ: (Rule("argsz", "room for the data, no more than max_data_xfer_size", _data_argsz),),
    Command.MIG_DATA_WRITE: (Rule("argsz", "room for the data, no more than max_data_xfer_size", _data_argsz),),
}


def _rules(row: CommandSpec) -> Iterator[Rule]:
    yield Rule("header", "a command, without flags that mean nothing", _header(row))
    yield Rule("size", "as long as its structure and what that announces", _size(row))
    yield Rule("fds", "as many descriptors as belong to it, no more than max_msg_fds", _fds(row))
    if row.command in _HAS_ARGSZ:
        yield Rule("argsz", "the reply fits, or for DMA_MAP and SET_IRQS the request", _argsz(row.request.LAYOUT.size))
    yield from _OWN.get(row.command, ())


RULES: dict[Command, tuple[Rule, ...]] = {
    Command(number): tuple(_rules(row)) for number, row in COMMANDS.items() if row.sender is Role.CLIENT
}


def watch(conversation: Conversation, world: World) -> dict[str, list[tuple[Received, Finding]]]:
    """What each rule finds, by its case's name; a rule whose command never came is not there."""
    found: dict[str, list[tuple[Received, Finding]]] = {}
    for message in conversation.messages[:1]:
        if message.header.command != Command.VERSION:
            found["client/version/first"] = [(message, Finding("order", "the first command is not VERSION"))]
    for message in conversation.messages:
        command = message.header.command
        rules = RULES[Command(command)] if command in RULES else ()
        for rule in rules:
            findings = found.setdefault(rule_name(Command(command), rule), [])
            findings += [(message, finding) for finding in _safely(rule, message, world)]
        if not rules:
            unknown = found.setdefault(UNKNOWN, [])
            unknown.append((message, Finding("command", f"{command} is no command of a client's", value=command)))
        follow(message, world.maps)
        world.count += 1
    found.setdefault(UNKNOWN, [])
    return found


UNKNOWN = "client/commands"


def _safely(rule: Rule, message: Received, world: World) -> Iterable[Finding]:
    try:
        return list(rule.look(message, world))
    except MessageError:
        return []  # too short for it: the rule on sizes says so


def follow(message: Received, maps: IovaTable[None]) -> None:
    """Keep ``maps`` as a client's commands change them."""
    try:
        if message.header.command == Command.DMA_MAP:
            request = m.DmaMap.parse(message.payload)
            maps.add(request.address, request.size, None)
        elif message.header.command == Command.DMA_UNMAP:
            gone = m.DmaUnmap.parse(message.payload)
            everything = gone.flags == DmaUnmapFlags.ALL
            start, size = (0, 1 << 64) if everything else (gone.address, gone.size)
            for address, length, _ in maps.overlapping(start, size):
                maps.remove(address, length)
    except (MessageError, OSError):
        return  # a rule says what is wrong with it
