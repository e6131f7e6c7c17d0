"""ivshmem with peers: devices that share a memory and ring each other, each with a client and a thread of its own."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import random
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vfio_user import Client
from vfio_user.devices import ivshmem
from vfio_user.devices.ivshmem import Group, Ivshmem, Peer
from vfio_user.errors import CommandError, UsageError
from vfio_user.fds import take_signals
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.tools.load import make_device
from vfio_user.wire.constants import IrqSetFlags, PciIrq

from .device_support import TIMEOUT, Event, attached, events, serving
from .support import assert_quiet

ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
REGISTERS, TABLE, MEMORY = 0, 1, 2
POSITION, DOORBELL, PENDING = 8, 12, 2048
PAGE, MIB = 4096, 1 << 20


@dataclass
class Guest:
    """What a guest has of a member: its client, its memory mapped, an eventfd for each of its vectors."""

    client: Client
    memory: memoryview
    bells: list[Event]

    @property
    def id(self) -> int:
        return int.from_bytes(self.client.region_read(REGISTERS, POSITION, 4), "little")

    def ring(self, peer: int, vector: int = 0, *, posted: bool = False) -> None:
        self.client.region_write(REGISTERS, DOORBELL, (peer << 16 | vector).to_bytes(4, "little"), posted=posted)

    def heard(self) -> list[int]:
        """The vectors that were signalled since the last call, of all that was rung before."""
        self.settle()
        return [vector for vector, bell in enumerate(self.bells) if bell.take()]

    def settle(self) -> None:
        """The member's thread has taken what was rung: it looks there before it reads a message."""
        self.client.region_read(REGISTERS, POSITION, 4)


@contextlib.contextmanager
def guest_of(client: Client, vectors: int) -> Iterator[Guest]:
    (area,) = client.regions[MEMORY].map()
    with events(vectors) as bells, area.memory as memory:
        client.set_irqs(PciIrq.MSIX, ASSIGN, 0, vectors, [bell.fd for bell in bells])
        yield Guest(client, memory, bells)


@contextlib.contextmanager
def guests(*devices: Ivshmem) -> Iterator[list[Guest]]:
    """A guest at each of the devices, which are served by a thread each."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(guest_of(stack.enter_context(attached(device)), device.vectors)) for device in devices
        ]


class Left(Ivshmem):
    """Says when its server has noticed that the client left: until then what is rung is that client's."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.left = threading.Semaphore(0)

    def disconnected(self) -> None:
        super().disconnected()
        self.left.release()


def members(group: Group, *vectors: int) -> list[Ivshmem]:
    return [Ivshmem(group=group, size=MIB, vectors=count) for count in vectors]


class TestIds:
    def test_the_lowest_that_is_free(self) -> None:
        group = Group()
        first = members(group, 1, 1, 1)
        assert [member.id for member in first] == [0, 1, 2]
        first[1].leave()
        again = members(group, 1, 1)
        assert [member.id for member in again] == [1, 3]
        assert [member.id for member in members(Group(), 1, 1)] == [0, 1]  # each group counts for itself

    def test_an_id_of_a_members_own_and_the_gaps_between(self) -> None:
        group = Group()
        fixed = [Ivshmem(group=group, size=MIB, id=id) for id in (1, 65535, 0)]
        rest = members(group, 1, 1)
        assert [member.id for member in (*fixed, *rest)] == [1, 65535, 0, 2, 3]
        assert group.ids == [0, 1, 2, 3, 65535]

    @pytest.mark.parametrize("id", [65536, -2, 1 << 40])
    def test_ids_that_cannot_be(self, id: int) -> None:
        group = Group()
        with pytest.raises(ValueError, match=f"id {id}: 0 to 65535"):
            Ivshmem(group=group, size=MIB, id=id)
        assert Ivshmem(group=group, size=2 * MIB).id == 0  # who did not join decided nothing

    def test_an_id_that_another_has(self) -> None:
        group = Group()
        first = Ivshmem(group=group, size=MIB, id=7)
        with pytest.raises(ValueError, match="id 7 is another member's"):
            Ivshmem(group=group, size=MIB, id=7)
        assert group.ids == [first.id]

    def test_a_group_that_is_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ivshmem, "MAX_PEERS", 3)
        group = Group()
        full = members(group, 1, 1, 1)
        with pytest.raises(ValueError, match="no id is left"):
            Ivshmem(group=group, size=MIB)
        full[1].leave()
        assert Ivshmem(group=group, size=MIB).id == 1

    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_position_is_read_in_any_width(self, size: int) -> None:
        with attached(Ivshmem(group=Group(), size=MIB, id=0x1234)) as client:
            assert client.region_read(REGISTERS, POSITION, size) == b"\x34\x12\0\0\0\0\0\0"[:size]
            whole = client.region_read(REGISTERS, 0, 256)
            assert whole == bytes(8) + b"\x34\x12" + bytes(246)

    def test_alone_the_id_is_told_as_well(self) -> None:
        with guests(Ivshmem(size=MIB, id=5, vectors=2)) as (guest,):
            assert guest.id == 5
            guest.ring(0, 1)
            assert guest.heard() == []
            guest.ring(5, 1)
            assert guest.heard() == [1]
            assert [door.datamatch for door in guest.client.region_io_fds(0)] == [5 << 16, 5 << 16 | 1]


class TestGroups:
    def test_one_name_one_group(self) -> None:
        first, same, other = (make_device("ivshmem", {"group": name, "size": "1M"}) for name in ("a", "a", "b"))
        assert isinstance(first, Ivshmem)
        assert isinstance(same, Ivshmem)
        assert isinstance(other, Ivshmem)
        assert first.group is same.group is Group.named("a")
        assert other.group is Group.named("b")
        assert [device.id for device in (first, same, other)] == [0, 1, 0]

    def test_a_name_that_nobody_holds_any_more_is_free_for_another_size(self) -> None:
        device = make_device("ivshmem", {"group": "gone", "size": "1M"})
        del device
        gc.collect()
        assert make_device("ivshmem", {"group": "gone", "size": "2M"}).memory[MEMORY].nbytes == 2 * MIB

    def test_a_name_must_be_one(self) -> None:
        with pytest.raises(UsageError, match="a group needs a name"):
            make_device("ivshmem", {"group": ""})

    def test_a_name_is_no_group(self) -> None:
        with pytest.raises(ValueError, match=r"group 'lab' is no Group; Group.named\('lab'\)"):
            Ivshmem(group="lab", size=MIB)

    def test_another_size_is_refused(self) -> None:
        first = make_device("ivshmem", {"group": "sizes", "size": "1M"})
        with pytest.raises(UsageError, match=r"size 0x200000: its group shares 0x100000 bytes, set by the first"):
            make_device("ivshmem", {"group": "sizes", "size": "2M"})
        again = make_device("ivshmem", {"group": "sizes", "size": "1M"})
        assert isinstance(first, Ivshmem)
        assert isinstance(again, Ivshmem)
        assert (first.id, again.id) == (0, 1)

    def test_a_group_without_members_has_no_memory(self) -> None:
        with pytest.raises(ValueError, match="no members"):
            Group().memory()

    def test_the_memory_lives_as_long_as_the_group(self) -> None:
        group = Group()
        (first,) = members(group, 1)
        first.memory[MEMORY][:4] = b"kept"
        first.leave()
        del first
        gc.collect()
        (second,) = members(group, 1)
        assert (second.id, bytes(second.memory[MEMORY][:4])) == (0, b"kept")

    def test_it_keeps_nothing_that_is_gone(self) -> None:
        with no_fd_leaks():
            group = Group()
            for round_ in range(20):
                with guests(*members(group, 2, 3)) as (a, b):
                    assert (a.id, b.id) == (0, 1)
                    a.ring(1, 2)
                    assert b.heard() == [2], round_
                gc.collect()
                assert group.ids == []
            del group

    @pytest.mark.parametrize("grouped", [True, False])
    def test_memory_that_others_have_does_not_migrate(self, grouped: bool) -> None:
        options = {"group": Group()} if grouped else {}
        with attached(Ivshmem(size=MIB, **options)) as client:
            calls: list[Callable[[], object]] = [client.migration_flags, client.migration_get_state]
            for call in calls:
                if grouped:
                    with pytest.raises(CommandError) as caught:
                        call()
                    assert caught.value.errno == errno.EINVAL
                else:
                    assert call()


class TestMemory:
    @pytest.mark.parametrize("trapped", [0, PAGE])
    def test_what_one_writes_the_others_read(self, trapped: int) -> None:
        group = Group()
        devices = [Ivshmem(group=group, size=MIB, trapped=at) for at in (0, trapped, 0)]
        rng = random.Random(trapped)
        with guests(*devices) as (a, b, c):
            data = rng.randbytes(MIB)
            a.memory[:] = data
            assert bytes(b.memory) == data[trapped:]
            assert b.client.region_read(MEMORY, 0, PAGE) == data[:PAGE]
            b.client.region_write(MEMORY, 8, b"by message")
            assert bytes(c.memory[8:18]) == bytes(a.memory[8:18]) == b"by message"
            b.memory[-1:] = b"!"
            assert c.client.region_read(MEMORY, MIB - 1, 1) == b"!"

    def test_a_client_can_resize_it_for_nobody(self) -> None:
        with guests(*members(Group(), 1, 1)) as (a, b):
            fd = a.client.regions[MEMORY].fd
            assert fd is not None
            for size in (0, 2 * MIB):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd.fileno(), size)
            assert len(bytes(b.memory)) == MIB

    def test_a_reset_of_one_is_none_of_the_others(self) -> None:
        with guests(*members(Group(), 1, 1)) as (a, b):
            a.memory[:4] = b"kept"
            b.client.reset()
            assert bytes(b.memory[:4]) == b"kept"
            assert (a.id, b.id) == (0, 1)
            a.ring(1)
            assert b.heard() == [0]


class TestDoorbells:
    def test_each_vector_of_each_peer(self) -> None:
        with guests(*members(Group(), 1, 3, 2)) as all_of_them:
            for ringer, (id, peer) in itertools.product(all_of_them, enumerate(all_of_them)):
                for vector in range(len(peer.bells)):
                    ringer.ring(id, vector)
                    assert [one.heard() for one in all_of_them] == [
                        [vector] if one is peer else [] for one in all_of_them
                    ]

    def test_the_last_vector_of_the_last_id(self) -> None:
        group = Group()
        (low,) = members(group, 1)
        last = Ivshmem(group=group, size=MIB, id=65535, vectors=2048)
        with attached(low) as client, attached(last) as high, events(1) as (bell,):
            high.set_irqs(PciIrq.MSIX, ASSIGN, 2047, 1, [bell.fd])
            for vector, signals in ((2047, 1), (2048, 0), (65535, 0)):
                client.region_write(REGISTERS, DOORBELL, (65535 << 16 | vector).to_bytes(4, "little"))
                high.region_read(REGISTERS, POSITION, 4)
                assert bell.take() == signals

    def test_vectors_that_a_peer_does_not_have_are_nothing_to_log(self, caplog: pytest.LogCaptureFixture) -> None:
        with guests(*members(Group(), 1, 2)) as (a, b):
            for vector in (2, 3, 2047, 2048, 65535):
                a.ring(1, vector)
            assert b.heard() == []
            a.ring(1, 1)
            assert b.heard() == [1]
        assert_quiet(caplog)

    def test_a_ring_before_the_eventfd_is_pending(self) -> None:
        group = Group()
        a, b = members(group, 1, 3)
        with guests(a) as (ringer,), attached(b) as client, events(3) as bells:
            ringer.ring(1, 1)
            assert client.region_read(TABLE, PENDING, 8) == b"\2" + bytes(7)
            client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 3, [bell.fd for bell in bells])
            assert [bell.take() for bell in bells] == [0, 1, 0]
            assert client.region_read(TABLE, PENDING, 8) == bytes(8)

    def test_rings_wait_for_a_client_and_do_not_pile_up(self) -> None:
        group = Group()
        a, b = members(group, 1, 3)
        with guests(a) as (ringer,), serving(b) as path, no_fd_leaks():
            for _ in range(2000):
                ringer.ring(1, 2, posted=True)
            ringer.ring(1, 0)
            with Client.connect(path, TIMEOUT) as client:
                assert client.region_read(TABLE, PENDING, 8) == b"\5" + bytes(7)
                with guest_of(client, 3) as guest:
                    assert [bell.take() for bell in guest.bells] == [1, 0, 1]
            with Client.connect(path, TIMEOUT) as client:
                assert client.region_read(TABLE, PENDING, 8) == bytes(8)

    def test_a_client_that_leaves_and_comes_back_hears_what_was_rung_meanwhile(self) -> None:
        group = Group()
        (a,) = members(group, 1)
        b = Left(group=group, size=MIB, vectors=2)
        with guests(a) as (ringer,), serving(b) as path:
            for round_ in range(30):
                with Client.connect(path, TIMEOUT) as client, guest_of(client, 2) as guest:
                    assert guest.heard() == ([1] if round_ else [])
                    assert int.from_bytes(guest.memory[:4], "little") == round_
                    ringer.ring(1, 0)
                    assert guest.bells[0].wait() == 1
                assert b.left.acquire(timeout=TIMEOUT)
                ringer.memory[:4] = (round_ + 1).to_bytes(4, "little")
                ringer.ring(1, 1)

    def test_one_that_left_the_group_is_not_rung_and_its_successor_is(self) -> None:
        group = Group()
        a, b = members(group, 1, 1)
        with guests(a, b) as (ringer, left):
            b.leave()
            b.leave()  # once is enough
            ringer.ring(1)
            left.ring(1)  # itself it may ring
            assert [bell.wait() for bell in left.bells] == [1]
            (successor,) = members(group, 1)
            assert successor.id == 1
            b.leave()  # the id is another's now
            assert group.ids == [0, 1]
            with guests(successor) as (guest,):
                assert guest.heard() == []  # what was rung before it was there is not for it
                ringer.ring(1)
                assert (guest.heard(), left.heard()) == ([0], [])

    def test_no_other_peer_is_in_the_ioeventfds(self) -> None:
        """A client could take what is meant for a peer, or have its server wait for a full counter."""
        with guests(*members(Group(), 2, 2)) as (a, b):
            for guest in (a, b):
                doorbells = guest.client.region_io_fds(0)
                assert [door.datamatch >> 16 for door in doorbells] == [guest.id] * 2
                for door in doorbells:
                    assert door.fd is not None
                    door.fd.close()

    def test_a_client_that_does_not_listen_holds_nobody_up(self) -> None:
        """Its eventfd is full and would block; its own server does not write to it, and the ringer never touches it."""
        with guests(*members(Group(), 1, 1)) as (ringer, deaf):
            os.set_blocking(deaf.bells[0].fd, True)
            os.eventfd_write(deaf.bells[0].fd, (1 << 64) - 2)
            for _ in range(100):
                ringer.ring(1)
            deaf.settle()
            assert ringer.id == 0


WRITES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 0xFFFF_FFFF), st.just(4), st.just(DOORBELL)),
        st.tuples(
            st.builds(lambda peer, vector: peer << 16 | vector, st.sampled_from([0, 1, 5, 65535]), st.integers(0, 3)),
            st.sampled_from([1, 2, 4, 8]),
            st.sampled_from([0, 4, POSITION, DOORBELL, DOORBELL + 4]),
        ),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def three() -> Iterator[dict[int, Guest]]:
    """By id, the guests of three members."""
    group = Group()
    devices = [Ivshmem(group=group, size=MIB, vectors=vectors, id=id) for id, vectors in ((0, 1), (5, 3), (65535, 2))]
    with guests(*devices) as found:
        yield {device.id: guest for device, guest in zip(devices, found, strict=True)}


class TestHostileDoorbells:
    @given(writes=WRITES, ringer=st.sampled_from([0, 5, 65535]), posted=st.booleans())
    @example(writes=[(0xFFFF_FFFF, 4, DOORBELL)], ringer=65535, posted=False)
    @example(writes=[(5 << 16 | 3, 4, DOORBELL), (1 << 16, 4, DOORBELL)], ringer=5, posted=False)
    @settings(deadline=None, max_examples=150)
    def test_any_value_rings_whom_it_names_or_nobody(
        self, three: dict[int, Guest], writes: list[tuple[int, int, int]], ringer: int, posted: bool
    ) -> None:
        rung: dict[int, set[int]] = {id: set() for id in three}
        for value, size, offset in writes:
            data = value.to_bytes(8, "little")[:size]
            three[ringer].client.region_write(REGISTERS, offset, data, posted=posted)
            registers = (bytes(offset) + data).ljust(DOORBELL + 4, b"\0")
            peer, vector = divmod(int.from_bytes(registers[DOORBELL : DOORBELL + 4], "little"), 1 << 16)
            if offset <= DOORBELL < offset + size and peer in three and vector < len(three[peer].bells):
                rung[peer].add(vector)
        three[ringer].settle()  # what was posted has arrived
        assert {id: set(guest.heard()) for id, guest in three.items()} == rung


class TestManyThreads:
    def test_a_message_goes_round_and_round(self) -> None:
        """Three guests in three threads: each waits for its interrupt, checks all of the data, changes it, rings on."""
        rounds, count = 150, 3
        devices = members(Group(), 2, 2, 2)

        def guest_program(guest: Guest, me: int) -> int:
            seen = 0
            for turn in range(me, rounds * count, count):
                if turn:
                    seen += guest.bells[turn % 2].wait()
                    expected = random.Random(turn - 1).randbytes(2 * PAGE)
                    assert bytes(guest.memory[: 2 * PAGE]) == expected, turn
                guest.memory[: 2 * PAGE] = random.Random(turn).randbytes(2 * PAGE)
                guest.ring((me + 1) % count, (turn + 1) % 2, posted=turn % 5 == 0)
            return seen

        with guests(*devices) as all_of_them, ThreadPoolExecutor(count) as pool:
            programs = [pool.submit(guest_program, guest, me) for me, guest in enumerate(all_of_them)]
            assert sum(program.result(6 * TIMEOUT) for program in programs) == rounds * count - 1

    def test_everyone_rings_everyone_at_once(self) -> None:
        """After the storm each vector was heard, and one more ring of each is heard as well: nothing is stuck."""
        count, vectors = 3, 4
        with guests(*members(Group(), *[vectors] * count)) as all_of_them, ThreadPoolExecutor(count) as pool:

            def storm(guest: Guest, seed: int) -> None:
                rng = random.Random(seed)
                for _ in range(400):
                    guest.ring(rng.randrange(count), rng.randrange(vectors), posted=rng.random() < 0.9)
                for peer, vector in itertools.product(range(count), range(vectors)):
                    guest.ring(peer, vector)

            list(pool.map(storm, all_of_them, range(count), timeout=6 * TIMEOUT))
            assert [guest.heard() for guest in all_of_them] == [list(range(vectors))] * count
            assert [guest.heard() for guest in all_of_them] == [[]] * count
            for guest in all_of_them:
                for peer, vector in itertools.product(range(count), range(vectors)):
                    guest.ring(peer, vector)
                assert [one.heard() for one in all_of_them] == [list(range(vectors))] * count

    def test_devices_join_and_leave_while_they_are_rung(self) -> None:
        group = Group()
        (ringer,) = members(group, 1)
        stop = threading.Event()

        def ring_on(guest: Guest) -> int:
            rings = 0
            while not stop.is_set():
                guest.ring(1, rings % 2)
                rings += 1
            return rings

        with guests(ringer) as (guest,), ThreadPoolExecutor(1) as pool:
            ringing = pool.submit(ring_on, guest)
            try:
                for _ in range(30):
                    (comer,) = members(group, 2)
                    assert comer.id == 1
                    with guests(comer) as (other,):
                        for bell in other.bells:
                            assert bell.wait() >= 1
                    comer.leave()
            finally:
                stop.set()
            assert ringing.result(TIMEOUT) > 30
            assert guest.id == 0

    def test_no_ring_is_lost_between_ring_and_take(self) -> None:
        peer = Peer(0, 2048)
        poll = select.poll()
        poll.register(peer.fileno(), select.POLLIN)
        heard: list[int] = []

        def ring_all_from(first: int) -> None:
            for vector in range(first, 2048, 4):
                peer.ring(vector)

        with ThreadPoolExecutor(4) as pool:
            ringers = [pool.submit(ring_all_from, first) for first in range(4)]
            while len(set(heard)) < 2048:
                assert poll.poll(TIMEOUT * 1000), f"{2048 - len(set(heard))} vectors were lost"
                heard += peer.take()
            for ringer in ringers:
                ringer.result(TIMEOUT)
        assert peer.take() == []
        assert not poll.poll(0)

    @pytest.mark.parametrize("early", [True, False])
    def test_a_ring_while_another_is_taken(self, monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
        peer = Peer(0, 2)

        def interrupted(fd: int) -> int:
            monkeypatch.undo()
            if early:
                peer.ring(1)
            signals = take_signals(fd)
            if not early:
                peer.ring(1)
            return signals

        monkeypatch.setattr(ivshmem, "take_signals", interrupted)
        peer.ring(0)
        heard = peer.take()
        assert 0 in heard
        poll = select.poll()
        poll.register(peer.fileno(), select.POLLIN)
        assert 1 in heard or poll.poll(0), "nobody will ever look"

    def test_members_that_join_at_once_have_ids_of_their_own(self) -> None:
        group = Group()
        with ThreadPoolExecutor(8) as pool:
            peers = list(pool.map(lambda _: group.join(MIB, 1), range(200), timeout=TIMEOUT))
        assert sorted(peer.id for peer in peers) == group.ids == list(range(200))


def test_a_reset_forgets_what_was_rung() -> None:
    group = Group()
    device = Ivshmem(size=1 << 16, group=group, vectors=2)
    os.eventfd_write(device.regions[0].io_fds[1].fd, 1)
    group.ring(device.id, 0)
    device.reset()
    with attached(device) as client:
        client.region_read(7, 0, 4)
    assert device.irq.pba() == bytes(8)
