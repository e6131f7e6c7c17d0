"""irq: interrupts from the client's side, of servers that send them, mask them, lose them and go away."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import Irq
from vfio_user.devices.edu import Edu
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.errors import CommandError, ConnectionClosedError, UsageError
from vfio_user.testing import no_fd_leaks
from vfio_user.tools.irq import Vectors, Watch
from vfio_user.wire.constants import Command, IrqSetFlags

from .device_support import attached, serving
from .hostile import scripted
from .support import RecordingBackend, recording
from .tools_support import Done, command

SOON = 10.0
"""Seconds within which a signal that must come has come."""


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


@pytest.mark.parametrize(
    ("text", "vectors"),
    [
        ("intx", Vectors(0)),
        ("MSI:3", Vectors(1, 3, 1)),
        ("msix:0-7", Vectors(2, 0, 8)),
        ("err:0", Vectors(3, 0, 1)),
        ("7:0x10-0x20", Vectors(7, 16, 17)),
    ],
)
def test_vectors(text: str, vectors: Vectors) -> None:
    assert Vectors.parse(text) == vectors


@given(st.text(max_size=12) | st.from_regex(r"\A[a-z0-9:-]{0,12}\Z"))
def test_any_text_is_vectors_or_wrong_usage(text: str) -> None:
    try:
        found = Vectors.parse(text)
    except UsageError:
        return
    assert found.start >= 0
    assert found.count is None or found.count > 0


@pytest.mark.parametrize("text", ["irqs", "msi:", "msi:4-2", "msi:x", ":1", "", "msi:-1", "-1:0"])
def test_vectors_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        Vectors.parse(text)


def test_a_device_s_interrupts_are_listed() -> None:
    with serving(Ivshmem(vectors=4)) as path:
        assert command("irq", "list", path) == (
            0,
            "msix       4  EVENTFD\nerr        1  EVENTFD\nreq        1  EVENTFD\n",
            "",
        )
        facts = json.loads(command("irq", "list", path, "--json").out)
        assert facts["irqs"][2] == {"index": 2, "name": "msix", "count": 4, "flags": ["EVENTFD"]}


def wait(*arguments: object) -> Done:
    return command("irq", "wait", *arguments)


def test_what_a_write_has_the_device_send_is_waited_for() -> None:
    with serving(Edu()) as path:
        done = wait(path, "intx", "msi", "--write", "bar0.irq_raise=1", "--count", "1")
        assert (done.status, done.err) == (0, "")
        assert re.fullmatch(r"msi:0 after \d+\.\d{3} ms\n", done.out)
        facts = json.loads(wait(path, "msi", "--write", "bar0+0x60=1", "--json").out)
        assert [one["index"] for one in facts["signals"]] == ["msi"]


def test_too_few_interrupts_are_a_failure_that_shows_those_that_came() -> None:
    with serving(Edu()) as path:
        done = wait(path, "msi", "--write", "bar0.irq_raise=1", "--count", "2", "--within", "0.2")
    assert (done.status, done.err) == (1, "vfio-user: 1 of 2 interrupts came in 0.2 s\n")
    assert done.out.startswith("msi:0 after ")


def test_vectors_are_triggered_and_come_back() -> None:
    with serving(Ivshmem(vectors=64)) as path:
        done = command("irq", "trigger", path, "msix:1-63", "err")
    assert (done.status, done.err) == (0, "")
    assert sorted(line.split()[0] for line in done.out.splitlines()) == sorted(
        ["err:0", *(f"msix:{vector}" for vector in range(1, 64))]
    )


def test_a_vector_that_does_not_come_back_is_named() -> None:
    with recording(RecordingBackend()) as backend, serving(backend) as path:
        done = command("irq", "trigger", path, "msi:1-2", "--within", "0.1")
        assert (done.status, done.out) == (1, "")
        assert done.err == "vfio-user: no signal in 0.1 s of msi:1, msi:2\n"


def test_vectors_are_masked_and_unmasked() -> None:
    with recording(RecordingBackend()) as backend, serving(backend) as path:
        assert command("irq", "mask", path, "msix:4-7", "intx") == (0, "msix:4-7 masked\nintx masked\n", "")
        assert command("irq", "unmask", path, "msi") == (0, "msi unmasked\n", "")
        asked = [call[1:5] for call in backend.called("set_irqs") if call[4]]
        none = IrqSetFlags.DATA_NONE
        assert asked == [
            (2, IrqSetFlags.ACTION_MASK | none, 4, 4),
            (0, IrqSetFlags.ACTION_MASK | none, 0, 1),
            (1, IrqSetFlags.ACTION_UNMASK | none, 0, 4),
        ]
        backend.fail["set_irqs"] = OSError(95, "")
        done = command("irq", "mask", path, "msix")
        assert (done.status, done.out) == (1, "")
        assert "DEVICE_SET_IRQS refused: Operation not supported" in done.err


def test_a_line_that_masks_itself_is_unmasked_after_each_signal() -> None:
    with recording(RecordingBackend()) as backend:
        backend.irqs[0] = Irq(1, 7)
        with attached(backend) as client, Watch(client, [Vectors(0)]) as watch:
            backend.wait_for("set_irqs")
            os.eventfd_write(backend.fds[0].fileno(), 3)
            signal = next(watch.signals(SOON))
            assert (signal.index, signal.vector, signal.times) == (0, 0, 3)
            assert backend.called("set_irqs")[-1][1:5] == (0, IrqSetFlags.ACTION_UNMASK | IrqSetFlags.DATA_NONE, 0, 1)


def test_eventfds_are_taken_back() -> None:
    with recording(RecordingBackend()) as backend, attached(backend) as client:
        with Watch(client, [Vectors(1, 0, 2), Vectors(2, 5, 1)]) as watch:
            assert watch.vectors() == {(1, 0), (1, 1), (2, 5)}
        flags = IrqSetFlags.ACTION_TRIGGER | IrqSetFlags.DATA_NONE
        assert {call[1:5] for call in backend.called("set_irqs")[-2:]} == {(1, flags, 0, 0), (2, flags, 0, 0)}


def test_a_server_that_refuses_eventfds_keeps_none() -> None:
    with recording(RecordingBackend()) as backend, attached(backend) as client:
        backend.fail["set_irqs"] = OSError(22, "")
        with pytest.raises(CommandError), Watch(client, [Vectors(1)]):
            pass


def test_while_waiting_the_device_s_dma_is_answered() -> None:
    """It comes by messages, after the reply to the write that starts it; and then the interrupt."""
    memory = bytearray(4096)
    device = Edu()
    device.buffer[:4] = b"data"
    with attached(device) as client:
        client.dma_map(0, len(memory), memory=memory)
        with Watch(client, [Vectors.parse("msi")]) as watch:
            for register, value in ((0x80, 0x40000), (0x88, 0x10), (0x90, 4), (0x98, 7)):
                client.region_write(0, register, value.to_bytes(4, "little"))
            assert next(watch.signals(SOON)).index == 1
    assert memory[0x10:0x14] == b"data"


def test_a_server_that_goes_away_ends_the_wait() -> None:
    with scripted("blocking") as (client, server), Watch(client, [Vectors(0, 0, 1)]) as watch:
        server.peer.sock.shutdown(2)
        with pytest.raises(ConnectionClosedError):
            next(watch.signals(SOON))


def test_a_server_that_goes_away_while_eventfds_are_on_their_way() -> None:
    answers = {Command.DEVICE_SET_IRQS: lambda peer, request: peer.sock.shutdown(2)}
    with scripted("blocking", answers) as (client, _), pytest.raises(ConnectionClosedError):
        Watch(client, [Vectors(0, 0, 4)]).__enter__()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["wait", "PATH", "msix:0"], "the device has 0 vectors of msix"),
        (["wait", "PATH", "msi:1"], "the device has 1 vectors of msi"),
        (["wait", "PATH", "99"], "the device has 0 vectors of 99"),
        (["wait", "PATH", "msi", "--write", "bar0"], "has no value"),
        (["wait", "PATH", "msi", "--write", "bar0..4=1"], "range"),
        (["wait", "PATH", "msi", "--write", "bar0:u8=256"], "does not fit"),
        (["wait", "PATH", "msi", "--count", "0"], "--count"),
        (["wait", "PATH", "msi", "--within", "-1"], "--within"),
        (["trigger", "PATH", "msi", "--within", "nan"], "nan"),
        (["trigger", "PATH"], "VECTOR"),
        (["mask", "PATH", "msi:0-1"], "the device has 1 vectors of msi"),
        (["dance", "PATH"], "dance"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str) -> None:
    with serving(Edu()) as path:
        done = command("irq", *(path if one == "PATH" else one for one in arguments))
    assert (done.status, done.out) == (2, "")
    assert reason in done.err.splitlines()[-1]


@pytest.mark.parametrize("make", [Edu, Ivshmem])
def test_all_vectors_of_an_index_may_be_meant(make: Callable[[], Edu | Ivshmem]) -> None:
    with attached(make()) as client:
        index = 1 if make is Edu else 2
        assert Vectors(index).of(client) == range(client.irqs[index].count)
        with pytest.raises(UsageError, match="vectors"):
            Vectors(index, client.irqs[index].count).of(client)
