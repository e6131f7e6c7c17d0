"""REGION_READ, REGION_WRITE, REGION_WRITE_MULTI; and that config space is one of PCI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from vfio_user.tools.check.cases import Ask, Blob, BreachError, Case, Do, Session, Start
from vfio_user.tools.check.expect import Answered, Findings, Refused, Served, echoes
from vfio_user.tools.check.facts import Facts, needs_config, needs_region, needs_reset, needs_write_multiple
from vfio_user.tools.check.model import Finding, Level, Mode
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import Command, HeaderFlags, PciRegion, RegionFlags

READ, WRITE, MULTI = "VFIO_USER_REGION_READ", "VFIO_USER_REGION_WRITE", "VFIO_USER_REGION_WRITE_MULTI"
CONFIG = PciRegion.CONFIG
_HEAD = m.RegionAccess.LAYOUT.size
_COMMAND_REGISTER, _STATUS = 0x04, 0x06
_CAPABILITIES = 0x10
_HEADER = 64
_U32, _U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def _data(offset: int, region: int, count: int) -> Served:
    """A reply that repeats the access and has its data."""
    head = m.RegionAccess(offset, region, count).pack()

    def look(reply: Received, facts: Facts) -> Findings:
        if reply.payload[:_HEAD] != head:
            yield Finding("echo", f"the reply begins with {reply.payload[:_HEAD].hex()}, not {head.hex()}")

    return Served("the access again, and the data", _HEAD + count, look)


def _header_now(session: Session) -> bytes:
    """The header of config space, which a driver may have changed since it was looked at first."""
    answer = session.ask(Command.REGION_READ, m.RegionAccess(0, CONFIG, _HEADER).pack())
    for finding in _data(0, CONFIG, _HEADER).judge(answer, session.facts):
        raise BreachError(finding)
    assert isinstance(answer, Received)
    return answer.payload[_HEAD:]


def _config_read(offset: int, count: int) -> Do:
    """The same bytes as in a read of the whole header."""

    def read(session: Session) -> Findings:
        there = _header_now(session)
        yield from _compare(session, there, offset, count)

    return Do("the access again, and the data", read)


def _compare(session: Session, there: bytes, offset: int, count: int) -> Findings:
    answer = session.ask(Command.REGION_READ, m.RegionAccess(offset, CONFIG, count).pack())
    yield from _data(offset, CONFIG, count).judge(answer, session.facts)
    if isinstance(answer, Received) and not answer.is_error:
        came, expected = _steady(offset, answer.payload[_HEAD:]), _steady(offset, there[offset : offset + count])
        if came != expected:
            yield Finding("data", f"{came.hex()} came, {expected.hex()} is what is there")


def _steady(offset: int, data: bytes) -> bytes:
    """Without the status register, which the device may change at any time."""
    return bytes(0 if offset + at in (_STATUS, _STATUS + 1) else byte for at, byte in enumerate(data))


def _config_whole(facts: Facts) -> bytes:
    return m.RegionAccess(0, CONFIG, len(facts.config)).pack()


def _byte_by_byte(session: Session) -> Findings:
    there = _header_now(session)
    for offset in range(_HEADER):
        found = list(_compare(session, there, offset, 1))
        yield from found
        if found:
            return


def _outside(facts: Facts, *, region: int, delta: int, count: int) -> bytes:
    """``delta`` bytes from the end of the region."""
    return m.RegionAccess(facts.region(region).size + delta, region, count).pack()


def _no_region(facts: Facts, *, step: int, count: int) -> bytes:
    return m.RegionAccess(0, min(facts.info.num_regions + step, _U32), count).pack()


def _too_much(facts: Facts) -> bytes:
    return m.RegionAccess(0, CONFIG, min(facts.max_data + 1, _U32)).pack()


_BAD_CONFIG: Mapping[str, Blob] = {
    "at-end": partial(_outside, region=CONFIG, delta=0, count=1),
    "across-end": partial(_outside, region=CONFIG, delta=-2, count=4),
    "whole-and-one": lambda facts: m.RegionAccess(0, CONFIG, facts.region(CONFIG).size + 1).pack(),
    "far": m.RegionAccess(1 << 40, CONFIG, 4).pack(),
    "offset-max": m.RegionAccess(_U64, CONFIG, 1).pack(),
    "overflow": m.RegionAccess(_U64 - 3, CONFIG, 8).pack(),
    "overflow-to-0": m.RegionAccess(_U64 - 3, CONFIG, 4).pack(),
}
_BAD_REGION: Mapping[str, Blob] = {
    "region-next": partial(_no_region, step=0, count=4),
    "region-100-on": partial(_no_region, step=100, count=4),
    "region-max": partial(_no_region, step=_U32, count=4),
    "region-2g": m.RegionAccess(0, 1 << 31, 4).pack(),
}


def _read_cases() -> Iterator[Case]:
    for offset, count in ((0, 1), (0, 2), (0, 4), (0, 8), (2, 2), (8, 4), (0, 64), (1, 1), (1, 3), (3, 7)):
        step = _config_read(offset, count)
        yield Case(f"region/read/config-{offset:#x}-{count}", READ, (step,), needs=(needs_config,))
    whole = Ask(Command.REGION_READ, _config_whole, Served("all of config space"))
    yield Case("region/read/config-whole", READ, (whole,), needs=(needs_config,))
    single = Do("the same bytes as all at once", _byte_by_byte)
    yield Case("region/read/config-byte-by-byte", READ, (single,), needs=(needs_config,))
    nothing = Ask(Command.REGION_READ, m.RegionAccess(0, CONFIG, 0).pack(), Answered())
    yield Case("region/read/nothing", READ, (nothing,), Level.SHOULD)
    for name, payload in _BAD_CONFIG.items():
        refused = Ask(Command.REGION_READ, payload, Refused())
        yield Case(f"region/read/{name}", READ, (refused,), needs=(needs_config,))
    for name, payload in {
        **_BAD_REGION,
        "over-max-data": _too_much,
        "count-max": m.RegionAccess(0, CONFIG, _U32).pack(),
    }.items():
        yield Case(f"region/read/{name}", READ, (Ask(Command.REGION_READ, payload, Refused()),))
    for region in PciRegion:
        if region != CONFIG:
            name = region.name.lower()
            at_end = Ask(Command.REGION_READ, partial(_outside, region=region, delta=0, count=4), Refused())
            yield Case(f"region/read/{name}-at-end", READ, (at_end,))
            access = m.RegionAccess(0, region, 4)
            there = needs_region(region, RegionFlags.READ, 4)
            first = Ask(Command.REGION_READ, access.pack(), _data(0, region, 4))
            yield Case(f"region/read/{name}", READ, (first,), mode=Mode.ACTIVE, needs=(there,))


def _write_cases() -> Iterator[Case]:
    def refused(name: str, payload: Blob, mode: Mode = Mode.SAFE) -> Case:
        return Case(f"region/write/{name}", WRITE, (Ask(Command.REGION_WRITE, payload, Refused()),), mode=mode)

    for name, head in {**_BAD_REGION, "far": m.RegionAccess(1 << 40, CONFIG, 4).pack()}.items():
        yield refused(name, _followed(head, bytes(4)))
    for region in PciRegion:
        at_end = partial(_outside, region=region, delta=0, count=4)
        yield refused(f"{region.name.lower()}-at-end", _followed(at_end, bytes(4)))
    overflow = m.RegionAccess(_U64 - 3, CONFIG, 8).pack()
    yield refused("overflow", overflow + bytes(8))
    # Whoever looks at the count alone writes to the device.
    for name, count, came in (("data-short", 4, 3), ("data-missing", 4, 0), ("data-long", 2, 4)):
        head = m.RegionAccess(_COMMAND_REGISTER, CONFIG, count).pack()
        yield refused(name, _followed(head, bytes(came)), Mode.ACTIVE)
    write = Do("the access again, without data", _write_back)
    yield Case("region/write/config-command", WRITE, (write,), mode=Mode.ACTIVE, needs=(needs_config,))
    posted = Do("no reply; it is done before the next command", _posted_write_back)
    yield Case("region/write/posted", WRITE, (posted,), mode=Mode.ACTIVE, needs=(needs_config,))
    split = Do("the same as for a message that comes at once", _split_write_back)
    yield Case("region/write/pieces", WRITE, (split,), mode=Mode.ACTIVE, needs=(needs_config,))


def _followed(head: Blob, data: bytes) -> Blob:
    if isinstance(head, bytes):
        return head + data
    return lambda facts: head(facts) + data


def _command_register(session: Session) -> bytes:
    return _header_now(session)[_COMMAND_REGISTER : _COMMAND_REGISTER + 2]


_BACK = m.RegionAccess(_COMMAND_REGISTER, CONFIG, 2)


def _write_back(session: Session) -> Findings:
    """The command register as it is."""
    yield from session.expect(echoes(_BACK.pack()), Command.REGION_WRITE, _BACK.pack() + _command_register(session))


def _posted_write_back(session: Session) -> Findings:
    data = _command_register(session)
    session.wire.post(Command.REGION_WRITE, _BACK.pack() + data, flags=HeaderFlags.NO_REPLY)
    yield from session.expect(_data(_COMMAND_REGISTER, CONFIG, 2), Command.REGION_READ, _BACK.pack())


def _split_write_back(session: Session) -> Findings:
    number = session.wire.next_id()
    payload = _BACK.pack() + _command_register(session)
    header = m.Header(number, Command.REGION_WRITE, m.Header.LAYOUT.size + len(payload), 0, 0).pack()
    for part in (header, payload[:_HEAD], payload[_HEAD:]):
        session.wire.send(part)
    yield from echoes(_BACK.pack()).judge(session.wire.read(), session.facts)


def _entry(offset: int, region: int, count: int) -> bytes:
    return m.WriteMultiEntry(offset, region, count, bytes(8)).pack()


_NOWHERE = _entry(0, _U32, 4)


def _multi_cases() -> Iterator[Case]:
    none = Ask(Command.REGION_WRITE_MULTI, m.WriteMulti(0).pack(), echoes(m.WriteMulti(0).pack()))
    yield Case("region/multi/nothing", MULTI, (none,), needs=(needs_write_multiple,))
    for name, payload in {
        "region-max": m.WriteMulti(1).pack() + _NOWHERE,
        "far": m.WriteMulti(1).pack() + _entry(1 << 40, CONFIG, 4),
        "overflow": m.WriteMulti(1).pack() + _entry(_U64, CONFIG, 8),
        "of-9-bytes": m.WriteMulti(1).pack() + _entry(0, _U32, 9),
        "entry-short": m.WriteMulti(1).pack() + _NOWHERE[:-1],
        "entry-missing": m.WriteMulti(2).pack() + _NOWHERE,
        "entry-more": m.WriteMulti(1).pack() + _NOWHERE * 2,
        "count-max": m.WriteMulti(_U64).pack() + _NOWHERE,
        "count-overflow": m.WriteMulti((1 << 64) // 24 + 1).pack() + _NOWHERE,
    }.items():
        refused = Ask(Command.REGION_WRITE_MULTI, payload, Refused())
        yield Case(f"region/multi/{name}", MULTI, (refused,), needs=(needs_write_multiple,))
    write = Do("the count", _multi_write_back)
    needs = (needs_write_multiple, needs_config)
    yield Case("region/multi/config-command", MULTI, (write,), mode=Mode.ACTIVE, needs=needs)


def _multi_write_back(session: Session) -> Findings:
    data = _command_register(session).ljust(8, b"\0")
    entry = m.WriteMultiEntry(_COMMAND_REGISTER, CONFIG, 2, data).pack()
    count = m.WriteMulti(3).pack()
    yield from session.expect(echoes(count), Command.REGION_WRITE_MULTI, count + entry * 3)


# Config space


def _identity(session: Session) -> Findings:
    vendor, device = session.facts.config[:2], session.facts.config[2:4]
    for name, value in (("vendor", vendor), ("device", device)):
        if value in (b"\xff\xff", b"\0\0"):
            yield Finding(f"no-{name}", f"the {name} id is {value.hex()}: nobody finds this device")


def _header_type(session: Session) -> Findings:
    kind = session.facts.config[0x0E] & 0x7F
    if kind:
        yield Finding("header-type", f"header type {kind}: not an endpoint's", value=kind)


def _chain(session: Session) -> Findings:
    config = session.facts.config
    if not config[_STATUS] & _CAPABILITIES:
        if config[0x34]:
            yield Finding("chain-bit", "a capability pointer, but no capabilities in the status", Level.SHOULD)
        return
    seen: set[int] = set()
    at = config[0x34]
    while at:
        if at in seen or at < 0x40 or at & 3 or at > 0xFC or at >= len(config):
            yield Finding("chain", f"the capability chain leads to {at:#x}", value=at)
            return
        seen.add(at)
        at = config[at + 1]


def _interrupt_pin(session: Session) -> Findings:
    pin, count = session.facts.config[0x3D], session.facts.irq(0).count
    if bool(pin) != bool(count) or pin > 4:
        yield Finding("pin", f"interrupt pin {pin}, {count} INTx interrupts", value=pin)


def _pci_cases() -> Iterator[Case]:
    for name, section, text, function, level in (
        ("identity", "6.2.1", "ids that are not all ones or zeros", _identity, Level.MUST),
        ("header-type", "6.2.1", "type 0", _header_type, Level.MUST),
        ("capabilities", "6.7", "a chain that ends, in dwords behind the header", _chain, Level.MUST),
        ("interrupt-pin", "6.2.4", "a pin if and only if there is INTx", _interrupt_pin, Level.SHOULD),
    ):
        case = Case(f"region/pci/{name}", f"PCI Local Bus {section}", (Do(text, function),), level)
        yield Case(case.name, case.section, case.steps, level, needs=(needs_config,))


# Reset


def _reset_cases() -> Iterator[Case]:
    section = "VFIO_USER_DEVICE_RESET"
    step = Ask(Command.DEVICE_RESET, b"", Served("success without payload", 0))
    yield Case("region/reset", section, (step,), mode=Mode.ACTIVE, needs=(needs_reset,), start=Start.FRESH)
    keeps = Do("the device is the same one after it", _reset_keeps_identity)
    yield Case("region/reset/identity", section, (keeps,), mode=Mode.ACTIVE, needs=(needs_reset, needs_config))
    without = Ask(Command.DEVICE_RESET, b"", Refused(()))
    yield Case("region/reset/none", section, (without,), Level.SHOULD, Mode.ACTIVE, needs=(_has_no_reset,))


def _has_no_reset(facts: Facts) -> str:
    return "" if needs_reset(facts) else "the device has a reset"


def _reset_keeps_identity(session: Session) -> Findings:
    yield from session.expect(Served("", 0), Command.DEVICE_RESET)
    yield from _config_read(0, 4).run(session)


def cases() -> Iterator[Case]:
    yield from _read_cases()
    yield from _write_cases()
    yield from _multi_cases()
    yield from _reset_cases()
    yield from _pci_cases()
