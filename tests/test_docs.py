"""The manual says what is there: its tables are the code's, its examples run, its options exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from vfio_user.cli.main import cli

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


def options(command: click.Command = cli, path: str = "") -> list[tuple[str, str]]:
    """Every option of a command and of those within, with the path of its command."""
    found = [(path, max(one.opts, key=len)) for one in command.params if isinstance(one, click.Option)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found += options(below, f"{path} {name}".strip())
    return found


def chapters(page: Path) -> Iterator[tuple[str, str]]:
    """Headings, and the text up to the next one of the same level or a higher one."""
    parts = re.split(r"^(#+) (.*)$", page.read_text(), flags=re.MULTILINE)[1:]
    for at in range(0, len(parts), 3):
        text = parts[at + 2]
        for level, _, more in zip(parts[at + 3 :: 3], parts[at + 4 :: 3], parts[at + 5 :: 3], strict=True):
            if len(level) <= len(parts[at]):
                break
            text += more
        yield parts[at + 1], text


@cache
def manual(name: str) -> str:
    """What the manual says about a command: a page of its own, and chapters that are called after it."""
    called = re.compile(rf"\bvfio-user {name}\b(?!-)" if name else "The command line")
    pages = [ROOT / f"docs/{name}.md"] if name and (ROOT / f"docs/{name}.md").exists() else []
    texts = [
        text for page in sorted((ROOT / "docs").glob("*.md")) for title, text in chapters(page) if called.search(title)
    ]
    return "\n".join([page.read_text() for page in pages] + texts)


@pytest.mark.parametrize(("command", "option"), options())
def test_every_option_is_in_the_manual(command: str, option: str) -> None:
    text = manual(command.partition(" ")[0])
    assert text, f"no chapter on {command}"
    assert re.search(rf"`[^`\n]*{option}\b", text)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
