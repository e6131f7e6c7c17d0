"""What was acknowledged is there: after the process is killed, and after the power was cut.

For the latter the system calls that FileStorage makes go to a model of a page cache above a disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vfio_user.devices.nvme.storage import FileStorage, file, kernel

from .nvme_storage_support import SECTOR, read, split

SECTORS = 16


@dataclass
class Disk:
    """A file as the kernel and the disk have it: system calls change the page cache, fdatasync writes that out.

    Sectors stand for the pages: each is written out as a whole, or not. Until fdatasync has, it may have been at any
    moment. What could not be written is clean all the same, and one fdatasync tells of it.
    """

    cache: list[bytes] = field(default_factory=lambda: [bytes(SECTOR)] * SECTORS)
    disk: list[bytes] = field(default_factory=lambda: [bytes(SECTOR)] * SECTORS)
    dirty: dict[int, list[bytes]] = field(default_factory=dict)
    """What a sector held since it was last written out."""
    broken: bool = False
    knows_nowait: bool = False
    knows_modes: tuple[int, ...] = (file.PUNCH, file.ZERO)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        whole = b"".join(self.cache)[offset:]
        count = 0
        for buffer in buffers:
            buffer[:] = whole[count : count + len(buffer)]
            count += len(buffer)
        return count

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags and not self.knows_nowait:
            raise OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT")
        self._change(offset, b"".join(buffers))
        return sum(map(len, buffers))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        if mode not in self.knows_modes:
            raise OSError(errno.EOPNOTSUPP, "no such mode")
        self._change(offset, bytes(length))

    def _change(self, offset: int, content: bytes) -> None:
        for start in range(0, len(content), SECTOR):
            sector = (offset + start) // SECTOR
            self.cache[sector] = content[start : start + SECTOR]
            self.dirty.setdefault(sector, []).append(self.cache[sector])

    def fdatasync(self, fd: int) -> None:
        dirty, self.dirty = self.dirty, {}
        if self.broken and dirty:
            raise OSError(errno.EIO, "the disk does not write")
        for sector, versions in dirty.items():
            self.disk[sector] = versions[-1]

    def drop_clean(self, *_: object) -> None:
        for sector in set(range(SECTORS)) - set(self.dirty):
            self.cache[sector] = self.disk[sector]

    def cut_power(self, draw: st.DataObject) -> None:
        for sector, versions in self.dirty.items():
            self.disk[sector] = draw.draw(st.sampled_from([self.disk[sector], *versions]))
        self.dirty = {}
        self.drop_clean()


class Guest(RuleBasedStateMachine):
    """Writes, flushes, and looks at what is there after each mishap."""

    sectors = st.integers(0, SECTORS - 1).flatmap(
        lambda first: st.tuples(st.just(first), st.integers(1, SECTORS - first))
    )

    @initialize(nowait=st.booleans(), modes=st.sampled_from([(), (file.PUNCH,), (file.PUNCH, file.ZERO)]))
    def boot(self, nowait: bool, modes: tuple[int, ...]) -> None:
        self.stack = contextlib.ExitStack()
        self.path = Path(self.stack.enter_context(tempfile.TemporaryDirectory())) / "disk.img"
        self.model = Disk(knows_nowait=nowait, knows_modes=modes)
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("preadv", "pwritev", "fdatasync"):
            patch.setattr(os, name, getattr(self.model, name))
        patch.setattr(os, "posix_fadvise", self.model.drop_clean)
        patch.setattr(kernel, "fallocate", self.model.fallocate)
        self.expected = [bytes(SECTOR)] * SECTORS
        self.possible = [{bytes(SECTOR)} for _ in range(SECTORS)]  # after a power cut
        self.failed = False  # a flush, and nothing was done about it
        self.writes = 0
        self.start()

    def start(self) -> None:
        self.storage = FileStorage(str(self.path), size=SECTORS * SECTOR)
        self.storage.acquire()
        self.failed = False

    def teardown(self) -> None:
        self.storage.close()
        self.stack.close()

    def wrote(self, first: int, content: bytes) -> None:
        for sector, start in enumerate(range(0, len(content), SECTOR), first):
            self.expected[sector] = content[start : start + SECTOR]
            self.possible[sector].add(self.expected[sector])

    def look(self) -> None:
        """What is found is what may be there, and stays."""
        content = read(self.storage, 0, SECTORS * SECTOR)
        self.expected = [content[start : start + SECTOR] for start in range(0, len(content), SECTOR)]
        for found, possible in zip(self.expected, self.possible, strict=True):
            assert found in possible

    @invariant()
    def reads_what_it_wrote(self) -> None:
        assert read(self.storage, 0, SECTORS * SECTOR) == b"".join(self.expected)

    @rule(sectors=sectors, now=st.booleans())
    def write(self, sectors: tuple[int, int], now: bool) -> None:
        first, count = sectors
        self.writes += 1
        content = self.writes.to_bytes(8, "little") * (count * SECTOR // 8)
        views = split(content, [SECTOR] * count)
        if not (now and self.storage.write_now(first * SECTOR, views)):
            self.storage.write(first * SECTOR, views)
        self.wrote(first, content)

    @rule(sectors=sectors, unmap=st.booleans())
    def write_zeroes(self, sectors: tuple[int, int], unmap: bool) -> None:
        first, count = sectors
        self.storage.write_zeroes(first * SECTOR, count * SECTOR, unmap=unmap)
        self.wrote(first, bytes(count * SECTOR))

    @rule()
    def flush(self) -> None:
        try:
            self.storage.flush()
        except OSError:
            self.failed = True
        else:
            self.possible = [{content} for content in self.expected]

    @rule(broken=st.booleans())
    def break_or_mend(self, broken: bool) -> None:
        self.model.broken = broken

    @rule()
    def reset(self) -> None:
        self.storage.acquire()
        self.failed = False
        self.look()

    @rule()
    def hand_over(self) -> None:
        """To another server, as a migration does; it stays where it is if that fails."""
        try:
            self.storage.release()
        except OSError:
            self.failed = True
        else:
            self.possible = [{content} for content in self.expected]
            self.storage.close()
            self.start()

    @precondition(lambda self: not self.failed)
    @rule()
    def kill(self) -> None:
        self.storage.close()
        self.start()

    @rule(draw=st.data())
    def cut_power(self, draw: st.DataObject) -> None:
        self.storage.close()
        self.model.cut_power(draw)
        self.start()
        self.look()
        self.possible = [{content} for content in self.expected]


FIND = settings(max_examples=500, stateful_step_count=30, database=None, derandomize=True, phases=[Phase.generate])
Guest.TestCase.settings = settings(max_examples=80, stateful_step_count=30)
TestPowerCuts = Guest.TestCase


def test_a_flush_that_does_nothing_is_found_out() -> None:
    """That the model can tell: without fdatasync, it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileStorage, "flush", lambda self: None)
        with pytest.raises(AssertionError):
            run_state_machine_as_test(Guest, settings=FIND)


def test_to_flush_once_more_after_a_failure_is_found_out() -> None:
    def flush(storage: FileStorage) -> None:
        os.fdatasync(storage._fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileStorage, "flush", flush)
        with pytest.raises(AssertionError):
            run_state_machine_as_test(Guest, settings=FIND)


def test_what_was_acknowledged_survives_the_process(tmp_path: Path) -> None:
    """Killed in the middle of its work, it leaves all that it said was there."""
    program = """
        import sys
        from vfio_user.devices.nvme.storage import open_storage
        storage = open_storage(sys.argv[1], size=1 << 20)
        storage.acquire()
        number = 0
        while True:
            number += 1
            content = memoryview(bytearray(number.to_bytes(512, "little")))
            storage.write(number % 2048 * 512, [content])
            storage.flush()
            print(number, flush=True)
    """
    path = tmp_path / "disk.img"
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(50):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
    last = int(said[-1]) if said else 50
    with contextlib.closing(FileStorage(str(path))) as storage:
        storage.acquire()
        for number in range(max(1, last - 2047), last + 1):
            assert int.from_bytes(read(storage, number % 2048 * 512, 512), "little") >= number
