"""The manual of bench, info, read, write, irq and shell: every option is there, and its programs run."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from vfio_user.cli.main import cli

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "bench": "bench.md",
    "info": "inspect.md",
    "read": "inspect.md",
    "write": "inspect.md",
    "irq": "inspect.md",
    "shell": "inspect.md",
}


def commands(name: str) -> list[click.Command]:
    """A command, and those that it consists of."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return [command, *(command.commands.values() if isinstance(command, click.Group) else ())]


def manual(name: str) -> str:
    """What the manual says of a command: a page, or the section of a page whose heading names it."""
    sections = (DOCS / PAGES[name]).read_text().split("\n## ")
    if f"vfio-user {name}" in sections[0].splitlines()[0] and "," not in sections[0].splitlines()[0]:
        return "\n## ".join(sections)
    (section,) = [one for one in sections[1:] if f"vfio-user {name}" in one.splitlines()[0]]
    return section


@pytest.mark.parametrize("name", PAGES)
def test_every_option_is_in_the_manual_and_every_help_has_an_example(name: str) -> None:
    text = manual(name)
    for command in commands(name):
        assert (command.epilog or "").startswith("Example: "), command.name
        assert f"vfio-user {name}" in (command.epilog or "")
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert f"`{max(parameter.opts, key=len)}" in text, f"{command.name} {parameter.name}"


@pytest.mark.parametrize("page", sorted(set(PAGES.values())))
def test_the_programs_of_the_manual_run(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block.replace("/tmp/", f"{tmp_path}/"), page, "exec"), {})
