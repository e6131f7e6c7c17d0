"""Devices by name: files, modules, entry points of installed packages; options from text and from TOML."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.devices import BUILT_IN
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.errors import UsageError
from vfio_user.tools.configuration import MAX_SIZE, read_configuration
from vfio_user.tools.load import load_device, make_device, parse_options, parse_pairs
from vfio_user.tools.serving import Service

DEVICE = """\
from vfio_user import Device
class Mine(Device):
    "A device of mine."
    vendor_id, device_id = 0x1234, 0x5678
"""
TIMEOUT = 30


def install(folder: Path, name: str, entry_points: str) -> None:
    """What an installer leaves of a package."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def serve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vfio_user", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
    )


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages with a good device, a broken one, one that is no device, and a file that cannot be parsed."""
    (tmp_path / "lab.py").write_text(DEVICE + "number = 5\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('boom')\n")
    install(
        tmp_path, "lab", "[vfio_user.devices]\nmine = lab:Mine\nnumber = lab:number\ngone = lab:Gone\nedu = lab:Mine\n"
    )
    install(tmp_path, "broken", "[vfio_user.devices]\nbad = broken:Device\nodd = ???\n")
    install(tmp_path, "garbled", "[vfio_user.devices]\nno equals sign\n")
    install(tmp_path, "other", "[console_scripts]\nmine = other:main\n")
    return tmp_path


def test_a_device_of_an_installed_package(packages: Path) -> None:
    done = serve(packages, "mine", "--help")
    assert done.returncode == 0, done.stderr
    assert "mine: A device of mine." in done.stdout
    assert "1234:5678" in done.stdout


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bad", "bad (broken:Device): RuntimeError: boom"),
        ("number", "lab:number is no device class"),
        ("gone", "Gone"),
        ("odd", "odd (???)"),
        ("nothing", "bad, edu, gone, gpio, ivshmem, mine, number, nvme, odd, pkg.mod:Class"),
    ],
)
def test_what_is_wrong_with_an_entry_point_is_one_line(packages: Path, name: str, reason: str) -> None:
    done = serve(packages, name, "--socket-path", "unused")
    assert (done.returncode, done.stdout) == (2, "")
    *warnings, line = done.stderr.splitlines()
    assert reason in line
    assert all("garbled" in warning for warning in warnings)


def test_a_broken_entry_point_does_not_hide_the_others(packages: Path) -> None:
    done = serve(packages, "--help")
    assert done.returncode == 0, done.stderr
    listed = " ".join(done.stdout.split())
    assert "mine A device of mine." in listed
    assert "bad cannot be loaded: bad (broken:Device): RuntimeError: boom" in listed


def test_nobody_takes_the_name_of_a_built_in_device(packages: Path) -> None:
    assert "1234:11e8" in serve(packages, "edu", "--help").stdout


def test_a_name_that_two_packages_use_is_refused(packages: Path) -> None:
    install(packages, "rival", "[vfio_user.devices]\nmine = rival:Theirs\n")
    done = serve(packages, "mine", "--socket-path", "unused")
    assert done.returncode == 2
    assert "lab:Mine, rival:Theirs" in done.stderr


def test_a_file_is_run_once_and_hides_no_module(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text(DEVICE + "import dataclasses\n@dataclasses.dataclass\nclass Part: x: 'int' = 1\n")
    before = sys.modules.get("json")
    first = load_device(f"{path}:Mine")
    assert load_device(f"{path}:Mine") is first
    assert sys.modules.get("json") is before


def test_a_file_that_fails_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text("raise SystemExit(0)")
    with pytest.raises(UsageError, match="SystemExit"):
        load_device(f"{path}:Mine")
    path.write_text(DEVICE)
    assert load_device(f"{path}:Mine").vendor_id == 0x1234


@pytest.mark.parametrize("name", ["", ":", "::", "edu:", ".py:X", "./:X", "os:path", "x\0y:Z", "..:X", "a b:C"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(UsageError):
        load_device(name)


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=20).filter(lambda name: name not in BUILT_IN))
def test_any_name_is_refused_in_words(name: str) -> None:
    with pytest.raises(UsageError):
        make_device(name)


@settings(deadline=None)
@given(st.dictionaries(st.text().filter(lambda key: "=" not in key), st.text()))
def test_pairs_are_taken_apart(texts: dict[str, str]) -> None:
    assert parse_pairs(f"{key}={text}" for key, text in texts.items()) == texts


@settings(deadline=None)
@given(st.text(), st.text())
def test_options_are_taken_or_refused_in_words(key: str, text: str) -> None:
    try:
        options = parse_options(Ivshmem, {key: text})
    except UsageError:
        return
    assert options.keys() <= Ivshmem.declared_options.keys()


# TOML


def configured(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "lab.toml"
    path.write_text(text)
    return [repr(spec) for spec in read_configuration(path)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it needs a [[device]]"),
        ("device = 5", "it needs a [[device]]"),
        ("device = []", "it needs a [[device]]"),
        ("device = [1]", "device 1 is no table"),
        ("[device]", "it needs a [[device]]"),
        ("devices = 1\n[[device]]", "unknown: devices; there are: [[device]]"),
        ("[[device]]\nsocket-path = 'a'", "device 1 has no device = NAME"),
        (
            "[[device]]\ndevice = 'edu'\n[[device]]\npath = 'a'",
            "device 2 has no 'path'; there are: device, socket-path",
        ),
        ("[[device]]\ndevice = 5", "device 1: device is a string"),
        ("[[device]]\ndevice = 'edu'\nspin = true", "spin is 0 to 1000000 microseconds"),
        ("[[device]]\ndevice = 'edu'\nspin = -1", "spin is 0 to 1000000 microseconds"),
        ("[[device]]\ndevice = 'edu'\nfilters = 'stats'", "filters is an array of strings"),
        ("[[device]]\ndevice = 'edu'\nfilters = [1]", "filters is an array of strings"),
        ("[[device]]\ndevice = 'edu'\noptions = []", "options is a table"),
        ("[[device]]\ndevice = 'edu'\noptions = {a = []}", "option a is a string, a number or a boolean"),
        ("[[device]]\ndevice = 'edu'\noptions = {a = 2020-01-01}", "option a is a string, a number or a boolean"),
        ("[[device]", "line 1"),
        ("x = " + "[" * 10000, "lab.toml"),
        ("x = " + "9" * 10000, "lab.toml"),
        ("#" * (MAX_SIZE + 1), f"more than {MAX_SIZE} bytes"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=r"lab\.toml") as refused:
        configured(tmp_path, text)
    assert reason in str(refused.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"lab\.toml"):
        read_configuration(path)


def test_values_are_as_options_have_them(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text("[[device]]\ndevice = 'x:Y'\noptions = {a = 0x10, b = true, c = 'text', d = 1.5}\nspin = 20")
    (spec,) = read_configuration(path)
    assert spec.options == {"a": "16", "b": "true", "c": "text", "d": "1.5"}
    assert (spec.device, spec.socket_path) == ("x:Y", None)
    assert spec.spin == pytest.approx(20e-6)


def test_the_file_in_the_manual_is_one(tmp_path: Path) -> None:
    manual = (Path(__file__).parent.parent / "docs/command-line.md").read_text()
    path = tmp_path / "lab.toml"
    path.write_text(manual.partition("```toml\n")[2].partition("```")[0])
    with Service(read_configuration(path)) as service:
        assert service.socket_paths == [tmp_path / "edu.sock", tmp_path / "memory.sock"]


def test_a_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bell_of_mine.py").write_text(
        "from vfio_user import Device\nclass Bell(Device):\n    vendor_id, device_id = 7, 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    assert load_device("bell_of_mine:Bell").device_id == 2
