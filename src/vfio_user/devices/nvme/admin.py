"""Admin commands (5)."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING

from vfio_user.devices.nvme import identify
from vfio_user.devices.nvme.command import Command, CommandError, check
from vfio_user.devices.nvme.constants import (
    ALL_NAMESPACES,
    CQE_SIZE,
    SQE_SIZE,
    AdminOpcode,
    AsyncEvent,
    Feature,
    Identify,
    LogPage,
    Status,
)
from vfio_user.devices.nvme.data import GuestData, data_ranges, prp_list
from vfio_user.devices.nvme.doorbells import DoorbellBuffers
from vfio_user.devices.nvme.execution import LATER, Handler, Later
from vfio_user.devices.nvme.features import CAPABILITIES, CURRENT, RULES, TEMPERATURE_NOTICES, known_feature
from vfio_user.devices.nvme.logs import commands_page, firmware_page
from vfio_user.devices.nvme.namespaces import BLOCK_SIZES, MAX_NAMESPACES, Namespace, active_namespace
from vfio_user.devices.nvme.queues import CompletionQueue, Ring, SubmissionQueue

if TYPE_CHECKING:
    from vfio_user.devices.nvme.controller import Nvme

CONTIGUOUS, INTERRUPTS_ENABLED = 1 << 0, 1 << 1
"""Of dword 11 of CREATE I/O COMPLETION QUEUE and CREATE I/O SUBMISSION QUEUE."""
NOT_ABORTED = 1
"""Dword 0 of ABORT."""
RETAIN_EVENT = 1 << 15
_SAVE = 1 << 31
_SQ_SIZE_FIELD, _CQ_SIZE_FIELD = 16, 20
"""Where CC has the entry sizes, as powers of two."""
_TIMESTAMP_SIZE = 8
_NOT_OF_NAMESPACES = Status.FEATURE_NOT_NAMESPACE_SPECIFIC
_NO_ERASE, _ERASE_USER_DATA = 0, 1


class AdminCommands:
    """Carries out what comes through the admin queue of ``controller``."""

    def __init__(self, controller: Nvme) -> None:
        self._controller = controller
        self._executor = controller.executor
        self.handlers: dict[int, Handler] = {
            AdminOpcode.DELETE_IO_SQ: self._delete_submissions,
            AdminOpcode.CREATE_IO_SQ: self._create_submissions,
            AdminOpcode.GET_LOG_PAGE: self._get_log_page,
            AdminOpcode.DELETE_IO_CQ: self._delete_completions,
            AdminOpcode.CREATE_IO_CQ: self._create_completions,
            AdminOpcode.IDENTIFY: self._identify,
            AdminOpcode.ABORT: self._abort,
            AdminOpcode.SET_FEATURES: self._set_features,
            AdminOpcode.GET_FEATURES: self._get_features,
            AdminOpcode.ASYNC_EVENT_REQUEST: self._request_event,
            AdminOpcode.KEEP_ALIVE: self._keep_alive,
            AdminOpcode.DOORBELL_BUFFER_CONFIG: self._configure_doorbells,
            AdminOpcode.FORMAT_NVM: self._format,
        }
        self._identities: dict[Identify, Callable[[Command], bytes]] = {
            Identify.NAMESPACE: self._identify_namespace,
            Identify.CONTROLLER: lambda command: identify.controller(controller.identity),
            Identify.ACTIVE_NAMESPACES: self._list_namespaces,
            Identify.NAMESPACE_DESCRIPTORS: lambda command: identify.descriptors(self._namespace(command)),
        }
        self._pages: dict[LogPage, Callable[[], bytes]] = {
            LogPage.ERROR_INFORMATION: controller.logs.error_page,
            LogPage.SMART_HEALTH: lambda: controller.logs.health_page(warm=controller.features.too_warm),
            LogPage.FIRMWARE_SLOT: firmware_page,
            LogPage.CHANGED_NAMESPACES: controller.logs.changed_page,
            LogPage.COMMANDS_SUPPORTED: lambda: commands_page(self.handlers, controller.io.handlers),
        }

    def _data(self, command: Command, length: int) -> GuestData:
        check(not command.sgl)  # admin commands of a PCI controller have PRPs (4.4)
        memory = self._controller.dma
        return GuestData(memory, data_ranges(memory, command, length, self._controller.page_size))

    def _namespace(self, command: Command) -> Namespace:
        return active_namespace(self._controller.namespaces, command.nsid)

    # Queues (5.3 to 5.6)

    def _ring(self, command: Command, entry_size: int, size_field: int) -> Ring:
        """The ring that a CREATE command describes."""
        size = (command.cdw10 >> 16) + 1
        check(1 < size <= self._controller.max_queue_size, Status.INVALID_QUEUE_SIZE)
        check(self._controller.cc >> size_field & 0xF == entry_size.bit_length() - 1)
        memory, page_size = self._controller.dma, self._controller.page_size
        check(not command.data1 & page_size - 1, Status.PRP_OFFSET_INVALID)
        if command.cdw11 & CONTIGUOUS:
            return Ring(memory, [command.data1], size, entry_size, size)
        per_page = page_size // entry_size
        pages = prp_list(memory, command.data1, -(-size // per_page), page_size)
        return Ring(memory, pages, per_page, entry_size, size)

    @staticmethod
    def _new_number(command: Command, taken: Container[int], granted: int) -> int:
        number = command.cdw10 & 0xFFFF
        check(0 < number <= granted and number not in taken, Status.INVALID_QUEUE_IDENTIFIER)
        return number

    @property
    def _granted(self) -> tuple[int, int]:
        """The highest numbers of submission and of completion queues (5.21.1.7)."""
        granted = self._controller.features.get(Feature.NUMBER_OF_QUEUES)
        return (granted & 0xFFFF) + 1, (granted >> 16) + 1

    def _create_completions(self, queue: SubmissionQueue, command: Command) -> int:
        queues, vector = self._executor.completions, command.cdw11 >> 16
        number = self._new_number(command, queues, self._granted[1])
        interrupts = bool(command.cdw11 & INTERRUPTS_ENABLED)
        check(vector < self._controller.interrupt_vectors, Status.INVALID_INTERRUPT_VECTOR)
        ring = self._ring(command, CQE_SIZE, _CQ_SIZE_FIELD)
        queues[number] = CompletionQueue(number, ring, vector, interrupts)
        return 0

    def _create_submissions(self, queue: SubmissionQueue, command: Command) -> int:
        queues = self._executor.submissions
        number = self._new_number(command, queues, self._granted[0])
        check(0 < command.cdw11 >> 16 <= self._granted[1], Status.INVALID_QUEUE_IDENTIFIER)
        completions = self._executor.completions.get(command.cdw11 >> 16)
        if completions is None:
            raise CommandError(Status.COMPLETION_QUEUE_INVALID)
        ring = self._ring(command, SQE_SIZE, _SQ_SIZE_FIELD)
        queues[number] = SubmissionQueue(number, ring, completions, command.cdw11 >> 1 & 3)
        completions.users += 1
        return 0

    def _delete_submissions(self, queue: SubmissionQueue, command: Command) -> Later:
        number = command.cdw10 & 0xFFFF
        check(number > 0 and number in self._executor.submissions, Status.INVALID_QUEUE_IDENTIFIER)
        gone = self._executor.take_out(number)

        def deleted() -> None:
            self._executor.leaving.discard(gone)
            gone.alive = False
            gone.completions.users -= 1
            self._executor.complete(queue, command.cid, 0)
            self._executor.send_interrupts()

        self._executor.when(lambda: not gone.busy, deleted)
        return LATER

    def _delete_completions(self, queue: SubmissionQueue, command: Command) -> int:
        number = command.cdw10 & 0xFFFF
        check(number > 0 and number in self._executor.completions, Status.INVALID_QUEUE_IDENTIFIER)
        check(not self._executor.completions[number].users, Status.INVALID_QUEUE_DELETION)
        del self._executor.completions[number]
        self._controller.follow_pin()  # the reason for it may be gone with the queue
        return 0

    # Identify (5.15)

    def _identify(self, queue: SubmissionQueue, command: Command) -> int:
        data = self._data(command, identify.SIZE)
        kind = command.cdw10 & 0xFF
        check(kind in [*self._identities])
        data.write(self._identities[Identify(kind)](command))
        return 0

    def _identify_namespace(self, command: Command) -> bytes:
        check(0 < command.nsid <= MAX_NAMESPACES, Status.INVALID_NAMESPACE_OR_FORMAT)
        return identify.namespace(self._controller.namespaces.get(command.nsid))

    def _list_namespaces(self, command: Command) -> bytes:
        check(command.nsid < ALL_NAMESPACES - 1, Status.INVALID_NAMESPACE_OR_FORMAT)
        return identify.active_list(self._controller.namespaces, command.nsid)

    # Log pages (5.14)

    def _get_log_page(self, queue: SubmissionQueue, command: Command) -> int:
        length = ((command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1) * 4
        offset = command.cdw12 | command.cdw13 << 32
        number = command.cdw10 & 0xFF
        check(number in [*self._pages], Status.INVALID_LOG_PAGE)
        page = LogPage(number)
        check(not offset & 3)
        check(page is not LogPage.SMART_HEALTH or command.nsid in (0, ALL_NAMESPACES))
        content = self._pages[page]()
        check(offset <= len(content))
        content = content[offset : offset + min(length, identify.MAX_DATA)]
        self._data(command, len(content)).write(content)
        if not command.cdw10 & RETAIN_EVENT:
            if page is LogPage.CHANGED_NAMESPACES:
                self._controller.logs.told(content)
            self._controller.events.page_read(page)
        return 0

    # Features (5.8, 5.21)

    def _get_features(self, queue: SubmissionQueue, command: Command) -> int:
        feature, select = known_feature(command.cdw10 & 0xFF), command.cdw10 >> 8 & 7
        if feature is Feature.TIMESTAMP and select != CAPABILITIES:
            check(select < CAPABILITIES)
            value = self._controller.features.timestamp.value if select == CURRENT else 0
            self._data(command, _TIMESTAMP_SIZE).write(value.to_bytes(_TIMESTAMP_SIZE, "little"))
            return 0
        if feature is Feature.INTERRUPT_VECTOR_CONFIGURATION:
            check(command.cdw11 & 0xFFFF < self._controller.interrupt_vectors)
        number = self._namespace(command).number if RULES[feature].per_namespace else 0
        return self._controller.features.select(feature, select, command.cdw11, number)

    def _set_features(self, queue: SubmissionQueue, command: Command) -> int | Later:
        feature = known_feature(command.cdw10 & 0xFF)
        check(not command.cdw10 & _SAVE, Status.FEATURE_NOT_SAVEABLE)
        check(RULES[feature].per_namespace or command.nsid in (0, ALL_NAMESPACES), _NOT_OF_NAMESPACES)
        controller, features = self._controller, self._controller.features
        if feature is Feature.TIMESTAMP:
            features.timestamp.set(int.from_bytes(self._data(command, _TIMESTAMP_SIZE).read()[:6], "little"))
            return 0
        if feature is Feature.NUMBER_OF_QUEUES:
            check(len(self._executor.completions) == 1, Status.COMMAND_SEQUENCE_ERROR)
            features.set(feature, command.cdw11)
            most = controller.queues - 1
            granted = min(command.cdw11 & 0xFFFF, most) | min(command.cdw11 >> 16, most) << 16
            features.set(feature, granted)
            return granted
        if feature is Feature.INTERRUPT_VECTOR_CONFIGURATION:
            check(command.cdw11 & 0xFFFF < controller.interrupt_vectors)
        if not RULES[feature].per_namespace:
            features.set(feature, command.cdw11)
        elif command.nsid == ALL_NAMESPACES:
            for number in controller.namespaces:
                features.set(feature, command.cdw11, number)
        else:
            features.set(feature, command.cdw11, self._namespace(command).number)
        if feature is Feature.VOLATILE_WRITE_CACHE and not features.get(feature):
            return self._executor.later(queue, command, controller.namespaces.flush)
        if feature is Feature.TEMPERATURE_THRESHOLD and features.too_warm:
            controller.events.add_notice(AsyncEvent.TEMPERATURE_THRESHOLD, TEMPERATURE_NOTICES)
        return 0

    # Others

    def _abort(self, queue: SubmissionQueue, command: Command) -> int:
        number, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
        events = self._controller.events
        if number == 0 and cid in events.requests:
            if not self._executor.answer(cid, 0, Status.ABORT_REQUESTED):
                return NOT_ABORTED
            events.requests.remove(cid)
            return 0
        target = self._executor.submissions.get(number)
        return 0 if target is not None and self._executor.abort(target, cid) else NOT_ABORTED

    def _request_event(self, queue: SubmissionQueue, command: Command) -> Later:
        self._controller.events.request(command.cid)
        queue.completions.promised -= 1  # it may wait for ever: its place is sought when there is an event
        self._controller.events.deliver()
        return LATER

    def _keep_alive(self, queue: SubmissionQueue, command: Command) -> int:
        self._controller.keep_alive.restart()
        return 0

    def _configure_doorbells(self, queue: SubmissionQueue, command: Command) -> int:
        last = self._controller.page_size - 1
        check(not (command.data1 | command.data2) & last and command.data1 != command.data2)
        try:
            self._executor.mirror(DoorbellBuffers(self._controller.dma, command.data1, command.data2))
        except OSError as error:
            raise CommandError(Status.DATA_TRANSFER_ERROR) from error
        return 0

    def _format(self, queue: SubmissionQueue, command: Command) -> Later:
        number, erase = command.cdw10 & 0xF, command.cdw10 >> 9 & 7
        check(number < len(BLOCK_SIZES) and not command.cdw10 >> 4 & 0x1F, Status.INVALID_FORMAT)
        check(erase in (_NO_ERASE, _ERASE_USER_DATA))
        everything = command.nsid == ALL_NAMESPACES
        targets = list(self._controller.namespaces.values()) if everything else [self._namespace(command)]
        for namespace in targets:
            if namespace.formatting:
                raise CommandError(Status.FORMAT_IN_PROGRESS, retry=True)
            check(not namespace.storage.read_only, Status.NAMESPACE_WRITE_PROTECTED)
            check(namespace.fits(BLOCK_SIZES[number]), Status.INVALID_FORMAT)
        for namespace in targets:
            namespace.formatting = True

        def work() -> int:
            for namespace in targets:
                namespace.storage.write_zeroes(0, namespace.storage.size, unmap=True)
                namespace.storage.flush()
            return 0

        def ended() -> None:  # aborted, too
            for namespace in targets:
                namespace.formatting = False

        def finish() -> None:
            for namespace in targets:
                namespace.format(BLOCK_SIZES[number])

        return self._executor.later(queue, command, work, ended=ended, finish=finish)
