"""The types of the wire against the C declarations that they stand for, and the table of commands."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.errors import MessageError, UsageError
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS, Role, Tail, command_name
from vfio_user.wire.constants import Command

# The declarations of libvfio-user's vfio-user.h and of linux/vfio.h, all packed, with our names of the fields.
DECLARATIONS = """
struct Header { u16 msg_id; u16 command; u32 msg_size; u32 flags; u32 error_no; };
struct Empty { };
struct Version { u16 major; u16 minor; };
struct DmaMap { u32 argsz; u32 flags; u64 offset; u64 address; u64 size; };
struct DmaUnmap { u32 argsz; u32 flags; u64 address; u64 size; };
struct DirtyBitmapInfo { u64 page_size; u64 size; };
struct DeviceInfo { u32 argsz; u32 flags; u32 num_regions; u32 num_irqs; };
struct RegionInfo { u32 argsz; u32 flags; u32 index; u32 cap_offset; u64 size; u64 offset; };
struct CapabilityHeader { u16 id; u16 version; u32 next; };
struct SparseAreas { u32 nr_areas; u32 reserved; };
struct RegionIoFds { u32 argsz; u32 flags; u32 index; u32 count; };
struct IoFd { u64 offset; u64 size; u32 fd_index; u32 type; u32 flags; u32 shadow_mem_fd_index; u64 shadow_offset;
    u64 datamatch; };
struct IrqInfo { u32 argsz; u32 flags; u32 index; u32 count; };
struct IrqSet { u32 argsz; u32 flags; u32 index; u32 start; u32 count; };
struct RegionAccess { u64 offset; u32 region; u32 count; };
struct DmaAccess { u64 address; u64 count; };
struct WriteMulti { u64 count; };
struct WriteMultiEntry { u64 offset; u32 region; u32 count; char8 data; };
struct Feature { u32 argsz; u32 flags; };
struct FeatureMigration { u64 flags; };
struct FeatureDeviceState { u32 device_state; s32 data_fd; };
struct FeatureDataSize { u64 stop_copy_length; };
struct LoggingControl { u64 page_size; u32 num_ranges; u32 reserved; };
struct LoggingRange { u64 iova; u64 length; };
struct LoggingReport { u64 iova; u64 length; u64 page_size; };
struct MigData { u32 argsz; u32 size; };
struct ControlPushed { u64 pages; };
struct ControlAccess { u32 mode; };
struct ControlStatus { u32 access; u32 held; u64 page_size; u64 dirty_pages; u32 state; u32 connected; };
"""
WIDTHS = {"u16": 2, "u32": 4, "s32": 4, "u64": 8, "char8": 8}

STRUCTS = {
    name: re.findall(r"(\w+) (\w+);", body) for name, body in re.findall(r"struct (\w+) \{(.*?)\};", DECLARATIONS, re.S)
}


def payload_type(name: str) -> type[m.Payload]:
    found: type[m.Payload] = getattr(m, name)
    assert issubclass(found, m.Payload)
    return found


def value_of(kind: str, number: int) -> Any:
    """A value of this type in which every byte is another one."""
    raw = bytes((number * 16 + byte + 1) % 127 + 1 for byte in range(WIDTHS[kind]))
    return raw if kind == "char8" else int.from_bytes(raw, "little")


def test_every_type_is_declared() -> None:
    types = {cls.__name__ for cls in m.Payload.__subclasses__()}
    assert types == set(STRUCTS)


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_is_that_of_the_c_structure(name: str) -> None:
    cls, fields = payload_type(name), STRUCTS[name]
    assert cls.__match_args__ == tuple(field for _, field in fields)
    values = [value_of(kind, number) for number, (kind, _) in enumerate(fields)]
    packed = cls(*values).pack()
    offset = 0
    for (kind, _), value in zip(fields, values, strict=True):
        raw = packed[offset : offset + WIDTHS[kind]]
        assert raw == (value if kind == "char8" else value.to_bytes(WIDTHS[kind], "little"))
        offset += WIDTHS[kind]
    assert offset == len(packed) == cls.LAYOUT.size


def field_values(kind: str) -> st.SearchStrategy[Any]:
    if kind == "char8":
        return st.binary(min_size=8, max_size=8)
    bits = WIDTHS[kind] * 8
    low = -(1 << (bits - 1)) if kind == "s32" else 0
    return st.integers(low, low + (1 << bits) - 1)


@st.composite
def payloads(draw: st.DrawFn) -> m.Payload:
    name = draw(st.sampled_from(sorted(STRUCTS)))
    return payload_type(name)(*[draw(field_values(kind)) for kind, _ in STRUCTS[name]])


@given(payloads(), st.binary(max_size=9), st.binary(max_size=9), st.sampled_from([bytes, bytearray, memoryview]))
def test_round_trip(payload: m.Payload, before: bytes, after: bytes, buffer: Any) -> None:
    data = before + payload.pack() + after
    assert type(payload).parse(buffer(data), len(before)) == payload


@given(payloads(), st.data())
def test_too_short_is_a_message_error(payload: m.Payload, data: st.DataObject) -> None:
    packed = payload.pack()
    if not packed:
        return
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(MessageError, match=f"{type(payload).__name__} takes {len(packed)} bytes, {cut} came"):
        type(payload).parse(packed[:cut])
    with pytest.raises(MessageError, match="0 came"):
        type(payload).parse(packed, len(packed) + 5)


@pytest.mark.parametrize(
    "payload",
    [m.DeviceInfo(1 << 32), m.RegionAccess(-1, 0, 0), m.DmaAccess(0, 1 << 64), m.Version(65536, 0)],
)
def test_a_field_that_does_not_fit_is_a_usage_error(payload: m.Payload) -> None:
    with pytest.raises(UsageError, match=type(payload).__name__):
        payload.pack()


def test_feature_splits_its_flags() -> None:
    feature = m.Feature(16, 0x7FFF_0008 | 1 << 17)
    assert (feature.index, feature.operation) == (8, 0x7FFF_0000 | 1 << 17)


def test_io_fd_user_data_and_the_short_form() -> None:
    short = struct.pack("<QQIIIIQ", 0x10, 4, 1, 0, 7, 0, 0x1234)
    assert m.IoFd.parse_short(short) == m.IoFd(0x10, 4, 1, 0, 7, datamatch=0x1234)
    ioregionfd = struct.pack("<QQIIIIQ", 0x10, 4, 1, 1, 7, 0, 0x1234)
    assert m.IoFd.parse_short(b"..." + ioregionfd + b"...", 3).user_data == 0x1234
    with pytest.raises(MessageError):
        m.IoFd.parse_short(b"")


# The table of protocol.md, section 2: number, name, request, reply, sender.
TABLE = """
1 VERSION 4 4 c
2 DMA_MAP 32 0 c
3 DMA_UNMAP 24 24 c
4 DEVICE_GET_INFO 16 16 c
5 DEVICE_GET_REGION_INFO 32 32 c
6 DEVICE_GET_REGION_IO_FDS 16 16 c
7 DEVICE_GET_IRQ_INFO 16 16 c
8 DEVICE_SET_IRQS 20 0 c
9 REGION_READ 16 16 c
10 REGION_WRITE 16 16 c
11 DMA_READ 16 16 s
12 DMA_WRITE 16 16 s
13 DEVICE_RESET 0 0 c
15 REGION_WRITE_MULTI 8 8 c
16 DEVICE_FEATURE 8 8 c
17 MIG_DATA_READ 8 8 c
18 MIG_DATA_WRITE 8 0 c
"""


def test_the_table_of_commands() -> None:
    rows = [
        f"{number} {row.command.name} {row.request.LAYOUT.size} {row.reply.LAYOUT.size} {row.sender.value[0]}"
        for number, row in COMMANDS.items()
    ]
    assert rows == TABLE.strip().splitlines()
    assert set(COMMANDS) == set(Command)
    assert all(number == row.command for number, row in COMMANDS.items())


def test_descriptors_and_data_of_the_table() -> None:
    rows = COMMANDS.values()
    assert {row.command for row in rows if row.request_fds} == {Command.DMA_MAP, Command.DEVICE_SET_IRQS}
    assert COMMANDS[Command.DMA_MAP].request_fds == 1
    assert {row.command for row in rows if row.reply_fds} == {1, 5, 6}
    assert {row.command for row in rows if Tail.DATA in (row.request_tail, row.reply_tail)} == {9, 10, 11, 12, 17, 18}
    assert {row.command for row in rows if row.quiesces} == {Command.DMA_UNMAP, Command.DEVICE_RESET}


def test_names_and_roles() -> None:
    assert command_name(9) == "REGION_READ"
    assert command_name(14) == "command 14"
    assert Role.CLIENT.peer is Role.SERVER
    assert Role.SERVER.peer is Role.CLIENT


areas = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=8)


@given(areas)
def test_sparse_areas_round_trip(pairs: list[tuple[int, int]]) -> None:
    """protocol.md, section 4.2: at 32 id 1, version 1, next 0, nr_areas, reserved 0; 16 + 16 n bytes."""
    capability = m.pack_sparse_areas(pairs)
    assert capability[:16] == struct.pack("<HHIII", 1, 1, 0, len(pairs), 0)
    assert len(capability) == 16 + 16 * len(pairs)
    payload = bytes(32) + capability
    ((header, position),) = m.parse_capability_chain(payload, 32)
    assert (header.id, header.version, position) == (1, 1, 40)
    assert list(m.parse_sparse_areas(payload, position)) == pairs


@pytest.mark.parametrize("count", [2, 3, 0xFFFFFFFF])
def test_sparse_areas_announced_but_not_there(count: int) -> None:
    payload = struct.pack("<II", count, 0) + bytes(31)
    with pytest.raises(MessageError, match=f"{count} sparse areas announced, 31 bytes came"):
        m.parse_sparse_areas(payload, 0)


def chain(*links: tuple[int, int]) -> bytes:
    """A payload of 128 bytes with a capability at each position that points to the next."""
    data = bytearray(128)
    for position, following in links:
        struct.pack_into("<HHI", data, position, position, 1, following)
    return bytes(data)


def test_capability_chain_is_walked_forward() -> None:
    walked = list(m.parse_capability_chain(chain((32, 64), (64, 72), (72, 0)), 32))
    assert [(header.id, position) for header, position in walked] == [(32, 40), (64, 72), (72, 80)]
    assert list(m.parse_capability_chain(b"", 0)) == []


@pytest.mark.parametrize(
    ("first", "links"),
    [
        (32, [(32, 32)]),  # itself
        (32, [(32, 64), (64, 32)]),  # a loop
        (16, []),  # into the fixed part
        (121, []),  # the header does not fit
        (128, []),
        (32, [(32, 0xFFFFFFFF)]),
    ],
)
def test_capability_chain_that_leads_nowhere(first: int, links: list[tuple[int, int]]) -> None:
    with pytest.raises(MessageError):
        list(m.parse_capability_chain(chain(*links), first))


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_any_capability_chain_ends(payload: bytes, first: int) -> None:
    """Every link lies behind the one before it: the walk takes no more steps than there are bytes."""
    positions = []
    try:
        for _, position in m.parse_capability_chain(payload, first):
            positions.append(position)
    except MessageError:
        pass
    assert positions == sorted(set(positions))
    assert all(40 <= position <= len(payload) for position in positions)
