"""Snapshots of a QEMU guest, as far as they need no QEMU: folders that are whole, damaged, or forged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user import __version__
from vfio_user.errors import MigrationError, StreamError, VfioUserError
from vfio_user.live.files import Header
from vfio_user.live.files import Writer as StateWriter
from vfio_user.live.offer import DeviceOffer
from vfio_user.live.qemu import Monitor, MonitorError
from vfio_user.live.qemu.config_image import SIZE, ConfigImage, ConfigWrite
from vfio_user.live.qemu.debugger import Debugger
from vfio_user.live.qemu.gdbstub import GdbStub
from vfio_user.live.qemu.handover import Handover
from vfio_user.live.qemu.machine import MachineShape
from vfio_user.live.qemu.outgoing import do_all
from vfio_user.live.qemu.snapshot_files import (
    MANIFEST,
    MANIFEST_SUM,
    MAX_MANIFEST,
    MEMORY,
    Manifest,
    SavedDevice,
    check_target,
    opened,
    written,
)

from .test_live_qemu import GREETING, TIMEOUT, Peer, image, served

pytestmark = pytest.mark.timeout(60)

OFFER = DeviceOffer(identity="1234:11e8 class ff0000 rev 10", regions=[(0x1000, 3)], irqs=[1], migration=1)
STREAM, TABLE = b"what a device saves" * 10, bytes(range(64))
HANDOVER = Handover(ConfigImage(bytes(range(256))), TABLE)


def write_snapshot(folder: Path, devices: int = 2) -> None:
    """A snapshot that is sound, as far as the folder goes."""
    with written(folder) as writer:
        writer.write(MEMORY, b"QEVM" + os.urandom(100))
        saved = []
        for number in range(devices):
            with writer.create(f"device-{number}.state") as file:
                state = StateWriter(file, Header(__version__, OFFER))
                state.add(STREAM)
                state.end()
            saved.append(
                SavedDevice(
                    name=f"0{number + 1}.0",
                    path=[8 * (number + 1)],
                    offer=OFFER,
                    state=writer.entry(f"device-{number}.state"),
                    config=writer.write(f"device-{number}.config", HANDOVER.config.data),
                    msix=writer.write(f"device-{number}.msix", TABLE),
                )
            )
        writer.publish(
            Manifest(
                format=1,
                package=__version__,
                qemu="11.1.3",
                saved_at="2026-11-23T08:30:00+00:00",
                machine=MachineShape("pc-q35-11.1-machine", 64 << 20, {"ram": 64 << 20}),
                guest_ran=True,
                config_address=0,
                memory=writer.entry(MEMORY),
                devices=saved,
            )
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_snapshot(tmp_path / "snapshot")
    return tmp_path / "snapshot"


@pytest.fixture(scope="module")
def one_for_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which every test leaves the files as they were."""
    folder = tmp_path_factory.mktemp("folder") / "snapshot"
    write_snapshot(folder, devices=1)
    return folder


def refused(folder: Path) -> str:
    """Why a folder is no snapshot."""
    with pytest.raises((VfioUserError, OSError)) as error, opened(folder):
        pass
    return str(error.value)


def test_a_snapshot_is_read_as_it_was_written(folder: Path) -> None:
    with opened(folder) as snapshot:
        assert snapshot.handovers() == [HANDOVER, HANDOVER]
        assert [b"".join(state.records()) for state in snapshot.states] == [STREAM, STREAM]
        for _ in range(2):  # QEMU reads it from the beginning, whatever was read before
            assert os.read(snapshot.memory(), 4) == b"QEVM"


FILES = [MANIFEST, MANIFEST_SUM, MEMORY, "device-0.state", "device-0.config", "device-0.msix"]


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=30)
@given(st.data())
def test_a_byte_that_is_another_is_noticed(one_for_all: Path, name: str, data: st.DataObject) -> None:
    file = one_for_all / name
    good = file.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = data.draw(st.integers(1, 255))
    try:
        file.write_bytes(good[:at] + bytes([good[at] ^ bad]) + good[at + 1 :])
        assert refused(one_for_all).startswith(name if name != MANIFEST_SUM else MANIFEST)
    finally:
        file.write_bytes(good)
    with opened(one_for_all):
        pass


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=30)
@given(st.data())
def test_a_file_that_ends_early_is_noticed(one_for_all: Path, name: str, data: st.DataObject) -> None:
    file = one_for_all / name
    good = file.read_bytes()
    try:
        file.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
        assert "damaged" in refused(one_for_all)
    finally:
        file.write_bytes(good)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"No such file or directory: '{folder / name}'" in refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_only_files_of_the_folder_are_read(folder: Path, tmp_path: Path, name: str) -> None:
    """A link to the very file, a pipe (for whose writer nobody waits), a folder, a socket."""
    file = folder / name
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "symbolic links" in refused(folder)
    file.unlink()
    os.mkfifo(file)
    assert refused(folder) == f"{name}: no regular file"
    file.unlink()
    file.mkdir()
    assert "no regular file" in refused(folder) or "Is a directory" in refused(folder)


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(tmp_path / "file")
    assert f"'{tmp_path / MANIFEST}'" in refused(tmp_path)


def forge(folder: Path, text: bytes) -> str:
    """Why a manifest with a right sum is refused."""
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_SUM).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")
    return refused(folder)


def entry(name: object, size: object = 5, sha256: object = "0" * 64) -> dict[str, object]:
    return {"name": name, "size": size, "sha256": sha256}


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a" * 65, "a\0b", "A", "memory\n", 5, None]
)
def test_a_name_that_leaves_the_folder_is_refused(folder: Path, name: object) -> None:
    (folder.parent / "secret").touch()
    manifest = json.loads((folder / MANIFEST).read_text())
    assert refusal(folder, {**manifest, "memory": entry(name)}).endswith("`$.memory.name`")


def refusal(folder: Path, manifest: object) -> str:
    said = forge(folder, json.dumps(manifest).encode())
    assert said.startswith(MANIFEST)
    assert said.isprintable()
    return said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "a snapshot in format 2; known is 1"),
        ({"format": -1}, "a snapshot in format -1"),
        ({"format": "1"}, "Expected `int`, got `str` - at `$.format`"),
        ({"memory": entry("memory", -1)}, "`$.memory.size`"),
        ({"memory": entry("memory", 1 << 63)}, "`$.memory.size`"),
        ({"memory": entry("memory", 10**400)}, "Expected `int` <= 46"),
        ({"memory": entry("memory", 1e300)}, "Expected `int`, got `float` - at `$.memory.size`"),
        ({"memory": entry("memory", 5, "Z" * 64)}, "`$.memory.sha256`"),
        ({"machine": {"kind": "k", "memory": -5, "backends": {}}}, "`$.machine.memory`"),
        ({"machine": {"kind": "k" * 300, "memory": 5, "backends": {}}}, "`$.machine.kind`"),
        ({"machine": {"kind": "k", "memory": 5, "backends": [1]}}, "`$.machine.backends`"),
        ({"machine": {"kind": "\x1b[2J", "memory": 5, "backends": {}}}, "`$.machine.kind`"),
        ({"qemu": "11\n"}, "`$.qemu`"),
        ({"config_address": 1 << 32}, "`$.config_address`"),
        ({"guest_ran": 1}, "`$.guest_ran`"),
        ({"devices": [None]}, "`$.devices[0]`"),
        ({"more": 1}, "unknown field `more`"),
    ],
)
def test_absurd_manifests_are_refused(folder: Path, changes: dict[str, object], reason: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert reason in refusal(folder, {**manifest, **changes})


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"{}", b'"' + bytes([255]) + b'"', b"[" * 100_000, b'{"format":1', b'{"format":1}'],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_manifest_is_refused(folder: Path, text: bytes) -> None:
    assert forge(folder, text).startswith(MANIFEST)


def test_a_manifest_without_end_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 1 << 40)
    assert refused(folder) == f"{MANIFEST}: more than {MAX_MANIFEST} bytes"


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda device: device.update(path=[]), "`$.devices[0].path`"),
        (lambda device: device.update(path=[256]), "`$.devices[0].path[0]`"),
        (lambda device: device.update(path=[0] * 33), "`$.devices[0].path`"),
        (lambda device: device["offer"].update(migration="all"), "`$.devices[0].offer.migration`"),
        (lambda device: device["offer"].update(migration=7), "device-0.state: the state of another device"),
        (lambda device: device.update(state=device["config"]), "the same file for two things"),
        (lambda device: device.update(config=device["msix"], msix=device["config"]), "of a wrong size"),
    ],
)
def test_devices_that_cannot_be_are_refused(folder: Path, change: Change, reason: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["devices"][0])
    assert reason in forge(folder, json.dumps(manifest).encode())


def test_a_device_that_is_there_twice_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["devices"][1]["path"] = manifest["devices"][0]["path"]
    assert forge(folder, json.dumps(manifest).encode()) == f"{MANIFEST}: two devices in the same place"


def test_more_devices_than_a_guest_can_have_are_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert "of length <= 64 - at `$.devices`" in refusal(folder, {**manifest, "devices": manifest["devices"] * 33})


def test_a_state_that_is_none_is_refused_whatever_its_sum(folder: Path) -> None:
    data = b"not a saved device, and not a short one"
    (folder / "device-0.state").write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["devices"][0]["state"] = entry("device-0.state", len(data), hashlib.sha256(data).hexdigest())
    assert forge(folder, json.dumps(manifest).encode()) == "device-0.state: not a saved device"


# Written whole or not at all


def test_what_is_not_published_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with written(tmp_path / "snapshot") as writer:
        writer.write(MEMORY, b"much")
        assert not (tmp_path / "snapshot").exists()
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(tmp_path / "snapshot")
    assert os.listdir(tmp_path) == []


def test_a_folder_whose_name_may_not_last_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def failing(number: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{number}")) == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(number)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write_snapshot(tmp_path / "snapshot")
    assert os.listdir(tmp_path) == []


def test_a_parent_that_may_be_written_but_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could have the name on disk there; who is root may read it all the same."""
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.R_OK)
    with pytest.raises(PermissionError):
        check_target(tmp_path / "snapshot")


def test_all_is_on_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    sync, rename = os.fsync, os.rename

    def noted(number: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(number)

    def checked(source: Path, target: Path) -> None:
        assert {*FILES, "device-1.state", "device-1.config", "device-1.msix", source.name} == synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    write_snapshot(tmp_path / "snapshot")
    assert tmp_path.name in synced


def test_another_snapshot_that_comes_in_between_is_not_lost(tmp_path: Path) -> None:
    with written(tmp_path / "snapshot") as writer:
        write_snapshot(tmp_path / "snapshot", devices=0)
        manifest = _manifest_of(tmp_path / "snapshot")
        with pytest.raises(OSError, match="not empty"):
            writer.publish(manifest)
    with opened(tmp_path / "snapshot") as snapshot:
        assert snapshot.manifest.devices == []
    assert os.listdir(tmp_path) == ["snapshot"]


def _manifest_of(folder: Path) -> Manifest:
    with opened(folder) as snapshot:
        return snapshot.manifest


def test_summing_up_can_be_interrupted(folder: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(folder, interrupt):
        pass
    with written(folder.parent / "second", interrupt) as writer, pytest.raises(KeyboardInterrupt):
        writer.write(MEMORY, b"data")
    assert os.listdir(folder.parent) == ["snapshot"]


# Its parts


def test_a_device_that_sleeps_is_known_by_its_power_state() -> None:
    asleep: dict[str, int] = {"_6_2": 0x10, "_34_1": 0x40, "_40_1": 1, "_44_2": 0x810B}
    assert image(**asleep).sleep == ConfigWrite(0x44, 2, 0x010B)  # and no event is taken back by it
    assert image(**{**asleep, "_44_2": 0x8108}).sleep is None
    assert image(**{**asleep, "_34_1": 0}).sleep is None
    assert image(_6_2=0x10, _34_1=0xFC, _fc_1=1).sleep is None  # it leaves the image


@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_whatever_a_config_space_says_sleep_is_in_it(data: bytes) -> None:
    found = ConfigImage(data).sleep
    assert found is None or 0x40 <= found.offset <= SIZE - found.width


def test_all_parts_are_done_whatever_fails() -> None:
    done: list[int] = []

    def part(number: int, error: BaseException | None = None) -> Callable[[], None]:
        def act() -> None:
            done.append(number)
            if error:
                raise error

        return act

    assert do_all([part(1, StreamError("first")), part(2), part(3, OSError("third"))]) == ["first", "third"]
    assert done == [1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        do_all([part(4, KeyboardInterrupt()), part(5, MigrationError("fifth")), part(6)])
    assert done == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def lent(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "lent").write_bytes(b"data")
    number = os.open(tmp_path / "lent", os.O_RDONLY)
    yield number
    os.close(number)


def lending(answers: dict[str, object], asked: list[tuple[str, object]], keep: list[int] | None = None) -> Peer:
    """A QEMU that takes descriptors, into ``keep`` if there is one, and answers commands by name; None: it hangs up."""
    known = {"qmp_capabilities": {}, **answers}

    def talk(client: socket.socket) -> None:
        client.sendall(json.dumps(GREETING).encode() + b"\n")
        while True:
            data, more, _, _ = socket.recv_fds(client, 4096, 1)
            if keep is not None:
                keep.extend(more)
            else:
                list(map(os.close, more))
            if not data:
                return
            if data.isspace():  # what carries a descriptor
                continue
            command = json.loads(data)
            name = command["execute"]
            asked.append((name, command.get("arguments")))
            if name not in known:
                reply: dict[str, object] = {"error": {"class": "CommandNotFound", "desc": f"no {name}"}}
            elif known[name] is None:
                return
            else:
                reply = {"return": known[name]}
            client.sendall(json.dumps({**reply, "id": command.get("id")}).encode() + b"\n")

    return talk


def test_a_file_that_is_lent_is_the_peers_for_the_time(tmp_path: Path, lent: int) -> None:
    received: list[int] = []
    asked: list[tuple[str, object]] = []
    peer = lending({"add-fd": {"fd": 9, "fdset-id": 5}, "remove-fd": {}}, asked, received)
    with served(tmp_path / "qmp", peer) as path, Monitor("source", path, TIMEOUT) as monitor:
        with monitor.lent(lent) as uri:
            assert uri == "file:/dev/fdset/5"
            asked.append(("within", None))
        assert [name for name, _ in asked[1:]] == ["add-fd", "within", "remove-fd"]
        assert asked[-1][1] == {"fdset-id": 5}
        (number,) = received
        assert os.read(number, 9) == b"data"
        os.close(number)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({}, "the source QEMU: add-fd: no add-fd"),
        ({"add-fd": {"fd": 5}}, "the source QEMU answers add-fd with what it must not"),
        ({"add-fd": None}, "add-fd: its monitor is gone"),
    ],
)
def test_a_peer_that_takes_no_file_is_named(tmp_path: Path, lent: int, answers: dict[str, object], reason: str) -> None:
    with (
        served(tmp_path / "qmp", lending(answers, [])) as path,
        Monitor("source", path, TIMEOUT) as monitor,
        pytest.raises(MonitorError, match=reason),
        monitor.lent(lent),
    ):
        pass


def human(prints: str) -> dict[str, object]:
    """What a QEMU answers to all that is asked of it to have a gdbstub."""
    return {"query-chardev": [], "getfd": {}, "chardev-add": {}, "chardev-remove": {}, "human-monitor-command": prints}


@pytest.mark.parametrize(
    ("answers", "reason", "last"),
    [
        (human("no, this accelerator does not"), "does not start its gdbstub: no, this acc", "chardev-remove"),
        (human("Waiting for gdb connection"), r"gdbstub: (QEMU hangs up|Broken pipe)", "chardev-remove"),
        (
            {"query-chardev": [], "human-monitor-command": ""},
            "cannot be handed a socket .* with --gdb: .* getfd: no getfd",
            "getfd",
        ),
        ({"query-chardev": [], "getfd": {}}, "chardev-add: no chardev-add", "chardev-add"),
    ],
)
def test_a_qemu_without_a_gdbstub_is_named_and_keeps_nothing(
    tmp_path: Path, answers: dict[str, object], reason: str, last: str
) -> None:
    asked: list[tuple[str, object]] = []

    with served(tmp_path / "qmp", lending(answers, asked)) as path, Monitor("destination", path, TIMEOUT) as monitor:
        with pytest.raises(MigrationError, match=reason):
            Debugger(monitor, TIMEOUT).write(0x1000, b"data")
        assert asked[-1][0] == last


def test_a_socket_that_a_killed_check_has_left_is_removed_first(tmp_path: Path) -> None:
    asked: list[tuple[str, object]] = []
    answers = human("Waiting for gdb connection") | {"query-chardev": [{"label": "vfio-user-gdb", "filename": "fd"}]}
    with served(tmp_path / "qmp", lending(answers, asked)) as path, Monitor("destination", path, TIMEOUT) as monitor:
        with pytest.raises(MigrationError, match="gdbstub: "):
            Debugger(monitor, TIMEOUT).check()
        assert [name for name, _ in asked[1:5]] == [
            "query-chardev",
            "human-monitor-command",
            "chardev-remove",
            "getfd",
        ]


@pytest.mark.parametrize("path", [None, "/ours"])
def test_a_gdbstub_of_somebody_else_is_left_alone(tmp_path: Path, path: str | None) -> None:
    asked: list[tuple[str, object]] = []
    answers: dict[str, object] = {"query-chardev": [{"label": "gdb", "filename": "unix:/theirs,server=on"}]}
    with served(tmp_path / "qmp", lending(answers, asked)) as qmp, Monitor("destination", qmp, TIMEOUT) as monitor:
        with pytest.raises(MigrationError, match=r"has a gdbstub .*/theirs.*: end it first, by gdbserver none"):
            Debugger(monitor, TIMEOUT, path).check()
        assert asked[-1][0] == "query-chardev"


def test_a_gdbstub_that_says_a_little_now_and_then_is_late(tmp_path: Path) -> None:
    """However often: so a wait for each byte would never end."""
    late = threading.Event()

    def talk(client: socket.socket) -> None:
        with suppress(OSError):
            while not late.wait(0.05):
                client.sendall(b"+")

    with served(tmp_path / "gdb", talk) as path:
        with pytest.raises(MigrationError, match=r"gdbstub at .*: timed out"):
            GdbStub(path, 0.2)
        late.set()
