"""Framing: whatever way the stream is cut, the same messages with the same descriptors come out."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import HEADER, NO_REPLY, RawPeer, eventfds, open_fds
from tests.support import message as pack
from vfio_user.errors import ConnectionClosedError, FramingError
from vfio_user.fds import OwnedFd
from vfio_user.protocol import Framer, Message
from vfio_user.protocol.framing import DISCARD_LIMIT
from vfio_user.transport.blocking import Channel

MAX_SIZE = 256
TOO_LARGE = 300


class Sent(NamedTuple):
    """A message of the model."""

    msg_id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: int

    @property
    def data(self) -> bytes:
        return pack(self.msg_id, self.command, self.payload, self.flags, self.error)


class Got(NamedTuple):
    """What must come out for it."""

    msg_id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: tuple[int, ...]
    fault: bool


words = st.integers(0, 2**32 - 1)
sent_messages = st.builds(
    Sent,
    msg_id=st.integers(0, 65535),
    command=st.integers(0, 65535),
    flags=words,
    error=words,
    # small ones, the largest that fit, and some that do not
    payload=st.one_of(
        st.binary(max_size=40),
        st.integers(MAX_SIZE - 20, TOO_LARGE).map(bytes),
        st.sampled_from([0, 16, 240, 241]).map(lambda n: b"x" * n),
    ),
    fds=st.sampled_from([0, 0, 0, 1, 3]),
)
streams = st.lists(sent_messages, max_size=8)
cuts = st.lists(st.sampled_from([1, 2, 7, 15, 16, 17, 33, 100, 1000]), min_size=1, max_size=12)


def expected(messages: list[Sent], marks: list[list[int]]) -> list[Got]:
    return [
        Got(
            sent.msg_id,
            sent.command,
            sent.flags,
            sent.error,
            b"" if len(sent.data) > MAX_SIZE else sent.payload,
            tuple(mark),
            len(sent.data) > MAX_SIZE,
        )
        for sent, mark in zip(messages, marks, strict=True)
    ]


def taken(message: Message) -> Got:
    """What came out; the descriptors are known by the size of the file behind them."""
    marks = tuple(os.fstat(fd.fileno()).st_size for fd in message.fds)
    got = Got(
        message.msg_id,
        message.command,
        message.flags,
        message.error,
        bytes(message.payload),
        marks,
        message.fault is not None,
    )
    message.close()
    return got


def drain(framer: Framer) -> Iterator[Got]:
    while (message := framer.next_message()) is not None:
        yield taken(message)


def marked(mark: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("mark"))
    os.ftruncate(fd.fileno(), mark)
    return fd


class Wire:
    """A stream of messages as recvmsg hands it out: no read goes on past a message whose descriptors it brought."""

    def __init__(self, messages: list[Sent], marks: list[list[int]]) -> None:
        self.stream = b"".join(sent.data for sent in messages)
        self.position = 0
        self.carriers: list[tuple[int, int, list[int]]] = []
        start = 0
        for sent, mark in zip(messages, marks, strict=True):
            if mark:
                self.carriers.append((start, start + len(sent.data), mark))
            start += len(sent.data)

    def read(self, most: int) -> tuple[bytes, list[OwnedFd]]:
        begin = self.position
        end = min(begin + most, len(self.stream))
        fds: list[OwnedFd] = []
        for start, stop, marks in self.carriers:
            if begin <= start < end:
                end = min(end, stop)
                fds = [marked(mark) for mark in marks]
                break
        self.position = end
        return self.stream[begin:end], fds


def feed(framer: Framer, data: bytes) -> Iterator[Got]:
    """Give ``data`` in as many steps as the framer has room for."""
    while data:
        part = data[: len(framer.space()[0])]
        framer.feed(part)
        data = data[len(part) :]
        yield from drain(framer)


@given(streams, cuts)
def test_any_cut_gives_the_same_messages(messages: list[Sent], sizes: list[int]) -> None:
    marks = [[10 * number + i + 1 for i in range(sent.fds)] for number, sent in enumerate(messages)]
    framer = Framer(MAX_SIZE)
    got: list[Got] = []
    wire = Wire(messages, marks)
    for size in itertools.cycle(sizes):
        data, fds = wire.read(min(size, len(framer.space()[0])))
        if not data:
            break
        framer.feed(data, fds)
        got += drain(framer)
    assert got == expected(messages, marks)
    assert not framer.mid_message
    assert not framer.has_fds


@given(streams.filter(bool), st.data())
def test_trailing_bytes_wait_for_the_rest(messages: list[Sent], data: st.DataObject) -> None:
    """Whole messages come out as soon as they are there, the last one only with its last byte."""
    framer = Framer(MAX_SIZE)
    plain = [sent._replace(fds=0) for sent in messages]
    stream = b"".join(sent.data for sent in plain)
    keep = data.draw(st.integers(1, len(plain[-1].data)))
    got = list(feed(framer, stream[:-keep]))
    assert got == expected(plain[:-1], [[]] * (len(plain) - 1))
    assert framer.mid_message == (keep < len(plain[-1].data))
    got = list(feed(framer, stream[-keep:]))
    assert got == expected(plain[-1:], [[]])


@settings(max_examples=60)
@given(streams, st.lists(st.tuples(st.integers(0, 400), st.integers(1, 5)), min_size=1, max_size=10))
def test_the_kernel_brings_descriptors_to_their_message(messages: list[Sent], steps: list[tuple[int, int]]) -> None:
    """A real socketpair: sendmsg by messages, some in two pieces, and recvmsg in between or long after."""
    ours, theirs = socket.socketpair()
    framer = Framer(MAX_SIZE)
    channel = Channel(ours, framer)
    marks = [[10 * number + i + 1 for i in range(sent.fds)] for number, sent in enumerate(messages)]
    got: list[Got] = []

    def receive() -> None:
        with contextlib.suppress(BlockingIOError, ConnectionClosedError):
            while True:
                channel.receive(socket.MSG_DONTWAIT)
                got.extend(drain(framer))

    with RawPeer(theirs) as peer:
        for number, sent in enumerate(messages):
            first, waits = steps[number % len(steps)]
            files = [marked(mark) for mark in marks[number]]
            numbers = [fd.fileno() for fd in files]
            if 0 < first < len(sent.data):
                peer.send(sent.data[:first], numbers)
                if waits == 1:
                    receive()
                peer.send(sent.data[first:])
            else:
                peer.send(sent.data, numbers)
            for fd in files:
                fd.close()
            if waits <= 2:
                receive()
    receive()
    assert got == expected(messages, marks)
    channel.close()


def header(size: int, *, command: int = 9) -> bytes:
    return HEADER.pack(1, command, size, 0, 0)


@pytest.mark.parametrize("size", [0, 1, 15, DISCARD_LIMIT + 1, 0xFFFFFFFF])
def test_sizes_that_cannot_be_framed(size: int) -> None:
    framer = Framer(MAX_SIZE)
    list(feed(framer, pack(1, 9, b"abc")))
    framer.feed(header(size)[:15])
    assert framer.next_message() is None
    framer.feed(header(size)[15:])
    for _ in range(2):  # and the stream stays lost
        with pytest.raises(FramingError, match=f"a message of {size} bytes"):
            framer.next_message()


@pytest.mark.parametrize("size", [MAX_SIZE + 1, 10_000, DISCARD_LIMIT])
def test_too_large_is_skipped_and_refused(size: int) -> None:
    framer = Framer(MAX_SIZE)
    fd = marked(1)
    framer.feed(header(size, command=10), [fd])
    assert framer.next_message() is None
    assert framer.mid_message
    left = size - HEADER.size
    while left:
        count = min(left, len(framer.space()[0]))
        framer.received(count)
        left -= count
        message = framer.next_message()
        assert (message is None) == (left > 0)
    assert message is not None
    assert message.fault == f"a message of {size} bytes, at most {MAX_SIZE} are taken"
    assert (message.msg_id, message.command, bytes(message.payload)) == (1, 10, b"")
    assert message.fds == [fd]
    message.close()
    framer.feed(pack(2, 9, b"next"))
    assert [got.payload for got in drain(framer)] == [b"next"]


def test_descriptors_in_the_middle_of_what_is_skipped_are_closed() -> None:
    framer = Framer(MAX_SIZE)
    framer.feed(header(MAX_SIZE + 100))
    assert framer.next_message() is None
    stray, own = marked(1), marked(2)
    framer.feed(bytes(50), [stray])
    assert framer.next_message() is None
    assert stray.closed
    framer.feed(bytes(200))
    assert framer.next_message() is None
    framer.feed(bytes(MAX_SIZE + 100 - HEADER.size - 250) + pack(5, 9), [own])
    assert [(got.msg_id, got.fds) for got in drain(framer)] == [(1, ()), (5, (2,))]


def test_descriptors_of_no_message_are_closed_by_the_next() -> None:
    """They came with the tail of a message that was handed out since: nobody can take them."""
    framer = Framer(MAX_SIZE)
    framer.feed(pack(1, 9, b"x" * 30)[:20])
    fd = marked(1)
    framer.feed(pack(1, 9, b"x" * 30)[20:], [fd])
    framer.start = framer.end  # as a reader does that cuts messages from the buffer itself
    assert framer.has_fds
    framer.feed(pack(2, 9))
    assert [got.fds for got in drain(framer)] == [()]
    assert fd.closed
    assert not framer.has_fds


def test_lost_descriptors_are_a_fault_of_their_message_alone() -> None:
    framer = Framer(MAX_SIZE)
    data = pack(1, 8, b"irqs")
    framer.space()[0][: len(data)] = data
    framer.received(len(data), [marked(7)], truncated=True)
    message = framer.next_message()
    assert message is not None
    assert message.fault == "file descriptors were lost on the way"
    assert [os.fstat(fd.fileno()).st_size for fd in message.fds] == [7]
    message.close()
    framer.feed(pack(2, 9))
    assert [got.fault for got in drain(framer)] == [False]


def test_too_many_descriptors_for_one_message() -> None:
    framer = Framer(MAX_SIZE, max_fds=3)
    fds = [marked(number) for number in range(5)]
    data = pack(1, 8, b"payload")
    framer.feed(data[:10], fds[:2])
    framer.feed(data[10:], fds[2:])
    message = framer.next_message()
    assert message is not None
    assert message.fault == "more than 3 file descriptors"
    assert message.fds == fds[:3]
    assert [fd.closed for fd in fds] == [False] * 3 + [True] * 2
    message.close()
    assert all(fd.closed for fd in fds)


def test_a_process_without_free_descriptors_gets_a_fault() -> None:
    """MSG_CTRUNC by the kernel's own hand: RLIMIT_NOFILE is reached when descriptors arrive."""
    ours, theirs = socket.socketpair()
    framer = Framer(MAX_SIZE)
    channel = Channel(ours, framer)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with RawPeer(theirs) as peer, eventfds(2) as fds:
        peer.send(pack(1, 8, b"irqs"), fds)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds), hard))
        try:
            channel.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        message = framer.next_message()
        assert message is not None
        assert message.fault == "file descriptors were lost on the way"
        message.close()
        peer.send(pack(2, 8, b"irqs"), fds)
        channel.receive()
        message = framer.next_message()
        assert message is not None
        assert (message.fault, len(message.fds)) == (None, 2)
        message.close()
    channel.close()


@pytest.mark.parametrize("part", [5, 16, 20])
def test_closed_in_mid_message_nothing_leaks(part: int) -> None:
    before = open_fds()
    framer = Framer(MAX_SIZE)
    framer.feed(pack(1, 8, b"whole"), [marked(1)])
    framer.feed(pack(2, 8, b"a part of it")[:part], [marked(2)])
    framer.close()
    assert open_fds() <= before


def test_closed_while_skipping_nothing_leaks() -> None:
    before = open_fds()
    framer = Framer(MAX_SIZE)
    framer.feed(header(1000), [marked(1)])
    assert framer.next_message() is None
    framer.close()
    framer.close()
    assert open_fds() <= before


@given(st.lists(st.binary(min_size=60, max_size=120), min_size=2, max_size=12), st.integers(0, 100))
def test_hold_keeps_payloads(texts: list[bytes], tail: int) -> None:
    """What was handed out before hold() stays as it is while more is received over it."""
    framer = Framer(MAX_SIZE)
    held: list[tuple[bytes, memoryview]] = []
    stream = b"".join(pack(number, 9, text) for number, text in enumerate(texts))
    while stream or framer.mid_message:
        part = stream[: min(len(framer.space()[0]), 70 + tail)]
        framer.feed(part)
        stream = stream[len(part) :]
        while (message := framer.next_message()) is not None:
            held.append((texts[message.msg_id], message.payload))
            framer.hold()
    assert len(held) == len(texts)
    assert all(bytes(payload) == text for text, payload in held)


def test_hold_keeps_the_place_of_descriptors() -> None:
    framer = Framer(MAX_SIZE)
    framer.feed(pack(1, 9, b"first"))
    framer.feed(pack(2, 8, b"second")[:18], [marked(5)])
    assert next(drain(framer)).payload == b"first"
    framer.hold()
    framer.feed(pack(2, 8, b"second")[18:])
    assert [(got.payload, got.fds) for got in drain(framer)] == [(b"second", (5,))]


def test_reserve_takes_larger_messages_from_then_on() -> None:
    framer = Framer(MAX_SIZE)
    framer.feed(pack(1, 9, b"held"))
    first = framer.next_message()
    assert first is not None
    framer.reserve(100)  # less than before: nothing changes
    assert framer.max_size == MAX_SIZE
    framer.reserve(1000)
    payload = bytes(range(250)) * 3
    assert [got.payload for got in feed(framer, pack(2, 9, payload))] == [payload]
    assert bytes(first.payload) == b"held"
    assert [got.fault for got in feed(framer, pack(3, 9, bytes(1000)))] == [True]


@pytest.mark.parametrize(
    ("flags", "command", "reply", "error", "wants_reply"),
    [
        (0, True, False, False, True),
        (NO_REPLY, True, False, False, False),
        (0x01, False, True, False, True),
        (0x21, False, True, True, True),
        (0x02, False, False, False, True),
        (0xFFFFFFC0, True, False, False, True),
    ],
)
def test_kinds_of_messages(flags: int, command: bool, reply: bool, error: bool, wants_reply: bool) -> None:
    message = Message(7, 9, flags, 0, memoryview(b"abc"))
    assert (message.is_command, message.is_reply) == (command, reply)
    assert (message.is_error, message.wants_reply) == (error, wants_reply)
    kind = "reply" if reply else "command"
    assert repr(message) == f"<REGION_READ {kind} id=7 flags={flags:#x} payload=3 fds=0>"


def test_space_is_never_empty() -> None:
    """Also where the buffer ends within a header: the unfinished message moves to the front."""
    framer = Framer(MAX_SIZE)
    first = pack(1, 9, bytes(MAX_SIZE - 16 - 20))
    framer.feed(first + pack(2, 9, b"0123456789")[:18])
    assert next(drain(framer)).msg_id == 1
    assert framer.mid_message
    assert len(framer.space()[0]) >= 8
    framer.feed(pack(2, 9, b"0123456789")[18:])
    assert [got.payload for got in drain(framer)] == [b"0123456789"]
