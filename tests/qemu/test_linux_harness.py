"""The Linux harness itself, without any of our devices: what it says is what the guest does."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user.testing.linux import (
    MAX_COMMAND,
    Guest,
    GuestCommandError,
    LinuxMachine,
    find_guest,
    load_order,
)
from vfio_user.testing.qemu import QemuError, QemuTimeoutError, QmpError

from .conftest import LinuxFactory, linux_machines

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

RANDOM = random.Random(1).randbytes(100_000)
FILES: dict[str, bytes | Path] = {
    **{f"/deep/down/{size}": RANDOM[:size] for size in range(6)},
    **{f"/{'n' * length}": b"" for length in range(1, 5)},
    "/räksmörgås": b"not ASCII",
    "/random": RANDOM,
    "/from-a-path": Path(__file__),
}


@pytest.fixture(scope="module")
def shared(qemu: Path, guest: Guest) -> Iterator[LinuxMachine]:
    """One machine for all tests that leave it running."""
    with linux_machines(qemu, guest) as start:
        yield start(
            files=FILES, modules=["uio-pci-generic"], memory=200 << 20, cpus=2, append="some.word=1", ports=[[]]
        )


# Commands


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("true", ""),
        ("echo one; echo two >&2", "one\ntwo\n"),
        ("printf 'no end of line'", "no end of line"),
        ("printf '1 0 5\\n2 0 5\\nready\\n'", "1 0 5\n2 0 5\nready\n"),
        ("printf '\\0\\1\\3\\4\\21\\23\\r\\n'", "\0\1\3\4\x11\x13\r\n"),
        ("cat <<'end'\n$x `y` \"z\"\nend", '$x `y` "z"\n'),
        ("echo äöü ∀", "äöü ∀\n"),
        ("cat", ""),  # nothing to read
        ("cd /proc; x=5; pwd; echo $x", "/proc\n5\n"),
        ("pwd; echo $x", "/\n\n"),
    ],
)
def test_a_command_gives_what_it_prints(shared: LinuxMachine, command: str, output: str) -> None:
    assert shared.run(command) == output


def test_any_bytes_come_through(shared: LinuxMachine) -> None:
    assert shared.run_bytes("cat /random") == RANDOM
    assert shared.run("echo next") == "next\n"


def test_a_command_that_fails_says_all_there_is_to_say(shared: LinuxMachine) -> None:
    with pytest.raises(
        GuestCommandError, match=r"(?s)guest: echo oh; exit 7: exit status 7\noh\n.*stderr.*/init"
    ) as error:
        shared.run("echo oh; exit 7")
    assert (error.value.status, error.value.output) == (7, "oh\n")
    assert shared.execute("kill -9 $$")[0] == 128 + signal.SIGKILL
    assert shared.execute("no-such-command")[0] == 127
    assert shared.execute("if")[0] == 2


def test_who_is_left_in_the_background_does_not_disturb_the_next(shared: LinuxMachine) -> None:
    shared.run("mkfifo /tmp/go; (read -r x </tmp/go; echo late; echo done >/tmp/went) & echo early")
    assert shared.run("echo >/tmp/go; until test -s /tmp/went; do usleep 1000; done; echo now") == "now\n"


def test_a_command_that_is_too_long_is_refused_and_the_machine_goes_on(shared: LinuxMachine) -> None:
    longest = "#" * (MAX_COMMAND * 3 // 4)
    assert shared.run(longest) == ""
    with pytest.raises(ValueError, match="too long"):
        shared.run(longest + "#")
    assert shared.run("echo on") == "on\n"


def test_processes_in_the_background(shared: LinuxMachine) -> None:
    waiting = shared.start('echo first; mkfifo /tmp/wait; read -r word </tmp/wait; echo "it\'s $word"')
    failing = shared.start("echo no; exit 9")
    endless = shared.start("while :; do :; done")
    shared.wait_until("test -e /tmp/wait")
    assert waiting.output == "first\n"
    shared.run("echo good >/tmp/wait")
    assert waiting.wait() == "first\nit's good\n"
    with pytest.raises(GuestCommandError, match=r"guest: echo no; exit 9: exit status 9\nno\n") as failed:
        failing.wait()
    assert (failed.value.status, failed.value.output) == (9, "no\n")
    endless.kill()
    with pytest.raises(GuestCommandError) as killed:
        endless.wait()
    assert killed.value.status == 128 + signal.SIGTERM


def test_waits_end_and_the_machine_goes_on(shared: LinuxMachine) -> None:
    with pytest.raises(QemuTimeoutError, match=r"(?s)guest: echo still; false: failed for 0\.1 s: still.*/init"):
        shared.wait_until("echo still; false", timeout=0.1)
    with pytest.raises(QemuTimeoutError, match=r"(?s)console 'the moon': not within 0\.1 s.*/init"):
        shared.wait_console("the moon", timeout=0.1)
    assert shared.wait_until("echo on") == "on\n"


# The machine


def test_the_machine_is_what_was_asked_for(shared: LinuxMachine) -> None:
    assert "some.word=1" in shared.run("cat /proc/cmdline")
    assert shared.run("nproc") == "2\n"
    kilobytes = int(shared.run("cat /proc/meminfo").split()[1])
    assert 100 << 10 < kilobytes < 200 << 10
    assert shared.run("lsmod").count("uio") == 3  # each, and one that uses the other
    assert {fd.readlink() for fd in Path(f"/proc/{shared.pid}/fd").iterdir() if "memfd" in str(fd.readlink())}


def test_files_are_in_the_guest_byte_for_byte(shared: LinuxMachine) -> None:
    for name, data in FILES.items():
        content = data if isinstance(data, bytes) else data.read_bytes()
        assert shared.run(f"sha256sum <{name}").split()[0] == hashlib.sha256(content).hexdigest()
        shared.run(f"test -x {name}")


def test_the_console_has_all_that_the_kernel_prints(shared: LinuxMachine) -> None:
    assert shared.console.startswith("[    0.000000] Linux version 6.")
    assert "\r" not in shared.console
    shared.run("echo a word in between >/dev/kmsg")
    shared.wait_console("a word in between")


def test_a_device_without_a_server_is_refused_and_the_machine_goes_on(shared: LinuxMachine, tmp_path: Path) -> None:
    with pytest.raises(QmpError, match=r"nobody\.sock"):
        shared.plug(tmp_path / "nobody.sock", 0)
    assert shared.run("echo on") == "on\n"


# Ends


def test_a_panic_ends_with_the_console_at_once(linux: LinuxFactory) -> None:
    m = linux()
    with pytest.raises(QemuError, match=r"(?s)guest: echo c .*exit status 0.*sysrq: Trigger a crash.*Kernel panic"):
        m.run("echo c >/proc/sysrq-trigger")
    with pytest.raises(QemuError, match=r"(?s)guest: true.*Kernel panic"):  # and it stays so
        m.run("true")


def test_a_guest_that_hangs_ends_in_time_and_leaves_nothing(qemu: Path, guest: Guest) -> None:
    before = os.listdir("/proc/self/fd")
    m = LinuxMachine(qemu, guest)
    with pytest.raises(QemuTimeoutError, match=r"(?s)guest: cat /dev/ttyS0: not within 0\.5 s .*killed.*/init"):
        m.run("cat /dev/ttyS0", timeout=0.5)
    assert not Path(f"/proc/{m.pid}").exists()
    assert os.listdir("/proc/self/fd") == before


def test_a_boot_that_fails_says_why(linux: LinuxFactory) -> None:
    with pytest.raises(QemuError, match=r"(?s)^boot: .*Kernel panic - not syncing: VFS"):
        linux(append="rdinit=/no-such-init")


def test_a_boot_that_takes_too_long_ends_in_time(linux: LinuxFactory) -> None:
    with pytest.raises(QemuTimeoutError, match=r"^boot: not within 0\.5 s .*killed"):
        linux(timeout=0.5)


def test_a_refusal_to_start_carries_stderr_and_leaks_no_fd(qemu: Path, guest: Guest) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(QemuError, match=r"(?s)^QMP .*exit status 1.*no-such-device"):
        LinuxMachine(qemu, guest, extra_args=["-device", "no-such-device"])
    assert os.listdir("/proc/self/fd") == before


# What a guest is made of


def test_modules_come_after_what_they_depend_on(guest: Guest) -> None:
    order = list(load_order(guest, ["vfio-pci", "vfio_iommu_type1"]))
    for first, second in (("vfio", "vfio_pci_core"), ("vfio_pci_core", "vfio_pci"), ("vfio", "vfio_iommu_type1")):
        assert order.index(first) < order.index(second)
    assert all(module.startswith(b"\x7fELF") for module in load_order(guest, ["uio"]).values())


def test_modules_that_are_built_in_are_not_loaded_and_those_that_are_not_there_are_refused(guest: Guest) -> None:
    assert load_order(guest, ["nvme"]) == {}
    with pytest.raises(QemuError, match=r"vmlinuz-\S+ has no module nonsense"):
        load_order(guest, ["nonsense"])


@pytest.mark.parametrize(
    ("names", "missing"), [((), "kernel"), (("boot/vmlinuz-1",), "busybox"), (("usr/bin/busybox",), "kernel")]
)
def test_a_guest_that_is_not_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VFIO_USER_GUEST", raising=False)
    assert find_guest() is None
    root = tmp_path / ".qemu/guest"
    root.mkdir(parents=True)
    for name in names:
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    with pytest.raises(QemuError, match=rf"{re.escape(str(root))}: no {missing}"):
        find_guest()
    monkeypatch.setenv("VFIO_USER_GUEST", str(tmp_path / "elsewhere"))
    with pytest.raises(QemuError, match="elsewhere: no kernel"):
        find_guest()
