"""Files of saved devices: written whole or not at all, and what they say of themselves."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from vfio_user.errors import StreamError
from vfio_user.live.files import FORMAT_VERSION, Header, Reader
from vfio_user.tools.info import flag_names, name_of
from vfio_user.wire.constants import MigrationFlags, PciIrq, PciRegion


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well; else all is as before.

    It has a temporary name in the same folder, and only its owner may read it: a device's state has the guest's data.
    """
    target = path.resolve()
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        number, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    except OSError as error:  # which names a file that nobody has asked for
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(number)
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(target.parent)


@contextmanager
def spooled(sink: BinaryIO) -> Iterator[BinaryIO]:
    """A file whose contents go to ``sink`` when the block ends well: what fills it waits for no reader of ``sink``."""
    with tempfile.TemporaryFile() as spool:
        yield spool
        spool.seek(0)
        shutil.copyfileobj(spool, sink)
        sink.flush()


def is_special(path: Path) -> bool:
    """Whether ``path`` is there and something to write into rather than to replace: a pipe, a device."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def describe_saved(file: BinaryIO) -> dict[str, Any]:
    """Keys: format, package, device, data_bytes, sound, error. Raises StreamError when there is no header to describe.

    ``sound``: whether the file is whole and its checksums right; else ``error`` says what is wrong, and ``data_bytes``
    counts what comes before that.
    """
    reader = Reader(file)
    size, error = 0, None
    try:
        for data in reader:
            size += len(data)
    except StreamError as damage:
        error = str(damage)
    return {
        "format": FORMAT_VERSION,
        "package": reader.header.package,
        "device": _device(reader.header),
        "data_bytes": size,
        "sound": error is None,
        "error": error,
    }


def _device(header: Header) -> dict[str, Any]:
    device = header.device
    return {
        "identity": device.identity,
        "regions": {name_of(PciRegion, index): size for index, (size, _) in enumerate(device.regions) if size},
        "irqs": {name_of(PciIrq, index): count for index, count in enumerate(device.irqs) if count},
        "migration": flag_names(device.migration, MigrationFlags),
    }


def _sync_folder(folder: Path) -> None:
    """A name is in a file of its own, so to speak: without this a power cut may leave the file without one."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
