"""``replay``: what a client once said, said again to another server."""

from __future__ import annotations

import json

import click

from vfio_user.cli.options import ANY_PATH, json_option, socket_argument, timeout_option
from vfio_user.errors import VfioUserError
from vfio_user.tools.replay import Difference, Ignored, Replay, choose_connection, connections
from vfio_user.tools.trace import CaptureError, connect, read_capture


@click.command(epilog="Example: vfio-user replay session.pcapng /tmp/edu.sock")
@click.argument("file", metavar="FILE", type=ANY_PATH)
@socket_argument
@click.option("--connection", metavar="N", type=click.IntRange(min=1), help="Which one of the capture; else the first.")
@click.option("--ignore", metavar="WHAT", multiple=True, help="A command, region or place whose replies may differ.")
@click.option("--all", "show_all", is_flag=True, help="Go on after the first difference.")
@json_option
@timeout_option
def replay(
    file: str,
    path: str,
    connection: int | None,
    ignore: tuple[str, ...],
    show_all: bool,
    as_json: bool,
    timeout: float,
) -> None:
    """Play the client's side of a capture against SOCKET; exit status 1 at the first difference.

    FILE is what vfio-user trace --write has written.
    """
    ignored = [Ignored.parse(text) for text in ignore]
    found: list[Difference] = []
    try:
        messages = choose_connection(connections(read_capture(file)), connection)
        with Replay(connect(path), messages, timeout, ignored) as player:
            for difference in player.run():
                found.append(difference)
                if not as_json:
                    click.echo(str(difference))
                if not show_all:
                    break
    except CaptureError as error:
        raise CaptureError(f"{file}: {error}") from error
    facts = {"sent": player.sent, "compared": player.compared}
    if as_json:
        click.echo(json.dumps(facts | {"differences": [one._asdict() for one in found]}))
    elif not found:
        click.echo(f"{player.sent} commands sent, {player.compared} replies as recorded")
    if found:
        raise VfioUserError(f"{path} does not answer as recorded in {file}")
