"""``irq``: the interrupts of a device, from the side of a VMM."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from vfio_user.cli.inspect import locate
from vfio_user.cli.naming import connect, naming
from vfio_user.cli.options import Seconds, device_option, json_option, socket_argument, timeout_option
from vfio_user.errors import CallTimeoutError
from vfio_user.tools.dump import write_number
from vfio_user.tools.info import irqs, name_of
from vfio_user.tools.irq import Signal, Vectors, Watch, act
from vfio_user.tools.location import parse_assignment
from vfio_user.wire.constants import IrqSetFlags, PciIrq

_vectors_argument = click.argument("vectors", metavar="VECTOR...", nargs=-1, required=True)
_within_option = click.option(
    "--within", metavar="S", default=10.0, show_default=True, type=Seconds(0, 86400), help="Seconds to wait."
)


@click.group(epilog="Example: vfio-user irq trigger /tmp/edu.sock msi:0")
def irq() -> None:
    """List, wait for, trigger, mask and unmask interrupts.

    VECTOR is INDEX, for all of its vectors, or INDEX:N or INDEX:FIRST-LAST; INDEX is intx, msi, msix, err, req or a
    number. While a VMM is connected, most servers serve nobody else.
    """


@irq.command("list", epilog="Example: vfio-user irq list /tmp/edu.sock")
@socket_argument
@json_option
@timeout_option
def list_(path: str, as_json: bool, timeout: float) -> None:
    """Show the interrupt indexes of a device."""
    with connect(path, timeout) as client:
        found = irqs(client)
    if as_json:
        click.echo(json.dumps({"irqs": found}))
        return
    for one in found:
        if one["count"]:
            click.echo(f"{one['name']:<6}{one['count']:>6}  {' '.join(one['flags'])}")


@irq.command(
    epilog="Example: vfio-user irq wait /tmp/edu.sock intx --write bar0.irq_raise=1",
)
@socket_argument
@_vectors_argument
@click.option("--count", metavar="N", default=1, show_default=True, type=click.IntRange(1), help="Signals to wait for.")
@_within_option
@click.option("--write", "writes", metavar="PLACE=VALUE", multiple=True, help="Written once the eventfds are in place.")
@device_option
@json_option
@timeout_option
def wait(
    path: str,
    vectors: tuple[str, ...],
    count: int,
    within: float,
    writes: tuple[str, ...],
    device: str | None,
    as_json: bool,
    timeout: float,
) -> None:
    """Wait for interrupts, and say when they come; exit status 1 if too few do."""
    wanted = [Vectors.parse(text) for text in vectors]
    stimuli = [parse_assignment(text) for text in writes]
    with connect(path, timeout) as client:
        located = locate(client, stimuli, device)
        with Watch(client, wanted) as watch:
            for location, value in located:
                with naming(location):
                    write_number(client, location, value)
            came = []
            for signal in watch.until(count, within):
                came.append(signal)
                if not as_json:
                    click.echo(_line(signal))
    if as_json:
        click.echo(json.dumps({"signals": [_facts(one) for one in came]}))
    total = sum(one.times for one in came)
    if total < count:
        raise CallTimeoutError(f"{total} of {count} interrupts came in {within:g} s")


def _line(signal: Signal) -> str:
    times = f", {signal.times} times" if signal.times > 1 else ""
    return f"{signal} after {signal.seconds * 1e3:.3f} ms{times}"


def _facts(signal: Signal) -> dict[str, object]:
    return {
        "index": name_of(PciIrq, signal.index),
        "vector": signal.vector,
        "times": signal.times,
        "ms": round(signal.seconds * 1e3, 3),
    }


@irq.command(epilog="Example: vfio-user irq trigger /tmp/edu.sock msi:0")
@socket_argument
@_vectors_argument
@_within_option
@timeout_option
def trigger(path: str, vectors: tuple[str, ...], within: float, timeout: float) -> None:
    """Have the server signal vectors as the device would (loopback), and wait for each of them."""
    wanted = [Vectors.parse(text) for text in vectors]
    with connect(path, timeout) as client, Watch(client, wanted) as watch:
        watch.trigger()
        missing = watch.vectors()
        for signal in watch.signals(within):
            missing.discard((signal.index, signal.vector))
            click.echo(_line(signal))
            if not missing:
                return
    names = ", ".join(f"{name_of(PciIrq, index)}:{vector}" for index, vector in sorted(missing))
    raise CallTimeoutError(f"no signal in {within:g} s of {names}")


@irq.command(epilog="Example: vfio-user irq mask /tmp/device.sock msix:0-3")
@socket_argument
@_vectors_argument
@timeout_option
def mask(path: str, vectors: tuple[str, ...], timeout: float) -> None:
    """Mask vectors. A server forgets that when its client leaves: it shows whether it can, and how it answers."""
    _act(path, vectors, timeout, IrqSetFlags.ACTION_MASK, "masked")


@irq.command(epilog="Example: vfio-user irq unmask /tmp/device.sock msix:0-3")
@socket_argument
@_vectors_argument
@timeout_option
def unmask(path: str, vectors: tuple[str, ...], timeout: float) -> None:
    """Unmask vectors."""
    _act(path, vectors, timeout, IrqSetFlags.ACTION_UNMASK, "unmasked")


def _act(path: str, texts: Sequence[str], timeout: float, action: IrqSetFlags, done: str) -> None:
    wanted = [Vectors.parse(text) for text in texts]
    with connect(path, timeout) as client:
        for text, one in zip(texts, wanted, strict=True):
            with naming(text):
                act(client, action, one.index, one.of(client))
            click.echo(f"{text} {done}")
