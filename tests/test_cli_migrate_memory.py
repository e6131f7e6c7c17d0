"""migrate and receive with the guest's memory, which is a file at each side."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import Client
from vfio_user.errors import UsageError
from vfio_user.tools.memory import MemorySpec, guest_memory

from .cli_migrate_support import COMMAND, TIMEOUT, Serve, complaint, expect_moved, listening, report_of, run, serving

pytestmark = pytest.mark.timeout(120)

PAGE = 4096
SIZE = 300 * PAGE
ADDRESS = 0x1_0000_0000
WRITTEN = "written while it moves"
WRITER = f"""
from vfio_user import Bar, Device, MigrationFlags, register


class Writer(Device):
    \"\"\"Writes another page of guest memory whenever it is asked for data ahead: after the page's contents went.\"\"\"

    vendor_id, device_id = 0x1234, 0x5678
    bars = {{0: Bar({PAGE}), 2: Bar({PAGE}, memory=True)}}
    migration = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    turns = register(0)

    def pre_copy(self):
        self.turns += 1
        self.dma.write({ADDRESS} + self.turns * {PAGE} + 7, b"{WRITTEN}")
        return b""
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def memory(tmp_path: Path) -> tuple[Path, Path]:
    """The source's, full of something, and the destination's."""
    here, there = tmp_path / "memory-here", tmp_path / "memory-there"
    here.write_bytes(os.urandom(SIZE))
    there.write_bytes(bytes(SIZE))
    return here, there


@pytest.mark.parametrize("way", ["here", "exec", "to"])
def test_memory_goes_along_and_what_the_device_writes_meanwhile(
    serve: Serve, memory: tuple[Path, Path], tmp_path: Path, way: str
) -> None:
    (tmp_path / "writer.py").write_text(WRITER)
    source, destination = (serve(name, f"{tmp_path}/writer.py:Writer") for name in ("source", "destination"))
    source.mark()
    before, (here, there) = memory[0].read_bytes(), (f"{file}@{ADDRESS:#x}" for file in memory)
    if way == "here":
        done = run("migrate", source.path, destination.path, "--memory", f"{memory[0]}:{there}", "--json")
    elif way == "exec":
        command = shlex.join([*COMMAND, "receive", str(destination.path), "--memory", there])
        done = run("migrate", source.path, "--exec", command, "--memory", here, "--json")
    else:
        place = tmp_path / "place"
        with listening(destination.path, "--memory", there, place=place) as receiver:
            done = run("migrate", source.path, "--to", place, "--memory", here, "--json")
            told, complaints = receiver.communicate(timeout=TIMEOUT)
            assert (receiver.returncode, complaints) == (0, "")
            assert "1.2 MiB of memory" in told
    assert (done.returncode, done.stderr) == (0, b"")
    expect_moved(source, destination)
    with Client.connect(destination.path, TIMEOUT) as client:
        turns = int.from_bytes(client.region_read(0, 0, 4), "little")
    expected = bytearray(before)
    for turn in range(1, turns + 1):
        start = turn * PAGE + 7
        expected[start : start + len(WRITTEN)] = WRITTEN.encode()
    assert memory[0].read_bytes() == expected
    assert memory[1].read_bytes() == expected
    dirty = report_of(done)["dirty_pages"]
    assert isinstance(dirty, int)
    assert 1 <= turns <= dirty


def test_memory_that_differs_is_refused_before_anything_moves(
    serve: Serve, memory: tuple[Path, Path], tmp_path: Path
) -> None:
    source, destination = serve("source", "edu"), serve("destination", "edu")
    memory[1].write_bytes(bytes(PAGE))
    done = run("migrate", source.path, destination.path, "--memory", f"{memory[0]}:{memory[1]}", "--json")
    assert f"guest memory differs: {SIZE:#x} bytes at 0x0 and 0x1000 bytes at 0x0" in complaint(done)
    assert report_of(done)["failed_step"] == "check"
    assert memory[1].read_bytes() == bytes(PAGE)
    missing = run("migrate", source.path, destination.path, "--memory", f"{memory[0]}:{tmp_path / 'missing'}")
    assert f"{tmp_path / 'missing'}: No such file or directory" in complaint(missing)


def odd(path: Path) -> None:
    path.write_bytes(bytes(PAGE + 1))


@pytest.mark.parametrize("make", [odd, Path.touch, os.mkfifo])
def test_what_is_no_memory_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(UsageError, match=f"^{path} is no memory"), guest_memory([MemorySpec(path)]):
        pass


def test_memory_has_its_place_in_64_bits_and_for_itself(memory: tuple[Path, Path]) -> None:
    with guest_memory([MemorySpec(memory[0]), MemorySpec(memory[1], SIZE)]) as guest:
        assert [(region.address, region.size) for region in guest.regions] == [(0, SIZE), (SIZE, SIZE)]
    with (
        pytest.raises(UsageError, match=f"overlaps at {SIZE - PAGE:#x}"),
        guest_memory([MemorySpec(memory[1], SIZE - PAGE), MemorySpec(memory[0])]),
    ):
        pass
    last = (1 << 64) - SIZE
    with guest_memory([MemorySpec(memory[0], last)]):
        pass
    with pytest.raises(UsageError, match="64 bits"), guest_memory([MemorySpec(memory[0], last + PAGE)]):
        pass


def test_memory_has_room_before_anything_is_written(tmp_path: Path) -> None:
    """Else a full file system would be a SIGBUS in the middle."""
    path = tmp_path / "hole"
    path.touch()
    os.truncate(path, SIZE)
    with guest_memory([MemorySpec(path)]):
        assert path.stat().st_blocks * 512 >= SIZE


NAME = st.text(st.characters(exclude_characters="\0:@", exclude_categories=["Cs"]), min_size=1)


@given(NAME, st.integers(0, (1 << 52) - 1), st.sampled_from([str, hex, "{:#o}".format]))
def test_a_specification_is_read_as_it_was_written(name: str, page: int, write: Callable[[int], str]) -> None:
    address = write(page * PAGE)
    assert MemorySpec.parse(f"{name}@{address}") == MemorySpec(Path(name), page * PAGE)
    assert MemorySpec.parse(name) == MemorySpec(Path(name), 0)
    assert MemorySpec.parse(f"a@b:c@{address}") == MemorySpec(Path("a@b:c"), page * PAGE)
    pair = (MemorySpec(Path(name), page * PAGE), MemorySpec(Path("other"), page * PAGE))
    assert MemorySpec.parse_pair(f"{name}:other@{address}") == pair


@given(st.text())
def test_whatever_is_written_is_read_or_refused(text: str) -> None:
    for parse in (MemorySpec.parse, MemorySpec.parse_pair):
        try:
            parse(text)
        except UsageError:
            continue


@pytest.mark.parametrize("text", ["", "@0", "a@", "a@x", "a@-4096", "a@1", "a@4097", "a@0x1000@"])
def test_wrong_specifications(text: str) -> None:
    with pytest.raises(UsageError):
        MemorySpec.parse(text)


@pytest.mark.parametrize("text", ["a", "a:", ":b", "a:b:c", ":@0", "a:b@1"])
def test_wrong_pairs(text: str) -> None:
    with pytest.raises(UsageError):
        MemorySpec.parse_pair(text)
