#!/usr/bin/env python3
"""Make a guest that counts in an ``edu``: ``scripts/counting_guest.py FOLDER`` puts ``vmlinuz`` and ``initrd`` there.

A Linux of ``scripts/fetch_qemu.py --guest`` that does one thing, and says so on its first serial port: once a second it
takes the number that the device keeps, adds one, and gives it back. The number is nowhere else: a guest that comes to
another host without its device begins anew.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from vfio_user.testing.linux import find_guest, initramfs

# What is written to edu's register at 0x4 reads back inverted; it is 0 after a reset, as if -1 had been written.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
dmesg -n 1
for device in /sys/bus/pci/devices/*; do
    [ "$(cat $device/vendor):$(cat $device/device)" = 0x1234:0x11e8 ] && break
done
echo 1 >$device/enable
register=$(($(cut -d ' ' -f 1 $device/resource | head -n 1) + 4))
while true; do
    count=$(((~$(devmem $register 32) + 1) & 0xffffffff))
    devmem $register 32 $count
    echo "the device counts $count"
    sleep 1
done
"""


def main() -> None:
    folder, guest = Path(sys.argv[1]), find_guest()
    if guest is None:
        sys.exit("no guest here: run scripts/fetch_qemu.py --guest")
    shutil.copyfile(guest.kernel, folder / "vmlinuz")
    (folder / "initrd").write_bytes(initramfs(guest, init=INIT))


if __name__ == "__main__":
    main()
