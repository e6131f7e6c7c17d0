#!/usr/bin/env python3
"""Run the demonstration and keep its report as a picture: ``scripts/demo_picture.py docs/demo.svg``."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from vfio_user.cli.demo import MIB, render
from vfio_user.tools import demo


def main() -> None:
    outcome = demo.run(demo.standard_library(), bandwidth=400 * MIB)
    console = Console(record=True, width=72, file=io.StringIO())
    console.print("$ vfio-user demo")
    console.print(render(outcome))
    svg = console.export_svg(title="vfio-user")
    Path(sys.argv[1]).write_text(re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL))  # fetches nothing


if __name__ == "__main__":
    main()
