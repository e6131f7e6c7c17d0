"""``vfio-user check`` against our own server: by processes, with every device; and what the command prints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.tools.check import Mode, Verdict, server_cases
from vfio_user.tools.check.catalogue import client_entries, server_entries
from vfio_user.tools.check.client.played import honest

from .check_support import EVERYTHING, by_name, check, not_passed, twisted
from .test_cli import run, serving

OWN = ("gpio", "edu", "ivshmem")
OPTIONS = {"ivshmem": ["-o", "size=64K"]}


@pytest.fixture(params=OWN)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """One of our devices behind a socket, in a process of its own."""
    path = tmp_path / "device.sock"
    with serving(request.param, "--socket-path", path, *OPTIONS.get(request.param, ())) as process:
        assert process.stdout is not None
        assert str(path) in process.stdout.readline()
        yield request.param, path
        assert process.poll() is None


def test_our_server_passes_everything_twice_with_every_device(served: tuple[str, Path]) -> None:
    device, path = served
    for _ in range(2):  # what the first one did to the device does not show in the second
        with no_fd_leaks():
            report = check(path)
        assert not not_passed(report)
        passed = report.count(Verdict.PASSED)
        assert passed > (800 if device == "edu" else 500)
        assert passed + report.count(Verdict.SKIPPED) >= len(report.results)


def test_nothing_is_written_and_no_register_read_unless_it_is_asked_for(tmp_path: Path) -> None:
    """gpio counts the reads of its register, and the trace filter shows every call."""
    path = tmp_path / "gpio.sock"
    with serving("gpio", "--socket-path", path, "--filter", "trace") as process:
        assert process.stdout is not None
        process.stdout.readline()
        report = check(path, modes=frozenset({Mode.SAFE}))
        assert not not_passed(report)
        process.terminate()
        process.wait(60)
        assert process.stderr is not None
        trace = process.stderr.read()
    reads = [line for line in trace.splitlines() if "region_read" in line]
    assert reads
    assert all("config" in line for line in reads)
    for hook in ("region_write", "reset", "migration_set_state", "migration_read_data", "dma_logging_start"):
        assert hook not in trace, hook


def test_names_are_unique_and_every_case_says_what_it_expects() -> None:
    entries = [*server_entries(), *client_entries()]
    names = Counter(one.name for one in entries)
    assert [name for name, count in names.items() if count > 1] == []
    assert all(one.section and one.expected for one in entries)
    assert len(server_cases()) > 900
    assert {one.mode for one in entries} == EVERYTHING


def test_the_command_prints_a_table_json_and_junit(tmp_path: Path) -> None:
    path, xml = tmp_path / "edu.sock", tmp_path / "report.xml"
    with serving("edu", "--socket-path", path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        table = run("check", path)
        assert (table.returncode, table.stderr) == (0, "")
        assert "1234:11e8" in table.stdout
        assert "version" in table.stdout
        made = run("check", path, "--json", "--only", "info/*", "--only", "dma/map/fd", "--junit", xml)
        assert (made.returncode, made.stderr) == (0, "")
    report = json.loads(made.stdout)
    assert report["cases"] == len(report["results"]) == report["passed"] + report["skipped"]
    assert report["failed"] == report["should"] == report["quirks"] == 0
    first = next(one for one in report["results"] if one["name"] == "dma/map/fd")
    assert first["verdict"] == "passed"
    assert first["section"] == "VFIO_USER_DMA_MAP"
    assert first["sent"][0].startswith("DMA_MAP command")
    root = Xml.parse(xml).getroot()
    assert root.get("tests") == str(report["cases"])
    assert [suite.get("name") for suite in root] == ["info", "dma"]
    assert sum(len(suite) for suite in root) == report["cases"]


def test_the_list_needs_no_server() -> None:
    listed = run("check", "--list")
    assert listed.returncode == 0
    assert "dma/map/overlap/inside" in listed.stdout
    assert "hostile/" not in listed.stdout
    everything = json.loads(run("check", "--list", "--all", "--json").stdout)
    assert len(everything) == len(server_cases())
    clients = run("check", "--client", "--list", "--only", "server/dma*").stdout.splitlines()
    assert [line.split()[0] for line in clients][:1] == ["server/dma-read"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "SOCKET is missing"),
        (("--client",), "--listen"),
        (("--client", "--listen", "x", "y"), "no SOCKET"),
        (("x", "--run", "true"), "--client"),
        (("x", "--only", "nothing/*"), "no case"),
        (("x", "--only", "hostile/*"), "--hostile"),
        (("x", "--timeout", "nan"), "range"),
    ],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], reason: str) -> None:
    wrong = run("check", *arguments)
    assert wrong.returncode == 2
    assert reason in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    gone = run("check", path)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr == f"vfio-user: {path}: No such file or directory\n"


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\0" * 64], ids=["http", "close", "zeros"])
def test_a_socket_that_is_not_vfio_user_fails_the_negotiation(tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        report = check(path)
        thread.join(10)
    assert [one.verdict for one in report.results] == [Verdict.MUST]
    assert report.results[0].name == "version/standard"


def test_a_server_that_says_nothing_is_given_up_in_time(tmp_path: Path) -> None:
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        report = check(path, timeout=0.1)
    assert [finding.code for finding in report.results[0].findings] == ["silent"]


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "vfio_user", "check", str(path), "--timeout", "60"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        listener.settimeout(60)
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(60)
            sock.recv(1)
            os.kill(process.pid, 2)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (1, "", "vfio-user: interrupted\n")


def test_what_a_case_shows_is_bounded(tmp_path: Path) -> None:
    with twisted(tmp_path / "plain.sock", honest) as server:
        flood = by_name(check(server.path, "hostile/flood/served"))["hostile/flood/served"]
    assert flood.sent[-1] == "and 92 more"
    assert len(flood.came) == 9
