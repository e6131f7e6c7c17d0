"""Several devices in one process, as a library has it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfio_user import Client
from vfio_user.errors import CallTimeoutError, UsageError, VfioUserError
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.tools.running import Command, private_sockets
from vfio_user.tools.serving import DeviceSpec, Service

TIMEOUT = 20.0
FAULTY = (
    "from vfio_user import Bar, Device\n"
    "class Faulty(Device):\n"
    "    vendor_id, device_id = 0x1234, 0x5678\n"
    "    bars = {0: Bar(0x1000)}\n"
    "    def bar_read(self, bar, offset, data):\n"
    "        raise SystemExit('enough')\n"
)


@contextmanager
def in_thread(work: Callable[[], None]) -> Iterator[None]:
    """``work`` in a thread that has ended after the block; what it raised is raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def specs(folder: Path, *names: str) -> list[DeviceSpec]:
    return [DeviceSpec(name, folder / str(number)) for number, name in enumerate(names)]


def test_each_is_served_to_clients_of_its_own(tmp_path: Path) -> None:
    with no_fd_leaks():
        service = Service(specs(tmp_path, "edu", "edu", "gpio"))
        assert service.socket_paths == [tmp_path / "0", tmp_path / "1", tmp_path / "2"]
        with service, in_thread(service.serve):
            with Client.connect(tmp_path / "0", TIMEOUT) as one, Client.connect(tmp_path / "1", TIMEOUT) as other:
                one.region_write(0, 4, b"\1\0\0\0")
                assert other.region_read(0, 4, 4) == bytes(4)
                assert one.region_read(0, 4, 4) == b"\xfe\xff\xff\xff"
            with Client.connect(tmp_path / "2", TIMEOUT):
                service.stop()
    assert not list(tmp_path.iterdir())


def test_a_stop_before_it_serves_is_not_lost(tmp_path: Path) -> None:
    with Service(specs(tmp_path, "edu", "gpio")) as service:
        service.stop()
        with in_thread(service.serve):
            pass


@pytest.mark.parametrize(
    ("name", "place"),
    [("edu", "no/such/folder"), ("edu", "0"), ("nothing", "1"), ("edu", "1" * 200)],
    ids=["folder", "taken", "device", "long"],
)
def test_all_or_none(tmp_path: Path, name: str, place: str) -> None:
    with no_fd_leaks(), pytest.raises((OSError, UsageError)):
        Service([DeviceSpec("edu", tmp_path / "0"), DeviceSpec(name, tmp_path / place)])
    assert not list(tmp_path.iterdir())


def test_leaving_the_block_ends_what_is_served_in_another_thread(tmp_path: Path) -> None:
    with no_fd_leaks():
        service = Service(specs(tmp_path, "edu", "gpio"))
        with in_thread(service.serve), Client.connect(tmp_path / "0", TIMEOUT), service:
            pass
        service.close()
        service.stop()


def test_a_connected_socket_ends_with_its_client(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with Service([DeviceSpec("edu", fd=theirs.detach())]) as service, in_thread(service.serve):
        Client(ours, TIMEOUT).close()


def test_a_number_that_is_no_socket_is_named(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="--fd"):
        Service([DeviceSpec("edu", fd=os.dup(file.fileno()))])


def test_a_failure_ends_the_others_and_is_raised(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    service = Service(specs(tmp_path, "edu", f"{tmp_path}/faulty.py:Faulty"))

    def have_it_fail() -> None:
        first, second = (Client.connect(tmp_path / name, TIMEOUT) for name in ("0", "1"))
        with first, second, pytest.raises(ConnectionError):
            second.region_read(0, 0, 4)

    failed = pytest.raises(VfioUserError, match=r"faulty\.py:Faulty at .* failed: SystemExit: enough")
    with service, in_thread(have_it_fail), failed:
        service.serve()


def test_a_callback_that_fails_ends_what_is_served(tmp_path: Path) -> None:
    def fail(text: str) -> None:
        raise RuntimeError("no place for reports")

    with Service(specs(tmp_path, "edu", "gpio"), fail, handle_signals=True) as service:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(RuntimeError, match="no place"):
            service.serve()


def test_signals_are_handled_by_turns_and_given_back(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    reports: list[str] = []
    spec = DeviceSpec("edu", tmp_path / "0", filters=("stats",))
    with Service([spec], reports.append, handle_signals=True) as service:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        service.serve()
    assert len(reports) == 3
    assert all(report.startswith(f"Edu at {tmp_path}/0:\n") for report in reports)
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_another_thread_gets_is_heard(tmp_path: Path) -> None:
    """Handlers run in the main thread only, which such a signal does not interrupt."""

    def get_signal() -> None:
        Client.connect(tmp_path / "0", TIMEOUT).close()
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    with Service(specs(tmp_path, "edu"), handle_signals=True) as service, in_thread(get_signal):
        service.serve()


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Service(specs(tmp_path, "edu"), handle_signals=True):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_more_events_than_the_pipe_holds(tmp_path: Path) -> None:
    with Service(specs(tmp_path, "edu")) as service:
        for _ in range(100_000):
            service.stop()
        service.serve()


def test_a_command_and_its_service_end_together(tmp_path: Path) -> None:
    with no_fd_leaks(), Service(specs(tmp_path, "edu")) as service:
        with Command(f"test -S $VFIO_USER_SOCKET && exit 7; cat {tmp_path}", service.socket_paths, 100) as command:
            service.serve(command)
        assert command.status == 7


def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    with Service(specs(tmp_path, "edu")) as service:
        with Command("trap '' TERM; while :; do sleep 1; done", (), 100, grace=0.1) as command:
            service.stop()
            service.serve(command)
        assert command.status in (128 + signal.SIGKILL, 128 + signal.SIGTERM)  # the latter: before it came to the trap


def test_leaving_the_block_kills_the_command() -> None:
    with pytest.raises(KeyError), Command("sleep 600 & wait", (), 100) as command:
        raise KeyError
    assert command.status == 128 + signal.SIGKILL


def test_private_sockets_are_for_those_without_a_place(tmp_path: Path) -> None:
    given = [DeviceSpec("edu"), DeviceSpec("edu", tmp_path / "a"), DeviceSpec("edu", fd=5), DeviceSpec("edu")]
    with private_sockets(given) as placed:
        first, *same, last = (spec.socket_path for spec in placed)
        assert same == [tmp_path / "a", None]
        assert first is not None
        assert last is not None
        assert first != last
        assert first.parent == last.parent
        assert first.parent.stat().st_mode & 0o777 == 0o700
    assert not first.parent.exists()


def test_what_a_plain_device_does_not_need_is_not_imported(tmp_path: Path) -> None:
    """A server that is idle is small, and starts fast."""
    program = (
        "import sys, signal, threading\n"
        "from vfio_user.cli.serve import serve\n"
        "import vfio_user.tools.serving as serving\n"
        "serving.Service.serve = lambda service: None\n"
        "serve(['gpio', '--socket-path', sys.argv[1]], standalone_mode=False)\n"
        "unwanted = {'importlib.metadata', 'tomllib', 'subprocess', 'tempfile', 'asyncio', 'rich', 'hypothesis'}\n"
        "print(sorted(unwanted & set(sys.modules)), [m for m in sys.modules if m.startswith('vfio_user.filters')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "s")],
        capture_output=True, text=True, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[] []"


STUCK = """
import time
from vfio_user import Bar, Device

class Stuck(Device):
    vendor_id, device_id, bars = 0x494F, 1, {0: Bar(16)}

    def bar_read(self, bar, offset, data):
        time.sleep(600)
"""


@pytest.mark.parametrize(("told", "patience"), [(1, 0.2), (2, 600.0)])
def test_a_hook_that_does_not_return_is_given_up(tmp_path: Path, told: int, patience: float) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    all_specs = specs(tmp_path, f"{tmp_path}/stuck.py:Stuck", "edu")
    with (
        Service(all_specs, patience=patience) as service,
        in_thread(lambda: read_in_vain(tmp_path / "0", service, told)),
        pytest.raises(VfioUserError, match=r"Stuck at .* does not end: a hook"),
    ):
        service.serve()
    assert not list(tmp_path.glob("[01]")), "sockets are left"


def read_in_vain(path: Path, service: Service, told: int) -> None:
    with Client.connect(path, 0.5) as client, pytest.raises(CallTimeoutError):
        client.region_read(0, 0, 4)
    for _ in range(told):
        service.stop()
