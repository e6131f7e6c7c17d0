"""Filters: backends around a device that watch it, slow it down or have it fail.

::

    backend, filters = apply_filters(Edu(), ["stats", "delay:region_read=5ms", "error:dma_map=10%,seed=1"])
    Server(backend, path).serve_forever()
    print(filters[0].report())

The first one is nearest the client. A filter of one's own is a subclass of :class:`Filter` with
:meth:`~Filter.around` overridden.
"""

from vfio_user.filters.base import HOOKS, Call, Filter, Hook
from vfio_user.filters.catalogue import FILTERS, FilterSpec, apply_filters, filter_help, parse_filter
from vfio_user.filters.delay import Delay
from vfio_user.filters.error import Error
from vfio_user.filters.settings import Setting
from vfio_user.filters.stats import Stats, Summary
from vfio_user.filters.trace import Trace
from vfio_user.filters.trap import ReadOnly, Trap

__all__ = [
    "FILTERS",
    "HOOKS",
    "Call",
    "Delay",
    "Error",
    "Filter",
    "FilterSpec",
    "Hook",
    "ReadOnly",
    "Setting",
    "Stats",
    "Summary",
    "Trace",
    "Trap",
    "apply_filters",
    "filter_help",
    "parse_filter",
]
