"""Shadow doorbells and a server that looks at them before it sleeps (7.13): meanwhile nobody has to ring."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.fds import OwnedFd
from vfio_user.wire.constants import PciRegion

from .nvme_gate_support import NO_BUS_MASTER, PCI_COMMAND
from .nvme_table_support import DEPTH, MEMORY, Spinning, Table, table

pytestmark = pytest.mark.timeout(60)

READ = 1
BAD = 0x7FFF
"""No tail of any queue."""


@pytest.fixture
def desk() -> Iterator[Table]:
    with table(Spinning()) as desk:
        desk.look(last=True)
        yield desk


def test_while_the_server_looks_nobody_rings(desk: Table) -> None:
    assert desk.submit()  # it slept
    assert len(desk.queue.reap()) == 1
    for _ in range(DEPTH - 1):
        assert not desk.submit()
        assert desk.look() == (True, 1)
        assert desk.look() == (False, 0)
    assert desk.submit()  # the host has come by the place where it was last asked to: once in each round of the queue


def test_before_it_sleeps_the_host_is_asked_to_ring(desk: Table) -> None:
    desk.submit()
    desk.queue.reap()
    assert desk.look(last=True) == (False, 0)
    assert desk.submit()


def test_what_came_in_the_last_moment_is_done(desk: Table) -> None:
    desk.submit()
    desk.queue.reap()
    assert not desk.submit()
    assert desk.look(last=True) == (True, 1)


def test_a_server_that_does_not_spin_asks_for_every_ring() -> None:
    link = Spinning()
    link.spin = 0.0
    with table(link) as desk:
        for _ in range(3):
            assert desk.submit()
            assert len(desk.queue.reap()) == 1


def test_a_doorbell_beyond_the_queue_is_no_work(desk: Table) -> None:
    """Else the server would look for ever, and find it every time."""
    memory = desk.driver.hardware.memory
    assert desk.driver.shadow_pages is not None
    memory.write(desk.driver.shadow_pages[0] + 8, BAD.to_bytes(4, "little"))
    assert desk.look() == (False, 0)
    assert desk.look(last=True) == (False, 0)


def test_memory_that_comes_back_is_looked_at_again(desk: Table) -> None:
    desk.submit()
    desk.queue.reap()
    desk.unmap()
    assert desk.look() == (False, 0)
    desk.map()
    assert not desk.submit()
    assert desk.look() == (True, 1)


@pytest.mark.parametrize("last", [False, True])
def test_without_its_memory_there_is_nothing_to_see(desk: Table, last: bool) -> None:
    desk.submit()
    desk.queue.reap()
    desk.unmap()
    assert desk.look(last=last) == (False, 0)


def test_who_may_not_look_again_has_the_host_ring(desk: Table) -> None:
    desk.submit()
    desk.look()
    desk.device.quiesce()
    assert desk.submit()


def test_without_bus_master_nothing_is_written_for_that(desk: Table) -> None:
    desk.submit()
    desk.look()
    desk.device.region_write(PciRegion.CONFIG, PCI_COMMAND, memoryview(NO_BUS_MASTER.to_bytes(2, "little")))
    before = bytes(desk.memory)
    desk.device.quiesce()
    assert desk.memory == before


def test_memory_that_comes_back_to_be_read_only_fails_the_controller_alone(desk: Table) -> None:
    """Whoever wants everything to stand still, to take memory away, say, has no part in it."""
    desk.submit()
    desk.look()
    desk.unmap()
    desk.device.dma_map(READ, 0, 0, MEMORY, OwnedFd(os.dup(desk.file.fileno())))
    desk.device.quiesce()
    desk.unmap()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["submit", "look", "sleep"]), max_size=60))
def test_no_command_is_ever_left_behind(steps: list[str]) -> None:
    """Whatever the order: when the server sleeps, everything is done that was submitted without a ring before, and
    what is submitted after that is rung for."""
    with table(Spinning()) as desk:
        asleep, waiting = False, 0
        for step in steps:
            if step == "submit" and waiting < DEPTH - 1:
                waiting += 1
                if desk.submit():
                    asleep = False
                assert not asleep
            elif step == "look" and not asleep:
                desk.device.look_for_work(last=False)
            elif step == "sleep" and not asleep:
                asleep = not desk.device.look_for_work(last=True)
            waiting -= len(desk.queue.reap())
            assert not (asleep and waiting)
