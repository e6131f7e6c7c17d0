"""The command in this process: what it prints and how it exits, without half a second for each start of Python."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

from vfio_user.cli.main import main


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def command(*arguments: object, stdin: str = "") -> Done:
    """``vfio-user`` with ``arguments``, and ``stdin`` on standard input."""
    argv = ["vfio-user", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.multiple(sys, argv=argv, stdin=io.StringIO(stdin)), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code
    return Done(status if isinstance(status, int) else 1, out.getvalue(), err.getvalue())
