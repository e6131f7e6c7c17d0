"""DMA logging through a device: what edu writes into guest memory is what the reports say, against a model."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user import Client, DeviceState
from vfio_user.devices.edu import Edu
from vfio_user.errors import CommandError
from vfio_user.wire import messages as m
from vfio_user.wire.constants import DeviceFeature, DmaFlags, FeatureFlags

from .device_support import TIMEOUT, attached, guest_memory, serving
from .test_device_edu import BUFFER, COMMAND, COUNT, DESTINATION, SOURCE, START, TO_GUEST, transfer

PAGE = 4096
READ_WRITE = DmaFlags.READ | DmaFlags.WRITE
MAPPED, FILE, HOLE, MESSAGE = 0x10_0000, 0x11_0000, 0x12_0000, 0x13_0000
SIZE = 0x1_0000
"""Four ranges side by side: mapped, by file I/O, nothing, by messages."""
FIRST, LAST = MAPPED, MESSAGE + SIZE


@pytest.fixture
def edu() -> Iterator[Client]:
    with attached(Edu()) as client, guest_memory(2 * SIZE) as memory:
        map_all(client, memory)
        yield client


def map_all(client: Client, memory: int) -> None:
    client.dma_map(MAPPED, SIZE, memory)
    client.dma_map(FILE, SIZE, memory, SIZE, READ_WRITE | DmaFlags.FILE_IO)
    client.dma_map(MESSAGE, SIZE, memory=bytearray(SIZE))


def dirty(client: Client, address: int, count: int) -> None:
    transfer(client, BUFFER, address, count, START | TO_GUEST)


def pages(bitmap: bytes) -> set[int]:
    """The numbers of the bits that are set: bit n % 8 of byte n // 8."""
    return {n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1}


def reported(client: Client, iova: int, length: int, page_size: int = PAGE) -> set[int]:
    return pages(client.dma_logging_report(iova, length, page_size))


def refused(error: int) -> Any:
    return pytest.raises(CommandError, check=lambda caught: caught.errno == error)


writes = st.tuples(
    st.just("write"),
    st.integers(MAPPED - 100, FILE + SIZE + 100) | st.integers(MESSAGE, LAST - PAGE),
    st.integers(0, PAGE),
)
reports = st.tuples(
    st.just("report"),
    st.tuples(st.integers(0, 63), st.integers(1, 64)),
    st.sampled_from([PAGE, 2 * PAGE, 4 * PAGE, 16 * PAGE]),
)
steps = st.lists(st.one_of(writes, reports), max_size=20)


@settings(max_examples=60)
@given(steps)
def test_reports_against_a_model(program: list[tuple[str, Any, Any]]) -> None:
    logged = range(MAPPED, FILE + SIZE)
    with attached(Edu()) as client, guest_memory(2 * SIZE) as memory:
        map_all(client, memory)
        dirty(client, MAPPED, 10)  # before logging: nobody asked
        assert client.dma_logging_start(PAGE) == PAGE
        model: set[int] = set()
        for kind, where, how in program:
            if kind == "write":
                dirty(client, where, how)
                if how and where in logged and where + how - 1 in logged:
                    model |= set(range(where // PAGE, (where + how - 1) // PAGE + 1))
                continue
            first = FIRST // PAGE + where[0]
            count = min(where[1], LAST // PAGE - first)
            if set(range(first, first + count)) <= set(range(HOLE // PAGE, MESSAGE // PAGE)):
                with refused(errno.ENOENT):
                    client.dma_logging_report(first * PAGE, count * PAGE, how)
                continue
            if how > count * PAGE:
                continue
            expected = {(page - first) * PAGE // how for page in model if first <= page < first + count}
            assert reported(client, first * PAGE, count * PAGE, how) == expected
            model -= set(range(first, first + count))
        assert reported(client, FIRST, LAST - FIRST) == {page - FIRST // PAGE for page in model}
        assert reported(client, FIRST, LAST - FIRST) == set()


@pytest.mark.parametrize("address", [MAPPED, FILE], ids=["mapped", "file"])
def test_a_report_of_part_of_a_region_clears_that_part(edu: Client, address: int) -> None:
    edu.dma_logging_start(PAGE)
    dirty(edu, address + 3 * PAGE - 1, 2)
    dirty(edu, address + 9 * PAGE, 1)
    assert reported(edu, address + 3 * PAGE, 4 * PAGE) == {0}
    assert reported(edu, address, SIZE) == {2, 9}
    assert reported(edu, address, SIZE) == set()


def test_finer_and_coarser_reports(edu: Client) -> None:
    edu.dma_logging_start(PAGE)
    dirty(edu, MAPPED + 5 * PAGE, 1)
    assert reported(edu, MAPPED, SIZE, 1024) == {20, 21, 22, 23}
    dirty(edu, MAPPED + 5 * PAGE, 1)
    assert reported(edu, MAPPED, SIZE, SIZE) == {0}


def test_messages_are_not_logged_and_holes_read_clean(edu: Client) -> None:
    edu.dma_logging_start(PAGE)
    dirty(edu, MESSAGE, PAGE)
    assert reported(edu, FIRST, LAST - FIRST) == set()
    with refused(errno.ENOENT):
        edu.dma_logging_report(HOLE, SIZE, PAGE)


def test_only_the_ranges_asked_for_are_logged(edu: Client) -> None:
    edu.dma_logging_start(PAGE, [(MAPPED + 2 * PAGE, 2 * PAGE)])
    for page in range(6):
        dirty(edu, MAPPED + page * PAGE, 1)
    assert reported(edu, MAPPED + 2 * PAGE, 2 * PAGE) == {0, 1}
    with refused(errno.EINVAL):
        edu.dma_logging_report(MAPPED, SIZE, PAGE)


@pytest.mark.parametrize("asked", [1, 512, 2048, PAGE, 1 << 16, 1 << 21, 1 << 40])
def test_the_page_size_chosen_comes_back(edu: Client, asked: int) -> None:
    chosen = edu.dma_logging_start(asked)
    assert chosen.bit_count() == 1
    dirty(edu, MAPPED, 1)
    assert 0 in reported(edu, MAPPED, SIZE)


@pytest.mark.parametrize(
    ("page_size", "ranges"),
    [
        (0, []),
        (100, []),
        (3 * PAGE, []),
        (PAGE, [(MAPPED + 1, PAGE)]),
        (PAGE, [(MAPPED, PAGE + 1)]),
        (PAGE, [(MAPPED, 0)]),
        (PAGE, [((1 << 64) - PAGE, 2 * PAGE)]),
        (PAGE, [(MAPPED, 2 * PAGE), (MAPPED + PAGE, PAGE)]),
    ],
)
def test_logging_that_cannot_start(edu: Client, page_size: int, ranges: list[tuple[int, int]]) -> None:
    with refused(errno.EINVAL):
        edu.dma_logging_start(page_size, ranges)
    with refused(errno.EINVAL):
        edu.dma_logging_report(MAPPED, SIZE, PAGE)  # it is off


def test_more_ranges_announced_than_sent(edu: Client) -> None:
    data = m.LoggingControl(PAGE, 2).pack() + m.LoggingRange(MAPPED, PAGE).pack()
    with refused(errno.EINVAL):
        edu.device_feature(FeatureFlags.SET | DeviceFeature.DMA_LOGGING_START, data)


def test_starting_again(edu: Client) -> None:
    edu.dma_logging_start(PAGE)
    dirty(edu, MAPPED, 1)
    with refused(errno.EINVAL):
        edu.dma_logging_start(2 * PAGE)
    assert edu.dma_logging_start(PAGE) == PAGE
    assert reported(edu, MAPPED, SIZE) == {0}
    edu.dma_logging_stop()
    edu.dma_logging_stop()
    dirty(edu, MAPPED, 1)
    assert edu.dma_logging_start(2 * PAGE) == 2 * PAGE
    assert reported(edu, MAPPED, SIZE) == set()


def test_memory_that_is_mapped_later_is_logged_too(edu: Client) -> None:
    edu.dma_logging_start(PAGE)
    with guest_memory(SIZE) as memory:
        edu.dma_map(HOLE, SIZE, memory)
        dirty(edu, HOLE + PAGE, 1)
        assert reported(edu, MAPPED, 3 * SIZE) == {2 * SIZE // PAGE + 1}


def test_logging_lives_through_the_states_of_a_migration() -> None:
    with attached(Edu()) as client, guest_memory(2 * SIZE) as memory:
        map_all(client, memory)
        client.dma_logging_start(PAGE)
        dirty(client, MAPPED, 1)
        client.migration_set_state(DeviceState.PRE_COPY)
        dirty(client, MAPPED + PAGE, 1)
        client.migration_set_state(DeviceState.STOP_COPY)
        assert reported(client, MAPPED, 2 * SIZE) == {0, 1}
        client.migration_set_state(DeviceState.RUNNING)
        dirty(client, MAPPED + 2 * PAGE, 1)
        client.reset()
        assert reported(client, MAPPED, 2 * SIZE) == {2}


def test_logging_outlives_the_client() -> None:
    with serving(Edu()) as path, guest_memory(2 * SIZE) as memory:
        with Client.connect(path, TIMEOUT) as client:
            client.dma_logging_start(PAGE)
        with Client.connect(path, TIMEOUT) as client:
            map_all(client, memory)
            dirty(client, FILE + PAGE, 1)
            assert reported(client, FILE, SIZE) == {1}


def test_unmap_with_the_dirty_bitmap(edu: Client) -> None:
    edu.dma_logging_start(PAGE)
    dirty(edu, MAPPED + 4 * PAGE - 1, 2)
    assert pages(edu.dma_unmap(MAPPED, SIZE, page_size=PAGE)) == {3, 4}
    with refused(errno.ENOENT):
        edu.dma_unmap(MAPPED, SIZE)


def test_unmap_with_a_bitmap_that_nobody_keeps(edu: Client) -> None:
    with refused(errno.EINVAL):
        edu.dma_unmap(MAPPED, SIZE, page_size=PAGE)  # logging is off
    edu.dma_logging_start(PAGE, [(FILE, SIZE)])
    with refused(errno.EINVAL):
        edu.dma_unmap(MAPPED, SIZE, page_size=PAGE)  # logging covers something else
    dirty(edu, MAPPED, 16)  # it is still mapped
    edu.dma_unmap(MAPPED, SIZE)


def test_unmap_all(edu: Client) -> None:
    edu.dma_logging_start(PAGE)
    edu.dma_unmap_all()
    with refused(errno.ENOENT):
        edu.dma_logging_report(MAPPED, SIZE, PAGE)
    with guest_memory(SIZE) as memory:
        edu.dma_map(MAPPED, SIZE, memory)
        dirty(edu, MAPPED, 1)
        assert reported(edu, MAPPED, SIZE) == {0}


def test_what_the_device_reads_is_not_dirty(edu: Client) -> None:
    edu.dma_logging_start(PAGE)
    transfer(edu, MAPPED, BUFFER, PAGE, START)
    assert reported(edu, MAPPED, SIZE) == set()


def test_every_page_that_changed_was_reported() -> None:
    """What a migration lives by: copying the pages reported makes the copy equal."""
    with attached(Edu()) as client, guest_memory(SIZE) as memory:
        client.dma_map(MAPPED, SIZE, memory)
        os.pwrite(memory, bytes(range(256)) * 16, 0)
        client.dma_logging_start(PAGE)
        copy = bytearray(os.pread(memory, SIZE, 0))
        transfer(client, MAPPED, BUFFER, PAGE, START)
        for at in (PAGE + 1, 5 * PAGE - 7, 9 * PAGE):
            for offset, value in (
                (SOURCE, BUFFER),
                (DESTINATION, MAPPED + at),
                (COUNT, 20),
                (COMMAND, START | TO_GUEST),
            ):
                client.region_write(0, offset, value.to_bytes(8, "little"), posted=True)
        for page in reported(client, MAPPED, SIZE):
            copy[page * PAGE : (page + 1) * PAGE] = os.pread(memory, PAGE, page * PAGE)
        assert copy == os.pread(memory, SIZE, 0)
