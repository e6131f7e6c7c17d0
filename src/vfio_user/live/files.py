"""A device's state in a file, or in a pipe: saved here, restored there, or later.

All integers are little-endian, nothing is padded; a CRC-32 is zlib's::

    preamble, 20 bytes
     0  8s   magic           89 "VFUSAV" 0A
     8  u16  format version  1
    10  u16  flags           0
    12  u32  length          of the header in bytes, at most 64 KiB
    16  u32  CRC-32          of bytes 0-15 and of the header
    20       header          JSON: Header

    record, 8 bytes and its data; any number of them
     0  u32  length          of the data, 1 byte to 1 MiB
     4  u32  CRC-32          of length and data
     8       data            what comes next in the device's migration stream

    end, 48 bytes
     0  u32  length          0
     4  u32  CRC-32          of length
     8  u64  size            of the data of all records, in bytes
    16  32s  SHA-256         of all bytes before this one

Nothing may follow the end. The checksums find damage; they do not tell who wrote the file.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, BinaryIO

import msgspec

from vfio_user import __version__
from vfio_user.client import Client
from vfio_user.errors import MigrationError, StreamError, VfioUserError
from vfio_user.live.destination import LocalDestination
from vfio_user.live.offer import DeviceOffer, Offer
from vfio_user.live.source import CHUNK, Source
from vfio_user.migration.checksum import crc32

MAGIC = b"\x89VFUSAV\n"
FORMAT_VERSION = 1
MAX_HEADER = 64 << 10
MAX_RECORD = CHUNK
MAX_SPOOLED = 1 << 30
"""Bytes of a pipe that :func:`opened` puts aside, unless it is told another limit."""

_PREAMBLE = struct.Struct("<8sHHII")
_RECORD = struct.Struct("<II")
_LENGTH = _CRC = struct.Struct("<I")
_CRC_SIZE = _CRC.size
_SIZE = struct.Struct("<Q")

OnProgress = Callable[[int], None]
"""Is told, between two records, how many bytes have moved. What it raises ends the work like any other failure."""


def no_progress(size: int) -> None:
    """What is told nobody."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file says of itself before its data."""

    package: Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[0-9A-Za-z.+!-]+\Z")]
    """Version of the package that wrote it."""
    device: DeviceOffer


def save(client: Client, file: BinaryIO, *, on_progress: OnProgress = no_progress) -> int:
    """Write the state of a device that runs; it stands still meanwhile, and runs on whatever fails.

    Returns the bytes of its stream. Raises MigrationError or OSError for what the device or ``file`` refuses: what was
    written by then is refused by all who read it. A ``file`` that is slow holds the device up.
    """
    source = Source([client])
    writer = Writer(file, Header(package=__version__, device=source.offer(()).devices[0]))
    with _undone_by(source.run, "not saved"):
        source.stop()
        for _, data in source.read_rest():
            writer.add(data)
            on_progress(writer.size)
        source.run()
    writer.end()
    return writer.size


def restore(
    client: Client, file: BinaryIO, *, max_size: int = MAX_SPOOLED, on_progress: OnProgress = no_progress
) -> int:
    """Give the state in ``file`` to a device that runs; it goes on with that. Returns the bytes of its stream.

    Raises StreamError for a file that is not whole and sound, MigrationError for one of another device, both before
    the device changes. What fails later raises MigrationError, and the device is reset. ``max_size``: as of
    :func:`opened`.
    """
    with opened(file, max_size=max_size) as saved:
        return load(client, saved, on_progress=on_progress)


def load(client: Client, saved: Saved, *, on_progress: OnProgress = no_progress) -> int:
    """As :func:`restore`, of a file that is open already."""
    destination = LocalDestination([client])
    destination.check(Offer([saved.header.device], []))
    size = 0
    with _undone_by(destination.abort, "not restored"):
        destination.begin()
        for data in saved.records():
            destination.write_device(0, memoryview(data))
            size += len(data)
            on_progress(size)
        destination.load()
        destination.start()
    return size


class Saved:
    """A file that was read to its end, and is whole and sound."""

    def __init__(self, file: BinaryIO, start: int, header: Header, size: int) -> None:
        self._file = file
        self._start = start
        self.header = header
        self.size = size
        """Bytes of the device's stream."""

    def records(self) -> Iterator[bytes]:
        """The device's stream, piece by piece. Raises StreamError if the file is another by now."""
        self._file.seek(self._start)
        return iter(Reader(self._file))


@contextmanager
def opened(file: BinaryIO, *, max_size: int = MAX_SPOOLED) -> Iterator[Saved]:
    """Read ``file`` to its end. What cannot be read twice, a pipe, is put aside, up to ``max_size`` bytes.

    Raises StreamError for a file that is not whole and sound, or a pipe that brings more.
    """
    with ExitStack() as stack:
        if file.seekable():
            start, reader = file.tell(), Reader(file)
        else:
            spool = stack.enter_context(tempfile.TemporaryFile())
            start, reader, file = 0, Reader(file, _Bounded(spool, max_size)), spool
        size = sum(map(len, reader))
        yield Saved(file, start, reader.header, size)


def read_header(file: BinaryIO) -> Header:
    """What ``file`` says of itself, whatever its data is like. Raises StreamError."""
    return Reader(file).header


class Reader:
    """Reads a file once, from where it is: the header at once, the device's stream as it is iterated over.

    Only the end of the iteration says that the file is whole and sound; what was handed out before is, as far as its
    CRC tells. Raises StreamError for anything else. ``copy`` is called with all that is read.
    """

    def __init__(self, file: BinaryIO, copy: Callable[[bytes], object] | None = None) -> None:
        self._file = file
        self._copy = copy
        self._sum = hashlib.sha256()
        self._position = 0
        self.header = self._read_header()

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        while data := self._read_record():
            size += len(data)
            yield data
        self._check_end(size)

    def _read_header(self) -> Header:
        preamble = self._take(_PREAMBLE.size, begin=MAGIC)
        _, version, flags, length, crc = _PREAMBLE.unpack(preamble)
        if version != FORMAT_VERSION:
            raise StreamError(f"a saved device in format {version}; known is {FORMAT_VERSION}")
        if flags or length > MAX_HEADER:
            raise StreamError(f"damaged: flags {flags:#x}, {length} bytes of header")
        header = self._take(length)
        if _crc(preamble[:-_CRC_SIZE], header) != crc:
            raise StreamError("damaged: wrong checksum of the header")
        return _decode(header)

    def _read_record(self) -> bytes:
        """The data of the next record; none of the last."""
        start = self._position
        head = self._take(_RECORD.size)
        length, crc = _RECORD.unpack(head)
        if length > MAX_RECORD:
            raise StreamError(f"damaged: a record of {length} bytes at byte {start}")
        data = self._take(length)
        if _crc(head[:-_CRC_SIZE], data) != crc:
            raise StreamError(f"damaged: wrong checksum of the record at byte {start}")
        return data

    def _check_end(self, size: int) -> None:
        announced = self._take(_SIZE.size)
        digest = self._sum.digest()
        if _SIZE.unpack(announced) != (size,) or self._take(len(digest)) != digest:
            raise StreamError("damaged: wrong checksum of the whole")
        if self._file.read(1):
            raise StreamError("damaged: something follows the end")

    def _take(self, size: int, begin: bytes = b"") -> bytes:
        """The next ``size`` bytes, which must begin so; a pipe gives them in pieces."""
        data = b""
        while len(data) < size:
            piece = self._file.read(size - len(data))
            data += piece
            if not data.startswith(begin[: len(data)]):
                raise StreamError("not a saved device")
            if not piece:
                raise StreamError(f"damaged: ends early, after {self._position + len(data)} bytes")
        self._position += size
        self._sum.update(data)
        if self._copy is not None:
            self._copy(data)
        return data


class Writer:
    """What a :class:`Reader` reads."""

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        self._sum = hashlib.sha256()
        self.size = 0
        text = msgspec.json.encode(header)
        if len(text) > MAX_HEADER:
            raise MigrationError(f"a device with {len(text)} bytes to say of itself; a file has room for {MAX_HEADER}")
        preamble = _PREAMBLE.pack(MAGIC, FORMAT_VERSION, 0, len(text), 0)[:-_CRC_SIZE]
        self._write(preamble, _CRC.pack(_crc(preamble, text)), text)

    def add(self, data: bytes | memoryview) -> None:
        """The next piece of the device's stream: 1 byte to MAX_RECORD."""
        length = _LENGTH.pack(len(data))
        self._write(length, _CRC.pack(_crc(length, data)), data)
        self.size += len(data)

    def end(self) -> None:
        length = _LENGTH.pack(0)
        self._write(length, _CRC.pack(_crc(length)), _SIZE.pack(self.size))
        self._write(self._sum.digest())
        self._file.flush()

    def _write(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self._sum.update(part)
            self._file.write(part)


class _Bounded:
    """Writes to ``file``, up to ``limit`` bytes."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = self._left = limit

    def __call__(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise StreamError(f"more than the {self._limit} bytes that are allowed of a pipe")
        self._file.write(data)


def _crc(*parts: bytes | memoryview) -> int:
    crc = 0
    for part in parts:
        crc = crc32(part, crc)
    return crc


def _decode(text: bytes) -> Header:
    try:
        header = msgspec.json.decode(text, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StreamError(f"damaged: its header is none: {str(error)!a}") from error
    if not header.device.identity.isprintable():
        raise StreamError("damaged: its header has an identity that cannot be printed")
    return header


@contextmanager
def _undone_by(undo: Callable[[], None], outcome: str) -> Iterator[None]:
    """What fails within is undone, and what fails of that is told too. Raises MigrationError for it."""
    try:
        yield
    except BaseException as error:
        try:
            undo()
        except (VfioUserError, OSError) as failure:
            raise MigrationError(f"{outcome}: {error}; and then: {failure}") from error
        if isinstance(error, (VfioUserError, OSError)):
            raise MigrationError(f"{outcome}: {error}") from error
        raise
