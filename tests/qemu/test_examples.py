"""Every example, by the command that stands at its top: a Linux boots with the device, and uses it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest

from vfio_user.testing.linux import Guest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("test_"))

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]


def pattern(size: int, seed: int) -> bytes:
    """What ``fill`` of vfio_drive puts into memory."""
    return bytes(((seed * 0x10001 + at) * 0x9E3779B1 & 0xFFFFFFFF) >> 24 for at in range(size))


PRINTS = {
    "checksum": rf"{crc32(pattern(0x1000, 1)):#x}\ninterrupts\n +\d+: +1 .*MSIX-0000:00:01.0.*\n",
    "counter": "0xa\n",
    "sorter": "0xa\n0x14\n0x1e\n",
}


def command_of(example: Path) -> str:
    """From "vfio-user" to the end of the module's docstring, as people copy it."""
    compiled = compile(example.read_text(encoding="utf-8"), example.name, "exec")
    assert isinstance(compiled.co_consts[0], str)
    return compiled.co_consts[0][compiled.co_consts[0].index("vfio-user serve") :].strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_command_at_the_top_boots_a_guest_with_the_device(example: Path, qemu: Path, guest: Guest) -> None:
    installed = Path(sys.executable).parent / "vfio-user"
    assert installed.exists()
    assert shutil.which("cc"), "a C compiler builds what runs in the guest"
    environment = {"PATH": f"{installed.parent}:/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", "-c", command_of(example)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTS[example.stem], done.stdout), done.stdout
