"""save, restore, migrate and receive as processes of their own, and what is left when they, or a peer, end too soon."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vfio_user import DeviceState

from .cli_migrate_support import (
    COMMAND,
    LARGE,
    SIZE,
    TIMEOUT,
    Serve,
    Served,
    child_of,
    complaint,
    expect_as_before,
    expect_moved,
    expect_source_runs_on,
    receiving,
    report_of,
    run,
    served_pair,
    serving,
    started,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def pair(serve: Serve) -> tuple[Served, Served]:
    return served_pair(serve)


# Save and restore


def test_a_device_goes_into_a_file_and_out_of_it(pair: tuple[Served, Served], tmp_path: Path) -> None:
    source, destination = pair
    file = tmp_path / "saved"
    assert run("save", source.path, file).returncode == 0
    expect_source_runs_on(source)
    assert file.stat().st_mode & 0o777 == 0o600
    facts = json.loads(run("info", file, "--json").stdout)
    assert set(facts) == {"format", "package", "device", "data_bytes", "sound", "error"}
    assert facts["device"]["identity"].startswith("1af4:1110")
    assert facts["device"]["regions"]["bar2"] == SIZE
    assert (facts["sound"], facts["data_bytes"] > SIZE) == (True, True)
    text = run("info", file).stdout.decode()
    assert "1af4:1110" in text
    assert "checksums right" in text
    assert run("restore", destination.path, file).returncode == 0
    assert destination.state() == DeviceState.RUNNING
    assert destination.marked


def test_a_device_goes_through_pipes(pair: tuple[Served, Served]) -> None:
    source, destination = pair
    saved = run("save", source.path, "-")
    assert (saved.returncode, saved.stderr) == (0, b"")
    assert b"checksums right" in run("info", "-", stdin=saved.stdout).stdout
    assert run("restore", destination.path, "-", stdin=saved.stdout).returncode == 0
    expect_source_runs_on(source)
    assert destination.marked


def test_a_file_is_replaced_when_the_new_one_is_whole(serve: Serve, tmp_path: Path) -> None:
    file, link = tmp_path / "saved", tmp_path / "link"
    link.symlink_to(file)
    file.write_bytes(b"something of value")
    assert "No such file" in complaint(run("save", tmp_path / "nobody", link))
    assert file.read_bytes() == b"something of value"
    source = serve("source", "edu")
    assert run("save", source.path, link).returncode == 0
    assert link.is_symlink()
    assert b'sound": true' in run("info", file, "--json").stdout
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "link", "source"}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("/dev/full", "/dev/full: No space left on device"),
        ("missing/saved", "missing/saved: No such file or directory"),
        (".", ".: Is a directory"),
        ("source/saved", "source/saved: Not a directory"),
        ("x" * 256, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = serve("source", "edu")
    assert reason in complaint(run("save", source.path, file))
    assert source.state() == DeviceState.RUNNING
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_reader_that_leaves_is_told(serve: Serve) -> None:
    source = serve("source")
    with started("save", source.path, "-") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == "vfio-user: stdout: Broken pipe\n"
        assert process.wait(TIMEOUT) == 1
    assert source.state() == DeviceState.RUNNING


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_save_that_is_interrupted_leaves_nothing(serve: Serve, tmp_path: Path, number: int) -> None:
    source = serve("source", *LARGE, "--filter", "delay:migration_read_data=1s")
    source.mark()
    with started("save", source.path, tmp_path / "saved") as process:
        source.wait_for("migration_read_data")
        process.send_signal(number)
        out, told = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, told) == (1, "", "vfio-user: interrupted\n")
    expect_source_runs_on(source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_killed_while_it_is_saved_leaves_nothing(serve: Serve, tmp_path: Path) -> None:
    source = serve("source", *LARGE, "--filter", "delay:migration_read_data=1s")
    with started("save", source.path, tmp_path / "saved") as process:
        source.wait_for("migration_read_data")
        source.process.kill()
        _, told = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert told.startswith(f"vfio-user: {source.path} is not saved to {tmp_path / 'saved'}: ")
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda saved: saved[:-1], "ends early"),
        (lambda saved: saved[:3000], "ends early"),
        (lambda saved: saved[:-1] + bytes([saved[-1] ^ 1]), "wrong checksum of the whole"),
        (lambda saved: saved + b"\n", "something follows the end"),
        (lambda saved: b"", "ends early, after 0 bytes"),
        (lambda saved: b"{}", "not a saved device"),
    ],
)
def test_a_damaged_file_is_refused_and_shown(
    serve: Serve, tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    server, file = serve("edu", "edu"), tmp_path / "saved"
    saved = run("save", server.path, "-").stdout
    file.write_bytes(change(saved))
    asked = len(server.trace)
    assert f"{file}: " in complaint(run("restore", server.path, file))
    assert f"stdin: damaged: {reason}" in (
        line := complaint(run("restore", server.path, "-", stdin=change(saved)))
    ) or (reason in line)
    assert len(server.trace) == asked, "the server was asked for something"
    assert reason in complaint(shown := run("info", file))
    assert (b"1234:11e8" in shown.stdout) == (len(change(saved)) > 1000)
    shown = run("info", file, "--json")
    assert reason in complaint(shown)
    if shown.stdout:
        assert json.loads(shown.stdout)["sound"] is False


def test_a_file_of_another_device_is_refused(serve: Serve, tmp_path: Path) -> None:
    edu, large = serve("edu", "edu"), serve("large")
    large.mark()
    run("save", edu.path, tmp_path / "saved")
    assert "identity of device 0 differs" in complaint(run("restore", large.path, tmp_path / "saved"))
    expect_source_runs_on(large)


def test_a_pipe_may_bring_so_much_and_no_more(pair: tuple[Served, Served]) -> None:
    source, destination = pair
    saved = run("save", source.path, "-").stdout
    assert "more than the 1048576 bytes" in complaint(
        run("restore", destination.path, "-", "--max-size", "1", stdin=saved)
    )
    with open("/dev/zero", "rb") as endless:
        done = subprocess.run(
            [*COMMAND, "restore", str(destination.path), "-"], stdin=endless, capture_output=True, timeout=TIMEOUT
        )
    assert "not a saved device" in complaint(done)


def test_a_restore_that_is_interrupted_resets_the_destination(serve: Serve, tmp_path: Path) -> None:
    source, destination = serve("source"), serve("destination", *LARGE, "--filter", "delay:migration_write_data=1s")
    source.mark()
    run("save", source.path, tmp_path / "saved")
    with started("restore", destination.path, tmp_path / "saved") as process:
        destination.wait_for("migration_write_data")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, told) == (1, "vfio-user: interrupted\n")
    expect_as_before(source, destination)


# Migrate


def test_a_device_moves_and_comes_back(pair: tuple[Served, Served]) -> None:
    source, destination = pair
    done = run("migrate", source.path, destination.path, "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    report = report_of(done)
    assert (report["status"], report["failed_step"], report["verified"]) == ("completed", None, True)
    assert isinstance(report["device_state_bytes"], int)
    assert report["device_state_bytes"] > SIZE
    expect_moved(source, destination)
    assert run("migrate", destination.path, source.path).returncode == 0
    expect_moved(destination, source)


def test_a_device_moves_through_a_command(pair: tuple[Served, Served]) -> None:
    source, destination = pair
    done = run("migrate", source.path, "--exec", receiving(destination), "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert report_of(done)["verified"] is True
    expect_moved(source, destination)


@pytest.mark.parametrize("remote", [False, True])
def test_a_group_moves_together(serve: Serve, remote: bool) -> None:
    names = ("a", "b")
    sources = [serve(f"{name}-source", "ivshmem", "-o", "size=1M") for name in names]
    destinations = [serve(f"{name}-destination", "ivshmem", "-o", "size=1M") for name in names]
    for source in sources:
        source.mark()
    if remote:
        paths = " ".join(str(one.path) for one in destinations)
        groups = ["--device", str(sources[0].path), "--device", str(sources[1].path)]
        groups += ["--exec", f"{shlex.join(COMMAND)} receive {paths}"]
    else:
        groups = [str(sources[0].path), str(destinations[0].path)]
        groups += ["--device", f"{sources[1].path}:{destinations[1].path}"]
    done = run("migrate", *groups)
    assert done.returncode == 0, done
    assert b"completed" in done.stdout
    for source, destination in zip(sources, destinations, strict=True):
        expect_moved(source, destination)


def test_the_page_of_a_migration(pair: tuple[Served, Served], tmp_path: Path) -> None:
    assert run("migrate", *(one.path for one in pair), "--html", tmp_path / "page.html").returncode == 0
    page = (tmp_path / "page.html").read_text()
    HTMLParser().feed(page)
    assert "completed" in page


def test_a_page_that_could_not_be_written_is_found_before_anything_moves(
    pair: tuple[Served, Served], tmp_path: Path
) -> None:
    source, destination = pair
    done = run("migrate", source.path, destination.path, "--html", tmp_path / "none" / "page.html")
    assert complaint(done).endswith("none/page.html: No such file or directory")
    expect_source_runs_on(source)


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("reader", ["a full disk", "nobody"])
def test_a_report_that_cannot_be_printed_makes_no_failure(
    pair: tuple[Served, Served], tmp_path: Path, reader: str, options: list[str]
) -> None:
    source, destination = pair
    command = [*COMMAND, "migrate", str(source.path), str(destination.path), "--html", "/dev/full", *options]
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "wb") as closed, open("/dev/full", "wb") as full:
        stdout = full if "disk" in reader else closed
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=TIMEOUT, check=False)
    said = done.stderr.decode()
    reason = "No space left on device" if "disk" in reader else "Broken pipe"
    assert done.returncode == 0, said
    assert f"vfio-user: the report is not printed: {reason}\n" in said
    assert said.endswith("vfio-user: the page is not written: No space left on device\n")
    expect_moved(source, destination)


def test_a_report_for_a_terminal_with_few_letters(pair: tuple[Served, Served]) -> None:
    source, destination = pair
    command = [*COMMAND, "migrate", str(source.path), str(destination.path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=TIMEOUT, check=False)
    assert (done.returncode, b"completed" in done.stdout) == (0, True), done.stderr
    expect_moved(source, destination)


def test_devices_that_do_not_fit_stay_where_they_are(serve: Serve) -> None:
    source, destination = serve("source"), serve("destination", "edu")
    source.mark()
    for other in ([destination.path], ["--exec", receiving(destination)]):
        done = run("migrate", source.path, *other, "--json")
        assert done.returncode == 1
        assert "identity of device 0 differs" in done.stderr.decode().splitlines()[-1]
        report = report_of(done)
        assert (report["status"], report["failed_step"], report["verified"]) == ("failed", "check", False)
        expect_source_runs_on(source)


def test_nobody_at_the_other_end(serve: Serve, tmp_path: Path) -> None:
    source = serve("source")
    source.mark()
    assert "nobody: No such file or directory" in complaint(run("migrate", source.path, tmp_path / "nobody", "--json"))
    for command in ("true", "false", "nosuchcommand 2>/dev/null", "echo hello", "sleep 1000", "kill -9 $$"):
        done = run("migrate", source.path, "--exec", command, "--timeout", "0.1", "--json")
        assert report_of(done)["failed_step"] == "check", command
        complaint(done)
    expect_source_runs_on(source)


@contextmanager
def migrating(source: Served, destination: Served, remote: bool) -> Iterator[subprocess.Popen[str]]:
    """A migration that has begun to send what takes seconds."""
    other = ["--exec", f"exec {receiving(destination)}"] if remote else [str(destination.path)]
    with started("migrate", source.path, *other, "--json", "--bandwidth", "1", "--force", "--timeout", "1") as process:
        destination.wait_for("migration_write_data")
        yield process


def ended(process: subprocess.Popen[str]) -> dict[str, object]:
    """The report of a migration that failed; the last line of stderr says why."""
    out, told = process.communicate(timeout=TIMEOUT)
    report: dict[str, object] = json.loads(out)
    assert (process.returncode, report["status"], report["verified"]) == (1, "failed", False), told
    assert told.splitlines()[-1].startswith(f"vfio-user: failed at {report['failed_step']}: ")
    return report


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_migration_that_is_interrupted_is_undone(pair: tuple[Served, Served], remote: bool, number: int) -> None:
    with migrating(*pair, remote) as process:
        # Ctrl-C and a terminal's hang-up reach all that runs there, what carries the migration too.
        if number == signal.SIGTERM:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)
        report = ended(process)
    assert report["error"] == f"interrupted by {signal.Signals(number).name}"
    expect_as_before(*pair)


@pytest.mark.parametrize("remote", [False, True])
def test_a_source_that_is_killed_has_its_destination_reset(pair: tuple[Served, Served], remote: bool) -> None:
    source, destination = pair
    with migrating(source, destination, remote) as process:
        source.process.kill()
        assert ended(process)["failed_step"] == "stop-and-copy"
    assert destination.state() == DeviceState.RUNNING
    assert not destination.marked


@pytest.mark.parametrize("remote", [False, True])
def test_a_destination_that_is_killed_leaves_the_source_running(pair: tuple[Served, Served], remote: bool) -> None:
    source, destination = pair
    with migrating(source, destination, remote) as process:
        destination.process.kill()
        ended(process)
    expect_source_runs_on(source)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_receiver_that_ends_or_stops_leaves_the_source_running(pair: tuple[Served, Served], number: int) -> None:
    source, destination = pair
    with migrating(source, destination, remote=True) as process:
        os.kill(child_of(process), number)
        ended(process)
    expect_source_runs_on(source)
    if number == signal.SIGTERM:
        expect_as_before(source, destination)


def test_a_sender_that_is_killed_has_its_destination_reset(pair: tuple[Served, Served]) -> None:
    source, destination = pair
    with migrating(source, destination, remote=True) as process:
        process.kill()
        process.wait(TIMEOUT)
        destination.wait_for("disconnected")
        destination.wait_for("reset")
    assert destination.state() == DeviceState.RUNNING
    assert not destination.marked


def test_a_migration_that_does_not_converge_says_so(serve: Serve) -> None:
    source, destination = serve("source", "edu"), serve("destination", "edu")
    command = (
        "migrate",
        source.path,
        destination.path,
        "--json",
        "--downtime",
        "0",
        "--max-rounds",
        "1",
        "--bandwidth",
        "1",
    )
    done = run(*command)
    assert "it does not converge: after 1 rounds" in complaint(done)
    assert (report_of(done)["failed_step"], report_of(done)["rounds"]) == ("pre-copy", 1)
    assert source.state() == DeviceState.RUNNING
    assert report_of(run(*command, "--force"))["status"] == "completed"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["migrate"], "SRC and DST"),
        (["migrate", "a"], "SRC and DST"),
        (["migrate", "a", "b", "c"], "SRC and DST"),
        (["migrate", "a", "b", "--exec", "true"], "SRC, and --exec"),
        (["migrate", "--device", "a"], "SRC:DST"),
        (["migrate", "--device", "a:b:c"], "SRC:DST"),
        (["migrate", "--device", "a:"], "SRC:DST"),
        (["migrate", "--exec", "true", "--device", "a:b"], "write SRC"),
        (["migrate", "a", "b", "--max-rounds", "0"], "--max-rounds"),
        (["migrate", "a", "b", "--bandwidth", "0"], "--bandwidth"),
        (["migrate", "a", "b", "--downtime", "-1"], "--downtime"),
        (["migrate", "a", "b", "--downtime", "nan"], "--downtime"),
        (["migrate", "a", "b", "--timeout", "0"], "--timeout"),
        (["receive"], "DST"),
        (["save", "a"], "FILE"),
        (["restore", "a"], "FILE"),
        (["restore", "a", "b", "--max-size", "0"], "--max-size"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert reason in done.stderr.decode()


def test_a_terminal_is_no_place_for_a_stream() -> None:
    master, slave = os.openpty()
    with open(master, "rb"), open(slave, "r+b", buffering=0) as terminal:
        for arguments in (["save", "a", "-"], ["receive", "a"]):
            done = subprocess.run(
                [*COMMAND, *arguments], stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, timeout=TIMEOUT
            )
            assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
