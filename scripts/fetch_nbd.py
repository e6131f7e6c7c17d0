#!/usr/bin/env python3
"""Fetch what the tests of network block devices need into ``.qemu/``: no root, nothing of the system is touched.

Two servers, ``.qemu/qemu-nbd`` and ``.qemu/nbdkit`` (with ``.qemu/qemu-img``, and the plug-ins and filters of nbdkit in
``.qemu/nbd``), come as QEMU does: see fetch_qemu.py. The client, libnbd.so.0, is loaded by the Python of this machine
and must fit its C library, so it is taken from the release that this machine runs, into ``.qemu/libnbd``. What the
machine has itself is not fetched.

Exit status: 0 when all of it is there, 1 with one line on stderr when something is not to be had.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.fetch_qemu import HOME, Apt, FetchError, only_one, private_apt, run, say, unpack, wrap

SERVERS = {"qemu-nbd": "qemu-utils", "qemu-img": "qemu-utils", "nbdkit": "nbdkit"}
"""By the Debian package that each is in."""
LIBRARY, LIBRARY_PACKAGE = "libnbd.so.0", "libnbd0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch qemu-nbd, nbdkit and libnbd into .qemu/.")
    parser.add_argument("--mirror", metavar="URI", help="Debian mirror of the servers (default: those of apt)")
    options = parser.parse_args(arguments)
    try:
        with only_one():
            fetch_servers(options.mirror)
            fetch_library()
    except (FetchError, OSError) as error:
        print(f"fetch_nbd: {error}", file=sys.stderr)
        return 1
    return 0


def fetch_servers(mirror: str | None) -> None:
    """Unpack the servers with their closure and, once each is seen to work, put the wrappers in place."""
    missing = [name for name in SERVERS if not ((HOME / name).exists() or shutil.which(name))]
    if not missing:
        return
    say("fetching NBD servers")
    root = HOME / "nbd"
    with private_apt(mirror) as apt:
        apt.get("install", "--yes", "--download-only", *sorted(set(SERVERS.values())))
        unpack(apt.packages(), root)
    for name in SERVERS:
        wrap(name, root, "", starts, "does not start")


def starts(program: Path) -> bool:
    try:
        run(program, "--version", timeout=30)
    except FetchError:
        return False
    return True


def fetch_library() -> None:
    """Unpack libnbd and all it may need, unless this machine has it."""
    target = HOME / "libnbd"
    if target.exists() or is_installed():
        return
    say("fetching libnbd")
    with tempfile.TemporaryDirectory(prefix="apt-", dir=HOME) as folder:
        apt = Apt(Path(folder, "own"))  # not told of a mirror: it uses the machine's own sources
        # Some of these may be down, and have nothing to do with libnbd.
        apt.get("-o", "APT::Update::Error-Mode=persistent", "update")
        apt.get("install", "--yes", "--download-only", LIBRARY_PACKAGE)
        partial = HOME / "libnbd.new"
        unpack(apt.packages(), partial)
    partial.replace(target)


def is_installed() -> bool:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
