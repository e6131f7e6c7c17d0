"""What of a controller a migration carries, besides its registers: queues, events, features, who it is."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from msgspec import Meta

from vfio_user.devices.nvme.constants import (
    CQE_SIZE,
    SQE_SIZE,
    AsyncEvent,
    Configuration,
    ControllerStatus,
    Feature,
)
from vfio_user.devices.nvme.doorbells import DoorbellBuffers
from vfio_user.devices.nvme.events import LOG_PAGES
from vfio_user.devices.nvme.features import MAX_QUEUES, MAX_VALUES, RULES
from vfio_user.devices.nvme.identify import ASYNC_EVENTS, ERROR_LOG_ENTRIES, ControllerIdentity
from vfio_user.devices.nvme.logs import Count, ErrorEntry, Health
from vfio_user.devices.nvme.namespaces import BLOCK_SIZES, MAX_NAMESPACES
from vfio_user.devices.nvme.queues import CompletionQueue, Ring, SubmissionQueue

if TYPE_CHECKING:
    from vfio_user.devices.nvme.controller import Nvme

Queue = TypeVar("Queue", CompletionQueue, SubmissionQueue)

_MAX_ADMIN_QUEUE_SIZE = 4096
"""What AQA can say; I/O queues have fewer entries."""
U16 = Annotated[int, Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, Meta(ge=0)]  # a stream has no larger ones
EventType = Annotated[int, Meta(ge=0, lt=len(LOG_PAGES))]
Text = Annotated[str, Meta(max_length=64)]


class SavedRing(msgspec.Struct, forbid_unknown_fields=True):
    """Where a queue is in guest memory."""

    pieces: Annotated[list[U64], Meta(min_length=1, max_length=_MAX_ADMIN_QUEUE_SIZE)]
    per_piece: Annotated[int, Meta(ge=1, le=_MAX_ADMIN_QUEUE_SIZE)]
    size: Annotated[int, Meta(ge=2, le=_MAX_ADMIN_QUEUE_SIZE)]


class SavedCompletions(msgspec.Struct, forbid_unknown_fields=True):
    """A completion queue."""

    number: U16
    ring: SavedRing
    vector: U16
    interrupts: bool
    head: U16
    tail: U16
    phase: Annotated[int, Meta(ge=0, le=1)]


class SavedSubmissions(msgspec.Struct, forbid_unknown_fields=True):
    """A submission queue."""

    number: U16
    ring: SavedRing
    completions: U16
    priority: Annotated[int, Meta(ge=0, le=3)]
    head: U16
    tail: U16


class SavedNamespace(msgspec.Struct, forbid_unknown_fields=True):
    """What a namespace is; its blocks are where both sides reach them."""

    number: U32
    size: Count
    block_size: U32
    identity: Annotated[bytes, Meta(min_length=16, max_length=16)]


class SavedFeature(msgspec.Struct, forbid_unknown_fields=True):
    """A feature that was set."""

    feature: Feature
    selector: U32
    value: U32


class SavedError(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of the error log: an :class:`~vfio_user.devices.nvme.logs.ErrorEntry`."""

    count: Count
    queue: U16
    cid: U16
    status: Annotated[int, Meta(ge=0, lt=1 << 15)]
    lba: U64
    nsid: U32


class SavedDoorbells(msgspec.Struct, forbid_unknown_fields=True):
    """Addresses of the buffers that mirror doorbells."""

    shadow: U64
    events: U64


class SavedController(msgspec.Struct, forbid_unknown_fields=True):
    """Everything that is not a register."""

    serial: Text
    model: Text
    enabled: bool
    completions: Annotated[list[SavedCompletions], Meta(max_length=1 + MAX_QUEUES)]
    submissions: Annotated[list[SavedSubmissions], Meta(max_length=1 + MAX_QUEUES)]
    doorbells: SavedDoorbells | None
    features: Annotated[list[SavedFeature], Meta(max_length=MAX_VALUES)]
    timestamp: U64
    requests: Annotated[list[U16], Meta(max_length=ASYNC_EVENTS)]
    pending: Annotated[list[AsyncEvent], Meta(max_length=len(AsyncEvent))]
    masked: Annotated[list[EventType], Meta(max_length=len(LOG_PAGES))]
    errors: Annotated[list[SavedError], Meta(max_length=ERROR_LOG_ENTRIES)]
    error_count: Count
    health: Health
    changed: Annotated[list[U32], Meta(max_length=MAX_NAMESPACES)]
    namespaces: Annotated[list[SavedNamespace], Meta(max_length=MAX_NAMESPACES)]


def saved(device: Nvme) -> dict[str, object]:
    """What :func:`restore` makes a controller of the same kind out of."""
    executor, events, logs = device.executor, device.events, device.logs
    doorbells = executor.doorbells
    content = SavedController(
        serial=device.identity.serial,
        model=device.identity.model,
        enabled=executor.enabled,
        completions=[
            SavedCompletions(q.number, _saved_ring(q.ring), q.vector, q.interrupts, q.head, q.tail, q.phase)
            for q in executor.completions.values()
        ],
        submissions=[
            SavedSubmissions(q.number, _saved_ring(q.ring), q.completions.number, q.priority, q.head, q.tail)
            for q in executor.submissions.values()
        ],
        doorbells=None if doorbells is None else SavedDoorbells(doorbells.shadow, doorbells.events),
        features=[SavedFeature(Feature(f), selector, value) for (f, selector), value in device.features.values.items()],
        timestamp=device.features.timestamp.value,
        requests=list(events.requests),
        pending=list(events.pending),
        masked=sorted(events.masked),
        errors=[SavedError(e.count, e.queue, e.cid, e.status, e.lba, e.nsid) for e in logs.errors],
        error_count=logs.error_count,
        health=logs.health,
        changed=sorted(logs.changed),
        namespaces=[
            SavedNamespace(n.number, n.storage.size, n.block_size, n.identity.bytes) for n in device.namespaces.values()
        ],
    )
    return dict(msgspec.to_builtins(content, builtin_types=(bytes,)))


def _saved_ring(ring: Ring) -> SavedRing:
    return SavedRing(list(ring.pieces), ring.per_piece, ring.size)


def restore(device: Nvme, fields: dict[str, object], parts: Sequence[bytes]) -> None:
    """Make ``device`` what :func:`saved` described; ``parts`` are of namespaces that are memory. Raises ValueError."""
    try:
        content = msgspec.convert(fields, SavedController)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    _check_namespaces(device, content.namespaces)
    completions = _unique(_completions(device, one) for one in content.completions)
    submissions = _unique(_submissions(device, one, completions) for one in content.submissions)
    features: dict[tuple[int, int], int] = {(one.feature, one.selector): one.value for one in content.features}
    runs = device.csts & (ControllerStatus.RDY | ControllerStatus.CFS) == ControllerStatus.RDY
    if content.enabled != runs or (content.enabled and not device.cc & Configuration.EN):
        raise ValueError("registers that say otherwise whether the controller is enabled")
    if (content.enabled or content.requests) and not (0 in completions and 0 in submissions):
        raise ValueError("a controller that is enabled has admin queues")
    if any(not _could_be_set(device, one) for one in content.features):
        raise ValueError("a feature that is not as a host could have set it")
    device.parts.take(parts)

    for one in content.namespaces:
        namespace = device.namespaces[one.number]
        namespace.identity = uuid.UUID(bytes=one.identity)
        namespace.format(one.block_size)
    device.identity = ControllerIdentity(device.vendor_id, device.vendor_id, content.serial, content.model)
    executor, events, logs = device.executor, device.events, device.logs
    buffers = content.doorbells
    doorbells = DoorbellBuffers(device.dma, buffers.shadow, buffers.events) if buffers else None
    executor.clear()
    executor.completions, executor.submissions = completions, submissions
    for queue in submissions.values():
        queue.completions.users += 1
    executor.doorbells = doorbells
    executor.enabled = content.enabled
    device.features.load(features, content.timestamp)
    device.io.page_size = device.page_size
    events.requests.clear()
    events.requests.extend(content.requests)
    events.pending.clear()
    events.pending.extend(content.pending)
    events.masked = set(content.masked)
    logs.errors.clear()
    logs.errors.extend(ErrorEntry(e.count, e.queue, e.cid, e.status, e.lba, e.nsid) for e in content.errors)
    logs.error_count, logs.changed = content.error_count, set(content.changed)
    logs.health.take(content.health)


def _could_be_set(device: Nvme, one: SavedFeature) -> bool:
    granted = max(one.value & 0xFFFF, one.value >> 16) < device.queues
    sound = RULES[one.feature].sound(one.selector, one.value)
    return sound and (granted or one.feature is not Feature.NUMBER_OF_QUEUES)


def _check_namespaces(device: Nvme, saved: Sequence[SavedNamespace]) -> None:
    """The namespaces are the same, all but their identity, which comes along."""
    theirs = {one.number: one.size for one in saved}
    ours = {number: namespace.storage.size for number, namespace in device.namespaces.items()}
    if theirs != ours:
        raise ValueError(f"the namespaces differ (NSID: bytes): {theirs} there, {ours} here")
    for one in saved:
        if one.block_size not in BLOCK_SIZES or not device.namespaces[one.number].fits(one.block_size):
            raise ValueError(f"namespace {one.number} with blocks of {one.block_size} bytes")


def _unique(queues: Iterable[Queue]) -> dict[int, Queue]:
    """Queues by their numbers. Raises ValueError for two of one number."""
    numbered: dict[int, Queue] = {}
    for queue in queues:
        if numbered.setdefault(queue.number, queue) is not queue:
            raise ValueError(f"two queues of number {queue.number}")
    return numbered


def _ring(device: Nvme, number: int, one: SavedRing, entry_size: int) -> Ring:
    if number and one.size > device.max_queue_size:
        raise ValueError(f"queue {number} has {one.size} entries")
    if len(one.pieces) != -(-one.size // one.per_piece):
        raise ValueError(f"a queue of {one.size} entries in {len(one.pieces)} pieces of {one.per_piece}")
    return Ring(device.dma, one.pieces, one.per_piece, entry_size, one.size)


def _completions(device: Nvme, one: SavedCompletions) -> CompletionQueue:
    if one.number > device.queues or one.vector >= device.interrupt_vectors or max(one.head, one.tail) >= one.ring.size:
        raise ValueError(f"completion queue {one.number} cannot be as it is said to be")
    queue = CompletionQueue(one.number, _ring(device, one.number, one.ring, CQE_SIZE), one.vector, one.interrupts)
    queue.head, queue.tail, queue.phase = one.head, one.tail, one.phase
    return queue


def _submissions(device: Nvme, one: SavedSubmissions, completions: dict[int, CompletionQueue]) -> SubmissionQueue:
    target = completions.get(one.completions)
    sound = target is not None and bool(target.number) == bool(one.number) and one.number <= device.queues
    if target is None or not sound or max(one.head, one.tail) >= one.ring.size:
        raise ValueError(f"submission queue {one.number} cannot be as it is said to be")
    queue = SubmissionQueue(one.number, _ring(device, one.number, one.ring, SQE_SIZE), target, one.priority)
    queue.head, queue.tail = one.head, one.tail
    return queue
