"""The command ``vfio-user``, also as ``python -m vfio_user``."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command and exit with its status.

    Importing it takes a tenth of a second, in which Ctrl-C is to look as it does afterwards.
    """
    try:
        from vfio_user.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("vfio-user: interrupted", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
