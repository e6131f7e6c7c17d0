"""The manual says what is there: its tables are the code's, its examples run, its options exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from vfio_user.cli.main import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def python_blocks(path: str) -> list[str]:
    return PYTHON_BLOCK.findall((ROOT / path).read_text())


def test_the_tables_in_the_manual_are_those_of_the_code(tmp_path: Path) -> None:
    program = (
        "import runpy, sys, pathlib\n"
        "pages = runpy.run_path(sys.argv[1])['PAGES']\n"
        "for name, lines in pages.items():\n"
        "    text = chr(10).join(lines()).rstrip() + chr(10)\n"
        "    (pathlib.Path(sys.argv[2]) / name).write_text(text)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "scripts/make_docs.py"), str(tmp_path)], check=True, timeout=60
    )
    written = sorted(tmp_path.iterdir())
    assert written
    for page in written:
        assert (ROOT / "docs" / page.name).read_text() == page.read_text(), "run scripts/make_docs.py"


def test_the_device_in_the_readme_is_the_example() -> None:
    (block,) = python_blocks("README.md")
    assert block.strip() in (ROOT / "examples/counter.py").read_text()


@pytest.mark.parametrize("page", ["docs/first-hour.md", "docs/devices.md", "docs/library.md", "docs/migration.md"])
def test_the_examples_of_the_manual_run(page: str, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    blocks = python_blocks(page)
    assert blocks
    for block in blocks:
        exec(compile(block.replace("/tmp/", f"{tmp_path}/"), page, "exec"), namespace)


def options() -> list[tuple[str, str]]:
    context = click.Context(cli)
    found = []
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                found.append((name, max(parameter.opts, key=len)))
    return found


@pytest.mark.parametrize(("command", "option"), options())
def test_every_option_is_in_the_manual(command: str, option: str) -> None:
    manual = (ROOT / "docs/command-line.md").read_text()
    sections = [part for part in manual.split("\n## ") if f"vfio-user {command}" in part.partition("\n")[0]]
    assert sections, f"no section on {command}"
    assert f"`{option}" in sections[0]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
