"""One connection to an NBD server, through libnbd's C library.

The library itself and not its Python binding: its ABI is stable, while the binding fits one version of Python; and this
way data goes straight into guest memory, without the GIL. See libnbd(3), and libnbd.h for the prototypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import math
import os
import re
import time
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

LIBRARY = "libnbd.so.0"
PACKAGES = "libnbd0 (Debian, Ubuntu) or libnbd (Fedora, SUSE)"

SIZE_MINIMUM, SIZE_MAXIMUM = 0, 2
"""LIBNBD_SIZE_*: smallest unit of an offset or a length; longest data of a command."""
NO_HOLE, FAST_ZERO = 0x02, 0x10
"""LIBNBD_CMD_FLAG_* of a zero command: keep room for it; rather fail than take as long as writing."""
LONGEST = 128 << 20
"""Bytes of a zero command. Its length has 32 bits, but a server that must write them should not take too long."""
USUAL_MAXIMUM = 32 << 20
"""Bytes of data in a command, that any server takes (NBD protocol, "Block size constraints")."""


class _Completion(ctypes.Structure):
    """nbd_completion_callback, by value. All zero: none."""

    _fields_ = (("callback", c_void_p), ("user_data", c_void_p), ("free", c_void_p))


_NO_COMPLETION = _Completion()
_IN_DATA = (c_void_p, c_size_t, c_uint64, _Completion, c_uint32)
_PROTOTYPES: dict[str, tuple[object, tuple[object, ...]]] = {
    "nbd_set_uri_allow_local_file": (c_int, (ctypes.c_bool,)),
    "nbd_aio_connect_uri": (c_int, (c_char_p,)),
    "nbd_aio_disconnect": (c_int, (c_uint32,)),
    "nbd_close": (None, ()),
    "nbd_poll": (c_int, (c_int,)),
    "nbd_aio_is_ready": (c_int, ()),
    "nbd_aio_is_processing": (c_int, ()),
    "nbd_aio_command_completed": (c_int, (c_uint64,)),
    "nbd_get_size": (c_int64, ()),
    "nbd_get_block_size": (c_int64, (c_int,)),
    "nbd_is_read_only": (c_int, ()),
    "nbd_can_flush": (c_int, ()),
    "nbd_can_zero": (c_int, ()),
    "nbd_can_fast_zero": (c_int, ()),
    "nbd_can_multi_conn": (c_int, ()),
    "nbd_aio_pread": (c_int64, _IN_DATA),
    "nbd_aio_pwrite": (c_int64, _IN_DATA),
    "nbd_aio_flush": (c_int64, (_Completion, c_uint32)),
    "nbd_aio_zero": (c_int64, (c_uint64, c_uint64, _Completion, c_uint32)),
}
"""What each returns and takes; all take the handle first."""


@dataclass(frozen=True)
class Export:
    """What a server says of an export. Sizes are in bytes."""

    size: int
    block_size: int
    longest_data: int
    read_only: bool
    can_flush: bool
    can_zero: bool
    can_fast_zero: bool
    can_multi_conn: bool
    """Whether a flush on one connection holds for what all have written."""


def _address(view: memoryview) -> object:
    """A pointer to the memory of ``view``, which keeps that where it is for as long as the pointer lives."""
    return ctypes.byref(ctypes.c_char.from_buffer(view))


@functools.cache
def _library() -> ctypes.CDLL:
    """Raises OSError where there is none, AttributeError where it is too old (before 1.4)."""
    library = ctypes.CDLL(LIBRARY)
    library.nbd_create.restype = c_void_p
    library.nbd_get_error.restype = c_char_p
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, (c_void_p, *arguments)
    return library


class Connection:
    """One connection. It serves one caller at a time; every call ends by its ``deadline``, of time.monotonic().

    Raises OSError: what the server says of a command, and then it is still :attr:`alive`; or ENOTCONN, ECONNREFUSED,
    ETIMEDOUT and others, and then it is not. (Only to look up a host's name may take longer.)
    """

    def __init__(self, uri: str, deadline: float) -> None:
        try:
            self._library = _library()
        except (OSError, AttributeError) as error:
            raise OSError(errno.ELIBACC, f"needs {LIBRARY}: install {PACKAGES}", uri) from error
        self._uri = uri
        self._handle = self._library.nbd_create()
        if not self._handle:
            raise self._error()
        try:
            self._connect(deadline)
            self.export = self._ask()
        except BaseException:
            self.close()
            raise

    def _connect(self, deadline: float) -> None:
        # Who names the URI may name the files with the keys that it needs.
        self._call("nbd_set_uri_allow_local_file", True)
        self._call("nbd_aio_connect_uri", os.fsencode(self._uri))
        while not self._is("nbd_aio_is_ready"):
            self._wait(deadline)

    def _ask(self) -> Export:
        return Export(
            size=self._call("nbd_get_size"),
            block_size=self._call("nbd_get_block_size", SIZE_MINIMUM) or 1,
            longest_data=min(self._call("nbd_get_block_size", SIZE_MAXIMUM) or USUAL_MAXIMUM, USUAL_MAXIMUM),
            read_only=self._is("nbd_is_read_only"),
            can_flush=self._is("nbd_can_flush"),
            can_zero=self._is("nbd_can_zero"),
            can_fast_zero=self._is("nbd_can_fast_zero"),
            can_multi_conn=self._is("nbd_can_multi_conn"),
        )

    @property
    def alive(self) -> bool:
        """Whether it can take another command."""
        return self._handle is not None and (self._is("nbd_aio_is_ready") or self._is("nbd_aio_is_processing"))

    def read(self, deadline: float, offset: int, view: memoryview) -> None:
        """Straight into the memory of ``view``, of ``export.longest_data`` bytes at most; so :meth:`write`."""
        self._command(deadline, "nbd_aio_pread", _address(view), len(view), offset, _NO_COMPLETION, 0)

    def write(self, deadline: float, offset: int, view: memoryview) -> None:
        # A guest may show memory to the device for reading only; ctypes knows no address of such.
        source = bytes(view) if view.readonly else _address(view)
        self._command(deadline, "nbd_aio_pwrite", source, len(view), offset, _NO_COMPLETION, 0)

    def flush(self, deadline: float) -> None:
        self._command(deadline, "nbd_aio_flush", _NO_COMPLETION, 0)

    def zero(self, deadline: float, offset: int, length: int, flags: int) -> None:
        """``length`` is LONGEST at most; ``flags`` are NO_HOLE and FAST_ZERO."""
        self._command(deadline, "nbd_aio_zero", length, offset, _NO_COMPLETION, flags)

    def _command(self, deadline: float, name: str, *arguments: object) -> None:
        cookie = self._call(name, *arguments)
        while not self._call("nbd_aio_command_completed", cookie):
            self._wait(deadline)

    def _wait(self, deadline: float) -> None:
        """Let something happen on the connection; if nothing does, leave it: what comes later must land nowhere."""
        milliseconds = max(0, math.ceil((deadline - time.monotonic()) * 1000))
        try:
            happened = self._call("nbd_poll", milliseconds)
        except InterruptedError:
            return
        except BaseException:
            self.close()
            raise
        if not happened:
            self.close()
            raise TimeoutError(errno.ETIMEDOUT, "the server does not answer", self._uri)

    def _is(self, name: str) -> bool:
        return self._call(name) > 0

    def _call(self, name: str, *arguments: object) -> int:
        if self._handle is None:
            raise OSError(errno.ENOTCONN, "the connection was closed", self._uri)
        result: int = getattr(self._library, name)(self._handle, *arguments)
        if result < 0:
            raise self._error()
        return result

    def _error(self) -> OSError:
        """What libnbd says of this thread's last call."""
        text = (self._library.nbd_get_error() or b"failed").decode(errors="replace")
        # It begins with the name of the function, which tells nobody anything.
        return OSError(self._library.nbd_get_errno() or errno.EIO, re.sub(r"^nbd_\w+: ", "", text), self._uri)

    def close(self) -> None:
        """Take leave of the server, without waiting for it. Closed twice changes nothing."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self._call("nbd_aio_disconnect", 0)
            self._library.nbd_close(self._handle)
            self._handle = None
