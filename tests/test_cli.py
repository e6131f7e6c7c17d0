"""The commands, as processes of their own: what they print, how they exit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from vfio_user import Client
from vfio_user.cli.qemu import carry_out
from vfio_user.errors import MigrationError
from vfio_user.live.qemu import QemuSave, SnapshotReport
from vfio_user.tools.location import Location, parse_assignment

COMMAND = [sys.executable, "-m", "vfio_user"]
TIMEOUT = 60
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


@contextmanager
def serving(*arguments: str | Path, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def edu(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "edu.sock"
    with serving("edu", "--socket-path", path) as process:
        assert process.stdout is not None
        assert str(path) in process.stdout.readline()
        yield path


def test_serve_says_how_to_plug_it_in_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    path = tmp_path / "edu.sock"
    with serving("edu", "--socket-path", path) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == f"Edu 1234:11e8 is served at {path}\n"
        with Client.connect(path):
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0
        assert process.stderr is not None
        rest = process.stdout.read()
        assert "vfio-user-pci" in rest
        assert "--user-device" in rest
        assert process.stderr.read() == ""
    assert not path.exists()


def test_sigterm_in_the_middle_of_a_message_ends_it_too(tmp_path: Path) -> None:
    path = tmp_path / "edu.sock"
    with serving("edu", "--socket-path", path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.send(b"\0\0\x0a\0\xff\xff")
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "edu.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with serving("edu", "--socket-path", path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        second = run("serve", "edu", "--socket-path", path)
        assert second.returncode == 1
        assert second.stderr.count("\n") == 1
        assert "in use" in second.stderr
        with Client.connect(path) as client:
            assert client.region_read(0, 0, 4) == b"\xed\x00\x00\x01"


def test_state_survives_a_client(edu: Path) -> None:
    with Client.connect(edu) as first:
        first.region_write(0, 4, b"\1\0\0\0")
    with Client.connect(edu) as second:
        assert second.region_read(0, 4, 4) == b"\xfe\xff\xff\xff"


def test_an_inherited_listening_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with serving("gpio", "--fd", str(listener.fileno()), pass_fds=(listener.fileno(),)) as process:
            with Client.connect(tmp_path / "s", 20.0) as client:
                assert client.region_read(7, 0, 2) == b"\x4f\x49"
            process.terminate()
            assert process.wait(TIMEOUT) == 0


def test_an_inherited_connection_ends_with_its_client() -> None:
    ours, theirs = socket.socketpair()
    with serving("gpio", "--fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        with Client(ours, 20.0) as client:
            assert client.region_read(7, 0, 2) == b"\x4f\x49"
        assert process.wait(TIMEOUT) == 0


@pytest.mark.parametrize("name", ["counter.py:Counter", "checksum.py:Checksum", "sorter.py:Sorter"])
def test_a_device_from_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(EXAMPLES / name, "--socket-path", path) as process:
        assert process.stdout is not None
        assert "494f" in process.stdout.readline()
        info = run("info", path, "--json")
        assert json.loads(info.stdout)["migration"]["supported"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["serve", "edu"], "--socket-path"),
        (["serve", "edu", "--socket-path", "a", "--fd", "3"], "--socket-path"),
        (["serve", "nothing", "--socket-path", "a"], "edu, gpio, ivshmem"),
        (["serve", "no.such.module:Class", "--socket-path", "a"], "no.such.module"),
        (["serve", "vfio_user.errors:ProtocolError", "--socket-path", "a"], "no device class"),
        (["serve", "./missing.py:Class", "--socket-path", "a"], "no such file"),
        (["serve", "ivshmem", "-o", "colour=red", "--socket-path", "a"], "size, trapped, vectors"),
        (["serve", "ivshmem", "-o", "size", "--socket-path", "a"], "no value"),
        (["serve", "ivshmem", "-o", "size=much", "--socket-path", "a"], "much"),
        (["serve", "ivshmem", "-o", "size=3M", "--socket-path", "a"], "power of two"),
        (["read", "a", "bar9+0"], "bar9"),
        (["read", "a", "bar0+0:u7"], "u7"),
        (["write", "a", "bar0+0"], "no value"),
        (["write", "a", "bar0+0:u8=256"], "does not fit"),
        (["dance"], "dance"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(arguments: list[str], reason: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", [["info"], ["read", "bar0"], ["write", "bar0=1"]])
def test_nobody_there_exits_with_1_and_one_line(command: list[str], tmp_path: Path) -> None:
    done = run(command[0], tmp_path / "nothing", *command[1:])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vfio-user: {tmp_path / 'nothing'}: No such file or directory\n"


def test_a_server_that_says_nothing_exits_with_1(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        done = run("info", tmp_path / "s", "--timeout", "0.2")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_peek_and_poke(edu: Path) -> None:
    assert run("write", edu, "bar0+0x4:u32=0x12345678").returncode == 0
    done = run("read", edu, "bar0+0x4", "config+0:u16", "bar0+0:u32", "7+2:u16")
    assert done.stdout.splitlines() == [
        "bar0+0x4:u32 = 0xedcba987",
        "config+0x0:u16 = 0x1234",
        "bar0+0x0:u32 = 0x010000ed",
        "config+0x2:u16 = 0x11e8",
    ]
    refused = run("read", edu, "bar3+0")
    assert (refused.returncode, refused.stderr) == (
        1,
        "vfio-user: bar3+0x0:u32: REGION_READ refused: Invalid argument\n",
    )


def test_info_tells_everything(edu: Path) -> None:
    facts = json.loads(run("info", edu, "--json").stdout)
    assert set(facts) == {"version", "capabilities", "device", "regions", "irqs", "pci", "migration"}
    assert facts["version"] == "0.2"
    assert facts["pci"]["vendor_id"] == "1234"
    assert facts["pci"]["capabilities"] == [{"offset": 0x40, "id": 5, "name": "MSI"}]
    assert facts["regions"][0]["size"] == 1 << 20
    assert facts["migration"]["flags"] == ["STOP_COPY", "PRE_COPY"]
    text = run("info", edu).stdout
    for part in ("1234:11e8", "bar0", "0x100000", "PRE_COPY", "DMA logging"):
        assert part in text


def test_info_of_a_device_that_cannot_migrate_and_of_one_that_can_be_mapped(tmp_path: Path) -> None:
    for device, expected in (("gpio", "not supported"), ("ivshmem", "mmap 0x0+0x400000")):
        path = tmp_path / device
        with serving(device, "--socket-path", path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert expected in run("info", path).stdout


@pytest.mark.timeout(180)
def test_demo_is_verified(tmp_path: Path) -> None:
    data = tmp_path / "input"
    data.write_bytes(os.urandom((1 << 20) + 17))
    done = run("demo", "--json", "--input", data, "--bandwidth", "4")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "completed"
    assert report["failed_step"] is None
    assert report["verified"] is True
    assert report["findings"] == []
    assert report["rounds"] >= 2
    assert report["dirty_pages"] > 0
    assert report["device_state_bytes"] > 0
    assert report["blocks_copied_before"] > 0
    assert {"downtime_ms", "total_ms"} <= set(report)


@pytest.mark.timeout(180)
def test_demo_for_people(tmp_path: Path) -> None:
    data = tmp_path / "input"
    data.write_bytes(b"some bytes")
    done = run("demo", "--input", data)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert "(stopped)" in done.stdout
    empty = tmp_path / "empty"
    empty.touch()
    assert run("demo", "--input", empty).returncode == 2


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def slow_demo(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A demo in the middle of its first round, which lasts some seconds, and its two device processes."""
    data = tmp_path / "input"
    data.write_bytes(bytes(2 << 20))
    command = [*COMMAND, "demo", "--json", "--input", str(data), "--bandwidth", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while len(devices := children(process.pid)) < 2 and process.poll() is None:
                time.sleep(0.01)
            time.sleep(1.0)  # both plugged in, well before the round's end
            yield process, devices
        finally:
            process.kill()


@pytest.mark.timeout(60)
def test_demo_reports_the_step_that_failed(tmp_path: Path) -> None:
    with slow_demo(tmp_path) as (process, devices):
        os.kill(devices[0], signal.SIGKILL)
        out, complaint = process.communicate(timeout=TIMEOUT)
    report = json.loads(out)
    assert process.returncode == 1
    assert (report["status"], report["verified"]) == ("failed", False)
    assert report["failed_step"] in complaint
    assert len(complaint.splitlines()) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "status", "lines"), [(signal.SIGINT, 1, 1), (signal.SIGTERM, -signal.SIGTERM, 0)], ids=["INT", "TERM"]
)
def test_an_interrupted_demo_leaves_nothing_running(tmp_path: Path, number: int, status: int, lines: int) -> None:
    with slow_demo(tmp_path) as (process, _):
        process.send_signal(number)
        out, complaint = process.communicate(timeout=TIMEOUT)  # until its devices closed their stderr, too
    assert (process.returncode, out, len(complaint.splitlines())) == (status, "", lines)


CLASS = "from vfio_user import Device\nclass X(Device):"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("class X(", "SyntaxError"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import nosuchmodule", "ModuleNotFoundError"),
        (f"{CLASS} pass", "vendor_id"),
        (f"{CLASS}\n vendor_id = device_id = 7\n def __init__(self): raise KeyError('k')", "KeyError: 'k'"),
    ],
)
def test_a_fault_of_a_device_file_is_one_line(tmp_path: Path, code: str, reason: str) -> None:
    path = tmp_path / "faulty.py"
    path.write_text(code)
    done = run("serve", f"{path}:X", "--socket-path", tmp_path / "sock")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert reason in done.stderr
    assert "Traceback" in run("-v", "serve", f"{path}:X", "--socket-path", tmp_path / "sock").stderr


def test_what_fails_is_named(edu: Path, tmp_path: Path) -> None:
    for arguments, status, culprit in (
        (("read", edu, "bar0+0x100000"), 1, "bar0+0x100000:u32"),
        (("write", edu, "bar1=0"), 1, "bar1+0x0:u32"),
        (("read", edu, "4294967296"), 2, "4294967296"),
        (("info", tmp_path / ("x" * 200)), 1, "xxxx"),
        (("info", edu, "--timeout", "nan"), 2, "nan"),
        (("info", edu, "--timeout", "1e30"), 2, "1e+30"),
        (("serve", "edu", "--fd", "77"), 1, "--fd 77"),
        (("serve", "edu", "--socket-path", tmp_path / "missing" / "sock"), 1, "missing/sock"),
        (("serve", ":X", "--socket-path", tmp_path / "sock"), 2, ":"),
    ):
        done = run(*arguments)
        assert done.returncode == status, arguments
        assert culprit in done.stderr.splitlines()[-1], arguments


def test_what_fails_drives_no_terminal() -> None:
    done = run("info", "\x1b[31m")
    assert (done.returncode, done.stderr) == (1, "vfio-user: [31m: No such file or directory\n")


class Interrupted:
    """Something to be carried out that Ctrl-C ends, after which not all could be undone."""

    def __init__(self) -> None:
        self.report = SnapshotReport()

    def run(self) -> None:
        self.report.error = "interrupted by SIGINT; while rolling back: the source QEMU: its monitor is gone"
        raise KeyboardInterrupt


def test_an_interrupt_does_not_hide_what_was_not_undone() -> None:
    with pytest.raises(MigrationError, match="while rolling back: the source QEMU: its monitor is gone"):
        carry_out(cast("QemuSave", Interrupted()), "saving to a[/b]", as_json=False)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("bar0", Location(0, 0, 4)),
        ("config+0x10:u16", Location(7, 16, 2)),
        ("ROM+8:u8", Location(6, 8, 1)),
        ("8:u64", Location(8, 0, 8)),
    ],
)
def test_places(text: str, place: Location) -> None:
    assert Location.parse(text) == place
    assert Location.parse(str(place)) == place
    assert parse_assignment(f"{text}=0x7f") == (place, 0x7F)
