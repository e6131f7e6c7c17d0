"""Options that several commands have."""

from __future__ import annotations

from typing import Any

import click

MIN_TIMEOUT, MAX_TIMEOUT = 0.01, 86400.0


def seconds(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """The callback of an option for a time that is waited at most. Raises click.BadParameter."""
    if not MIN_TIMEOUT <= value <= MAX_TIMEOUT:  # NaN is not either, which FloatRange would take
        raise click.BadParameter(f"{value} is not in the range {MIN_TIMEOUT} to {MAX_TIMEOUT:.0f}")
    return value


class Seconds(click.FloatRange):
    """As FloatRange, without NaN, which is neither below nor above."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is no number of seconds", param, ctx)
        return number


ANY_PATH = click.Path(readable=False)
"""What cannot be read is no wrong usage: it fails where it is opened."""
timeout_option = click.option(
    "--timeout", default=5.0, show_default=True, type=float, callback=seconds, help="Seconds for each call."
)
socket_argument = click.argument("path", metavar="SOCKET", type=ANY_PATH)
device_option = click.option(
    "--device", metavar="DEVICE", help="Whose registers the BARs have, as for serve; by default a built-in one's."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
html_option = click.option(
    "--html", metavar="FILE", type=click.Path(dir_okay=False), help="The report as a page, with curves."
)
force_option = click.option("--force", is_flag=True, help="Switch over after that, however long it takes.")
bandwidth_option = click.option(
    "--bandwidth", metavar="MIB", type=click.IntRange(min=1), help="MiB per second to use at most."
)
