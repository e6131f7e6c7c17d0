"""The pytest plugin as others have it: found by an entry point, in a pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vfio_user.testing.qemu import QemuError, find_qemu

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/test_my_device.py"
PLUGIN = "vfio_user.testing.pytest_plugin"
TIMEOUT = 50


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with what an installed package has for pytest to find the plugin by."""
    folder = tmp_path / "site"
    metadata = folder / "plugin_of_vfio_user-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-vfio-user\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[pytest11]\n{PLUGIN} = {PLUGIN}\n")
    return folder


def run(test: Path, installed: Path, **env: str) -> str:
    """What pytest says about a test, which knows nothing of how this project's tests are run."""
    arguments = ("-c", os.devnull, "--rootdir", str(test.parent), "-p", "no:cacheprovider", "-p", "no:randomly", "-rsA")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, str(test)],
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1", **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return done.stdout or done.stderr


def outcome(output: str) -> dict[str, int]:
    """How many tests passed, failed, had an error, were skipped."""
    return {
        what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|error|skipped)", output.splitlines()[-1])
    }


def test_the_example_runs(installed: Path) -> None:
    try:
        qemu = find_qemu()
    except QemuError:
        qemu = None
    output = run(EXAMPLE, installed)
    assert outcome(output) == ({"passed": 6} if qemu else {"passed": 5, "skipped": 1}), output


def test_the_manual_has_a_whole_test(installed: Path, tmp_path: Path) -> None:
    first, _, _ = (ROOT / "docs/testing.md").read_text().partition("```python\n")[2].partition("```")
    test = tmp_path / "test_of_the_manual.py"
    test.write_text(first)
    output = run(test, installed)
    assert outcome(output) == {"passed": 1}, output


def test_who_does_not_use_it_does_not_pay_for_it() -> None:
    program = f"import {PLUGIN}, sys; print(*sorted(name for name in sys.modules if name.startswith('vfio_user')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert done.stdout.split() == ["vfio_user", "vfio_user.testing", PLUGIN]


FAILING = """
import os

import pytest

from vfio_user import Bar, Device

pytest_plugins = ["vfio_user.testing.pytest_plugin"]  # as well as by its entry point


class Broken(Device):
    vendor_id, device_id, msix_vectors = 0x494F, 0x0DCA, 1
    bars = {0: Bar(0x1000)}

    def bar_read(self, bar, offset, data):
        raise SystemExit("a bug of the device")


def test_leaks(vfio_user_fd_leak_check):
    os.open("/dev/null", os.O_RDONLY)


def test_server_fails(vfio_user_server, vfio_user_client):
    client = vfio_user_client(vfio_user_server(Broken()))
    with pytest.raises(OSError):
        client.region_read(0, 0, 4)


def test_waits_for_nothing(vfio_user_server, vfio_user_client, vfio_user_interrupts):
    client = vfio_user_client(vfio_user_server(Broken()))
    with pytest.raises(TimeoutError, match="no interrupt on vector 0"):
        vfio_user_interrupts(client, 2).wait(timeout=0.01)


def test_client_leaves_early(vfio_user_client, vfio_user_interrupts, vfio_user_memory, vfio_user_server):
    server = vfio_user_server(Broken())
    client = vfio_user_client(server.path)
    vfio_user_memory(client)
    vfio_user_interrupts(client, 2)
    client.close()
    server.stop()


def test_needs_qemu(vfio_user_qemu):
    raise AssertionError("there is none")
"""


@pytest.mark.parametrize("required", [False, True])
def test_what_fails_is_said(installed: Path, tmp_path: Path, required: bool) -> None:
    test = tmp_path / "test_failing.py"
    test.write_text(FAILING)
    output = run(test, installed, VFIO_USER_QEMU="/nowhere/qemu", VFIO_USER_REQUIRE_QEMU=str(int(required)))
    without_qemu = {"error": 3} if required else {"error": 2, "skipped": 1}
    assert outcome(output) == {"passed": 4, **without_qemu}, output
    assert "AssertionError: file descriptors were left open: " in output
    assert "SystemExit: a bug of the device" in output
    assert "VFIO_USER_QEMU=/nowhere/qemu is not an executable" in output
