"""VERSION: what may be proposed, what may be answered, and what is none."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from vfio_user.tools.check.cases import Ask, Case, Do, Session, Start
from vfio_user.tools.check.expect import Findings, Refused, Served
from vfio_user.tools.check.facts import PROPOSAL, ROOM, Facts, told_capabilities, version, version_data
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS, Role
from vfio_user.wire.constants import HEADER_SIZE, Command, HeaderFlags

SECTION = "VFIO_USER_VERSION"
TWIN = PROPOSAL | {"twin_socket": {"supported": True}}

_TYPES: dict[str, tuple[type, ...]] = {
    "max_msg_fds": (int,),
    "max_data_xfer_size": (int,),
    "max_dma_maps": (int,),
    "pgsizes": (int,),
    "write_multiple": (bool,),
    "twin_socket": (dict,),
    "migration": (dict,),
}
_VALUES: dict[str, Any] = {**PROPOSAL, "twin_socket": {"supported": True}}


def _body(text: bytes, proposed: dict[str, Any] | None) -> Iterator[Finding]:
    """The version data of an answer to ``proposed``; None: to none."""
    if not text:
        return
    if text[-1] != 0:
        yield Finding("nul", "the version data does not end with a NUL")
    try:
        capabilities = told_capabilities(text)
    except ValueError as error:
        yield Finding("json", f"the version data cannot be read: {error}")
        return
    names = capabilities.keys()
    extra = sorted(names - (proposed or {}).keys())
    if extra:
        yield Finding("not-proposed", f"capabilities that were not proposed: {', '.join(extra)}")
    for name in sorted(names & _TYPES.keys()):
        value = capabilities[name]
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool) != (_TYPES[name] == (bool,)):
            yield Finding("capability-type", f"{name} is {value!r}")


def _answer(proposed: dict[str, Any] | None, minor: int, length: int) -> Served:
    """An answer that fits what was proposed, in the minor version and in ``length`` bytes of version data."""

    def look(reply: Received, facts: Facts) -> Findings:
        if len(reply.payload) < m.Version.LAYOUT.size:
            yield Finding("size", f"a payload of {len(reply.payload)} bytes")
            return
        answer = m.Version.parse(reply.payload)
        if answer.major:
            yield Finding("major", f"the answer is {answer.major}.{answer.minor}", value=answer.major)
        if answer.minor > minor:
            yield Finding("minor", f"minor {answer.minor}, {minor} was proposed", value=answer.minor)
        text = reply.payload[m.Version.LAYOUT.size :]
        yield from _body(text, proposed)
        if reply.fds and _granted_twin(reply) is None:
            yield Finding("fds", f"{len(reply.fds)} file descriptors without a twin socket")
        if len(text) > length:
            why = "QEMU refuses that" if length else "nothing was proposed"
            yield Finding("longer", f"{len(text)} bytes answer {length}: {why}", Level.SHOULD, len(text))

    return Served(f"version 0.{minor} or lower, no more capabilities than were proposed", look=look, fds=True)


def _accepts(name: str, capabilities: dict[str, Any], *, minor: int = 2, level: Level = Level.MUST) -> Case:
    text = version_data(capabilities)
    step = Ask(Command.VERSION, version(text, minor=minor), _answer(capabilities, minor, len(text)))
    return Case(f"version/{name}", SECTION, (step,), level, start=Start.BARE)


def _text(name: str, text: bytes) -> Case:
    """Version data that propose nothing that is known."""
    step = Ask(Command.VERSION, version(text), _answer({}, 2, len(text)))
    return Case(f"version/data/{name}", SECTION, (step,), start=Start.BARE)


def _refuses(name: str, payload: bytes, level: Level = Level.MUST, mode: Mode = Mode.SAFE) -> Case:
    step = Ask(Command.VERSION, payload, Refused(or_closed=True))
    return Case(f"version/{name}", SECTION, (step,), level, mode, Start.BARE, ends=True)


# The twin socket


def _twin(session: Session) -> Findings:
    text = version_data(TWIN)
    answer = session.ask(Command.VERSION, version(text))
    yield from _answer(TWIN, 2, len(text)).judge(answer, session.facts)
    if not isinstance(answer, Received) or answer.is_error:
        return
    granted = _granted_twin(answer)
    if granted is None:
        return
    index = granted.get("fd_index")
    if not isinstance(index, int) or not 0 <= index < len(answer.fds):
        yield Finding("twin-index", f"a twin socket at fd_index {index!r}, {len(answer.fds)} came")
        return
    with suppress(OSError), socket.socket(fileno=answer.fds[index].take()) as twin:
        if (twin.family, twin.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
            return
    yield Finding("twin-socket", "the twin socket is no UNIX stream socket")


def _granted_twin(answer: Received) -> dict[str, Any] | None:
    with suppress(ValueError):
        twin = told_capabilities(answer.payload[m.Version.LAYOUT.size :]).get("twin_socket")
        if isinstance(twin, dict) and twin.get("supported") is True:
            return twin
    return None


# How it is framed


def _in_pieces(*cuts: int) -> Do:
    """VERSION, with a pause on the way in which the server sees no more than a part."""

    def send(session: Session) -> Findings:
        text = version_data()
        payload = version(text)
        whole = m.Header(7, Command.VERSION, HEADER_SIZE + len(payload), 0, 0).pack() + payload
        start = 0
        for cut in (*cuts, len(whole)):
            session.wire.send(whole[start:cut])
            start = cut
        reply = session.wire.read()
        yield from _answer(PROPOSAL, 2, len(text)).judge(reply, session.facts)

    return Do("the same answer as to one that comes at once", send)


def _version_again(session: Session) -> Findings:
    yield from session.expect(Refused(), Command.VERSION, version(version_data()))


_BAD_VALUES: dict[str, dict[str, Any]] = {
    "max_msg_fds": {"string": "8", "float": 1.5, "negative": -1, "bool": True, "array": [8]},
    "max_data_xfer_size": {"string": "1", "float": 0.5, "negative": -1, "zero": 0},
    "max_dma_maps": {"string": "1", "negative": -1, "zero": 0},
    "pgsizes": {"string": "4096", "zero": 0, "below-4096": 512},
    "write_multiple": {"number": 1, "string": "true"},
    "twin_socket": {"bool": True, "supported-number": {"supported": 1}},
}

_GOOD_VALUES: dict[str, dict[str, Any]] = {
    "max_msg_fds": {"0": 0, "1": 1, "253": 253},
    "max_data_xfer_size": {"1024": 1024, "4096": 4096, "16M": 16 << 20},
    "max_dma_maps": {"1": 1, "65535": 65535},
    "pgsizes": {"4k": 4096, "4k-2M": 4096 | 2 << 20},
    "write_multiple": {"true": True, "false": False},
    "twin_socket": {"false": {"supported": False}, "empty": {}},
    "migration": {"empty": {}},
}

_MALFORMED = {
    "no-nul": b'{"capabilities":{}}',
    "nul-alone": b"\0",
    "two-bytes": b"{}",
    "unfinished": b'{"capabilities":{\0',
    "no-json": b"capabilities\0",
    "capabilities-array": b'{"capabilities":[]}\0',
    "capabilities-string": b'{"capabilities":"all"}\0',
    "bad-utf8": b'{"capabilities":{"\xff\xfe":1}}\0',
    "nan": b'{"capabilities":{"max_msg_fds":NaN}}\0',
    "huge-number": b'{"capabilities":{"max_data_xfer_size":1' + b"0" * 400 + b"}}\0",
    "deep": b'{"capabilities":' + b"[" * 20000 + b"]" * 20000 + b"}\0",
}
_LOOSE = {"array": b"[]\0", "number": b"3\0", "trailing": b'{"capabilities":{}} and more\0'}

_EARLY = {row.command: row.request.LAYOUT.size for row in COMMANDS.values() if row.sender is Role.CLIENT}


def cases() -> Iterator[Case]:
    yield _accepts("standard", PROPOSAL)
    for minor in (0, 1, 3, 0xFFFF):
        yield _accepts(f"minor/{minor}", PROPOSAL, minor=minor)
    for major in (1, 0xFFFF):
        yield _refuses(f"major/{major}", version(version_data(), major=major))
    yield from _data()
    yield from _capabilities()
    for size in range(m.Version.LAYOUT.size):
        yield _refuses(f"short/{size}", bytes(size), mode=Mode.HOSTILE)
    for name, text in _MALFORMED.items():
        yield _refuses(f"malformed/{name}", version(text), mode=Mode.HOSTILE)
    for name, text in _LOOSE.items():
        yield _refuses(f"malformed/{name}", version(text), Level.SHOULD, Mode.HOSTILE)
    yield from _order()


def _data() -> Iterator[Case]:
    none = Ask(Command.VERSION, version(b""), _answer(None, 2, 0))
    yield Case("version/data/none", SECTION, (none,), start=Start.BARE)
    yield _text("empty-object", b"{}" + b" " * ROOM + b"\0")
    yield _text("no-capabilities", b'{"capabilities":{}}' + b" " * ROOM + b"\0")
    yield _text("unknown-key", b'{"capabilities":{"from_2040":{"x":[1,2]}},"also":null}' + b" " * ROOM + b"\0")
    yield _text("spaces", b' \n{ "capabilities" :\t{ } }\r\n' + b" " * ROOM + b"\0")
    yield _text("escapes", b'{"c\\u0061pabilities":{}}' + b" " * ROOM + b"\0")
    yield _text("utf8", '{"capabilities":{"größe":1}}'.encode() + b" " * ROOM + b"\0")


def _capabilities() -> Iterator[Case]:
    for name, value in _VALUES.items():
        yield _accepts(f"alone/{name}", {name: value})
        rest = {key: other for key, other in _VALUES.items() if key not in (name, "twin_socket")}
        yield _accepts(f"without/{name}", rest)
    for name, values in _GOOD_VALUES.items():
        for variant, value in values.items():
            yield _accepts(f"value/{name}-{variant}", {**PROPOSAL, name: value})
    for name, values in _BAD_VALUES.items():
        for variant, value in values.items():
            payload = version(version_data({**PROPOSAL, name: value}))
            yield _refuses(f"bad-value/{name}-{variant}", payload, Level.SHOULD)
    twin = Do("no twin socket, or one that is there: a UNIX stream socket at fd_index", _twin)
    yield Case("version/twin-socket", SECTION, (twin,), start=Start.BARE)


def _order() -> Iterator[Case]:
    for cuts in ((1,), (8, 16), (20,), tuple(range(1, 24))):
        pieces = f"version/pieces/{len(cuts) + 1}-from-{cuts[0]}"
        yield Case(pieces, "Socket", (_in_pieces(*cuts),), start=Start.BARE)
    for command, size in _EARLY.items():
        if command != Command.VERSION:
            step = Ask(command, bytes(size), Refused(or_closed=True))
            name = f"version/first/{command.name.lower()}"
            # A server that serves it does: so it is only asked where that does not matter.
            mode = Mode.ACTIVE if command == Command.DEVICE_RESET else Mode.SAFE
            yield Case(name, "Connection Initiation", (step,), mode=mode, start=Start.BARE, ends=True)
    again = Do("an error reply; the connection goes on", _version_again)
    yield Case("version/again", "Connection Initiation", (again,), Level.SHOULD, start=Start.FRESH)
    text = version_data()
    posted = Ask(Command.VERSION, version(text), _answer(PROPOSAL, 2, len(text)), flags=HeaderFlags.NO_REPLY)
    yield Case("version/no-reply-flag", SECTION, (posted,), Level.SHOULD, start=Start.BARE)
