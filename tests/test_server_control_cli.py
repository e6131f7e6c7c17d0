"""``serve --control``, and the commands that look at a device through a control socket."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user import Client, DeviceState
from vfio_user.client.control import AccessMode, ControlClient
from vfio_user.errors import UsageError
from vfio_user.tools.configuration import read_configuration
from vfio_user.tools.serving import DeviceSpec, Service

from .device_support import TIMEOUT
from .test_cli import run
from .test_cli_serve import line_of, serving

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An edu that a client uses at "s", with a control socket at "c"."""
    spec = DeviceSpec("edu", tmp_path / "s", control=tmp_path / "c")
    with Service([spec]) as service:
        thread = threading.Thread(target=service.serve)
        thread.start()
        with Client.connect(tmp_path / "s", TIMEOUT) as primary:
            primary.region_write(0, 4, (1).to_bytes(4, "little"))
            yield tmp_path
            assert primary.region_read(0, 4, 4) == b"\xfe\xff\xff\xff"
        service.stop()
        thread.join(TIMEOUT)
    assert not (tmp_path / "c").exists()


def test_info_and_read(folder: Path) -> None:
    told = json.loads(run("info", folder / "c", "--json").stdout)
    assert told["pci"]["vendor_id"] == "1234"
    assert told["migration"]["state"] == "RUNNING"
    assert run("read", folder / "c", "bar0+4:u32").stdout.split()[-1] == "0xfffffffe"
    refused = run("write", folder / "c", "bar0+4:u32=7")
    assert refused.returncode == 1
    assert "REGION_WRITE refused: Operation not permitted" in refused.stderr


def test_save_leaves_the_device_running(folder: Path) -> None:
    assert run("save", folder / "c", folder / "state").returncode == 0
    assert (folder / "state").stat().st_size > 4096
    with ControlClient.connect(folder / "c", TIMEOUT) as control:
        assert control.status().state is DeviceState.RUNNING
        assert control.status().access is AccessMode.PASS


def test_check_finds_nothing(folder: Path) -> None:
    """All of it: what is not for a control socket is left out, and no case reaches the device of the other client."""
    report = json.loads(run("check", folder / "c", "--all", "--json").stdout)
    assert (report["failed"], report["should"]) == (0, 0)
    assert report["passed"] > 300


def test_serve_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with serving("gpio", "--socket-path", tmp_path / "s", "--control", path) as process:
        line_of(process, start="Cloud Hypervisor")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with ControlClient.connect(path, TIMEOUT) as control:
            assert control.region_read(7, 0, 2) == b"\x4f\x49"
        process.terminate()
        assert process.wait(TIMEOUT) == 0
        assert not path.exists()


def test_two_sockets_at_one_place_are_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two sockets at"):
        Service([DeviceSpec("edu", tmp_path / "s", control=tmp_path / "s")])


def test_a_control_socket_that_cannot_be_made_names_it_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        Service([DeviceSpec("edu", tmp_path / "s", control=tmp_path / "missing" / "c")])
    assert not (tmp_path / "s").exists()


def test_a_file_of_devices_has_it_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text('[[device]]\ndevice = "edu"\nsocket-path = "s"\ncontrol = "c"\n')
    (spec,) = read_configuration(tmp_path / "lab.toml")
    assert spec.control == tmp_path / "c"
