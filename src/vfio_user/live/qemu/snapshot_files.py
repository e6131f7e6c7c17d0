"""A guest in a folder: QEMU's stream, each device's state, and what tells whether all of it is there and unharmed.

::

    manifest.json      Manifest: what was saved, and of every other file its size and SHA-256
    manifest.sha256    that of the manifest, as sha256sum writes it
    memory             what QEMU sends of memory and machine
    device-N.state     what the device saves (vfio_user.live.files)
    device-N.config    its config space
    device-N.msix      its MSI-X table; nothing where it has none, or no driver has set it up

The folder has its name only when all is in it and on disk: what is not whole has another one. The sums find damage;
they do not tell who wrote the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from vfio_user.errors import StreamError
from vfio_user.live import files
from vfio_user.live.destination import nothing
from vfio_user.live.offer import MAX_DEVICES, DeviceOffer
from vfio_user.live.qemu.config_image import SIZE, ConfigImage
from vfio_user.live.qemu.handover import Handover
from vfio_user.live.qemu.machine import Bytes, MachineShape, Text
from vfio_user.live.text import clean

FORMAT_VERSION = 1
MANIFEST, MANIFEST_SUM, MEMORY = "manifest.json", "manifest.sha256", "memory"
STATE, CONFIG, MSIX = "device-{}.state", "device-{}.config", "device-{}.msix"
MAX_MANIFEST = 4 << 20
MAX_TABLE = 2048 * 16
_PIECE = 1 << 20

_FileName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}\Z")]
_Devfn = Annotated[int, msgspec.Meta(ge=0, le=255)]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the folder."""

    name: _FileName
    size: Bytes
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class SavedDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device of the guest."""

    name: Text
    path: Annotated[list[_Devfn], msgspec.Meta(min_length=1, max_length=32)]
    """Slot and function, as one number, of each bridge above it and its own."""
    offer: DeviceOffer
    """What it is: ids, sizes of BARs, vectors."""
    state: FileEntry
    config: FileEntry
    msix: FileEntry

    @property
    def place(self) -> tuple[int, ...]:
        return tuple(self.path)

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        return self.state, self.config, self.msix


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was saved."""

    format: int
    package: Text
    """Version of the package that wrote it."""
    qemu: Text
    """Version of the QEMU that wrote ``memory``."""
    saved_at: Text
    """UTC, as ISO 8601."""
    machine: MachineShape
    guest_ran: bool
    """False: it was paused, and is to be so again."""
    config_address: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    """What the port 0xcf8 held."""
    memory: FileEntry
    devices: Annotated[list[SavedDevice], msgspec.Meta(max_length=MAX_DEVICES)]

    @property
    def entries(self) -> list[FileEntry]:
        return [self.memory, *(entry for device in self.devices for entry in device.entries)]


class _Format(msgspec.Struct, frozen=True):
    format: int


# Written


class SnapshotWriter:
    """Fills a folder that has a temporary name. Raises OSError."""

    def __init__(self, folder: Path, target: Path, parent: int, check: Callable[[], None]) -> None:
        self.folder, self._target = folder, target
        self._parent = parent
        self._check = check

    def create(self, name: str) -> BinaryIO:
        """A new file of it."""
        return os.fdopen(os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")

    def write(self, name: str, data: bytes) -> FileEntry:
        """A file of it with what is in it."""
        with self.create(name) as file:
            file.write(data)
        return self.entry(name)

    def entry(self, name: str) -> FileEntry:
        """A file that is complete: on disk now, and summed up."""
        with open(self.folder / name, "rb") as file:
            os.fsync(file.fileno())
            digest, size = _sum(file, self._check)
        return FileEntry(name, size, digest)

    def publish(self, manifest: Manifest) -> None:
        """Have the folder take its name: it is whole. It keeps it only if that is on disk, too."""
        text = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
        if len(text) > MAX_MANIFEST:
            raise StreamError(f"a snapshot with {len(text)} bytes to say of itself; {MAX_MANIFEST} are allowed")
        entry = self.write(MANIFEST, text)
        self.write(MANIFEST_SUM, f"{entry.sha256}  {MANIFEST}\n".encode())
        _sync(self.folder)
        os.rename(self.folder, self._target)
        try:
            os.fsync(self._parent)
        except OSError:
            os.rename(self._target, self.folder)
            raise


def check_target(folder: Path) -> None:
    """Raise OSError if there is something already where a snapshot is to be, or nowhere to have it."""
    try:
        os.lstat(folder)
    except FileNotFoundError:
        pass
    else:
        raise FileExistsError(errno.EEXIST, "it is there already", str(folder))
    if not os.access(folder.parent, os.R_OK | os.W_OK | os.X_OK):  # without reading, no name can be had on disk
        number = errno.EACCES if folder.parent.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(folder.parent))


@contextmanager
def written(folder: Path, check: Callable[[], None] = nothing) -> Iterator[SnapshotWriter]:
    """A folder to fill; unless it was published when the block ends, nothing is left of it. Raises OSError."""
    target = Path(os.path.abspath(folder))
    check_target(target)
    with ExitStack() as stack:
        parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, parent)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:50]}."))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # a folder that has its name is there no more
        yield SnapshotWriter(temporary, target, parent, check)


# Read


class Snapshot:
    """A folder that is whole and unharmed, and its files, which stay open: what comes later is what was looked at."""

    def __init__(self, manifest: Manifest, opened: dict[str, BinaryIO], states: Sequence[files.Saved]) -> None:
        self.manifest = manifest
        self.states = states
        self._files = opened

    def memory(self) -> int:
        """What QEMU has sent: a descriptor, at its beginning."""
        number = self._files[self.manifest.memory.name].fileno()
        os.lseek(number, 0, os.SEEK_SET)  # whatever has been read ahead of it
        return number

    def handovers(self) -> list[Handover]:
        """What QEMU would have lost of each device."""
        return [
            Handover(ConfigImage(self._read(device.config)), self._read(device.msix))
            for device in self.manifest.devices
        ]

    def _read(self, entry: FileEntry) -> bytes:
        file = self._files[entry.name]
        file.seek(0)
        return file.read(entry.size)


@contextmanager
def opened(folder: Path, check: Callable[[], None] = nothing) -> Iterator[Snapshot]:
    """A snapshot, all of which was read. Raises OSError or StreamError for what is none, or is not whole and sound."""
    with ExitStack() as stack:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, number)

        def take(name: str) -> BinaryIO:
            return stack.enter_context(_open(number, folder, name))

        manifest = _read_manifest(take(MANIFEST), take(MANIFEST_SUM))
        found = {entry.name: take(entry.name) for entry in manifest.entries}
        if len({device.place for device in manifest.devices}) != len(manifest.devices):
            raise StreamError(f"{MANIFEST}: two devices in the same place")
        if len(found) != len(manifest.entries):
            raise StreamError(f"{MANIFEST}: the same file for two things")
        for entry in manifest.entries:
            _check_entry(entry, found[entry.name], check)
        yield Snapshot(manifest, found, [_read_device(stack, device, found) for device in manifest.devices])


def _read_manifest(file: BinaryIO, sum_file: BinaryIO) -> Manifest:
    text, said = file.read(MAX_MANIFEST + 1), sum_file.read(256)
    if len(text) > MAX_MANIFEST:
        raise StreamError(f"{MANIFEST}: more than {MAX_MANIFEST} bytes")
    if said != f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode():
        raise StreamError(f"{MANIFEST}: damaged: it is not what {MANIFEST_SUM} says")
    try:
        version = msgspec.json.decode(text, type=_Format).format
        if version != FORMAT_VERSION:
            raise StreamError(f"{MANIFEST}: a snapshot in format {version}; known is {FORMAT_VERSION}")
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StreamError(f"{MANIFEST}: {clean(str(error))}") from error


def _check_entry(entry: FileEntry, file: BinaryIO, check: Callable[[], None]) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != entry.size:
        raise StreamError(f"{entry.name}: damaged: {size} bytes, not {entry.size}")
    if _sum(file, check) != (entry.sha256, entry.size):
        raise StreamError(f"{entry.name}: damaged: wrong checksum")


def _read_device(stack: ExitStack, device: SavedDevice, found: dict[str, BinaryIO]) -> files.Saved:
    """A device's state; the rest of it has the sizes that it must."""
    if device.config.size != SIZE or device.msix.size > MAX_TABLE:
        raise StreamError(f"{MANIFEST}: {device.name}: config space or MSI-X table of a wrong size")
    file = found[device.state.name]
    file.seek(0)
    try:
        saved = stack.enter_context(files.opened(file))
    except StreamError as error:
        raise StreamError(f"{device.state.name}: {error}") from error
    if saved.header.device != device.offer:
        raise StreamError(f"{device.state.name}: the state of another device than {MANIFEST} says")
    return saved


def _open(folder_fd: int, folder: Path, name: str) -> BinaryIO:
    """A regular file of the folder, from its beginning: no link, and nothing that would have to be waited for."""
    try:
        number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder_fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / name)) from error
    file = os.fdopen(number, "rb")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise StreamError(f"{name}: no regular file")
    return file


def _sum(file: BinaryIO, check: Callable[[], None]) -> tuple[str, int]:
    """SHA-256 and size of what is left of a file."""
    digest, size = hashlib.sha256(), 0
    while data := file.read(_PIECE):
        check()
        digest.update(data)
        size += len(data)
    return digest.hexdigest(), size


def _sync(folder: Path) -> None:
    """Names are in a file of their own, so to speak: without this a power cut may leave files without them."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
