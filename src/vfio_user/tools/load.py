"""Device classes by name, and their options from text."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vfio_user.device import Device
from vfio_user.devices import BUILT_IN, built_in
from vfio_user.errors import UsageError, reason_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

logger = logging.getLogger("vfio_user.tools")

ENTRY_POINTS = "vfio_user.devices"
"""The group of entry points by which a package that is installed gives its devices names."""


def make_device(name: str, options: Mapping[str, str] | None = None) -> Device:
    """The device that ``name`` means, with options as text. Raises UsageError, also for what its code raises."""
    device_class = load_device(name)
    with _faults_of(name):
        return device_class(**parse_options(device_class, options or {}))


@contextmanager
def _faults_of(name: str) -> Iterator[None]:
    """Code of others runs within: whatever it raises is one line for its author, and a traceback in the log."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        logger.info("%s", name, exc_info=True)
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise UsageError(f"{name}: {kind}{reason_of(error)} (vfio-user -v shows where)") from error


def load_device(name: str) -> type[Device]:
    """The device class that ``name`` means: built in, an entry point, ``pkg.mod:Class`` or ``./file.py:Class``.

    Raises UsageError, which says what is wrong with the name.
    """
    if name in BUILT_IN:
        return built_in(name)
    source, found, class_name = name.rpartition(":")
    if not found and name.endswith(".py"):
        raise UsageError(f"{name}: which class of it? Write {name}:Class")
    if not found:
        return _load_entry_point(name)
    with _faults_of(source):
        module = _load_file(Path(source)) if source.endswith(".py") else _import(source)
    there = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Device)]
    others = ", ".join(sorted({*there} - {"Device"})) or "none"
    return _checked(
        getattr(module, class_name, None), f"{source} has no device class {class_name}; there are: {others}"
    )


def _checked(found: object, otherwise: str) -> type[Device]:
    if not isinstance(found, type) or not issubclass(found, Device):
        raise UsageError(otherwise)
    return found


def _import(name: str) -> ModuleType:
    """A module by its name; the working directory counts, as it does for ``python -m``."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """The module of a file, which is run once: devices of one process share what their file keeps for them."""
    name = str(path.absolute())  # not its stem, by which it could pass for a module that is there already
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{path}: no such file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def device_names() -> list[str]:
    """The devices that have a name: built in, or of an installed package."""
    return sorted({*BUILT_IN, *_entry_points()})


def _load_entry_point(name: str) -> type[Device]:
    offers = _entry_points().get(name)
    if not offers:
        raise UsageError(f"no device {name!r}: {', '.join(device_names())}, pkg.mod:Class or ./file.py:Class")
    if len(offers) > 1:
        raise UsageError(f"{name!r} is the name of several: {', '.join(sorted(offers))}; give one of those instead")
    ((target, entry_point),) = offers.items()
    with _faults_of(f"{name} ({target})"):
        found = entry_point.load()
    return _checked(found, f"{name}: {target} is no device class")


def _entry_points() -> dict[str, dict[str, EntryPoint]]:
    """Entry points by their names and by what they stand for. A package with none that can be read has none."""
    from importlib.metadata import distributions

    found: dict[str, dict[str, EntryPoint]] = {}
    for distribution in distributions():
        try:
            for entry_point in distribution.entry_points.select(group=ENTRY_POINTS):
                found.setdefault(entry_point.name, {})[entry_point.value] = entry_point
        except Exception as error:  # a file of somebody else's package, which need not concern this command
            logger.warning("the entry points of a package cannot be read: %s: %r", _title(distribution), error)
    return found


def _title(distribution: object) -> str:
    return str(getattr(distribution, "_path", distribution))


def parse_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts as a mapping; of a key that is given twice the last counts. Raises UsageError."""
    texts: dict[str, str] = {}
    for pair in pairs:
        key, found, texts[key] = pair.partition("=")
        if not found:
            raise UsageError(f"option {key!r} has no value: write it as {key}=VALUE")
    return texts


def parse_options(device_class: type[Device], texts: Mapping[str, str]) -> dict[str, object]:
    """Options as text to the keywords that a device class takes. Raises UsageError."""
    options: dict[str, object] = {}
    for key, text in texts.items():
        declared = device_class.declared_options.get(key)
        if declared is None:
            known = ", ".join(sorted(device_class.declared_options)) or "none"
            raise UsageError(f"{device_class.__name__} has no option {key!r}; there are: {known}")
        try:
            options[key] = declared.parse(text)
        except ValueError as error:
            raise UsageError(f"option {key}={text}: {error} ({declared.help})") from error
    return options
