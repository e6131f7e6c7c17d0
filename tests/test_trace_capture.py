"""Captures: what is written is read again, whatever happens to the file; Wireshark reads it, too."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.tools.trace import (
    CaptureError,
    CaptureWriter,
    FdKind,
    Place,
    Seen,
    SeenFd,
    dissector_path,
    pcapng,
    read_capture,
)
from vfio_user.tools.trace.capture import LINK_TYPE
from vfio_user.wire import messages as m
from vfio_user.wire.commands import Role
from vfio_user.wire.constants import FeatureFlags

from .trace_support import CLIENT, SERVER, VECTORS, seen

ROOT = Path(__file__).parent.parent
TIMEOUT = 60

FDS = st.lists(st.builds(SeenFd, st.sampled_from(FdKind), st.integers(0, (1 << 64) - 1)), max_size=5).map(tuple)
PLACES = st.builds(Place, st.integers(1, 0xFFFFFFFF), st.booleans(), st.sampled_from(Role))
MESSAGES = st.builds(
    seen,
    st.binary(max_size=50),
    command=st.integers(0, 0xFFFF),
    msg_id=st.integers(0, 0xFFFF),
    flags=st.integers(0, 0xFFFFFFFF),
    error=st.integers(0, 0xFFFFFFFF),
    place=PLACES,
    fds=FDS,
    time=st.integers(0, (1 << 63) - 1),
)


def packet(data: bytes, size: int) -> bytes:
    return b"".join(pcapng.packet(1, [data], size))


def written(path: Path, messages: Sequence[Seen]) -> Path:
    writer = CaptureWriter(path)
    for message in messages:
        writer.add(message)
    writer.close()
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    @given(st.lists(MESSAGES, max_size=5))
    def check(messages: list[Seen]) -> None:
        assert list(read_capture(written(tmp_path / "c", messages))) == messages

    check()


SOME = [
    seen(m.RegionAccess(4, 7, 2).pack() + b"\6\0", command=10, fds=(SeenFd(FdKind.MEMFD, 4096),)),
    seen(m.RegionAccess(4, 7, 2).pack(), command=10, flags=1, place=SERVER),
    seen(b"", command=13, msg_id=3),
]


def test_each_message_is_in_the_file_before_the_next_is_looked_at(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path / "c")
    for number, message in enumerate(SOME, 1):
        writer.add(message)
        assert list(read_capture(tmp_path / "c")) == SOME[:number]
    writer.close()


def test_a_capture_that_is_cut_is_read_up_to_there(tmp_path: Path) -> None:
    whole = written(tmp_path / "c", SOME).read_bytes()
    wholes = 0
    for size in range(4, len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        found = []
        try:
            for message in read_capture(tmp_path / "cut"):
                found.append(message)
        except CaptureError as error:
            assert "cut off" in str(error) or "too short" in str(error) or "no pcapng" in str(error)  # noqa: PT017
        else:
            wholes += 1
        assert found == SOME[: len(found)]
    assert wholes == 4, "after the section, the interface, and two of three messages"


@given(st.data())
def test_a_capture_that_is_damaged_is_refused_or_read(data: st.DataObject) -> None:
    file = io.BytesIO()
    file.write(pcapng.head(LINK_TYPE, "vfio-user", "test"))
    file.write(packet(b"one", 3) + packet(b"two", 3))
    damaged = bytearray(file.getvalue())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert len(list(pcapng.read_packets(io.BytesIO(damaged)))) <= 2
    except CaptureError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "neither a pcapng capture nor recorded vectors"),
        (b"\xd4\xc3\xb2\xa1 an old pcap", "neither a pcapng capture nor recorded vectors"),
        (pcapng.MAGIC + struct.pack("<II", 28, 0x12345678), "no pcapng file"),
        (pcapng.head(1, "eth0", "x") + packet(b"ethernet", 8), "link type 1 is not"),
        (pcapng.head(252, "x", "x") + packet(b"short", 5), "no message of vfio-user"),
        (pcapng.head(252, "x", "x") + packet(struct.pack(">HH4sHH", 12, 4, b"http", 0, 0), 12), "no message"),
        (pcapng.head(252, "x", "x") + struct.pack("<II", 6, 0x7FFFFFFC), "its length is"),
        (b'{"name": "a", "request_hex": "00"}\n', "line 1 is no recorded vector"),
        (b'{"name": "a", "request_hex": "zz", "reply_hex": ""}\n', "line 1 is no recorded vector"),
        (b"{not json\n", "line 1 is no recorded vector"),
    ],
)
def test_what_is_no_capture(contents: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(contents)
    with pytest.raises(CaptureError, match=reason):
        list(read_capture(tmp_path / "c"))


def test_what_others_write_is_read_as_well() -> None:
    """Big-endian, in microseconds, with blocks that are none of ours, as an editor of captures may save it."""

    def block(kind: int, body: bytes) -> bytes:
        return struct.pack(">II", kind, 12 + len(body)) + body + struct.pack(">I", 12 + len(body))

    section = block(pcapng.SECTION, struct.pack(">IHHQ", 0x1A2B3C4D, 1, 0, (1 << 64) - 1))
    interface = block(pcapng.INTERFACE, struct.pack(">HHI", 252, 0, 0))
    binary = block(pcapng.INTERFACE, struct.pack(">HHI", 252, 0, 0) + struct.pack(">HHB3xI", 9, 1, 0x80 | 10, 0))
    names = block(4, bytes(8))
    packets = [block(6, struct.pack(">IIIII4s", index, 0, 2048, 4, 9, b"data")) for index in (0, 1)]
    found = list(pcapng.read_packets(io.BytesIO(section + interface + binary + names + b"".join(packets))))
    assert [(p.time, p.data, p.size) for p in found] == [(2_048_000, b"data", 9), (2_000_000_000, b"data", 9)]


def test_a_message_that_was_not_captured_whole_says_so(tmp_path: Path) -> None:
    message = seen(b"12345")
    message = message._replace(header=m.Header(1, 9, 1000, 0, 0))
    (read,) = read_capture(written(tmp_path / "c", [message]))
    assert (read.payload, read.fault) == (b"12345", "979 bytes were not captured")


def test_recorded_vectors_are_read_as_captures() -> None:
    messages = list(read_capture(VECTORS))
    rows = [json.loads(line) for line in VECTORS.read_text().splitlines()]
    assert len(messages) == len(rows) + sum(bool(row["reply_hex"]) for row in rows)
    assert {message.place.connection for message in messages} == {1, 2, 3, 4}
    mapped = [message for message in messages if message.header.command == 2 and message.is_command]
    assert [list(map(str, message.fds)) for message in mapped] == [
        ["memfd(0x100000)"],
        [],
        ["memfd(0x1000)"] * 2,
        ["memfd(0x100000)"],
        ["memfd(0x100000)"],
    ]


# Wireshark


@pytest.fixture(scope="module")
def tshark() -> str:
    found = ROOT / ".qemu" / "tshark"
    path = str(found) if found.exists() else shutil.which("tshark")
    if path is None:
        pytest.skip("no tshark: run scripts/fetch_qemu.py --tshark")
    return path


def dissected(tshark: str, capture: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        [tshark, "-X", f"lua_script:{dissector_path()}", "-r", str(capture), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Lua" not in done.stderr, done.stderr
    return done.stdout.splitlines()


FEATURE = m.Feature(16, FeatureFlags.GET | 2).pack()
TRAFFIC = [
    seen(m.Version(0, 2).pack() + b"{}\0", command=1, time=10**18),
    seen(
        m.Version(0, 2).pack() + b"{}\0",
        command=1,
        flags=1,
        place=SERVER,
        fds=(SeenFd(FdKind.SOCKET),),
        time=10**18 + 5000,
    ),
    seen(m.DmaMap(32, 3, 0, 0x1000, 0x2000).pack(), command=2, msg_id=2, fds=(SeenFd(FdKind.MEMFD, 0x2000),)),
    seen(m.RegionAccess(0x10, 0, 4).pack(), msg_id=3, command=9),
    seen(m.RegionAccess(0x10, 0, 4).pack() + b"\5\0\0\0", msg_id=3, command=9, flags=1, place=SERVER),
    seen(m.RegionAccess(0x10, 8, 4).pack(), msg_id=4, command=9),
    seen(b"", msg_id=4, command=9, flags=0x21, error=22, place=SERVER),
    seen(FEATURE, msg_id=5, command=16),
    seen(FEATURE + m.FeatureDeviceState(3).pack(), msg_id=5, command=16, flags=1, place=SERVER),
    seen(m.DmaAccess(0x1000, 4).pack(), msg_id=5, command=11, place=Place(1, True, Role.SERVER)),
    seen(b"short", msg_id=6, command=10),
    seen(b"odd", msg_id=7, command=77),
]


def test_wireshark_shows_a_capture(tshark: str, tmp_path: Path) -> None:
    lines = dissected(tshark, written(tmp_path / "c", TRAFFIC), "-T", "fields", "-e", "_ws.col.Info")
    assert lines == [
        "#1 VERSION",
        "#1 VERSION reply",
        "#2 DMA_MAP",
        "#3 REGION_READ bar0+0x10:4",
        "#3 REGION_READ reply bar0+0x10:4",
        "#4 REGION_READ vga+0x10:4",
        "#4 REGION_READ reply, errno 22",
        "#5 DEVICE_FEATURE MIG_DEVICE_STATE",
        "#5 DEVICE_FEATURE reply MIG_DEVICE_STATE",
        "#5 DMA_READ",
        "#6 REGION_WRITE",
        "#7 command 77",
    ]


FIELDS = (
    "command",
    "sender",
    "twin",
    "fd.kind",
    "fd.size",
    "region",
    "offset",
    "value",
    "state",
    "answers",
    "malformed",
)


def test_wireshark_has_the_fields(tshark: str, tmp_path: Path) -> None:
    chosen = [argument for name in FIELDS for argument in ("-e", f"vfio_user.{name}")]
    lines = dissected(tshark, written(tmp_path / "c", TRAFFIC), "-T", "fields", "-E", "separator=,", *chosen)
    numbers = [line.replace("False", "0").replace("True", "1") for line in lines]  # words since Wireshark 4.2 or so
    assert numbers == [
        "1,0,0,,,,,,,,",
        "1,1,0,3,0x0000000000000000,,,,,1,",
        "2,0,0,1,0x0000000000002000,,,,,,",
        "9,0,0,,,0,0x0000000000000010,,,,",
        "9,1,0,,,0,0x0000000000000010,0x0000000000000005,,4,",
        "9,0,0,,,8,0x0000000000000010,,,,",
        "9,1,0,,,,,,,6,",
        "16,0,0,,,,,,,,",
        "16,1,0,,,,,,3,8,",
        "11,1,1,,,,,,,,",
        "10,0,0,,,,,,,,1",
        "77,0,0,,,,,,,,",
    ]
    (time,) = dissected(
        tshark, tmp_path / "c", "-Y", "vfio_user.time && vfio_user.command == 1", "-T", "fields", "-e", "vfio_user.time"
    )
    assert float(time) == pytest.approx(5e-6, rel=0.2)
    filtered = dissected(tshark, tmp_path / "c", "-Y", "vfio_user.flags.error && vfio_user.error == 22")
    assert len(filtered) == 1


def test_wireshark_takes_the_recorded_traffic_without_complaint(tshark: str, tmp_path: Path) -> None:
    capture = written(tmp_path / "c", list(read_capture(VECTORS)))
    commands = dissected(tshark, capture, "-T", "fields", "-e", "vfio_user.command")
    assert commands == [str(message.header.command) for message in read_capture(VECTORS)]
    assert dissected(tshark, capture, "-Y", "_ws.malformed || vfio_user.malformed || _ws.lua.error") == []


def test_the_dissector_is_shipped_with_the_package() -> None:
    assert dissector_path().read_text().startswith("-- Wireshark dissector for vfio-user")
    assert CLIENT.sender is Role.CLIENT
