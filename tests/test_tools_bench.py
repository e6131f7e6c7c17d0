"""bench: what it measures, of which servers, what it leaves behind, and what it says of servers that fail."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import Client, DeviceState, ServerBackend
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.errors import (
    CallTimeoutError,
    ConnectionClosedError,
    MigrationError,
    ProtocolError,
    VfioUserError,
)
from vfio_user.testing import no_fd_leaks
from vfio_user.tools.bench import Choice, Link, Report, Result, Settings, picture, pinned, plan, probes, run
from vfio_user.tools.bench.engine import LeftOut, quantile, ratio
from vfio_user.tools.location import Location
from vfio_user.wire.constants import Command

from .device_support import TIMEOUT, guest_memory, serving
from .hostile import GOOD, REPLY, Answers, Peer, ScriptedServer
from .support import MigratableBackend, RecordingBackend, recording
from .test_vectors import Sparse
from .tools_support import Done, command

SHORT = Settings(seconds=0.004, rounds=2)
COMMAND = [sys.executable, "-m", "vfio_user"]
BAR0 = Location(0, 0, 4)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


def measure(*backends: ServerBackend, settings: Settings = SHORT, **choice: Any) -> Report:
    with ExitStack() as stack:
        paths = [str(stack.enter_context(serving(backend))) for backend in backends]
        links = [stack.enter_context(Link.connect(path, TIMEOUT)) for path in paths]
        report = Report(paths)
        run(links, plan(Choice(**choice)), settings, report)
        return report


def test_every_measure_of_a_device_that_has_everything_and_is_as_it_was_afterwards() -> None:
    device = Edu()
    device.factorial = 120
    report = measure(device, regions=[Location(0, 0x80, 4)], sizes=[4], write=True, migrate=True)
    assert [name for name, _ in report.measures()] == [one.name for one in plan(everything())]
    assert report.left_out == []
    for result in report.results:
        assert len(result.turns) == SHORT.rounds
        facts = result.facts()
        assert 0 < facts["p50"] <= facts["p90"] <= facts["p99"] <= facts["p99.9"] <= facts["max"]
        assert facts["count"] >= SHORT.rounds
    assert (device.factorial, device.migration_get_state()) == (120, DeviceState.RUNNING)


def everything() -> Choice:
    return Choice(regions=[Location(0, 0x80, 4)], sizes=[4], write=True, migrate=True)


def test_nothing_is_changed_unless_it_is_asked_for() -> None:
    with recording(RecordingBackend()) as backend:
        report = measure(backend)
        assert {call[0] for call in backend.calls} <= {
            "connected",
            "disconnected",
            "quiesce",
            "region_read",
            "dma_map",
            "dma_unmap",
        }
        assert {call[1] for call in backend.called("region_read")} == {7}
        assert {call[0] for call in backend.called("dma_map")} == {"dma_map"}
        assert report.left_out == []


def test_writes_write_what_was_there() -> None:
    with recording(RecordingBackend()) as backend:
        backend.memory[:] = bytes(range(256)) * 16
        before = bytes(backend.memory)
        report = measure(backend, regions=[Location(0, 0x10, 4)], sizes=[4, 64], write=True, only=["write", "posted"])
        assert [name for name, _ in report.measures()] == [
            f"{kind}/bar0+0x10/{size}" for size in (4, 64) for kind in ("write", "posted")
        ]
        assert backend.memory == before
        assert {len(call[3]) for call in backend.called("region_write")} == {4, 64}
        assert {call[2] for call in backend.called("region_write")} == {0x10}


def test_bytes_that_were_moved_are_counted() -> None:
    report = measure(Gpio(), sizes=[64], only=["read/config"])
    (result,) = report.results
    facts = result.facts()
    assert facts["bytes_per_s"] == pytest.approx(64 * facts["messages_per_s"])


def test_a_state_of_several_messages_is_read_and_written_whole() -> None:
    with closing(StatefulBackend(bytes(range(256)) * 12000)) as backend:  # 3 MiB less some
        report = measure(backend, migrate=True, only=["migration"])
        assert [name for name, _ in report.measures()] == ["migration/read", "migration/write"]
        assert backend.state is DeviceState.RUNNING
        assert backend.held == bytes(range(256)) * 12000


class StatefulBackend(MigratableBackend):
    """Its state is ``held``: read from its beginning in STOP_COPY, taken over when RESUMING ends."""

    def __init__(self, held: bytes) -> None:
        super().__init__()
        self.held = held
        self.refused: DeviceState | None = None

    def migration_set_state(self, state: DeviceState) -> None:
        if state is self.refused:
            raise OSError(16, "")
        if self.state is DeviceState.RESUMING:
            self.held = bytes(self.stream)
        self.stream[:] = self.held if state is DeviceState.STOP_COPY else b""
        self.state = state


@pytest.mark.parametrize(
    ("choice", "left_out"),
    [
        ({"migrate": True, "only": ["migration/read"]}, ("migration/read", "no migration")),
        ({"migrate": True, "only": ["log"]}, ("log/report/1G", "no DMA logging")),
        ({"regions": [BAR0], "sizes": [4], "only": ["read/bar0"]}, ("read/bar0/4", "bar0 has no 4 bytes there")),
        (
            {"regions": [Location(77, 0, 4)], "sizes": [4], "only": ["read/77"]},
            ("read/77/4", "77 has no 4 bytes there"),
        ),
    ],
)
def test_what_a_device_has_not_is_left_out_with_a_word(choice: dict[str, Any], left_out: tuple[str, str]) -> None:
    report = measure(Gpio(), **choice)
    assert report.results == []
    assert [(one.measure, one.reason) for one in report.left_out] == [left_out]


def test_what_a_device_refuses_is_left_out_and_the_rest_goes_on() -> None:
    with recording(RecordingBackend()) as backend:
        backend.fail = {"region_read": OSError(16, ""), "dma_map": OSError(1, "")}
        report = measure(backend)
        assert [name for name, _ in report.measures()] == ["info"]
        assert {one.reason for one in report.left_out} == {
            "REGION_READ refused: Device or resource busy",
            "DMA_MAP refused: Operation not permitted",
        }


def test_the_device_that_the_rust_traffic_was_recorded_from() -> None:
    with guest_memory(1 << 22) as memory:
        report = measure(Sparse(memory), regions=[Location(0, 0x100, 4)], sizes=[4, 64])
    assert report.left_out == []
    assert "read/bar0+0x100/64" in dict(report.measures())


def test_a_device_that_does_not_run_is_not_touched() -> None:
    with closing(StatefulBackend(b"state")) as backend:
        backend.state = DeviceState.STOP
        report = measure(backend, migrate=True, only=["migration"])
        assert {one.reason for one in report.left_out} == {"the device is in state STOP, not RUNNING"}
        assert backend.state is DeviceState.STOP


class Slow(RecordingBackend):
    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        time.sleep(0.02)


def test_of_two_servers_the_second_is_compared_to_the_first() -> None:
    with recording(RecordingBackend()) as fast, recording(Slow()) as slow:
        settings = Settings(seconds=0.2, rounds=2)
        report = measure(fast, slow, settings=settings, sizes=[4], only=["read", "migration"])
    ((name, results),) = report.measures()
    assert (name, [one.server for one in results]) == ("read/config/4", [0, 1])
    found = ratio(results)
    assert found is not None
    assert 1 < found.least <= found.median <= found.largest
    assert report.as_dict()["measures"][0]["ratio"]["median"] == found.median


def test_what_one_of_two_cannot_do_is_measured_of_the_other() -> None:
    report = measure(Gpio(), Edu(), migrate=True, only=["migration/read"])
    ((_, results),) = report.measures()
    assert [one.server for one in results] == [1]
    assert ratio(results) is None
    assert [one.server for one in report.left_out] == [0]
    assert "migration/read" in picture(report)


@given(st.lists(st.integers(1, 1000), min_size=1).map(sorted), st.floats(0, 1))
def test_a_quantile_is_a_sample_that_so_many_do_not_exceed(samples: list[int], share: float) -> None:
    found = quantile(samples, share)
    assert found in samples
    assert sum(one <= found for one in samples) >= share * len(samples)
    assert quantile(samples, 1.0) == samples[-1]


# Servers that fail


@contextmanager
def linked(answers: Answers) -> Iterator[tuple[Link, ScriptedServer]]:
    server = ScriptedServer(answers)
    try:
        with Link(server.client_socket.dup(), TIMEOUT, "there") as link:
            yield link, server
    finally:
        server.finish()


def vanish(answer: bytes) -> Answers:
    def handler(peer: Peer, request: object) -> None:
        peer.raw(answer)
        peer.sock.shutdown(socket.SHUT_RDWR)

    return {Command.REGION_READ: handler}


READS = Choice(regions=[BAR0], sizes=[4], only=["read/bar0"])


@pytest.mark.parametrize(
    ("answers", "kind", "reason"),
    [
        (vanish(b""), ConnectionClosedError, "there: the server closed the connection"),
        (vanish(b"\0\0\x09"), ConnectionClosedError, "in mid-message"),
        (vanish(b"\0" * 4 + b"\x24\0\0\0" + b"\1\0\0\0" + b"\0" * 8), ConnectionClosedError, "in mid-message"),
        ({Command.REGION_READ: lambda peer, request: None}, CallTimeoutError, "not answered in time"),
        (
            {Command.REGION_READ: lambda peer, request: peer.reply(request, bytes(20), msg_id=9)},
            ProtocolError,
            "REGION_READ came, where a reply was to come",
        ),
        ({Command.REGION_READ: lambda peer, request: peer.reply(request, size=7)}, ProtocolError, "a reply of 7 bytes"),
        (
            {Command.REGION_READ: lambda peer, request: peer.reply(request, size=1 << 31)},
            ProtocolError,
            "a reply of 2147483648 bytes",
        ),
        (
            {Command.REGION_READ: lambda peer, request: peer.reply(request, bytes(20), flags=0)},
            ProtocolError,
            "REGION_READ came, where a reply was to come",
        ),
    ],
    ids=["end", "mid-header", "mid-message", "silence", "id", "tiny", "huge", "command"],
)
def test_a_server_that_breaks_off_or_off_the_rules_is_named(
    answers: Answers, kind: type[Exception], reason: str
) -> None:
    with linked(answers) as (link, _):
        if kind is CallTimeoutError:
            link.set_patience(0.1)
        report = Report(["there"])
        with pytest.raises(kind, match=re.escape(reason)):
            run([link], plan(READS), SHORT, report)
        assert link.broken
        with pytest.raises(ConnectionClosedError, match="of no use"):
            link.exchange(b"", 16)


def test_a_short_answer_is_found_though_its_size_is_right() -> None:
    answers = {Command.REGION_READ: lambda peer, request: peer.raw(bytes(16) + bytes(4))}
    with linked(answers) as (link, _), pytest.raises(ProtocolError):
        run([link], plan(READS), SHORT, Report(["there"]))


def test_an_error_without_errno_leaves_the_measure_out() -> None:
    answers = {Command.REGION_READ: lambda peer, request: peer.reply(request, flags=REPLY | 0x20, error=1 << 20)}
    with linked(answers) as (link, _):
        report = Report(["there"])
        run([link], plan(READS), SHORT, report)
        assert report.left_out == [LeftOut("read/bar0/4", 0, "REGION_READ refused: Invalid argument")]
        assert not link.broken


def test_a_server_that_is_lost_while_its_device_stands_still_is_a_matter_of_resume() -> None:
    with closing(StatefulBackend(b"state")) as backend, serving(backend) as path:
        over = threading.Event()

        def stand_still() -> None:
            over.wait(TIMEOUT)

        backend.act["migration_read_data"] = stand_still
        with Link.connect(str(path), TIMEOUT) as link:
            link.set_patience(0.1)
            with pytest.raises(MigrationError) as caught:
                run([link], plan(Choice(migrate=True, only=["migration/read"])), SHORT, Report([str(path)]))
            over.set()
    assert str(caught.value).endswith(f"the device may be stopped: vfio-user resume {path}")
    assert isinstance(caught.value.__cause__, ConnectionClosedError)


def test_a_device_that_refuses_to_stop_runs_on_and_is_left_out() -> None:
    with closing(StatefulBackend(b"state")) as backend:
        backend.refused = DeviceState.STOP
        report = measure(backend, migrate=True, only=["migration"])
        assert {one.reason for one in report.left_out} == {"DEVICE_FEATURE refused: Device or resource busy"}
        assert backend.state is DeviceState.RUNNING


def test_a_device_that_refuses_to_run_again_is_named_and_what_was_measured_is_kept() -> None:
    with closing(StatefulBackend(b"state")) as backend, serving(backend) as path:
        backend.refused = DeviceState.RUNNING
        report = Report([str(path)])
        with Link.connect(str(path), TIMEOUT) as link, pytest.raises(MigrationError, match="may be stopped"):
            run([link], plan(Choice(migrate=True, only=["migration/write"])), SHORT, report)
        assert [one.measure for one in report.results] == ["migration/write"]
        assert (backend.state, backend.held) == (DeviceState.STOP, b"state")


def test_a_state_without_end_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAX_STATE", 2 << 20)
    with closing(StatefulBackend(bytes(4 << 20))) as backend:
        report = measure(backend, migrate=True, only=["migration/write"])
        assert [one.reason for one in report.left_out] == ["more than 2097152 bytes of state"]
        assert backend.state is DeviceState.RUNNING


def test_a_log_of_tiny_pages_is_left_out() -> None:
    with closing(StatefulBackend(b"")) as backend:
        backend.chosen_page_size = 1
        report = measure(backend, migrate=True, only=["log"])
        assert [one.reason for one in report.left_out] == ["pages of 1 bytes: the bitmap has 134217728"]
        assert len(backend.called("dma_logging_stop")) == len(backend.called("dma_unmap")) == 1


def test_an_end_that_is_asked_for_leaves_the_device_running() -> None:
    class EndError(Exception):
        pass

    for name in ("migration/read", "migration/write", "log"):
        with closing(StatefulBackend(bytes(3 << 20))) as backend, serving(backend) as path:
            calls = iter(range(5))

            def check(calls: Iterator[int] = calls) -> None:
                if next(calls, None) is None:
                    raise EndError

            measures = plan(Choice(migrate=True, only=[name]))
            with Link.connect(str(path), TIMEOUT) as link, pytest.raises(EndError):
                run([link], measures, Settings(seconds=30, rounds=1), Report([str(path)]), check=check)
            assert backend.state is DeviceState.RUNNING
            assert backend.held == bytes(3 << 20)
            assert len(backend.called("dma_logging_stop")) == len(backend.called("dma_logging_start"))


# The picture


def test_the_picture_is_whole_and_escapes_what_comes_from_elsewhere() -> None:
    report = Report(["<script>a", "b&c"])
    report.results = [
        Result("read/x", 0, [array("Q", [1000, 2000, 50_000])]),
        Result("read/x", 1, [array("Q", [900, 2**40, 3])]),
        Result("one", 0, [array("Q", [7])]),
    ]
    report.left_out = [LeftOut("other", 1, "<b>no</b>")]
    page = picture(report)
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;a" in page
    curves = 0
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        svg = ElementTree.fromstring(drawing)
        for line in svg.iter("polyline"):
            curves += 1
            places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
            assert all(0 <= x <= 720 and 0 <= y <= 260 for x, y in places)
            assert places == sorted(places, key=lambda place: (place[0], -place[1])), "a curve goes right and up"
    assert curves == 3


# The command


def bench(*arguments: object) -> Done:
    return command("bench", *arguments)


def test_the_command_in_json_as_a_table_and_as_a_page(tmp_path: Path) -> None:
    with serving(Edu()) as one, serving(Gpio()) as other:
        done = bench(one, "--json", "--seconds", "0.01", "--rounds", "2", "--html", tmp_path / "page.html")
        assert (done.status, done.err) == (0, "")
        facts = json.loads(done.out)
        assert set(facts) == {"servers", "measures", "left_out"}
        assert facts["measures"][0]["name"] == "info"
        assert facts["measures"][0]["ratio"] is None
        assert "<svg" in (tmp_path / "page.html").read_text()
        done = bench(one, other, "--seconds", "0.01", "--only", "read/config/4", "--only", "mig", "--migrate")
        assert (done.status, done.err) == (0, "")
        assert re.search(r"p50 A +p50 B .* B/A", done.out)
        assert f"left out: migration/read of {other}: no migration" in done.out


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["a", "b", "c"], 2, "one server, or two to compare"),
        (["a", "./a"], 2, "one client at a time"),
        (["a", "--write"], 2, "--write needs a --region"),
        (["a", "--only", "migration"], 2, "no measure is like that"),
        (["a", "--region", "bar9"], 2, "bar9"),
        (["a", "--size", "0"], 2, "0"),
        (["a", "--seconds", "nan"], 2, "nan"),
        (["a", "--timeout", "nan"], 2, "nan"),
        (["./missing"], 1, "missing: No such file"),
    ],
)
def test_wrong_usage(arguments: list[str], status: int, reason: str) -> None:
    done = bench(*arguments)
    assert (done.status, done.out) == (status, "")
    assert reason in done.err.splitlines()[-1]


def test_a_page_that_cannot_be_written_costs_no_figures() -> None:
    with serving(Gpio()) as path:
        done = bench(path, "--only", "info", "--seconds", "0.01", "--html", "/dev/full")
    assert (done.status, done.err) == (1, "vfio-user: /dev/full: No space left on device\n")
    assert done.out.splitlines()[1].startswith("info ")


def test_what_is_chosen_twice_is_done_once() -> None:
    twice = Choice(regions=[BAR0, BAR0, Location(7, 0, 4)], sizes=[4, 4])
    names = [one.name for one in plan(twice) if one.name.startswith("read")]
    assert names == ["read/config/4", "read/bar0/4"]


def test_the_measures_are_listed_without_a_server() -> None:
    done = bench("nobody", "--list", "--region", "bar2+0x100", "--size", "8", "--write", "--migrate")
    names = [
        *("info", "read/config/8", "read/bar2+0x100/8", "write/bar2+0x100/8", "posted/bar2+0x100/8"),
        *(f"dma/{what}/{size}" for size in ("4K", "2M", "1G") for what in ("map", "unmap")),
        *("log/report/1G", "migration/read", "migration/write"),
    ]
    assert done.out.split() == names
    assert json.loads(bench("nobody", "--list", "--only", "info", "--json").out) == {"measures": ["info"]}


def test_ctrl_c_leaves_the_device_running_and_what_was_measured_is_shown() -> None:
    with closing(StatefulBackend(b"state")) as backend, serving(backend) as path:
        options = ["--migrate", "--only", "info", "--only", "migration/write", "--seconds", "2", "--rounds", "1"]
        arguments = [*COMMAND, "bench", str(path), "--json", *options]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                backend.wait_for("migration_write_data")
                process.send_signal(signal.SIGINT)
                out, complaint = process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
        assert (process.returncode, complaint) == (1, "vfio-user: interrupted\n")
        assert [one["name"] for one in json.loads(out)["measures"]] == ["info"]
        assert backend.state is DeviceState.RUNNING


def test_cores_are_taken_and_given_back() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    seen: list[set[int]] = []
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        with pinned(core, core, [os.getpid()]):
            seen += [os.sched_getaffinity(0), os.sched_getaffinity(thread.native_id or 0)]
        assert seen == [{core}, {core}]
        assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id or 0) == before
        with pytest.raises(VfioUserError, match="core 1000 is not there"), pinned(1000, None, []):
            pass
    finally:
        over.set()
        thread.join()


def test_good_answers_measure_well() -> None:
    """The scripted server of these tests is not the reason for what they find."""
    with linked(GOOD) as (link, server):
        report = Report(["there"])
        run([link], plan(READS), SHORT, report)
        assert report.results[0].moved == 4 * len(report.results[0].samples)
        assert server.of(Command.REGION_READ)
    with pytest.raises(ConnectionClosedError), Link(closed(), TIMEOUT, "gone"):
        pass


def closed() -> socket.socket:
    """The end of a connection whose other end is gone."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours


def test_a_client_may_come_after_it() -> None:
    with serving(Edu()) as path:
        with Link.connect(str(path), TIMEOUT) as link:
            run([link], plan(Choice(only=["dma/map/4K"])), SHORT, Report(["a"]))
        with Client.connect(path, TIMEOUT) as client:
            assert client.migration_get_state() is DeviceState.RUNNING
