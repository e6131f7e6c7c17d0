"""DEVICE_FEATURE and the migration data stream: MIG_DATA_READ, MIG_DATA_WRITE."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from vfio_user.dma.bitmap import bitmap_size, check_logging_ranges, check_report
from vfio_user.errors import MessageError
from vfio_user.migration.states import RUNNING_STATES, SAVING_STATES
from vfio_user.protocol import Message
from vfio_user.server.backend import ServerBackend
from vfio_user.server.context import Context, Reply, check_argsz
from vfio_user.wire import messages as m
from vfio_user.wire.constants import (
    MAX_BITMAP_SIZE,
    MAX_LOGGING_RANGES,
    DeviceFeature,
    DeviceState,
    FeatureFlags,
)

_GET, _SET, _PROBE = int(FeatureFlags.GET), int(FeatureFlags.SET), int(FeatureFlags.PROBE)
_HEAD = m.Feature.LAYOUT.size
_SET_STATE = _SET | int(DeviceFeature.MIG_DEVICE_STATE)
_LOADING_STATES = frozenset({DeviceState.RESUMING})


class FeatureSpec(NamedTuple):
    """What serves an operation of a feature, and the hook that it needs."""

    serve: Callable[[Context, m.Feature, Message], Reply]
    hook: str


def device_feature(context: Context, message: Message) -> Reply:
    """An unknown feature, an operation that it lacks, a device that cannot migrate: EINVAL."""
    request = m.Feature.parse(message.payload)
    index, operation = request.index, request.operation
    supported = context.features.get(index)
    if supported is None:
        supported = context.features[index] = _supported(context, index)
    if not supported or operation & ~(supported | _PROBE):
        raise MessageError(f"feature {index} does not support {operation:#x} here")
    if operation & _PROBE:
        check_argsz(request.argsz, len(message.payload))
        return Reply([bytes(message.payload)])
    if operation not in (_GET, _SET):
        raise MessageError(f"DEVICE_FEATURE flags {request.flags:#x}: one of GET and SET, or PROBE")
    if operation == _SET:
        check_argsz(request.argsz, len(message.payload))
    return _FEATURES[index, operation].serve(context, request, message)


def _supported(context: Context, index: int) -> int:
    """The operations, besides PROBE, that the backend has for a feature."""
    if not context.migratable:
        return 0
    supported = 0
    for operation in (_GET, _SET):
        row = _FEATURES.get((index, operation))
        if row is not None and _overrides(context.backend, row.hook):
            supported |= operation
    return supported


def _overrides(backend: ServerBackend, hook: str) -> bool:
    """Whether a hook is the backend's own: of its class, or of this object."""
    return getattr(getattr(backend, hook), "__func__", None) is not getattr(ServerBackend, hook)


def quiesces(message: Message) -> bool:
    """Whether this DEVICE_FEATURE takes the device out of the running states."""
    if len(message.payload) < _HEAD + m.FeatureDeviceState.LAYOUT.size:
        return False
    _, flags = m.Feature.LAYOUT.unpack_from(message.payload)
    if flags != _SET_STATE:
        return False
    return m.FeatureDeviceState.parse(message.payload, _HEAD).device_state not in RUNNING_STATES


def _get(request: m.Feature, *parts: m.Buffer) -> Reply:
    """The reply to a GET: the argsz that it takes, the flags as they came, the feature's data."""
    size = _HEAD + sum(map(len, parts))
    check_argsz(request.argsz, size)
    return Reply([m.Feature.LAYOUT.pack(size, request.flags), *parts])


def _get_migration(context: Context, request: m.Feature, message: Message) -> Reply:
    return _get(request, m.FeatureMigration(int(context.backend.migration_flags())).pack())


def _get_device_state(context: Context, request: m.Feature, message: Message) -> Reply:
    return _get(request, m.FeatureDeviceState(int(context.backend.migration_get_state())).pack())


def _set_device_state(context: Context, request: m.Feature, message: Message) -> Reply:
    number = m.FeatureDeviceState.parse(message.payload, _HEAD).device_state
    try:
        state = DeviceState(number)
    except ValueError:
        raise MessageError(f"{number} is no device state") from None
    echo = bytes(message.payload)
    try:
        context.backend.migration_set_state(state)
    finally:
        context.refresh_access()
    return Reply([echo])


def _get_data_size(context: Context, request: m.Feature, message: Message) -> Reply:
    return _get(request, m.FeatureDataSize(context.backend.migration_data_size()).pack())


def _logging_start(context: Context, request: m.Feature, message: Message) -> Reply:
    control = m.LoggingControl.parse(message.payload, _HEAD)
    first = _HEAD + m.LoggingControl.LAYOUT.size
    size = m.LoggingRange.LAYOUT.size
    if control.num_ranges > min(MAX_LOGGING_RANGES, (len(message.payload) - first) // size):
        raise MessageError(
            f"{control.num_ranges} ranges announced, {len(message.payload) - first} bytes came, "
            f"{MAX_LOGGING_RANGES} ranges are the most"
        )
    end = first + control.num_ranges * size
    ranges = [(iova, length) for iova, length in m.LoggingRange.LAYOUT.iter_unpack(message.payload[first:end])]
    check_logging_ranges(control.page_size, ranges)
    echo = bytearray(message.payload)
    chosen = context.backend.dma_logging_start(control.page_size, ranges)
    m.LoggingControl.LAYOUT.pack_into(echo, _HEAD, chosen, control.num_ranges, control.reserved)
    return Reply([echo])


def _logging_stop(context: Context, request: m.Feature, message: Message) -> Reply:
    echo = bytes(message.payload)
    context.backend.dma_logging_stop()
    context.drop_reply_buffers()
    return Reply([echo])


def _logging_report(context: Context, request: m.Feature, message: Message) -> Reply:
    report = m.LoggingReport.parse(message.payload, _HEAD)
    check_report(report.iova, report.length, report.page_size)
    size = bitmap_size(report.length, report.page_size)
    if size > MAX_BITMAP_SIZE:
        raise MessageError(f"a dirty bitmap of {size} bytes: at most {MAX_BITMAP_SIZE}")
    bitmap = context.reply_buffer(size, zeroed=True)
    reply = _get(request, bytes(message.payload[_HEAD : _HEAD + report.LAYOUT.size]), bitmap)
    if not context.maps.overlapping(report.iova, report.length):
        raise MessageError(f"nothing is mapped at {report.iova:#x}, {report.length:#x} bytes", errno.ENOENT)
    context.backend.dma_logging_report(report.iova, report.length, report.page_size, bitmap)
    return reply


_FEATURES: dict[tuple[int, int], FeatureSpec] = {
    (DeviceFeature.MIGRATION, _GET): FeatureSpec(_get_migration, "migration_flags"),
    (DeviceFeature.MIG_DEVICE_STATE, _GET): FeatureSpec(_get_device_state, "migration_get_state"),
    (DeviceFeature.MIG_DEVICE_STATE, _SET): FeatureSpec(_set_device_state, "migration_set_state"),
    (DeviceFeature.DMA_LOGGING_START, _SET): FeatureSpec(_logging_start, "dma_logging_start"),
    (DeviceFeature.DMA_LOGGING_STOP, _SET): FeatureSpec(_logging_stop, "dma_logging_stop"),
    (DeviceFeature.DMA_LOGGING_REPORT, _GET): FeatureSpec(_logging_report, "dma_logging_report"),
    (DeviceFeature.MIG_DATA_SIZE, _GET): FeatureSpec(_get_data_size, "migration_data_size"),
}


def _check_data(context: Context, request: m.MigData, states: frozenset[DeviceState], limit: int) -> None:
    if not context.migratable:
        raise MessageError("the device cannot migrate")
    if request.size > limit:
        raise MessageError(f"{request.size} bytes of migration data: at most {limit}")
    check_argsz(request.argsz, m.MigData.LAYOUT.size + request.size)
    state = context.backend.migration_get_state()
    if state not in states:
        raise MessageError(f"migration data in state {state!r}")


def mig_data_read(context: Context, message: Message) -> Reply:
    """The reply is as long as what there was: 8 bytes and the data. A short one ends the stream."""
    request = m.MigData.parse(message.payload)
    limit = min(context.client.data_xfer_size, context.limits.data_xfer_size)
    _check_data(context, request, SAVING_STATES, limit)
    if not request.size:
        return Reply([m.MigData(m.MigData.LAYOUT.size, 0).pack()])
    data = context.backend.migration_view(request.size)
    if data is None:
        buffer = context.reply_buffer(request.size)
        data = buffer[: _checked_count(context.backend.migration_read_data(buffer), request.size)]
    count = _checked_count(data.nbytes, request.size)
    return Reply([m.MigData.LAYOUT.pack(m.MigData.LAYOUT.size + count, count), data.cast("B")])


def _checked_count(count: int, most: int) -> int:
    if not 0 <= count <= most:
        raise ValueError(f"the device gave {count} bytes of migration data, asked for {most}")
    return count


def mig_data_write(context: Context, message: Message) -> Reply:
    request = m.MigData.parse(message.payload)
    data = message.payload[m.MigData.LAYOUT.size :]
    if len(data) != request.size:
        raise MessageError(f"{request.size} bytes of migration data announced, {len(data)} came")
    _check_data(context, request, _LOADING_STATES, context.limits.data_xfer_size)
    if request.size:
        context.backend.migration_write_data(data)
    return Reply()
