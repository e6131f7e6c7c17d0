"""Device classes by name, and their options from text."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from vfio_user.device import Device
from vfio_user.devices import BUILT_IN, built_in
from vfio_user.errors import UsageError

logger = logging.getLogger("vfio_user.tools")


def make_device(name: str, options: Sequence[str] = ()) -> Device:
    """The device that ``name`` means, with ``KEY=VALUE`` options. Raises UsageError, also for what its code raises."""
    device_class = load_device(name)
    with _faults_of(name):
        return device_class(**parse_options(device_class, options))


@contextmanager
def _faults_of(name: str) -> Iterator[None]:
    """Code of others runs within: whatever it raises is one line for its author, and a traceback in the log."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        logger.info("%s", name, exc_info=True)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"{name}: {kind}{error} (-v shows where)") from error


def load_device(name: str) -> type[Device]:
    """The device class that ``name`` means: a built-in, ``pkg.mod:Class`` or ``./file.py:Class``.

    Raises UsageError, which says what is wrong with the name.
    """
    if name in BUILT_IN:
        return built_in(name)
    source, found, class_name = name.rpartition(":")
    if not found:
        raise UsageError(f"no device {name!r}: {', '.join(sorted(BUILT_IN))}, pkg.mod:Class or ./file.py:Class")
    with _faults_of(source):
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    device_class = getattr(module, class_name, None)
    if not isinstance(device_class, type) or not issubclass(device_class, Device):
        raise UsageError(f"{source} has no device class {class_name}")
    return device_class


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{path}: no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def parse_options(device_class: type[Device], pairs: Sequence[str]) -> dict[str, object]:
    """``KEY=VALUE`` texts as the keywords that a device class takes. Raises UsageError."""
    options: dict[str, object] = {}
    for pair in pairs:
        key, found, text = pair.partition("=")
        declared = device_class.declared_options.get(key)
        if declared is None:
            known = ", ".join(sorted(device_class.declared_options)) or "none"
            raise UsageError(f"{device_class.__name__} has no option {key!r}; there are: {known}")
        if not found:
            raise UsageError(f"option {key} has no value: {declared.help}")
        try:
            options[key] = declared.parse(text)
        except ValueError as error:
            raise UsageError(f"option {key}={text}: {error} ({declared.help})") from error
    return options
