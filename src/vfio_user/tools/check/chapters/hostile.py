"""Malformed input and clients that vanish: one of them must not cost the others their server."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from vfio_user.tools.check.cases import MEMORY_SIZE, Case, Do, FdKind, Session, Start
from vfio_user.tools.check.chapters.dma import BASE, map_
from vfio_user.tools.check.expect import EMPTY, Findings, Served
from vfio_user.tools.check.facts import version, version_data
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.raw import NoMessageError, pack
from vfio_user.wire import messages as m
from vfio_user.wire.constants import HEADER_SIZE, Command, IrqSetFlags, PciIrq, PciRegion

SECTION = "Security Considerations"
LEFT = "Client Disconnection"
_INFO = m.DeviceInfo(16).pack()
_U32 = 0xFFFFFFFF

Procedure = Callable[[Session], Findings]


def _case(name: str, text: str, function: Procedure, *, start: Start = Start.FRESH, section: str = SECTION) -> Case:
    """After each of them another client is served."""
    step = Do(f"{text}; the next client is served", function)
    return Case(f"hostile/{name}", section, (step,), Level.MUST, Mode.HOSTILE, start, ends=True)


# Bytes that are no messages


def _says(data: bytes) -> Procedure:
    """Send this; any answer will do, and so will none."""

    def say(session: Session) -> Findings:
        with suppress(NoMessageError):
            session.wire.send(data)
            session.wire.socket.shutdown(socket.SHUT_WR)
            while True:
                session.wire.read()
        return iter(())

    return say


def _sized(size: int, body: bytes = b"", command: int = Command.DEVICE_GET_INFO) -> bytes:
    return m.Header(1, command, size, 0, 0).pack() + body


_GARBAGE: dict[str, bytes] = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "text": b"hello\n",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "count": bytes(range(256)) * 64,
}
_SIZES: dict[str, bytes] = {
    "0": _sized(0),
    "15": _sized(15),
    "1": _sized(1, bytes(64)),
    "max": _sized(_U32, bytes(64)),
    "2g": _sized(1 << 31, bytes(64)),
    "128m": _sized(128 << 20, bytes(4096)),
}


def _too_long(session: Session) -> Findings:
    """A whole message that is longer than any may be."""
    with suppress(NoMessageError):
        session.wire.send(_sized(HEADER_SIZE + (4 << 20), bytes(4 << 20)))
        session.wire.read()
    return iter(())


def _long_version(session: Session) -> Findings:
    with suppress(NoMessageError):
        session.wire.send(pack(1, Command.VERSION, version(b'{"x":"' + b"y" * (1 << 20) + b'"}\0')))
        session.wire.read()
    return iter(())


# Clients that vanish


def _leaves(*messages: bytes, fds: tuple[FdKind, ...] = ()) -> Procedure:
    """Send these, and close at once: nobody reads what comes."""

    def leave(session: Session) -> Findings:
        with suppress(NoMessageError):
            for data in messages:
                session.wire.send(data, [session.fd(kind) for kind in fds])
        session.wire.close()
        return iter(())

    return leave


def _stays_silent(session: Session) -> Findings:
    """Half a header; then another client must wait until this one has left, but not longer."""
    session.wire.send(_sized(32)[:8])
    session.reconnect()
    return iter(())


_READ_ALL = pack(1, Command.REGION_READ, m.RegionAccess(0, PciRegion.CONFIG, 256).pack())
_MAP = pack(1, Command.DMA_MAP, m.DmaMap(32, 3, 0, BASE, MEMORY_SIZE).pack())
_VERSION = pack(1, Command.VERSION, version(version_data()))


def _flood(count: int, message: bytes) -> Procedure:
    """Many commands, whose replies are read at last."""

    def send(session: Session) -> Findings:
        for _ in range(count):
            session.wire.send(message)
        for number in range(count):
            reply = session.wire.read()
            if reply.header.command != m.Header.parse(message).command:
                yield Finding("command", f"reply {number} is to command {reply.header.command}")
                return

    return send


# Descriptors


def _server_fds(session: Session) -> int | None:
    """How many descriptors the server has open; None where /proc does not tell."""
    credentials = session.wire.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    with suppress(OSError):
        return len(os.listdir(Path("/proc", str(int.from_bytes(credentials[:4], "little")), "fd")))
    return None


def _leak(use: Procedure, times: int = 32) -> Procedure:
    """The server has as many descriptors open after many clients as after one."""

    def measure(session: Session) -> Findings:
        list(use(session))
        session.stack.close()  # what is ours does not count, where the server is in this process
        session.reconnect()
        yield from Served("", 16).judge(session.ask(Command.DEVICE_GET_INFO, _INFO), session.facts)
        before = _server_fds(session)
        if before is None:
            return
        for _ in range(times):
            with suppress(NoMessageError):
                list(use(session))
            session.stack.close()
            session.reconnect()
        yield from Served("", 16).judge(session.ask(Command.DEVICE_GET_INFO, _INFO), session.facts)
        after = _server_fds(session)
        if after is not None and after >= before + times // 2:
            yield Finding("leak", f"{after - before} file descriptors are left of {times} clients", value=after)

    return measure


def _maps(session: Session) -> Findings:
    yield from map_(BASE, MEMORY_SIZE, EMPTY).run(session)


def _assigns(session: Session) -> Findings:
    index = next((irq for irq in PciIrq if session.facts.irq(irq).count), PciIrq.INTX)
    flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
    session.ask(Command.DEVICE_SET_IRQS, m.IrqSet(20, flags, index, 0, 1).pack(), [session.fd(FdKind.EVENT)])
    return iter(())


def _brings_strays(session: Session) -> Findings:
    fds = [session.fd(FdKind.EVENT) for _ in range(4)]
    session.ask(Command.DEVICE_GET_INFO, _INFO, fds)
    return iter(())


def _brings(count: int) -> Procedure:
    def send(session: Session) -> Findings:
        fd = session.fd(FdKind.EVENT)
        session.ask(Command.DEVICE_GET_INFO, _INFO, [fd] * count)
        return iter(())

    return send


def _many_clients(session: Session) -> Findings:
    for _ in range(50):
        session.reconnect()
    yield from Served("", 16).judge(session.ask(Command.DEVICE_GET_INFO, _INFO), session.facts)


def _garbage_cases() -> Iterator[Case]:
    text = "an error reply, or the end"
    for name, data in _GARBAGE.items():
        yield _case(f"garbage/{name}", text, _says(data), start=Start.BARE)
        yield _case(f"garbage/{name}-later", text, _says(data))
    for name, data in _SIZES.items():
        yield _case(f"size/{name}", text, _says(data), section="Header")
        first = data[:2] + bytes([Command.VERSION, 0]) + data[4:]
        yield _case(f"size/{name}-version", text, _says(first), section="Header", start=Start.BARE)
    yield _case("size/4m", text, _too_long, section="Header")
    yield _case("size/1m-version", text, _long_version, section="Header", start=Start.BARE)


def _leaving_cases() -> Iterator[Case]:
    header = pack(1, Command.REGION_READ, m.RegionAccess(0, PciRegion.CONFIG, 4).pack())
    for name, data in {
        "at-once": b"",
        "after-1-byte": _VERSION[:1],
        "after-15-bytes": _VERSION[:15],
        "after-the-header": _VERSION[:16],
        "in-the-json": _VERSION[:40],
        "before-the-reply": _VERSION,
    }.items():
        messages = (data,) if data else ()
        yield _case(f"left/{name}", "nothing", _leaves(*messages), start=Start.BARE, section=LEFT)
    for name, data in {"in-a-header": header[:9], "in-a-payload": header[:20], "reply-unread": _READ_ALL}.items():
        yield _case(f"left/{name}", "nothing", _leaves(data), section=LEFT)
    yield _case("left/64-replies-unread", "nothing", _leaves(*[_READ_ALL] * 64), section=LEFT)
    yield _case("left/memory-mapped", "nothing", _leaves(_MAP, fds=(FdKind.MEMORY,)), section=LEFT)
    yield _case("left/fds-of-half-a-message", "nothing", _leaves(_MAP[:20], fds=(FdKind.MEMORY,)), section=LEFT)
    yield _case("left/half-a-header", "the place of another client", _stays_silent, section=LEFT)
    yield _case("left/50-clients", "an answer to each", _many_clients, section=LEFT)


def cases() -> Iterator[Case]:
    yield from _garbage_cases()
    yield from _leaving_cases()
    bad = pack(1, 99, bytes(16))
    yield _case("flood/refused", "an error reply to each", _flood(100, bad), section="Command Concurrency")
    good = pack(1, Command.DEVICE_GET_INFO, _INFO)
    yield _case("flood/served", "a reply to each", _flood(100, good), section="Command Concurrency")
    for count in (16, 64, 253):
        text = "an error reply or success, or the end"
        yield _case(f"fds/{count}", text, _brings(count))
    for name, use in {"memory": _maps, "eventfds": _assigns, "strays": _brings_strays}.items():
        text = "no more descriptors than before, as far as /proc tells"
        yield _case(f"leak/{name}", text, _leak(use), section=LEFT)
