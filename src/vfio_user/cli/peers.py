"""Options that ``migrate`` and ``receive`` share: what is between the two sides, and the guest's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vfio_user.errors import UsageError
from vfio_user.tools.places import Certificates

MOST_PIPES = 64
CALLS_PER_ANSWER = 6
"""What the other side does before it answers takes some calls: to give up on it sooner would leave it in doubt."""

_Command = Callable[..., Any]


def peer_options(command: _Command) -> _Command:
    """``--memory-pipes``, ``--cert``, ``--key`` and ``--ca``."""
    file = click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option("--ca", metavar="FILE", type=file, help="TLS: who must have signed the other side's certificate."),
        click.option("--key", metavar="FILE", type=file, help="TLS: the key to this side's certificate."),
        click.option("--cert", metavar="FILE", type=file, help="TLS: this side's certificate."),
        click.option(
            "--memory-pipes",
            metavar="N",
            default=0,
            type=click.IntRange(0, MOST_PIPES),
            help="More connections, which carry memory in parallel.",
        ),
    ):
        command = option(command)
    return command


def certificates(cert: Path | None, key: Path | None, ca: Path | None) -> Certificates | None:
    """The three that TLS needs, or none of them."""
    if cert is not None and key is not None and ca is not None:
        return Certificates(cert, key, ca)
    if cert is key is ca is None:
        return None
    raise UsageError("--cert, --key and --ca belong together")
