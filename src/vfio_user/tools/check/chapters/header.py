"""The header: ids, types, flags, commands that are none, order."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from vfio_user.tools.check.cases import Ask, Case, Do, FdKind, Session, Start
from vfio_user.tools.check.expect import Answered, Findings, Refused, Served, envelope
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.raw import NoMessageError, Received, pack
from vfio_user.wire import messages as m
from vfio_user.wire.constants import PAGE_SIZE, Command, DeviceFeature, FeatureFlags, HeaderFlags

SECTION = "Header"
CONCURRENCY = "Command Concurrency"
INFO = m.DeviceInfo(16).pack()
NOT_THERE = 0xFFFFFFFF

_UNKNOWN = (0, 14, 19, 20, 99, 0x7FFF, 0xFFFF)
_NOT_OURS = {Command.DMA_READ: m.DmaAccess(0, 16).pack(), Command.DMA_WRITE: m.DmaAccess(0, 4).pack() + bytes(4)}


def _with_id(*ids: int) -> Do:
    """Commands under these ids, each asked and answered."""

    def ask(session: Session) -> Findings:
        for number in ids:
            answer = session.ask(Command.DEVICE_GET_INFO, INFO, msg_id=number)
            yield from Served("", 16).judge(answer, session.facts)
            if isinstance(answer, Received):
                yield from envelope(answer, number, Command.DEVICE_GET_INFO)

    return Do("replies that repeat the id", ask)


def _pipelined(count: int, *, one_id: int | None = None, one_send: bool = False) -> Do:
    """``count`` commands before any reply is read, GET_INFO and GET_IRQ_INFO in turns."""

    def ask(session: Session) -> Findings:
        wire = session.wire
        commands = [Command.DEVICE_GET_INFO, Command.DEVICE_GET_IRQ_INFO] * (count // 2)
        ids = [wire.next_id() if one_id is None else one_id for _ in commands]
        messages = [pack(number, command, INFO) for number, command in zip(ids, commands, strict=True)]
        for data in [b"".join(messages)] if one_send else messages:
            wire.send(data)
        for number, command in zip(ids, commands, strict=True):
            yield from envelope(wire.read(), number, command)

    return Do(f"{count} replies, in the order of the commands", ask)


def _in_pieces(*cuts: int) -> Do:
    """A read of a message that comes in pieces."""

    def ask(session: Session) -> Findings:
        number = session.wire.next_id()
        whole, start = pack(number, Command.DEVICE_GET_INFO, INFO), 0
        for cut in (*cuts, len(whole)):
            session.wire.send(whole[start:cut])
            start = cut
        reply = session.wire.read()
        yield from envelope(reply, number, Command.DEVICE_GET_INFO)
        yield from Served("", 16).judge(reply, session.facts)

    return Do("the same reply as to a message that comes at once", ask)


def _posted(command: int, payload: bytes) -> Do:
    """NO_REPLY: the next thing that comes is the answer to the command behind it."""

    def ask(session: Session) -> Findings:
        session.wire.post(command, payload, flags=HeaderFlags.NO_REPLY)
        fence = session.wire.post(Command.DEVICE_GET_INFO, INFO)
        reply = session.wire.read()
        if reply.header.msg_id == fence:
            return
        yield Finding("answered", f"NO_REPLY was answered: {reply}", value=int(reply.is_error))
        try:
            session.wire.read()
        except NoMessageError as error:
            yield Finding(error.code, f"no answer to the command behind it: {error}")

    return Do("no reply, not of an error either", ask)


def _typed(kind: int) -> Do:
    """A message that is no command: refused or dropped, but not carried out."""

    def ask(session: Session) -> Findings:
        session.wire.post(Command.DEVICE_GET_INFO, INFO, flags=kind)
        fence = session.wire.post(Command.DEVICE_GET_IRQ_INFO, INFO)
        reply = session.wire.read()
        if reply.header.msg_id != fence:
            if not reply.is_error:
                yield Finding("executed", "a message that is no command was carried out")
            reply = session.wire.read()
        yield from envelope(reply, fence, Command.DEVICE_GET_IRQ_INFO)

    return Do("an error reply or none; the next command is answered", ask)


def _flagged(flags: int, error: int = 0) -> Do:
    """A command whose reserved bits are set."""

    def ask(session: Session) -> Findings:
        number = session.wire.next_id()
        session.wire.send(pack(number, Command.DEVICE_GET_INFO, INFO, flags, error))
        reply = session.wire.read()
        yield from envelope(reply, number, Command.DEVICE_GET_INFO)
        yield from Answered(Served("success", 16)).judge(reply, session.facts)

    return Do("success, or an error reply", ask)


_POSTED = {
    "dma_map": (Command.DMA_MAP, m.DmaMap(32, 3, 0, 7 << 40, PAGE_SIZE).pack()),
    "dma_unmap-error": (Command.DMA_UNMAP, m.DmaUnmap(24, 0, 5 << 40, PAGE_SIZE).pack()),
    "region_write-error": (Command.REGION_WRITE, m.RegionAccess(0, NOT_THERE, 4).pack() + bytes(4)),
    "set_irqs-error": (Command.DEVICE_SET_IRQS, m.IrqSet(20, 0x21, NOT_THERE, 0, 0).pack()),
    "device_feature-error": (
        Command.DEVICE_FEATURE,
        m.Feature(8, FeatureFlags.PROBE | (int(DeviceFeature.MIG_DATA_SIZE) + 90)).pack(),
    ),
    "unknown-command": (99, b""),
}


def cases() -> Iterator[Case]:
    yield Case("header/id/extremes", SECTION, (_with_id(0, 1, 0x7FFF, 0xFFFF),))
    yield Case("header/id/again", SECTION, (_with_id(5, 5, 5),))
    yield Case("header/id/concurrent", SECTION, (_pipelined(4, one_id=9),))
    for count in (2, 16, 64):
        yield Case(f"header/pipelined/{count}", CONCURRENCY, (_pipelined(count),))
    yield Case("header/pipelined/one-segment", CONCURRENCY, (_pipelined(32, one_send=True),))
    for cuts in ((1,), (15,), (16,), (17,), (4, 16, 31), tuple(range(1, 32))):
        yield Case(f"header/pieces/{len(cuts) + 1}-from-{cuts[0]}", "Socket", (_in_pieces(*cuts),))
    refused = Refused((errno.EINVAL, errno.ENOTSUP, errno.ENOSYS))
    for number in _UNKNOWN:
        yield Case(f"header/unknown/{number}", "Commands", (Ask(number, bytes(16), refused),))
        yield Case(f"header/unknown/{number}-empty", "Commands", (Ask(number, b"", refused),))
    for command, payload in _NOT_OURS.items():
        step = Ask(command, payload, Refused((errno.EINVAL, errno.ENOTSUP)))
        yield Case(f"header/direction/{command.name.lower()}", "Commands", (step,))
    for kind in (1, 2, 7, 15):
        yield Case(f"header/type/{kind}", SECTION, (_typed(kind),), Level.SHOULD)
    for bit in (6, 7, 8, 16, 31):
        yield Case(f"header/reserved/bit-{bit}", SECTION, (_flagged(1 << bit),))
    yield Case("header/reserved/error-bit", SECTION, (_flagged(HeaderFlags.ERROR),))
    yield Case("header/reserved/errno", SECTION, (_flagged(0, errno.EIO),))
    for name, (posted, payload) in _POSTED.items():
        yield Case(f"header/no-reply/{name}", SECTION, (_posted(posted, payload),), start=Start.FRESH)
    yield Case("header/no-reply/get_info", SECTION, (_posted(Command.DEVICE_GET_INFO, INFO),))
    for count in (1, 8):
        fds = (FdKind.EVENT,) * count
        step = Ask(Command.DEVICE_GET_INFO, INFO, Answered(Served("success", 16)), fds)
        yield Case(f"header/stray-fds/{count}", SECTION, (step,), mode=Mode.SAFE if count == 1 else Mode.HOSTILE)
