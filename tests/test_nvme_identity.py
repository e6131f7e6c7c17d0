"""What a disk is called so that hosts tell it from all others, and options that make no disk."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user.devices.nvme import Nvme
from vfio_user.devices.nvme.paths import identity_of, serial_of

from .nvme_gate_support import Desk

SIZE = 1 << 20


@contextlib.contextmanager
def disks(*paths: str | Path, **options: object) -> Iterator[Nvme]:
    first, *others = map(str, paths)
    with contextlib.closing(Nvme(path=first, more=",".join(others), size=SIZE, **options)) as device:
        yield device


def names_of(device: Nvme) -> tuple[str, str, list[uuid.UUID]]:
    return (
        device.identity.serial,
        device.identity.qualified_name,
        [namespace.identity for namespace in device.namespaces.values()],
    )


def test_the_same_files_are_the_same_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the server was started again, from another folder, by a link, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("two")
    with disks("one", "two") as device:
        first = names_of(device)
    monkeypatch.chdir("/")
    with disks(tmp_path / "one", tmp_path / "link") as device:
        assert names_of(device) == first


def test_another_disk_under_the_same_number_is_another_one(tmp_path: Path) -> None:
    """A host that keeps what it has read of one must not take it for the other."""
    with disks(tmp_path / "one", tmp_path / "two") as device, contextlib.closing(Desk(device)) as desk:
        before = desk.driver.namespace_descriptors(2)
        desk.in_device(lambda: device.remove_namespace(2))
        desk.in_device(lambda: device.add_namespace(str(tmp_path / "three"), size=SIZE))
        assert desk.driver.namespace_descriptors(2).values() != before.values()
        desk.in_device(lambda: device.remove_namespace(2))
        desk.in_device(lambda: device.add_namespace(str(tmp_path / "two")))
        assert desk.driver.namespace_descriptors(2) == before


def test_memory_is_never_the_same_again() -> None:
    with disks("memory:", serial="same") as one, disks("memory:", serial="same") as other:
        assert one.namespaces[1].identity != other.namespaces[1].identity


def test_the_first_storage_that_is_there_names_the_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with disks("", "one") as one, disks("", "two") as two:
        assert names_of(one)[:2] != names_of(two)[:2]
    with disks("one") as again:
        assert names_of(again) == names_of(one)


def test_an_export_is_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "nbd://host/export"
    before = serial_of([uri]), identity_of("controller", uri)
    monkeypatch.chdir(tmp_path)
    assert (serial_of([uri]), identity_of("controller", uri)) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "one", "more": "two,link"}, "two is given twice"),
        ({"path": "nbd://host/a", "more": "nbd://host/a"}, "nbd://host/a is given twice"),
        ({"path": "new", "size": 1536, "block_size": 4096}, "size=1536: no whole blocks of 4096"),
        ({"path": "new", "size": SIZE, "block_size": 1000}, "blocks of 1000 bytes"),
        ({"path": "", "block_size": 1000}, "blocks of 1000 bytes"),
        ({"path": "memory:", "serial": "Ä1"}, "serial=Ä1: at most 20 characters of ASCII"),
        ({"path": "memory:", "model": "Größe"}, "ASCII"),
    ],
)
def test_what_makes_no_disk_is_refused_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("two")
    with pytest.raises(ValueError, match=words):
        Nvme(**options)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
