"""Devices of one process, each behind a socket of its own and served by a thread of its own.

The thread that calls :meth:`Service.serve` serves nobody: it waits for signals, for servers that end and for a
command that was started along with them. So nothing is done in signal handlers, whatever a device is busy with.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import select
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from vfio_user.device import Device
from vfio_user.errors import UsageError, VfioUserError
from vfio_user.server import Server, ServerBackend
from vfio_user.tools.interrupts import END_SIGNALS
from vfio_user.tools.load import make_device
from vfio_user.tools.notify import READY, STOPPING, Notifier

if TYPE_CHECKING:
    from vfio_user.filters import Filter

logger = logging.getLogger("vfio_user.tools")

MICROSECOND = 1e-6
REPORT_SIGNAL = signal.SIGUSR1
PATIENCE = 10.0
"""Seconds that servers have to end: a hook may be at work, but not for ever."""
HURRY = 1.0
"""Seconds that they have when they are told more than once."""
_SERVER_ENDED = 0
"""An event, as the numbers of signals are."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device to serve: its name as ``vfio-user serve`` takes it, its options as text, filters, outermost first.

    One of ``socket_path`` and ``fd``, a socket that was inherited. ``spin`` in seconds: see :class:`Server`.
    ``origin`` says where this is written, in front of what is wrong with it. ``control``: for a control socket.
    """

    device: str
    socket_path: Path | None = None
    fd: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    filters: tuple[str, ...] = ()
    spin: float | None = None
    origin: str = ""
    control: Path | None = None

    @property
    def place(self) -> str:
        """Where it is served."""
        return f"--fd {self.fd}" if self.socket_path is None else str(self.socket_path)


@dataclass(frozen=True, slots=True)
class Built:
    """A device that was built for a spec. ``backend`` is the device in its filters."""

    spec: DeviceSpec
    device: Device
    backend: ServerBackend
    filters: Sequence[Filter]

    @property
    def name(self) -> str:
        """What it is, and where."""
        return f"{self.spec.device} at {self.spec.place}"


class Companion(Protocol):
    """Something that is served along with the devices, until it ends: a :class:`~vfio_user.tools.running.Command`."""

    def fileno(self) -> int:
        """Readable once it has ended."""

    def hears(self, number: int) -> bool:
        """Whether a signal that came here has reached it as well, and is its business."""

    def end(self) -> None:
        """Have it end soon. Called again, it changes nothing."""

    def patience(self) -> float | None:
        """Seconds after which :meth:`insist` is due; None: it is not."""

    def insist(self) -> None:
        """End it."""


class Service:
    """The devices of ``specs``, whose sockets all listen, or none does.

    Raises UsageError for a device, an option or a filter that is none; OSError for a socket that cannot be made.

    With ``handle_signals``, in the main thread only, END_SIGNALS end :meth:`serve`, and REPORT_SIGNAL has
    ``on_report`` be given what :meth:`report` gives: from before there is a socket until :meth:`close`. A SIGHUP that
    is ignored, as nohup has it, stays ignored.

    A server that does not end, because a hook of its device does not return, is given up ``patience`` seconds after
    it was told to end; when it is told again, HURRY seconds after.

    ``notify`` is told when it serves, and once it is to end.
    """

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        on_report: Callable[[str], None] = lambda text: None,
        *,
        handle_signals: bool = False,
        patience: float = PATIENCE,
        notify: Notifier | None = None,
    ) -> None:
        _check_places(specs)
        self.devices = [_build(spec) for spec in specs]
        self._on_report = on_report
        self._patience = patience
        self._notify = notify or Notifier()
        self._ending = False
        self._told = 0.0
        self._deadline: float | None = None
        self._failures: list[VfioUserError] = []
        self._companion: Companion | None = None
        self._serving: dict[Server, Built] = {}
        self._given_up: set[Server] = set()
        self._idle = threading.Event()
        self._idle.set()
        with ExitStack() as stack:
            self._events = stack.enter_context(contextlib.closing(_Events()))
            if handle_signals:
                stack.enter_context(self._events.of_signals({*END_SIGNALS, REPORT_SIGNAL} - _ignored()))
            self._servers: list[Server] = []
            for built in self.devices:
                self._servers.append(_listen(built))
                stack.callback(self._close_server, self._servers[-1])
            self._stack = stack.pop_all()

    @property
    def socket_paths(self) -> list[Path]:
        """The sockets that were made here, absolute, in the order of the devices."""
        return [one.spec.socket_path.absolute() for one in self.devices if one.spec.socket_path is not None]

    def serve(self, companion: Companion | None = None) -> None:
        """Serve until :meth:`stop`, a signal that is handled, or the end of the ``companion``; once.

        Ends also when every client of a connected socket has left, and the companion has ended. What was received is
        answered first. When this is to end, the companion ends before the servers do, so that it can let its devices
        go. Raises VfioUserError when a server has failed or was given up, after all else was ended.
        """
        self._idle.clear()
        self._companion = companion
        try:
            for built, server in zip(self.devices, self._servers, strict=True):
                self._serving[server] = built
                threading.Thread(
                    target=self._serve_one, args=(built, server), name=built.spec.device, daemon=True
                ).start()
            self._notify(READY, f"STATUS=Serving {', '.join(built.name for built in self.devices)}")
            while self._serving or self._companion is not None:
                self._wait()
        finally:
            self._companion = None
            self._shut_down()
            while self._serving:
                self._wait()
            self._idle.set()
        if self._failures:
            raise self._failures[0]

    def stop(self) -> None:
        """Have :meth:`serve` end. From any thread, or a signal handler."""
        self._events.put(signal.SIGTERM)

    def report(self) -> str:
        """What the filters have to say so far, device by device; "" for nothing."""
        return "\n".join(
            f"{type(one.device).__name__} at {one.spec.place}:\n{text}"
            for one in self.devices
            for each in one.filters
            if (text := each.report())
        )

    def close(self) -> None:
        """Let the clients go, remove the sockets. Ends :meth:`serve` before, if another thread is in there."""
        if not self._idle.is_set():
            self.stop()
            self._idle.wait()
        self._stack.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve_one(self, built: Built, server: Server) -> None:
        try:
            server.serve_forever()
        except BaseException as error:  # nobody is above a thread to see it
            logger.info("%s", built.name, exc_info=True)
            reason = f"{built.name} failed: {type(error).__name__}: {error} (vfio-user -v shows where)"
            self._failures.append(VfioUserError(reason))
        finally:
            self._serving.pop(server, None)
            self._events.put(_SERVER_ENDED)

    def _wait(self) -> None:
        """Wait for something to happen, and do what it calls for."""
        companion = self._companion
        for event in self._events.wait(companion, self._time_left()):
            if event == REPORT_SIGNAL:
                self._on_report(self.report())
            elif event != _SERVER_ENDED and (companion is None or not companion.hears(event)):
                self._end(again=True)
        if self._failures:
            self._end()
        if self._time_left() == 0:
            self._give_up()
        if companion is None:
            return
        if _readable(companion):
            self._companion = None
            self._end()
        elif companion.patience() == 0:
            companion.insist()

    def _end(self, *, again: bool = False) -> None:
        """Have all end. ``again``: who is told more than once has less patience."""
        self._say_ending()
        if self._companion is not None:
            self._companion.end()
        elif self._deadline is None:
            self._shut_down()
        elif again:
            self._deadline = min(self._deadline, self._told + HURRY)

    def _say_ending(self) -> None:
        if not self._ending:
            self._ending = True
            self._notify(STOPPING)

    def _shut_down(self) -> None:
        self._say_ending()
        if self._deadline is None:
            self._told = time.monotonic()
            self._deadline = self._told + self._patience
        for server in self._servers:
            server.shutdown()

    def _time_left(self) -> float | None:
        """Seconds until servers are given up; None while they are not to end."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _give_up(self) -> None:
        """Leave the servers that have not ended: their threads end with the process."""
        for server, built in list(self._serving.items()):
            self._given_up.add(server)
            self._serving.pop(server, None)
            self._failures.append(VfioUserError(f"{built.name} does not end: a hook of it has not returned"))

    def _close_server(self, server: Server) -> None:
        if server in self._given_up:
            server.remove_socket()
        else:
            server.close()


class _Events:
    """Numbers that any thread, or a signal, leaves for the thread that waits for them."""

    def __init__(self) -> None:
        self._left: deque[int] = deque()
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def put(self, event: int) -> None:
        self._left.append(event)
        with contextlib.suppress(OSError):  # full: the thread is awake; closed: there is none
            os.write(self._writer, b"\0")

    def wait(self, companion: Companion | None, patience: float | None) -> Iterator[int]:
        """What was left since; waits for it, for the companion's end, or for its or our ``patience`` to be over."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        times = [patience]
        if companion is not None:
            poll.register(companion, select.POLLIN)
            times.append(companion.patience())
        limits = [time for time in times if time is not None]
        poll.poll(min(limits) * 1000 + 1 if limits else None)
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        while self._left:
            yield self._left.popleft()

    @contextmanager
    def of_signals(self, numbers: set[signal.Signals]) -> Iterator[None]:
        """Leave the numbers of these signals meanwhile.

        A signal may come to another thread than the one that runs handlers: the system's pipe wakes that one.
        """
        wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda number, _: self.put(number)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)

    def close(self) -> None:
        writer, self._writer = self._writer, -1
        os.close(writer)
        os.close(self._reader)


def raise_fd_limit() -> int:
    """Take as many descriptors as there are: every eventfd of a client and every mapped file is one.

    Gives the limit that was.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def _ignored() -> set[signal.Signals]:
    return {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()


def _check_places(specs: Sequence[DeviceSpec]) -> None:
    for spec in specs:
        if spec.socket_path is None and spec.fd is None:
            raise UsageError(_originating(spec, f"{spec.device} needs one of --socket-path and --fd (or --run)"))
        if spec.socket_path is not None and spec.fd is not None:
            raise UsageError(_originating(spec, f"{spec.device} takes --socket-path or --fd, not both"))
    places = [spec.place for spec in specs] + [str(spec.control) for spec in specs if spec.control is not None]
    twice = [place for place, times in Counter(places).items() if times > 1]
    if twice:
        raise UsageError(f"two sockets at {twice[0]}" if len(places) > len(specs) else f"two devices at {twice[0]}")


def _build(spec: DeviceSpec) -> Built:
    try:
        device = make_device(spec.device, spec.options)
        backend, filters = _filtered(device, spec.filters)
    except UsageError as error:
        raise UsageError(_originating(spec, str(error))) from error
    return Built(spec, device, backend, filters)


def _filtered(device: Device, filters: Sequence[str]) -> tuple[ServerBackend, Sequence[Filter]]:
    if not filters:
        return device, ()
    from vfio_user.filters import apply_filters

    return apply_filters(device, filters)


def _originating(spec: DeviceSpec, reason: str) -> str:
    return f"{spec.origin}: {reason}" if spec.origin else reason


def _listen(built: Built) -> Server:
    """Raises OSError, which names the place."""
    spec = built.spec
    try:
        return Server(built.backend, spec.socket_path, fd=spec.fd, spin=spec.spin, control=spec.control)
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), spec.place) from error


def _readable(companion: Companion) -> bool:
    poll = select.poll()
    poll.register(companion, select.POLLIN)
    return bool(poll.poll(0))
