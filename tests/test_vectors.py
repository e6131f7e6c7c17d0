"""Traffic recorded from the Rust crate's server and client: we answer as it does, and understand its answers.

What must be equal are the fields of a reply, not its oddities: every tolerated difference stands in QUIRKS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vfio_user import Client, Irq, Region, Server, ServerBackend
from vfio_user.devices.edu import Edu
from vfio_user.devices.gpio import Gpio
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.errors import CommandError
from vfio_user.fds import OwnedFd
from vfio_user.wire import messages as m
from vfio_user.wire.commands import COMMANDS
from vfio_user.wire.constants import HEADER_SIZE, Command, DeviceFlags, HeaderFlags, IrqSetFlags, RegionFlags

from .device_support import TIMEOUT, Event, events, guest_memory

VECTORS = Path(__file__).parent / "data" / "rust-vfio-user.jsonl"
OUT_OF_RANGE = 1 << 40

Fields = dict[str, Any]
OK, ERROR = int(HeaderFlags.REPLY), int(HeaderFlags.REPLY | HeaderFlags.ERROR)


class Vector(NamedTuple):
    name: str
    request: bytes
    reply: bytes

    @property
    def fds_out(self) -> int:
        """Descriptors that went with the request."""
        found = re.search(r"(?<!\+)(\d+) ?fds?(?: out|\)$|$)", self.name)
        return int(found[1]) if found else self.name.endswith("dma_map/fd")

    @property
    def fds_back(self) -> int:
        """Descriptors that came with the reply."""
        found = re.search(r"(\d+) fds back|\+(\d+) fd", self.name)
        return int(next(filter(None, found.groups()))) if found else 0


def recorded(prefix: str) -> list[Vector]:
    rows = map(json.loads, VECTORS.read_text(encoding="utf-8").splitlines())
    return [
        Vector(row["name"], bytes.fromhex(row["request_hex"]), bytes.fromhex(row["reply_hex"]))
        for row in rows
        if row["name"].startswith(prefix)
    ]


class Quirk(NamedTuple):
    """Fields that differ, each as (recorded, ours); None: not there. And why ours is right."""

    differences: dict[str, tuple[Any, Any]]
    reason: str


NO_ERRNO = Quirk({"error_no": (0, errno.EINVAL)}, "the crate's error replies carry no errno, ours say why")
SHORT_CAPS = Quirk(
    {"flags": (0xF, 0x7), "cap_offset": (32, 0), "fds": (0, 1)},
    "the crate sets CAPS without the capabilities in the reply, which QEMU refuses; our fd comes whenever MMAP is set",
)
OLD_MINOR = Quirk({"minor": (0, 1)}, "the crate serves 0.0 to a client of 0.1; the lower of both minors is ours, 1")
NO_FD = Quirk({"fds": (0, 1)}, "the crate sends no fd for a mmap-able region without sparse areas")

QUIRKS = {
    "gpio/version": OLD_MINOR,
    "sparse/version": OLD_MINOR,
    "rustclient/gpio/00/version(id=0, 0 fds out, 0 fds back)": OLD_MINOR,
    "rustclient/sparse/00/version(id=0, 0 fds out, 0 fds back)": OLD_MINOR,
    "gpio/error/set_irqs/data_bool": NO_ERRNO,
    "gpio/error/unknown-command-99/no-body": NO_ERRNO,
    "gpio/error/unsupported-dma_read/no-body": NO_ERRNO,
    "gpio/dma_unmap/all": Quirk(
        {
            "reply_flags": (OK, ERROR),
            "msg_size": (40, HEADER_SIZE),
            "error_no": (0, errno.EINVAL),
            "argsz": (24, None),
            "flags": (4, None),
            "address": (0, None),
            "size": (0, None),
            "data": ("", None),
        },
        "the crate takes 4 for ALL; libvfio-user's ALL is 2, and 4 is no flag",
    ),
    "gpio/region_read/zero-length": Quirk(
        {
            "msg_size": (32, HEADER_SIZE),
            "offset": (0x40, None),
            "region": (2, None),
            "count": (0, None),
            "data": ("", None),
        },
        "nothing read is answered without payload, as libvfio-user does",
    ),
    "sparse/region_info/0/argsz32": SHORT_CAPS,
    "rustclient/sparse/02/region_info(id=2, 0 fds out, 0 fds back)": SHORT_CAPS,
    "sparse/region_info/1/mmap-without-caps(no fd sent: quirk)": NO_FD,
    "rustclient/sparse/04/region_info(id=4, 0 fds out, 0 fds back)": NO_FD,
    "sparse/error/region_read/backend-EINVAL-out-of-range(errno 0: quirk)": NO_ERRNO,
}


def fields(reply: bytes, fds: int) -> Fields:
    """A reply, decoded: every field by its name."""
    header = m.Header.parse(reply)
    found: Fields = {
        "msg_id": header.msg_id,
        "command": header.command,
        "msg_size": header.msg_size,
        "reply_flags": header.flags,
        "error_no": header.error_no,
        "fds": fds,
    }
    payload = reply[HEADER_SIZE:]
    if not payload:
        return found
    layout = COMMANDS[header.command].reply
    fixed = layout.parse(payload)
    found |= {one.name: getattr(fixed, one.name) for one in dataclasses.fields(fixed)}  # type: ignore[arg-type]
    tail = payload[layout.LAYOUT.size :]
    if header.command == Command.VERSION:
        assert tail.endswith(b"\0")
        del found["msg_size"]  # the JSON's spacing is free
        found["data"] = json.loads(tail[:-1])
    elif isinstance(fixed, m.RegionInfo) and tail:
        chain = m.parse_capability_chain(payload, fixed.cap_offset)
        found["data"] = [(head, m.parse_sparse_areas(payload, at)) for head, at in chain]
    else:
        found["data"] = tail.hex()
    return found


def differences(theirs: Fields, ours: Fields) -> dict[str, tuple[Any, Any]]:
    names = theirs.keys() | ours.keys()
    return {name: (theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)}


def receive(sock: socket.socket) -> tuple[bytes, list[OwnedFd]]:
    """One message, with its descriptors; empty at the end of the stream."""
    head, fds, _, _ = socket.recv_fds(sock, HEADER_SIZE, 16)
    if not head:
        return b"", []
    body = sock.recv(size, socket.MSG_WAITALL) if (size := m.Header.parse(head).msg_size - HEADER_SIZE) else b""
    return head + body, list(map(OwnedFd, fds))


def replay(backend: ServerBackend, vectors: Sequence[Vector], event: Event, memory: int) -> dict[str, Any]:
    """Send recorded requests in order; how our replies differ from the recorded ones, by name."""
    found = {}
    ours, theirs = socket.socketpair()
    with ours, Server(backend, sock=theirs) as server:
        ours.settimeout(TIMEOUT)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for vector in vectors:
                command = m.Header.parse(vector.request).command
                fd = event.fd if command == Command.DEVICE_SET_IRQS else memory
                socket.send_fds(ours, [vector.request], [fd] * vector.fds_out)
                if vector.reply:
                    reply, fds = receive(ours)
                    difference = differences(fields(vector.reply, vector.fds_back), fields(reply, len(fds)))
                    found.update({vector.name: difference} if difference else {})
                    for received in fds:
                        received.close()
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT)
    assert not thread.is_alive()
    return found


def tolerated(vectors: Iterable[Vector]) -> dict[str, dict[str, tuple[Any, Any]]]:
    return {vector.name: QUIRKS[vector.name].differences for vector in vectors if vector.name in QUIRKS}


PATTERN = bytes(7 * position & 0xFF for position in range(0x100)) * 16
"""What the recorded device holds at each offset of each of its regions, for 4 KiB."""


class Sparse(ServerBackend):
    """The device that the ``sparse`` prefixes were recorded from, as they describe it."""

    resettable = True
    irqs = [Irq(1), Irq(1), Irq(16), Irq(1), Irq(1)]

    def __init__(self, memory: int) -> None:
        self.regions = [
            Region(0x400000, fd=memory, sparse_areas=((0x1000, 0x2000), (0x8000, 0x1000))),
            Region(0x1000, fd=memory),
            *(Region(flags=0) for _ in range(5)),
            Region(0x400000),
            Region(flags=0),
        ]
        self.calls: list[str] = []

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        data[:] = PATTERN[offset : offset + len(data)]

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        self.calls.append(f"write {region} {offset} {data.hex()}")

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        self.calls.append(f"map {address:#x} {size:#x} {fd is not None}")
        if fd is not None:
            fd.close()

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        self.calls.append(f"unmap {address:#x} {size:#x}")

    def set_irqs(self, index: int, flags: int, start: int, count: int, fds: Sequence[OwnedFd]) -> None:
        self.calls.append(f"irqs {index} {flags:#x} {start} {count} {len(fds)}")
        for fd in fds:
            fd.close()

    def reset(self) -> None:
        self.calls.append("reset")


@pytest.mark.parametrize(("prefix", "interrupts"), [("gpio/", 2), ("rustclient/gpio/", 0)])
def test_gpio_answers_as_recorded(prefix: str, interrupts: int) -> None:
    vectors = recorded(prefix)
    assert len(vectors) > 20
    with events(1) as (event,), guest_memory(1 << 20) as memory:
        assert replay(Gpio(), vectors, event, memory) == tolerated(vectors)
        assert event.take() == interrupts


def test_a_backend_declared_like_the_recorded_one_answers_like_it() -> None:
    vectors = recorded("sparse/")
    with events(1) as (event,), guest_memory(1 << 22) as memory:
        assert replay(Sparse(memory), vectors, event, memory) == tolerated(vectors)


def test_the_hooks_behind_the_recorded_requests_of_the_rust_client() -> None:
    vectors = recorded("rustclient/sparse/")
    with events(1) as (event,), guest_memory(1 << 22) as memory:
        backend = Sparse(memory)
        assert replay(backend, vectors, event, memory) == tolerated(vectors)
    assert backend.calls == [
        "write 7 4 0300",
        "irqs 0 0x24 0 1 1",
        "irqs 0 0x21 0 0 0",
        "map 0x100000 0x100000 True",
        "unmap 0x100000 0x100000",
        "reset",
        "irqs 0 0x21 0 0 0",  # the client left
    ]


def ask(sock: socket.socket, request: bytes, fds: Sequence[int]) -> bytes:
    """Our reply to a request; its descriptors are closed."""
    socket.send_fds(sock, [request], fds)
    reply, received = receive(sock)
    for fd in received:
        fd.close()
    return reply


@pytest.mark.parametrize(
    ("device", "irq"), [(Gpio, 0), (Edu, 0), (partial(Ivshmem, size=1 << 16, trapped=4096), 2)], ids=str
)
def test_any_device_takes_the_set_up_of_the_rust_client_which_is_cloud_hypervisors(
    device: Callable[[], ServerBackend], irq: int
) -> None:
    """As recorded; of its own it asks again, under the same id, for region information that needs more room.

    The interrupt index is the first that the device has, as the client finds out by IRQ_INFO.
    """
    ours, theirs = socket.socketpair()
    with ours, Server(device(), sock=theirs) as server, events(1) as (event,), guest_memory(1 << 20) as memory:
        ours.settimeout(TIMEOUT)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for vector in recorded("rustclient/gpio/"):
            request, command = bytearray(vector.request), m.Header.parse(vector.request).command
            if command == Command.DEVICE_SET_IRQS:
                request[HEADER_SIZE + 8] = irq
            fds = [event.fd if command == Command.DEVICE_SET_IRQS else memory] * vector.fds_out
            reply = ask(ours, bytes(request), fds)
            assert m.Header.parse(reply).flags == OK, vector.name
            if command == Command.DEVICE_GET_REGION_INFO:
                room = m.RegionInfo.parse(reply[HEADER_SIZE:]).argsz
                request[HEADER_SIZE : HEADER_SIZE + 4] = room.to_bytes(4, "little")
                whole = ask(ours, bytes(request), ())
                assert len(whole) == HEADER_SIZE + room, vector.name
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_every_quirk_belongs_to_a_vector_and_has_a_reason() -> None:
    names = {vector.name for vector in recorded("")}
    assert QUIRKS.keys() <= names
    assert all(quirk.reason for quirk in QUIRKS.values())


class Player(threading.Thread):
    """A server that knows nothing but the recorded replies: it looks up what it is asked."""

    def __init__(self, sock: socket.socket, vectors: Iterable[Vector], memory: int) -> None:
        super().__init__()
        self._sock = sock
        self._memory = memory
        self._replies: dict[tuple[int, bytes], list[Vector]] = {}
        self.unknown: list[str] = []
        for vector in vectors:
            self._replies.setdefault(self._key(vector.request), []).append(vector)

    @staticmethod
    def _key(request: bytes) -> tuple[int, bytes]:
        """What is asked for, without the id, the proposal, and argsz where it may differ."""
        command = m.Header.parse(request).command
        payload = request[HEADER_SIZE:]
        if command == Command.VERSION:
            return command, b""
        if command in (Command.DEVICE_GET_INFO, Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_IRQ_INFO):
            return command, payload[4:]
        return command, payload

    def _choose(self, request: bytes) -> Vector | None:
        """The last recorded reply that was asked for with no more room than this request has."""
        found = self._replies.get(self._key(request), [])
        room = request[HEADER_SIZE : HEADER_SIZE + 4]
        info = m.Header.parse(request).command == Command.DEVICE_GET_REGION_INFO
        fitting = [v for v in found if not info or v.request[HEADER_SIZE : HEADER_SIZE + 4] <= room]
        return fitting[-1] if fitting else None

    def run(self) -> None:
        with contextlib.suppress(ConnectionError):
            while (message := receive(self._sock))[0]:
                request, fds = message
                for fd in fds:
                    fd.close()
                vector = self._choose(request)
                if vector is None:
                    self.unknown.append(request.hex())
                    self._sock.shutdown(socket.SHUT_RDWR)
                    return
                fds_back = [self._memory] * vector.fds_back
                socket.send_fds(self._sock, [request[:2] + vector.reply[2:]], fds_back)


@contextlib.contextmanager
def playing(prefixes: Sequence[str], memory: int) -> Iterator[Client]:
    """A client of the recorded server."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(TIMEOUT)
    player = Player(theirs, [vector for prefix in prefixes for vector in recorded(prefix)], memory)
    with theirs:
        player.start()
        try:
            with Client(ours, TIMEOUT) as client:
                yield client
        finally:
            ours.close()
            player.join(TIMEOUT)
    assert not player.is_alive()
    assert player.unknown == []


def test_our_client_understands_the_recorded_gpio_server() -> None:
    with events(1) as (event,), guest_memory(4096) as memory, playing(["gpio/", "rustclient/gpio/"], memory) as client:
        assert client.version == (0, 0)
        assert client.capabilities.data_xfer_size == 1 << 20
        assert client.info.flags == DeviceFlags.PCI | DeviceFlags.RESET
        assert [region.size for region in client.regions] == [0, 0, 0x100, 0, 0, 0, 0, 0x100, 0]
        assert client.regions[2].flags == RegionFlags.READ | RegionFlags.WRITE
        assert [irq.count for irq in client.irqs] == [1, 0, 0, 0, 0]
        assert client.region_read(7, 0, 4).hex() == "4f49c80d"
        client.region_write(7, 4, b"\3\0")
        client.set_irqs(0, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, 0, 1, [event.fd])
        assert client.region_read(2, 0, 1) == b"\1"
        client.set_irqs(0, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 0, 0)
        client.dma_map(0x100000, 0x100000, memory)
        client.dma_unmap(0x100000, 0x100000)
        client.reset()
        with pytest.raises(CommandError) as refused:
            client.region_read(9, 0, 4)
        assert refused.value.errno == errno.EINVAL


def test_our_client_maps_the_recorded_sparse_region() -> None:
    with guest_memory(0x400000) as memory, playing(["rustclient/sparse/", "sparse/"], memory) as client:
        first, second = client.regions[:2]
        assert first.sparse_areas == ((0x1000, 0x2000), (0x8000, 0x1000))
        assert first.fd is not None
        os.pwrite(memory, b"shared", 0x8000)
        areas = first.map()
        assert [(area.offset, area.size) for area in areas] == list(first.sparse_areas)
        assert bytes(areas[1].memory[:6]) == b"shared"
        assert second.flags & RegionFlags.MMAP
        assert second.fd is None
        assert second.map() == ()  # mmap-able, but the fd never came
        assert [irq.count for irq in client.irqs] == [1, 1, 16, 1, 1]
        assert client.region_read(0, 0, 16) == PATTERN[:16]
        with pytest.raises(CommandError) as refused:
            client.region_read(0, OUT_OF_RANGE, 4)
        assert refused.value.errno == errno.EINVAL  # the reply says 0
