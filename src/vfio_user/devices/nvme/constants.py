"""The numbers of NVM Express: NVM Express Base Specification 1.4, which each table names by section.

Names are the specification's, in the words of its tables.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

VERSION = 0x0001_0400
"""Register VS (3.1.2): 1.4.0."""

SQE_SIZE, CQE_SIZE = 64, 16
"""Bytes of a submission queue entry (4.2) and of a completion queue entry (4.6)."""

DOORBELLS = 0x1000
"""Where the doorbells begin (3.1.24): SQ y tail at 8 * y from here on, CQ y head 4 bytes behind, with CAP.DSTRD 0."""

ALL_NAMESPACES = 0xFFFF_FFFF
"""The NSID that means all of them (6.1)."""


class Register(IntEnum):
    """Offsets of the controller's registers (3.1)."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    NSSR = 0x20
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    CMBLOC = 0x38
    CMBSZ = 0x3C
    BPINFO = 0x40


class Configuration(IntFlag):
    """Register CC (3.1.5): masks of its fields."""

    EN = 1 << 0
    CSS = 7 << 4
    MPS = 0xF << 7
    AMS = 7 << 11
    SHN = 3 << 14
    IOSQES = 0xF << 16
    IOCQES = 0xF << 20


class ControllerStatus(IntFlag):
    """Register CSTS (3.1.6)."""

    RDY = 1 << 0
    CFS = 1 << 1
    SHST_OCCURRING = 1 << 2
    SHST_COMPLETE = 2 << 2
    SHST = 3 << 2
    NSSRO = 1 << 4
    PP = 1 << 5


NSSR_RESET = 0x4E56_4D65
"""What is written to NSSR for a subsystem reset (3.1.7): "NVMe"."""


class AdminOpcode(IntEnum):
    """Admin commands (5, figure 139)."""

    DELETE_IO_SQ = 0x00
    CREATE_IO_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_IO_CQ = 0x04
    CREATE_IO_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C
    KEEP_ALIVE = 0x18
    DOORBELL_BUFFER_CONFIG = 0x7C
    FORMAT_NVM = 0x80


class IoOpcode(IntEnum):
    """Commands of the NVM command set (6, figure 346)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_UNCORRECTABLE = 0x04
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C


class Status(IntEnum):
    """Status of a completion (4.6.1): status code type << 8 | status code."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    COMMAND_ID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    ABORTED_SQ_DELETION = 0x008
    ABORTED_FAILED_FUSED = 0x009
    ABORTED_MISSING_FUSED = 0x00A
    INVALID_NAMESPACE_OR_FORMAT = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    INVALID_SGL_SEGMENT = 0x00D
    INVALID_NUMBER_OF_SGLS = 0x00E
    DATA_SGL_LENGTH_INVALID = 0x00F
    METADATA_SGL_LENGTH_INVALID = 0x010
    SGL_TYPE_INVALID = 0x011
    PRP_OFFSET_INVALID = 0x013
    SGL_OFFSET_INVALID = 0x016
    SGL_SUB_TYPE_INVALID = 0x017
    KEEP_ALIVE_EXPIRED = 0x018
    NAMESPACE_WRITE_PROTECTED = 0x020
    COMMAND_INTERRUPTED = 0x021
    TRANSIENT_TRANSPORT_ERROR = 0x022
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    NAMESPACE_NOT_READY = 0x082
    FORMAT_IN_PROGRESS = 0x084
    COMPLETION_QUEUE_INVALID = 0x100
    INVALID_QUEUE_IDENTIFIER = 0x101
    INVALID_QUEUE_SIZE = 0x102
    ABORT_LIMIT_EXCEEDED = 0x103
    ASYNC_EVENT_LIMIT_EXCEEDED = 0x105
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_FORMAT = 0x10A
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F
    NAMESPACE_ALREADY_ATTACHED = 0x118
    NAMESPACE_NOT_ATTACHED = 0x11A
    CONTROLLER_LIST_INVALID = 0x11C
    CONFLICTING_ATTRIBUTES = 0x180
    WRITE_TO_READ_ONLY_RANGE = 0x182
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285
    ACCESS_DENIED = 0x286


STATUS_DO_NOT_RETRY = 1 << 14
"""Bit of the status field (4.6.1), as it is counted here: without the phase tag below it."""


class Feature(IntEnum):
    """Features (5.21.1, figure 273)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR_CONFIGURATION = 0x09
    WRITE_ATOMICITY_NORMAL = 0x0A
    ASYNC_EVENT_CONFIGURATION = 0x0B
    TIMESTAMP = 0x0E
    KEEP_ALIVE_TIMER = 0x0F


class LogPage(IntEnum):
    """Log pages (5.14.1)."""

    SUPPORTED = 0x00
    ERROR_INFORMATION = 0x01
    SMART_HEALTH = 0x02
    FIRMWARE_SLOT = 0x03
    CHANGED_NAMESPACES = 0x04
    COMMANDS_SUPPORTED = 0x05


class Identify(IntEnum):
    """What IDENTIFY gives, by CNS (5.15.1)."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03


class AsyncEvent(IntEnum):
    """Asynchronous events (5.2.1): information << 8 | type, as they are in a completion's first dword."""

    INVALID_DOORBELL_REGISTER = 0x0000
    INVALID_DOORBELL_VALUE = 0x0100
    TEMPERATURE_THRESHOLD = 0x0101
    SPARE_BELOW_THRESHOLD = 0x0201
    NAMESPACE_ATTRIBUTE_CHANGED = 0x0002


class SglType(IntEnum):
    """SGL descriptor types (4.4, figure 112)."""

    DATA_BLOCK = 0x0
    BIT_BUCKET = 0x1
    SEGMENT = 0x2
    LAST_SEGMENT = 0x3
