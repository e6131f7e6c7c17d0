"""The capabilities JSON: rows 7, 25 and 26 of protocol.md, section 0."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.errors import NegotiationError
from vfio_user.wire.capabilities import (
    MAX_JSON_SIZE,
    Capabilities,
    MigrationCapability,
    TwinSocketCapability,
    negotiate,
    pack_answer,
    pack_capabilities,
    parse_capabilities,
)


def text(capabilities: Any) -> bytes:
    return json.dumps({"capabilities": capabilities}).encode() + b"\0"


def answer(version_data: bytes, *, twin_socket: bool = True, size: int = 1 << 20, maps: int = 65535) -> bytes:
    """What a server says to this."""
    proposed = parse_capabilities(version_data)
    agreed = negotiate(proposed, len(version_data), max_data_xfer_size=size, max_dma_maps=maps, twin_socket=twin_socket)
    return pack_answer(agreed, len(version_data))


def answered(version_data: bytes, **options: Any) -> dict[str, Any]:
    raw = answer(version_data, **options)
    assert raw.endswith(b"\0")
    decoded = json.loads(raw[:-1]).get("capabilities", {})
    assert isinstance(decoded, dict)
    return decoded


@pytest.mark.parametrize(
    "capabilities",
    [
        {},
        {"max_msg_fds": 0},
        {"max_msg_fds": 1024},
        {"max_data_xfer_size": 1},
        {"max_data_xfer_size": 1024},
        {"max_dma_maps": 1},
        {"pgsizes": 4096},
        {"pgsizes": 0x1000 | 1 << 21 | 1 << 30},
        {"pgsizes": 0xFFFFFFFFFFFFF000},  # what an IOMMU that does any size says
        {"write_multiple": False},
        {"twin_socket": {}},
        {"twin_socket": {"supported": False}},
        {"migration": {}},
        {"migration": {"pgsize": 0}},
        {"migration": {"pgsize": 65536, "max_bitmap_size": 1 << 28}},
        {"of_a_later_version": {"a": [1, None, 2.5]}, "max_msg_fds": 8},
    ],
)
def test_row25_good_values(capabilities: dict[str, Any]) -> None:
    assert parse_capabilities(text(capabilities)) is not None


BAD_NUMBERS = [True, 1.0, 1.5, "1", None, [1], {}, -1, 1 << 64]


@pytest.mark.parametrize(
    "capabilities",
    [
        *(
            {key: value}
            for key in ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes")
            for value in BAD_NUMBERS
        ),
        *({"migration": {"pgsize": value}} for value in BAD_NUMBERS),
        {"max_msg_fds": 1025},
        {"max_data_xfer_size": 0},
        {"max_dma_maps": 0},
        {"pgsizes": 0},
        {"pgsizes": 2048},
        {"pgsizes": 4097},
        {"write_multiple": 1},
        {"write_multiple": "true"},
        {"twin_socket": True},
        {"twin_socket": {"supported": 1}},
        {"migration": 4096},
        {"migration": {"pgsize": 2048}},
        {"migration": {"pgsize": 12288}},
        [],
        "max_msg_fds",
        3,
        None,
    ],
)
def test_row25_bad_values(capabilities: Any) -> None:
    with pytest.raises(NegotiationError):
        parse_capabilities(text(capabilities))


@pytest.mark.parametrize(
    "version_data",
    [
        b"\0",
        b"{}",
        b'{"capabilities":{}}',
        b"{}\0\0",
        b"{\0}\0",
        b"[]\0",
        b"3\0",
        b"null\0",
        b"not JSON\0",
        b'{"capabilities":{}\0',
        b'{"capabilities":{}} {}\0',
        b'{"capabilities":{"max_msg_fds":NaN}}\0',
        b'{"capabilities":{"max_data_xfer_size":1e6}}\0',
        b'{"capabilities":{"pgsizes":' + b"9" * 5000 + b"}}\0",
        b'{"a":"\xff"}\0',
        b'{"a":"\xed\xa0\x80"}\0',
        b"\xef\xbb\xbf{}\0",
        b'{"a":' + b"[" * 60000 + b"\0",
        b'{"capabilities":' + b'{"migration":' * 4000 + b"\0",
        b'{"a":' + b"[" * 30000 + b"]" * 30000 + b"}\0",
        b"{}" + b" " * MAX_JSON_SIZE + b"\0",
    ],
    ids=lambda version_data: repr(version_data[:24]),
)
def test_row25_what_is_no_version_data(version_data: bytes) -> None:
    with pytest.raises(NegotiationError):
        parse_capabilities(version_data)


@given(st.binary(max_size=80))
def test_any_bytes_are_understood_or_refused(data: bytes) -> None:
    try:
        capabilities = parse_capabilities(data)
    except NegotiationError:
        return
    assert (capabilities is None) is (data == b"")


def test_row07_without_version_data_the_answer_has_none() -> None:
    assert parse_capabilities(b"") is None
    assert answer(b"") == b""


def test_the_largest_version_data_is_read() -> None:
    assert parse_capabilities(b"{}".ljust(MAX_JSON_SIZE - 1) + b"\0") == Capabilities()


def test_defaults_of_the_specification() -> None:
    capabilities = Capabilities()
    assert (capabilities.msg_fds, capabilities.data_xfer_size, capabilities.dma_maps) == (1, 1 << 20, 65535)
    assert not capabilities.wants_twin_socket
    stated = Capabilities(max_msg_fds=0, max_data_xfer_size=1024, max_dma_maps=7)
    assert (stated.msg_fds, stated.data_xfer_size, stated.dma_maps) == (0, 1024, 7)


def test_row07_the_answer_is_compact() -> None:
    data = text({"max_msg_fds": 8, "migration": {"pgsize": 4096}})
    assert answer(data) == b'{"capabilities":{"max_msg_fds":8,"migration":{"pgsize":4096}}}\0'


@pytest.mark.parametrize(
    ("proposed", "agreed"),
    [
        ({"max_msg_fds": 8}, {"max_msg_fds": 8}),
        ({"max_msg_fds": 1024}, {"max_msg_fds": 253}),
        ({"max_data_xfer_size": 2097152}, {"max_data_xfer_size": 1048576}),
        ({"max_data_xfer_size": 4194304}, {"max_data_xfer_size": 1048576}),
        ({"max_data_xfer_size": 1024}, {"max_data_xfer_size": 1024}),  # 1048576 would not fit
        ({"max_dma_maps": 8}, {"max_dma_maps": 8}),
        ({"max_dma_maps": 70000}, {"max_dma_maps": 65535}),
        ({"pgsizes": 0xFFFFFFFFFFFFF000}, {"pgsizes": 0xFFFFFFFFFFFFF000}),
        ({"write_multiple": True}, {"write_multiple": True}),
        ({"write_multiple": False}, {}),
        ({"migration": {}}, {}),
        ({"migration": {"pgsize": 65536}}, {"migration": {"pgsize": 4096}}),
        ({"other": "                 "}, {}),
    ],
)
def test_row07_what_is_answered(proposed: dict[str, Any], agreed: dict[str, Any]) -> None:
    assert answered(json.dumps({"capabilities": proposed}, separators=(",", ":")).encode() + b"\0") == agreed


def test_row07_own_size_even_above_the_clients_where_it_fits() -> None:
    assert answered(text({"max_data_xfer_size": 1000000}))["max_data_xfer_size"] == 1048576


@pytest.mark.parametrize("version_data", [b"{}\0", b'{"a":1}\0', b' {"capabilities":{}}\0'])
def test_row07_the_shortest_texts(version_data: bytes) -> None:
    raw = answer(version_data)
    assert len(raw) <= len(version_data)
    assert json.loads(raw[:-1]) in ({}, {"capabilities": {}})


@pytest.mark.parametrize(
    ("capabilities", "room", "twin_socket", "granted"),
    [
        ({"twin_socket": {"supported": True}}, 40, True, True),
        ({"twin_socket": {"supported": True}}, 0, True, False),
        ({"twin_socket": {"supported": True}}, 40, False, False),
        ({"twin_socket": {"supported": False}}, 40, True, False),
        ({"twin_socket": {"supported": True}, "max_msg_fds": 0}, 40, True, False),
    ],
)
def test_row26_twin_socket(capabilities: dict[str, Any], room: int, twin_socket: bool, granted: bool) -> None:
    compact = json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode()
    agreed = answered(compact + b" " * room + b"\0", twin_socket=twin_socket)
    assert agreed.get("twin_socket") == ({"supported": True, "fd_index": 0} if granted else None)


def test_row26_twin_socket_before_the_larger_data_size() -> None:
    compact = b'{"capabilities":{"max_data_xfer_size":1024,"twin_socket":{"supported":true}}}' + b" " * 13 + b"\0"
    agreed = answered(compact)
    assert agreed == {"max_data_xfer_size": 1024, "twin_socket": {"supported": True, "fd_index": 0}}


proposals = st.fixed_dictionaries(
    {},
    optional={
        "max_msg_fds": st.integers(0, 1024),
        "max_data_xfer_size": st.integers(1, 1 << 40),
        "max_dma_maps": st.integers(1, 1 << 40),
        "pgsizes": st.integers(1, (1 << 52) - 1).map(lambda n: n << 12),
        "write_multiple": st.booleans(),
        "twin_socket": st.fixed_dictionaries({}, optional={"supported": st.booleans()}),
        "migration": st.fixed_dictionaries(
            {},
            optional={"pgsize": st.integers(12, 62).map(lambda n: 1 << n), "max_bitmap_size": st.integers(0, 1 << 40)},
        ),
        "unknown": st.text(max_size=5),
    },
)


@given(
    proposals,
    st.booleans(),
    st.integers(0, 60),
    st.booleans(),
    st.integers(1, 1 << 40),
    st.integers(1, 1 << 40),
    st.booleans(),
)
def test_row07_never_longer_and_nothing_unasked(
    proposed: dict[str, Any], wrapped: bool, room: int, compact: bool, size: int, maps: int, twin_socket: bool
) -> None:
    document = {"capabilities": proposed} if wrapped else {}
    separators = (",", ":") if compact else (", ", ": ")
    version_data = json.dumps(document, separators=separators).encode() + b" " * room + b"\0"
    raw = answer(version_data, size=size, maps=maps, twin_socket=twin_socket)
    assert len(raw) <= len(version_data)
    assert raw[-1:] == b"\0"
    agreed = json.loads(raw[:-1]).get("capabilities", {})
    assert set(agreed) <= (set(proposed) if wrapped else set()) - {"unknown"}
    understood = parse_capabilities(raw)
    assert understood is not None
    assert understood.msg_fds <= max(1, proposed.get("max_msg_fds", 1) if wrapped else 1)
    if "max_data_xfer_size" in agreed:
        assert agreed["max_data_xfer_size"] in (size, min(size, proposed["max_data_xfer_size"]))
    if "max_dma_maps" in agreed:
        assert agreed["max_dma_maps"] == min(maps, proposed["max_dma_maps"])


@given(proposals)
def test_what_a_side_states_comes_back(proposed: dict[str, Any]) -> None:
    capabilities = parse_capabilities(text(proposed))
    assert capabilities is not None
    assert parse_capabilities(pack_capabilities(capabilities, room=7)) == capabilities
    assert pack_capabilities(None) == b""


def test_structures_hold_what_was_said() -> None:
    capabilities = parse_capabilities(
        text({"twin_socket": {"supported": True, "fd_index": 3}, "migration": {"pgsize": 0}})
    )
    assert capabilities == Capabilities(
        twin_socket=TwinSocketCapability(supported=True, fd_index=3), migration=MigrationCapability(pgsize=0)
    )
