"""What the device says it is: GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from functools import partial

from vfio_user.errors import MessageError
from vfio_user.fds import is_mappable
from vfio_user.tools.check.cases import Ask, Case, Do, Session
from vfio_user.tools.check.expect import Answered, Findings, Refused, Served
from vfio_user.tools.check.facts import MOST_IRQS, Facts, needs_region
from vfio_user.tools.check.model import Finding, Level
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import (
    PAGE_SIZE,
    PCI_NUM_IRQS,
    PCI_NUM_REGIONS,
    REGION_INFO_CAP_SPARSE_MMAP,
    Command,
    DeviceFlags,
    IoFdType,
    IrqInfoFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
)

_NO_SUCH = {"next": 0, "next-but-100": 100, "largest": None}
_BASE = m.RegionInfo.LAYOUT.size


def _beyond(number: int, step: int | None) -> int:
    return 0xFFFFFFFF if step is None else number + step


# The device


def _device(reply: Received, facts: Facts) -> Findings:
    info = m.DeviceInfo.parse(reply.payload)
    if info.argsz != m.DeviceInfo.LAYOUT.size:
        yield Finding("argsz", f"argsz is {info.argsz}, not 16", Level.SHOULD, info.argsz)
    if not info.flags & DeviceFlags.PCI:
        yield Finding("not-pci", f"flags {info.flags:#x} without VFIO_DEVICE_FLAGS_PCI", value=info.flags)
    if info.flags & ~sum(DeviceFlags):
        yield Finding("unknown-flags", f"flags {info.flags:#x} have bits that mean nothing", Level.SHOULD, info.flags)
    if not PCI_NUM_REGIONS <= info.num_regions <= 100:
        text = f"{info.num_regions} regions: a PCI device has 9, and more than 100 is refused by QEMU"
        yield Finding("num-regions", text, value=info.num_regions)
    if not PCI_NUM_IRQS <= info.num_irqs <= 50:
        text = f"{info.num_irqs} interrupt indexes: a PCI device has 5, and more than 50 is refused by QEMU"
        yield Finding("num-irqs", text, value=info.num_irqs)


# Regions


def _region(index: int, argsz: int | None) -> Do:
    """``argsz`` None: as much as the first answer says that there is."""

    def ask(session: Session) -> Findings:
        room = argsz or max(_BASE, session.facts.region(index).argsz)
        request = m.RegionInfo(room, 0, index).pack()
        look = partial(_region_info, index=index, argsz=room)
        yield from session.expect(Served(look=look, fds=True), Command.DEVICE_GET_REGION_INFO, request)

    return Do("the region's description; its capabilities if argsz has room; a descriptor if it can be mapped", ask)


def _region_info(reply: Received, facts: Facts, *, index: int, argsz: int) -> Findings:
    if len(reply.payload) < _BASE:
        yield Finding("size", f"a payload of {len(reply.payload)} bytes, at least {_BASE}", value=len(reply.payload))
        return
    info = m.RegionInfo.parse(reply.payload)
    if info.index != index:
        yield Finding("index", f"the answer is about region {info.index}, {index} was asked for", value=info.index)
    if info.argsz < len(reply.payload):
        yield Finding("argsz", f"argsz {info.argsz} in a reply of {len(reply.payload)} bytes", value=info.argsz)
    if len(reply.payload) > max(argsz, _BASE):
        yield Finding("over-argsz", f"{len(reply.payload)} bytes came, argsz was {argsz}")
    if info.argsz <= argsz and len(reply.payload) < info.argsz:
        yield Finding("not-whole", f"{info.argsz} bytes fit, {len(reply.payload)} came")
    if info.flags & ~sum(RegionFlags):
        yield Finding("unknown-flags", f"flags {info.flags:#x} have bits that mean nothing", Level.SHOULD)
    yield from _mapping(reply, info)
    yield from _capabilities(reply, info)


def _mapping(reply: Received, info: m.RegionInfo) -> Findings:
    if not info.flags & RegionFlags.MMAP:
        if reply.fds:
            yield Finding("stray-fd", f"{len(reply.fds)} file descriptors with a region that cannot be mapped")
        return
    if not info.size:
        yield Finding("empty-mmap", "a region of 0 bytes that can be mapped", Level.SHOULD)
    if not reply.fds:
        whole = info.argsz == len(reply.payload)
        text = "the region can be mapped, but no file descriptor came"
        # Whether it has to come with a reply that is not whole is left open; libvfio-user sends it with the whole one.
        yield Finding("no-fd" if whole else "no-fd-yet", text, Level.MUST if whole else Level.SHOULD)
        return
    if len(reply.fds) > 1:
        yield Finding("fds", f"{len(reply.fds)} file descriptors for one region")
    if not is_mappable(reply.fds[0].fileno()):
        yield Finding("bad-fd", "the file descriptor cannot be mapped")
    elif info.offset % PAGE_SIZE:
        yield Finding("offset", f"offset {info.offset:#x} is no multiple of the page size", value=info.offset)


def _capabilities(reply: Received, info: m.RegionInfo) -> Findings:
    present = len(reply.payload) > _BASE
    if bool(info.flags & RegionFlags.CAPS) != bool(info.cap_offset):
        text = f"CAPS in flags {info.flags:#x}, cap_offset {info.cap_offset}"
        yield Finding("caps-flag", text, value=info.cap_offset)
        return
    if info.flags & RegionFlags.CAPS and not present:
        yield Finding("caps-absent", "CAPS is set, but the capabilities are not in the reply: QEMU refuses that")
        return
    if not info.cap_offset:
        return
    try:
        for header, position in m.parse_capability_chain(reply.payload, info.cap_offset):
            if header.id == REGION_INFO_CAP_SPARSE_MMAP:
                yield from _areas(m.parse_sparse_areas(reply.payload, position), info, header.version)
    except MessageError as error:
        yield Finding("chain", f"the capability chain: {error}")


def _areas(areas: tuple[tuple[int, int], ...], info: m.RegionInfo, version: int) -> Findings:
    if version != 1:
        yield Finding("cap-version", f"the sparse-mmap capability has version {version}", Level.SHOULD, version)
    end = 0
    for offset, size in sorted(areas):
        if offset + size > info.size:
            yield Finding("area", f"area {offset:#x}+{size:#x} leaves the region of {info.size:#x} bytes")
        if offset < end:
            yield Finding("area-overlap", f"area {offset:#x}+{size:#x} overlaps another one")
        if (offset | size) % PAGE_SIZE:
            yield Finding("area-page", f"area {offset:#x}+{size:#x} is not in pages", Level.SHOULD)
        end = offset + size


def _mapped_contents(index: int) -> Do:
    """What can be mapped is mapped: the file is as long as it has to be."""

    def look(session: Session) -> Findings:
        info = session.facts.region(index)
        request = m.RegionInfo(max(_BASE, info.argsz), 0, index).pack()
        reply = session.ask(Command.DEVICE_GET_REGION_INFO, request)
        if not isinstance(reply, Received) or not reply.fds:
            yield Finding("no-fd", "no file descriptor came")
            return
        fd = reply.fds[0].fileno()
        size = os.fstat(fd).st_size
        if size and size < info.offset + info.size and not info.argsz > _BASE:
            yield Finding("short-file", f"a file of {size:#x} bytes for a region at {info.offset:#x}+{info.size:#x}")
        try:
            mmap.mmap(fd, PAGE_SIZE, prot=mmap.PROT_READ, offset=info.offset).close()
        except (OSError, ValueError) as error:
            yield Finding("bad-fd", f"the file descriptor cannot be mapped: {error}")

    return Do("a file that can be mapped", look)


def _bar_size(index: int) -> Do:
    def look(session: Session) -> Findings:
        size = session.facts.region(index).size
        if size & (size - 1):
            yield Finding("bar-size", f"a BAR of {size:#x} bytes: no power of two", value=size)

    return Do("a power of two", look)


def _config_size(session: Session) -> Findings:
    size = session.facts.region(PciRegion.CONFIG).size
    if size not in (256, 4096):
        yield Finding("config-size", f"config space of {size} bytes, not 256 or 4096", value=size)


# I/O file descriptors


def _io_fds(index: int) -> Do:
    def ask(session: Session) -> Findings:
        base = m.RegionIoFds.LAYOUT.size
        request = m.RegionIoFds(base, 0, index, 0).pack()
        shape = Answered(Served(look=partial(_io_fds_shape, index=index, room=base)))
        yield from session.expect(shape, Command.DEVICE_GET_REGION_IO_FDS, request)
        room = 1 << 16
        whole = Answered(Served(look=partial(_io_fds_shape, index=index, room=room), fds=True))
        request = m.RegionIoFds(room, 0, index, 0).pack()
        yield from session.expect(whole, Command.DEVICE_GET_REGION_IO_FDS, request)

    return Do("argsz and count of the sub-regions, all of them where argsz has room; or an error reply", ask)


def _io_fds_shape(reply: Received, facts: Facts, *, index: int, room: int) -> Findings:
    base = m.RegionIoFds.LAYOUT.size
    if len(reply.payload) < base:
        yield Finding("size", f"a payload of {len(reply.payload)} bytes, at least {base}", value=len(reply.payload))
        return
    answer = m.RegionIoFds.parse(reply.payload)
    if answer.index != index:
        yield Finding("index", f"the answer is about region {answer.index}, {index} was asked for")
    if answer.flags:
        yield Finding("flags", f"flags are {answer.flags:#x}, not 0", value=answer.flags)
    if len(reply.payload) > room:
        yield Finding("over-argsz", f"{len(reply.payload)} bytes came, argsz was {room}")
    # 40 bytes each in the specification, which says not to rely on that; 48 in libvfio-user's header.
    stride = (answer.argsz - base) // answer.count if answer.count else 0
    if answer.count and stride not in (m.IoFd.SHORT_SIZE, m.IoFd.LAYOUT.size):
        yield Finding("stride", f"{answer.count} sub-regions in {answer.argsz - base} bytes", value=stride)
        return
    if answer.argsz <= room:
        yield from _io_fd_entries(reply, answer, stride, facts)


def _io_fd_entries(reply: Received, answer: m.RegionIoFds, stride: int, facts: Facts) -> Findings:
    base = m.RegionIoFds.LAYOUT.size
    if len(reply.payload) != base + answer.count * stride:
        yield Finding("not-whole", f"{answer.count} sub-regions announced, {len(reply.payload) - base} bytes came")
        return
    parse = m.IoFd.parse if stride == m.IoFd.LAYOUT.size else m.IoFd.parse_short
    for number in range(answer.count):
        entry = parse(reply.payload, base + number * stride)
        if entry.type not in set(IoFdType):
            yield Finding("io-type", f"sub-region {number} has type {entry.type}", value=entry.type)
        if entry.fd_index != m.NO_FD_INDEX and entry.fd_index >= len(reply.fds):
            yield Finding("fd-index", f"sub-region {number} has fd_index {entry.fd_index}, {len(reply.fds)} came")
        if entry.offset + entry.size > facts.region(answer.index).size:
            yield Finding("sub-region", f"sub-region {entry.offset:#x}+{entry.size:#x} leaves its region")


# Interrupts


def _irq(index: int) -> Ask:
    def look(reply: Received, facts: Facts) -> Findings:
        info = m.IrqInfo.parse(reply.payload)
        if info.argsz != m.IrqInfo.LAYOUT.size:
            yield Finding("argsz", f"argsz is {info.argsz}, not 16", Level.SHOULD, info.argsz)
        if info.index != index:
            yield Finding("index", f"the answer is about index {info.index}, {index} was asked for", value=info.index)
        if info.flags & ~sum(IrqInfoFlags):
            yield Finding("unknown-flags", f"flags {info.flags:#x} have bits that mean nothing", Level.SHOULD)
        if info.count and not info.flags & IrqInfoFlags.EVENTFD:
            yield Finding("no-eventfd", "interrupts that cannot be signalled by an eventfd", Level.SHOULD)
        if info.count > MOST_IRQS[PciIrq(index)]:
            text = f"{info.count} interrupts, {PciIrq(index).name} has {MOST_IRQS[PciIrq(index)]} at most"
            yield Finding("count", text, value=info.count)

    return Ask(Command.DEVICE_GET_IRQ_INFO, m.IrqInfo(16, 0, index).pack(), Served(size=16, look=look))


def cases() -> Iterator[Case]:
    section = "VFIO_USER_DEVICE_GET_INFO"
    ask = Ask(Command.DEVICE_GET_INFO, m.DeviceInfo(16).pack(), Served("a PCI device", 16, _device))
    yield Case("info/device", section, (ask,))
    ask = Ask(Command.DEVICE_GET_INFO, m.DeviceInfo(16, 0xFF, 1, 1).pack(), Answered(Served(size=16, look=_device)))
    yield Case("info/device/fields-set", section, (ask,), Level.SHOULD)
    yield from _region_cases()
    yield from _io_fd_cases()
    section = "VFIO_USER_DEVICE_GET_IRQ_INFO"
    for irq in PciIrq:
        yield Case(f"info/irq/{irq.name.lower()}", section, (_irq(irq),))
    for name, step in _NO_SUCH.items():
        payload = partial(_irq_beyond, step=step)
        refused = Ask(Command.DEVICE_GET_IRQ_INFO, payload, Refused())
        yield Case(f"info/irq/none/{name}", section, (refused,))


def _irq_beyond(facts: Facts, *, step: int | None) -> bytes:
    return m.IrqInfo(16, 0, _beyond(facts.info.num_irqs, step)).pack()


def _region_beyond(facts: Facts, *, step: int | None) -> bytes:
    return m.RegionInfo(32, 0, _beyond(facts.info.num_regions, step)).pack()


def _io_fds_beyond(facts: Facts, *, step: int | None) -> bytes:
    return m.RegionIoFds(16, 0, _beyond(facts.info.num_regions, step), 0).pack()


def _region_cases() -> Iterator[Case]:
    section = "VFIO_USER_DEVICE_GET_REGION_INFO"
    for region in PciRegion:
        for name, argsz in {"fixed": _BASE, "as-told": None, "room": 1 << 16}.items():
            yield Case(f"info/region/{region.name.lower()}/{name}", section, (_region(region, argsz),))
        mapped = needs_region(region, RegionFlags.MMAP)
        step = _mapped_contents(region)
        yield Case(f"info/region/{region.name.lower()}/mmap", section, (step,), needs=(mapped,))
    for index in range(PciRegion.BAR5 + 1):
        bar = needs_region(index, 0)
        yield Case(f"info/region/bar{index}/size", "PCI Local Bus 6.2.5.1", (_bar_size(index),), needs=(bar,))
    yield Case("info/region/config/size", section, (Do("256 or 4096 bytes", _config_size),))
    for name, beyond in _NO_SUCH.items():
        refused = Ask(Command.DEVICE_GET_REGION_INFO, partial(_region_beyond, step=beyond), Refused())
        yield Case(f"info/region/none/{name}", section, (refused,))


def _io_fd_cases() -> Iterator[Case]:
    section = "VFIO_USER_DEVICE_GET_REGION_IO_FDS"
    for region in PciRegion:
        yield Case(f"info/io-fds/{region.name.lower()}", section, (_io_fds(region),))
    for name, step in _NO_SUCH.items():
        refused = Ask(Command.DEVICE_GET_REGION_IO_FDS, partial(_io_fds_beyond, step=step), Refused())
        yield Case(f"info/io-fds/none/{name}", section, (refused,))
    any_errno = Refused((errno.EINVAL, errno.ENOTSUP, errno.ENOTTY))
    for name, payload in {
        "flags-set": m.RegionIoFds(4096, 1, 0, 0).pack(),
        "count-set": m.RegionIoFds(4096, 0, 0, 1).pack(),
    }.items():
        refused = Ask(Command.DEVICE_GET_REGION_IO_FDS, payload, any_errno)
        yield Case(f"info/io-fds/{name}", section, (refused,), Level.SHOULD)
