"""Many bytes of a region at once: read and written in pieces that a server takes, and shown as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from vfio_user.client import Client
from vfio_user.errors import UsageError
from vfio_user.tools.location import Extent, Location, check_fits, region_name

_MOST = 1 << 20
"""Bytes of one access, whatever the server allows: each is put aside whole."""
_LINE = 16


def bounds(client: Client, extent: Extent) -> tuple[int, int]:
    """The offsets from which and to which an extent reaches. Raises UsageError where its region does not."""
    size = client.regions[extent.region].size if extent.region < len(client.regions) else 0
    end = size if extent.end is None else extent.end
    if not extent.start < end <= size:
        raise UsageError(f"{extent} is not in {region_name(extent.region)}, which has {size:#x} bytes")
    if extent.width and (extent.start % extent.width or end % extent.width):
        raise UsageError(f"{extent} is not made of whole accesses of {extent.width} bytes")
    return extent.start, end


def read_pieces(client: Client, extent: Extent) -> Iterator[bytes]:
    """What an extent holds, piece by piece, in order."""
    offset, end = bounds(client, extent)
    most = extent.width or _piece(client)
    while offset < end:
        data = client.region_read(extent.region, offset, min(most, end - offset))
        yield data
        offset += len(data)


def write_from(client: Client, file: BinaryIO, target: Location | Extent) -> int:
    """Write all that ``file`` has into a region, piece by piece; the bytes written.

    To a location any number of bytes, from there on; an extent takes no more than it has room for. What does not fit
    is found out before it is written. Raises UsageError.
    """
    extent = Extent(target.region, target.offset, None, None) if isinstance(target, Location) else target
    start, end = bounds(client, extent)
    most = extent.width or _piece(client)
    offset = start
    size = _length(file)
    if size is not None and size > end - start:
        raise UsageError(f"{size} bytes do not fit at {extent}, which has room for {end - start}")
    while data := file.read(most):
        if len(data) > end - offset:
            raise UsageError(f"{extent} is full: {offset - start} bytes were written, and there are more")
        client.region_write(extent.region, offset, data)
        offset += len(data)
    return offset - start


def write_number(client: Client, location: Location, value: int) -> None:
    """Write a register. Raises UsageError for a value that does not fit."""
    check_fits(location, value)
    client.region_write(location.region, location.offset, value.to_bytes(location.width, "little"))


def _length(file: BinaryIO) -> int | None:
    """The bytes that a file has left; None of a pipe."""
    if not file.seekable():
        return None
    here = file.tell()
    size = file.seek(0, 2) - here
    file.seek(here)
    return size


def _piece(client: Client) -> int:
    return max(1, min(client.capabilities.data_xfer_size, _MOST))


def lines(pieces: Iterable[bytes], start: int, width: int | None = None) -> Iterator[str]:
    """Offsets, bytes and characters, sixteen a line; ``width``: as little-endian numbers of so many bytes each.

    Of lines that are all the same, the first is shown and then a ``*``; the last line is the offset behind all.
    """
    offset, before, skipping = start, b"", False
    for line in _regrouped(pieces):
        if line == before and len(line) == _LINE:
            if not skipping:
                yield "*"
            skipping = True
        else:
            yield f"{offset:08x}  {_numbers(line, width or 1)}  |{_characters(line)}|"
            before, skipping = line, False
        offset += len(line)
    yield f"{offset:08x}"


def _regrouped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, sixteen at a time, and what is left. As soon as they are there."""
    rest = b""
    for piece in pieces:
        data = rest + piece
        whole = len(data) - len(data) % _LINE
        yield from (data[at : at + _LINE] for at in range(0, whole, _LINE))
        rest = data[whole:]
    if rest:
        yield rest


def _numbers(line: bytes, width: int) -> str:
    parts = [line[at : at + width] for at in range(0, len(line), width)]
    text = " ".join(part[::-1].hex() for part in parts)
    return text.ljust((_LINE // width) * (2 * width + 1) - 1)


def _characters(line: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in line)
