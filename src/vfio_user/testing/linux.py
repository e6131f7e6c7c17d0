"""A real Linux in a real QEMU, its vfio-user devices driven by the kernel and by commands in the guest.

::

    with LinuxMachine(find_qemu(), find_guest(), ["/run/edu.sock"]) as linux:
        (edu,) = linux.addresses
        assert linux.run(f"cat /sys/bus/pci/devices/{edu}/vendor") == "0x1234\\n"

The guest is a kernel and a busybox in an initramfs that is built here; it is up in a few seconds, emulated, without
KVM. Start the devices' servers first: QEMU connects once, without retry.

Sources: the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst`` (newc) and
``Documentation/admin-guide/kernel-parameters.txt``; QEMU's ``docs/pcie.txt`` (root ports).
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import lzma
import os
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.testing.qemu import (
    Deadline,
    Output,
    PluggedDevice,
    QemuError,
    QemuMachine,
    QemuTimeoutError,
    device_properties,
    fetched_paths,
)

CONSOLE_TAIL = 80
"""Lines of the guest's console that go with an error."""
MAX_COMMAND = 16 << 10
"""Bytes of one command in base64: more might not fit into what the guest's serial driver holds without flow control."""
ROOM = {"mem-reserve": 32 << 20, "pref64-reserve": 512 << 20}
"""What the firmware gives a root port for BARs of devices that are plugged in later: its own 2 MiB are soon full."""
POLL = 0.02
"""Seconds between two looks at what no event tells of."""

KERNEL_ARGUMENTS = "console=ttyS0 panic=-1 oops=panic no_timer_check mitigations=off"
"""A panic ends QEMU at once (with -no-reboot), so that nobody waits for a guest that is no more.

An emulated guest on a busy machine may miss the few ticks in which the kernel looks whether its timer works, and
panic for that: it is told not to look.
"""

_FIRST = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod "$module"; done
"""

INIT = f"""\
{_FIRST}\
# Commands come on a port of their own, each a line; an answer is a line and as many bytes as that says.
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo ready >&3
while read -r id command <&3; do
    echo "$command" | base64 -d >/tmp/command
    # Another file each time: who is left in the background writes on into that of its own command.
    sh /tmp/command >/tmp/output 2>&1 </dev/null 3<&-
    status=$?
    size=$(stat -c %s /tmp/output)
    echo "$id $status $size" >&3
    head -c "$size" /tmp/output >&3
    rm /tmp/output
done
"""

SWITCH_ROOT = f"""\
{_FIRST}\
mkdir -p /root
until test -b "$root_device"; do usleep 20000; done
mount "$root_device" /root || exit  # the kernel panics then, with the reason on the console
mount -t tmpfs tmp /root/tmp  # what commands print does not wear the disk out, nor keep it from being remounted
umount /dev /sys /proc
exec switch_root /root /init
"""

BACKGROUND = """\
mkfifo /tmp/{id}.done
cat >/tmp/{id}.command <<'{delimiter}'
{command}
{delimiter}
( sh /tmp/{id}.command >/tmp/{id}.output 2>&1 & pid=$!; echo $pid >/tmp/{id}.pid; wait $pid; echo $? >/tmp/{id}.done ) &
"""
FOREGROUND = """\
read -r status </tmp/{id}.done
cat /tmp/{id}.output
rm /tmp/{id}.*
exit "$status"
"""


class GuestCommandError(QemuError):
    """A command in the guest failed: ``status`` is its exit status, ``output`` what it printed."""

    def __init__(self, message: str, status: int, output: str) -> None:
        super().__init__(message)
        self.status = status
        self.output = output


@dataclass(frozen=True, slots=True)
class Guest:
    """What a guest is made of: a kernel, its modules by name, a static busybox."""

    kernel: Path
    busybox: Path
    modules: Mapping[str, Path]
    """Path of each loadable module, by its name with underscores."""
    built_in: frozenset[str]
    """Names of the modules that the kernel has built in."""

    @classmethod
    def below(cls, root: Path) -> Guest:
        """A guest from unpacked Debian packages. Raises :class:`QemuError`, naming what is missing."""
        kernel = max(root.glob("boot/vmlinuz-*"), default=None)
        busybox = root / "usr/bin/busybox"
        if kernel is None or not busybox.exists():
            raise QemuError(f"{root}: no {'busybox' if kernel else 'kernel'}; remove it and fetch it anew")
        folder = root / "usr/lib/modules" / kernel.name.removeprefix("vmlinuz-")
        modules = {_module_name(path.name): path for path in folder.glob("kernel/**/*.ko*")}
        with contextlib.suppress(FileNotFoundError):
            built_in = (folder / "modules.builtin").read_text(encoding="ascii").splitlines()
            return cls(kernel, busybox, modules, frozenset(_module_name(Path(line).name) for line in built_in))
        return cls(kernel, busybox, modules, frozenset())


def find_guest() -> Guest | None:
    """A guest, or None.

    Looked for in the environment variable ``VFIO_USER_GUEST`` and as ``.qemu/guest`` (what
    ``scripts/fetch_qemu.py --guest`` makes) in the current directory or one above it. Raises :class:`QemuError` when
    what is there is not whole.
    """
    wished = os.environ.get("VFIO_USER_GUEST")
    if wished:
        return Guest.below(Path(wished))
    found = next((path for path in fetched_paths("guest") if path.is_dir()), None)
    return Guest.below(found) if found else None


def find_guest_tools() -> Path | None:
    """Programs for the guest, for :func:`programs`: what ``scripts/fetch_qemu.py --guest-tools`` makes, or None."""
    return next((path for path in fetched_paths("guest-tools") if path.is_dir()), None)


def programs(root: Path, *paths: str) -> dict[str, bytes | Path]:
    """Programs out of unpacked Debian packages, by their absolute paths, with their libraries: ``files`` of a guest.

    Raises :class:`QemuError` for what is not there, or not whole.
    """
    loader = next(root.glob("usr/lib/*-linux-*/ld-linux*.so.*"), None)
    if loader is None:
        raise QemuError(f"{root}: no dynamic loader; remove it and fetch it anew")
    found: dict[str, bytes | Path] = {}
    for path in paths:
        program = root / path.lstrip("/")
        found[path] = program
        for name, library in _libraries(loader, program):
            # The loader is in its absolute place; the others are where it looks for them.
            found[name if name.startswith("/") else f"/{library.relative_to(root)}"] = library
    return found


def _libraries(loader: Path, program: Path) -> list[tuple[str, Path]]:
    """What a program is linked with: the names in it, and the files."""
    command: list[str | Path] = [loader, "--library-path", loader.parent, "--list", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise QemuError(f"{program}: {done.stderr.strip()}")
    return [(match[1], Path(match[2])) for match in re.finditer(r"^\s*(\S+) => (\S+)", done.stdout, re.MULTILINE)]


def initramfs(
    guest: Guest, modules: Sequence[str] = (), files: Mapping[str, bytes | Path] | None = None, init: str = INIT
) -> bytes:
    """A gzipped newc archive: busybox, ``init``, kernel modules and files.

    ``modules`` are loaded in this order, each after those that it depends on. ``files`` are executable; their names
    are absolute paths in the guest. Raises :class:`QemuError` for a module that the kernel does not have.
    """
    loaded = load_order(guest, modules)
    listing = "".join(f"/lib/modules/{name}.ko\n" for name in loaded)
    contents: dict[str, bytes | Path] = {
        "init": init.encode(),
        "bin/busybox": guest.busybox,
        "modules": listing.encode(),
        **{f"lib/modules/{name}.ko": data for name, data in loaded.items()},
        **{name.lstrip("/"): data for name, data in (files or {}).items()},
    }
    return gzip.compress(b"".join(_newc(contents)), compresslevel=1, mtime=0)


def load_order(guest: Guest, modules: Sequence[str]) -> dict[str, bytes]:
    """The modules and all that they depend on, decompressed, each after what it depends on."""
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name in guest.built_in:
            return
        if name not in guest.modules:
            raise QemuError(f"{guest.kernel.name} has no module {name}")
        data = _decompressed(guest.modules[name])
        for dependency in _depends(data):
            load(dependency)
        loaded[name] = data

    for module in modules:
        load(_module_name(module))
    return loaded


def _module_name(file: str) -> str:
    return file.partition(".ko")[0].replace("-", "_")


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _depends(module: bytes) -> list[str]:
    """What a module's own description (its section .modinfo) says that it depends on."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return [_module_name(name) for name in match[1].decode("ascii").split(",") if name] if match else []


def _newc(files: Mapping[str, bytes | Path]) -> Iterator[bytes]:
    """The entries of a newc archive: folders first, then a console for the kernel, the files and the end."""
    standard = {Path(name) for name in ("dev", "proc", "sys", "tmp")}
    folders = standard.union(*(Path(name).parents for name in files)) - {Path(".")}
    for folder in sorted(folders):
        yield _entry(str(folder), stat.S_IFDIR | 0o755)
    yield _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, data in files.items():
        yield _entry(name, stat.S_IFREG | 0o755, data if isinstance(data, bytes) else data.read_bytes())
    yield _entry("TRAILER!!!", 0)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry: magic; ino, mode, uid, gid, links, mtime, size, device twice, length of the name, checksum."""
    name_bytes = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name_bytes), 0)
    header = b"070701" + "".join(f"{field:08x}" for field in fields).encode("ascii")
    return _padded(header + name_bytes) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


class GuestProcess:
    """A command that runs in the guest's background."""

    def __init__(self, machine: LinuxMachine, ident: str, command: str) -> None:
        self._machine = machine
        self._id = ident
        self._command = command

    @property
    def output(self) -> str:
        """What it printed so far, until it was waited for."""
        return self._machine.run(f"cat /tmp/{self._id}.output")

    def kill(self, signal: str = "TERM") -> None:
        """Send it a signal."""
        self._machine.run(f"kill -{signal} $(cat /tmp/{self._id}.pid)")

    def wait(self, timeout: float | None = None) -> str:
        """Wait until it ends, once; what it printed. Raises :class:`GuestCommandError` when it failed."""
        ended = self._machine.execute(FOREGROUND.format(id=self._id), timeout)
        return self._machine._succeeded(self._command, *ended).decode(errors="replace")


class LinuxMachine(QemuMachine):
    """A q35 machine that runs Linux, emulated, with vfio-user devices plugged in; a context manager.

    ``devices`` sit on bus 0, each in a slot of its own. ``ports`` are root ports, each with the functions of the
    device behind it: ``[[a, b], []]`` is one with two functions and an empty one to plug something into. A device is
    a socket path, or a mapping of properties of vfio-user-pci with the socket path as ``socket``. ``addresses`` and
    ``port_addresses`` say where Linux has them, as in ``/sys/bus/pci/devices``.

    ``memory`` in bytes is the guest's RAM, which the device servers can map. ``modules`` are loaded at the start,
    ``files`` put into the guest (see :func:`initramfs`); with ``root`` the guest goes on with the root file system on
    that block device of its own, such as ``/dev/nvme0n1p1``, made by :meth:`install` before. ``append`` goes to the
    kernel's command line and ``extra_args`` to QEMU's, before the devices. ``timeout`` in seconds bounds every wait,
    the boot among them.

    Every error has the end of the guest's console and QEMU's stderr in its message. A guest that panics ends QEMU;
    one that hangs is a :class:`QemuTimeoutError`, and the machine is closed then.
    """

    def __init__(
        self,
        qemu: str | Path,
        guest: Guest,
        devices: Sequence[PluggedDevice] = (),
        *,
        ports: Sequence[Sequence[PluggedDevice]] = (),
        memory: int = 256 << 20,
        cpus: int = 1,
        modules: Sequence[str] = (),
        files: Mapping[str, bytes | Path] | None = None,
        root: str | None = None,
        append: str = "",
        extra_args: Sequence[str] = (),
        timeout: float = 60.0,
    ) -> None:
        self.addresses = tuple(f"0000:00:{slot:02x}.0" for slot in range(1, len(devices) + 1))
        self.port_addresses = tuple(
            tuple(_behind(port, function) for function in range(len(functions))) for port, functions in enumerate(ports)
        )
        self._functions = [set(range(len(functions))) for functions in ports]
        self._next_id = 0
        arguments = [*_machine_args(memory, cpus), *extra_args, *_device_args(devices, ports)]
        with contextlib.ExitStack() as undo:
            self._console = undo.enter_context(Output())
            archive = undo.enter_context(tempfile.TemporaryFile())
            archive.write(initramfs(guest, modules, files, SWITCH_ROOT if root else INIT))
            archive.flush()
            # Files without names: nothing to clean up, whoever is killed.
            console, initrd = (f"/proc/self/fd/{file.fileno()}" for file in (self._console, archive))
            arguments += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
            arguments += ["-kernel", str(guest.kernel), "-initrd", initrd]
            # What the kernel does not know goes into the environment of init.
            words = [KERNEL_ARGUMENTS, *([f"root_device={root}"] if root else []), append]
            arguments += ["-append", " ".join(words).strip()]
            super().__init__(
                qemu,
                arguments,
                channels={"shell": "-serial"},
                pass_fds=[self._console.fileno(), archive.fileno()],
                timeout=timeout,
            )
            self._undo.push(undo.pop_all())

    @property
    def console(self) -> str:
        """What the kernel printed so far."""
        return self._console.text

    @property
    def console_tail(self) -> str:
        """The last lines of it, which go with every error."""
        return "\n".join(self.console.splitlines()[-CONSOLE_TAIL:])

    def wait_console(self, text: str, timeout: float | None = None) -> None:
        """Wait until the guest's console says ``text``. Raises :class:`QemuTimeoutError`; the machine goes on."""
        deadline = Deadline(self.timeout if timeout is None else timeout)
        while text not in self.console:
            if self._process.poll() is not None:
                raise self._fatal(f"console {text!r}: QEMU has ended")
            if deadline.passed:
                raise self._error(f"console {text!r}: not within {deadline.seconds} s", QemuTimeoutError)
            time.sleep(POLL)

    # Commands

    def run(self, command: str, timeout: float | None = None) -> str:
        """Run a shell command in the guest; what it printed, on stdout and stderr.

        Raises :class:`GuestCommandError` when it fails.
        """
        return self.run_bytes(command, timeout).decode(errors="replace")

    def run_bytes(self, command: str, timeout: float | None = None) -> bytes:
        """The same, for what is not text."""
        return self._succeeded(command, *self.execute(command, timeout))

    def execute(self, command: str, timeout: float | None = None) -> tuple[int, bytes]:
        """Run a shell command in the guest; its exit status and what it printed, on stdout and stderr.

        Raises ValueError for a command of more than MAX_COMMAND bytes of base64: put it into a file.
        """
        what, deadline = f"guest: {command.strip()}", Deadline(self.timeout if timeout is None else timeout)
        ident, line = self._ident(), base64.b64encode(command.encode()).decode()
        if len(line) > MAX_COMMAND:
            raise ValueError(f"a command of {len(command)} characters is too long")
        self._send("shell", f"{ident} {line}", what, deadline)
        answer = self._receive("shell", what, deadline)
        match = re.fullmatch(rf"{ident} (\d+) (\d+)", answer)
        if match is None:
            raise self._fatal(f"{what}: the guest answered {answer!r}")
        return int(match[1]), self._receive_bytes("shell", int(match[2]), what, deadline)

    def start(self, command: str) -> GuestProcess:
        """Run a shell command in the guest's background."""
        ident = self._ident()
        self.run(BACKGROUND.format(id=ident, command=command, delimiter=f"end of {ident}"))
        return GuestProcess(self, ident, command)

    def wait_until(self, command: str, timeout: float | None = None) -> str:
        """Run a shell command in the guest until it succeeds; what it printed then.

        Raises :class:`QemuTimeoutError` when it never does; the machine goes on.
        """
        deadline = Deadline(self.timeout if timeout is None else timeout)
        while True:
            status, output = self.execute(command)
            if not status:
                return output.decode(errors="replace")
            if deadline.passed:
                text = output.decode(errors="replace")
                raise self._error(f"guest: {command}: failed for {deadline.seconds} s: {text}", QemuTimeoutError)
            time.sleep(POLL)

    def install(self, folder: str) -> None:
        """Copy the system that runs into ``folder`` of the guest, where a disk is mounted: a machine's ``root``."""
        self.run(f"cd / && find . -xdev | cpio -o -H newc | (cd {folder} && cpio -idm) && sync")

    # Plugging

    def plug(self, device: PluggedDevice, port: int, function: int = 0) -> str:
        """Plug a device into a root port of the running machine; its address, once Linux has it.

        Of several functions, plug 0 last, with the property ``"multifunction": True``: Linux looks for them then, and
        only that call waits.
        """
        address = _behind(port, function)
        self.qmp("device_add", **_function(device, port, function))
        self._functions[port].add(function)
        if function == 0:
            self.wait_until(f"test -e /sys/bus/pci/devices/{address}/resource")
        return address

    def unplug(self, port: int, timeout: float | None = None) -> None:
        """Ask Linux to let go of the device behind a root port, with all its functions, and wait until QEMU has."""
        self.qmp("device_del", id=_function_id(port, 0))
        while self._functions[port]:
            function = max(self._functions[port])
            self.wait_event("DEVICE_DELETED", timeout, device=_function_id(port, function))
            self._functions[port].remove(function)

    # Inside

    def _greet(self) -> None:
        super()._greet()
        answer = self._receive("shell", "boot", Deadline(self.timeout))
        if answer != "ready":
            raise self._fatal(f"boot: the guest said {answer!r}")

    def _succeeded(self, command: str, status: int, output: bytes) -> bytes:
        if status:
            text = output.decode(errors="replace")
            message = f"guest: {command.strip()}: exit status {status}\n{text}\n{self._report()}"
            raise GuestCommandError(message, status, text)
        return output

    def _ident(self) -> str:
        self._next_id += 1
        return str(self._next_id)

    def _report(self) -> str:
        return f"{super()._report()}\nThe guest's console ended:\n{self.console_tail}"


def _machine_args(memory: int, cpus: int) -> list[str]:
    return [
        *("-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35,memory-backend=ram", "-m", f"{memory}B", "-smp", str(cpus)),
        *("-object", f"memory-backend-memfd,id=ram,size={memory},share=on"),
    ]


def _device_args(devices: Sequence[PluggedDevice], ports: Sequence[Sequence[PluggedDevice]]) -> Iterator[str]:
    for slot, device in enumerate(devices, start=1):
        yield from ("-device", json.dumps(device_properties(device, id=f"device{slot - 1}", addr=f"{slot:02x}.0")))
    for port, functions in enumerate(ports):
        slot = len(devices) + 1 + port
        root_port = {"driver": "pcie-root-port", "id": f"port{port}", "chassis": port + 1, "addr": f"{slot:02x}.0"}
        yield from ("-device", json.dumps({**root_port, **ROOM}))
        for function, device in enumerate(functions):
            several = {"multifunction": True} if len(functions) > 1 else {}
            yield from ("-device", json.dumps(_function(device, port, function, **several)))


def _function(device: PluggedDevice, port: int, function: int, **properties: object) -> dict[str, object]:
    where = {"bus": f"port{port}", "addr": f"00.{function}"}
    return device_properties(device, id=_function_id(port, function), **where, **properties)


def _function_id(port: int, function: int) -> str:
    return f"port{port}.{function}"


def _behind(port: int, function: int) -> str:
    """Where Linux has a function behind a root port: the firmware numbers the buses in the order of the ports."""
    return f"0000:{port + 1:02x}:00.{function:x}"
