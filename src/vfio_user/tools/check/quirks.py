"""Published deviations of known implementations: what they look like in a report.

A row says in which cases a finding is known, and of whom. It excuses nobody: the report names it, and ``--strict``
counts it. libvfio-user's are of commit efd091b, the Rust crate's of 96c82d1, QEMU's of 10.2 and 11.1.
"""

from __future__ import annotations

import errno

from vfio_user.tools.check.model import Quirk

_C, _RUST, _QEMU = "libvfio-user", "the Rust crate vfio_user", "QEMU"


def _c(cases: str, code: str, text: str, *values: int) -> Quirk:
    return Quirk(_C, cases, code, text, frozenset(values))


def _rust(cases: str, code: str, text: str, *values: int) -> Quirk:
    return Quirk(_RUST, cases, code, text, frozenset(values))


def _qemu(cases: str, code: str, text: str, *values: int) -> Quirk:
    return Quirk(_QEMU, cases, code, text, frozenset(values))


_ONE_RECV = "a body is taken by one recv: one that comes in pieces is refused, and the stream is out of step"
_HALF = "a header that comes in two pieces is used half empty"
_IGNORED_RANGES = "DMA_LOGGING_START ignores its ranges and the length of its payload"
_GATE = "in STOP and STOP_COPY only region accesses, DEVICE_FEATURE and MIG_DATA_READ are served"

_LIBVFIO_USER = (
    _c("region/* feature/* migrate/*", "error-payload", "an error reply carries what was allocated for the reply"),
    _c("dma/map/overlap/*", "errno", "an overlap is EINVAL, not EEXIST", errno.EINVAL),
    _c("version/*", "not-proposed", "capabilities are answered that were not proposed"),
    _c("version/*", "longer", "the answer's JSON has spaces, and may be longer than the proposal"),
    _c("version/malformed/array version/malformed/number", "accepted", "JSON that is no object is no capabilities"),
    _c("version/malformed/trailing", "accepted", "json-c takes what follows the object"),
    _c("version/bad-value/max_data_xfer_size-*", "accepted", "max_data_xfer_size is not checked"),
    _c(
        "version/bad-value/max_dma_maps-* version/bad-value/pgsizes-* version/bad-value/write_multiple-*",
        "accepted",
        "capabilities of the specification that it does not know are ignored",
    ),
    *(
        _c("header/pieces/* version/pieces/* region/write/pieces", code, _ONE_RECV)
        for code in ("refused", "closed", "silent", "out-of-step", "id")
    ),
    _c("info/region/*", "no-fd-yet", "MMAP is set, but the descriptor comes with the capabilities only"),
    _c("dma/map/bad/two-fds", "accepted", "the first descriptor is used, the rest are closed"),
    _c("dma/map/bad/wraps", "accepted", "the end of the address space is not checked"),
    _c("feature/dma_logging_start/*", "accepted", _IGNORED_RANGES),
    _c("logging/start/bad/*range* logging/start/bad/*unaligned", "accepted", _IGNORED_RANGES),
    _c("logging/start/bad/page-size-3000", "accepted", "a page size need not be a power of two"),
    _c("logging/report/*", "refused", "a report begins where a region does", errno.ENOTSUP),
    _c("logging/report/*", "refused", "a hole in a report is ENOENT", errno.ENOENT),
    _c("logging/report/adjacent-regions", "size", "a report across regions succeeds without a bitmap", 0),
    _c("logging/report/finer", "silent", "a report finer than the log, of more than 255 pages, never ends"),
    _c("logging/report/*", "outside", "bits behind the range are reported"),
    _c("migrate/save/exact-reply", "padded", "MIG_DATA_READ's reply is as long as what was asked for"),
    _c("migrate/meanwhile/*", "refused", _GATE, errno.EINVAL),
    _c("migrate/reset/*", "refused", _GATE, errno.EINVAL),
    _c("migrate/reset/*", "state", "DEVICE_RESET leaves the migration state as it is"),
)

_RUST_CRATE = (
    _rust("*", "errno", "error replies carry errno 0, whatever the device said", 0),
    _rust("header/no-reply/*", "answered", "error replies are sent for NO_REPLY, too", 1),
    _rust("header/type/*", "executed", "a reply that is sent to it is executed as a command"),
    *(_rust("header/pieces/* version/pieces/*", code, _HALF) for code in ("refused", "closed", "silent", "garbled")),
    _rust("version/first/*", "accepted", "VERSION need not come first"),
    _rust("version/again", "accepted", "VERSION may be repeated"),
    *(
        _rust("version/data/* version/alone/* version/without/*", code, "capabilities are required, and a NUL")
        for code in ("closed", "refused", "died")
    ),
    _rust("sizes/*/argsz-*", "accepted", "argsz is not looked at"),
    *(
        _rust("sizes/* region/* header/unknown/* header/direction/*", code, "an error leaves the body in the stream")
        for code in ("closed", "out-of-step", "garbled", "silent")
    ),
    _rust("region/read/*", "accepted", "offsets and counts are not checked against the region"),
    _rust("irq/*/range/* irq/*/fds/*", "accepted", "start, count and descriptors are not checked"),
    _rust("irq/*/*bool*", "refused", "DATA_BOOL is not supported"),
    _rust("info/region/*", "caps-absent", "CAPS is set without the capabilities in the reply"),
    _rust("info/region/*", "no-fd", "a region that can be mapped as a whole comes without a descriptor"),
    _rust("dma/unmap/flags/bit-2", "accepted", "4 is taken for the flag ALL, which is 2"),
    _rust("hostile/*", "died", "a disconnect in mid-message, or more than 16 descriptors, end the server"),
)

SERVER_QUIRKS: tuple[Quirk, ...] = (*_LIBVFIO_USER, *_RUST_CRATE)

_QEMU_CLIENT = (
    _qemu("server/pieces-*", "gave-up", "a header that comes in pieces is taken for a bad one"),
    _qemu("server/dma-*", "refused", "DMA is refused as long as the guest has bus mastering off", errno.ENODEV),
    _qemu("broken/*", "not-noticed", "the command and the size of a reply are not checked"),
    _qemu("broken/*", "signal", "a reply that is short or lost, or whose capabilities lie outside, crashes it (11.1)"),
    _qemu("broken/*", "hang", "it waits 5 s for each reply, and walks a capability chain that is a circle for ever"),
)

CLIENT_QUIRKS: tuple[Quirk, ...] = _QEMU_CLIENT
