"""A server that breaks one rule is caught by the case that names it.

The mutants are replies of an honest server, twisted on their way out.
"""

from __future__ import annotations

import errno
import json
import os
import select
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vfio_user import Server
from vfio_user.devices.edu import Edu
from vfio_user.protocol import Outgoing
from vfio_user.tools.check import Mode, Verdict, server_cases
from vfio_user.tools.check.client.played import Play, Twist, again, honest, of, whole
from vfio_user.tools.check.raw import Received
from vfio_user.wire import messages as m
from vfio_user.wire.constants import HEADER_SIZE, Command, DeviceState, HeaderFlags, PciRegion, RegionFlags

from .check_support import EVERYTHING, TIMEOUT, by_name, check, not_passed, twisted
from .test_cli import run

OK, ERROR = int(HeaderFlags.REPLY), int(HeaderFlags.REPLY | HeaderFlags.ERROR)
MUST, SHOULD, QUIRK = Verdict.MUST, Verdict.SHOULD, Verdict.QUIRK


def edited(*commands: Command, error: bool | None = False) -> Callable[[Callable[[bytes], bytes]], Twist]:
    """Edits the bytes of replies: of good ones, of errors, of both (None)."""

    def make(edit: Callable[[bytes], bytes]) -> Twist:
        def twist(play: Play, request: Received, reply: Outgoing) -> None:
            data = whole(reply)
            wanted = not commands or request.header.command in commands
            is_error = bool(m.Header.parse(data).flags & HeaderFlags.ERROR)
            play.send(edit(data) if wanted and error in (None, is_error) else data, reply.fds)

        return twist

    return make


def accepts(command: Command, payload: Callable[[Received], bytes] = lambda request: b"") -> Twist:
    """Says yes where an honest server refuses."""

    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        data = whole(reply)
        refused = m.Header.parse(data).flags & HeaderFlags.ERROR
        if request.header.command == command and refused:
            play.send(again(data[:HEADER_SIZE] + payload(request), flags=OK, error_no=0))
        else:
            honest(play, request, reply)

    return twist


def patched(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Other bytes in the payload."""

    def edit(data: bytes) -> bytes:
        at = HEADER_SIZE + offset
        return data[:at] + value + data[at + len(value) :] if len(data) >= at + len(value) else data

    return edit


def echo(request: Received) -> bytes:
    return request.payload


def capabilities(change: Callable[[dict[str, object]], dict[str, object]]) -> Twist:
    @edited(Command.VERSION)
    def edit(data: bytes) -> bytes:
        text = data[HEADER_SIZE + 4 :].rstrip(b"\0") or b"{}"
        new = change(json.loads(text).get("capabilities", {}))
        return again(data[: HEADER_SIZE + 4] + json.dumps({"capabilities": new}).encode() + b"\0")

    return edit


def extra_reply(play: Play, request: Received, reply: Outgoing) -> None:
    honest(play, request, reply)
    if request.header.command == Command.DEVICE_GET_IRQ_INFO and len(request.payload) == 16:
        honest(play, request, reply)


@of(Command.DEVICE_GET_INFO)
def silent_when_short(play: Play, request: Received, reply: Outgoing) -> None:
    if len(request.payload) >= 16:
        honest(play, request, reply)


def closes_on_unknown(play: Play, request: Received, reply: Outgoing) -> None:
    if request.header.command == 99:
        play.close()
    else:
        honest(play, request, reply)


@dataclass
class Swapping:
    """Answers two commands in the wrong order when the second is there before the first is answered."""

    held: list[bytes] = field(default_factory=list)

    def __call__(self, play: Play, request: Received, reply: Outgoing) -> None:
        if not self.held and select.select([play.wire.socket], [], [], 0)[0]:
            self.held.append(whole(reply))
            return
        honest(play, request, reply)
        for data in self.held[:1]:
            play.send(data)
        self.held.clear()


class Leaking:
    """Keeps a duplicate of every eventfd."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def __call__(self, play: Play, request: Received, reply: Outgoing) -> None:
        self.kept += [os.dup(fd.fileno()) for fd in request.fds]
        honest(play, request, reply)

    def close(self) -> None:
        for fd in self.kept:
            os.close(fd)


def stray_fd(play: Play, request: Received, reply: Outgoing) -> None:
    if request.header.command != Command.DEVICE_GET_IRQ_INFO:
        honest(play, request, reply)
        return
    fd = os.eventfd(0)
    try:
        play.send(whole(reply), [fd])
    finally:
        os.close(fd)


def set_state_replies(refused: bool, state: DeviceState) -> Twist:
    """Answers a SET of this state the other way round, whatever became of it."""

    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        data = whole(reply)
        wanted = m.Feature(16, 0x20002).pack() + m.FeatureDeviceState(state).pack()
        if request.header.command != Command.DEVICE_FEATURE or request.payload[4:12] != wanted[4:12]:
            honest(play, request, reply)
        elif refused:
            play.send(again(data[:HEADER_SIZE], flags=ERROR, error_no=errno.EINVAL))
        else:
            play.send(again(data[:HEADER_SIZE] + request.payload, flags=OK, error_no=0))

    return twist


def errno_is(number: int, *commands: Command) -> Twist:
    return edited(*commands, error=True)(lambda data: again(data, error_no=number))


REGION, IRQ, INFO = Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_IRQ_INFO, Command.DEVICE_GET_INFO
READ, WRITE, FEATURE = Command.REGION_READ, Command.REGION_WRITE, Command.DEVICE_FEATURE
SET_IRQS, MAP, UNMAP = Command.DEVICE_SET_IRQS, Command.DMA_MAP, Command.DMA_UNMAP
MAPPABLE = int(RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP).to_bytes(4, "little")
WITH_CAPS = int(RegionFlags.READ | RegionFlags.WRITE | RegionFlags.CAPS).to_bytes(4, "little")


def bar0(edit: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Of BAR 0's description alone."""
    return lambda data: edit(data) if data[HEADER_SIZE + 8 : HEADER_SIZE + 12] == bytes(4) else data


MUTANTS: dict[str, tuple[Twist, str, Verdict]] = {
    "another id": (edited(IRQ)(lambda data: again(data, msg_id=1)), "info/irq/intx", MUST),
    "another command": (edited(IRQ)(lambda data: again(data, command=INFO)), "info/irq/intx", MUST),
    "a command for a reply": (edited(IRQ)(lambda data: again(data, flags=0)), "info/irq/intx", MUST),
    "NO_REPLY in a reply": (edited(IRQ)(lambda data: again(data, flags=0x11)), "info/irq/intx", SHOULD),
    "an errno without error": (edited(IRQ)(lambda data: again(data, error_no=5)), "info/irq/intx", SHOULD),
    "error replies with payload": (
        edited(INFO, error=True)(lambda data: again(data + bytes(16))),
        "sizes/device_get_info/short-by-1",
        MUST,
    ),
    "errno 0": (errno_is(0, IRQ), "info/irq/none/next", QUIRK),
    "another errno": (errno_is(errno.EPERM, IRQ), "info/irq/none/next", SHOULD),
    "an errno that is none": (errno_is(0xFFFFFFFF, IRQ), "info/irq/none/next", SHOULD),
    "no answer to a short command": (silent_when_short, "sizes/device_get_info/empty", MUST),
    "two answers": (extra_reply, "info/irq/msix", MUST),
    "closed at an unknown command": (closes_on_unknown, "header/unknown/99", MUST),
    "unknown commands accepted": (accepts(Command.DMA_READ), "header/direction/dma_read", MUST),
    "descriptors with a reply": (stray_fd, "info/irq/intx", MUST),
    "minor 9": (edited(Command.VERSION)(patched(2, b"\x09\0")), "version/standard", MUST),
    "major 1": (edited(Command.VERSION)(patched(0, b"\x01\0")), "version/standard", MUST),
    "no NUL": (edited(Command.VERSION)(lambda data: again(data[:-1])), "version/standard", MUST),
    "capabilities not proposed": (
        capabilities(lambda given: {**given, "max_msg_fds": 8}),
        "version/without/max_msg_fds",
        QUIRK,
    ),
    "a string for a number": (capabilities(lambda given: {**given, "max_msg_fds": "8"}), "version/standard", MUST),
    "version data that are no JSON": (
        edited(Command.VERSION)(lambda data: again(data[: HEADER_SIZE + 4] + b"{capabilities}\0")),
        "version/standard",
        MUST,
    ),
    "a twin socket without one": (
        capabilities(lambda given: {**given, "twin_socket": {"supported": True, "fd_index": 0}}),
        "version/twin-socket",
        MUST,
    ),
    "not PCI": (edited(INFO)(patched(4, bytes(4))), "info/device", MUST),
    "3 regions": (edited(INFO)(patched(8, b"\3\0\0\0")), "info/device", MUST),
    "200 interrupt indexes": (edited(INFO)(patched(12, b"\xc8\0\0\0")), "info/device", MUST),
    "argsz of a larger structure": (edited(INFO)(patched(0, b"\x20")), "info/device", SHOULD),
    "a shorter structure": (edited(INFO)(lambda data: again(data[:-4])), "info/device", MUST),
    "another region": (edited(REGION)(patched(8, b"\5\0\0\0")), "info/region/bar0/fixed", MUST),
    "MMAP without a descriptor": (edited(REGION)(bar0(patched(4, MAPPABLE))), "info/region/bar0/fixed", QUIRK),
    "CAPS without capabilities": (
        edited(REGION)(bar0(lambda data: patched(12, b"\x20")(patched(4, WITH_CAPS)(data)))),
        "info/region/bar0/fixed",
        QUIRK,
    ),
    "cap_offset without CAPS": (edited(REGION)(bar0(patched(12, b"\x20"))), "info/region/bar0/fixed", MUST),
    "a BAR of 3 pages": (edited(REGION)(bar0(patched(16, b"\0\x30\0\0"))), "info/region/bar0/size", MUST),
    "two INTx": (edited(IRQ)(patched(12, b"\2")), "info/irq/intx", MUST),
    "another interrupt index": (edited(IRQ)(patched(8, b"\4")), "info/irq/intx", MUST),
    "an interrupt index too many": (accepts(IRQ, echo), "info/irq/none/next", MUST),
    "reads behind the end": (
        accepts(READ, lambda request: request.payload + bytes(16)),
        "region/read/at-end",
        QUIRK,
    ),
    "reads of another place": (edited(READ)(patched(0, b"\1")), "region/read/config-0x8-4", MUST),
    "reads that are short": (edited(READ)(lambda data: again(data[:-1])), "region/read/config-0x0-4", MUST),
    "reads of single bytes that differ": (
        edited(READ)(lambda data: data[:-1] + b"\x55" if len(data) == HEADER_SIZE + 17 else data),
        "region/read/config-byte-by-byte",
        MUST,
    ),
    "writes answered with their data": (
        edited(WRITE)(lambda data: again(data + bytes(2))),
        "region/write/config-command",
        MUST,
    ),
    "writes without their echo": (
        edited(WRITE)(lambda data: again(data[:HEADER_SIZE])),
        "region/write/config-command",
        MUST,
    ),
    "writes to no region": (accepts(WRITE, lambda request: request.payload[:16]), "region/write/region-next", MUST),
    "overlaps accepted": (accepts(MAP), "dma/map/overlap/inside", MUST),
    "overlaps that are EINVAL": (errno_is(errno.EINVAL, MAP), "dma/map/overlap/inside", QUIRK),
    "overlaps that are EBUSY": (errno_is(errno.EBUSY, MAP), "dma/map/overlap/inside", MUST),
    "maps with a payload": (edited(MAP)(lambda data: again(data + bytes(4))), "dma/map/fd", MUST),
    "maps refused": (
        edited(MAP)(lambda data: again(data[:HEADER_SIZE], flags=ERROR, error_no=errno.ENOMEM)),
        "dma/map/no-fd",
        MUST,
    ),
    "unmaps of nothing": (accepts(UNMAP, echo), "dma/unmap/never-mapped", MUST),
    "unmaps without their echo": (edited(UNMAP)(lambda data: again(data[:HEADER_SIZE])), "dma/map/fd", MUST),
    "any SET_IRQS flags": (accepts(SET_IRQS), "irq/intx/flags/no-action", MUST),
    "SET_IRQS behind the end": (accepts(SET_IRQS), "irq/msix/range/at-end", QUIRK),
    "interrupts that cannot be assigned": (
        edited(SET_IRQS)(lambda data: again(data[:HEADER_SIZE], flags=ERROR, error_no=errno.EINVAL)),
        "irq/msix/assign",
        MUST,
    ),
    "any feature": (accepts(FEATURE, echo), "feature/unknown-3/probe", MUST),
    "operations that a feature lacks": (accepts(FEATURE, echo), "feature/migration/probe-set", MUST),
    "no STOP_COPY": (edited(FEATURE)(patched(8, b"\0")), "feature/migration/get-exact", MUST),
    "other feature flags": (edited(FEATURE)(patched(4, b"\x77")), "feature/mig_device_state/get-exact", MUST),
    "migration data while it runs": (
        accepts(Command.MIG_DATA_READ, lambda request: m.MigData(8, 0).pack()),
        "feature/mig_data_read/running",
        MUST,
    ),
    "a RESET with payload": (edited(Command.DEVICE_RESET)(lambda data: again(data + bytes(4))), "region/reset", MUST),
    "replies in another order": (Swapping(), "header/pipelined/one-segment", MUST),
    "STOP refused": (set_state_replies(True, DeviceState.STOP), "migrate/arc/running-to-stop", MUST),
    "back from STOP_COPY to PRE_COPY": (
        set_state_replies(False, DeviceState.PRE_COPY),
        "migrate/arc/stop_copy-to-pre_copy",
        MUST,
    ),
    "a state 0": (set_state_replies(False, DeviceState.ERROR), "migrate/no-state/0", MUST),
    "migration data that are padded": (
        edited(Command.MIG_DATA_READ)(lambda data: again(data + bytes(100))),
        "migrate/save/exact-reply",
        QUIRK,
    ),
    "a stream that never ends": (
        edited(Command.MIG_DATA_READ)(
            lambda data: again(data[:HEADER_SIZE] + m.MigData(12, 4).pack() + b"more") if len(data) == 24 else data
        ),
        "migrate/save/past-the-end",
        MUST,
    ),
    "damaged streams accepted": (
        accepts(FEATURE, echo),
        "migrate/load/damaged/half",
        SHOULD,
    ),
}


SILENT = frozenset({"no answer to a short command"})


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught_by_the_case_that_names_it(mutant: str, tmp_path: Path) -> None:
    twist, case, verdict = MUTANTS[mutant]
    with twisted(tmp_path / "mutant.sock", twist) as server:
        found = by_name(check(server.path, case, timeout=0.5 if mutant in SILENT else TIMEOUT))[case]
    assert found.verdict is verdict, found
    assert found.findings
    assert found.quirks or verdict is not QUIRK


def test_the_honest_server_behind_the_mutants_passes(tmp_path: Path) -> None:
    with twisted(tmp_path / "honest.sock", honest) as server:
        report = check(server.path, modes=EVERYTHING - {Mode.HOSTILE})
    # Each client has a device of its own here: what survives a client does not.
    lost = {name for name in not_passed(report) if name.startswith("migrate/reconnect/")}
    assert not not_passed(report).keys() - lost


def test_every_mutant_names_a_case_that_there_is() -> None:
    names = {case.name for case in server_cases()}
    assert {case for _, case, _ in MUTANTS.values()} <= names


def test_a_server_that_dies_is_reported_at_the_case_that_killed_it(tmp_path: Path) -> None:
    """Then it is gone: nothing more is asked, and that is said."""

    def twist(play: Play, request: Received, reply: Outgoing) -> None:
        if request.header.command == 99:
            server.stop()
            play.close()
        else:
            honest(play, request, reply)

    with twisted(tmp_path / "dying.sock", twist) as server:
        report = check(server.path, "header/")
    found = by_name(report)
    assert [finding.code for finding in found["header/unknown/99"].findings] == ["closed", "died"]
    after = [one for one in report.results if one.name.startswith("header/reserved/")]
    assert {one.verdict for one in after} == {Verdict.SKIPPED}
    assert "gone" in after[0].skipped


def test_descriptors_that_a_server_keeps_are_counted(tmp_path: Path) -> None:
    leaking = Leaking()
    try:
        with twisted(tmp_path / "leaking.sock", leaking) as server:
            found = by_name(check(server.path, "hostile/leak/eventfds"))["hostile/leak/eventfds"]
    finally:
        leaking.close()
    assert [finding.code for finding in found.findings] == ["leak"]


def test_strict_counts_a_quirk(tmp_path: Path) -> None:
    twist, case, _ = MUTANTS["errno 0"]
    with twisted(tmp_path / "quirk.sock", twist) as server:
        lenient = run("check", server.path, "--only", case)
        strict = run("check", server.path, "--only", case, "--strict", "--junit", tmp_path / "report.xml")
    assert lenient.returncode == 0
    assert "quirk:    the Rust crate" in lenient.stdout
    assert strict.returncode == 1
    assert strict.stderr == f"vfio-user: 1 of 1 cases are not as expected, the first is {case}\n"
    assert 'failures="1"' in (tmp_path / "report.xml").read_text()


def test_what_a_server_says_does_not_drive_the_terminal(tmp_path: Path) -> None:
    evil = capabilities(lambda given: {**given, "\x1b]0;owned\x07": 1})
    with twisted(tmp_path / "evil.sock", evil) as server:
        shown = run("check", server.path, "--only", "version/standard", "--junit", tmp_path / "report.xml")
    assert "owned" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "\x1b" not in (tmp_path / "report.xml").read_text()


# Devices that are wrong behind an honest server


class Forgetful(Edu):
    """Reports no page as dirty."""

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        super().dma_logging_report(iova, length, page_size, bitmap)
        bitmap[:] = bytes(len(bitmap))


class Overcautious(Edu):
    """Reports every page as dirty, those behind the last one, too."""

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        bitmap[:] = b"\xff" * len(bitmap)


class CoarseLog(Edu):
    """Chooses to log pages of a size that is none."""

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        super().dma_logging_start(page_size, ranges)
        return 3000


class Restless(Edu):
    """Its state changes while it stands still."""

    saved = 0

    def save(self) -> dict[str, object]:
        self.saved += 1
        return {"saved": self.saved}

    def load(self, saved: dict[str, object], pre_copy: Sequence[bytes]) -> None:
        return


class Amnesiac(Edu):
    """Is another device after a migration."""

    def migration_set_state(self, state: DeviceState) -> None:
        super().migration_set_state(state)
        if state == DeviceState.RUNNING and self.migrated:
            self.region_write(PciRegion.CONFIG, 0x3C, memoryview(b"\x55"))
        self.migrated = state == DeviceState.RESUMING

    migrated = False


DEVICES: dict[type[Edu], tuple[str, str]] = {
    Forgetful: ("logging/edu/one-byte", "dirty"),
    Overcautious: ("logging/report/whole", "dirty"),
    CoarseLog: ("logging/start/4k", "page-size"),
    Restless: ("migrate/save/deterministic", "not-the-same"),
    Amnesiac: ("migrate/load/config", "config"),
}


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_wrong_is_caught(device: type[Edu], tmp_path: Path) -> None:
    case, code = DEVICES[device]
    with Server(device(), tmp_path / "device.sock") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            found = by_name(check(tmp_path / "device.sock", case))[case]
        finally:
            server.shutdown()
            thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert code in {finding.code for finding in found.findings}


def test_numbers_without_bound_end_in_findings(tmp_path: Path) -> None:
    """A region of 2^64-1 bytes, a million interrupts: cases that cannot be asked then say so."""

    def lies(play: Play, request: Received, reply: Outgoing) -> None:
        command = request.header.command
        edits: dict[int, Callable[[bytes], bytes]] = {
            REGION: patched(16, b"\xff" * 8),
            IRQ: patched(12, b"\xff" * 4),
            INFO: patched(8, b"\xff" * 8),
        }
        data = whole(reply)
        play.send(edits[command](data) if command in edits else data, reply.fds)

    with twisted(tmp_path / "lies.sock", lies) as server:
        report = check(server.path, "info", "region", "irq", modes=frozenset({Mode.SAFE}))
    found = by_name(report)
    assert found["info/device"].verdict is MUST
    assert found["info/region/bar0/size"].verdict is MUST
    assert found["info/irq/msix"].verdict is MUST
    assert not any(one.skipped.startswith("the server is gone") for one in report.results)
