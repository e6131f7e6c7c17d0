"""A shell command, and all that it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any


class Shell:
    """``sh -c script`` with ``arguments`` as ``$1`` and so on; ``options`` as of :class:`subprocess.Popen`.

    It has a process group of its own, so that all that it starts is signalled together. When standard input is a
    terminal it stays in ours: else it could not read from there, to ask for a password for one, and Ctrl-C would not
    reach it. Raises OSError when there is no shell.
    """

    def __init__(self, script: str, *arguments: str, **options: Any) -> None:
        self.on_terminal = os.isatty(0)
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", *arguments], process_group=None if self.on_terminal else 0, **options
        )

    def signal(self, number: signal.Signals) -> None:
        """To all of it; on a terminal to the shell alone. Not once it is reaped: its number may be another's then."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.on_terminal:
                os.kill(self.process.pid, number)
            else:
                os.killpg(self.process.pid, number)
