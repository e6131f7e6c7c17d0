"""The manual's page on filters: it runs, and names what there is."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from vfio_user.filters import FILTERS, parse_filter
from vfio_user.filters.commands import COMMAND_NAMES

PAGE = (Path(__file__).parent.parent / "docs/filters.md").read_text()
TIMEOUT = 30


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def sections() -> dict[str, str]:
    """What the page says below each heading of the third level."""
    found = re.findall(r"^### (\w+)\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    return dict(found)


def test_the_programs_of_the_page_run(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    programs = blocks("python")
    assert len(programs) == 3
    for program in programs:
        exec(compile(program.replace("/tmp/", f"{tmp_path}/"), "docs/filters.md", "exec"), namespace)


def test_every_filter_and_option_is_on_the_page() -> None:
    assert sections().keys() == FILTERS.keys()
    for name, filter_class in FILTERS.items():
        for option in filter_class.options.keys() - COMMAND_NAMES.keys():
            assert f"`{option}=" in sections()[name], f"{name}: {option}"


def test_every_name_of_a_command_is_on_the_page() -> None:
    (table,) = re.findall(r"^\| name \|.*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    first_column = [row.split("|")[1] for row in table.splitlines()[2:] if row]
    assert {name for cell in first_column for name in re.findall(r"`(\w+)`", cell)} == COMMAND_NAMES.keys()


def test_every_filter_that_is_written_on_the_page_can_be_parsed() -> None:
    written = re.findall(r"--filter ([a-z][^\s`]*)", PAGE)
    assert len(written) >= 5
    for text in written:
        parse_filter(text)


def command(line: str, path: Path) -> list[str]:
    """A line of the page, ``$ vfio-user ...``, as arguments; at another path."""
    program, *arguments = shlex.split(line.replace("/tmp/edu.sock", str(path)).strip(" $&"))
    assert program == "vfio-user"
    return [sys.executable, "-m", "vfio_user", *arguments]


def without_time(line: str) -> str:
    return line[line.index("Edu") :].rpartition(",")[0]


def test_the_commands_of_the_page_do_what_it_shows(tmp_path: Path) -> None:
    shell, trace = blocks("")[:2]
    path = tmp_path / "edu.sock"
    (serve, *uses) = re.findall(r"^(\$ vfio-user .*)\n((?:[^$].*\n)*)", shell, re.MULTILINE)
    with subprocess.Popen(command(serve[0], path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            assert "is served at" in served.stdout.readline()
            assert len(uses) == 2
            for line, shown in uses:
                done = subprocess.run(command(line, path), capture_output=True, text=True, timeout=TIMEOUT)
                assert done.stdout + done.stderr == shown
            served.send_signal(signal.SIGTERM)
            _, said = served.communicate(timeout=TIMEOUT)
        finally:
            served.kill()
    assert served.returncode == 0
    traced = [line for line in said.splitlines() if "Edu region_" in line]
    assert [without_time(line) for line in traced] == [without_time(line) for line in trace.splitlines()]
    assert re.search(r"^ *region_write +1 +0 +1 ", said, re.MULTILINE)
    assert "region_write: 1 of 1 calls refused with ENODEV" in said
