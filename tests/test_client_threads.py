"""Several threads with one blocking client; the asyncio twin's tasks are in test_aio_client."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.hostile import PATIENT, Peer, Request, pattern, scripted
from vfio_user.errors import ConnectionClosedError
from vfio_user.testing import no_fd_leaks
from vfio_user.wire.constants import Command


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_fd_leaks():
        yield


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` at once. Raises what any of them raised."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for error in errors:
        raise error


def test_calls_from_several_threads_do_not_mix() -> None:
    with scripted("blocking") as (client, _):

        def read(number: int) -> None:
            for offset in range(number * 100, number * 100 + 50):
                assert client.region_read(0, offset, 16) == pattern(offset, 16)

        in_threads(4, read)


def test_close_ends_a_call_of_another_thread() -> None:
    asked = threading.Event()

    def never(peer: Peer, request: Request) -> None:
        asked.set()

    with scripted("blocking", {Command.DEVICE_RESET: never}, timeout=60) as (client, _):

        def work(number: int) -> None:
            if number:
                assert asked.wait(30)
                client.close()
            else:
                with pytest.raises(ConnectionClosedError):
                    client.reset()

        in_threads(2, work)


def test_a_signal_handler_may_close_the_client_in_the_middle_of_a_call() -> None:
    """The handler runs in the thread that is in the call: a lock that it waited for would never be free."""

    def interrupt(peer: Peer, request: Request) -> None:
        signal.pthread_kill(caller, signal.SIGUSR1)
        peer.over.wait(PATIENT)

    caller = threading.get_ident()
    with scripted("blocking", {Command.DEVICE_RESET: interrupt}) as (client, _):
        before = signal.signal(signal.SIGUSR1, lambda *_: client.close())
        try:
            with pytest.raises(ConnectionClosedError):
                client.reset()
        finally:
            signal.signal(signal.SIGUSR1, before)
