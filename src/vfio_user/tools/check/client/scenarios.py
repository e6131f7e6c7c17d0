"""How the played server behaves, and what a client has to make of it."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vfio_user.dma.iova import IovaTable
from vfio_user.protocol import Outgoing
from vfio_user.tools.check.cases import FdKind
from vfio_user.tools.check.client.played import BAR_SIZE, Conversation, Play, Twist, again, honest, of, whole
from vfio_user.tools.check.client.rules import follow
from vfio_user.tools.check.expect import Findings
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import (
    HEADER_SIZE,
    PAGE_SIZE,
    PCI_NUM_IRQS,
    PCI_NUM_REGIONS,
    REGION_INFO_CAP_SPARSE_MMAP,
    Command,
    HeaderFlags,
    RegionFlags,
)

_U32, _U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_ERROR = int(HeaderFlags.REPLY | HeaderFlags.ERROR)
_FIXED = m.Version.LAYOUT.size


class Outcome(Enum):
    """What a client has to do."""

    WORKS = "the client does its work, and ends well"
    NOTICES = "the client ends with an error: no crash, no hang"
    COPES = "the client works or ends with an error: no crash, no hang"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A behaviour of the server, on every connection of one run of the client.

    ``look`` finds what is wrong with a conversation in which something was twisted.
    """

    name: str
    section: str
    twist: Twist
    outcome: Outcome
    level: Level = Level.MUST
    mode: Mode = Mode.SAFE
    look: Callable[[Conversation], Findings] = lambda conversation: iter(())


# Well-behaved, but not as most are


def _capabilities(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Twist:
    """The answer to VERSION, with other capabilities."""

    @of(Command.VERSION)
    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        data = whole(reply)
        text = data[HEADER_SIZE + _FIXED :].rstrip(b"\0")
        given = json.loads(text).get("capabilities", {}) if text else {}
        new = json.dumps({"capabilities": change(given)}, separators=(",", ":")).encode() + b"\0"
        play.twisted(again(data[: HEADER_SIZE + _FIXED] + new))

    return twist


def _version_text(text: bytes) -> Twist:
    @of(Command.VERSION)
    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        play.twisted(again(whole(reply)[: HEADER_SIZE + _FIXED] + text))

    return twist


def _version_number(major: int, minor: int) -> Twist:
    @of(Command.VERSION)
    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        data = whole(reply)
        play.twisted(data[:HEADER_SIZE] + m.Version(major, minor).pack() + data[HEADER_SIZE + _FIXED :])

    return twist


def _lower_minor(minor: int) -> Twist:
    """An answer in a lower minor version; a client that proposed none higher has its own."""
    twist = _version_number(0, minor)

    def lower(play: Play, request: Received, reply: Outgoing) -> None:
        is_version = request.header.command == Command.VERSION and len(request.payload) >= _FIXED
        lowers = is_version and m.Version.parse(request.payload).minor > minor
        (twist if lowers else honest)(play, request, reply)

    return lower


def _limited(limits: dict[str, int]) -> Twist:
    """Only what the client proposed is answered, so only that is limited."""
    return _capabilities(lambda given: given | {name: limits[name] for name in limits.keys() & given.keys()})


def _in_pieces(size: int) -> Twist:
    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        data = whole(reply)
        play.twisted(data[:size], reply.fds)
        for start in range(size, len(data), size):
            play.send(data[start : start + size])

    return twist


def _refuse(number: int, payload: int, *commands: Command) -> Twist:
    @of(*commands)
    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        header = again(whole(reply)[:HEADER_SIZE] + bytes(payload), flags=_ERROR, error_no=number)
        play.twisted(header)

    return twist


def _patched(command: Command, layout: str, offset: int, *values: int) -> Twist:
    """Other values in a reply's payload."""

    @of(command)
    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        data = bytearray(whole(reply))
        if len(data) < HEADER_SIZE + offset + struct.calcsize(layout):
            honest(play, request, reply)
            return
        struct.pack_into(layout, data, HEADER_SIZE + offset, *values)
        play.twisted(bytes(data), reply.fds)

    return twist


def _more_entries(play: Play, request: Received, reply: Outgoing) -> None:
    """Three more regions and interrupt indexes than PCI has, empty ones."""
    command, data = request.header.command, whole(reply)
    if command == Command.DEVICE_GET_INFO:
        more = struct.pack("<II", PCI_NUM_REGIONS + 3, PCI_NUM_IRQS + 3)
        play.conversation.regions += ((0, 0),) * 3
        play.conversation.irqs += (0,) * 3
        play.twisted(data[: HEADER_SIZE + 8] + more)
        return
    if command not in (Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_IRQ_INFO) or len(request.payload) < 12:
        honest(play, request, reply)
        return
    index = int.from_bytes(request.payload[8:12], "little")
    regions = command == Command.DEVICE_GET_REGION_INFO
    first = PCI_NUM_REGIONS if regions else PCI_NUM_IRQS
    if not first <= index < first + 3:
        honest(play, request, reply)
        return
    empty = m.RegionInfo(32, 0, index).pack() if regions else m.IrqInfo(16, 0, index).pack()
    play.twisted(again(data[:HEADER_SIZE] + empty, flags=int(HeaderFlags.REPLY), error_no=0))


# A region that can be mapped

_UNKNOWN_CAPABILITY = 0x7777


def _sparse(size: int = PAGE_SIZE) -> bytes:
    """A chain: a capability that nobody knows, and the areas."""
    base = m.RegionInfo.LAYOUT.size
    unknown = m.CapabilityHeader(_UNKNOWN_CAPABILITY, 1, base + 16).pack() + bytes(8)
    areas = m.CapabilityHeader(REGION_INFO_CAP_SPARSE_MMAP, 1, 0).pack() + m.SparseAreas(1).pack()
    return unknown + areas + m.AREA.pack(PAGE_SIZE, size)


def _mapped_bar(chain: bytes, cap_offset: int = 32, fds: int = 1, **fields: int) -> Twist:
    """BAR 0 can be mapped in part; ``chain`` comes once the client has room for it."""

    @of(Command.DEVICE_GET_REGION_INFO)
    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        info = m.RegionInfo.parse(request.payload)
        if info.index:
            honest(play, request, reply)
            return
        argsz = m.RegionInfo.LAYOUT.size + len(chain)
        fits = info.argsz >= argsz
        access = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
        flags = access | (RegionFlags.CAPS if fits else 0)
        values = {"argsz": argsz, "flags": int(flags), "index": 0, "size": BAR_SIZE} | fields
        answer = m.RegionInfo(**values, cap_offset=cap_offset if fits else 0).pack() + (chain if fits else b"")
        with ExitStack() as stack:
            files = [FdKind.MEMORY.make(stack) for _ in range(fds)]
            play.twisted(again(whole(reply)[:HEADER_SIZE] + answer, flags=1, error_no=0), files)

    return twist


# The server asks for DMA


class _Asks:
    """Asks for DMA once: after the reply that follows a DMA_MAP, where no client waits for anything.

    ``ask`` is given the play and what is mapped.
    """

    def __init__(self, ask: Callable[[Play, IovaTable[None]], bool]) -> None:
        self._ask = ask

    def __call__(self, play: Play, request: Received, reply: Outgoing) -> None:
        play.send_reply(reply)
        if play.conversation.twisted or request.header.command == Command.VERSION:
            return
        maps: IovaTable[None] = IovaTable()
        for message in play.conversation.messages:
            follow(message, maps)
        if self._ask(play, maps):
            play.conversation.twisted += 1


_SOME = 64


def _mapped(maps: IovaTable[None]) -> int | None:
    return next((address for address, size, _ in maps if size >= _SOME), None)


def _read(play: Play, maps: IovaTable[None]) -> bool:
    address = _mapped(maps)
    if address is None:
        return False
    play.ask(Command.DMA_READ, m.DmaAccess(address, _SOME).pack())
    return True


def _read_in_row(play: Play, maps: IovaTable[None]) -> bool:
    return _read(play, maps) and _read(play, maps) and _read(play, maps)


def _unmapped(play: Play, maps: IovaTable[None]) -> bool:
    if not len(maps):
        return False
    play.ask(Command.DMA_READ, m.DmaAccess(0x7FFF_0000_0000_0000, _SOME).pack())
    return True


def _unmapped_write(play: Play, maps: IovaTable[None]) -> bool:
    if not len(maps):
        return False
    play.ask(Command.DMA_WRITE, m.DmaAccess(0x7FFF_0000_0000_0000, _SOME).pack() + bytes(_SOME))
    return True


def _far_too_much(play: Play, maps: IovaTable[None]) -> bool:
    address = _mapped(maps)
    if address is None:
        return False
    play.ask(Command.DMA_READ, m.DmaAccess(address, 1 << 62).pack())
    return True


def _short_dma(play: Play, maps: IovaTable[None]) -> bool:
    play.ask(Command.DMA_READ, bytes(8))
    return True


def _unknown_command(play: Play, maps: IovaTable[None]) -> bool:
    play.ask(99, bytes(8))
    return True


def _wrong_direction(play: Play, maps: IovaTable[None]) -> bool:
    play.ask(Command.DEVICE_GET_INFO, m.DeviceInfo(16).pack())
    return True


def _answers(*, error: bool) -> Callable[[Conversation], Findings]:
    """Each command of ours was answered, as the specification has it."""

    def look(conversation: Conversation) -> Findings:
        for number, (command, payload) in conversation.asked.items():
            reply = conversation.replies.get(number)
            if reply is None:
                yield Finding("unanswered", f"command {command} of the server's was not answered", value=command)
            elif reply.header.command != command:
                yield Finding("command", f"command {command} was answered as {reply.header.command}")
            elif reply.is_error != error:
                number = reply.header.error_no
                code, text = ("refused", f"refused with errno {number}") if reply.is_error else ("accepted", "accepted")
                yield Finding(code, f"command {command} was {text}", value=number)
            elif not error and (reply.payload[:16] != payload or len(reply.payload) != 16 + _SOME):
                text = f"{len(reply.payload)} bytes of payload do not repeat address and count, with {_SOME} of data"
                yield Finding("dma-reply", text, value=len(reply.payload))
            elif error and reply.payload:
                yield Finding("error-payload", f"an error reply with {len(reply.payload)} bytes of payload")

    return look


# Broken

_Edit = Callable[[bytes], bytes]


def _edited(edit: _Edit, *, close: bool = False) -> Callable[[Command], Twist]:
    def make(command: Command) -> Twist:
        @of(command)
        def twist(play: Play, request: Received, reply: Outgoing) -> None:
            data = edit(whole(reply))
            if data:
                play.twisted(data, reply.fds)
            if close:
                play.close()

        return twist

    return make


_BREAKS: dict[str, tuple[Callable[[Command], Twist], Outcome]] = {
    "error": (_edited(lambda data: again(data[:16], flags=_ERROR, error_no=errno.EIO)), Outcome.COPES),
    "error-without-errno": (_edited(lambda data: again(data[:16], flags=_ERROR)), Outcome.COPES),
    "error-with-payload": (_edited(lambda data: again(data, flags=_ERROR, error_no=errno.EIO)), Outcome.COPES),
    "error-beyond-errno": (_edited(lambda data: again(data[:16], flags=_ERROR, error_no=_U32)), Outcome.COPES),
    "empty": (_edited(lambda data: again(data[:16])), Outcome.NOTICES),
    "short-by-1": (_edited(lambda data: again(data[:-1])), Outcome.NOTICES),
    "half": (_edited(lambda data: again(data[: 16 + (len(data) - 16) // 2])), Outcome.NOTICES),
    "other-id": (_edited(lambda data: again(data, msg_id=0xABCD)), Outcome.NOTICES),
    "other-command": (_edited(lambda data: again(data, command=Command.DEVICE_RESET)), Outcome.NOTICES),
    "size-0": (_edited(lambda data: again(data, msg_size=0)), Outcome.NOTICES),
    "size-15": (_edited(lambda data: again(data, msg_size=15)), Outcome.NOTICES),
    "size-max": (_edited(lambda data: again(data, msg_size=_U32), close=True), Outcome.NOTICES),
    "closed": (_edited(lambda data: b"", close=True), Outcome.NOTICES),
    "closed-in-the-header": (_edited(lambda data: data[:7], close=True), Outcome.NOTICES),
    "closed-in-the-payload": (_edited(lambda data: data[:-1], close=True), Outcome.NOTICES),
    "garbage": (_edited(lambda data: b"\xff" * 64, close=True), Outcome.NOTICES),
    "text": (_edited(lambda data: b"HTTP/1.1 400 Bad Request\r\n\r\n", close=True), Outcome.NOTICES),
}
"""What may be wrong with any reply that has a payload."""

_NO_REPLIES: dict[str, Callable[[Command], Twist]] = {
    "no-reply-type": _edited(lambda data: again(data, flags=0)),
    "type-15": _edited(lambda data: again(data, flags=15)),
}
"""Nothing that answers: a client finds out when its patience ends, so this is done with one command only."""

_BROKEN = (
    Command.VERSION,
    Command.DEVICE_GET_INFO,
    Command.DEVICE_GET_REGION_INFO,
    Command.DEVICE_GET_IRQ_INFO,
    Command.REGION_READ,
)

_OPTIONAL = (Command.DEVICE_GET_REGION_IO_FDS, Command.DEVICE_FEATURE)
"""Commands that a server may refuse."""


def _good(name: str, section: str, twist: Twist, outcome: Outcome = Outcome.WORKS, **more: Any) -> Scenario:
    return Scenario(f"server/{name}", section, twist, outcome, **more)


def _bad(name: str, twist: Twist, outcome: Outcome = Outcome.COPES) -> Scenario:
    return Scenario(f"broken/{name}", "Security Considerations", twist, outcome, mode=Mode.HOSTILE)


def _plain_scenarios() -> Iterator[Scenario]:
    version = "VFIO_USER_VERSION"
    yield _good("plain", "Protocol Specification", honest)
    for minor in (0, 1):
        yield _good(f"minor-{minor}", version, _lower_minor(minor))
    yield _good("no-version-data", version, _version_text(b""))
    yield _good("no-capabilities", version, _version_text(b'{"capabilities":{}}\0'))
    yield _good("empty-version-data", version, _version_text(b"{}\0"))
    yield _good("spaces", version, _version_text(b'{ "capabilities" : { } }\n\0'))
    unknown = _capabilities(lambda given: given | {"x": {"y": [1]}})
    yield _good("unknown-capability", version, unknown, level=Level.SHOULD)
    yield _good("limit-data", version, _limited({"max_data_xfer_size": PAGE_SIZE}))
    yield _good("limit-fds", version, _limited({"max_msg_fds": 1}))
    no_multi = _capabilities(lambda given: {key: value for key, value in given.items() if key != "write_multiple"})
    yield _good("no-write-multiple", version, no_multi)
    for size in (1, 16, 17):
        yield _good(f"pieces-{size}", "Socket", _in_pieces(size))
    yield _good("more-regions-and-irqs", "Device-Specific Regions", _more_entries)
    section = "VFIO_USER_DEVICE_GET_REGION_INFO"
    yield _good("sparse-bar", section, _mapped_bar(_sparse()))
    for name, number, payload in (("enotsup", errno.ENOTSUP, 0), ("einval", errno.EINVAL, 0), ("errno-0", 0, 0)):
        yield _good(f"optional-{name}", "Header", _refuse(number, payload, *_OPTIONAL))
    quirk = _refuse(errno.EINVAL, 40, *_OPTIONAL)
    yield _good("optional-with-payload", "Header", quirk, level=Level.SHOULD)


def _dma_scenarios() -> Iterator[Scenario]:
    read, write = "VFIO_USER_DMA_READ", "VFIO_USER_DMA_WRITE"
    served, refused = _answers(error=False), _answers(error=True)
    yield _good("dma-read", read, _Asks(_read), look=served)
    yield _good("dma-read-3", read, _Asks(_read_in_row), look=served)
    yield _good("dma-read-unmapped", read, _Asks(_unmapped), look=refused)
    yield _good("dma-write-unmapped", write, _Asks(_unmapped_write), look=refused)
    for name, ask in {
        "dma-far-too-much": _far_too_much,
        "dma-short": _short_dma,
        "unknown-command": _unknown_command,
        "wrong-direction": _wrong_direction,
    }.items():
        yield Scenario(
            f"broken/{name}", "Commands", _Asks(ask), Outcome.COPES, Level.SHOULD, Mode.HOSTILE, look=refused
        )


def _broken_scenarios() -> Iterator[Scenario]:
    for command in _BROKEN:
        for name, (make, outcome) in _BREAKS.items():
            yield _bad(f"{command.name.lower()}/{name}", make(command), outcome)
    for name, make in _NO_REPLIES.items():
        yield _bad(f"device_get_info/{name}", make(Command.DEVICE_GET_INFO), Outcome.NOTICES)


_BAD_TEXT = {
    "no-nul": b"{}",
    "nul-alone": b"\0",
    "no-json": b"capabilities\0",
    "unfinished": b'{"capabilities":{\0',
    "array": b"[]\0",
    "bad-utf8": b'{"capabilities":{"\xff":1}}\0',
    "deep": b'{"capabilities":' + b"[" * 5000 + b"]" * 5000 + b"}\0",
    "fds-string": b'{"capabilities":{"max_msg_fds":"8"}}\0',
    "data-negative": b'{"capabilities":{"max_data_xfer_size":-1}}\0',
    "data-0": b'{"capabilities":{"max_data_xfer_size":0}}\0',
    "twin-without-fd": b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}\0',
    "twin-index": b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":4294967295}}}\0',
}


def _special_scenarios() -> Iterator[Scenario]:
    for name, text in _BAD_TEXT.items():
        yield _bad(f"version/data-{name}", _version_text(text))
    yield _bad("version/major-1", _version_number(1, 0), Outcome.NOTICES)
    yield _bad("version/minor-max", _version_number(0, 0xFFFF))
    yield _bad("version/twin-is-a-pipe", _twin_pipe)
    info, region = Command.DEVICE_GET_INFO, Command.DEVICE_GET_REGION_INFO
    for name, values in {"max": (_U32, _U32), "none": (0, 0), "256k": (1 << 18, 1 << 18)}.items():
        yield _bad(f"device_get_info/numbers-{name}", _patched(info, "<II", 8, *values))
    for name, (layout, offset, value) in {
        "index": ("<I", 8, 77),
        "argsz-max": ("<I", 0, _U32),
        "argsz-0": ("<I", 0, 0),
        "bytes-max": ("<Q", 16, _U64),
        "cap-offset-max": ("<I", 12, _U32),
        "mmap-without-fd": ("<I", 4, int(RegionFlags.MMAP | RegionFlags.READ | RegionFlags.WRITE)),
        "caps-without": ("<I", 4, int(RegionFlags.CAPS | RegionFlags.READ | RegionFlags.WRITE)),
    }.items():
        yield _bad(f"device_get_region_info/{name}", _patched(region, layout, offset, value))
    yield from _chain_scenarios()
    irq = Command.DEVICE_GET_IRQ_INFO
    yield _bad("device_get_irq_info/index", _patched(irq, "<I", 8, 77))
    yield _bad("device_get_irq_info/count-max", _patched(irq, "<I", 12, _U32))
    yield _bad("region_read/other-count", _patched(Command.REGION_READ, "<I", 12, _U32))
    yield _bad("region_read/other-place", _patched(Command.REGION_READ, "<QI", 0, _U64, 5))


def _chain_scenarios() -> Iterator[Scenario]:
    loop = m.CapabilityHeader(_UNKNOWN_CAPABILITY, 1, 32).pack() + bytes(8)
    back = m.CapabilityHeader(_UNKNOWN_CAPABILITY, 1, 4).pack() + bytes(8)
    outside = m.CapabilityHeader(_UNKNOWN_CAPABILITY, 1, 1 << 20).pack() + bytes(8)
    huge = m.CapabilityHeader(REGION_INFO_CAP_SPARSE_MMAP, 1, 0).pack() + m.SparseAreas(_U32).pack()
    for name, chain in {"loop": loop, "back": back, "outside": outside, "areas-max": huge, "cut": loop[:4]}.items():
        yield _bad(f"device_get_region_info/chain-{name}", _mapped_bar(chain))
    yield _bad("device_get_region_info/area-outside", _mapped_bar(_sparse(1 << 40)))
    yield _bad("device_get_region_info/cap-offset-outside", _mapped_bar(_sparse(), cap_offset=1 << 20))
    yield _bad("device_get_region_info/16-fds", _mapped_bar(_sparse(), fds=16))
    yield _bad("device_get_region_info/no-fd", _mapped_bar(_sparse(), fds=0))


@of(Command.VERSION)
def _twin_pipe(play: Play, request: Received, reply: Outgoing) -> None:
    text = b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}\0'
    reader, writer = os.pipe()
    try:
        play.twisted(again(whole(reply)[: HEADER_SIZE + _FIXED] + text), [reader])
    finally:
        os.close(reader)
        os.close(writer)


def scenarios() -> tuple[Scenario, ...]:
    """All there are, in the order of the report."""
    return (*_plain_scenarios(), *_dma_scenarios(), *_broken_scenarios(), *_special_scenarios())
