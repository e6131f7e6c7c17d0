"""Reads that are carried out together: nobody can tell them from reads that are carried out one by one."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vfio_user.devices.nvme.constants import CQE_SIZE, IoOpcode
from vfio_user.devices.nvme.execution import MAX_SECONDS
from vfio_user.devices.nvme.queues import CompletionQueue, Ring
from vfio_user.devices.nvme.storage.base import Views
from vfio_user.dma.memory import GuestMemory
from vfio_user.fds import OwnedFd
from vfio_user.testing.nvme import Command
from vfio_user.testing.nvme.commands import SGL, Completion
from vfio_user.testing.nvme.data import prps
from vfio_user.wire.constants import DeviceState

from .nvme_table_support import DEPTH, MEMORY, READ_WRITE, Spinning, Table, table

pytestmark = pytest.mark.timeout(60)

PAGE, BLOCK, BLOCKS = 4096, 512, 128
LISTS, DATA = 0x40000, 0x60000
"""Where PRP lists and data are: a page and SPACE bytes for each command of a batch."""
SPACE = 8 * PAGE
INVALID = 0x7F


@dataclass(frozen=True)
class Read:
    """A command of a batch. ``gap``: blocks between what the one before asked for and this; ``kind``: what is odd."""

    gap: int
    blocks: int
    kind: str

    def command(self, start: int, place: int, memory: memoryview) -> Command:
        address = DATA + place * SPACE
        pages = [address + n * PAGE for n in range(1, 8)]
        if self.kind == "scattered":
            pages = [*reversed(pages)]
        elif self.kind == "misaligned list":
            pages[1] += 8
        pointer = LISTS + place * PAGE
        struct.pack_into(f"<{len(pages)}Q", memory, pointer, *pages)
        offset = {"offset": 0x200, "misaligned": 2, "nowhere": 1 << 40}.get(self.kind, 0)
        second = pages[0] if (offset & PAGE - 1) + self.blocks * BLOCK <= 2 * PAGE else pointer
        return Command(
            {"advice": IoOpcode.DATASET_MANAGEMENT, "invalid": INVALID}.get(self.kind, IoOpcode.READ),
            7 if self.kind == "no namespace" else 1,
            cdw10=(1 << 31) if self.kind == "far" else start,
            cdw12=self.blocks - 1,
            flags=SGL if self.kind == "sgl" else 0,
            pointer=prps(address + offset, second),
        )


KINDS = ["plain"] * 12 + ["scattered", "offset", "misaligned", "misaligned list", "nowhere", "far", "no namespace"]
KINDS += ["sgl", "advice", "invalid"]
READS = st.builds(Read, st.sampled_from([0, 0, 0, 1, 5]), st.integers(1, 64), st.sampled_from(KINDS))
BATCHES = st.lists(st.lists(READS, min_size=1, max_size=DEPTH - 1), min_size=1, max_size=8)
PLAIN = Read(0, 8, "plain")


def submit(desk: Table, batch: Sequence[Read], start: int) -> int:
    """Send a batch whose reads begin at a block; where the last of them ended."""
    commands = []
    for place, read in enumerate(batch):
        start = (start + read.gap) % BLOCKS
        commands.append(read.command(start, place, desk.memory))
        start += read.blocks
    desk.queue.submit_many(commands)
    return start


def completions(desk: Table) -> list[tuple[int, int, int]]:
    """Of all that there are in the end: identifier, result, status. Workers end what they have in any order."""
    desk.settle()
    found: list[Completion] = [ticket.completion for ticket in desk.queue.reap() if ticket.completion is not None]
    return sorted((completion.command_id, completion.result, completion.tagged >> 1) for completion in found)


def same_content(*desks: Table) -> None:
    content = os.urandom(BLOCKS * BLOCK)
    for desk in desks:
        desk.device.namespaces[1].storage.write(0, [memoryview(content)])


@settings(max_examples=150, deadline=None)
@given(BATCHES)
@example([[PLAIN] * (DEPTH - 1)] * 3)
@example([[PLAIN, PLAIN, Read(0, 8, "invalid"), PLAIN, PLAIN, Read(0, 64, "scattered"), PLAIN]])
def test_together_they_are_what_they_are_one_by_one(batches: list[list[Read]]) -> None:
    with table(Spinning(), shadow=False) as many, table(Spinning(), shadow=False) as single:
        same_content(many, single)
        single.device.executor.burst = 1
        start = 0
        for batch in batches:
            end = [submit(desk, batch, start) for desk in (many, single)]
            start = end[0]
            found, expected = completions(many), completions(single)
            assert found == expected
            assert len(found) == len(batch)
        assert many.memory[DATA:] == single.memory[DATA:]
        health, other = many.device.logs.health, single.device.logs.health
        assert (health.reads, health.bytes_read) == (other.reads, other.bytes_read)


@settings(max_examples=50, deadline=None)
@given(BATCHES, st.sets(st.integers(0, BLOCKS // 8), max_size=4))
def test_what_takes_waiting_is_left_to_workers(batches: list[list[Read]], slow: set[int]) -> None:
    """``slow``: of which eight blocks nothing can be read at once."""
    with table(Spinning(), shadow=False) as desk:
        same_content(desk)
        storage = desk.device.namespaces[1].storage
        content = bytearray(BLOCKS * BLOCK)
        storage.read(0, [memoryview(content)])
        read_now = storage.read_now

        def sometimes(offset: int, views: Views) -> bool:
            end = offset + sum(map(len, views))
            return not any(offset < (n + 1) * 8 * BLOCK and n * 8 * BLOCK < end for n in slow) and read_now(
                offset, views
            )

        storage.read_now = sometimes  # type: ignore[method-assign]
        position = 0
        for batch in batches:
            plain = [Read(read.gap, min(read.blocks, 8), "plain") for read in batch]
            submit(desk, plain, position)
            for place, (read, (_, _, status)) in enumerate(zip(plain, completions(desk), strict=True)):
                position = (position + read.gap) % BLOCKS
                expected = content[position * BLOCK : (position + read.blocks) * BLOCK]
                position += read.blocks
                assert (status == 0) == (position <= BLOCKS)
                address = DATA + place * SPACE
                assert status or desk.memory[address : address + len(expected)] == expected


def test_all_are_counted_after_a_migration() -> None:
    with table(Spinning(), shadow=False) as desk:
        device = desk.device
        submit(desk, [PLAIN] * 3, 0)
        device.migration_set_state(DeviceState.STOP)
        device.load(device.save(), [])
        device.migration_set_state(DeviceState.RUNNING)
        desk.link.settle()
        desk.queue.reap()
        submit(desk, [PLAIN] * 4, 0)
        assert device.logs.health.reads == 7


def test_other_queues_have_their_turn() -> None:
    """The host keeps one queue full of what takes longer than the controller takes for anything before it looks up."""
    with table(Spinning(), shadow=False) as desk:
        other = desk.driver.create_queue_pair(DEPTH)
        device, storage = desk.device, desk.device.namespaces[1].storage
        read_now = storage.read_now

        def take_long(offset: int, views: Views) -> bool:
            time.sleep(MAX_SECONDS / 4)
            return read_now(offset, views)

        storage.read_now = take_long  # type: ignore[method-assign]
        desk.link.defer = lambda work: None  # type: ignore[method-assign]  # it is called below
        commands = [PLAIN.command(2 * PLAIN.blocks * (n % 2), n, desk.memory) for n in range(DEPTH - 1)]
        desk.queue.submit_many(commands)
        ticket = other.submit(PLAIN.command(0, DEPTH, desk.memory))
        for _ in range(len(device.executor.submissions)):
            device.executor.work()
            desk.queue.submit_many(commands[: len(desk.queue.reap())])
            other.reap()
        assert ticket.done


def test_each_page_that_is_read_to_is_logged() -> None:
    with table(Spinning(), shadow=False) as desk:
        same_content(desk)
        desk.device.dma.log.start(PAGE, [(0, MEMORY)])
        submit(desk, [PLAIN, PLAIN, Read(3, 16, "scattered"), PLAIN], 0)
        bitmap = bytearray(MEMORY // PAGE // 8)
        desk.device.dma.log.report(0, MEMORY, PAGE, memoryview(bitmap))
        pages = {n for n in range(MEMORY // PAGE) if bitmap[n // 8] >> n % 8 & 1}
        first = DATA // PAGE
        assert {first, first + 8, first + 16, first + 24} < pages


@given(st.integers(2, 20), st.integers(1, 7), st.lists(st.lists(st.integers(0, 0xFFFF), max_size=9), max_size=8))
def test_posted_at_once_or_one_by_one(size: int, per_piece: int, batches: list[list[int]]) -> None:
    """The same entries, whatever pieces the queue is in and wherever its end is."""
    pieces = [PAGE * (1 + 2 * n) for n in range(-(-size // per_piece))]
    dumps = []
    for at_once in (True, False):
        with OwnedFd(os.memfd_create("guest")) as file:
            os.ftruncate(file.fileno(), MEMORY)
            memory = GuestMemory()
            memory.map(0, MEMORY, READ_WRITE, OwnedFd(os.dup(file.fileno())))
            queue = CompletionQueue(1, Ring(memory, pieces, per_piece, CQE_SIZE, size), 0, interrupts=False)
            for number, cids in enumerate(batches):
                cids = cids[: size - 1]
                if at_once:
                    queue.post_done(number, 1, cids)
                else:
                    for cid in cids:
                        queue.post(0, number, 1, cid, 0)
                queue.take_head(queue.tail)
            dumps.append((queue.tail, queue.phase, memory.read(0, MEMORY)))
            memory.unmap_all()
    assert dumps[0] == dumps[1]
