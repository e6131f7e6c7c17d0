"""Devices and servers that come and go under a running Linux guest.

Most tests share one guest, which must outlive them all: each plugs into its root port, and unplugs in the end.
"""

from __future__ import annotations

import itertools
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vfio_user.device import Bar, Device, state
from vfio_user.devices.edu import Edu
from vfio_user.pci import DeviceSerialNumber, PcieEndpoint
from vfio_user.testing.linux import GuestProcess, LinuxMachine

from .conftest import Compiler, LinuxFactory, Serve, serving

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

TIMEOUT = 30.0
EDU_ID, ALL_ONES = "0x10000ed", "0xffffffff"
ID, LIVENESS = 0x00, 0x04
SLOT = "/sys/bus/pci/devices/0000:01:00.0"
SERIAL = 0x0123_4567_89AB_CDEF
PROGRAMS = ("pcimem", "edu_dma", "edu_hammer")


class ServeProcess:
    """``vfio-user serve edu`` as a process of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        command = [sys.executable, "-m", "vfio_user", "serve", "edu", "--socket-path", str(path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert str(path) in self._process.stdout.readline()

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send it a signal; its exit status and what it said on stderr."""
        self._process.send_signal(number)
        _, errors = self._process.communicate(timeout=TIMEOUT)
        return self._process.returncode, errors

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def edu_process(tmp_path: Path) -> Iterator[Callable[[], ServeProcess]]:
    """Starts servers; name it before ``linux``, so that the guests are gone before what is left of the servers."""
    with ExitStack() as servers:
        numbers = itertools.count()

        def start() -> ServeProcess:
            server = ServeProcess(tmp_path / f"{next(numbers)}.sock")
            servers.callback(server.close)
            return server

        yield start


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serves devices of this process; name it before ``linux``, too."""
    with serving(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def files(compiled: Compiler) -> dict[str, Path]:
    """Our programs for the guest."""
    return {f"/bin/{name}": compiled(name) for name in PROGRAMS}


@pytest.fixture(scope="module")
def shared(shared_linux: LinuxFactory, files: dict[str, Path]) -> LinuxMachine:
    return shared_linux(ports=[[]], files=files)


@pytest.fixture
def m(shared: LinuxMachine) -> Iterator[LinuxMachine]:
    """The guest that the tests share, its root port empty."""
    yield shared
    if shared.execute(f"test -e {SLOT}")[0] == 0:
        shared.unplug(0)


def bar0(address: str) -> str:
    return f"/sys/bus/pci/devices/{address}/resource0"


def enable(linux: LinuxMachine, address: str, *, bus_master: bool = False) -> None:
    folder = f"/sys/bus/pci/devices/{address}"
    linux.run(f"echo 1 >{folder}/enable")
    if bus_master:
        linux.run(f"pcimem {folder}/config w16:4=6")


def read(linux: LinuxMachine, address: str, register: int) -> str:
    return linux.run(f"pcimem {bar0(address)} r32:{register}").strip()


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_running(linux: LinuxMachine) -> bool:
    return linux.qmp("query-status")["running"] is True and linux.run("echo alive") == "alive\n"


def test_sixteen_hot_plugs_and_unplugs_while_the_device_is_accessed(serve: Serve, m: LinuxMachine) -> None:
    """The server keeps the device's state in between, and nothing of the guest's memory."""
    device = Edu()
    path = serve(device)
    # What fails between two plugs is no matter: what worked is counted.
    loop = f"""
        while :; do
            echo 1 >{SLOT}/enable
            pcimem {SLOT}/resource0 w32:{LIVENESS}=1 r32:{LIVENESS} | grep -q 0xfffffffe && echo >>/tmp/accesses
        done 2>/dev/null
    """
    accessing = m.start(loop)
    for round_ in range(16):
        address = m.plug(path, 0)
        m.run("rm -f /tmp/accesses")
        m.wait_until("test -s /tmp/accesses")
        assert read(m, address, ID) == EDU_ID
        assert m.run(f"cat {SLOT}/vendor") == "0x1234\n"
        m.unplug(0)
        m.run(f"test ! -e {SLOT}")
        wait_until("the server lets go", lambda: device.link is None)
        assert list(device.dma) == [], round_
    accessing.kill()
    assert "nobody cared" not in m.console
    assert is_running(m)


def test_several_functions_are_plugged_and_unplugged_together(serve: Serve, m: LinuxMachine) -> None:
    devices = [Edu(), Edu(), Edu()]
    first, *others = [serve(device) for device in devices]
    for _ in range(2):
        addresses = [m.plug(path, 0, function) for function, path in enumerate(others, start=1)]
        addresses.append(m.plug({"socket": first, "multifunction": True}, 0))
        for address in addresses:
            enable(m, address)
            assert read(m, address, ID) == EDU_ID
        m.unplug(0)
        assert m.run("ls /sys/bus/pci/devices | grep -c ^0000:01 || true") == "0\n"
        wait_until("the servers let go", lambda: all(device.link is None for device in devices))


def test_two_guests_on_two_servers_at_once(
    edu_process: Callable[[], ServeProcess], linux: LinuxFactory, files: dict[str, Path]
) -> None:
    machines = [linux([edu_process().path], files=files) for _ in range(2)]
    for number, m in enumerate(machines):
        enable(m, m.addresses[0], bus_master=True)
        m.run(f"pcimem {bar0(m.addresses[0])} w32:{LIVENESS}={number}")
    copying = [m.start(f"edu_dma {bar0(m.addresses[0])} 100") for m in machines]
    for process in copying:
        process.wait()
    assert [read(m, m.addresses[0], LIVENESS) for m in machines] == [ALL_ONES, "0xfffffffe"]


# A server that ends. QEMU aborts when its server vanishes before it has answered.


def hammering(m: LinuxMachine, address: str) -> GuestProcess:
    """Access the device without a pause from now on."""
    enable(m, address)
    process = m.start(f"edu_hammer {bar0(address)}")
    one = f"pcimem {bar0(address)} r32:{LIVENESS}"
    m.wait_until(f"test $({one}) != $({one})")
    return process


def test_a_server_that_is_terminated_answers_first_and_then_the_guest_reads_all_ones(
    edu_process: Callable[[], ServeProcess], m: LinuxMachine
) -> None:
    for _ in range(4):
        server = edu_process()
        address = m.plug(server.path, 0)
        process = hammering(m, address)
        assert server.end(signal.SIGTERM) == (0, "")
        assert int(process.wait()) > 0
        assert read(m, address, ID) == ALL_ONES
        assert is_running(m)
        m.unplug(0)


def test_a_server_that_is_killed_while_nothing_is_in_flight_reads_as_all_ones(
    edu_process: Callable[[], ServeProcess], m: LinuxMachine
) -> None:
    for _ in range(2):
        server = edu_process()
        address = m.plug(server.path, 0)
        enable(m, address)
        assert read(m, address, ID) == EDU_ID
        server.end(signal.SIGKILL)
        m.wait_until(f"pcimem {bar0(address)} r32:{ID} | grep {ALL_ONES}")
        assert is_running(m)
        m.unplug(0)


# Function-level reset


class Resettable(Device):
    """One register, a PCI Express capability that offers function-level reset, and an extended one."""

    vendor_id, device_id = 0x1234, 0x0F18
    bars = {0: Bar(0x1000)}
    capabilities = (PcieEndpoint(flr=True), DeviceSerialNumber(SERIAL))
    value = state(0)
    resets = 0

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        data[:] = self.value.to_bytes(8, "little")[: len(data)]

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        self.value = int.from_bytes(data, "little")

    def on_reset(self) -> None:
        self.resets += 1


def test_function_level_reset_through_sysfs_resets_the_device_and_linux_restores_it(
    serve: Serve, m: LinuxMachine
) -> None:
    device = Resettable()
    address = m.plug(serve(device), 0)
    assert m.run(f"cat {SLOT}/reset_method").split()[0] == "flr"
    enable(m, address, bus_master=True)
    m.run(f"echo flr >{SLOT}/reset_method")
    before = m.run_bytes(f"cat {SLOT}/config")
    assert before[0x100:0x10C] == struct.pack("<IQ", 0x0001_0003, SERIAL)
    for value in (0x11, 0x22, 0x33):
        resets = device.resets
        m.run(f"pcimem {bar0(address)} w32:0={value}")
        assert read(m, address, 0) == hex(value)
        m.run(f"echo 1 >{SLOT}/reset")
        assert device.resets == resets + 1
        assert m.run_bytes(f"cat {SLOT}/config") == before
        assert read(m, address, 0) == "0"
    m.unplug(0)
