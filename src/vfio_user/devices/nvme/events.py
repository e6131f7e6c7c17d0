"""Asynchronous events: what a controller tells without being asked (5.2)."""

from __future__ import annotations

from collections import deque

from vfio_user.devices.nvme.command import check
from vfio_user.devices.nvme.constants import AsyncEvent, Feature, LogPage, Status
from vfio_user.devices.nvme.execution import Executor
from vfio_user.devices.nvme.features import Features
from vfio_user.devices.nvme.identify import ASYNC_EVENTS

LOG_PAGES = (LogPage.ERROR_INFORMATION, LogPage.SMART_HEALTH, LogPage.CHANGED_NAMESPACES)
"""By type of the event: which page has more about it; reading that lets the type be told again (5.2)."""


class AsyncEvents:
    """Requests that wait for an event, and events that wait for a request.

    Where there is no room for a completion now, or the executor is held, :meth:`deliver` is called again when that is
    over.
    """

    def __init__(self, executor: Executor, features: Features) -> None:
        self._executor = executor
        self._features = features
        self.requests: deque[int] = deque()
        """Command identifiers."""
        self.pending: deque[AsyncEvent] = deque()
        self.masked: set[int] = set()
        """Types that were told, and whose log page was not read since."""

    def request(self, cid: int) -> None:
        """A command asks for the next event. Raises CommandError for one too many."""
        check(len(self.requests) < ASYNC_EVENTS, Status.ASYNC_EVENT_LIMIT_EXCEEDED)
        self.requests.append(cid)

    def add(self, event: AsyncEvent) -> None:
        """It happened. What already waits to be told is not told twice."""
        if event not in self.pending:
            self.pending.append(event)
            self.deliver()
        self._executor.send_interrupts()

    def add_notice(self, event: AsyncEvent, notices: int) -> None:
        """As :meth:`add`, if the host wants such notices: bits of ASYNC_EVENT_CONFIGURATION."""
        if self._features.get(Feature.ASYNC_EVENT_CONFIGURATION) & notices:
            self.add(event)

    def deliver(self) -> None:
        """Tell what can be told."""
        for event in list(self.pending):
            kind = event & 7
            if kind in self.masked or not self.requests:
                continue
            result = event | LOG_PAGES[kind] << 16
            if self._executor.held or not self._executor.answer(self.requests[0], result):
                return
            self.requests.popleft()
            self.pending.remove(event)
            self.masked.add(kind)

    def page_read(self, page: LogPage) -> None:
        """The host read a log page: with that it knows what it was told, or was to be told when it asked (5.2)."""
        if page not in LOG_PAGES:
            return
        kind = LOG_PAGES.index(page)
        if kind in self.masked:
            self.masked.remove(kind)
            self.deliver()
        else:
            self.pending = deque(event for event in self.pending if event & 7 != kind)

    def reset(self) -> None:
        self.requests.clear()
        self.pending.clear()
        self.masked.clear()
