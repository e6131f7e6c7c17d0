"""QEMU's inter-VM shared memory device (docs/specs/ivshmem-spec.rst, revision 1).

BAR0 has the registers, BAR1 the MSI-X table, BAR2 the shared memory, which clients map. With ``trapped`` the first
bytes of it come as messages, and the rest is a sparse area.

Alone, a device has one peer: itself. The devices of a :class:`Group` share one memory and ring each other, each with
a client of its own. The own doorbell is offered as ioeventfds, one for each of as many vectors as one message carries
descriptors. Other peers are rung through the register only: their eventfd in a client's hands would let it take
their signals, or fill the counter and block whoever rings next.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from weakref import WeakValueDictionary

from vfio_user.device import Bar, Device, option, parse_size, register
from vfio_user.device.files import memory_file
from vfio_user.fds import OwnedFd, signal_eventfd, take_signals
from vfio_user.pci.msi import MAX_MSIX_VECTORS
from vfio_user.server.backend import Link, RegionIoFd
from vfio_user.wire.constants import MAX_MSG_FDS, DeviceState, IoFdType, MigrationFlags

REGISTERS, TABLE, MEMORY = 0, 1, 2
"""BARs."""
POSITION, DOORBELL = 8, 12
"""IVPosition (the peer's own id) and Doorbell; interrupt mask and status, at 0 and 4, have no use without INTx."""
MAX_PEERS = 1 << 16
LOWEST_FREE = -1
"""The id of a member that takes what is left."""
DATAMATCH = 1
"""KVM_IOEVENTFD_FLAG_DATAMATCH: the eventfd is meant for one value."""


def _eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


class Peer:
    """A member of a group as the others see it: its id, and where they leave what they rang.

    Interrupts belong to the thread that serves the member's client, the doorbell is written in another's. So what was
    rung waits here, a vector once, for that thread to take it; or for the next client, while there is none.
    """

    def __init__(self, id: int, vectors: int) -> None:
        self.id, self.vectors = id, vectors
        self._rung: set[int] = set()
        self._bell = _eventfd()

    def fileno(self) -> int:
        """Readable while there is something to take."""
        return self._bell.fileno()

    def ring(self, vector: int) -> None:
        """From any thread. A vector that the member does not have is ignored."""
        if vector < self.vectors:
            self._rung.add(vector)  # before the signal: whoever takes that finds it
            signal_eventfd(self.fileno())

    def take(self) -> list[int]:
        """The vectors that were rung. What is rung meanwhile may be left, and is signalled again."""
        take_signals(self.fileno())
        return sorted(self._rung.pop() for _ in range(len(self._rung)))


class Group:
    """The ivshmem devices that share one memory: ``Ivshmem(group=group)``, as many as there are to be peers.

    The first member decides the size of the memory, which lives as long as the group. The group knows its members, it
    does not keep them: whoever wants an id free again calls :meth:`Ivshmem.leave`.
    """

    _named: WeakValueDictionary[str, Group] = WeakValueDictionary()
    _naming = threading.Lock()

    def __init__(self) -> None:
        self._peers: WeakValueDictionary[int, Peer] = WeakValueDictionary()
        self._joining = threading.Lock()
        self._memory: OwnedFd | None = None
        self._size = 0

    @classmethod
    def named(cls, name: str) -> Group:
        """The group that has this name in this process; a new one if nobody holds it any more. "" is none."""
        if not name:
            raise ValueError("a group needs a name")
        with cls._naming:
            group = cls._named.get(name)
            if group is None:
                cls._named[name] = group = cls()
            return group

    @property
    def ids(self) -> list[int]:
        """The ids of its members, in order."""
        with self._joining:
            return sorted(self._peers.keys())

    def join(self, size: int, vectors: int, id: int = LOWEST_FREE) -> Peer:
        """A new member, which belongs to the group for as long as the caller keeps it.

        Raises ValueError when the size, in bytes, is not that of the members before, or there is no such id to be had.
        """
        with self._joining:
            if self._memory is not None and size != self._size:
                raise ValueError(f"size {size:#x}: its group shares {self._size:#x} bytes, set by the first member")
            peer = Peer(self._free_id(id), vectors)
            if self._memory is None:
                self._memory, self._size = memory_file("ivshmem", size), size
            self._peers[peer.id] = peer
            return peer

    def leave(self, peer: Peer) -> None:
        """Ring ``peer`` no more; its id is free. Nothing happens if it has left already."""
        with self._joining:
            if self._peers.get(peer.id) is peer:
                del self._peers[peer.id]

    def ring(self, id: int, vector: int) -> None:
        """From any thread. A peer that does not exist, and a vector that it does not have, are ignored."""
        peer = self._peers.get(id)
        if peer is not None:
            peer.ring(vector)

    def memory(self) -> OwnedFd:
        """A descriptor of the shared memory, the caller's to keep. Raises ValueError before anyone has joined."""
        if self._memory is None:
            raise ValueError("the group has no members yet")
        return OwnedFd.duplicate(self._memory.fileno())

    def _free_id(self, wanted: int) -> int:
        if not LOWEST_FREE <= wanted < MAX_PEERS:
            raise ValueError(f"id {wanted}: 0 to {MAX_PEERS - 1} are possible, {LOWEST_FREE} is the lowest free")
        ids = range(MAX_PEERS) if wanted == LOWEST_FREE else (wanted,)
        free = next((id for id in ids if id not in self._peers), None)
        if free is None:
            taken = "no id is left in the group" if wanted == LOWEST_FREE else f"id {wanted} is another member's"
            raise ValueError(taken)
        return free


class Ivshmem(Device):
    """1af4:1110. Memory that guests share, and doorbells to interrupt each other; alone, itself."""

    vendor_id, device_id, revision, class_code = 0x1AF4, 0x1110, 1, 0x050000
    msix_bar = TABLE

    size = option(4 << 20, "bytes of shared memory, a power of two; K, M, G are understood", parse_size)
    trapped = option(0, "bytes at its start that clients reach by messages only", parse_size)
    vectors = option(1, "MSI-X vectors, 1 to 2048")
    group: Group | None = option(None, "share the memory with this process's devices of the same group", Group.named)
    id = option(LOWEST_FREE, "this peer's id, 0 to 65535; -1: the lowest that is free in the group")

    position = register(POSITION)
    doorbell = register(DOORBELL, strobe=0xFFFF_FFFF)

    def __init__(self, **options: object) -> None:
        self._doorbells: list[OwnedFd] = []
        super().__init__(**options)

    def configure(self) -> None:
        if not 1 <= self.vectors <= MAX_MSIX_VECTORS:
            raise ValueError(f"{self.vectors} vectors: 1 to {MAX_MSIX_VECTORS} are possible")
        self.msix_vectors = self.vectors
        trapped = ((0, self.trapped),) if self.trapped else ()
        shared = Bar(self.size, memory=True, bits64=True, prefetchable=True, trapped=trapped)
        shared.check()  # before a group hears of its size
        self.bars = {REGISTERS: Bar(0x100), MEMORY: shared}
        self._join()

    def _join(self) -> None:
        if self.group is not None:
            if not isinstance(self.group, Group):
                raise ValueError(f"group {self.group!r} is no Group; Group.named({self.group!r}) has that name")
            # The memory belongs to other guests as well, which go on writing: no stream could carry it along.
            self.migration = MigrationFlags(0)
        self._group = self.group or Group()
        self._peer = self._group.join(self.size, self.vectors, self.id)
        self.id = self._peer.id

    def leave(self) -> None:
        """Leave the group: the id is free, peers ring this device no more. The memory stays its own, too."""
        self._group.leave(self._peer)

    def bar_file(self, bar: int) -> OwnedFd | None:
        return self._group.memory() if bar == MEMORY else None

    def io_fds(self, bar: int) -> Sequence[RegionIoFd]:
        if bar != REGISTERS:
            return ()
        self._doorbells = [_eventfd() for _ in range(min(self.vectors, MAX_MSG_FDS))]
        return [
            RegionIoFd(IoFdType.IOEVENTFD, DOORBELL, 4, fd.fileno(), DATAMATCH, self.id << 16 | vector)
            for vector, fd in enumerate(self._doorbells)
        ]

    def connected(self, link: Link) -> None:
        super().connected(link)
        link.watch(self._peer.fileno(), self._rung_by_peers)
        for vector, fd in enumerate(self._doorbells):
            link.watch(fd.fileno(), partial(self._rung, vector, fd))

    def migration_set_state(self, state: DeviceState) -> None:
        for vector, fd in enumerate(self._doorbells):  # rung, and not seen yet: it belongs to the state
            self._rung(vector, fd)
        super().migration_set_state(state)

    def on_reset(self) -> None:
        """What was rung before is forgotten, as any interrupt that was pending."""
        self._peer.take()
        for fd in self._doorbells:
            take_signals(fd.fileno())

    def _rung_by_peers(self) -> None:
        for vector in self._peer.take():
            self.irq.trigger(vector)

    def _rung(self, vector: int, fd: OwnedFd) -> None:
        if take_signals(fd.fileno()):
            self.irq.trigger(vector)

    def bar_read(self, bar: int, offset: int, data: memoryview) -> None:
        if bar == MEMORY:  # the part of it that is trapped
            data[:] = self.memory[MEMORY][offset : offset + len(data)]

    def bar_write(self, bar: int, offset: int, data: memoryview) -> None:
        if bar == MEMORY:
            self.memory[MEMORY][offset : offset + len(data)] = data

    @position.on_read
    def _read_position(self) -> int:
        return self.id

    @doorbell.on_write
    def _ring(self, old: int, value: int) -> None:
        """Peer in the upper, vector in the lower 16 bits; what does not exist is ignored."""
        peer, vector = value >> 16, value & 0xFFFF
        if peer != self.id:
            self._group.ring(peer, vector)
        elif vector < self.vectors:  # in this very thread: it has happened when the write is answered
            self.irq.trigger(vector)
