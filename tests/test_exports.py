"""The public names: all there, the same in both twins, documented."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from types import ModuleType
from typing import Any

import pytest

import vfio_user
import vfio_user.aio
import vfio_user.client
import vfio_user.device
import vfio_user.server
from vfio_user import aio

# The contract, as design.md states it.

PACKAGE = ["Client", "Server", "ServerBackend", "Region", "Irq", "Device", "serve"]
ENUMS = {"Command": IntEnum, "DeviceState": IntEnum, "MigrationFlags": IntFlag, "DeviceFeature": IntEnum}

BACKEND = {
    "region_read": ["region", "offset", "data"],
    "region_write": ["region", "offset", "data"],
    "dma_map": ["flags", "offset", "address", "size", "fd"],
    "dma_unmap": ["flags", "address", "size"],
    "reset": [],
    "set_irqs": ["index", "flags", "start", "count", "fds"],
    "migration_flags": [],
    "migration_get_state": [],
    "migration_set_state": ["state"],
    "migration_read_data": ["data"],
    "migration_write_data": ["data"],
    "dma_logging_start": ["page_size", "ranges"],
    "dma_logging_stop": [],
    "dma_logging_report": ["iova", "length", "page_size", "bitmap"],
}
CLIENT = {
    "connect": ["path", "timeout"],
    "region_read": ["region", "offset", "count"],
    "region_read_into": ["region", "offset", "buffer"],
    "region_write": ["region", "offset", "data", "posted"],
    "region_write_multi": ["writes"],
    "dma_map": ["address", "size", "fd", "offset", "flags"],
    "dma_unmap": ["address", "size"],
    "set_irqs": ["index", "flags", "start", "count", "fds", "data"],
    "reset": [],
    "device_feature": ["flags", "data"],
    "migration_flags": [],
    "migration_get_state": [],
    "migration_set_state": ["state"],
    "migration_read_data": ["size"],
    "migration_write_data": ["data"],
    "dma_logging_start": ["page_size", "ranges"],
    "dma_logging_stop": [],
    "dma_logging_report": ["iova", "length", "page_size"],
}
CLIENT_PROPERTIES = ["version", "capabilities", "info", "regions", "irqs"]
SERVER = ["serve_forever", "shutdown", "fileno", "poll", "__enter__", "__exit__"]
REGION = ["size", "flags", "fd", "offset", "sparse_areas", "io_fds"]


def parameters(function: Any) -> list[str]:
    """The names of what is given by position, without ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    return [name for name in names if name not in ("self", "cls")]


def public(owner: object) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


@pytest.mark.parametrize("name", [*PACKAGE, *ENUMS])
def test_the_package_has_the_names_of_the_contract(name: str) -> None:
    assert name in vfio_user.__all__
    assert getattr(vfio_user, name).__name__ == name


@pytest.mark.parametrize(("name", "kind"), ENUMS.items())
def test_numbers_of_the_wire_are_enums(name: str, kind: type) -> None:
    assert issubclass(getattr(vfio_user, name), kind)


@pytest.mark.parametrize(("name", "takes"), BACKEND.items())
def test_hooks_of_a_backend(name: str, takes: list[str]) -> None:
    assert parameters(getattr(vfio_user.ServerBackend, name)) == takes


@pytest.mark.parametrize("name", ["regions", "irqs", "resettable"])
def test_attributes_of_a_backend(name: str) -> None:
    assert hasattr(vfio_user.ServerBackend, name)


@pytest.mark.parametrize(("name", "takes"), CLIENT.items())
@pytest.mark.parametrize("client", [vfio_user.Client, aio.Client], ids=["blocking", "aio"])
def test_calls_of_a_client(client: type, name: str, takes: list[str]) -> None:
    found = parameters(getattr(client, name))
    assert found[: len(takes)] == takes
    assert inspect.iscoroutinefunction(getattr(client, name)) is (client is aio.Client)


@pytest.mark.parametrize("name", CLIENT_PROPERTIES)
@pytest.mark.parametrize("client", [vfio_user.Client, aio.Client], ids=["blocking", "aio"])
def test_properties_of_a_client(client: type, name: str) -> None:
    assert isinstance(inspect.getattr_static(client, name), property)


@pytest.mark.parametrize("name", SERVER)
def test_names_of_a_server(name: str) -> None:
    assert callable(getattr(vfio_user.Server, name))


def test_a_server_takes_a_path_a_socket_or_a_descriptor() -> None:
    for server in (vfio_user.Server, aio.Server):
        assert list(inspect.signature(server).parameters)[:4] == ["backend", "path", "sock", "fd"]
    assert parameters(vfio_user.serve) == ["backend", "path"]
    assert parameters(aio.serve) == ["backend", "path"]


def test_parameters_of_regions_and_irqs() -> None:
    assert parameters(vfio_user.Region) == REGION
    assert parameters(vfio_user.Irq) == ["count", "flags"]


# The package's namespace


def test_every_exported_name_resolves_and_every_source_is_exported() -> None:
    for name in vfio_user.__all__:
        assert getattr(vfio_user, name) is not None
    sources = [name for names in vfio_user._SOURCES.values() for name in names]
    assert sorted(sources) == sorted(vfio_user.__all__)
    assert set(vfio_user.__all__) <= set(dir(vfio_user))


@pytest.mark.parametrize("module", ["vfio_user.client", "vfio_user.server", "vfio_user.aio", "vfio_user.device"])
def test_every_name_of_a_room_resolves(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Clients'"):
        vfio_user.Clients  # noqa: B018


def test_importing_the_package_loads_none_of_it() -> None:
    code = "import sys, vfio_user; print(sorted(m for m in sys.modules if m.startswith('vfio_user')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "['vfio_user']"


# Twins

TWINS = {"Client": {"start"}, "Server": {"fileno", "poll", "finished"}}
"""What one of the twins has alone: an asyncio constructor cannot wait, an asyncio server needs no event loop."""


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_same_public_names(name: str) -> None:
    blocking, twin = getattr(vfio_user, name), getattr(aio, name)
    assert public(blocking).keys() ^ public(twin).keys() == TWINS[name]


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_same_signatures(name: str) -> None:
    blocking, twin = getattr(vfio_user, name), getattr(aio, name)
    for method in {"__init__", *public(blocking)} & {"__init__", *public(twin)}:
        ours, theirs = getattr(blocking, method), getattr(twin, method)
        if callable(ours):
            assert inspect.signature(ours) == inspect.signature(theirs), method
        else:
            assert inspect.signature(ours.fget) == inspect.signature(theirs.fget), method


# Documentation


def documented(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public classes and functions of a room, and the methods of the classes."""
    for name in module.__all__:
        value = getattr(module, name)
        yield name, value
        if inspect.isclass(value):
            for method, member in public(value).items():
                if isinstance(member, property) or callable(getattr(value, method)):
                    yield f"{name}.{method}", getattr(value, method)


def has_words(name: str, value: object) -> bool:
    """An override has its base's; what the dataclass decorator writes are none."""
    text = inspect.getdoc(value)
    return bool(text) and not str(text).startswith(f"{name}(")


DOCUMENTED_ROOMS = [vfio_user.client, vfio_user.server, vfio_user.device, vfio_user.aio]


@pytest.mark.parametrize("room", DOCUMENTED_ROOMS, ids=lambda room: room.__name__)
def test_every_public_class_and_method_says_what_it_does(room: ModuleType) -> None:
    silent = [name for name, value in documented(room) if not has_words(name, value)]
    assert not silent
