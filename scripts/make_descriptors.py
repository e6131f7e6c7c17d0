#!/usr/bin/env python3
"""Write the JSON files by which management software finds the built-in devices: into the package, or a folder.

    scripts/make_descriptors.py [FOLDER [BINDIR]]

The specification ("Backend Program Conventions") wants one beside each backend program under /usr/share/vfio-user,
and leaves its schema open, "similar to docs/interop/vhost-user.json" of QEMU. So that is what they have: description,
type, binary, tags. ``type`` is the name of the device, as vhost-user's list has virtio devices only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vfio_user.devices import BUILT_IN, built_in
from vfio_user.tools.describe import title

DESCRIPTORS = Path(__file__).parent.parent / "src/vfio_user/share/descriptors"
BINDIR = "/usr/bin"


def descriptors(bindir: str = BINDIR) -> dict[str, str]:
    """The files' contents by their names. The number is where they are in the order of all that are found."""
    return {f"50-vfio-user-{name}.json": json.dumps(_describe(name, bindir), indent=2) + "\n" for name in BUILT_IN}


def _describe(name: str, bindir: str) -> dict[str, object]:
    device = built_in(name)
    return {
        "description": f"vfio-user {name}: {title(name).rstrip('.')}",
        "type": name,
        "binary": f"{bindir}/vfio-user-{name}",
        "tags": [f"pci={device.vendor_id:04x}:{device.device_id:04x}", f"class={device.class_code:06x}"],
    }


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DESCRIPTORS
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in descriptors(*sys.argv[2:3]).items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
