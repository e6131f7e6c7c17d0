"""How busy a controller is, for people who look on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from vfio_user.devices.nvme.command import Command
from vfio_user.devices.nvme.constants import IoOpcode
from vfio_user.devices.nvme.execution import Handler, Later
from vfio_user.devices.nvme.logs import Health
from vfio_user.devices.nvme.queues import SubmissionQueue
from vfio_user.histogram import Histogram, duration

_MIB = 1 << 20
_NANOSECONDS = 1e9


class Meter:
    """Measures what the I/O commands of an executor take, from their being fetched to their completion."""

    def __init__(self, handlers: Mapping[int, Handler], health: Callable[[], Health]) -> None:
        self._opcodes = tuple(handlers)
        self._health = health
        self._begun: dict[tuple[int, int], int] = {}
        self._restart()

        self.handlers = {opcode: self._measured(opcode, handler) for opcode, handler in handlers.items()}
        """The same handlers, measured."""
        self._restart()

    def ended(self, queue: SubmissionQueue, cid: int) -> None:
        """A command completed."""
        if (begin := self._begun.pop((queue.number, cid), None)) is not None:
            self._latencies.add(time.perf_counter_ns() - begin)

    def line(self) -> str:
        """What happened since the last line: commands and bytes a second, latency, how many are under way."""
        since, counts, latencies, before = self._since, self._commands, self._latencies, self._moved_before
        self._restart()
        seconds = (self._since - since) / _NANOSECONDS
        if not any(counts.values()):
            return f"idle, {len(self._begun)} commands under way"
        kinds = ", ".join(f"{IoOpcode(n).name.lower()} {count / seconds:.0f}" for n, count in counts.items() if count)
        p50, p99 = (duration(nanoseconds / _NANOSECONDS) for nanoseconds in latencies.quantiles((0.5, 0.99)))
        return (
            f"{sum(counts.values()) / seconds:.0f} IOPS ({kinds}), {(self._moved_before - before) / seconds / _MIB:.1f}"
            f" MiB/s, latency p50 {p50} p99 {p99}, depth {len(self._begun)}"
        )

    def _restart(self) -> None:
        health = self._health()
        self._since = time.perf_counter_ns()
        self._moved_before = health.bytes_read + health.bytes_written
        self._commands = dict.fromkeys(self._opcodes, 0)  # all of them: another thread may count meanwhile
        self._latencies = Histogram()

    def _measured(self, opcode: int, handler: Handler) -> Handler:
        def measured(queue: SubmissionQueue, command: Command) -> int | Later:
            self._begun[queue.number, command.cid] = time.perf_counter_ns()
            self._commands[opcode] += 1
            return handler(queue, command)

        return measured
