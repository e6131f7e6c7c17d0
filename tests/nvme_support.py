"""Controllers to drive, and what NVM Express wants of every one of them, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from vfio_user.devices.nvme.constants import ALL_NAMESPACES, AdminOpcode, Feature, Identify, IoOpcode, LogPage, Status
from vfio_user.testing.nvme import Command, NvmeDriver, io
from vfio_user.testing.nvme.commands import FUSED_FIRST, FUSED_SECOND, SGL, status_name
from vfio_user.testing.nvme.data import descriptor, prps

BLOCKS = 16384
"""Of 512 bytes, in namespace 1, which is the only one."""
BLOCK = 512
SPARE = 2
"""A valid NSID where there is no namespace."""
NOWHERE = 1 << 45
"""An address where the guest has no memory."""


@dataclass
class Peer:
    """A controller, enabled, with one I/O queue pair. ``vectors`` tells which were signalled since the last look.

    ``differs``: known differences, by the name of the case, as the names of statuses.
    """

    name: str
    driver: NvmeDriver
    vectors: Callable[[], set[int]]
    image: Callable[[], bytes]
    differs: Mapping[str, str] = field(default_factory=dict)
    known_gaps: frozenset[str] = frozenset()
    """Tests that it cannot pass, by name."""

    def expect(self, case: Case) -> set[str]:
        """The names of the statuses that a case may end with, here."""
        known = self.differs.get(case.name)
        return {known} if known else {status_name(status) for status in case.expected}


@dataclass(frozen=True)
class Case:
    """One command and the statuses that it may end with. ``section``: of the base specification, 1.4.

    ``build`` gets the driver, and the address of two pages of memory that follow each other.
    """

    name: str
    section: str
    expected: tuple[Status, ...]
    build: Callable[[NvmeDriver, int], Command]

    def __str__(self) -> str:
        return self.name


def admin(opcode: int, nsid: int = 0, **fields: int) -> Callable[[NvmeDriver, int], Command]:
    """An admin command whose data, if it has some, are in the two pages."""
    return lambda driver, page: Command(opcode, nsid, pointer=prps(page, page + 4096), **fields)


def at(opcode: int, offset: int, nsid: int = 0, **fields: int) -> Callable[[NvmeDriver, int], Command]:
    """The same with data that begin ``offset`` bytes into the two pages, or at that address if it is a large one."""
    return lambda driver, page: Command(
        opcode, nsid, pointer=prps(offset if offset >= NOWHERE else page + offset), **fields
    )


def queue(opcode: int, number: int, size: int, flags: int = 1, offset: int = 0) -> Callable[[NvmeDriver, int], Command]:
    """Create a queue of ``size`` entries."""
    return lambda driver, page: Command(
        opcode, cdw10=(size - 1 & 0xFFFF) << 16 | number, cdw11=flags, pointer=prps(page + offset)
    )


def too_large(opcode: int, flags: int = 1) -> Callable[[NvmeDriver, int], Command]:
    """Create a queue of one entry more than CAP.MQES allows."""
    return lambda driver, page: queue(opcode, 2, (driver.capabilities & 0xFFFF) + 2, flags)(driver, page)


CQ, SQ = AdminOpcode.CREATE_IO_CQ, AdminOpcode.CREATE_IO_SQ
TO_CQ_1 = 1 << 16 | 1
MAX_QID = 0xFFFF
_BAD_ID = (Status.INVALID_QUEUE_IDENTIFIER,)
_BAD_CQ = (Status.COMPLETION_QUEUE_INVALID, Status.INVALID_QUEUE_IDENTIFIER)
_BAD_NS = (Status.INVALID_NAMESPACE_OR_FORMAT,)
_BAD_FIELD = (Status.INVALID_FIELD,)
_BAD_OFFSET = (Status.PRP_OFFSET_INVALID, Status.INVALID_FIELD)
_ODD = (Status.PRP_OFFSET_INVALID, Status.SUCCESS)
"""Bits 1:0 of a PRP entry, and 2:0 of a pointer to a list: a controller need not look (4.3)."""
_OK = (Status.SUCCESS,)
_NO_MEMORY = (Status.DATA_TRANSFER_ERROR,)

ADMIN_CASES = [
    Case("no such command", "4.6.1.2.1", (Status.INVALID_OPCODE,), admin(0x7F)),
    Case("no such vendor command", "4.6.1.2.1", (Status.INVALID_OPCODE,), admin(0xC7)),
    Case("fused admin command", "4.2", _BAD_FIELD, admin(AdminOpcode.IDENTIFY, cdw10=1, flags=FUSED_FIRST)),
    Case("SGL for an admin command", "4.2", _BAD_FIELD, admin(AdminOpcode.IDENTIFY, cdw10=1, flags=SGL)),
    Case("identify controller", "5.15.2.2", _OK, admin(AdminOpcode.IDENTIFY, cdw10=Identify.CONTROLLER)),
    Case("identify namespace", "5.15.2.1", _OK, admin(AdminOpcode.IDENTIFY, 1, cdw10=Identify.NAMESPACE)),
    Case("identify no namespace", "5.15.2.1", _OK, admin(AdminOpcode.IDENTIFY, SPARE, cdw10=Identify.NAMESPACE)),
    Case("identify namespace 0", "5.15.2.1", _BAD_NS, admin(AdminOpcode.IDENTIFY, 0, cdw10=Identify.NAMESPACE)),
    Case("identify beyond NN", "5.15.2.1", _BAD_NS, admin(AdminOpcode.IDENTIFY, 0xFFFF, cdw10=Identify.NAMESPACE)),
    Case(
        "identify all namespaces",
        "5.15.2.1",
        _BAD_NS,
        admin(AdminOpcode.IDENTIFY, ALL_NAMESPACES, cdw10=Identify.NAMESPACE),
    ),
    Case("active list", "5.15.2.3", _OK, admin(AdminOpcode.IDENTIFY, 0, cdw10=Identify.ACTIVE_NAMESPACES)),
    Case(
        "active list above FFFFFFFEh",
        "5.15.2.3",
        _BAD_NS,
        admin(AdminOpcode.IDENTIFY, 0xFFFF_FFFE, cdw10=Identify.ACTIVE_NAMESPACES),
    ),
    Case(
        "active list above FFFFFFFFh",
        "5.15.2.3",
        _BAD_NS,
        admin(AdminOpcode.IDENTIFY, ALL_NAMESPACES, cdw10=Identify.ACTIVE_NAMESPACES),
    ),
    Case("descriptors", "5.15.2.4", _OK, admin(AdminOpcode.IDENTIFY, 1, cdw10=Identify.NAMESPACE_DESCRIPTORS)),
    Case(
        "descriptors of no namespace",
        "5.15.2.4",
        (Status.INVALID_NAMESPACE_OR_FORMAT, Status.INVALID_FIELD),
        admin(AdminOpcode.IDENTIFY, SPARE, cdw10=Identify.NAMESPACE_DESCRIPTORS),
    ),
    Case(
        "descriptors of namespace 0",
        "5.15.2.4",
        _BAD_NS,
        admin(AdminOpcode.IDENTIFY, 0, cdw10=Identify.NAMESPACE_DESCRIPTORS),
    ),
    Case("identify what is reserved", "5.15.1", _BAD_FIELD, admin(AdminOpcode.IDENTIFY, 1, cdw10=0x7E)),
    Case("data at an odd address", "4.3", _ODD, at(AdminOpcode.IDENTIFY, 2, cdw10=1)),
    Case("data that is nowhere", "4.6.1.2.1", _NO_MEMORY, at(AdminOpcode.IDENTIFY, NOWHERE, cdw10=1)),
    Case(
        "PRP2 not at a page",
        "4.3",
        _BAD_OFFSET,
        lambda driver, page: Command(AdminOpcode.IDENTIFY, cdw10=1, pointer=prps(page + 16, page + 4096 + 16)),
    ),
    Case("CQ 0", "5.3", _BAD_ID, queue(CQ, 0, 8)),
    Case("CQ that is there", "5.3", _BAD_ID, queue(CQ, 1, 8)),
    Case("CQ beyond all", "5.3", _BAD_ID, queue(CQ, MAX_QID, 8)),
    Case("CQ of one entry", "5.3", (Status.INVALID_QUEUE_SIZE,), queue(CQ, 2, 1)),
    Case("CQ too large", "5.3", (Status.INVALID_QUEUE_SIZE,), too_large(CQ)),
    Case("CQ not at a page", "5.3", _BAD_OFFSET, queue(CQ, 2, 8, offset=64)),
    Case("CQ with no such vector", "5.3", (Status.INVALID_INTERRUPT_VECTOR,), queue(CQ, 2, 8, 0xFFF << 16 | 3)),
    Case("SQ 0", "5.4", _BAD_ID, queue(SQ, 0, 8, TO_CQ_1)),
    Case("SQ that is there", "5.4", _BAD_ID, queue(SQ, 1, 8, TO_CQ_1)),
    Case("SQ beyond all", "5.4", _BAD_ID, queue(SQ, MAX_QID, 8, TO_CQ_1)),
    Case("SQ of one entry", "5.4", (Status.INVALID_QUEUE_SIZE,), queue(SQ, 2, 1, TO_CQ_1)),
    Case("SQ too large", "5.4", (Status.INVALID_QUEUE_SIZE,), too_large(SQ, TO_CQ_1)),
    Case("SQ not at a page", "5.4", _BAD_OFFSET, queue(SQ, 2, 8, TO_CQ_1, offset=64)),
    Case("SQ to the admin CQ", "5.4", _BAD_CQ, queue(SQ, 2, 8, 1)),
    Case("SQ to no CQ", "5.4", _BAD_CQ, queue(SQ, 2, 8, 5 << 16 | 1)),
    Case("SQ to a CQ beyond all", "5.4", _BAD_CQ, queue(SQ, 2, 8, 0xFFF0 << 16 | 1)),
    Case("delete SQ 0", "5.6", _BAD_ID, admin(AdminOpcode.DELETE_IO_SQ, cdw10=0)),
    Case("delete no SQ", "5.6", _BAD_ID, admin(AdminOpcode.DELETE_IO_SQ, cdw10=7)),
    Case("delete an SQ beyond all", "5.6", _BAD_ID, admin(AdminOpcode.DELETE_IO_SQ, cdw10=MAX_QID)),
    Case("delete CQ 0", "5.5", _BAD_ID, admin(AdminOpcode.DELETE_IO_CQ, cdw10=0)),
    Case("delete no CQ", "5.5", _BAD_ID, admin(AdminOpcode.DELETE_IO_CQ, cdw10=7)),
    Case("delete a CQ in use", "5.5", (Status.INVALID_QUEUE_DELETION,), admin(AdminOpcode.DELETE_IO_CQ, cdw10=1)),
    Case("get no feature", "5.8", _BAD_FIELD, admin(AdminOpcode.GET_FEATURES, cdw10=0)),
    Case("get an unknown feature", "5.8", _BAD_FIELD, admin(AdminOpcode.GET_FEATURES, cdw10=0x77)),
    Case("set an unknown feature", "5.21", _BAD_FIELD, admin(AdminOpcode.SET_FEATURES, cdw10=0x77)),
    Case(
        "get a feature by a reserved selector",
        "5.8",
        _BAD_FIELD,
        admin(AdminOpcode.GET_FEATURES, cdw10=7 << 8 | Feature.VOLATILE_WRITE_CACHE),
    ),
    Case(
        "save a feature that cannot be saved",
        "5.21",
        (Status.FEATURE_NOT_SAVEABLE,),
        admin(AdminOpcode.SET_FEATURES, cdw10=1 << 31 | Feature.VOLATILE_WRITE_CACHE, cdw11=1),
    ),
    Case(
        "number of queues after they were created",
        "5.21.1.7",
        (Status.COMMAND_SEQUENCE_ERROR,),
        admin(AdminOpcode.SET_FEATURES, cdw10=Feature.NUMBER_OF_QUEUES, cdw11=0x0003_0003),
    ),
    Case(
        "unknown log page", "5.14", (Status.INVALID_LOG_PAGE,), admin(AdminOpcode.GET_LOG_PAGE, cdw10=0x7F << 16 | 0x6F)
    ),
    Case(
        "health from beyond its end",
        "5.14",
        _BAD_FIELD,
        admin(AdminOpcode.GET_LOG_PAGE, ALL_NAMESPACES, cdw10=0x7F << 16 | LogPage.SMART_HEALTH, cdw12=4096),
    ),
    Case(
        "health of one namespace, which is not supported",
        "5.14.1.2",
        _BAD_FIELD,
        admin(AdminOpcode.GET_LOG_PAGE, SPARE, cdw10=0x7F << 16 | LogPage.SMART_HEALTH),
    ),
    Case("format no such LBA format", "5.23", (Status.INVALID_FORMAT,), admin(AdminOpcode.FORMAT_NVM, 1, cdw10=0xF)),
    Case("format namespace 0", "5.23", _BAD_NS, admin(AdminOpcode.FORMAT_NVM, 0)),
    Case("format beyond NN", "5.23", _BAD_NS, admin(AdminOpcode.FORMAT_NVM, 0xFFFF)),
    Case("format, erase by what is reserved", "5.23", _BAD_FIELD, admin(AdminOpcode.FORMAT_NVM, 1, cdw10=7 << 9)),
    Case("keep alive", "5.18", _OK, admin(AdminOpcode.KEEP_ALIVE)),
    Case(
        "shadow doorbells not at a page",
        "5.7",
        _BAD_OFFSET,
        lambda driver, page: Command(AdminOpcode.DOORBELL_BUFFER_CONFIG, pointer=prps(page + 8, page + 4096)),
    ),
    Case(
        "event indexes not at a page",
        "5.7",
        _BAD_OFFSET,
        lambda driver, page: Command(AdminOpcode.DOORBELL_BUFFER_CONFIG, pointer=prps(page, page + 4096 + 8)),
    ),
]


def blocks(
    opcode: int, lba: int, count: int, nsid: int = 1, flags: int = 0, cdw12: int = 0
) -> Callable[[NvmeDriver, int], Command]:
    """A command on blocks whose data, if it has some, are in the two pages."""

    def build(driver: NvmeDriver, page: int) -> Command:
        command = io(opcode, nsid, lba, count, cdw12=cdw12, flags=flags)
        return Command(
            opcode, nsid, command.cdw10, command.cdw11, command.cdw12, flags=flags, pointer=prps(page, page + 4096)
        )

    return build


def pointing(pointer: Callable[[int], bytes], flags: int = 0, count: int = 16) -> Callable[[NvmeDriver, int], Command]:
    """A read of ``count`` blocks with this data pointer, made from the address of the two pages."""
    return lambda driver, page: Command(IoOpcode.READ, 1, cdw12=count - 1, flags=flags, pointer=pointer(page))


def _on_each(
    name: str,
    section: str,
    expected: tuple[Status, ...],
    opcodes: Iterable[IoOpcode],
    build: Callable[[IoOpcode], Callable[[NvmeDriver, int], Command]],
) -> list[Case]:
    return [Case(f"{opcode.name.lower()} {name}", section, expected, build(opcode)) for opcode in opcodes]


_ON_BLOCKS = (IoOpcode.READ, IoOpcode.WRITE, IoOpcode.COMPARE, IoOpcode.WRITE_ZEROES, IoOpcode.VERIFY)
_WITH_DATA = (IoOpcode.READ, IoOpcode.WRITE, IoOpcode.COMPARE)
_OUTSIDE = (Status.LBA_OUT_OF_RANGE,)

IO_CASES = [
    Case("no such I/O command", "4.6.1.2.1", (Status.INVALID_OPCODE,), blocks(0x7B, 0, 1)),
    *_on_each("from the end on", "6", _OUTSIDE, _ON_BLOCKS, lambda opcode: blocks(opcode, BLOCKS, 1)),
    *_on_each("over the end", "6", _OUTSIDE, _ON_BLOCKS, lambda opcode: blocks(opcode, BLOCKS - 1, 2)),
    *_on_each(
        "from the last LBA of all on", "6", _OUTSIDE, _ON_BLOCKS, lambda opcode: blocks(opcode, (1 << 64) - 1, 2)
    ),
    *_on_each("namespace 0", "6.1.5", _BAD_NS, _ON_BLOCKS, lambda opcode: blocks(opcode, 0, 1, 0)),
    *_on_each("beyond NN", "6.1.5", _BAD_NS, _ON_BLOCKS, lambda opcode: blocks(opcode, 0, 1, 0xFFFF)),
    *_on_each("no namespace", "6.1.5", _BAD_FIELD, _ON_BLOCKS, lambda opcode: blocks(opcode, 0, 1, SPARE)),
    *_on_each(
        "all namespaces",
        "6.1.5",
        (Status.INVALID_NAMESPACE_OR_FORMAT, Status.INVALID_FIELD),
        _ON_BLOCKS,
        lambda opcode: blocks(opcode, 0, 1, ALL_NAMESPACES),
    ),
    *_on_each("more than MDTS", "5.15.2.2", _BAD_FIELD, _WITH_DATA, lambda opcode: blocks(opcode, 0, 8192)),
    Case("flush", "6.8", _OK, admin(IoOpcode.FLUSH, 1)),
    Case("flush all namespaces", "6.8", _OK, admin(IoOpcode.FLUSH, ALL_NAMESPACES)),
    Case("flush no namespace", "6.8", _BAD_FIELD, admin(IoOpcode.FLUSH, SPARE)),
    Case("flush beyond NN", "6.8", _BAD_NS, admin(IoOpcode.FLUSH, 0xFFFF)),
    Case("read the last block", "6.9", _OK, blocks(IoOpcode.READ, BLOCKS - 1, 1)),
    Case("PSDT 11b", "4.2", _BAD_FIELD, blocks(IoOpcode.READ, 0, 1, flags=3 << 6)),
    Case("FUSE 11b", "4.2", _BAD_FIELD, blocks(IoOpcode.READ, 0, 1, flags=3)),
    Case(
        "the second of two fused commands alone",
        "4.10",
        (Status.ABORTED_MISSING_FUSED,),
        blocks(IoOpcode.WRITE, 0, 1, flags=FUSED_SECOND),
    ),
    Case("data at an odd address, I/O", "4.3", _ODD, pointing(lambda page: prps(page + 1), count=1)),
    Case("data nowhere, I/O", "4.6.1.2.1", _NO_MEMORY, pointing(lambda page: prps(NOWHERE), count=1)),
    Case("second page nowhere", "4.6.1.2.1", _NO_MEMORY, pointing(lambda page: prps(page, NOWHERE))),
    Case("second page not at its beginning", "4.3", _BAD_OFFSET, pointing(lambda page: prps(page, page + 4096 + 4))),
    Case("PRP list nowhere", "4.6.1.2.1", _NO_MEMORY, pointing(lambda page: prps(page, NOWHERE), count=64)),
    Case("PRP list at an odd address", "4.3", _ODD, pointing(lambda page: prps(page, page + 4), count=64)),
    Case(
        "SGL that is too short",
        "4.4",
        (Status.DATA_SGL_LENGTH_INVALID,),
        pointing(lambda page: descriptor(0, page, 15 * BLOCK), SGL),
    ),
    Case(
        "SGL type that is reserved",
        "4.4",
        (Status.SGL_TYPE_INVALID, Status.INVALID_SGL_SEGMENT),
        pointing(lambda page: descriptor(8, page, 16 * BLOCK), SGL),
    ),
    Case(
        "SGL sub type that is reserved",
        "4.4",
        (Status.SGL_SUB_TYPE_INVALID, Status.SGL_TYPE_INVALID),
        pointing(lambda page: descriptor(0, page, 16 * BLOCK, 5), SGL),
    ),
    Case(
        "SGL segment of no whole descriptors",
        "4.4",
        (Status.INVALID_SGL_SEGMENT, Status.DATA_SGL_LENGTH_INVALID),
        pointing(lambda page: descriptor(3, page, 24), SGL),
    ),
    Case(
        "SGL segment of none",
        "4.4",
        (Status.INVALID_SGL_SEGMENT, Status.DATA_SGL_LENGTH_INVALID),
        pointing(lambda page: descriptor(3, page, 0), SGL),
    ),
    Case("SGL segment nowhere", "4.6.1.2.1", _NO_MEMORY, pointing(lambda page: descriptor(3, NOWHERE, 32), SGL)),
    Case("SGL data nowhere", "4.6.1.2.1", _NO_MEMORY, pointing(lambda page: descriptor(0, NOWHERE, 16 * BLOCK), SGL)),
    Case(
        "SGL data over the end of all addresses",
        "4.4",
        (Status.DATA_TRANSFER_ERROR, Status.DATA_SGL_LENGTH_INVALID),
        pointing(lambda page: descriptor(0, (1 << 64) - 4096, 16 * BLOCK), SGL),
    ),
    Case("discard ranges nowhere", "6.7", _NO_MEMORY, at(IoOpcode.DATASET_MANAGEMENT, NOWHERE, 1, cdw11=4)),
    Case("discard in namespace 0", "6.7", _BAD_NS, admin(IoOpcode.DATASET_MANAGEMENT, 0, cdw11=4)),
    Case("discard in no namespace", "6.7", _BAD_FIELD, admin(IoOpcode.DATASET_MANAGEMENT, SPARE, cdw11=4)),
]
