"""The asyncio twins of :class:`vfio_user.live.Migration` and :class:`vfio_user.live.LocalDestination`.

The engine itself is the same: it works in a thread of its own, and whatever it asks of the event loop's clients and
callbacks is done in the event loop, for which the thread waits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

from vfio_user.client import Client as BlockingClient
from vfio_user.client.aio import Client
from vfio_user.live import destination as blocking
from vfio_user.live import engine
from vfio_user.live.destination import Destination, nothing
from vfio_user.live.memory import MemoryRegion
from vfio_user.live.report import Report, Round

T = TypeVar("T")
Callback = Callable[[], Awaitable[None] | None]
Ranges = Iterable[tuple[int, int]]

_CANCELLED = "it was cancelled"


class LocalDestination(blocking.LocalDestination):
    """Devices of servers that this program is a client of, and guest memory that it has; see the blocking twin.

    The clients are those of the event loop, or blocking ones. The callbacks are called in the event loop, and awaited
    if they are coroutine functions. Raises RuntimeError where no event loop runs.
    """

    def __init__(
        self,
        clients: Sequence[Client | BlockingClient],
        memory: Sequence[MemoryRegion] = (),
        *,
        connect: Callback = nothing,
        resume: Callback = nothing,
    ) -> None:
        self._loop = _Loop()
        super().__init__(
            self._loop.clients(clients),
            memory,
            connect=self._loop.interruptible(connect),
            resume=self._loop.called(resume),
        )

    def give_up(self) -> None:
        """Interrupt what is waited for before the devices run. To be called in the event loop."""
        self._loop.give_up()


class Migration:
    """Moves the devices of a guest, and its memory, to a destination; the parameters are those of the blocking twin.

    The clients are those of the event loop, or blocking ones. The callbacks are called in the event loop, and awaited
    if they are coroutine functions. The destination is asked from another thread: it is a :class:`LocalDestination` of
    this module, or one that blocks. Raises RuntimeError where no event loop runs.
    """

    def __init__(
        self,
        clients: Sequence[Client | BlockingClient],
        destination: Destination,
        *,
        memory: Sequence[MemoryRegion] = (),
        guest_dirty: Callable[[], Ranges | Awaitable[Ranges]] | None = None,
        pause: Callback = nothing,
        resume: Callback = nothing,
        downtime: float = 0.05,
        max_rounds: int = 30,
        force: bool = False,
        bandwidth: float = float("inf"),
    ) -> None:
        self._loop = _Loop()
        self._destination = _Interruptible(destination)
        self.engine = engine.Migration(
            self._loop.clients(clients),
            cast(Destination, self._destination),
            memory=memory,
            guest_dirty=self._loop.interruptible(guest_dirty) if guest_dirty else None,
            pause=self._loop.interruptible(pause),
            resume=self._loop.called(resume),
            downtime=downtime,
            max_rounds=max_rounds,
            force=force,
            bandwidth=bandwidth,
        )
        """What works in the thread: to look at, as :class:`~vfio_user.live.progress.Watch` does, not to run."""

    @property
    def report(self) -> Report:
        """How it went, or goes."""
        return self.engine.report

    @property
    def pages_left(self) -> int:
        """Pages that are still to be sent."""
        return self.engine.pages_left

    async def run(self) -> AsyncGenerator[Round, None]:
        """Migrate; yields each round as it ends, and leaves the outcome in ``report``. Raises MigrationError.

        Cancelling the task is a failure like any other: it is rolled back, and only then CancelledError is raised. It
        comes too late once the destination was told to start: see the report's status. Who gives up the iteration
        should close it (``contextlib.aclosing``), to have that rolled back at once.
        """
        rounds = self.engine.run()
        with concurrent.futures.ThreadPoolExecutor(1, "migration") as executor:
            try:
                while (done := await self._work(executor, lambda: next(rounds, None))) is not None:
                    yield done
            finally:
                await self._work(executor, lambda: self._end(rounds))

    async def _work(self, executor: concurrent.futures.Executor, work: Callable[[], T]) -> T:
        """``work()`` in the thread. It is always waited for: when this is cancelled, until all is rolled back."""
        future = asyncio.get_running_loop().run_in_executor(executor, work)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
                self._give_up()
        if cancelled is not None:
            future.exception()  # is in the report; asyncio complains of one that nobody looks at
            raise cancelled
        return future.result()

    def _end(self, rounds: Generator[Round, None, None]) -> None:
        if self._loop.given_up:
            with contextlib.suppress(asyncio.CancelledError):
                rounds.throw(asyncio.CancelledError(_CANCELLED))
        rounds.close()

    def _give_up(self) -> None:
        self._loop.give_up()
        self._destination.give_up()


class _Interruptible:
    """A destination of which, once it is given up, nothing more is asked but to abort."""

    def __init__(self, destination: Destination) -> None:
        self._wrapped = destination
        self._given_up = False

    def give_up(self) -> None:
        self._given_up = True
        if isinstance(self._wrapped, LocalDestination):
            self._wrapped.give_up()

    def __getattr__(self, name: str) -> Any:
        if self._given_up and name != "abort":
            raise asyncio.CancelledError(_CANCELLED)
        return getattr(self._wrapped, name)


class _Loop:
    """The event loop, as the engine's thread sees it: what is called there, the thread waits for."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._awaited: asyncio.Future[Any] | None = None
        self.given_up = False

    def clients(self, clients: Sequence[Client | BlockingClient]) -> list[BlockingClient]:
        """Clients for the thread."""
        return [
            cast(BlockingClient, _FromThread(client, self)) if isinstance(client, Client) else client
            for client in clients
        ]

    def called(self, function: Callable[..., T | Awaitable[T]]) -> Callable[..., T]:
        """``function`` for the thread to call; one that must come to its end."""
        return partial(self._wait, function, False)

    def interruptible(self, function: Callable[..., T | Awaitable[T]]) -> Callable[..., T]:
        """The same for one that :meth:`give_up` interrupts while it awaits."""
        return partial(self._wait, function, True)

    def give_up(self) -> None:
        self.given_up = True
        if self._awaited is not None:
            self._awaited.cancel()

    def _wait(self, function: Callable[..., T | Awaitable[T]], interruptible: bool, *arguments: Any, **named: Any) -> T:
        call = self._call(lambda: function(*arguments, **named), interruptible)
        try:
            return asyncio.run_coroutine_threadsafe(call, self._loop).result()
        except concurrent.futures.CancelledError:
            raise asyncio.CancelledError(_CANCELLED) from None

    async def _call(self, function: Callable[[], T | Awaitable[T]], interruptible: bool) -> T:
        if interruptible and self.given_up:
            raise asyncio.CancelledError
        result = function()
        if not inspect.isawaitable(result):
            return result
        if not interruptible:
            return cast(T, await result)
        self._awaited = asyncio.ensure_future(result)
        try:
            return cast(T, await self._awaited)
        finally:
            self._awaited = None


class _FromThread:
    """An event loop's client as one that blocks."""

    def __init__(self, client: Client, loop: _Loop) -> None:
        self._client = client
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        return self._loop.called(value) if callable(value) else value
