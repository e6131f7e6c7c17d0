"""What the tests of save, restore, migrate, receive and resume share: the commands as processes of their own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vfio_user import Client, DeviceState

COMMAND = [sys.executable, "-m", "vfio_user"]
TIMEOUT = 60
KEYS = {
    "status",
    "failed_step",
    "error",
    "rounds",
    "dirty_pages",
    "device_state_bytes",
    "downtime_ms",
    "total_ms",
    "verified",
}
BAR2 = 2
SIZE = 8 << 20
LARGE = ("ivshmem", "-o", "size=8M")
"""A device whose state takes seconds at 1 MiB per second."""
MARK = b"here and nowhere else"


def run(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, input=stdin, timeout=TIMEOUT, check=False
    )


def complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line that a command says when it fails."""
    assert done.returncode == 1, done
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("vfio-user: ")
    return line


class Served:
    """A server in a process of its own, and what a trace filter around its device has told so far."""

    def __init__(self, path: Path, arguments: Sequence[str]) -> None:
        self.path = path
        self.trace: list[str] = []
        self._told = threading.Condition()
        command = [*COMMAND, "serve", *arguments, "--socket-path", str(path), "--filter", "trace"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert "is served" in self.process.stdout.readline()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._told:
                self.trace.append(line)
                self._told.notify_all()

    def wait_for(self, text: str) -> None:
        """Until the device was asked for something."""
        with self._told:
            assert self._told.wait_for(lambda: any(text in line for line in self.trace), TIMEOUT), self.trace

    def state(self) -> DeviceState:
        with Client.connect(self.path, TIMEOUT) as client:
            return client.migration_get_state()

    def mark(self) -> None:
        with Client.connect(self.path, TIMEOUT) as client:
            client.region_write(BAR2, 0, MARK)

    @property
    def marked(self) -> bool:
        with Client.connect(self.path, TIMEOUT) as client:
            return client.region_read(BAR2, 0, len(MARK)) == MARK

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join(TIMEOUT)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


Serve = Callable[..., Served]


@contextmanager
def serving(folder: Path) -> Iterator[Serve]:
    """Call it with a name for the socket and the arguments of ``vfio-user serve``."""
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> Served:
            served = Served(folder / name, arguments or LARGE)
            stack.callback(served.close)
            return served

        yield start


def served_pair(serve: Serve) -> tuple[Served, Served]:
    """A device with something to lose, and one to move it to."""
    source, destination = serve("source"), serve("destination")
    source.mark()
    return source, destination


def expect_source_runs_on(source: Served) -> None:
    assert source.state() == DeviceState.RUNNING
    assert source.marked


def expect_as_before(source: Served, destination: Served) -> None:
    expect_source_runs_on(source)
    assert destination.state() == DeviceState.RUNNING
    assert not destination.marked


def expect_moved(source: Served, destination: Served) -> None:
    assert source.state() == DeviceState.STOP
    assert destination.state() == DeviceState.RUNNING
    assert destination.marked


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command at work, in a process group of its own, as one that was typed on a terminal has it."""
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def listening(*arguments: str | Path, place: str | Path) -> Iterator[subprocess.Popen[str]]:
    """``vfio-user receive`` that waits at ``place`` already."""
    with started("receive", *arguments, "--listen", place) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(" waits for vfio-user migrate --to\n")
        yield process


def receiving(destination: Served) -> str:
    """What a shell runs to be the other end."""
    return shlex.join([*COMMAND, "receive", str(destination.path)])


def report_of(done: subprocess.CompletedProcess[bytes]) -> dict[str, object]:
    report: dict[str, object] = json.loads(done.stdout)
    assert set(report) == KEYS
    return report


def child_of(process: subprocess.Popen[str]) -> int:
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)
