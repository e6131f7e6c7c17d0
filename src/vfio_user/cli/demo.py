"""``demo``: the main job in one go, with a report for people or as JSON."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import click
from rich.console import Console, Group
from rich.text import Text

from vfio_user.cli.options import json_option
from vfio_user.cli.progress import RoundsTable, facts_panel, follow
from vfio_user.errors import MigrationError
from vfio_user.tools import demo as job

MIB = 1 << 20
MOST_FINDINGS = 10


@click.command(epilog="Example: vfio-user demo --bandwidth 100")
@json_option
@click.option(
    "--input",
    "input_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Bytes for the guest to work on; by default the Python standard library, 64 MiB of it.",
)
@click.option(
    "--bandwidth",
    default=400,
    show_default=True,
    type=click.IntRange(min=1),
    help="MiB per second that the migration may use.",
)
def demo(as_json: bool, input_path: Path | None, bandwidth: int) -> None:
    """Migrate a device at work from one process to another, and compare everything with what it must be."""
    console = Console()
    data = input_path.read_bytes() if input_path else job.standard_library()
    if not data:
        raise click.UsageError(f"{input_path} is empty")

    if console.is_terminal and not as_json:
        console.print(f"A guest copies {len(data) / MIB:.0f} MiB through its edu device by DMA, block by block …")
    show = partial(follow, console=Console(stderr=True, quiet=as_json))
    outcome = job.run(data, bandwidth=bandwidth * MIB, follow=show)
    if as_json:
        click.echo(json.dumps(outcome.as_dict()))
    else:
        console.print(render(outcome))
    if outcome.report.failed_step:
        raise MigrationError(f"{outcome.report.step} failed: {outcome.report.error}")
    if outcome.findings:
        raise MigrationError(f"{len(outcome.findings)} differences after the migration")


def render(outcome: job.Outcome) -> Group:
    """The report as a person wants to read it."""
    title, style = _title(outcome)
    work = f"{outcome.blocks_before:,} blocks before, {outcome.blocks_after:,} after the switch-over"
    return Group(
        RoundsTable(outcome.report),
        facts_panel(outcome.report, ("guest's work", work), title=title, style=style),
        *map(Text, outcome.findings[:MOST_FINDINGS]),
    )


def _title(outcome: job.Outcome) -> tuple[str, str]:
    """In place of the verdict, where there is more to say than that it was completed."""
    if outcome.verified:
        return "verified: memory and device are what they must be", "green"
    if not outcome.report.failed_step:
        return "NOT what it must be", "red"
    return "", ""
