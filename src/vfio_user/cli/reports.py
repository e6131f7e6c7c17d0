"""Reports of what is over: that one cannot be told is worth a warning, and changes nothing of how it went."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console, RenderableType

from vfio_user.errors import reason_of
from vfio_user.live.html import report_html
from vfio_user.live.report import Report
from vfio_user.live.text import clean
from vfio_user.tools.saved import is_special


def show(report: str | RenderableType) -> None:
    """Print it on stdout: text as it is, anything else for people."""
    try:
        if isinstance(report, str):
            click.echo(report)
        else:
            _Console().print(report)
    except OSError as error:
        _warn("the report is not printed", error)
        _mute()


def check_writable(file: str | None) -> None:
    """Raise OSError unless a report can be written there: before anything is done of which it is to tell."""
    if file is not None and not is_special(Path(file)):
        with open(file, "ab"):
            pass


def write_page(html: str | None, report: Report, title: str) -> None:
    """The report as a page, if one is wanted."""
    if html is None:
        return
    try:
        Path(html).write_text(report_html(report, title), encoding="utf-8")
    except OSError as error:
        _warn("the page is not written", error)


class _Console(Console):
    """As rich's, which would exit where nobody reads any more."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _warn(what: str, error: OSError) -> None:
    with suppress(OSError):
        print(f"vfio-user: {what}: {clean(reason_of(error))}", file=sys.stderr)


def _mute() -> None:
    """What is left for stdout would be tried again at exit, which fails with it."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as sink:  # one that is no file has nothing of that kind
        os.dup2(sink.fileno(), sys.stdout.fileno())
