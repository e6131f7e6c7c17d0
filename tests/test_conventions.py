"""What people expect of any command: examples in its help, man pages, completion, logs, NO_COLOR; descriptors."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from vfio_user.cli.completion import SHELLS
from vfio_user.cli.main import COMMANDS, PROGRAM, cli, main
from vfio_user.devices import BUILT_IN

from .tools_support import command

ROOT = Path(__file__).parent.parent
SHARE = ROOT / "src/vfio_user/share"
TIMEOUT = 30


def contexts(context: click.Context | None = None) -> Iterator[click.Context]:
    """Of every command that does something."""
    context = context or click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    assert isinstance(context.command, click.Group)
    for name in context.command.list_commands(context):
        below = context.command.get_command(context, name)
        assert below is not None
        inner = click.Context(below, parent=context, info_name=name)
        if isinstance(below, click.Group):
            yield from contexts(inner)
        else:
            yield inner


ALL = list(contexts())
PATHS = [context.command_path for context in ALL]


# Help


@pytest.mark.parametrize("context", ALL, ids=PATHS)
def test_the_help_of_every_command_ends_with_an_example_that_it_takes(context: click.Context) -> None:
    found = re.fullmatch(
        rf'Example: (?P<before>.*?)\b{context.command_path} (?P<rest>.*?)(\)")?', context.command.epilog or ""
    )
    assert found is not None, context.command.epilog
    with context:
        context.command.parse_args(context, shlex.split(found["rest"]))


def test_the_help_of_serve_shows_its_example() -> None:
    assert "Example: vfio-user serve edu" in command("serve", "--help").out


# Man pages


def man_pages() -> dict[str, str]:
    pages: dict[str, str] = runpy.run_path(str(ROOT / "scripts/make_man.py"))["pages"]()
    return pages


def test_there_is_a_man_page_of_every_command_and_it_is_up_to_date() -> None:
    pages = man_pages()
    assert {f"{path.replace(' ', '-')}.1" for path in PATHS} < pages.keys()
    written = {path.name: path.read_text() for path in (SHARE / "man").iterdir()}
    assert written == pages, "run scripts/make_man.py"


def test_every_option_is_in_the_man_page() -> None:
    pages = man_pages()
    for context in ALL:
        page = pages[f"{context.command_path.replace(' ', '-')}.1"].replace("\\-", "-")
        for parameter in context.command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert all(option in page for option in parameter.opts), (context.command_path, parameter.opts)


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff")
def test_the_man_pages_are_formatted_without_a_warning() -> None:
    pages = sorted((SHARE / "man").iterdir())
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", *pages], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert done.stderr == ""
    text = re.sub("\x1b\\[[0-9;]*m|.\x08", "", done.stdout)  # bold letters, one way or the other
    assert text.count("EXIT STATUS") == len(pages)
    assert "vfio-user serve edu --socket-path /tmp/edu.sock" in text


# Completion


def complete(*words: str) -> list[str]:
    """What is offered for the last one of ``words``."""
    found = SHELLS["bash"](cli, {}, PROGRAM, "_VFIO_USER_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["se"], ["serve"]),
        (["serve", ""], sorted(BUILT_IN)),
        (["serve", "e"], ["edu"]),
        (["serve", "edu", "-o", ""], ["dma_mask="]),
        (["serve", "edu", "--", "ivshmem", "-o", "v"], ["vectors="]),
        (["serve", "--filter", "s", "-o", ""], []),
        (["serve", "edu", "--filter", "s"], ["stats"]),
        (["serve", "nothing", "-o", ""], []),
        (["serve", "./examples/counter.py:"], ["./examples/counter.py:Counter"]),
        (["serve", "./examples/cou"], ["./examples/counter.py"]),
        (["serve", "./examples/none.py:"], []),
        (["read", "s", "--device", "gp"], ["gpio"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["info", "/tmp/no such folder/"], [""]),
    ],
)
def test_completion(words: list[str], offers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    offered = complete(*words)
    assert offered == offers or (words[0] == "info" and len(offered) <= 1)


@pytest.mark.parametrize(
    "words",
    [["read"], ["write"], ["migrate"], ["migrate", "a"], ["receive"], ["resume", "a"], ["check"], ["irq", "wait"]],
)
def test_sockets_are_completed_and_folders(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "first.sock"))
        assert complete(*words, f"{tmp_path}/f") == [f"{tmp_path}/first.sock", f"{tmp_path}/folder/"]
    assert complete(*words, f"{tmp_path}/none/") == []


def test_a_command_works_as_before_after_it_was_completed() -> None:
    complete("info", "")
    complete("read", "")
    assert command("read", "/nowhere/sock", "config").err == "vfio-user: /nowhere/sock: No such file or directory\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_is_given_what_completes(shell: str) -> None:
    done = command("completion", shell)
    assert (done.status, done.err) == (0, "")
    assert f"_VFIO_USER_COMPLETE={shell}_complete" in done.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / PROGRAM).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vfio_user "$@"\n')
    (tmp_path / PROGRAM).chmod(0o755)
    program = (
        f'eval "$({PROGRAM} completion bash)"; compopt() {{ printf "%s " compopt "$@"; }}; '
        'COMP_WORDS=(vfio-user serve edu -o dma); COMP_CWORD=4; _vfio_user_completion vfio-user; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("compopt -o nospace dma_mask=\n", "")


# Descriptors


def test_the_descriptors_are_those_of_the_devices() -> None:
    made: dict[str, str] = runpy.run_path(str(ROOT / "scripts/make_descriptors.py"))["descriptors"]()
    written = {path.name: path.read_text() for path in (SHARE / "descriptors").iterdir()}
    assert written == made, "run scripts/make_descriptors.py"
    assert {json.loads(text)["type"] for text in made.values()} == set(BUILT_IN)


@pytest.mark.parametrize("path", sorted((SHARE / "descriptors").iterdir()), ids=lambda path: path.stem)
def test_a_descriptor_is_like_those_of_vhost_user(path: Path) -> None:
    found: dict[str, Any] = json.loads(path.read_text())
    assert re.fullmatch(r"[0-9]{2}-[a-z-]+\.json", path.name)
    assert found.keys() == {"description", "type", "binary", "tags"}
    assert all(isinstance(found[key], str) and found[key] for key in ("description", "type", "binary"))
    assert all(isinstance(tag, str) for tag in found["tags"])
    assert found["binary"].startswith("/")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[Path(found["binary"]).name] == "vfio_user.__main__:main"


Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def run_as(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command under the name of a program: exit status, stdout, stderr."""

    def run(program: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("device", BUILT_IN)
def test_a_backend_program_is_its_device(device: str, run_as: Run) -> None:
    status, out, _ = run_as(f"/usr/bin/vfio-user-{device}", "--help")
    assert (status, out.partition(":")[0]) == (0, device)
    reason = f"vfio-user: {device} takes --socket-path or --fd, not both\n"
    assert run_as(f"vfio-user-{device}", "--fd=3", "--socket-path=x") == (2, "", reason)


@pytest.mark.parametrize("program", ["vfio-user-nothing", "edu", "vfio-user", "__main__.py"])
def test_any_other_program_is_the_whole_command(program: str, run_as: Run) -> None:
    status, out, _ = run_as(program, "--version")
    assert (status, out.partition(",")[0]) == (0, "vfio-user")


def test_the_manual_shows_a_descriptor() -> None:
    assert (SHARE / "descriptors/50-vfio-user-nvme.json").read_text() in (ROOT / "docs/services.md").read_text()


# Logs and colours


FAULTY = """
from vfio_user import Bar, Device

class Faulty(Device):
    vendor_id, device_id = 0x494F, 1
    bars = {0: Bar(0x1000)}

    def bar_read(self, bar, offset, data):
        raise RuntimeError("one\\ntwo")
"""


def faulty(folder: Path, *options: str) -> list[str]:
    """What is logged while a device raises what is no refusal."""
    (folder / "faulty.py").write_text(FAULTY)
    served = ["serve", f"{folder}/faulty.py:Faulty", "--filter", "trace", "--run"]
    read = f"{shlex.quote(sys.executable)} -m vfio_user read $VFIO_USER_SOCKET bar0+0 2>{folder}/refusal"
    done = subprocess.run(
        [sys.executable, "-m", "vfio_user", *options, *served, read],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 1
    assert "Input/output error" in (folder / "refusal").read_text()
    return done.stderr.splitlines()


def test_logs_as_json_have_an_object_a_line(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in faulty(tmp_path, "--log-json")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", line["time"]) for line in lines)
    assert {line["logger"] for line in lines} >= {"vfio_user.server"}
    assert any("region_read" in line["message"] for line in lines if line["level"] == "INFO"), "the trace"
    (fault,) = (line for line in lines if line["level"] == "ERROR")
    assert fault["exception"].endswith("RuntimeError: one\ntwo")
    assert all(line.keys() <= {"time", "level", "logger", "message", "exception"} for line in lines)


def test_logs_as_text_name_their_logger(tmp_path: Path) -> None:
    lines = faulty(tmp_path)
    assert any(line.startswith("ERROR vfio_user.server: ") for line in lines)
    assert any(line.startswith("Faulty") for line in lines), "the trace is bare"


@pytest.mark.parametrize(("value", "colour"), [("1", False), ("", None), (None, None)])
def test_no_color_is_honoured(value: str | None, colour: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @click.command()
    def show() -> None:
        seen.append(click.get_current_context().color)

    monkeypatch.setitem(COMMANDS, "show", f"{__name__}:show")
    monkeypatch.setattr(sys.modules[__name__], "show", show, raising=False)
    if value is None:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", value)
    assert command("show").status == 0
    assert seen == [colour]
