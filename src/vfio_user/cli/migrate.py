"""``migrate``, ``receive``, ``save`` and ``restore``: the state of devices, from here to there and into files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import click
from rich.console import Console

from vfio_user.cli.inspect import open_for_reading
from vfio_user.cli.naming import connect, naming
from vfio_user.cli.options import (
    ANY_PATH,
    bandwidth_option,
    force_option,
    html_option,
    json_option,
    socket_argument,
    timeout_option,
)
from vfio_user.cli.peers import CALLS_PER_ANSWER, certificates, peer_options
from vfio_user.cli.progress import follow, render
from vfio_user.cli.reports import check_writable, show, write_page
from vfio_user.client import Client
from vfio_user.errors import MigrationError, UsageError, VfioUserError, reason_of
from vfio_user.live import Arrival, LocalDestination, MemoryRegion, Migration, Pipe, files
from vfio_user.live.remote import receive as receive_from
from vfio_user.live.report import Report, Status
from vfio_user.live.text import clean, duration, size, verdict
from vfio_user.tools.interrupts import Interrupts
from vfio_user.tools.memory import MemorySpec, guest_memory
from vfio_user.tools.migrate import Carrier, Stoppable, Target, standard_pipe, stoppable_pipe
from vfio_user.tools.places import Listener, Place, parse_place
from vfio_user.tools.saved import is_special, replaced, spooled

MIB = 1 << 20
STDIN, STDOUT, STDERR = 0, 1, 2
file_argument = click.argument("file", metavar="FILE|-", type=ANY_PATH)


@click.command(epilog="Example: vfio-user save /tmp/edu.sock edu.state")
@socket_argument
@file_argument
@timeout_option
def save(path: str, file: str, timeout: float) -> None:
    """Write the state of the device behind SOCKET into FILE; the device runs on as it was."""
    with _whole(file) as sink, connect(path, timeout) as client, Interrupts() as interrupts:
        with _telling(f"{path} is not saved to {file}"):
            files.save(client, sink, on_progress=interrupts.check)
        interrupts.check()  # the file is not in its place yet


@click.command(epilog="Example: vfio-user restore /tmp/edu.sock edu.state")
@socket_argument
@file_argument
@click.option(
    "--max-size",
    default=files.MAX_SPOOLED // MIB,
    show_default=True,
    type=click.IntRange(min=1),
    help="MiB that a pipe may bring: all of it is put aside and checked first.",
)
@timeout_option
def restore(path: str, file: str, max_size: int, timeout: float) -> None:
    """Give the state in FILE to the device behind SOCKET, which runs on with it."""
    with ExitStack() as stack:
        with naming("stdin" if file == "-" else file):
            source = stack.enter_context(open_for_reading(file))
            saved = stack.enter_context(files.opened(source, max_size=max_size * MIB))
        client = stack.enter_context(connect(path, timeout))
        interrupts = stack.enter_context(Interrupts())
        with _telling(f"{path} is not restored from {file}"):
            files.load(client, saved, on_progress=interrupts.check)


@contextmanager
def _whole(file: str) -> Iterator[BinaryIO]:
    """Where to write what shall be in ``file`` whole or not at all."""
    path = Path(file)
    if file == "-":
        if os.isatty(STDOUT):
            raise UsageError("a device's state is nothing for a terminal: redirect stdout")
        with _poured(STDOUT, "stdout") as sink:
            yield sink
    elif is_special(path):
        with _poured(file, file) as sink:
            yield sink
    else:
        with replaced(path) as sink:
            yield sink


@contextmanager
def _poured(file: str | int, name: str) -> Iterator[BinaryIO]:
    """Where to write what shall go into a pipe or a device; what fails names it."""
    try:
        with naming(name), open(file, "wb", closefd=isinstance(file, str)) as sink, spooled(sink) as spool:
            yield spool
    except BrokenPipeError as error:  # of which click would tell nobody
        raise MigrationError(reason_of(error)) from error


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """What fails within is told with what it was to be."""
    try:
        yield
    except (VfioUserError, OSError) as error:
        raise MigrationError(f"{what}: {reason_of(error)}") from error


@click.command(epilog="Example: vfio-user migrate /tmp/a.sock --exec 'ssh host2 vfio-user receive /tmp/b.sock'")
@click.argument("paths", metavar="SRC DST", nargs=-1, type=ANY_PATH)
@click.option("--device", "devices", metavar="SRC:DST", multiple=True, help="One more device of the same guest.")
@click.option("--exec", "command", metavar="COMMAND", help="In place of DST, what runs vfio-user receive: ssh ...")
@click.option("--to", metavar="PLACE", help="In place of DST, where vfio-user receive listens: HOST:PORT or a socket.")
@click.option(
    "--memory",
    metavar="SRC:DST[@ADDRESS]",
    multiple=True,
    help="A file that is the guest's memory there, and goes along; with --exec and --to SRC[@ADDRESS].",
)
@click.option("--compress", is_flag=True, help="Compress what goes to the other side, if it knows how.")
@peer_options
@json_option
@html_option
@click.option(
    "--downtime",
    default=50,
    show_default=True,
    type=click.IntRange(min=0),
    help="Milliseconds that the switch-over may take.",
)
@click.option(
    "--max-rounds", default=30, show_default=True, type=click.IntRange(min=1), help="Rounds to come to that in."
)
@force_option
@bandwidth_option
@timeout_option
def migrate(
    paths: tuple[str, ...],
    devices: tuple[str, ...],
    memory: tuple[str, ...],
    as_json: bool,
    html: str | None,
    timeout: float,
    downtime: int,
    max_rounds: int,
    force: bool,
    bandwidth: int | None,
    **way: Any,
) -> None:
    """Move the state of the device behind SRC to the one behind DST, which runs on with it; SRC stays stopped.

    What fails, Ctrl-C too, leaves SRC running as if nothing had been.
    """
    carrier = _carrier(**way)
    check_writable(html)
    sources, destinations = _sides(paths, devices, remote=carrier is not None)
    memory_here, memory_there = _memory(memory, remote=carrier is not None)
    report, verified = Report(), False
    try:
        with ExitStack() as stack:
            here, regions = _plugged(stack, sources, memory_here, timeout)
            if carrier is None:
                there, regions_there = _plugged(stack, destinations, memory_there, timeout)
                target = Target(LocalDestination(there, regions_there), there)
            else:
                target = _opened(stack, carrier, timeout)
            interrupts = stack.enter_context(Interrupts())
            job = Migration(
                here,
                Stoppable(target.destination, interrupts),
                memory=regions,
                downtime=downtime / 1000,
                max_rounds=max_rounds,
                force=force,
                bandwidth=float("inf") if bandwidth is None else float(bandwidth * MIB),
            )
            report = job.report
            follow(job, Console(stderr=True, quiet=as_json))
            verified = target.reached(here)
    except UsageError:
        raise
    except (VfioUserError, OSError) as error:
        report.error = report.error or reason_of(error)
    except KeyboardInterrupt as error:
        report.error = report.error or str(error) or "interrupted"
    show(json.dumps(report.as_json() | {"verified": verified}) if as_json else render(report))
    write_page(html, report, f"{' '.join(sources)} → {carrier.via if carrier else ' '.join(destinations)}")
    _raise_failure(report, verified)


def _carrier(
    command: str | None,
    to: str | None,
    compress: bool,
    memory_pipes: int,
    cert: Path | None,
    key: Path | None,
    ca: Path | None,
) -> Carrier | None:
    """What carries it to another process; None: the devices are both here."""
    trust = certificates(cert, key, ca)
    if to is not None and command is None:
        return Carrier(parse_place(to, trust), memory_pipes, compress)
    if trust is not None:
        raise click.UsageError("--cert, --key and --ca are for --to HOST:PORT")
    if command is not None and to is None:
        return Carrier(command, memory_pipes, compress)
    if command is not None:
        raise click.UsageError("give --exec or --to, not both")
    if compress or memory_pipes:
        raise click.UsageError("--compress and --memory-pipes are for --exec and --to")
    return None


def _sides(paths: Sequence[str], devices: Sequence[str], *, remote: bool) -> tuple[list[str], list[str]]:
    """The sockets of the sources and of the destinations."""
    each = 1 if remote else 2
    if len(paths) not in ({each, 0} if devices else {each}):
        raise click.UsageError(
            "give SRC, and --exec or --to for the other side" if remote else "give SRC and DST, or --exec, or --to"
        )
    rows = [list(paths)] if paths else []
    for device in devices:
        rows.append(device.split(":"))
        if len(rows[-1]) != each or not all(rows[-1]):
            raise click.UsageError(f"--device {device}: write {'SRC' if remote else 'SRC:DST'}")
    return [row[0] for row in rows], [path for row in rows for path in row[1:]]


def _memory(texts: Sequence[str], *, remote: bool) -> tuple[list[MemorySpec], list[MemorySpec]]:
    """The guest's memory here and, unless that is ``remote``, there."""
    if remote:
        return list(map(MemorySpec.parse, texts)), []
    pairs = list(map(MemorySpec.parse_pair, texts))
    return [here for here, _ in pairs], [there for _, there in pairs]


def _plugged(
    stack: ExitStack, paths: Sequence[str], memory: Sequence[MemorySpec], timeout: float
) -> tuple[list[Client], Sequence[MemoryRegion]]:
    """The devices behind ``paths``, which reach the guest's memory for as long as ``stack`` is not left."""
    guest = stack.enter_context(guest_memory(memory))
    clients = [stack.enter_context(connect(path, timeout)) for path in paths]
    guest.map_into(clients)
    return clients, guest.regions


def _opened(stack: ExitStack, carrier: Carrier, timeout: float) -> Target:
    """The destination at the other end of ``carrier``."""
    with naming(carrier.via):
        return carrier.opened(stack, timeout, timeout * CALLS_PER_ANSWER)


def _raise_failure(report: Report, verified: bool) -> None:
    if report.status is not Status.COMPLETED:
        advice = "; if it does not run, vfio-user resume lets SRC" if report.status is Status.UNCONFIRMED else ""
        raise MigrationError(f"{verdict(report)}: {clean(report.error or 'no reason')}{advice}")
    if not verified:
        raise MigrationError(
            f"it moved, but is not as it must be: {clean(report.error or 'see what info says of both')}"
        )


@click.command(
    epilog="Example: vfio-user receive /tmp/b.sock --listen host2:4444 --cert host2.crt --key host2.key --ca hosts.crt"
)
@click.argument("paths", metavar="DST...", nargs=-1, required=True, type=ANY_PATH)
@click.option("--listen", metavar="PLACE", help="Wait there for migrate --to: HOST:PORT, with TLS, or a UNIX socket.")
@click.option("--memory", metavar="FILE[@ADDRESS]", multiple=True, help="A file that becomes the guest's memory there.")
@peer_options
@timeout_option
def receive(
    paths: tuple[str, ...],
    listen: str | None,
    memory: tuple[str, ...],
    memory_pipes: int,
    cert: Path | None,
    key: Path | None,
    ca: Path | None,
    timeout: float,
) -> None:
    """Be the other end of vfio-user migrate for the devices behind DST: on stdin and stdout, for --exec, or listening.

    One migration; then it ends, and the devices run.
    """
    trust = certificates(cert, key, ca)
    specs = list(map(MemorySpec.parse, memory))
    interrupts = Interrupts()
    with ExitStack() as stack:
        if listen is None:
            if memory_pipes or trust is not None:
                raise UsageError("stdin and stdout are one pipe, without TLS: --listen for more")
            pipes = [stack.enter_context(_standard_pipe(interrupts))]
            clients, regions = _plugged(stack, paths, specs, timeout)
            stack.enter_context(interrupts)
        else:
            place = parse_place(listen, trust)
            clients, regions = _plugged(stack, paths, specs, timeout)
            stack.enter_context(interrupts)
            pipes = _accepted(stack, place, interrupts, 1 + memory_pipes, timeout)
        destination = Stoppable(LocalDestination(clients, regions), interrupts)
        arrival = receive_from(pipes[0], destination, memory_pipes=pipes[1:], timeout=timeout * CALLS_PER_ANSWER)
    if listen is not None:
        with suppress(OSError):  # they run, whether somebody reads it or not
            click.echo(_in_words(arrival))


def _standard_pipe(interrupts: Interrupts) -> Pipe:
    """Stdin and stdout; whatever else is printed goes to stderr, and so does not get between the records."""
    if os.isatty(STDIN) or os.isatty(STDOUT):
        raise UsageError("a migration comes through stdin and stdout: this is for vfio-user migrate --exec")
    pipe = standard_pipe(interrupts)
    os.dup2(STDERR, STDOUT)
    return pipe


def _accepted(stack: ExitStack, place: Place, interrupts: Interrupts, count: int, timeout: float) -> list[Pipe]:
    """The pipes of a migration that comes to ``place``."""
    with naming(place), Listener(place) as listener:
        click.echo(f"{listener.name} waits for vfio-user migrate --to")
        with interrupts.at_once():
            socks = listener.accept(count, timeout, timeout * CALLS_PER_ANSWER)
    return [stack.enter_context(stoppable_pipe(sock, interrupts)) for sock in socks]


def _in_words(arrival: Arrival) -> str:
    parts = [
        f"{arrival.devices} device{'s' if arrival.devices > 1 else ''} with {size(arrival.device_bytes)} of state",
        *([f"{size(arrival.memory_bytes)} of memory"] if arrival.memory_bytes else []),
        *([f"{size(arrival.zero_bytes)} of it zeros"] if arrival.zero_bytes else []),
        f"in {duration(arrival.seconds)}",
        *([f"compressed by {arrival.compression}"] if arrival.compression else []),
    ]
    known = "" if arrival.confirmed else "; whether the source knows that is not certain"
    return f"received {', '.join(parts)}: running{known}"
