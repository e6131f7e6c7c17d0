"""``demo``: the main job in one go, with a report for people or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from vfio_user.errors import MigrationError
from vfio_user.live import Round
from vfio_user.tools import demo as job
from vfio_user.wire.constants import PAGE_SIZE

MIB = 1 << 20
MOST_FINDINGS = 10


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
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
    console = Console(stderr=as_json)
    data = input_path.read_bytes() if input_path else job.standard_library()
    if not data:
        raise click.UsageError(f"{input_path} is empty")

    def on_round(done: Round) -> None:
        if console.is_terminal:
            console.print(f"round {done.number}: {done.pages:,} pages sent, {done.left:,} dirty again", style="dim")

    if console.is_terminal:
        console.print(f"A guest copies {len(data) / MIB:.0f} MiB through its edu device by DMA, block by block …")
    outcome = job.run(data, bandwidth=bandwidth * MIB, on_round=on_round)
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
    return Group(_rounds(outcome), _verdict(outcome), *outcome.findings[:MOST_FINDINGS])


def _rounds(outcome: job.Outcome) -> Table:
    table = Table("round", "pages", "MiB", "device bytes", "ms", "dirty again", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.justify = "right"
    for done in outcome.report.rounds:
        table.add_row(
            f"{done.number}{' (stopped)' if done.stopped else ''}",
            f"{done.pages:,}",
            f"{done.pages * PAGE_SIZE / MIB:.1f}",
            f"{done.device_bytes:,}",
            f"{done.seconds * 1000:.1f}",
            "" if done.stopped else f"{done.left:,}",
        )
    return table


def _verdict(outcome: job.Outcome) -> Panel:
    report = outcome.report
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("rounds", f"{len(report.rounds)}"),
        ("pages sent", f"{sum(done.pages for done in report.rounds):,}, {report.dirty_pages:,} of them again"),
        ("device state", f"{report.device_state_bytes:,} bytes"),
        ("downtime", f"{report.downtime * 1000:.1f} ms"),
        ("total", f"{report.total * 1000:.0f} ms"),
        ("guest's work", f"{outcome.blocks_before:,} blocks before, {outcome.blocks_after:,} after the switch-over"),
    ):
        facts.add_row(name, value)
    title, style = _title(outcome)
    return Panel(facts, title=title, border_style=style, expand=False)


def _title(outcome: job.Outcome) -> tuple[str, str]:
    if outcome.verified:
        return "verified: memory and device are what they must be", "green"
    if not outcome.report.failed_step:
        return "NOT what it must be", "red"
    return f"failed: {outcome.report.step}", "red"
