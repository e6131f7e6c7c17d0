"""The pages on trace and replay: their options are those of the commands, their programs run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest

from vfio_user.cli.replay import replay
from vfio_user.cli.trace import trace
from vfio_user.devices.gpio import Gpio
from vfio_user.tools.replay import MAY_DIFFER
from vfio_user.wire.constants import Command

from .device_support import serving
from .trace_support import VECTORS

DOCS = Path(__file__).parent.parent / "docs"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def program(page: str, folder: Path) -> dict[str, Any]:
    """What the program of a page leaves behind."""
    namespace: dict[str, Any] = {}
    (block,) = PYTHON_BLOCK.findall((DOCS / page).read_text())
    exec(compile(block.replace("/tmp/", f"{folder}/"), page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("command", [trace, replay], ids=lambda command: command.name)
def test_every_option_is_on_its_page(command: click.Command) -> None:
    page = (DOCS / f"{command.name}.md").read_text()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert f"{parameter.opts[0]}" in page


def test_the_program_that_looks_on_runs(tmp_path: Path) -> None:
    assert program("trace.md", tmp_path)["sizes"].total > 500


def test_the_program_that_replays_runs(tmp_path: Path) -> None:
    differences = program("replay.md", tmp_path)["differences"]
    with serving(Gpio()) as path:
        assert differences(VECTORS, path)[0].startswith("message 74, DMA_UNMAP")


def test_what_may_differ_is_on_the_page() -> None:
    page = (DOCS / "replay.md").read_text()
    for command, field in MAY_DIFFER:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {Command(command).name} |")]
        assert f"`{field}`" in row or field == "fds"
