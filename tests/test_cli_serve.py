"""``vfio-user serve`` as a process: several devices, files of them, commands that are run along, filters, help."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfio_user import Client

COMMAND = [sys.executable, "-m", "vfio_user", "serve"]
TIMEOUT = 30
EDU_ID = b"\xed\x00\x00\x01"
GPIO_VENDOR = b"\x4f\x49"


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
    )


@contextmanager
def serving(*arguments: str | Path, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str], *, start: str) -> str:
    """The first line of stdout that begins so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line.removeprefix(start).strip()
    raise AssertionError(f"it ended without a line {start}: {process.communicate()}")


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie that nobody has taken yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Several devices


def test_two_devices_in_one_process(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with serving("edu", "--socket-path", first, "--", "gpio", "--socket-path", second) as process:
        line_of(process, start="Gpio ")
        with Client.connect(first, TIMEOUT) as edu, Client.connect(second, TIMEOUT) as gpio:
            assert edu.region_read(0, 0, 4) == EDU_ID
            assert gpio.region_read(7, 0, 2) == GPIO_VENDOR
            process.terminate()
            assert process.wait(TIMEOUT) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not list(tmp_path.iterdir())


def test_if_one_socket_cannot_be_made_there_is_none(tmp_path: Path) -> None:
    done = run("edu", "--socket-path", tmp_path / "a", "--", "edu", "--socket-path", tmp_path / "no" / "b")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vfio-user: {tmp_path}/no/b: No such file or directory\n"
    assert not list(tmp_path.iterdir())


def test_it_ends_when_all_clients_of_connected_sockets_have_left() -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    numbers = [theirs.fileno() for _, theirs in pairs]
    with serving(
        "edu", "--fd", str(numbers[0]), "--", "gpio", "--fd", str(numbers[1]), pass_fds=tuple(numbers)
    ) as process:
        for _, theirs in pairs:
            theirs.close()
        with Client(pairs[0][0], TIMEOUT) as edu:
            assert edu.region_read(0, 0, 4) == EDU_ID
        with Client(pairs[1][0], TIMEOUT) as gpio:
            assert gpio.region_read(7, 0, 2) == GPIO_VENDOR
            assert process.poll() is None
        assert process.wait(TIMEOUT) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "DEVICE is missing"),
        (["--"], "device 1 is missing"),
        (["edu", "--socket-path", "a", "--"], "device 2 is missing"),
        (["--", "--weird"], "--weird"),
        (["edu", "--socket-path", "a", "--", "-weird"], "-w"),
        (["edu", "gpio", "--socket-path", "a"], "gpio"),
        (["edu", "--socket-path", "a", "--", "edu"], "device 2: edu needs one of --socket-path and --fd"),
        (["edu", "--socket-path", "a", "--", "nothing", "--socket-path", "b"], "device 2: no device 'nothing'"),
        (["edu", "--socket-path", "a", "--", "edu", "--socket-path", "a"], "two devices at a"),
        (["edu", "--fd", "9", "--", "edu", "--fd", "9"], "two devices at --fd 9"),
        (["edu", "--run", "true", "--", "edu", "--run", "true"], "--run is given twice"),
        (["edu", "--run", "true", "--socket-path", "a", "--fd", "7"], "takes --socket-path or --fd, not both"),
        (["edu", "--socket-path", "a", "--filter", "sieve"], "stats"),
        (["edu", "--socket-path", "a", "--filter", "delay:region_read=soon"], "soon"),
        (["ivshmem", "-o", "=1", "--socket-path", "a"], "no option ''"),
        (["nvme", "-o", "size=much", "--socket-path", "a"], "option size=much: 'much' is no number (bytes"),
        (["nvme", "-o", "size=G", "--socket-path", "a"], "option size=G: '' is no number"),
        (["nvme", "-o", "queues=x", "--socket-path", "a"], "option queues=x: 'x' is no number"),
        (["nvme", "-o", "path=/", "--socket-path", "a"], "vfio-user: nvme: /: Is a directory"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_fails_ends_all_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(
        "from vfio_user import Bar, Device\n"
        "class Faulty(Device):\n"
        "    vendor_id, device_id = 0x1234, 0x5678\n"
        "    bars = {0: Bar(0x1000)}\n"
        "    def bar_read(self, bar, offset, data):\n"
        "        raise SystemExit('enough')\n"
    )
    first, second = tmp_path / "a", tmp_path / "b"
    with serving(
        "edu", "--socket-path", first, "--", f"{tmp_path}/faulty.py:Faulty", "--socket-path", second
    ) as process:
        line_of(process, start="Faulty ")
        with Client.connect(first, TIMEOUT), Client.connect(second, TIMEOUT) as client:
            with pytest.raises(OSError, match="clos"):
                client.region_read(0, 0, 4)
            assert process.wait(TIMEOUT) == 1
        assert process.stderr is not None
        (line,) = process.stderr.read().splitlines()
        assert "faulty.py:Faulty" in line
        assert "SystemExit: enough" in line
    assert not first.exists()


# A file of devices


def test_devices_of_a_file_with_paths_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "from vfio_user import Device, option\n"
        "class One(Device):\n"
        "    vendor_id, device_id = 0x1234, 0x5678\n"
        "    number, flag, text = option(1, 'n'), option(False, 'f'), option('', 't')\n"
        "    def configure(self):\n"
        "        assert (self.number, self.flag, self.text) == (16, True, 'a=b'), vars(self)\n"
    )
    config = tmp_path / "lab.toml"
    config.write_text(
        '[[device]]\ndevice = "edu"\nsocket-path = "a"\nspin = 1\nfilters = ["stats"]\n'
        f'[[device]]\ndevice = "./one.py:One"\nsocket-path = "{tmp_path}/b"\n'
        'options = { number = 0x10, flag = true, text = "a=b" }\n'
    )
    with serving("--config", config) as process:
        line_of(process, start="One 1234:5678")
        with Client.connect(tmp_path / "a", TIMEOUT) as client:
            assert client.region_read(0, 0, 4) == EDU_ID
        Client.connect(tmp_path / "b", TIMEOUT).close()
        process.terminate()
        assert process.wait(TIMEOUT) == 0
        assert process.stderr is not None
        assert "region_read" in process.stderr.read().lower()


@pytest.mark.parametrize("more", [["edu"], ["--", "edu", "--socket-path", "a"], ["-o", "a=b"], ["--spin", "5"]])
def test_a_file_takes_the_place_of_devices(tmp_path: Path, more: list[str]) -> None:
    config = tmp_path / "lab.toml"
    config.write_text('[[device]]\ndevice = "edu"\nsocket-path = "a"\n')
    done = run("--config", config, *more)
    assert done.returncode == 2
    assert "--config" in done.stderr


def test_a_file_that_is_none_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[[device]]\n")
    done = run("--config", tmp_path / "bad.toml")
    assert (done.returncode, done.stderr) == (2, f"vfio-user: {tmp_path}/bad.toml: device 1 has no device = NAME\n")
    assert run("--config", tmp_path / "missing.toml").returncode == 2
    assert run("--config", tmp_path).returncode == 2


# Commands that are run along

TALK = (
    "import os; from vfio_user import Client\n"
    "with Client.connect(os.environ['VFIO_USER_SOCKET'], 20.0) as c: print(c.region_read(0, 0, 4).hex())"
)


def test_a_command_finds_its_device_and_gives_the_status() -> None:
    done = run("edu", "--run", f'"{sys.executable}" -c "{TALK}"; echo "$VFIO_USER_SOCKET"; exit 3')
    assert (done.returncode, done.stderr) == (3, "")
    answer, path = done.stdout.splitlines()
    assert answer == EDU_ID.hex()
    assert os.path.isabs(path)
    assert not Path(path).parent.exists()


def test_a_command_that_a_signal_ends_gives_128_and_its_number() -> None:
    assert run("edu", "--run", "kill -USR2 $$").returncode == 128 + signal.SIGUSR2


def test_all_sockets_are_in_the_environment_and_descriptors_are_as_for_any_command(tmp_path: Path) -> None:
    """None is inherited; the limit is not the one that was raised for the server."""
    path = tmp_path / "a socket"
    look = 'echo "$VFIO_USER_SOCKETS"; ls /proc/self/fd | wc -l; ulimit -Sn'
    command = [*COMMAND, "edu", "--socket-path", str(path), "--", "gpio", "--run", look]
    limited = ["/bin/sh", "-c", 'ulimit -Sn 200; exec "$@"', "sh", *command]
    done = subprocess.run(
        limited, capture_output=True, text=True, timeout=TIMEOUT, check=True, stdin=subprocess.DEVNULL
    )
    first, second, descriptors, limit = done.stdout.splitlines()
    assert first == str(path)
    assert second.endswith("1.sock")
    assert int(descriptors) == 4  # ls itself has a directory open
    assert limit == "200"
    assert not path.exists()


def test_sigterm_ends_the_command_while_the_device_is_served(tmp_path: Path) -> None:
    """It gets the signal, and its device still answers: a VMM may need that to end as it should."""
    script = tmp_path / "vmm.py"
    script.write_text(
        "import os, signal, sys\n"
        "from vfio_user import Client\n"
        "with Client.connect(os.environ['VFIO_USER_SOCKET'], 20.0) as c:\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(c.region_read(0, 0, 4)[0]))\n"
        "    print('ready', flush=True)\n"
        "    signal.pause()\n"
    )
    with serving("edu", "--run", f"exec '{sys.executable}' '{script}'") as process:
        line_of(process, start="ready")
        process.terminate()
        assert process.wait(TIMEOUT) == EDU_ID[0]


def test_a_command_that_ignores_sigterm_is_killed() -> None:
    with serving("edu", "--run", "trap '' TERM; echo pid $$; while :; do sleep 60 & wait; done") as process:
        pid = int(line_of(process, start="pid "))
        process.terminate()
        assert process.wait(TIMEOUT) == 128 + signal.SIGKILL
        assert not alive(pid)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, None], ids=str)
def test_nothing_that_a_command_started_is_left(end: signal.Signals | None) -> None:
    """The command's own children too, whether it waits for them or ends before them."""
    with serving("edu", "--run", "sleep 600 & echo child $!; " + ("wait" if end else "true")) as process:
        child = int(line_of(process, start="child "))
        if end:
            process.send_signal(end)
        status = process.wait(TIMEOUT)
        assert status == (128 + signal.SIGTERM if end else 0)
        await_true(lambda: not alive(child))


def test_a_server_that_fails_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(
        "from vfio_user import Device\n"
        "class Faulty(Device):\n"
        "    vendor_id, device_id = 0x1234, 0x5678\n"
        "    def connected(self, link):\n"
        "        raise SystemExit('enough')\n"
    )
    poke = "import os, socket; socket.socket(socket.AF_UNIX).connect(os.environ['VFIO_USER_SOCKET'])"
    command = f'echo pid $$; "{sys.executable}" -c "{poke}"; sleep 600'
    with serving(f"{tmp_path}/faulty.py:Faulty", "--run", command) as process:
        pid = int(line_of(process, start="pid "))
        assert process.wait(TIMEOUT) == 1
        await_true(lambda: not alive(pid))


def test_a_command_outlives_the_clients_of_connected_sockets(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = f"echo started; read status <{fifo}; exit $status"
    with serving("edu", "--fd", str(theirs.fileno()), "--run", command, pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        line_of(process, start="started")
        ours.close()
        await_true(lambda: len(os.listdir(f"/proc/{process.pid}/task")) == 1)  # none that serves
        fifo.write_text("4\n")
        assert process.wait(TIMEOUT) == 4


def test_a_command_on_a_terminal_reads_from_it_and_hears_ctrl_c() -> None:
    """It stays in the foreground, and Ctrl-C is its own: what it then does decides."""
    command = [
        *COMMAND,
        "edu",
        "--run",
        "read x; echo got $x; trap 'exit 9' INT; echo trapped; while :; do sleep 0.05; done",
    ]
    master, slave = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, master)
        process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        os.close(slave)
        os.write(master, b"something\n")
        seen = b""
        while b"trapped\r\n" not in seen:
            assert select.select([master], [], [], TIMEOUT)[0], seen
            seen += os.read(master, 4096)
        assert b"got something" in seen
        os.write(master, b"\x03")
        assert process.wait(TIMEOUT) == 9


# Filters


def test_reports_come_on_sigusr1_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with serving(
        "edu", "--socket-path", path, "--filter", "stats", "--", "gpio", "--socket-path", tmp_path / "b"
    ) as process:
        line_of(process, start="Gpio ")
        assert process.stderr is not None
        with Client.connect(path, TIMEOUT) as client:
            client.region_read(0, 0, 4)
            process.send_signal(signal.SIGUSR1)
            assert process.stderr.readline() == f"Edu at {path}:\n"
            for _ in range(100):
                process.send_signal(signal.SIGUSR1)
                assert client.region_read(0, 0, 4) == EDU_ID
        process.terminate()
        rest = process.stderr.read()
        assert process.wait(TIMEOUT) == 0
        assert "101" in rest.rpartition("Edu at ")[2]


def test_sigusr1_without_a_report_changes_nothing(tmp_path: Path) -> None:
    with serving("edu", "--socket-path", tmp_path / "a") as process:
        line_of(process, start="Edu ")
        process.send_signal(signal.SIGUSR1)
        with Client.connect(tmp_path / "a", TIMEOUT) as client:
            assert client.region_read(0, 0, 4) == EDU_ID
        process.terminate()
        assert process.communicate(timeout=TIMEOUT)[1] == ""
        assert process.returncode == 0


def test_traces_go_to_stderr(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with serving("edu", "--socket-path", path, "--filter", "trace:region=bar0") as process:
        line_of(process, start="Edu ")
        with Client.connect(path, TIMEOUT) as client:
            client.region_read(0, 0, 4)
        process.terminate()
        traced = process.communicate(timeout=TIMEOUT)[1]
    assert len(traced.splitlines()) == 1
    assert "bar0" in traced


# Help


def test_help_lists_devices_and_filters() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("--socket-path", "edu", "gpio", "ivshmem", "stats", "delay"):
        assert part in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help", "ivshmem"], ["ivshmem", "--help"], ["-h", "ivshmem", "-o", "size=64K"]]
)
def test_help_of_a_device(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    for part in ("1af4:1110", "MSI-X", "bar2", "vectors=INT", "64 KiB" if "-o" in arguments else "4 MiB"):
        assert part in done.stdout


def test_help_of_a_device_that_is_none() -> None:
    done = run("--help", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no device 'nothing'" in done.stderr


# Ctrl-C


def test_ctrl_c_in_the_middle_of_the_imports_is_one_line(tmp_path: Path) -> None:
    """The first thing that the command imports sends the signal."""
    (tmp_path / "click.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(9): pass\n"
    )
    done = run("edu", env={"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])})
    assert (done.returncode, done.stderr) == (1, "vfio-user: interrupted\n")
