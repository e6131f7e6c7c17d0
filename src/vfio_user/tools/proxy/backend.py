"""The device behind another server's socket, as something that a :class:`~vfio_user.Server` serves."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vfio_user.client.core import Call, ClientCore
from vfio_user.client.regions import RegionDescription
from vfio_user.dma.memory import FILE_IO, READ, WRITE, GuestMemory
from vfio_user.errors import CommandError, VfioUserError
from vfio_user.fds import OwnedFd, close_all
from vfio_user.filters.base import live
from vfio_user.migration.states import RUNNING_STATES
from vfio_user.pci.interrupts import INTX, Interrupts
from vfio_user.pci.msi import MAX_MSI_VECTORS, MAX_MSIX_VECTORS
from vfio_user.server import Irq, Link, Region, ServerBackend
from vfio_user.tools.proxy.log import UpstreamLog
from vfio_user.tools.proxy.standing import KeptConfig, PutOff
from vfio_user.tools.proxy.upstream import T, Upstream
from vfio_user.wire.constants import (
    PCI_NUM_IRQS,
    DeviceFeature,
    DeviceFlags,
    DeviceState,
    IrqSetFlags,
    MigrationFlags,
    PciRegion,
)

logger = logging.getLogger("vfio_user.tools")

_RAISE = int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER)
_LISTEN = int(IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER)
_COMMAND, _INTX_DISABLE, _INTX_STATUS = 4, 1 << 10, 1 << 16 + 3
"""Where COMMAND and STATUS are in config space; a bit of each (PCI Local Bus Specification 3.0, 6.2.2 and 6.2.3)."""

_MOST_VECTORS = (1, MAX_MSI_VECTORS, MAX_MSIX_VECTORS, 1, 1)
"""Of each index of a PCI device."""
_OPTIONAL_HOOKS = {
    "migration_data_size": DeviceFeature.MIG_DATA_SIZE,
    "dma_logging_start": DeviceFeature.DMA_LOGGING_START,
    "dma_logging_stop": DeviceFeature.DMA_LOGGING_STOP,
    "dma_logging_report": DeviceFeature.DMA_LOGGING_REPORT,
}
"""What a device that migrates may have or not."""

_AskWithFiles = Callable[[ClientCore, Sequence[int]], Call[Any]]


class _RemoteLog:
    """The log that the server keeps."""

    def __init__(self, backend: ProxyBackend) -> None:
        self._backend = backend

    @property
    def busy(self) -> bool:
        return self._backend.busy

    def start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        return self._backend.ask(lambda core: core.dma_logging_start(page_size, ranges))

    def stop(self) -> None:
        self._backend.ask(lambda core: core.dma_logging_stop())

    def report(self, iova: int, length: int, page_size: int) -> bytes:
        return self._backend.ask(lambda core: core.dma_logging_report(iova, length, page_size))


class ProxyBackend(ServerBackend):
    """The device of the server at ``path``: hooks ask that server, over one connection for each client.

    ``timeout``: seconds that it has to answer, or its client is let go. ``max_write``: see :class:`~vfio_user.Client`.
    :meth:`close` it when nobody serves it any more.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 30.0, max_write: int | None = None) -> None:
        self._path = Path(path)
        self._timeout, self._max_write = timeout, max_write
        self._upstream: Upstream | None = None
        self.regions: Sequence[Region] = ()
        self.irqs: Sequence[Irq] = ()
        self._forget()

    def _forget(self) -> None:
        """Of a client, and of what the device can do, nothing is known."""
        self._has_client = False
        self._migration: MigrationFlags | None = None
        self._state = DeviceState.RUNNING
        self._interrupts = Interrupts([0] * PCI_NUM_IRQS)
        self._memory = GuestMemory()
        self._memory.log = self._log = UpstreamLog(_RemoteLog(self))
        self.dma = self._memory
        self._put_off = PutOff()
        self._config = KeptConfig()
        for hook in _OPTIONAL_HOOKS:
            self.__dict__.pop(hook, None)

    # The server

    def connected(self, link: Link) -> None:
        try:
            self._connection.attach(link)
            self._has_client = True
        except OSError as error:
            logger.debug("the client is let go: %s", error)
            link.stop()

    def disconnected(self) -> None:
        self.close()

    def close(self) -> None:
        """Leave the server; whoever asks for something next connects anew."""
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None
            # They are known still: to access one is ENOTCONN now, not EINVAL.
            self.regions = [replace(region, fd=None) for region in self.regions]
        self._interrupts.release_fds()
        self._memory.unmap_all()
        self._forget()

    @property
    def _connection(self) -> Upstream:
        """The connection of the client; while there is none, one for those who manage the device, kept for the next.

        Raises OSError(ENOTCONN) where the server cannot be reached.
        """
        if self._upstream is not None and not self._has_client and self._upstream.lost:
            self.close()
        if self._upstream is not None:
            return self._upstream
        try:
            self._upstream = Upstream(self._path, self._timeout, self._max_write)
            self._discover(self._upstream)
        except (OSError, VfioUserError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            logger.warning("%s: %s", self._path, reason)
            self.close()
            raise OSError(errno.ENOTCONN, f"the server cannot be reached: {reason}") from error
        return self._upstream

    def ask(self, call: Callable[[ClientCore], Call[T]]) -> T:
        """Have the server do something. Raises OSError: what it refuses with, ENOTCONN where it is gone."""
        connection = self._connection
        return connection.call(call(connection.core))

    @property
    def busy(self) -> bool:
        """Whether the server is doing something already, and is to be asked for nothing that can be done without."""
        return self._upstream is not None and self._upstream.busy

    def _discover(self, upstream: Upstream) -> None:
        core = upstream.core
        self._migration = _if_had(upstream, core.migration_flags()) or None
        for hook, feature in _OPTIONAL_HOOKS.items():
            if self._migration is None or not _if_had(upstream, core.probe(feature)):
                setattr(self, hook, getattr(super(), hook))  # by which the server sees that the device has it not
        self._interrupts = _interrupts([irq.count for irq in core.irqs])
        self.irqs = [Irq(irq.count, irq.flags) for irq in core.irqs]
        self.regions = [_region(region) for region in core.regions]

    def _is_resettable(self) -> bool:
        """It is what DEVICE_GET_INFO looks at first: from here on it is known what the device is."""
        return bool(self._connection.core.info.flags & DeviceFlags.RESET)

    resettable = live(_is_resettable, "Raises OSError(ENOTCONN) where nothing can be said of the device.")

    # Accesses, memory, interrupts

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        try:
            if not self._is_ahead(region):
                self.ask(lambda core: core.region_read_into(region, offset, data))
                return
        except CommandError as error:
            self._check_kept(region, offset, len(data), error)
        self._config.read_into(offset, data)

    def region_write(self, region: int, offset: int, data: memoryview) -> None:
        try:
            if not self._is_ahead(region):
                self.ask(lambda core: core.region_write(region, offset, data, False))
                return
        except CommandError as error:
            self._check_kept(region, offset, len(data), error)
        kept = bytes(data)
        if not self._put_off.add(lambda core: core.region_write(region, offset, memoryview(kept), False), resets=True):
            raise OSError(errno.ENOSPC, "too much was written while the device stands")
        self._config.write(offset, kept)

    def dma_map(self, flags: int, offset: int, address: int, size: int, fd: OwnedFd | None) -> None:
        # To be read from for a push only: in the file, which nobody can make vanish beneath a mapping of ours.
        access = flags & (READ | WRITE) if fd is None else READ | flags & WRITE | FILE_IO
        kept = None if fd is None else OwnedFd.duplicate(fd.fileno())
        self._memory.map(address, size, access, kept, offset)
        try:
            self._ask_or_put_off(
                lambda core, files: core.dma_map(address, size, files[0] if files else None, offset, flags, None),
                [] if fd is None else [fd],
            )
        except BaseException:
            self._memory.unmap(address, size)
            raise
        if fd is not None:
            fd.close()

    def dma_unmap(self, flags: int, address: int, size: int) -> None:
        self._log.fetch_last(address, size)
        self._ask_or_put_off(lambda core, _: core.dma_unmap(address, size, None))
        self._memory.unmap(address, size)

    def set_irqs(self, index: int, flags: int, start: int, count: int, fds: Sequence[OwnedFd]) -> None:
        known = index < PCI_NUM_IRQS and start + count <= self._interrupts.counts[index]
        if not known or flags != _RAISE or not count:
            self._ask_or_put_off(lambda core, files: core.set_irqs(index, flags, start, count, files, b""), fds)
        if known and (flags & IrqSetFlags.DATA_NONE or flags == _LISTEN):
            self._interrupts.set_irqs(index, flags, start, count, fds)
        close_all(fd for fd in fds if not fd.closed)

    def reset(self) -> None:
        self.ask(lambda core: core.reset())
        self._interrupts.reset()
        self._put_off.reset()
        if self._put_off and self.migration_get_state() in RUNNING_STATES:
            self._run()

    # Migration

    def migration_flags(self) -> MigrationFlags:
        if self._migration is None:
            self._refuse("migration")
        return self._migration

    def migration_get_state(self) -> DeviceState:
        """As it was last, where the server cannot be asked now."""
        if not self.busy:
            self._state = self.ask(lambda core: core.migration_get_state())
        return self._state

    def migration_set_state(self, state: DeviceState) -> None:
        if state == DeviceState.STOP_COPY:
            self._keep_config()
        self.ask(lambda core: core.migration_set_state(state))
        if state in RUNNING_STATES:
            self._run()

    def migration_read_data(self, data: memoryview) -> int:
        return self.ask(lambda core: core.migration_read_data_into(data))

    def migration_write_data(self, data: memoryview) -> None:
        self.ask(lambda core: core.migration_write_data(data))

    def migration_data_size(self) -> int:
        return self.ask(lambda core: core.migration_data_size())

    def dma_logging_start(self, page_size: int, ranges: Sequence[tuple[int, int]]) -> int:
        return self._log.start(page_size, ranges)

    def dma_logging_stop(self) -> None:
        self._log.stop()

    def dma_logging_report(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        self._log.report(iova, length, page_size, bitmap)

    # What some servers refuse while the device stands

    def _keep_config(self) -> None:
        """Read config space while that is surely possible."""
        if len(self.regions) > PciRegion.CONFIG and not self._config.ahead:
            kept = KeptConfig(self.regions[PciRegion.CONFIG].size)
            with suppress(CommandError):
                self.ask(lambda core: core.region_read_into(PciRegion.CONFIG, 0, memoryview(kept.data)))
                self._config = kept

    def _is_ahead(self, region: int) -> bool:
        """Whether an access must not reach the server, which lacks what was put off."""
        return region == PciRegion.CONFIG and self._config.ahead

    def _check_kept(self, region: int, offset: int, count: int, error: CommandError) -> None:
        """Raise what an access was refused with, unless that is served from what is kept."""
        if region != PciRegion.CONFIG or not self._config.has(offset, count) or not self._only_stands(error):
            raise error

    def _only_stands(self, error: CommandError) -> bool:
        """Whether a refusal may come from the device's state."""
        return (
            error.errno == errno.EINVAL
            and self._migration is not None
            and self.migration_get_state() not in RUNNING_STATES
        )

    def _ask_or_put_off(self, call: _AskWithFiles, fds: Sequence[OwnedFd] = ()) -> None:
        """Have the server do something now; or, if it refuses because the device stands, as soon as that runs."""
        try:
            if not self._put_off:
                self.ask(lambda core: call(core, [fd.fileno() for fd in fds]))
                return
        except CommandError as error:
            if not self._only_stands(error):
                raise
        kept = [OwnedFd.duplicate(fd.fileno()) for fd in fds]
        if not self._put_off.add(lambda core: call(core, [fd.fileno() for fd in kept])):
            raise OSError(errno.ENOSPC, "too much was asked for while the device stands")

    def _run(self) -> None:
        """The device runs: do what was put off; have INTx raised again, if its cause stands (docs/proxy.md).

        Raises OSError: what the first of it was refused with, when the others are done.
        """
        self._config = KeptConfig()
        refusals = self._put_off.do(self.ask)
        for refusal in refusals:
            logger.warning("%s: what was put off while the device stood is not done: %s", self._path, refusal)
        self._raise_intx()
        if refusals:
            raise refusals[0]

    def _raise_intx(self) -> None:
        if self._interrupts.counts[INTX] and not self._interrupts.message_signalled:
            registers = bytearray(4)
            self.ask(lambda core: core.region_read_into(PciRegion.CONFIG, _COMMAND, memoryview(registers)))
            found = int.from_bytes(registers, "little")
            if found & _INTX_STATUS and not found & _INTX_DISABLE:
                self._interrupts.fire(INTX)


def _interrupts(counts: Sequence[int]) -> Interrupts:
    """Those of a device with so many vectors at each index, as far as PCI has that many."""
    padded = [*counts, *[0] * PCI_NUM_IRQS]
    return Interrupts([count if count <= most else 0 for count, most in zip(padded, _MOST_VECTORS, strict=False)])


def _if_had(upstream: Upstream, call: Call[T]) -> T | None:
    """What a server says of a feature; None where it has it not. Raises OSError(ENOTCONN) where it is gone."""
    try:
        return upstream.call(call)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise
        return None


def _region(region: RegionDescription) -> Region:
    """What the client is told: what it can map it maps, from the server's own file; no eventfds instead of accesses."""
    fd = None if region.fd is None else region.fd.fileno()
    return Region(region.size, region.flags, fd, region.offset, region.sparse_areas)
