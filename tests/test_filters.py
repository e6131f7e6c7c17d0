"""A filter passes on all that a backend is; a subclass stands around what it wants to."""

from __future__ import annotations

import copy
import errno
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user import DeviceState, Irq, MigrationFlags, Region, ServerBackend
from vfio_user.devices.edu import Edu
from vfio_user.dma.memory import GuestMemory
from vfio_user.errors import UsageError
from vfio_user.filters import FILTERS, HOOKS, Call, Filter, Hook, apply_filters
from vfio_user.filters.base import COMMAND_HOOKS, innermost
from vfio_user.filters.commands import COMMAND_NAMES
from vfio_user.server.context import Context, Limits
from vfio_user.server.migration import _overrides
from vfio_user.wire.commands import COMMANDS, Role
from vfio_user.wire.constants import Command

from .support import MigratableBackend

HOOK_NAMES = [name for name, value in vars(ServerBackend).items() if callable(value) and not name.startswith("_")]
ATTRIBUTES = [name for name, value in vars(ServerBackend).items() if not callable(value) and not name.startswith("_")]
VIEWS = {"region_view": "region_read", "migration_view": "migration_read_data"}

OPTIONS: dict[str, dict[str, Any]] = {"delay": {"all": 0.0}, "error": {"all": 0.0}}
"""What a filter needs to be made at all."""

HARMLESS = ["trace", "delay:all=0", "error:all=0%", "stats", "trace:region=bar0", "delay:dma_map=0us,jitter=0"]


def made(name: str, backend: ServerBackend) -> Filter:
    return FILTERS[name](backend, **OPTIONS.get(name, {}))


def arguments_of(hook: str) -> tuple[object, ...]:
    """As many as the hook takes, each one its own object."""
    return tuple(object() for _ in list(inspect.signature(getattr(ServerBackend, hook)).parameters)[1:])


class Probe(ServerBackend):
    """Every hook of a backend, whichever there are: each notes its arguments, and returns an object of its own."""

    regions = (Region(7), Region(8))
    irqs = (Irq(3),)
    resettable = True
    spin = 1e-3
    dma = GuestMemory()
    vendor_id = 0x1234

    def __init__(self) -> None:
        self.seen: dict[str, tuple[object, ...]] = {}
        self.results = {name: object() for name in HOOK_NAMES}

    def take(self, name: str, *arguments: object) -> object:
        self.seen[name] = arguments
        return self.results[name]


def _probing(name: str) -> Callable[..., object]:
    return lambda self, *arguments: self.take(name, *arguments)


for _name in HOOK_NAMES:
    setattr(Probe, _name, _probing(_name))


# Passing on


@pytest.mark.parametrize("name", HOOK_NAMES)
def test_every_hook_of_a_backend_is_passed_on(name: str) -> None:
    probe, given_arguments = Probe(), arguments_of(name)
    result = getattr(Filter(Filter(probe)), name)(*given_arguments)
    if name in VIEWS:
        assert result is None  # the bytes come by the other hook, which a filter sees
        assert not probe.seen
    else:
        assert (result, probe.seen) == (probe.results[name], {name: given_arguments})


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_of_a_backend_is_passed_on_as_it_is_now(name: str) -> None:
    probe = Probe()
    filtered = Filter(Filter(probe))
    assert getattr(filtered, name) == getattr(Probe, name) != getattr(ServerBackend, name)
    setattr(probe, name, changed := object())
    assert getattr(filtered, name) is changed


def test_the_table_has_every_hook() -> None:
    assert HOOKS.keys() | VIEWS.keys() == set(HOOK_NAMES)
    assert {hook.view: hook.name for hook in HOOKS.values() if hook.view} == VIEWS


def test_the_table_has_every_command_that_reaches_a_device() -> None:
    """All that a client sends but the negotiation, what the server answers alone, and what becomes single writes."""
    alone = {Command.VERSION, Command.REGION_WRITE_MULTI}
    alone |= {command for command in Command if command.name.startswith("DEVICE_GET")}
    sent = {row.command for row in COMMANDS.values() if row.sender is Role.CLIENT}
    assert {hook.command for hook in COMMAND_HOOKS.values()} == sent - alone
    assert COMMAND_NAMES["device_feature"] == tuple(
        hook.name for hook in HOOKS.values() if hook.command == Command.DEVICE_FEATURE
    )


def test_other_attributes_are_those_of_the_device() -> None:
    filtered = Filter(Filter(Edu(dma_mask=0xFFF)))
    assert (filtered.vendor_id, filtered.dma_mask) == (0x1234, 0xFFF)
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = filtered.nothing_of_the_kind
    with pytest.raises(AttributeError):
        copy.copy(Filter.__new__(Filter)).anything  # noqa: B018 - it must not look for itself forever
    assert isinstance(innermost(filtered), Edu)


@pytest.mark.parametrize("name", FILTERS)
def test_the_server_sees_which_hooks_a_filtered_backend_has(name: str) -> None:
    for backend in (ServerBackend(), MigratableBackend()):
        filtered = made(name, Filter(backend))
        for hook in HOOK_NAMES:
            if hook not in (*VIEWS, "disconnected"):
                assert _overrides(filtered, hook) == _overrides(backend, hook), hook


@pytest.mark.parametrize("name", FILTERS)
def test_a_backend_without_hooks_refuses_through_a_filter(name: str) -> None:
    filtered = made(name, ServerBackend())
    with pytest.raises(OSError) as refused:  # noqa: PT011 - the errno is what counts
        filtered.region_read(0, 0, memoryview(bytearray(4)))
    assert refused.value.errno == errno.EINVAL
    assert not Context(filtered, Limits()).migratable


# Around


class Recorder(Filter):
    """Notes the hooks that it stands around."""

    wanted: Sequence[str] = ()

    def __init__(self, backend: ServerBackend, *wanted: str) -> None:
        self.wanted, self.calls = wanted, list[tuple[str, Any]]()
        super().__init__(backend)

    def wants(self, hook: Hook) -> bool:
        return hook.name in self.wanted

    def around(self, call: Call) -> Any:
        self.calls.append((call.hook.name, call.arguments))
        return call()


@pytest.mark.parametrize("name", HOOKS)
def test_a_filter_stands_around_what_it_wants_alone(name: str) -> None:
    probe = Probe()
    recorder = Recorder(probe, name)
    expected = arguments_of(name)
    for hook in HOOK_NAMES:
        getattr(recorder, hook)(*(expected if hook == name else arguments_of(hook)))
    assert recorder.calls == [(name, expected)]
    assert probe.seen[name] == expected


@pytest.mark.parametrize(("view", "read"), VIEWS.items())
def test_a_view_is_passed_on_unless_someone_wants_to_see_the_read(view: str, read: str) -> None:
    probe = Probe()
    assert getattr(Recorder(probe, "dma_map"), view)(*arguments_of(view)) is probe.results[view]
    assert getattr(Recorder(probe, read), view)(*arguments_of(view)) is None


class Inverting(Filter):
    """Overrides a hook itself."""

    def wants(self, hook: Hook) -> bool:
        return False

    def region_read(self, region: int, offset: int, data: memoryview) -> None:
        self.backend.region_read(region, offset, data)
        data[:] = bytes(byte ^ 0xFF for byte in data)


def test_a_filter_may_override_a_hook() -> None:
    backend = MigratableBackend()
    backend.memory[:4] = b"\1\2\3\4"
    data = bytearray(4)
    filtered = Inverting(backend)
    filtered.region_read(0, 0, memoryview(data))
    assert data == b"\xfe\xfd\xfc\xfb"
    assert filtered.region_view(0, 0, 4) is None
    backend.close()


def test_what_the_server_asks_for_itself_is_no_command() -> None:
    asked = {"connected", "disconnected", "quiesce", "look_for_work", "migration_flags", "migration_get_state"}
    assert asked == HOOKS.keys() - COMMAND_HOOKS.keys()


# Order


def test_the_first_filter_is_nearest_the_client() -> None:
    backend = MigratableBackend()
    outer, filters = apply_filters(backend, ["stats", "trace", "trap"])
    assert [one.name for one in filters] == ["stats", "trace", "trap"]
    assert outer is filters[0]
    assert [filters[0].backend, filters[1].backend, filters[2].backend] == [filters[1], filters[2], backend]
    assert apply_filters(backend, []) == (backend, [])
    backend.close()


def test_no_filter_is_made_if_one_is_wrong() -> None:
    with pytest.raises(UsageError):
        apply_filters(MigratableBackend(), ["stats", "nonsense"])


# A stack without effect

sizes = st.sampled_from([1, 2, 4, 8, 16, 100])
region_calls = st.tuples(
    st.sampled_from(["read", "write"]), st.sampled_from([0, 7]), st.integers(0, 0x98), sizes, st.binary(min_size=100)
)
other_calls = st.one_of(
    st.tuples(st.just("reset")),
    st.tuples(st.just("quiesce")),
    st.tuples(st.just("migration_flags")),
    st.tuples(st.just("migration_get_state")),
    st.tuples(st.just("migration_set_state"), st.sampled_from(DeviceState)),
    st.tuples(st.just("migration_data_size")),
    st.tuples(st.just("save"), sizes),
    st.tuples(st.just("load"), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("dma_map"), st.just(3), st.just(0), st.sampled_from([0, 0x1000]), st.just(0x1000), st.none()),
    st.tuples(st.just("dma_unmap"), st.just(0), st.sampled_from([0, 0x1000]), st.just(0x1000)),
    st.tuples(st.just("set_irqs"), st.just(0), st.sampled_from([33, 9, 17]), st.just(0), st.just(1), st.just(())),
    st.tuples(st.just("dma_logging_start"), st.just(4096), st.just(((0, 0x2000),))),
    st.tuples(st.just("dma_logging_stop")),
    st.tuples(st.just("report"), st.just(0), st.just(0x2000), st.just(4096)),
)


class Viewing(MigratableBackend):
    """Hands out its memory and its stream without a copy."""

    def region_view(self, region: int, offset: int, count: int) -> memoryview | None:
        self.record("region_read", region, offset, count)
        return memoryview(
            bytes(self.config if region == 7 else self.memory)[offset : offset + count].ljust(count, b"\0")
        )

    def migration_view(self, size: int) -> memoryview | None:
        self.record("migration_read_data", size)
        taken = bytes(self.stream[:size])
        del self.stream[:size]
        return memoryview(taken)

    def migration_set_state(self, state: DeviceState) -> None:
        if state == DeviceState.ERROR:
            raise OSError(errno.EBUSY, "not that")
        if state == DeviceState.PRE_COPY_P2P:
            raise ValueError("a bug")
        super().migration_set_state(state)


def _read(backend: ServerBackend, region: int, offset: int, size: int, data: bytes) -> bytes:
    view = backend.region_view(region, offset, size)
    if view is None:
        view = memoryview(bytearray(size))
        backend.region_read(region, offset, view)
    return bytes(view)


def _write(backend: ServerBackend, region: int, offset: int, size: int, data: bytes) -> None:
    backend.region_write(region, offset, memoryview(data)[:size])


def _save(backend: ServerBackend, size: int) -> bytes:
    view = backend.migration_view(size)
    if view is None:
        view = memoryview(bytearray(size))
        view = view[: backend.migration_read_data(view)]
    return bytes(view)


def _load(backend: ServerBackend, data: bytes) -> None:
    backend.migration_write_data(memoryview(data))


def _report(backend: ServerBackend, iova: int, length: int, page_size: int) -> bytes:
    bitmap = bytearray(8)
    backend.dma_logging_report(iova, length, page_size, memoryview(bitmap))
    return bytes(bitmap)


CALLS: dict[str, Callable[..., object]] = {
    "read": _read,
    "write": _write,
    "save": _save,
    "load": _load,
    "report": _report,
}


def outcome(backend: ServerBackend, call: tuple[Any, ...]) -> object:
    """What a call gives, made as the server makes it: data, a result, or what it raises."""
    hook, *arguments = call
    try:
        if hook in CALLS:
            return CALLS[hook](backend, *arguments)
        return getattr(backend, hook)(*arguments)
    except Exception as error:
        return type(error), str(error), getattr(error, "errno", None)


@pytest.mark.parametrize("make", [MigratableBackend, Viewing, Edu])
@settings(deadline=None, max_examples=60)
@given(
    calls=st.lists(st.one_of(region_calls, other_calls), max_size=25),
    stack=st.lists(st.sampled_from(HARMLESS), min_size=1, max_size=4),
)
def test_a_stack_without_effect_is_the_bare_device(
    make: Callable[[], ServerBackend], calls: list[tuple[Any, ...]], stack: list[str]
) -> None:
    bare, inner = make(), make()
    filtered, _ = apply_filters(inner, stack)
    try:
        for call in calls:
            assert outcome(filtered, call) == outcome(bare, call)
        assert getattr(inner, "calls", None) == getattr(bare, "calls", None)
        assert getattr(filtered, "stream", None) == getattr(bare, "stream", None)
    finally:
        for backend in (bare, inner):
            if isinstance(backend, MigratableBackend):
                backend.close()


def test_the_stacks_above_do_reach_the_device() -> None:
    backend = Viewing()
    filtered, _ = apply_filters(backend, HARMLESS)
    backend.stream += b"stream"
    assert outcome(filtered, ("save", 4)) == b"stre"
    assert outcome(filtered, ("read", 7, 1, 2, b"")) == b"\1\2"
    assert outcome(filtered, ("migration_set_state", DeviceState.ERROR)) == (OSError, "[Errno 16] not that", 16)
    assert filtered.migration_flags() == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    backend.close()
