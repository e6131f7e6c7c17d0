"""Filters by name: ``delay:region_read=5ms,jitter=1ms``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any

from vfio_user.errors import UsageError
from vfio_user.filters.base import Filter
from vfio_user.filters.delay import Delay
from vfio_user.filters.error import Error
from vfio_user.filters.settings import no_such
from vfio_user.filters.stats import Stats
from vfio_user.filters.trace import Trace
from vfio_user.filters.trap import ReadOnly, Trap
from vfio_user.server.backend import ServerBackend

FILTERS: Mapping[str, type[Filter]] = MappingProxyType(
    {filter_class.name: filter_class for filter_class in (Delay, Error, ReadOnly, Stats, Trace, Trap)}
)


@dataclass(frozen=True, slots=True)
class FilterSpec:
    """A filter that was asked for, and its options as its constructor takes them. Call it with a backend."""

    filter_class: type[Filter]
    options: Mapping[str, Any]

    def __call__(self, backend: ServerBackend) -> Filter:
        """The filter around ``backend``. Raises UsageError for options that make no sense together."""
        try:
            return self.filter_class(backend, **self.options)
        except UsageError as error:
            raise UsageError(f"filter {self.filter_class.name}: {error}") from error


def parse_filter(text: str) -> FilterSpec:
    """``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE``. Raises UsageError for what is none, listing what exists."""
    name, found, settings = text.partition(":")
    filter_class = FILTERS.get(name)
    if filter_class is None:
        raise no_such("filter", name, FILTERS)
    options: dict[str, Any] = {}
    for setting in settings.split(",") if found else ():
        key, value = _parse_option(filter_class, setting)
        if key in options:
            raise UsageError(f"filter {name}: {key} is given twice")
        options[key] = value
    spec = FilterSpec(filter_class, options)
    spec(ServerBackend())  # around nothing: what makes no sense together is refused now, not when a device is there
    return spec


def _parse_option(filter_class: type[Filter], text: str) -> tuple[str, object]:
    key, found, value = text.partition("=")
    known = filter_class.options.get(key)
    if known is None:
        raise no_such(f"option of filter {filter_class.name}", key, filter_class.options)
    try:
        if not found:
            raise ValueError("it has no value")
        return key, known.form.parse(value)
    except ValueError as error:
        raise UsageError(f"filter {filter_class.name}: {text}: {error} ({known.help})") from error


def apply_filters(backend: ServerBackend, specs: Sequence[str | FilterSpec]) -> tuple[ServerBackend, list[Filter]]:
    """``backend`` inside filters, the first of ``specs`` nearest the client, and these filters in the same order.

    Raises UsageError as :func:`parse_filter`, before any filter is made.
    """
    parsed = [parse_filter(spec) if isinstance(spec, str) else spec for spec in specs]
    filters: list[Filter] = []
    for spec in reversed(parsed):
        backend = spec(backend)
        filters.insert(0, backend)
    return backend, filters


def filter_help(width: int = 78) -> str:
    """Every filter and its options, as plain text in lines of ``width`` at most."""
    return "\n".join(
        line
        for name in sorted(FILTERS)
        for depth, text in _help(FILTERS[name])
        for line in textwrap.wrap(
            text, width, initial_indent="  " * depth, subsequent_indent="  " * (depth + 1), break_on_hyphens=False
        )
    )


def _help(filter_class: type[Filter]) -> Iterator[tuple[int, str]]:
    """What there is to say, each with how far it is indented: a filter, and below it its options."""
    yield 0, f"{filter_class.name}: {(filter_class.__doc__ or '').partition(chr(10))[0]}"
    for setting, keys in groupby(filter_class.options, filter_class.options.__getitem__):
        yield 1, f"{', '.join(keys)}={setting.form.metavar}: {setting.help}"
