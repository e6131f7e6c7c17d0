"""Moving a QEMU guest, as far as it needs no QEMU: config space, the gdbstub's packets, a QMP peer that errs."""

from __future__ import annotations

import errno
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.devices.edu import Edu
from vfio_user.errors import CommandError, ConnectionClosedError, MigrationError
from vfio_user.live.qemu import (
    ClosedError,
    EndedMonitor,
    LateError,
    Monitor,
    MonitorError,
    NamedControl,
    Plan,
    RefusedError,
)
from vfio_user.live.qemu.config_image import SIZE, ConfigImage, ConfigWrite, MsixTable
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.gdbstub import GdbStub
from vfio_user.live.qemu.handover import masked_vectors
from vfio_user.live.qemu.incoming import Incoming
from vfio_user.live.qemu.machine import Machine, PciFunction, path_text
from vfio_user.live.qemu.monitor import MigrationInfo, RamProgress
from vfio_user.live.qemu.outgoing import Outgoing
from vfio_user.live.qemu.passes import Passes
from vfio_user.live.report import Report, Status
from vfio_user.live.text import report_text
from vfio_user.wire.constants import PAGE_SIZE, DeviceState

from .qemu.migrate_support import Served

pytestmark = pytest.mark.timeout(60)

TIMEOUT = 5.0
GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""}, "capabilities": []}}

Peer = Callable[[socket.socket], None]


@contextmanager
def served(path: Path, talk: Peer) -> Iterator[str]:
    """A peer that talks to one client."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(TIMEOUT)

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.settimeout(TIMEOUT)
                talk(client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path)
        finally:
            thread.join(2 * TIMEOUT)
            assert not thread.is_alive()


# Config space


def image(**registers: int) -> ConfigImage:
    """A config space; ``_10_4=5``: the register of 4 bytes at 0x10 is 5."""
    data = bytearray(SIZE)
    for name, value in registers.items():
        offset, width = name[1:].split("_")
        data[int(offset, 16) : int(offset, 16) + int(width)] = value.to_bytes(int(width), "little")
    return ConfigImage(bytes(data))


def test_bars_are_found_whatever_their_kind() -> None:
    found = image(_10_4=0xE000_0000, _14_4=0xC001, _18_4=0x0000_000C, _1c_4=0x38, _24_4=0).bars
    assert [(bar.bar, bar.address, bar.io) for bar in found] == [
        (0, 0xE000_0000, False),
        (1, 0xC000, True),
        (2, 0x38_0000_0000, False),
    ]


def test_control_words_come_last_and_the_msix_table_is_elsewhere() -> None:
    config = image(
        _4_2=6, _6_2=0x10, _10_4=0xE000_0000, _34_1=0x40, _3c_1=11,
        _40_4=0x0181_5005, _44_4=0xFEE0_0000, _48_4=1, _4c_2=0x4021, _50_4=0xF,
        _50_1=0x11, _51_1=0, _52_2=0x8003, _54_4=0x2004,
    )  # fmt: skip
    writes = [(write.offset, write.width) for write in config.writes()]
    assert writes == [(0x10, 4), (0x3C, 1), (0x0C, 1), (0x04, 2), (0x44, 4), (0x48, 4), (0x4C, 2), (0x50, 4), (0x42, 2)]
    assert list(config.msix_control()) == [ConfigWrite(0x52, 2, 0x8003)]
    table = config.msix
    assert table is not None
    assert (table.bar, table.offset, table.vectors, table.size) == (4, 0x2000, 4, 64)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=32), st.booleans())
def test_masked_vectors_are_those_that_a_driver_has_set_up(entries: list[tuple[bool, bool]], all_masked: bool) -> None:
    data = b"".join(
        (0xFEE0_0000 * used).to_bytes(12, "little") + masked.to_bytes(4, "little") for used, masked in entries
    )
    table = MsixTable(0, 0, len(entries), 0x8000 | all_masked << 14)
    expected = [vector for vector, (used, masked) in enumerate(entries) if used and (masked or all_masked)]
    assert list(masked_vectors(table, data)) == expected


@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_whatever_a_config_space_says_no_write_leaves_it(data: bytes) -> None:
    config = ConfigImage(data)
    for write in [*config.writes(), *config.msix_control()]:
        assert 0 <= write.offset <= SIZE - write.width
        assert write.offset % write.width == 0
        assert write.value == config.number(write.offset, write.width)
    assert all(bar.address for bar in config.bars)
    assert config.msix is None or 1 <= config.msix.vectors <= 2048


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
def test_config_addresses_are_those_of_mechanism_1(bus: int, devfn: int, offset: int) -> None:
    assert PciFunction(bus, devfn).config_address(offset) == 1 << 31 | bus << 16 | devfn << 8 | offset // 4 * 4


def test_a_path_reads_as_slots_and_functions() -> None:
    assert path_text((0x10, 0x01)) == "02.0/00.1"


# The gdbstub


def checked(packet: bytes) -> bytes:
    return b"+$%s#%02x" % (packet, sum(packet) % 256)


def answering(answers: dict[bytes, bytes], seen: list[bytes]) -> Peer:
    """A gdbstub that answers packets by how they begin."""

    def talk(client: socket.socket) -> None:
        pending = b""
        while more := client.recv(4096):
            pending += more
            while (end := pending.find(b"#")) >= 0 and len(pending) >= end + 3:
                packet, pending = pending[pending.find(b"$") + 1 : end], pending[end + 3 :]
                seen.append(packet)
                answer = next((answers[begin] for begin in answers if packet.startswith(begin)), b"")
                client.sendall(checked(answer)[:3])
                client.sendall(checked(answer)[3:])

    return talk


WELL = {b"qSupported": b"PacketSize=4096", b"?": b"T05thread:01;", b"Q": b"OK", b"M": b"OK"}


def test_memory_is_written_in_pieces_and_nobody_says_farewell(tmp_path: Path) -> None:
    seen: list[bytes] = []
    with served(tmp_path / "gdb", answering(WELL, seen)) as path, GdbStub(path, TIMEOUT) as stub:
        stub.write(0xFEB0_2000, bytes(range(100)))
    assert seen[2] == b"Qqemu.PhyMemMode:1"
    assert seen[3] == b"Mfeb02000,40:" + bytes(range(64)).hex().encode()
    assert seen[4] == b"Mfeb02040,24:" + bytes(range(64, 100)).hex().encode()
    assert len(seen) == 5


@pytest.mark.parametrize("answers", [{**WELL, b"M": b"E22"}, {**WELL, b"Q": b""}])
def test_a_gdbstub_that_refuses_is_named(tmp_path: Path, answers: dict[bytes, bytes]) -> None:
    with (
        served(tmp_path / "gdb", answering(answers, [])) as path,
        pytest.raises(MigrationError, match=r"gdbstub: .* is answered"),
        GdbStub(path, TIMEOUT) as stub,
    ):
        stub.write(0, b"data")


@pytest.mark.parametrize("says", [b"", b"+", b"+$" + bytes(30000)], ids=["nothing", "a part", "without end"])
def test_what_is_no_gdbstub_is_found_out(tmp_path: Path, says: bytes) -> None:
    def talk(client: socket.socket) -> None:
        client.recv(4096)
        client.sendall(says)

    with served(tmp_path / "gdb", talk) as path, pytest.raises(MigrationError, match="gdbstub"):
        GdbStub(path, TIMEOUT)


def test_no_gdbstub_at_all(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match=r"gdb: No such file or directory$"):
        GdbStub(str(tmp_path / "gdb"), TIMEOUT)


# QMP


def qmp(answers: dict[str, object], asked: list[str] | None = None) -> Peer:
    """A QEMU that answers commands by name; what is not among them, with an error; None: it hangs up.

    Notes in ``asked`` what it was.
    """

    def talk(client: socket.socket) -> None:
        client.sendall(json.dumps(GREETING).encode() + b"\n")
        while said := client.recv(4096):  # one at a time, with nothing to tell where it ends
            command = json.loads(said)
            name = command["execute"]
            if asked is not None:
                asked.append(name)
            if name in answers and answers[name] is None:
                return
            error = {"class": "CommandNotFound", "desc": f"no {name}"}
            answer = {"return": answers[name]} if name in answers else {"error": error}
            client.sendall(json.dumps({**answer, "id": command.get("id")}).encode() + b"\n")

    return talk


ALIVE: dict[str, object] = {"qmp_capabilities": {}}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"status": 3, "running": True}, r"Expected `str`, got `int` - at `\$.status`"),
        ([], "Expected `object`, got `array`"),
        ({"status": "running"}, "Object missing required field `running`"),
    ],
)
def test_an_answer_that_is_none_is_named(tmp_path: Path, answer: object, reason: str) -> None:
    peer = qmp({**ALIVE, "query-status": answer})
    with (
        served(tmp_path / "qmp", peer) as path,
        Monitor("source", path, TIMEOUT) as monitor,
        pytest.raises(MonitorError, match=f"the source QEMU answers query-status with what it must not: {reason}"),
    ):
        monitor.status()


def test_a_refusal_has_qemus_words(tmp_path: Path) -> None:
    with (
        served(tmp_path / "qmp", qmp(ALIVE)) as path,
        Monitor("source", path, TIMEOUT) as monitor,
        pytest.raises(RefusedError, match="the source QEMU: query-status: no query-status"),
    ):
        monitor.status()


def test_a_qemu_that_goes_is_gone_from_then_on(tmp_path: Path) -> None:
    peer = qmp({**ALIVE, "query-status": None})
    with served(tmp_path / "qmp", peer) as path, Monitor("source", path, TIMEOUT) as monitor:
        for _ in range(2):
            with pytest.raises(ClosedError, match="the source QEMU: query-status: its monitor is gone"):
                monitor.status()
        with pytest.raises(ClosedError):
            monitor.wait_event(TIMEOUT)


def silent(client: socket.socket) -> None:
    """A QEMU that hangs once it has said who it is."""
    client.sendall(json.dumps(GREETING).encode() + b"\n")
    client.recv(4096)
    client.sendall(b'{"return": {}}\n')
    while client.recv(4096):
        pass


def test_a_qemu_that_says_nothing_is_late(tmp_path: Path) -> None:
    with (
        served(tmp_path / "qmp", silent) as path,
        Monitor("source", path, 0.3) as monitor,
        pytest.raises(LateError, match=r"query-status: no answer within 0\.3 s"),
    ):
        monitor.status()


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "is it a QMP socket"),
        (b'{"hello": 1}\n', "is it a QMP socket"),
        (b"", "it hangs up"),
        (b"[" * 100_000 + b"\n", "is it a QMP socket"),
    ],
)
def test_what_is_no_qmp_is_found_out(tmp_path: Path, says: bytes, reason: str) -> None:
    with (
        served(tmp_path / "qmp", lambda client: client.sendall(says)) as path,
        pytest.raises(MonitorError, match=reason),
    ):
        Monitor("source", path, TIMEOUT)


@pytest.mark.parametrize(
    "says",
    [
        b'{"return": "\xff"}',
        b"[" * 100_000,
        b" " * (11 << 20),
        b'{"return": {}, "id": []}',
        b'{"return": ' + b"9" * 5000 + b"}",
        b"[1]",
        b'{"event": [], "data": 5}',
        b'{"error": 5, "id": @}',
    ],
    ids=lambda says: repr(says[:20]),
)
@pytest.mark.parametrize("before", [False, True])
def test_nonsense_is_an_error_like_any_other(tmp_path: Path, says: bytes, before: bool) -> None:
    """Before QEMU's monitor is ready for commands, and after."""

    def talk(client: socket.socket) -> None:
        client.sendall(json.dumps(GREETING).encode() + b"\n")
        client.recv(4096)
        if not before:
            client.sendall(b'{"return": {}}\n')
            number = json.loads(client.recv(4096))["id"]
        with suppress(OSError):
            client.sendall(says.replace(b"@", b'"x"' if before else json.dumps(number).encode()) + b"\n")
            client.recv(4096)

    with (
        served(tmp_path / "qmp", talk) as path,
        pytest.raises(MonitorError),
        Monitor("source", path, 0.5) as monitor,
    ):
        monitor.status()


def test_ctrl_c_while_connecting_leaves_nothing_under_way(tmp_path: Path) -> None:
    """Nor a word of what was: asyncio tells on stderr of tasks that are collected before they ended."""

    def interrupt(client: socket.socket) -> None:
        process.send_signal(signal.SIGINT)
        client.recv(1)

    program = [sys.executable, "-m", "vfio_user", "qemu-save", "--device", "d", "--from"]
    with served(tmp_path / "qmp", interrupt) as path:
        words = [*program, str(path), str(tmp_path / "folder")]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            _, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (1, "vfio-user: interrupted\n")


def test_no_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match=r"nowhere: No such file"):
        Monitor("source", tmp_path / "nowhere", TIMEOUT)


def test_a_monitor_that_was_closed_says_so(tmp_path: Path) -> None:
    with served(tmp_path / "qmp", qmp(ALIVE)) as path:
        with Monitor("source", path, TIMEOUT) as monitor:
            pass
        with pytest.raises(ClosedError, match="this monitor was closed"):
            monitor.status()
        monitor.close()


def test_a_qemu_that_was_not_reached_may_be_there_still(tmp_path: Path) -> None:
    asked: list[str] = []
    with (
        served(tmp_path / "qmp", qmp({**ALIVE, "query-status": None}, asked)) as path,
        Monitor("destination", path, TIMEOUT) as monitor,
    ):
        with pytest.raises(ClosedError):
            monitor.quit()
        with pytest.raises(MigrationError, match="the destination QEMU may still be there: see that it ends"):
            Incoming(Machine(monitor), [], Debugger(monitor, TIMEOUT)).end(devices_ran=False)
    assert "quit" not in asked


def test_a_qemu_that_was_late_once_has_all_the_time_to_end(tmp_path: Path) -> None:
    def talk(client: socket.socket) -> None:
        client.sendall(json.dumps(GREETING).encode() + b"\n")
        client.recv(4096)
        client.sendall(b'{"return": {}}\n')
        client.recv(4096)  # query-status: no answer
        command = json.loads(client.recv(4096))
        client.sendall(json.dumps({"return": {}, "id": command["id"]}).encode() + b"\n")
        time.sleep(0.1)  # and then it ends

    with served(tmp_path / "qmp", talk) as path, Monitor("destination", path, 0.5) as monitor:
        monitor.quit()


def test_a_wait_for_a_qemu_that_is_gone_leaves_others_the_processor() -> None:
    looks = itertools.count()
    outgoing = Outgoing(Machine(EndedMonitor("source")), [], 0.2, lambda: None)
    with pytest.raises(MigrationError, match=r"what it does not do not within 0\.2 s"):
        outgoing.wait("what it does not do", lambda: next(looks) < 0)
    assert next(looks) < 20


def test_a_qemu_that_goes_when_told_to_has_ended(tmp_path: Path) -> None:
    status = {"status": "running", "running": True}
    with (
        served(tmp_path / "qmp", qmp({**ALIVE, "query-status": status, "quit": None})) as path,
        Monitor("destination", path, TIMEOUT) as monitor,
    ):
        monitor.quit()


@pytest.mark.parametrize("prints", ["", "portl[0x0cf8] = many", "unknown command: 'i'", "0x" + "f" * 100_000])
def test_a_human_monitor_that_prints_something_else(tmp_path: Path, prints: str) -> None:
    peer = qmp({**ALIVE, "human-monitor-command": prints})
    with served(tmp_path / "qmp", peer) as path, Monitor("source", path, TIMEOUT) as monitor:
        machine = Machine(monitor)
        with pytest.raises(MigrationError, match="the source QEMU reads a port as"):
            machine.port_read(0xCF8)
        with pytest.raises(MigrationError, match="does not read memory at 0x1000"):
            machine.memory_words(0x1000, 4)


def test_an_answer_out_of_turn_is_not_taken_for_another(tmp_path: Path) -> None:
    def talk(client: socket.socket) -> None:
        client.sendall(json.dumps(GREETING).encode() + b"\n")
        client.recv(4096)
        client.sendall(b'{"return": {}}\n')
        command = json.loads(client.recv(4096))
        client.sendall(b'{"return": {"status": "running", "running": true}, "id": "somebody else\'s"}\n')
        answer = {"return": {"status": "paused", "running": False}, "id": command["id"]}
        client.sendall(json.dumps(answer).encode() + b"\n")

    with served(tmp_path / "qmp", talk) as path, Monitor("source", path, TIMEOUT) as monitor:
        assert monitor.status().status == "paused"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (
            {"qemu": {"major": 10, "minor": 2, "micro": 0}},
            "the destination QEMU is 10.2.0: the recipe is known to work",
        ),
        ({"qemu": "11"}, "the destination QEMU answers query-version with what it must not"),
    ],
)
def test_another_qemu_is_refused_whatever_else_it_says(tmp_path: Path, version: object, reason: str) -> None:
    here = qmp({**ALIVE, "query-version": GREETING["QMP"]["version"]})
    there = qmp({**ALIVE, "query-version": version})
    with (
        served(tmp_path / "s", here) as source,
        served(tmp_path / "d", there) as destination,
        Monitor("source", source, TIMEOUT) as one,
        Monitor("destination", destination, TIMEOUT) as other,
    ):
        (obstacle,) = Plan(Machine(one), Machine(other), [], Debugger(other, TIMEOUT)).obstacles
        assert obstacle.startswith(reason)


# Control sockets


@pytest.fixture
def edu(tmp_path: Path) -> Iterator[Served]:
    with Served(Edu(), tmp_path, "edu") as served:
        yield served


def test_errors_say_whose_control_socket_it_is(edu: Served) -> None:
    with NamedControl.connect(edu.control_path, TIMEOUT) as control:
        control.name = "the source's a.ctl"
        assert control.migration_get_state() is DeviceState.RUNNING
        with pytest.raises(CommandError, match=r"^the source's a\.ctl: CONTROL_PUSH refused: ") as refused:
            control.push()
        assert refused.value.errno == errno.ENOTCONN
        edu.stop()
        with pytest.raises(ConnectionClosedError, match=r"^the source's a\.ctl: "):
            control.migration_get_state()


def test_a_control_socket_behind_which_there_is_nobody_is_named(tmp_path: Path) -> None:
    with served(tmp_path / "s", silent) as qemu, served(tmp_path / "gone", lambda _: None) as gone:
        command = [
            sys.executable,
            "-m",
            "vfio_user",
            "qemu-save",
            "--from",
            qemu,
            "--device",
            gone,
            str(tmp_path / "f"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stderr
    assert said == f"vfio-user: {gone}: it hangs up: is a server behind it?\n"


# Passes over the memory


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1000), st.integers(0, 50)), max_size=20))
def test_all_that_was_sent_is_in_one_of_the_passes(looks: list[tuple[int, int, int]]) -> None:
    passes, rounds = Passes(), []
    count = sent = left = 0
    for number, (begun, pages, left) in enumerate([*looks, (0, 0, 0)]):
        count, sent = count + begun, sent + pages
        ram = RamProgress(sent * PAGE_SIZE, left * PAGE_SIZE, sent, 0, dirty_sync_count=count, page_size=PAGE_SIZE)
        rounds.append(passes.see(MigrationInfo("active", ram), stopped=number == len(looks)))
    done = [one for one in rounds if one is not None]
    assert (sum(one.pages for one in done), sum(one.memory_bytes for one in done)) == (sent, sent * PAGE_SIZE)
    assert [one.stopped for one in done] == [False] * (len(done) - 1) + [True]
    assert len(done) <= max(count, 1)
    assert done[-1].left == left == 0


def test_before_anything_is_sent_there_is_no_pass() -> None:
    passes = Passes()
    assert passes.see(MigrationInfo()) is None
    assert passes.time_for_the_rest == float("inf")


# What it says


def test_a_report_tells_what_the_downtime_was_spent_with() -> None:
    report = Report(status=Status.COMPLETED, downtime=0.05, causes={"stop": 0.02, "push": 0.03})
    assert report.as_json()["downtime_causes_ms"] == {"stop": 20.0, "push": 30.0}
    lines = report_text(report).splitlines()
    assert [line.split() for line in lines[-4:-1]] == [
        ["downtime", "50", "ms"],
        ["stop", "20", "ms"],
        ["push", "30", "ms"],
    ]
    assert "downtime_causes_ms" not in Report().as_json()
