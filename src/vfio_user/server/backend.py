"""What a server serves: :class:`ServerBackend` and the descriptions of its regions and interrupts."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

from vfio_user.fds import OwnedFd
from vfio_user.wire.constants import (
    DeviceState,
    IoFdType,
    IrqInfoFlags,
    MigrationFlags,
    RegionFlags,
)

if TYPE_CHECKING:
    from vfio_user.dma.memory import GuestMemory


@dataclass(frozen=True, slots=True)
class RegionIoFd:
    """A part of a region that a file descriptor serves, for DEVICE_GET_REGION_IO_FDS.

    ``offset`` and ``size`` are in bytes from the start of the region; ``fd`` stays the backend's, -1: there is none.
    ``datamatch`` is an ioeventfd's, ``user_data`` an ioregionfd's; ``shadow_fd`` and ``shadow_offset`` say where an
    IOEVENTFD_SHADOW puts the value that was written.
    """

    type: IoFdType
    offset: int
    size: int
    fd: int
    flags: int = 0
    datamatch: int = 0
    user_data: int = 0
    shadow_fd: int | None = None
    shadow_offset: int = 0


@dataclass(frozen=True, slots=True)
class Region:
    """One region of a device: what DEVICE_GET_REGION_INFO says of it.

    ``size`` in bytes; 0: the region does not exist. An ``fd``, which stays the backend's, makes it mmap-able, from
    ``offset`` in that file on: wholly, or where ``sparse_areas`` are given, (offset, size) pairs in bytes relative to
    the region, only there.
    """

    size: int = 0
    flags: int = RegionFlags.READ | RegionFlags.WRITE
    fd: int | None = None
    offset: int = 0
    sparse_areas: Sequence[tuple[int, int]] = ()
    io_fds: Sequence[RegionIoFd] = ()


@dataclass(frozen=True, slots=True)
class Irq:
    """One interrupt index of a device: how many vectors it has, and IrqInfoFlags."""

    count: int = 0
    flags: int = IrqInfoFlags.EVENTFD


class Quiescing:
    """What :meth:`ServerBackend.quiesce` returns when it will finish later.

    The command that asked for it waits. The backend calls :meth:`done` once, from any thread, when no DMA is in
    flight any more, or with an errno when that failed, which goes into the command's reply.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: int | None = None
        self._wake: Callable[[], None] | None = None

    def done(self, error: int = 0) -> None:
        """DMA has stopped (0), or could not be stopped (an errno). A second call changes nothing."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            wake = self._wake
        if wake is not None:
            wake()

    @property
    def error(self) -> int | None:
        """The errno that :meth:`done` was given, 0 for success; None while it was not called."""
        return self._error

    def on_done(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called when it is done; at once if it is."""
        with self._lock:
            self._wake = wake
            finished = self._error is not None
        if finished:
            wake()


class Link(Protocol):
    """What a connected server offers its backend. Call it from the thread that serves the connection."""

    def dma_read(self, address: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from the client's memory at ``address`` by DMA_READ messages.

        While the reply is awaited the connection goes on serving commands, in order: hooks are called meanwhile. A
        client that waits for the reply to the very command whose hook calls this may never answer (QEMU does not):
        :meth:`defer` the work instead. Raises OSError with the reply's errno, EDEADLK when nested too deeply.
        """

    def dma_write(self, address: int, data: memoryview) -> None:
        """As :meth:`dma_read`, the other way, by DMA_WRITE."""

    def defer(self, work: Callable[[], None]) -> None:
        """Run ``work`` after the reply to the current command was sent."""

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Call ``ready`` whenever ``fd`` is readable, until :meth:`unwatch`."""

    def unwatch(self, fd: int) -> None:
        """End a :meth:`watch`; nothing happens if there is none."""

    def stop(self) -> None:
        """Let the client go when all that was received of it is answered."""

    @property
    def spin(self) -> float:
        """Seconds that the server looks around, :meth:`ServerBackend.look_for_work`, before it sleeps; or 0."""


class ServerBackend:
    """The hooks of a device server. Override what the device supports: every default refuses cleanly.

    A hook refuses by raising ``OSError(errno.X)``: that errno goes into the reply. Any other exception is logged with
    its traceback and reads as EIO. Hooks are called in the thread that serves the connection, one at a time, except
    as :meth:`Link.dma_read` says. Arguments were checked before: offsets and counts lie inside the region, interrupts
    exist, DMA ranges neither wrap nor overlap.
    """

    regions: Sequence[Region] = ()
    """Index is position; 9 of them for a PCI device, see wire.constants.PciRegion."""
    irqs: Sequence[Irq] = ()
    """Index is position; 5 of them for a PCI device, see wire.constants.PciIrq."""
    resettable: bool = False
    spin: float = 0.0
    """Seconds that a server looks for messages before it sleeps, unless it is told otherwise."""
    dma: GuestMemory | None = None
    """The client's memory as the device reaches it, and the log of what it wrote: what a control socket pushes."""

    def _refuse(self, hook: str) -> NoReturn:
        raise OSError(errno.EINVAL, f"{type(self).__name__} has no {hook}")

    def connected(self, link: Link) -> None:
        """A client is there, and ``link`` is valid until :meth:`disconnected`. Nothing was said yet."""

    def disconnected(self) -> None:
        """The client left. Its DMA regions were unmapped and its interrupts disabled before, hook by hook."""

    def look_for_work(self, last: bool) -> bool:
        """Do what waits in the client's memory without a word to the server; whether there was something.

        A server that spins calls it over and over before it sleeps, so it should be quick. ``last``: the server
        sleeps next, unless there was something: from then on the client has to say when there is.
        """
        return False

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        """Fill ``data`` (1 byte to max_data_xfer_size) from ``offset`` of a region."""
        self._refuse("region_read")

    def region_view(self, region: int, offset: int, count: int) -> memoryview | None:
        """The memory behind a large read, to be sent without a copy; None, the default: region_read is called.

        It holds what :meth:`region_read` would have filled in, ``count`` bytes, and keeps holding that until the
        next hook is called: by then the reply is on its way.
        """
        return None

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        """Take ``data``, which is valid during the call only, at ``offset`` of a region."""
        self._refuse("region_write")

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        """The client's memory [address, address + size) may be accessed from now on (DmaFlags).

        With an ``fd``, which is the backend's to keep, it is that file from ``offset`` on; without, it is reached by
        messages (:meth:`Link.dma_read`).
        """
        self._refuse("dma_map")

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        """A range that was mapped, exactly, is gone: touch it no more. Called after :meth:`quiesce`."""
        self._refuse("dma_unmap")

    def reset(self) -> None:
        """DEVICE_RESET, in any migration state; called after :meth:`quiesce`, and only if ``resettable``."""
        self._refuse("reset")

    def set_irqs(self, index: int, flags: int, start: int, count: int, fds: Sequence[OwnedFd]) -> None:
        """DEVICE_SET_IRQS (IrqSetFlags: one DATA, one ACTION) for vectors [start, start + count) of an index.

        DATA_BOOL never arrives here: the server calls once with DATA_NONE for each run of vectors that are true.
        With DATA_EVENTFD there is one eventfd per vector, the backend's to keep, or none to take them away.
        DATA_NONE with ACTION_TRIGGER and ``count`` 0 disables the index.
        """
        self._refuse("set_irqs")

    def quiesce(self) -> Quiescing | None:
        """Promise that no DMA is in flight: called before an unmap, a reset (a guest's function-level one too), and
        before leaving a running state.

        None: there is none. A :class:`Quiescing`: it ends later, and what asked for it waits. It may be called again
        while an earlier one is under way; each call has an object of its own to answer by.
        """
        return None

    def migration_flags(self) -> MigrationFlags:
        """Which arcs of the migration state machine the device has. Refused: it cannot migrate at all."""
        self._refuse("migration")

    def migration_get_state(self) -> DeviceState:
        """The migration state that the device is in; asked often, so it should be quick."""
        self._refuse("migration")

    def migration_set_state(self, state: DeviceState) -> None:
        """Go to ``state``, by whatever path. Which transitions are valid is the backend's to decide."""
        self._refuse("migration")

    def migration_read_data(self, data: memoryview) -> int:
        """Fill ``data`` with what comes next in the migration stream; the bytes filled. Fewer: it ends here."""
        self._refuse("migration")

    def migration_view(self, size: int) -> memoryview | None:
        """What :meth:`migration_read_data` would fill in next, at most ``size`` bytes, to be sent without a copy.

        Fewer bytes: the stream ends here. They stay as they are until the next hook is called. None, the default:
        :meth:`migration_read_data` is called. Bytes that begin 24 bytes behind the start of a page, as they do in the
        message, are copied by the kernel a third faster across two cores (bench/README.md).
        """
        return None

    def migration_write_data(self, data: memoryview) -> None:
        """Take all of ``data``, valid during the call only, as what comes next in the stream."""
        self._refuse("migration")

    def migration_data_size(self) -> int:
        """About how many bytes STOP_COPY will send (VFIO_DEVICE_FEATURE_MIG_DATA_SIZE)."""
        self._refuse("estimate of its migration data")

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        """Log which pages DMA dirties, in ``ranges`` of (iova, length) in bytes, or with none everywhere.

        ``page_size`` is a power of two; the one chosen is returned. Ranges are aligned to it and do not wrap.
        """
        self._refuse("DMA logging")

    def dma_logging_stop(self) -> None:
        """Log no longer. Called also when nothing is logged."""
        self._refuse("DMA logging")

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        """Set the bits of the pages in [iova, iova + length) that are dirty, and take them as clean from now on.

        ``bitmap`` is zeroed; page n of ``page_size`` bytes from ``iova`` on is bit n % 8 of byte n // 8.
        """
        self._refuse("DMA logging")
