"""A peer of a migration that is hostile, damaged, stopped or gone: either end, byte by byte."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.errors import MigrationError
from vfio_user.live import Offer, UnconfirmedError
from vfio_user.live.pipes import SocketPipe
from vfio_user.live.remote import Arrival, RemoteDestination
from vfio_user.live.stream import HEADER_SIZE, PREAMBLE_SIZE, Kind
from vfio_user.testing.leaks import no_fd_leaks

from .live_remote_support import (
    ACCEPT,
    OFFER,
    PAGE,
    SOON,
    TIMEOUT,
    Cut,
    Memory,
    Receiver,
    Recorder,
    Tellable,
    accepted,
    kinds_of,
    parts,
    preamble,
    raw_record,
    record,
    record_starts,
    told,
)


@pytest.fixture(scope="module")
def recorded() -> bytes:
    return record()


def without_bytes_behind_start(said: bytes) -> bytes:
    """START is the last that a source says before it has an answer."""
    return said[: record_starts(said)[-1]]


def expect_refused(recorder: Recorder, arrival: Arrival | None, error: BaseException | None, where: object) -> None:
    assert arrival is None, where
    assert isinstance(error, MigrationError), where
    assert str(error), where
    assert "start" not in recorder.calls, where
    assert recorder.calls.count("abort") == recorder.calls.count("begin"), where


def test_every_flipped_byte_is_refused(recorded: bytes) -> None:
    said = without_bytes_behind_start(recorded)
    recorder, arrival, _ = told(said)
    assert arrival is not None
    assert not arrival.confirmed
    assert recorder.calls[-1] == "start"
    for at in range(len(said)):
        flipped = bytearray(said)
        flipped[at] ^= 1 << at % 8
        expect_refused(*told(bytes(flipped)), at)


def test_every_truncation_is_refused(recorded: bytes) -> None:
    said = without_bytes_behind_start(recorded)
    for end in range(len(said)):
        recorder, arrival, error = told(said[:end])
        expect_refused(recorder, arrival, error, end)
        assert "the pipe ends" in str(error), end


def test_what_comes_behind_start_before_its_answer_is_refused(recorded: bytes) -> None:
    for more in (b"x", recorded[-HEADER_SIZE:]):
        recorder, arrival, error = told(without_bytes_behind_start(recorded) + more)
        expect_refused(recorder, arrival, error, more)
        assert "behind START" in str(error)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (raw_record(Kind.MEMORY, b"x", address=2 * PAGE), "0x1 bytes at 0x2000 are not inside the guest's memory"),
        (raw_record(Kind.MEMORY, b"xy", address=2 * PAGE - 1), "not inside"),
        (raw_record(Kind.MEMORY, b"x", address=(1 << 20) - 1), "not inside"),
        (raw_record(Kind.ZERO, address=PAGE, size=2 * PAGE), "not inside"),
        (raw_record(Kind.ZERO, address=2**64 - 1, size=1), "not inside"),
        (raw_record(Kind.DEVICE, b"x", number=1), "there is no device 1"),
        (raw_record(Kind.START), "START record does not belong here: the migration is under way"),
        (raw_record(Kind.BEGIN), "BEGIN record does not belong here"),
        (raw_record(Kind.OFFER, b"{}"), "OFFER record does not belong here"),
        (raw_record(Kind.END), "END record does not belong here"),
        (raw_record(Kind.STARTED), "STARTED record does not belong here"),
        (raw_record(0x77), "unknown kind 0x77"),
    ],
)
def test_a_record_that_does_not_belong_there_is_refused(recorded: bytes, record: bytes, reason: str) -> None:
    preamble, offer, begin, *rest = parts(recorded)
    recorder, arrival, error = told(b"".join([preamble, offer, begin, record, *rest]))
    expect_refused(recorder, arrival, error, record)
    assert reason in str(error)
    assert recorder.memory == {}
    assert recorder.calls == ["check", "begin", "abort"]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "OFFER record"),
        (b"[" * 60_000, "OFFER record"),
        (b'{"offer": {"devices": [], "memory": [], "more": 1}}', "more"),
        (b'{"offer": {"devices": 1, "memory": []}}', "devices"),
        (b'{"offer": {"devices": [], "memory": [[0, 1e400]]}}', "OFFER record"),
        (b'{"offer": {"devices": [], "memory": [%s]}}' % b",".join([b"[0,0]"] * 1025), "too many"),
        (b'{"offer": {"devices": [], "memory": []}}', "0 devices are to move, the destination has 1"),
        (b"\xff\xfe", "OFFER record"),
    ],
)
def test_an_offer_that_is_none_is_refused(recorded: bytes, payload: bytes, reason: str) -> None:
    recorder, arrival, error = told(parts(recorded)[0] + raw_record(Kind.OFFER, payload))
    expect_refused(recorder, arrival, error, payload)
    assert reason in str(error)
    assert recorder.calls == []


@settings(deadline=None, max_examples=50)
@given(order=st.lists(st.integers(0, 9), max_size=12))
def test_in_no_other_order_does_it_start(recorded: bytes, order: list[int]) -> None:
    preamble, *records = parts(recorded)
    said = [records[number % len(records)] for number in order]
    recorder, arrival, error = told(preamble + b"".join(said))
    if arrival is None:
        expect_refused(recorder, arrival, error, order)
    else:
        kinds = [kinds_of(bytes(PREAMBLE_SIZE) + one)[0] for one in said]
        assert [kind for kind in kinds if kind not in (3, 4, 5, 6)] == [1, 2, 7, 8]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda token: b"bash: vfio-user: command not found\n", "not a migration.*bash: vfio-user"),
        (lambda token: b"", "the pipe ends"),
        (lambda token: preamble(token)[:-1], "the pipe ends within a record"),
        (lambda token: preamble(bytes(16)) + ACCEPT, "another migration"),
        (lambda token: preamble(token) + raw_record(Kind.STARTED), "answers STARTED out of turn"),
        (lambda token: preamble(token) + raw_record(Kind.OFFER, b"{}"), "answers OFFER out of turn"),
        (lambda token: preamble(token) + raw_record(Kind.ACCEPT, b"?"), "ACCEPT record"),
        (lambda token: preamble(token) + raw_record(Kind.ACCEPT, b'{"compression": "zstd"}'), "was not offered"),
        (lambda token: preamble(token) + raw_record(Kind.REFUSED, b"no \x1b[31mroom"), "no \ufffd\\[31mroom"),
        (lambda token: preamble(token) + ACCEPT + raw_record(Kind.LOADED), None),
    ],
)
def test_a_hostile_destination_is_refused(answer: Callable[[bytes], bytes], reason: str | None) -> None:
    one = Tellable()
    with one.peer, no_fd_leaks():
        to = RemoteDestination(one.pipe, timeout=TIMEOUT)

        def say() -> None:
            one.peer.sendall(answer(one.read_token()))
            one.peer.shutdown(socket.SHUT_WR)

        speaker = threading.Thread(target=say)
        speaker.start()
        try:
            if reason is None:
                to.check(OFFER)
                speaker.join()
                with pytest.raises(MigrationError, match="answers LOADED out of turn"):
                    to.write_memory(0, memoryview(bytes(PAGE)))
            else:
                with pytest.raises((MigrationError, ConnectionError), match=reason):
                    to.check(OFFER)
        finally:
            speaker.join()
        assert one.pipe.closed


def test_a_destination_that_takes_nothing_is_given_up() -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, SOON)
        with pytest.raises(TimeoutError, match="takes nothing"):
            to.write_memory(0, memoryview(b"x" * (64 << 20)))
        with pytest.raises(MigrationError, match="left to reset itself"):
            to.abort()


@pytest.mark.parametrize("ask", ["begin", "settle", "load"])
def test_a_destination_that_does_not_answer_is_given_up(ask: str) -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, SOON)
        with pytest.raises(TimeoutError, match="nothing comes"):
            getattr(to, ask)()
        with pytest.raises(ConnectionError, match="closed"):
            to.load()


def test_a_start_without_an_answer_is_unconfirmed() -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, SOON)
        with pytest.raises(UnconfirmedError, match="whether it did is not known"):
            to.start()
        with pytest.raises(UnconfirmedError):
            to.abort()


def test_a_start_that_cannot_leave_is_a_failure_like_any_other() -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, TIMEOUT)
        one.peer.close()
        with pytest.raises(ConnectionError) as caught:
            to.start()
        assert not isinstance(caught.value, UnconfirmedError)


def test_a_start_that_is_interrupted_is_unconfirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Tellable()
    with one.peer:
        to = accepted(one, TIMEOUT)

        def interrupted(*arguments: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(one.pipe, "receive", interrupted)
        with pytest.raises(UnconfirmedError, match="KeyboardInterrupt"):
            to.start()


@pytest.mark.parametrize("records", range(8))
def test_a_source_that_falls_silent_is_given_up(recorded: bytes, records: int) -> None:
    recorder = Recorder()
    here, there = socket.socketpair()
    with here:
        here.sendall(b"".join(parts(recorded)[:records]) + parts(recorded)[records][:-1])
        receiver = Receiver(SocketPipe(there), recorder, SOON)
        receiver.ended()
        expect_refused(recorder, receiver.arrival, receiver.error, records)
        assert "nothing comes from the other side: timed out" in str(receiver.error)


def test_an_interrupt_makes_the_destination_as_before(recorded: bytes) -> None:
    class Interrupted(Recorder):
        def load(self) -> None:
            raise KeyboardInterrupt

    recorder = Interrupted()
    here, there = socket.socketpair()
    with here:
        receiver = Receiver(SocketPipe(there), recorder)
        here.sendall(without_bytes_behind_start(recorded))
        here.shutdown(socket.SHUT_WR)
        receiver.ended()
    assert isinstance(receiver.error, KeyboardInterrupt)
    assert recorder.calls == ["check", "begin", "settle", "abort"]


def test_a_destination_that_is_remote_itself_passes_on_that_nothing_is_known(recorded: bytes) -> None:
    class Doubtful(Recorder):
        def start(self) -> None:
            raise UnconfirmedError("who knows")

    cut = Cut()
    here, there = cut.pipes
    receiver = Receiver(there, recorder := Doubtful())
    to = RemoteDestination(here, timeout=TIMEOUT)
    to.check(OFFER)
    to.begin()
    to.load()
    with pytest.raises(UnconfirmedError):
        to.start()
    receiver.ended()
    cut.join(TIMEOUT)
    assert isinstance(receiver.error, UnconfirmedError)
    assert recorder.calls == ["check", "begin", "load"]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        return here, server.accept()[0]


@pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair])
def test_why_a_destination_fails_is_heard_while_much_is_on_its_way(pair: Any) -> None:
    class Full(Memory):
        def write_memory(self, address: int, data: memoryview) -> None:
            raise OSError(28, "no room for it")

    here, there = pair()
    with SocketPipe(here) as pipe:
        receiver = Receiver(SocketPipe(there), Full())
        to = RemoteDestination(pipe, timeout=TIMEOUT)
        to.check(Offer([], [(0, 64 << 20)]))
        to.begin()
        with pytest.raises(MigrationError, match="no room for it"):
            to.write_memory(0, memoryview(b"x" * (64 << 20)))
        to.abort()  # it said that it failed: there is nothing to undo, and nothing to complain of
        assert receiver.ended() is None


def test_the_last_words_of_a_destination_that_is_gone_are_heard() -> None:
    one = Tellable()
    to = accepted(one, TIMEOUT)

    def fail() -> None:
        with one.peer:
            one.peer.recv(1)  # a record is on its way, and will not get through
            one.peer.sendall(raw_record(Kind.FAILED, b"the end"))

    speaker = threading.Thread(target=fail)
    speaker.start()
    with pytest.raises(MigrationError, match="the end"):
        to.write_memory(0, memoryview(b"x" * (64 << 20)))
    speaker.join()
