"""shell: a program on standard input, a person at a terminal, names that are completed."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_user.cli.shell import Completer, namespace
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.errors import UsageError
from vfio_user.tools.info import read_config
from vfio_user.tools.registers import Registers
from vfio_user.tools.session import Session

from .device_support import attached, serving
from .support import RecordingBackend, recording
from .tools_support import Done, command

COMMAND = [sys.executable, "-m", "vfio_user", "shell"]
PATIENCE = 30.0


@pytest.fixture
def edu() -> Iterator[Path]:
    with serving(Edu()) as path:
        yield path


@pytest.fixture
def session() -> Iterator[Session]:
    with attached(Edu()) as client, Session(client, Registers(read_config(client))) as made:
        yield made


def shell(path: Path, program: str, *options: str) -> Done:
    return command("shell", path, *options, stdin=program)


def test_a_program_is_run_and_its_values_are_shown(edu: Path) -> None:
    program = """\
read("config.vendor_id")
write("bar0.factorial", 5)
for _ in range(2):
    print(read("bar0+8"))
read("config+0..4")
c.migration_get_state()
regs("msi")
dump("config+0..4")
None
"""
    shown = (
        "0x1234 (4660)\n120\n120\nb'4\\x12\\xe8\\x11'\n<DeviceState.RUNNING: 2>\n"
        "['msi.header', 'msi.control', 'msi.address', 'msi.data']\n"
        f"00000000  34 12 e8 11{' ' * 36}  |4...|\n00000004\n"
    )
    assert shell(edu, program) == (0, shown, "")


def test_interrupts_are_at_hand(edu: Path) -> None:
    program = """\
irq.watch("intx", "msi")
irq.trigger("msi")
[str(one) for one in irq.wait(seconds=10)]
irq.wait(seconds=0.01)
irq.mask("msi"); irq.unmask("msi")
"""
    done = shell(edu, program)
    assert (done.status, done.err) == (0, "")
    assert done.out == "['msi:0']\n[]\n"


def test_what_is_at_hand_is_listed(edu: Path) -> None:
    done = shell(edu, "help()\ninfo()\nhelp(read)\n")
    assert (done.status, done.err) == (0, "")
    for part in ('read("config.command")', "1234:11e8", "A register as a number"):
        assert part in done.out


@pytest.mark.parametrize(
    ("program", "status", "complaint"),
    [
        ('read("bar3+0")\nprint("not here")', 1, r"vfio-user: REGION_READ refused: Invalid argument\n"),
        ('read("bar9")', 2, r"vfio-user: 'bar9' is no region: .*\n"),
        ('read("config.nothing")', 2, r"vfio-user: 'config.nothing' is no register of this device; there are: .*\n"),
        ('write("bar0", 1 << 32)', 2, r"vfio-user: 0x100000000 does not fit in the 4 bytes of bar0\+0x0:u32\n"),
        ("irq.wait()", 2, r"vfio-user: nothing is watched: .*\n"),
        ('open("/no/such/file")', 1, r"vfio-user: /no/such/file: No such file or directory\n"),
        ("print('out')\n1/0\nprint('not here')", 1, r'Traceback .*\n  File "<stdin>", line 2.*ZeroDivisionError: .*\n'),
        ("f(", 1, r'  File "<stdin>", line 1\n.*SyntaxError: .*\n'),
        ("exit(7)", 7, r""),
    ],
)
def test_what_fails_ends_it(edu: Path, program: str, status: int, complaint: str) -> None:
    done = shell(edu, program)
    assert done.status == status
    assert "not here" not in done.out
    assert re.fullmatch(complaint, done.err, re.DOTALL), done.err


def test_a_device_of_ones_own_has_names() -> None:
    with recording(RecordingBackend()) as backend, serving(backend) as path:
        assert shell(path, 'read("bar0.factorial")', "--device", "edu").out == "0x0 (0)\n"
        assert "no device 'nothing'" in shell(path, "", "--device", "nothing").err


def test_a_terminal(edu: Path) -> None:
    """Tab completes the name of a register; a call that fails is a line, and the session goes on; Ctrl-D ends it."""
    pytest.importorskip("readline")
    master, slave = pty.openpty()
    arguments = [*COMMAND, str(edu)]
    with subprocess.Popen(
        arguments, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "dumb"}
    ) as process:
        os.close(slave)
        try:
            until(master, rb">>> ")
            os.write(master, b'read("config.vendor\t')
            until(master, rb"config\.vendor_id")  # and, of some readlines, the quote
            os.write(master, b'\x15read("config.vendor_id")\n')
            until(master, rb"0x1234 \(4660\).*>>> ")
            os.write(master, b'read("bar3+0")\n')
            until(master, rb"CommandError: REGION_READ refused: Invalid argument.*>>> ")
            os.write(master, b"1/0\n")
            until(master, rb"ZeroDivisionError.*>>> ")
            os.write(master, b"\x04")
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            os.close(master)


def until(terminal: int, pattern: bytes) -> None:
    """Read from a terminal until what is there matches. Before a prompt is there, keys may get lost."""
    seen = b""
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, seen, re.DOTALL):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, seen
        seen += os.read(terminal, 4096)


# What the session offers


def test_places_are_completed_within_quotes_and_python_elsewhere(session: Session) -> None:
    line = ""
    completer = Completer(namespace(session), session.places, lambda: line)

    def candidates(text: str) -> list[str]:
        found: list[str] = []
        while (one := completer.complete(text, len(found))) is not None:
            found.append(one)
        return found

    line = 'read("config.bar'
    assert candidates("config.bar") == [f"config.bar{index}" for index in range(6)]
    line = 'write("bar'
    assert {"bar0", "bar0.factorial"} <= set(candidates("bar"))
    assert "bar1" not in candidates("bar"), "there is none"
    line = "irq.watch('in"
    assert candidates("in") == ["intx"]
    line = "c.region_re"
    assert candidates("c.region_re") == ["c.region_read(", "c.region_read_into("]
    line = "rea"
    assert candidates("rea") == ["read("]


def test_reads_and_writes_of_a_session(session: Session) -> None:
    session.write("bar0.liveness", 0x1234)
    assert session.read("bar0.liveness") == 0xFFFFEDCB
    session.write("config+0x3c:u8", 7)
    assert session.read("config.interrupt_line") == 7
    session.write("config+0x3c..0x3d", b"\x09")
    assert session.read("config+0x3c..0x3e") == b"\x09\x01"
    assert next(session.dump("config.vendor_id")).startswith("00000000  1234 ")
    assert json.dumps(session.info())
    for place, value in (("bar0..4", 5), ("bar0", -1), ("bar0:u8", 256)):
        with pytest.raises(UsageError):
            session.write(place, value)


def test_a_device_without_interrupts_or_names_has_a_session() -> None:
    with attached(Gpio()) as client, Session(client, Registers(None)) as session:
        assert session.registers.names() == []
        assert session.read("config:u16") == 0x494F
        with pytest.raises(UsageError):
            session.irq.watch("msix")
        session.irq.watch("intx")
        session.irq.trigger("intx")
        assert [str(one) for one in session.irq.wait(seconds=10)] == ["intx:0"]
