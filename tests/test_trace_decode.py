"""Messages taken apart: fields by name, flags and registers spelt out, and no bytes that it could not live with."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.device import Bar, Device
from vfio_user.devices.edu import Edu
from vfio_user.errors import UsageError
from vfio_user.pci import (
    AdvancedErrorReporting,
    MsiCapability,
    MsixCapability,
    PcieEndpoint,
    PowerManagement,
    VendorSpecific,
)
from vfio_user.pci.config_space import ConfigSpace
from vfio_user.tools.trace import Choice, FdKind, RegisterNames, Seen, SeenFd, Tracer, parse_command, read_capture
from vfio_user.tools.trace.exchanges import KEPT, MAX_PENDING, Exchanges, Told
from vfio_user.tools.trace.fields import decode, flags_text
from vfio_user.tools.trace.figures import Figures
from vfio_user.tools.trace.lines import hex_dump, message_json, message_parts, plain
from vfio_user.tools.trace.tracer import Manner
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS, Role
from vfio_user.wire.constants import Command, DmaFlags, FeatureFlags, PciRegion

from .trace_support import CLIENT, SERVER, VECTORS, seen

NAMES = RegisterNames()
GET, SET, PROBE = (int(flag) for flag in (FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE))


def line(message: Seen, request: Seen | None = None, names: RegisterNames = NAMES) -> str:
    told = Told(message, request)
    text = plain(message_parts(told, decode(told, names), start=message.time, shown=16))
    return text.split(maxsplit=3)[3] if " " in text.strip() else text


def command(number: int, payload: m.Payload | bytes = b"", tail: bytes = b"", **header: object) -> Seen:
    fixed = payload if isinstance(payload, bytes) else payload.pack()
    return seen(fixed + tail, command=number, **header)  # type: ignore[arg-type]


def reply(number: int, payload: m.Payload | bytes = b"", tail: bytes = b"", **header: object) -> Seen:
    return command(number, payload, tail, **{"flags": 1, "place": SERVER, **header})


ACCESS = m.RegionAccess(0x8, 0, 4)

LINES = {
    "DMA_MAP argsz=32 flags=READ|WRITE offset=0x0 address=0x1000 size=0x2000 fds=[memfd(0x3000)]": command(
        2, m.DmaMap(32, 3, 0, 0x1000, 0x2000), fds=(SeenFd(FdKind.MEMFD, 0x3000),)
    ),
    "DMA_UNMAP argsz=24 flags=GET_DIRTY_BITMAP|0x8 address=0x0 size=0x4000"
    " bitmap_page_size=0x1000 bitmap_size=8": command(
        3, m.DmaUnmap(24, 9, 0, 0x4000), m.DirtyBitmapInfo(0x1000, 8).pack()
    ),
    "DMA_UNMAP ok argsz=24 flags=GET_DIRTY_BITMAP address=0x0 size=0x4000 bitmap_page_size=0x1000 bitmap_size=8"
    " dirty_pages=3 = 0x0000000000000007": reply(
        3, m.DmaUnmap(24, 1, 0, 0x4000), m.DirtyBitmapInfo(0x1000, 8).pack() + b"\7" + bytes(7)
    ),
    "DEVICE_GET_INFO argsz=16": command(4, m.DeviceInfo(16)),
    "DEVICE_GET_INFO ok argsz=16 flags=RESET|PCI num_regions=9 num_irqs=5": reply(4, m.DeviceInfo(16, 3, 9, 5)),
    "DEVICE_GET_REGION_INFO ok argsz=64 flags=READ|MMAP|CAPS index=bar2 cap_offset=32 size=0x4000 offset=0x0"
    " sparse_areas=[0x0+0x1000 0x2000+0x1000] fds=[memfd(0x4000)]": reply(
        5,
        m.RegionInfo(64, 13, 2, 32, 0x4000, 0),
        m.pack_sparse_areas([(0, 0x1000), (0x2000, 0x1000)]),
        fds=(SeenFd(FdKind.MEMFD, 0x4000),),
    ),
    "DEVICE_GET_REGION_IO_FDS ok argsz=64 flags=0 index=bar0 count=1"
    " io_fds=[(offset=0x10 size=0x4 fd_index=0 type=IOEVENTFD flags=0 shadow_mem_fd_index=0 shadow_offset=0x0"
    " datamatch=0x7)] fds=[eventfd]": reply(
        6, m.RegionIoFds(64, 0, 0, 1), m.IoFd(0x10, 4, 0, 0, datamatch=7).pack(), fds=(SeenFd(FdKind.EVENTFD),)
    ),
    "DEVICE_GET_IRQ_INFO ok argsz=16 flags=EVENTFD|NORESIZE index=msix count=4": reply(7, m.IrqInfo(16, 9, 2, 4)),
    "DEVICE_SET_IRQS argsz=22 flags=DATA_BOOL|ACTION_TRIGGER index=msi start=1 count=2 = 0x0100": command(
        8, m.IrqSet(22, 34, 1, 1, 2), b"\0\1"
    ),
    "REGION_READ bar0+0x8:u32": command(9, ACCESS),
    "REGION_READ ok bar0+0x8:u32 = 0x00000005": reply(9, ACCESS, b"\5\0\0\0"),
    "REGION_READ ok region 12+0x0+0x3 = 01 02 03": reply(9, m.RegionAccess(0, 12, 3), b"\1\2\3"),
    "REGION_WRITE posted config+0x4:u16 command = 0x0406": command(10, m.RegionAccess(4, 7, 2), b"\6\4", flags=0x10),
    "DMA_READ 0x1000+0x20": command(11, m.DmaAccess(0x1000, 0x20), place=SERVER),
    "DMA_WRITE 0x1000+0x12 = 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 ...": command(
        12, m.DmaAccess(0x1000, 18), bytes(18), place=SERVER
    ),
    "DEVICE_RESET": command(13),
    "REGION_WRITE_MULTI count=1 writes=[(offset=0x4 region=bar1 count=2 data=0102000000000000)]": command(
        15, m.WriteMulti(1), m.WriteMultiEntry(4, 1, 2, b"\1\2").pack()
    ),
    "DEVICE_FEATURE argsz=16 feature=SET MIG_DEVICE_STATE device_state=STOP_COPY": command(
        16, m.Feature(16, SET | 2), m.FeatureDeviceState(3).pack()
    ),
    "DEVICE_FEATURE argsz=40 feature=SET DMA_LOGGING_START page_size=0x1000 num_ranges=1"
    " ranges=[(iova=0x0 length=0x8000)]": command(
        16, m.Feature(40, SET | 6), m.LoggingControl(0x1000, 1).pack() + m.LoggingRange(0, 0x8000).pack()
    ),
    "DEVICE_FEATURE ok argsz=40 feature=GET DMA_LOGGING_REPORT iova=0x0 length=0x8000 page_size=0x1000 dirty_pages=2"
    " = 0x0000000000000011": reply(
        16, m.Feature(40, GET | 8), m.LoggingReport(0, 0x8000, 0x1000).pack() + b"\x11" + bytes(7)
    ),
    "DEVICE_FEATURE argsz=8 feature=PROBE feature 99": command(16, m.Feature(8, PROBE | 99)),
    "DEVICE_FEATURE ok argsz=16 feature=GET MIGRATION flags=STOP_COPY|P2P": reply(
        16, m.Feature(16, GET | 1), m.FeatureMigration(3).pack()
    ),
    "MIG_DATA_READ ok argsz=10 size=2 = 0x0201": reply(17, m.MigData(10, 2), b"\1\2\0\0"),
    "command 14 = 0x00": command(14, b"\0"),
    "REGION_READ ok (RegionAccess takes 16 bytes, 3 came)": reply(9, b"abc"),
}


@pytest.mark.parametrize("expected", LINES)
def test_a_line_for_each_kind_of_message(expected: str) -> None:
    message = LINES[expected]
    shown = line(message)
    if "takes 16 bytes" in expected:
        assert shown.endswith(expected.partition(" ok ")[2])
    else:
        assert shown == expected


def test_every_command_has_a_line_here() -> None:
    assert {message.header.command for message in LINES.values()} >= COMMANDS.keys() - {1, 18}


def test_capabilities_are_json_again() -> None:
    shown = command(1, m.Version(0, 1), b'{"capabilities": {"max_msg_fds": 8}} \0')
    assert line(shown) == 'VERSION major=0 minor=1 capabilities={"max_msg_fds":8}'
    assert "is no JSON" in line(command(1, m.Version(0, 1), b"{no\0"))
    assert line(command(1, m.Version(0, 1))) == "VERSION major=0 minor=1"


def test_a_refusal_says_what_was_asked_for() -> None:
    asked = command(9, m.RegionAccess(8, 2, 4), time=1000)
    assert line(reply(9, flags=0x21, error=22, time=43_000), asked) == "REGION_READ EINVAL bar2+0x8:u32 42.0 us"
    assert line(reply(9, flags=0x21, time=43_000), asked) == "REGION_READ no errno bar2+0x8:u32 42.0 us"
    feature = command(16, m.Feature(16, GET | 9), time=1000)
    assert line(reply(16, flags=0x21, error=5, time=2000), feature) == "DEVICE_FEATURE EIO GET MIG_DATA_SIZE 1.00 us"


def test_json_has_the_same() -> None:
    asked = command(9, ACCESS, time=1000)
    told = Told(reply(9, ACCESS, b"\5\0\0\0", time=3500), asked)
    found = json.loads(message_json(told, decode(told, NAMES), with_data=False))
    assert found == {
        "time": pytest.approx(3500e-9),
        "connection": 1,
        "socket": "main",
        "sender": "server",
        "type": "reply",
        "id": 1,
        "command": "REGION_READ",
        "size": 36,
        "fields": {"offset": 8, "region": "bar0", "count": 4},
        "latency_us": 2.5,
        "target": "bar0+0x8:u32",
        "data": "05000000",
    }


@given(
    number=st.sampled_from([*COMMANDS, 0, 14, 99]),
    flags=st.sampled_from([0, 1, 0x10, 0x21]),
    payload=st.binary(max_size=200),
    operation=st.sampled_from([GET | 1, SET | 2, GET | 2, SET | 6, GET | 8, GET | 9, SET | 77]),
)
def test_no_bytes_are_too_strange(number: int, flags: int, payload: bytes, operation: int) -> None:
    if number == Command.DEVICE_FEATURE and len(payload) >= 8:
        payload = payload[:4] + operation.to_bytes(4, "little") + payload[8:]
    message = seen(payload, command=number, flags=flags)
    told = Told(message, seen(payload, command=number))
    names = RegisterNames()
    decoded = decode(told, names)
    assert plain(message_parts(told, decoded, start=0, shown=16)).isprintable()
    json.loads(message_json(told, decoded, with_data=True))
    lines: list[str] = []
    tracer = Tracer(lambda parts: lines.append(plain(parts)), Choice(regions=frozenset({0})), Manner(hex_data=True))
    tracer.seen(message)


def test_what_waits_for_its_reply_is_kept_in_part_and_says_so() -> None:
    lines: list[str] = []
    tracer = Tracer(lambda parts: lines.append(plain(parts)), Choice(errors=True))
    entries = m.WriteMultiEntry(0, 0, 1, b"\0").pack() * 300
    tracer.seen(command(15, m.WriteMulti(300), entries))
    tracer.seen(reply(15, flags=0x21, error=22))
    tracer.seen(command(10, m.RegionAccess(0, 0, 5000), bytes(5000)))
    tracer.seen(reply(10, flags=0x21, error=22))
    assert [text.rpartition("(")[2] for text in lines[::2]] == [f"the first {KEPT} bytes were kept)"] * 2
    assert "REGION_WRITE bar0+0x0+0x1388 = 00" in lines[2]
    assert "REGION_WRITE EINVAL bar0+0x0+0x1388" in lines[3]


def test_a_message_without_its_payload_says_why() -> None:
    lost = seen(b"", command=9)._replace(fault="16 bytes were not captured")
    assert line(lost) == "REGION_READ (16 bytes were not captured)"


def test_lists_without_end_are_cut_short() -> None:
    entries = m.WriteMultiEntry(0, 0, 1, b"\0").pack() * 1000
    assert line(command(15, m.WriteMulti(1000), entries)).endswith("and 936 more]")
    assert "announced" in line(command(15, m.WriteMulti(1 << 60), entries))


def test_flags_are_spelt_out() -> None:
    assert [flags_text(DmaFlags, value) for value in (0, 1, 3, 0x13, 0x10)] == [
        "0",
        "READ",
        "READ|WRITE",
        "READ|WRITE|0x10",
        "0x10",
    ]


def test_a_dump_of_data() -> None:
    assert list(hex_dump(b"0123456789abcdef\0\xff")) == [
        "    00000000  30 31 32 33 34 35 36 37 38 39 61 62 63 64 65 66  0123456789abcdef",
        "    00000010  00 ff                                            ..",
    ]


# Registers


def config_of(*capabilities: object) -> bytes:
    data = bytearray(256)
    space = ConfigSpace(0x1234, 0x5678, capabilities=capabilities)  # type: ignore[arg-type]
    space.read_into(0, memoryview(data))
    return bytes(data)


def test_registers_of_config_space_are_named_as_far_as_they_were_read() -> None:
    capabilities = (PowerManagement(), MsiCapability(4, True), PcieEndpoint(), MsixCapability(4, 0, 0, 0, 0x800))
    space = ConfigSpace(0x1234, 0x5678, bars={0: Bar(0x1000)}, capabilities=capabilities)
    data = bytearray(256)
    space.read_into(0, memoryview(data))
    names = RegisterNames()
    assert names.names(PciRegion.CONFIG, 4, 2) == ["command"]
    assert names.names(PciRegion.CONFIG, 0x18, 4) == ["bar2"]
    assert names.names(PciRegion.CONFIG, 0x40, 4) == []
    names.learn(PciRegion.CONFIG, 0, bytes(data))
    for offset in (*range(0x14), *range(0x40, 0x100)):
        assert names.names(PciRegion.CONFIG, offset, 1) == space.names(offset, 1), hex(offset)


def test_extended_capabilities_have_names_and_so_has_a_second_one_of_a_kind() -> None:
    capabilities = (
        PcieEndpoint(),
        VendorSpecific(b"abc"),
        VendorSpecific(b"de", name="other"),
        AdvancedErrorReporting(),
    )
    space = ConfigSpace(0x1234, 0x5678, capabilities=capabilities)
    data = bytearray(len(space))
    space.read_into(0, memoryview(data))
    names = RegisterNames()
    names.learn(PciRegion.CONFIG, 0, bytes(data))
    assert names.names(PciRegion.CONFIG, 0x104, 4) == space.names(0x104, 4) == ["aer.uncorrectable_status"]
    first, second = (at for at in range(0x40, 0x100, 4) if data[at] == 0x09)
    assert names.names(PciRegion.CONFIG, first, 2) == ["vendor.header"]
    assert names.names(PciRegion.CONFIG, second, 2) == [f"vendor@{second:02x}.header"]


def test_a_chain_read_byte_by_byte_is_learned_too() -> None:
    names, data = RegisterNames(), config_of(PowerManagement(), MsiCapability(1, bits64=False))
    for offset, byte in enumerate(data):
        names.learn(PciRegion.CONFIG, offset, bytes([byte]))
    assert names.names(PciRegion.CONFIG, 0x48, 12) == ["msi.header", "msi.control", "msi.address", "msi.data"]


@given(data=st.binary(min_size=256, max_size=256), circle=st.booleans())
def test_a_hostile_chain_does_no_harm(data: bytes, circle: bool) -> None:
    config = bytearray(data)
    config[6], config[0x34] = 0x10, 0x40
    if circle:
        config[0x41] = 0x40
    names = RegisterNames()
    names.learn(PciRegion.CONFIG, 0, bytes(config))
    assert len(names.names(PciRegion.CONFIG, 0, 256)) <= 9


def test_a_built_in_device_is_recognized_by_its_ids() -> None:
    names = RegisterNames()
    assert names.names(0, 8, 4) == []
    names.learn(PciRegion.CONFIG, 0, (Edu.vendor_id | Edu.device_id << 16).to_bytes(4, "little"))
    assert names.names(0, 8, 4) == ["factorial"]


def test_a_device_that_fails_to_name_registers_is_asked_once() -> None:
    class Mute(Device):
        vendor_id, device_id = 0x494F, 0x0DC9
        asked = 0

        def register_names(self, region: int, offset: int, length: int) -> list[str]:
            Mute.asked += 1
            raise RuntimeError

    names = RegisterNames(Mute())
    assert [list(names.names(0, 0, 4)) for _ in range(3)] == [[], [], []]
    assert Mute.asked == 1


# Pairs, choice, figures


def test_replies_are_paired_with_commands() -> None:
    exchanges = Exchanges()
    first, again, other = seen(b"1", time=1), seen(b"2", time=2), seen(b"3", place=SERVER, command=11, time=3)
    for message in (first, again, other):
        assert exchanges.add(message).request is None
    answers = [exchanges.add(seen(flags=1, place=SERVER, time=10 + n)).request for n in range(3)]
    assert [answer and answer.payload for answer in answers] == [b"1", b"2", None]
    told = exchanges.add(seen(flags=1, place=CLIENT, command=11, time=9))
    assert (told.request and told.request.payload, told.latency) == (b"3", 6)
    exchanges.add(seen(flags=0x10))
    assert exchanges.add(seen(flags=1, place=SERVER)).request is None, "nobody answers what is posted"


def test_what_is_never_answered_does_not_pile_up() -> None:
    exchanges = Exchanges()
    for number in range(3 * MAX_PENDING):
        exchanges.add(seen(bytes(KEPT + 100), msg_id=number & 0xFFFF, command=number >> 16 or 9))
    pending = [message for waiting in exchanges._pending.values() for message in waiting]
    assert len(pending) == MAX_PENDING
    assert max(len(message.payload) for message in pending) == KEPT
    exchanges.forget(1)
    assert not exchanges._pending


def shown_lines(choice: Choice, *messages: Seen) -> list[tuple[int, bool]]:
    lines: list[str] = []
    tracer = Tracer(lambda parts: lines.append(plain(parts)), choice, Manner(as_json=True))
    for message in messages:
        tracer.seen(message)
    return [(found["id"], found["type"] == "reply") for found in map(json.loads, lines)]


def test_what_is_chosen() -> None:
    traffic = (
        command(9, ACCESS, msg_id=1, time=1_000_000),
        reply(9, ACCESS, bytes(4), msg_id=1, time=2_000_000),
        command(10, m.RegionAccess(0, 7, 1), b"\0", msg_id=2, time=3_000_000),
        reply(10, flags=0x21, error=1, msg_id=2, time=9_000_000),
        command(15, m.WriteMulti(1), m.WriteMultiEntry(0, 7, 1, b"").pack(), msg_id=3, flags=0x10),
        command(11, m.DmaAccess(0, 1), msg_id=4, place=SERVER),
    )
    both = {n: [(n, False), (n, True)] for n in (1, 2)}
    for choice, expected in (
        (Choice(), [*both[1], *both[2], (3, False), (4, False)]),
        (Choice(commands=frozenset({9})), both[1]),
        (Choice(regions=frozenset({7})), [*both[2], (3, False)]),
        (Choice(regions=frozenset({0, 7}), commands=frozenset({9, 10})), [*both[1], *both[2]]),
        (Choice(sender=Role.SERVER), [(1, True), (2, True), (4, False)]),
        (Choice(errors=True), both[2]),
        (Choice(slow=5_000_000), both[2]),
        (Choice(slow=1_000_000), [*both[1], *both[2]]),
        (Choice(slow=1_000_000, errors=True, regions=frozenset({0})), []),
    ):
        assert shown_lines(choice, *traffic) == expected, choice


def test_commands_by_name() -> None:
    assert [parse_command(text) for text in ("region_read", "REGION-WRITE", "set_irqs", "99")] == [9, 10, 8, 99]
    with pytest.raises(UsageError, match="no command 'sieve'; there are: version"):
        parse_command("sieve")


def test_figures() -> None:
    figures, exchanges = Figures(), Exchanges()
    assert figures.table() == "no messages"
    for number in range(100):
        figures.add(exchanges.add(command(9, ACCESS, msg_id=number, time=1_000_000)))
        figures.add(exchanges.add(reply(9, ACCESS, bytes(4), msg_id=number, time=1_000_000 + 1000 * (number + 1))))
    figures.add(exchanges.add(command(10, ACCESS, bytes(4), flags=0x10)))
    figures.add(exchanges.add(reply(13, flags=0x21, error=5)))
    summary = figures.summary()
    read = summary["REGION_READ"]
    assert (read.count, read.errors, read.bytes) == (100, 0, 100 * (32 + 36))
    assert 50e-6 <= read.p50 <= 57e-6
    assert 99e-6 <= read.p99 <= read.max == pytest.approx(100e-6)
    assert (summary["DEVICE_RESET"].count, summary["DEVICE_RESET"].errors) == (0, 1)
    header, *rows = figures.table().splitlines()
    assert header.split() == ["command", "count", "errors", "bytes", "p50", "p99", "max"]
    assert rows[1].split() == ["REGION_WRITE", "1", "0", "36", "-", "-", "-"]


def test_recorded_traffic_of_the_rust_crate_makes_sense_throughout() -> None:
    exchanges, names = Exchanges(), RegisterNames()
    odd: dict[str, int] = {}
    for message in read_capture(VECTORS):
        told = exchanges.add(message)
        decoded = decode(told, names)
        if decoded.malformed:
            odd[decoded.malformed] = odd.get(decoded.malformed, 0) + 1
        assert message.is_command or told.request is not None
    # the crate sets CAPS where it sends no capabilities; it refuses a DMA_READ that has no payload
    assert odd == {"CapabilityHeader takes 8 bytes, 0 came": 2}


def test_the_dissector_has_the_tables_of_the_code() -> None:
    lua = (Path(__file__).parent.parent / "src/vfio_user/share/vfio-user.lua").read_text()
    for row in COMMANDS.values():
        assert f'[{int(row.command)}] = "{row.command.name}"' in lua
    for kind in FdKind:
        assert f'[{int(kind)}] = "{kind.name.lower()}"' in lua
    assert struct.calcsize("<BBBBI") == 8
