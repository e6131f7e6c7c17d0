"""The commands of the NVM command set (6)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from struct import Struct

from vfio_user.devices.nvme.command import Command, CommandError, Entry, check
from vfio_user.devices.nvme.constants import ALL_NAMESPACES, Feature, IoOpcode, Status
from vfio_user.devices.nvme.data import GuestData, data_ranges
from vfio_user.devices.nvme.execution import Executor, Handler, Later, Problems, second_failed
from vfio_user.devices.nvme.features import Features
from vfio_user.devices.nvme.identify import COMPARE_WRITE_BLOCKS, MAX_DATA
from vfio_user.devices.nvme.logs import Health
from vfio_user.devices.nvme.namespaces import Namespace, active_namespace
from vfio_user.devices.nvme.queues import SubmissionQueue
from vfio_user.devices.nvme.reads import Reads
from vfio_user.devices.nvme.storage.base import Storage
from vfio_user.dma.memory import GuestMemory

FUA = 1 << 30
DEALLOCATE = 1 << 25
"""Of WRITE ZEROES: the blocks may be given back."""
_RANGE = Struct("<IIQ")
"""One range of DATASET MANAGEMENT (6.7): attributes, blocks, first block."""
_DATASET_DEALLOCATE = 1 << 2
_PIECE = 1 << 20
"""Bytes that are read at once only to be looked at."""


class IoCommands:
    """Carries out what comes through the I/O queues."""

    def __init__(
        self,
        executor: Executor,
        memory: GuestMemory,
        namespaces: Mapping[int, Namespace],
        features: Features,
        health: Health,
    ) -> None:
        self._executor = executor
        self._memory = memory
        self._namespaces = namespaces
        self._features = features
        self.health = health
        self._reads = Reads(memory, namespaces, health)
        self.page_size = 4096
        """Bytes of a page of the host, as CC.MPS says."""
        self.handlers: dict[int, Handler] = {
            IoOpcode.FLUSH: self._flush,
            IoOpcode.WRITE: self._write,
            IoOpcode.READ: self._read,
            IoOpcode.COMPARE: self._compare,
            IoOpcode.WRITE_ZEROES: self._write_zeroes,
            IoOpcode.DATASET_MANAGEMENT: self._manage_dataset,
            IoOpcode.VERIFY: self._verify,
        }

    def together(self, entries: Sequence[Entry], busy: Container[int]) -> tuple[int, int]:
        """Plain reads, at one go: a TogetherHandler."""
        return self._reads.carry_out(entries, busy, self.page_size)

    # What commands say

    def _namespace(self, command: Command) -> Namespace:
        namespace = active_namespace(self._namespaces, command.nsid)
        if namespace.formatting:
            raise CommandError(Status.FORMAT_IN_PROGRESS, retry=True)
        return namespace

    def _writable(self, command: Command) -> Namespace:
        namespace = self._namespace(command)
        check(not namespace.storage.read_only, Status.NAMESPACE_WRITE_PROTECTED)
        return namespace

    def _data(self, command: Command, length: int) -> GuestData:
        check(length <= MAX_DATA)
        return GuestData(self._memory, data_ranges(self._memory, command, length, self.page_size))

    @staticmethod
    def _span(namespace: Namespace, command: Command) -> tuple[int, int]:
        """(offset, length) in bytes of the blocks that most commands name alike."""
        return namespace.span(command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1)

    def _durable(self, command: Command) -> bool:
        """Whether what is written must be on the medium when the command completes."""
        return bool(command.cdw12 & FUA) or not self._features.get(Feature.VOLATILE_WRITE_CACHE)

    def _make_durable(self, storage: Storage, command: Command) -> None:
        """What a worker has written: it is asked last, as the cache may have been switched off since it began."""
        if self._durable(command):
            storage.flush()

    # Commands

    def _read(self, queue: SubmissionQueue, command: Command) -> int | Later:
        namespace = self._namespace(command)
        offset, length = self._span(namespace, command)
        data = self._data(command, length)
        storage, views = namespace.storage, data.views(write=True)
        self.health.reads += 1
        self.health.bytes_read += length
        if views is None:
            buffer = memoryview(bytearray(length))
            return self._later(
                queue, command, namespace, lambda: storage.read(offset, [buffer]), deliver=lambda: data.write(buffer)
            )
        if storage.read_now(offset, views):
            data.written()
            return 0
        return self._later(
            queue, command, namespace, lambda: storage.read(offset, views), moving=True, ended=data.written
        )

    def _write(self, queue: SubmissionQueue, command: Command) -> int | Later:
        namespace = self._writable(command)
        offset, length = self._span(namespace, command)
        data = self._data(command, length)
        storage, mapped = namespace.storage, data.views(write=False)
        views = [memoryview(data.read())] if mapped is None else mapped
        self.health.writes += 1
        self.health.bytes_written += length
        if not self._durable(command) and storage.write_now(offset, views):
            return 0

        def work() -> None:
            storage.write(offset, views)
            self._make_durable(storage, command)

        return self._later(queue, command, namespace, work, moving=mapped is not None)

    def _flush(self, queue: SubmissionQueue, command: Command) -> Later:
        if command.nsid == ALL_NAMESPACES:
            storages = [namespace.storage for namespace in self._namespaces.values()]
            return self._later(queue, command, None, lambda: _flush_all(storages))
        namespace = self._namespace(command)
        return self._later(queue, command, namespace, namespace.storage.flush)

    def _write_zeroes(self, queue: SubmissionQueue, command: Command) -> Later:
        namespace = self._writable(command)
        storage, (offset, length) = namespace.storage, self._span(namespace, command)

        def work() -> None:
            storage.write_zeroes(offset, length, unmap=bool(command.cdw12 & DEALLOCATE))
            self._make_durable(storage, command)

        return self._later(queue, command, namespace, work)

    def _manage_dataset(self, queue: SubmissionQueue, command: Command) -> int | Later:
        namespace = self._namespace(command)
        count = (command.cdw10 & 0xFF) + 1
        ranges = list(_RANGE.iter_unpack(self._data(command, count * _RANGE.size).read()))
        if not command.cdw11 & _DATASET_DEALLOCATE:
            return 0  # the rest is advice
        check(not namespace.storage.read_only, Status.NAMESPACE_WRITE_PROTECTED)
        storage, spans = namespace.storage, [namespace.span(start, blocks) for _, blocks, start in ranges]
        return self._later(queue, command, namespace, lambda: _discard_all(storage, spans))

    def _compare(self, queue: SubmissionQueue, command: Command) -> Later:
        namespace = self._namespace(command)
        offset, length = self._span(namespace, command)
        expected = self._data(command, length).read()
        self.health.reads += 1
        self.health.bytes_read += length
        return self._later(queue, command, namespace, lambda: _expect(namespace, offset, expected))

    def _verify(self, queue: SubmissionQueue, command: Command) -> Later:
        namespace = self._namespace(command)
        offset, length = self._span(namespace, command)

        def work() -> None:
            buffer = memoryview(bytearray(min(length, _PIECE)))
            for start in range(offset, offset + length, _PIECE):
                namespace.storage.read(start, [buffer[: offset + length - start]])
                if self._executor.hurried:  # it may be 256 MiB
                    raise CommandError(Status.COMMAND_INTERRUPTED, retry=True)

        return self._later(queue, command, namespace, work)

    def compare_and_write(self, first: Command, second: Command) -> Callable[[], Problems] | None:
        """A fused pair, at one go (6.1.1): a FusedHandler."""
        namespace = self._writable(second)
        check(first.opcode == IoOpcode.COMPARE and second.opcode == IoOpcode.WRITE)
        check(first[3:4] + first[8:10] == second[3:4] + second[8:10] and (first.cdw12 ^ second.cdw12) & 0xFFFF == 0)
        offset, length = self._span(namespace, first)
        check(length <= COMPARE_WRITE_BLOCKS * namespace.block_size)
        if namespace.busy:
            return None
        expected, data = self._data(first, length).read(), self._data(second, length).read()

        def work() -> Problems:
            _expect(namespace, offset, expected)
            try:
                namespace.storage.write(offset, [memoryview(data)])
                self._make_durable(namespace.storage, second)
            except OSError as error:
                return second_failed(error)
            return None, None

        return work

    def _later(
        self,
        queue: SubmissionQueue,
        command: Command,
        namespace: Namespace | None,
        work: Callable[[], object],
        *,
        moving: bool = False,
        ended: Callable[[], object] | None = None,
        deliver: Callable[[], object] | None = None,
    ) -> Later:
        def worked() -> int:
            work()
            return 0

        return self._executor.later(
            queue, command, worked, namespace=namespace, moving=moving, ended=ended, deliver=deliver
        )


def _flush_all(storages: Iterable[Storage]) -> None:
    for storage in storages:
        storage.flush()


def _discard_all(storage: Storage, spans: Iterable[tuple[int, int]]) -> None:
    for offset, length in spans:
        if length:
            storage.discard(offset, length)


def _expect(namespace: Namespace, offset: int, expected: bytes) -> None:
    """Raise CommandError unless that is what is there."""
    found = bytearray(len(expected))
    namespace.storage.read(offset, [memoryview(found)])
    check(found == expected, Status.COMPARE_FAILURE)
