"""``vfio-user check --client``: our clients pass all of it, clients that break a rule are caught."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from vfio_user import Client, DeviceState, aio
from vfio_user.testing.leaks import no_fd_leaks
from vfio_user.tools.check import CLIENT_QUIRKS, ClientChecker, Report, Selection, Verdict, client_entries
from vfio_user.tools.check.client.rules import RULES
from vfio_user.wire import messages as m
from vfio_user.wire.constants import Command, DeviceFeature, IrqSetFlags, PciIrq, PciRegion

from .check_support import EVERYTHING, TIMEOUT, ThreadClient, by_name, not_passed
from .support import RawPeer, access, dma_map, dma_unmap
from .test_cli import run

BASE, SIZE = 1 << 32, 1 << 20
ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
DISABLE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER

Work = Callable[[Path], None]


@contextlib.contextmanager
def files() -> Iterator[tuple[int, int]]:
    """Memory and an eventfd."""
    memory, event = os.memfd_create("guest"), os.eventfd(0)
    os.ftruncate(memory, SIZE)
    try:
        yield memory, event
    finally:
        os.close(memory)
        os.close(event)


def blocking(path: Path) -> None:
    """Everything that our client can do, once."""
    with files() as (memory, event), Client.connect(path, timeout=1.5) as client:
        client.dma_map(BASE, SIZE, memory)
        client.dma_map(BASE * 2, SIZE)
        config = client.region_read(PciRegion.CONFIG, 0, 256)
        client.region_write(PciRegion.CONFIG, 4, config[4:6])
        client.region_write(0, 0, b"\1\2\3\4", posted=True)
        client.region_write_multi([(0, 0, b"\1\0\0\0"), (0, 0, b"\2\0\0\0")])
        client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 3, [event] * 3)
        client.set_irqs(PciIrq.MSIX, DISABLE, 0, 0)
        with contextlib.suppress(OSError):
            client.region_io_fds(0)
        with contextlib.suppress(OSError):
            if client.probe(DeviceFeature.MIG_DEVICE_STATE):
                client.migration_set_state(DeviceState.STOP_COPY)
                saved = client.migration_read_data(1 << 16)
                client.migration_set_state(DeviceState.RESUMING)
                client.migration_write_data(saved)
                client.migration_set_state(DeviceState.RUNNING)
        client.reset()
        client.dma_unmap(BASE, SIZE)
        client.dma_unmap(BASE * 2, SIZE)


async def _asynchronous(path: Path) -> None:
    with files() as (memory, event):
        async with await aio.Client.connect(path, timeout=1.5) as client:
            await client.dma_map(BASE, SIZE, memory)
            await client.dma_map(BASE * 2, SIZE)
            config = await client.region_read(PciRegion.CONFIG, 0, 256)
            await client.region_write(PciRegion.CONFIG, 4, config[4:6])
            await client.region_write(0, 0, b"\1\2\3\4", posted=True)
            await client.region_write_multi([(0, 0, b"\1\0\0\0"), (0, 0, b"\2\0\0\0")])
            await client.set_irqs(PciIrq.MSIX, ASSIGN, 0, 3, [event] * 3)
            await client.set_irqs(PciIrq.MSIX, DISABLE, 0, 0)
            with contextlib.suppress(OSError):
                await client.region_io_fds(0)
            with contextlib.suppress(OSError):
                await client.probe(DeviceFeature.MIG_DEVICE_STATE)
            await client.reset()
            await client.dma_unmap(BASE, SIZE)
            await client.dma_unmap(BASE * 2, SIZE)


def asynchronous(path: Path) -> None:
    asyncio.run(_asynchronous(path))


def report_on(work: Work, path: Path, *only: str, timeout: float = TIMEOUT) -> Report:
    checker = ClientChecker(path, partial(ThreadClient, work), timeout, CLIENT_QUIRKS)
    return checker.run(Selection(EVERYTHING, only))


@pytest.mark.parametrize("work", [blocking, asynchronous])
def test_our_client_passes_everything(work: Work, tmp_path: Path) -> None:
    with no_fd_leaks():
        report = report_on(work, tmp_path / "played.sock")
    assert not_passed(report) == {}
    assert [one.name for one in report.results] == [one.name for one in client_entries()]
    skipped = {one.name for one in report.results if one.verdict is Verdict.SKIPPED}
    assert len(report.results) - len(skipped) > 200
    assert not {name for name in skipped if not name.startswith("client/")}
    assert not (tmp_path / "played.sock").exists()


# Clients that break a rule


def raw(work: Callable[[RawPeer], None]) -> Work:
    """A client that says what it likes, after a proper start."""

    def client(path: Path) -> None:
        with RawPeer.connect(path) as peer:
            peer.version()
            work(peer)

    return client


def _says(command: int, payload: bytes, fds: int = 0, flags: int = 0) -> Work:
    def say(peer: RawPeer) -> None:
        fd = os.memfd_create("x")
        try:
            peer.post(command, payload, [fd] * fds, flags=flags)
        finally:
            os.close(fd)
        peer.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EOFError):
            peer.read()

    return raw(say)


def _overlapping(peer: RawPeer) -> None:
    peer.ok(2, dma_map(BASE, SIZE))
    peer.call(2, dma_map(BASE + 4096, 4096))


def _unmaps_another(peer: RawPeer) -> None:
    peer.ok(2, dma_map(BASE, SIZE))
    peer.call(3, dma_unmap(BASE, 4096))


def _info_first(path: Path) -> None:
    with RawPeer.connect(path) as peer:
        peer.call(4, m.DeviceInfo(16).pack())


def _no_nul(path: Path) -> None:
    with RawPeer.connect(path) as peer:
        peer.version(b"{}")


SET_IRQS, MULTI = Command.DEVICE_SET_IRQS, Command.REGION_WRITE_MULTI
BREAKERS: dict[str, tuple[Work, str]] = {
    "VERSION is not first": (_info_first, "client/version/first"),
    "no NUL": (_no_nul, "client/version/json"),
    "VERSION again": (_says(1, m.Version(0, 2).pack()), "client/version/first"),
    "error bit in a command": (_says(4, m.DeviceInfo(16).pack(), flags=0x20), "client/device_get_info/header"),
    "argsz 0": (_says(4, m.DeviceInfo(0).pack()), "client/device_get_info/argsz"),
    "fields that are not 0": (_says(4, m.DeviceInfo(16, 3).pack()), "client/device_get_info/zeros"),
    "descriptors that belong nowhere": (_says(4, m.DeviceInfo(16).pack(), 1), "client/device_get_info/fds"),
    "a region that is not there": (_says(5, m.RegionInfo(32, 0, 9).pack()), "client/device_get_region_info/index"),
    "an index that is not there": (_says(7, m.IrqInfo(16, 0, 5).pack()), "client/device_get_irq_info/index"),
    "a short read": (_says(9, access(7, 0, 4)[:-1]), "client/region_read/size"),
    "a read behind the end": (_says(9, access(7, 4096, 4)), "client/region_read/place"),
    "a write with less data": (_says(10, access(7, 4, 4) + b"\0"), "client/region_write/size"),
    "two actions": (_says(SET_IRQS, m.IrqSet(20, 0x31, 0, 0, 1).pack()), "client/device_set_irqs/flags"),
    "an interrupt too many": (_says(SET_IRQS, m.IrqSet(20, 0x24, 2, 4, 1).pack()), "client/device_set_irqs/range"),
    "a memfd for an eventfd": (_says(SET_IRQS, m.IrqSet(20, 0x24, 2, 0, 1).pack(), 1), "client/device_set_irqs/data"),
    "maps that overlap": (raw(_overlapping), "client/dma_map/range"),
    "a map in no pages": (_says(2, dma_map(1, 1)), "client/dma_map/range"),
    "map flags": (_says(2, dma_map(0, 4096, flags=0x80)), "client/dma_map/flags"),
    "an unmap of a part": (raw(_unmaps_another), "client/dma_unmap/range"),
    "GET and SET": (_says(16, m.Feature(8, 0x30001).pack()), "client/device_feature/operation"),
    "a command that is none": (_says(99, b""), "client/commands"),
    "a write of 9 bytes": (
        _says(MULTI, m.WriteMulti(1).pack() + m.WriteMultiEntry(0, 0, 9, b"").pack()),
        "client/region_write_multi/entries",
    ),
    "room for less than is asked": (_says(17, m.MigData(8, 8).pack()), "client/mig_data_read/argsz"),
}


@pytest.mark.parametrize("breaker", BREAKERS)
def test_a_client_that_breaks_a_rule_is_caught_by_it(breaker: str, tmp_path: Path) -> None:
    work, case = BREAKERS[breaker]
    found = by_name(report_on(work, tmp_path / "played.sock", case))[case]
    assert found.findings, found


def test_the_rules_are_for_every_command_of_a_client() -> None:
    assert len(RULES) == 15
    assert all(len(rules) >= 3 for rules in RULES.values())


def _ignores_dma(path: Path) -> None:
    with RawPeer.connect(path) as peer:
        peer.version()
        peer.ok(2, dma_map(BASE, SIZE))
        peer.socket.settimeout(0.5)
        with contextlib.suppress(TimeoutError):  # the plain server does not ask
            peer.read()  # the DMA_READ: and away


def test_dma_that_a_client_does_not_answer(tmp_path: Path) -> None:
    found = by_name(report_on(_ignores_dma, tmp_path / "played.sock", "server/dma-read"))["server/dma-read"]
    assert [finding.code for finding in found.findings] == ["unanswered"]


def _trusts_everything(path: Path) -> None:
    with RawPeer.connect(path) as peer:
        peer.version()
        peer.call(4, m.DeviceInfo(16).pack())


def _never_ends(path: Path) -> None:
    with RawPeer.connect(path) as peer:
        peer.version()
        while True:
            peer.call(4, m.DeviceInfo(16).pack())


def test_a_client_that_talks_without_end_is_ended(tmp_path: Path) -> None:
    report = report_on(_never_ends, tmp_path / "played.sock", "server/plain", timeout=0.3)
    (plain,) = report.results
    assert plain.verdict is Verdict.MUST


def test_a_client_that_notices_nothing(tmp_path: Path) -> None:
    case = "broken/device_get_info/short-by-1"
    found = by_name(report_on(_trusts_everything, tmp_path / "played.sock", case))[case]
    assert [(finding.code, found.verdict) for finding in found.findings] == [("not-noticed", Verdict.QUIRK)]


def test_a_client_that_gives_up_where_it_must_not(tmp_path: Path) -> None:
    def picky(path: Path) -> None:
        with RawPeer.connect(path) as peer:
            if peer.version().payload[2:4] != b"\2\0":
                raise OSError("only 0.2")

    found = by_name(report_on(picky, tmp_path / "played.sock", "server/minor-0"))["server/minor-0"]
    assert [finding.code for finding in found.findings] == ["gave-up"]


# The command


def checked(path: Path, command: str, *options: str) -> tuple[int, dict[str, object], str]:
    done = run("check", "--client", "--listen", path, "--run", command, "--json", *options)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_client_that_crashes_or_hangs_or_does_not_connect(tmp_path: Path) -> None:
    only = ("--only", "server/plain")
    for command, code, options in (
        ("kill -SEGV $$", "SIGSEGV", ()),
        (f"exec {sys.executable} -c 'import os; os.kill(os.getpid(), 6)'", "SIGABRT", ()),
        ("exec sleep 60", "has not ended", ("--timeout", "0.3")),
        ("true", "did not connect", ()),
        ("exit 3", "status 3", ()),
    ):
        status, report, error = checked(tmp_path / "played.sock", command, *only, *options)
        assert status == 1
        assert error == ("vfio-user: 1 of 1 cases break what the specification demands, the first is server/plain\n")
        assert code in json.dumps(report["results"]), command


def test_info_is_a_client_that_passes(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m vfio_user info $VFIO_USER_SOCKET"
    status, report, error = checked(tmp_path / "played.sock", command, "--only", "server/plain", "--only", "client")
    assert (status, error) == (0, "")
    assert report["failed"] == report["should"] == 0


def test_without_run_one_client_is_watched(tmp_path: Path) -> None:
    path = tmp_path / "played.sock"
    work = ThreadClient(lambda path: _connect_when_there(path), path)
    report = ClientChecker(path, None, TIMEOUT).run(Selection())
    work.end()
    found = by_name(report)
    assert found["server/plain"].verdict is Verdict.PASSED
    assert found["client/version/first"].verdict is Verdict.PASSED
    assert found["server/minor-0"].skipped == "needs --run"


def _connect_when_there(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), Client.connect(path):
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def test_a_socket_that_is_there_already_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.touch()
    taken = run("check", "--client", "--listen", path, "--run", "true")
    assert (taken.returncode, taken.stderr) == (1, f"vfio-user: {path}: Address already in use\n")
    assert path.exists()
