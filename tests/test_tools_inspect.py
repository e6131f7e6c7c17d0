"""info, read and write: config space decoded, regions drawn, places by name, ranges, files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfio_user import Client, Device, Region
from vfio_user.client.regions import RegionDescription
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.errors import UsageError
from vfio_user.fds import OwnedFd
from vfio_user.tools import dump as dumping
from vfio_user.tools.config_space import Snapshot, bars, class_name
from vfio_user.tools.info import gather
from vfio_user.tools.info_text import describe
from vfio_user.tools.location import Extent, Location, Name, parse_assignment, parse_place
from vfio_user.tools.region_map import MARKS, Part, Span, draw, spans, structures
from vfio_user.tools.registers import Registers
from vfio_user.wire.constants import RegionFlags

from .device_support import TIMEOUT, attached, guest_memory, serving
from .support import RecordingBackend, recording
from .test_pci_lspci import FETCHED, dump, enable, everything
from .test_vectors import Sparse
from .tools_support import Done, command

PAGE = 0x1000


def snapshot(device: Device) -> Snapshot:
    data = bytearray(len(device.config))
    device.region_read(7, 0, memoryview(data))
    return Snapshot(bytes(data))


# Config space


def test_a_device_with_every_capability_is_decoded() -> None:
    device = everything()
    enable(device)
    found = snapshot(device)
    decoded = {
        one.kind.name + (f" {one.version}" if one.version else ""): one.fields(found)
        for one in (*found.capabilities, *found.extended_capabilities)
    }
    assert found.complaints == []
    assert decoded["power management"]["state"] == "D0"
    assert decoded["PCI Express"] | {"type": "endpoint", "flr": True, "link_width": "x1"} == decoded["PCI Express"]
    assert decoded["MSI"] | {"vectors": "4", "maskable": True, "64bit": True, "enable": False} == decoded["MSI"]
    assert {"address", "data", "mask", "pending"} <= decoded["MSI"].keys()
    assert decoded["MSI-X"]["vectors"] == 65
    assert re.fullmatch(r"bar\d\+0x[0-9a-f]+", str(decoded["MSI-X"]["table"]))
    assert decoded["vendor specific"] == {"length": 6, "body": "112233"}
    assert decoded["device serial number 1"] == {"number": "11-22-33-44-55-66-77-88"}
    assert decoded["advanced error reporting 2"]["uncorrectable"] == "none"
    assert decoded["vendor specific 1"] == {"vendor_id": "0xbeef", "revision": 2, "length": 16, "body": "00" * 8}
    kinds = {bar.index: (bar.bits, bar.io, bar.prefetchable, bar.address) for bar in bars(found)}
    assert kinds[0] == (32, False, False, 0xFE000000)
    assert kinds[1] == (32, True, False, 0xC000)
    assert kinds[2] == (64, False, True, 0xFE200000)
    assert 3 not in kinds


@pytest.mark.parametrize("make", [Gpio, Edu, Ivshmem, everything])
def test_what_lspci_finds_we_find(make: Callable[[], Device], tmp_path: Path) -> None:
    program = str(FETCHED) if FETCHED.exists() else shutil.which("lspci")
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no lspci: run scripts/fetch_qemu.py --lspci")
    device = make()
    enable(device)
    (tmp_path / "dump").write_text(dump(device))
    listed = subprocess.run(
        [program, "-F", str(tmp_path / "dump"), "-vvv"], capture_output=True, text=True, timeout=TIMEOUT, check=True
    ).stdout
    found = snapshot(device)
    offsets = [f"{one.offset:02x}" for one in found.capabilities]
    extended = [f"{one.offset:02x} v{one.version}" for one in found.extended_capabilities]
    assert re.findall(r"Capabilities: \[(.*?)\]", listed) == [*offsets, *extended]
    for what in re.findall(r"MSI-X: Enable- Count=(\d+)", listed):
        (msix,) = [one for one in found.capabilities if one.kind.name == "MSI-X"]
        assert msix.fields(found)["vectors"] == int(what)
    assert len(re.findall(r"Region \d:", listed)) == len(list(bars(found)))


def with_capabilities(*places: tuple[int, int, int], pointer: int = 0x40) -> bytes:
    """Config space with capabilities of (offset, id, next)."""
    data = bytearray(256)
    data[:2], data[6], data[0x34] = b"\x34\x12", 0x10, pointer
    for offset, id_, following in places:
        data[offset : offset + 2] = bytes((id_, following))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "offsets", "complaint"),
    [
        (bytes([0xFF]) * 256, [], "config space reads as ones: nothing answers"),
        (bytes([0xFF]) * 4096, [], "config space reads as ones: nothing answers"),
        (with_capabilities((0x40, 5, 0x40)), [0x40], "the MSI (0x40) capability leads back to 0x40"),
        (with_capabilities((0x40, 5, 0x50), (0x50, 1, 0x40)), [0x40, 0x50], "capability leads back to 0x40"),
        (with_capabilities((0x40, 5, 0x10)), [0x40], "leads to 0x10, where none can be"),
        (with_capabilities(pointer=0x20), [], "the pointer to the first capability leads to 0x20"),
        (with_capabilities((0xFC, 9, 0), pointer=0xFC), [0xFC], None),
        (with_capabilities((0x40, 0x77, 0)), [0x40], None),
        (with_capabilities() + b"\3\0\1\x10" + bytes(4092 - 256), [0x40, 0x100], "leads back to 0x100"),
        (with_capabilities() + b"\3\0\1\xff" + bytes(4092 - 256), [0x40, 0x100], "leads to 0xff0, where none can be"),
    ],
)
def test_capabilities_that_make_no_sense_are_a_complaint(
    data: bytes, offsets: list[int], complaint: str | None
) -> None:
    if len(data) > 256 and data[0] != 0xFF:
        data = data[:4080]
    found = Snapshot(data)
    assert [one.offset for one in (*found.capabilities, *found.extended_capabilities)] == offsets
    assert (found.complaints == []) if complaint is None else any(complaint in one for one in found.complaints)


@given(st.binary(min_size=0, max_size=512).map(lambda some: some * (4096 // len(some)) if some else some))
@example(bytes(4096))
def test_any_bytes_are_decoded(data: bytes) -> None:
    found = Snapshot(data)
    for one in (*found.capabilities, *found.extended_capabilities):
        assert json.dumps(one.fields(found))
    assert len(found.capabilities) <= 48
    assert len(found.extended_capabilities) <= 960
    assert len(list(bars(found))) <= 6
    assert isinstance(found.complaints, list)
    structures(found)
    assert all(registers_are_inside(found))


def registers_are_inside(found: Snapshot) -> Iterator[bool]:
    registers = Registers(found)
    for name in registers.names():
        place = registers.find(Name.parse(name))
        yield place.region != 7 or place.offset < 4096


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0x010802, "non-volatile memory controller (NVM Express)"),
        (0x020000, "Ethernet controller"),
        (0x02FF00, "network controller"),
        (0xFF0000, "device of no class"),
        (0xAB1234, "unknown class"),
    ],
)
def test_classes(code: int, name: str) -> None:
    assert class_name(code) == name


# Regions


def region(size: int, *areas: tuple[int, int]) -> RegionDescription:
    flags = RegionFlags.READ | RegionFlags.WRITE | (RegionFlags.MMAP if areas else 0)
    return RegionDescription(0, size, flags, 0, areas, OwnedFd(os.dup(0)) if areas else None)


def closed(one: RegionDescription) -> RegionDescription:
    if one.fd is not None:
        one.fd.close()
    return one


def test_a_region_is_its_parts_without_a_gap() -> None:
    one = region(0x4000, (0x1000, 0x1000), (0x3000, 0x1000))
    inside = [Span(Part.TABLE, 0, 0x20), Span(Part.PBA, 0x800, 8)]
    parts = spans(one, inside)
    closed(one)
    assert parts == [
        Span(Part.TABLE, 0, 0x20),
        Span(Part.TRAPPED, 0x20, 0x7E0),
        Span(Part.PBA, 0x800, 8),
        Span(Part.TRAPPED, 0x808, 0x7F8),
        Span(Part.MMAP, 0x1000, 0x1000),
        Span(Part.TRAPPED, 0x2000, 0x1000),
        Span(Part.MMAP, 0x3000, 0x1000),
    ]
    assert draw(parts, 16) == "T.P.####....####"


AREAS = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=8)


@given(st.integers(1, 100), AREAS, AREAS, st.integers(1, 80))
def test_parts_cover_a_region_once_whatever_is_said_of_it(
    size: int, areas: list[tuple[int, int]], inside: list[tuple[int, int]], width: int
) -> None:
    one = region(size, *areas)
    parts = spans(one, [Span(Part.TABLE, offset, length) for offset, length in inside])
    mapped = {byte for offset, length in one.mmap_areas for byte in range(offset, offset + length)}
    closed(one)
    assert parts[0].offset == 0
    assert [part.offset for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert parts[-1].end == size
    assert all(left.part is not right.part for left, right in pairwise(parts))
    table = {byte for offset, length in inside for byte in range(offset, offset + length)}
    for part in parts:
        for byte in range(part.offset, part.end):
            expected = Part.TABLE if byte in table else Part.MMAP if byte in mapped else Part.TRAPPED
            assert part.part is expected
    line = draw(parts, width)
    assert len(line) == width
    assert set(line) <= set(MARKS.values())


def test_a_region_cut_to_pieces_is_drawn_at_once() -> None:
    one = region(1 << 40, *((n << 20, PAGE) for n in range(4000)))
    parts = spans(one)
    closed(one)
    assert len(parts) == 8000
    facts = {"index": 0, "name": "bar0", "size": 1 << 40, "flags": [], "parts": [part._asdict() for part in parts]}
    migration = {"supported": False}
    rest: dict[str, object] = {"version": "0.2", "capabilities": {}, "pci": None, "device": {"flags": []}, "irqs": []}
    text = list(describe(rest | {"regions": [facts], "migration": migration}))
    assert len(text) < 50
    assert any("and 7968 more parts" in line for line in text)


# info, of servers


def test_info_of_the_device_that_the_rust_traffic_was_recorded_from() -> None:
    """Its config space is a pattern: every byte 7 times its offset."""
    with guest_memory(1 << 22) as memory, attached(Sparse(memory)) as client:
        facts = gather(client)
        text = "\n".join(describe(facts))
    assert facts["pci"]["vendor_id"] == "0700"
    parts = facts["regions"][0]["parts"]
    assert [(part["part"], part["offset"], part["size"]) for part in parts if part["part"] == "mmap"] == [
        ("mmap", 0x1000, 0x2000),
        ("mmap", 0x8000, 0x1000),
    ]
    assert "# mmap 0x8000+0x1000" in text
    assert "migration   not supported" in text
    assert json.dumps(facts)


def test_info_in_lines() -> None:
    device = everything()
    enable(device)
    with attached(device) as client:
        text = "\n".join(describe(gather(client)))
    for part in (
        "1af4:10f0 class 058000 revision 00: memory controller",
        "command     io+, memory+, master+",
        "bar1        0xc000 (I/O ports)",
        "bar2        0xfe200000 (memory of 64 bits, prefetchable)",
        "device serial number (id 0x03)",
        "MSI-X table 0x0+0x410",
        "irq 2       msix             65",
    ):
        assert part in text


class Words(RecordingBackend):
    """Refuses what is longer than a dword, as some devices do."""

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        if len(data) > 4:
            raise OSError(22, "")
        super().region_read(region, offset, data)


def test_config_space_that_is_served_by_dwords_only() -> None:
    with recording(Words()) as backend, attached(backend) as client:
        assert gather(client)["pci"]["vendor_id"] == "0100"


def test_a_server_that_refuses_config_space_is_one_line() -> None:
    with recording(RecordingBackend()) as backend, serving(backend) as path:
        backend.fail["region_read"] = OSError(5, "")
        done = command("info", path)
    assert done == (1, "", "vfio-user: REGION_READ refused: Input/output error\n")


# Places


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("bar0+0x10..0x40", Extent(0, 0x10, 0x40, None)),
        ("config+0..", Extent(7, 0, None, None)),
        ("rom..", Extent(6, 0, None, None)),
        ("bar5+16..32:u16", Extent(5, 16, 32, 2)),
        ("config.command", Name("config.command")),
        ("msix.control:u8", Name("msix.control", 1)),
        ("capability_77@40.header", Name("capability_77@40.header")),
        ("vendor@60.length", Name("vendor@60.length")),
        ("bar0+4", Location(0, 4, 4)),
    ],
)
def test_places(text: str, place: object) -> None:
    assert parse_place(text) == place
    assert parse_place(str(parse_place(text))) == place


@given(st.text(max_size=20) | st.from_regex(r"\A[a-z0-9.:+=@]{0,20}\Z"))
def test_any_text_is_a_place_or_wrong_usage(text: str) -> None:
    try:
        place = parse_place(text)
    except UsageError:
        return
    assert parse_place(str(place)) == place


@pytest.mark.parametrize(
    "text",
    ["bar0..0", "bar0+8..8", "bar0+8..4", "bar9..", "bar0+x..", "bar0..:u3", "config.", ".command", "..", "a.b:u3"],
)
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_place(text)


def test_assignments() -> None:
    assert parse_assignment("config.command=6") == (Name("config.command"), 6)
    for text in ("config.command", "config.command=", "config.command=x", "config.command=-1", "bar0..4=1"):
        with pytest.raises(UsageError):
            parse_assignment(text)


def test_registers_by_name_are_where_the_device_has_them() -> None:
    device = everything()
    found = snapshot(device)
    registers = Registers(found)
    names = registers.names()
    for name in (
        "config.command",
        "config.class_code",
        "config.bar2",
        "pm.control",
        "pcie.device_status",
        "aer.control",
    ):
        assert name in names
    assert "config.bar3" not in names, "BAR 2 has 64 bits"
    for name in names:
        place = registers.find(Name.parse(name))
        own = name.removeprefix("config.")
        if own in {"bar3", "bar4", "bar5"}:  # of a header, whether or not there is such a BAR
            continue
        assert own in device.config.names(place.offset, place.width), name
        assert device.config.names(place.offset, place.width) == [own]
    assert registers.find(Name("config.MSIX.control")) == registers.find(Name("msix.control"))
    assert registers.find(Name("msix.control", 4)).width == 4
    with pytest.raises(UsageError, match=r"config\.command"):
        registers.find(Name("config.commandx"))


def test_registers_of_bars_of_known_devices() -> None:
    registers = Registers(snapshot(Edu()))
    assert registers.find(Name("bar0.factorial")) == Location(0, 8, 4)
    assert registers.find(Name("bar0.dma_source")) == Location(0, 0x80, 8)
    assert registers.find(Name("bar0.irq_raise")) == Location(0, 0x60, 4)
    other = Registers(Snapshot(bytes(256)), Edu())
    assert other.find(Name("bar0.factorial")) == Location(0, 8, 4)
    assert "bar0.factorial" not in Registers(Snapshot(bytes(256))).names()
    assert Registers(None).names() == []


class Confused(Edu):
    """A device whose author made a mistake."""

    closed = False

    def register_names(self, region: int, offset: int, length: int) -> list[str]:
        if offset >= 8:
            raise RuntimeError("no names")
        return [f"register_{offset}"]

    def close(self) -> None:
        Confused.closed = True


def test_a_device_that_cannot_name_its_registers_has_those_that_it_could() -> None:
    registers = Registers(None, Confused())
    assert registers.names() == ["bar0.register_0", "bar0.register_4"]
    assert Confused.closed


# Ranges


@given(st.lists(st.binary(max_size=40), max_size=8), st.sampled_from([1, 2, 4, 8]), st.integers(0, 1 << 32))
def test_lines_have_every_byte(pieces: list[bytes], width: int, start: int) -> None:
    data = b"".join(pieces)
    text = list(dumping.lines(pieces, start, width))
    assert text[-1] == f"{start + len(data):08x}"
    shown = bytearray()
    for line in text[:-1]:
        if line == "*":
            continue
        at, numbers = re.match(r"([0-9a-f]+)  (.*?)  \|", line).groups()  # type: ignore[union-attr]
        while len(shown) < int(at, 16) - start:
            shown += shown[-16:]
        for one in numbers.split():
            shown += bytes.fromhex(one)[::-1]
    while len(shown) < len(data):
        shown += shown[-16:]
    assert shown == data


def test_same_lines_are_shown_once() -> None:
    assert list(dumping.lines([bytes(64), b"\1"], 0)) == [
        f"00000000  {' '.join(['00'] * 16)}  |................|",
        "*",
        f"00000040  01{' ' * 45}  |.|",
        "00000041",
    ]


@pytest.fixture
def small() -> Iterator[tuple[RecordingBackend, Path]]:
    """A device whose server takes 4096 bytes in a message."""
    with recording(RecordingBackend()) as backend:
        backend.regions[0] = Region(0x3010)
        backend.memory = bytearray(os.urandom(0x3010))
        with serving(backend, max_data_xfer_size=PAGE) as path:
            yield backend, path


def read(path: Path, *arguments: object) -> Done:
    return command("read", path, *arguments)


def test_a_range_goes_in_pieces_that_the_server_takes(small: tuple[RecordingBackend, Path], tmp_path: Path) -> None:
    backend, path = small
    file = tmp_path / "bytes"
    assert read(path, "bar0+0x8..", "config+0..2", "bar0:u16", "--output", file) == (0, "", "")
    assert file.read_bytes() == backend.memory[8:] + backend.config[:2] + backend.memory[:2]
    assert [call[2:] for call in backend.called("region_read")[:4]] == [
        (0x8, PAGE),
        (0x1008, PAGE),
        (0x2008, PAGE),
        (0x3008, 8),
    ]
    data = os.urandom(0x2345)
    file.write_bytes(data)
    done = command("write", path, "bar0+0x10", "--input", file)
    assert done == (0, f"{0x2345} bytes written at bar0+0x10\n", "")
    assert backend.memory[0x10 : 0x10 + len(data)] == data


def test_a_range_by_accesses_of_a_width(small: tuple[RecordingBackend, Path]) -> None:
    backend, path = small
    backend.memory[:8] = b"\1\2\3\4\5\6\7\x08"
    assert read(path, "bar0+0..8:u32").out == "00000000  04030201 08070605" + " " * 18 + "  |........|\n00000008\n"
    assert [call[2:] for call in backend.called("region_read")] == [(0, 4), (4, 4)]
    facts = json.loads(read(path, "bar0..4", "bar0+4:u16", "--json").out)
    assert facts == {"bar0+0x0..0x4": "01020304", "bar0+0x4:u16": 0x0605}


def test_what_was_read_before_it_failed_is_kept(small: tuple[RecordingBackend, Path], tmp_path: Path) -> None:
    backend, path = small
    file = tmp_path / "bytes"

    def fail_later() -> None:
        if len(backend.called("region_read")) == 3:
            backend.fail["region_read"] = OSError(5, "")

    backend.act["region_read"] = fail_later
    done = read(path, "bar0..", "--output", file)
    assert done == (1, "", "vfio-user: bar0+0x0..: REGION_READ refused: Input/output error\n")
    assert file.read_bytes() == backend.memory[: 2 * PAGE]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["write", "bar0..4", "--input", "FILE"], "5 bytes do not fit at bar0+0x0..0x4, which has room for 4"),
        (["write", "bar0+0x300c", "--input", "FILE"], "5 bytes do not fit"),
        (["write", "bar0+0x4000", "--input", "FILE"], "is not in bar0"),
        (["write", "bar0", "bar1", "--input", "FILE"], "takes one PLACE"),
        (["write", "bar0..4=5"], "is a range, which takes no value"),
        (["write", "config.command=0x10000"], "0x10000 does not fit in the 2 bytes of config+0x4:u16"),
        (["write", "config.nothing=1"], "no register of this device"),
        (["read", "bar0..0x3011"], "is not in bar0, which has 0x3010 bytes"),
        (["read", "bar5.."], "is not in bar5, which has 0x0 bytes"),
        (["read", "77.."], "is not in 77"),
        (["read", "bar0+2..8:u32"], "whole accesses of 4 bytes"),
        (["read", "bar0", "--output", "x", "--json"], "exclude"),
        (["read", "bar0.x", "--device", "nothing"], "no device 'nothing'"),
    ],
)
def test_wrong_usage_changes_nothing(
    small: tuple[RecordingBackend, Path], tmp_path: Path, arguments: list[str], reason: str
) -> None:
    backend, path = small
    (tmp_path / "FILE").write_bytes(b"12345")
    verb, *rest = arguments
    done = command(verb, path, *(tmp_path / one if one == "FILE" else one for one in rest))
    assert (done.status, done.out) == (2, "")
    assert reason in done.err.splitlines()[-1]
    assert backend.called("region_write") == []


def test_names_are_read_and_written() -> None:
    with serving(Edu()) as path:
        assert command("write", path, "config.command=0x6", "bar0.liveness=1") == (0, "", "")
        assert read(path, "config.command", "bar0.liveness", "config.class_code", "config.command:u32").out == (
            "config.command = 0x0006\nbar0.liveness = 0xfffffffe\nconfig.class_code = 0x00ff00\n"
            "config.command:u32 = 0x00100006\n"
        )
        with Client.connect(path, TIMEOUT) as client:
            assert client.region_read(7, 4, 2) == b"\6\0"


def test_a_pipe_that_brings_too_much_says_how_much_was_written(small: tuple[RecordingBackend, Path]) -> None:
    backend, path = small
    ours, theirs = os.pipe()
    with os.fdopen(theirs, "wb") as pipe:
        pipe.write(b"12345")
    with Client.connect(path, TIMEOUT) as client, os.fdopen(ours, "rb") as file:
        target = Extent(0, 0, 4, None)
        with pytest.raises(UsageError, match="is full: 0 bytes were written, and there are more"):
            dumping.write_from(client, file, target)
    assert backend.called("region_write") == []
