"""Signals that ask to end, obeyed where nothing is half done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Within a ``with`` block such signals are only noted, and :meth:`check` raises KeyboardInterrupt for them.

    So a call is never left halfway, which would cost the connection that the rollback needs. :meth:`at_once` is for
    waits that may be left. A signal that this process was started to ignore, as by ``nohup``, stays ignored. In the
    main thread only.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def check(self, *_: object) -> None:
        """Raise KeyboardInterrupt, once, if a signal came."""
        noted, self._noted = self._noted, None
        if noted is not None:
            raise KeyboardInterrupt(f"interrupted by {signal.Signals(noted).name}")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Meanwhile a signal raises KeyboardInterrupt wherever it comes."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> Interrupts:
        for number in END_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        if self._at_once:
            self._at_once = False  # what is undone because of this is not interrupted by the next
            self.check()
