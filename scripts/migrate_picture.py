#!/usr/bin/env python3
"""Move a guest from QEMU to QEMU, and keep the session as a picture: ``scripts/migrate_picture.py docs/migrate.svg``.

The commands are run as they are shown, in a folder of their own; a line of the picture appears when it was said, except
that nobody waits long. Needs what ``scripts/fetch_qemu.py --guest`` fetches.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 98
TYPING, LONGEST_WAIT = 0.8, 1.0
"""Seconds in the picture: for a command that is typed; for what takes its time."""
LIMIT = 120.0
DONE = "the command is done"

QEMU = """\
qemu-system-x86_64 -machine pc-q35-11.1,memory-backend=mem -m 256M \\
    -object memory-backend-memfd,id=mem,size=256M,share=on \\
    -kernel vmlinuz -initrd initrd -append console=ttyS0 -display none -serial file:{name}.log \\
    -device '{{"driver":"vfio-user-pci","addr":"3.0","socket":{{"type":"unix","path":"{name}.sock"}}}}' \\
    -qmp unix:{name}.qmp,server=on,wait=off{more} &"""


def serve(name: str) -> str:
    return f"vfio-user serve edu --socket-path {name}.sock --control {name}.ctl >/dev/null &"


@dataclass(frozen=True)
class Command:
    """What is typed, and what is waited for then: a file, and that the guest has counted in it so often."""

    text: str
    file: str = ""
    counts: int = 0


MOVE = "vfio-user qemu-migrate --from a.qmp --to b.qmp --device a.ctl:b.ctl"
SESSION = [
    Command(serve("a"), "a.ctl"),
    Command(QEMU.format(name="a", more=""), "a.log", 3),
    Command("tail -n 3 a.log"),
    Command(serve("b"), "b.ctl"),
    Command(QEMU.format(name="b", more=" -incoming defer -S"), "b.qmp"),
    Command(f"{MOVE} --dry-run"),
    Command(MOVE, "b.log", 3),
    Command("tail -n 2 a.log"),
    Command("head -n 3 b.log"),
]


@dataclass
class Recording:
    """Rows of the picture, and when each appears: seconds since the beginning."""

    rows: list[tuple[float, Text]] = field(default_factory=list)
    now: float = 0.5

    def typed(self, text: str) -> None:
        self.now += TYPING
        lines = text.splitlines()
        self.rows += [(self.now, row(f"{' ' if n else '$'} {line}", "bold")) for n, line in enumerate(lines)]

    def said(self, line: str, waited: float) -> None:
        self.now += min(waited, LONGEST_WAIT)
        self.rows.append((self.now, row(line, "green" if "counts" in line else "default")))

    def svg(self) -> str:
        console = Console(record=True, width=WIDTH, file=io.StringIO())
        for _, text in self.rows:
            console.print(text, no_wrap=True, overflow="ellipsis")
        svg = console.export_svg(title="from QEMU to QEMU", unique_id="migrate")
        svg = re.sub(r"@font-face {.*?}", APPEARANCE, svg, count=1, flags=re.DOTALL)
        svg = re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL)  # fetches nothing
        return re.sub(r'(<text class="migrate-r\d+")(.*?url\(#migrate-line-(\d+)\))', self._timed, svg)

    def _timed(self, match: re.Match[str]) -> str:
        return f'{match[1]} style="animation-delay:{self.rows[int(match[3])][0]:.2f}s"{match[2]}'


def row(line: str, style: str) -> Text:
    """A line; what it begins with is a place on the picture and not spaces, which not all viewers leave in place."""
    text = line.lstrip()
    return Text.assemble((line[: len(line) - len(text)], "dim"), (text, style))


# Without animation, or when it is over, all of it is there.
APPEARANCE = """
@media (prefers-reduced-motion: no-preference) { .migrate-matrix text { animation: appear .01s backwards; } }
@keyframes appear { from { opacity: 0; } }
"""


def record(folder: Path) -> Recording:
    """Run the session."""
    recording = Recording()
    path = f"{Path(sys.executable).parent}:{ROOT / '.qemu'}:{os.environ['PATH']}"
    with subprocess.Popen(
        ["bash", "-s"],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": str(WIDTH)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    ) as shell:
        try:
            for command in SESSION:
                recording.typed(command.text)
                for line, waited in said(shell, command):
                    recording.said(line, waited)
                wait_for(folder, command)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
    return recording


def said(shell: subprocess.Popen[str], command: Command) -> Iterator[tuple[str, float]]:
    """The lines that a command says, and how long each took to come."""
    assert shell.stdin is not None
    assert shell.stdout is not None
    shell.stdin.write(f"{command.text}\necho '{DONE}'\n")
    shell.stdin.flush()
    since = time.monotonic()
    for line in shell.stdout:
        if line.strip() == DONE:
            return
        now = time.monotonic()
        yield line.rstrip(), now - since
        since = now
    sys.exit("the shell has ended")


def wait_for(folder: Path, command: Command) -> None:
    deadline, file = time.monotonic() + LIMIT, folder / command.file
    while not file.exists() or (command.counts and file.read_text().count("counts") < command.counts):
        if time.monotonic() > deadline:
            sys.exit(f"{command.text}: {command.file} does not come, or its guest does not count")
        time.sleep(0.05)


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        subprocess.run([sys.executable, ROOT / "scripts/counting_guest.py", folder], check=True)
        Path(sys.argv[1]).write_text(record(folder).svg())


if __name__ == "__main__":
    main()
