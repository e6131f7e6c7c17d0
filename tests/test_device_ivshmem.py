"""gpio and ivshmem, as a client has them."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

import pytest

from vfio_user import Client
from vfio_user.devices import BUILT_IN, built_in
from vfio_user.devices.gpio import Gpio
from vfio_user.devices.ivshmem import Ivshmem
from vfio_user.errors import CommandError
from vfio_user.wire.constants import DeviceState, FeatureFlags, IoFdType, IrqSetFlags, PciIrq, RegionFlags

from .device_support import TIMEOUT, attached, events, guest_memory, serving

ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
DOORBELL = 12
MIB = 1 << 20


def ring(client: Client, peer: int, vector: int, size: int = 4) -> None:
    client.region_write(0, DOORBELL, (peer << 16 | vector).to_bytes(8, "little")[:size])


def test_built_in_devices_by_name() -> None:
    assert set(BUILT_IN) == {"edu", "gpio", "ivshmem", "nvme"}
    assert all(built_in(name).__name__ == class_name for name, class_name in BUILT_IN.items())
    with pytest.raises(KeyError):
        built_in("nothing")


class TestGpio:
    def test_what_it_is(self) -> None:
        with attached(Gpio()) as gpio:
            assert gpio.region_read(7, 0, 16).hex() == "4f49c80d010000000000ffff00000000"
            assert gpio.region_read(7, 0x3C, 2) == b"\1\1"
            assert [region.size for region in gpio.regions] == [0, 0, 0x100, 0, 0, 0, 0, 0x100, 0]
            gpio.region_write(7, 0x18, b"\xff" * 4)
            assert gpio.region_read(7, 0x18, 4) == b"\x01\xff\xff\xff"

    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_every_third_read_gives_1_and_interrupts(self, size: int) -> None:
        with attached(Gpio()) as gpio, events(1) as (event,):
            gpio.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])
            for _ in range(3):
                seen = [(gpio.region_read(2, 0, size), event.take()) for _ in range(3)]
                assert seen == [(bytes(size), 0), (bytes(size), 0), (b"\1".ljust(size, b"\0"), 1)]
                assert gpio.region_read(2, 1, size) == bytes(size)  # other offsets do not count

    def test_writes_are_ignored_and_a_reset_starts_over(self) -> None:
        with attached(Gpio()) as gpio:
            gpio.region_write(2, 0, b"\xff" * 8)
            assert [gpio.region_read(2, 0, 1)[0] for _ in range(2)] == [0, 0]
            gpio.reset()
            assert [gpio.region_read(2, 0, 1)[0] for _ in range(3)] == [0, 0, 1]
            assert gpio.region_read(7, 4, 1) == b"\1"

    def test_an_index_without_interrupts_refuses_them(self) -> None:
        with attached(Gpio()) as gpio, events(1) as (event,):
            with pytest.raises(CommandError):
                gpio.set_irqs(PciIrq.MSI, ASSIGN, 0, 1, [event.fd])
            gpio.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])

    def test_it_refuses_everything_of_migration_and_works_on(self) -> None:
        with attached(Gpio()) as gpio, guest_memory(4096) as memory:
            gpio.dma_map(0, 4096, memory)
            refused: list[Callable[[], object]] = [
                gpio.migration_flags,
                gpio.migration_get_state,
                *(lambda state=state: gpio.migration_set_state(state) for state in range(9)),
                *(lambda f=f, o=o: gpio.device_feature(f | o, bytes(24)) for f in range(12) for o in FeatureFlags),
                gpio.migration_data_size,
                lambda: gpio.migration_read_data(16),
                lambda: gpio.migration_write_data(b"data"),
                lambda: gpio.dma_logging_start(4096),
                gpio.dma_logging_stop,
                lambda: gpio.dma_logging_report(0, 4096, 4096),
                lambda: gpio.dma_unmap(0, 4096, page_size=4096),
            ]
            for call in refused:
                with pytest.raises(CommandError) as caught:
                    call()
                assert caught.value.errno == errno.EINVAL
            assert not any(gpio.probe(feature) for feature in range(12))
            assert [gpio.region_read(2, 0, 1)[0] for _ in range(3)] == [0, 0, 1]
            gpio.dma_unmap(0, 4096)
            gpio.reset()

    def test_a_client_that_comes_back_finds_the_count_where_it_was(self) -> None:
        with serving(Gpio()) as path, events(1) as (event,):
            with Client.connect(path, TIMEOUT) as gpio:
                gpio.set_irqs(PciIrq.INTX, ASSIGN, 0, 1, [event.fd])
                assert [gpio.region_read(2, 0, 1)[0] for _ in range(2)] == [0, 0]
            with Client.connect(path, TIMEOUT) as gpio:
                assert gpio.region_read(2, 0, 1) == b"\1"
                assert event.take() == 0  # the eventfd went with the client that gave it


class TestIvshmem:
    def test_what_it_is(self) -> None:
        with attached(Ivshmem(size=MIB, vectors=3)) as ivshmem:
            assert ivshmem.region_read(7, 0, 4).hex() == "f41a1011"
            assert ivshmem.region_read(7, 8, 4).hex() == "01000005"
            assert [region.size for region in ivshmem.regions] == [0x100, 0x1000, MIB, 0, 0, 0, 0, 0x100, 0]
            assert [irq.count for irq in ivshmem.irqs] == [0, 0, 3, 1, 1]
            assert ivshmem.regions[2].flags == RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
            assert ivshmem.regions[2].sparse_areas == ()
            assert [ivshmem.region_read(0, offset, 4) for offset in (0, 4, 8, 12)] == [bytes(4)] * 4

    @pytest.mark.parametrize("trapped", [0, 1, 4096, 8192])
    def test_mapped_memory_is_the_memory_of_the_messages(self, trapped: int) -> None:
        rng = random.Random(trapped)
        with attached(Ivshmem(size=MIB, trapped=trapped)) as ivshmem:
            first = -(-trapped // 4096) * 4096
            (area,) = ivshmem.regions[2].map()
            assert (area.offset, area.size) == (first, MIB - first)
            assert ivshmem.regions[2].sparse_areas == (((first, MIB - first),) if trapped else ())
            data = rng.randbytes(MIB)
            ivshmem.region_write(2, 0, data)
            assert bytes(area.memory) == data[first:]
            area.memory[5:10] = b"hello"
            assert (
                ivshmem.region_read(2, first, 16) == data[first : first + 5] + b"hello" + data[first + 10 : first + 16]
            )
            assert ivshmem.region_read(2, 0, first) == data[:first]

    def test_the_memory_outlives_client_and_reset(self) -> None:
        with serving(Ivshmem(size=MIB)) as path:
            with Client.connect(path, TIMEOUT) as ivshmem:
                ivshmem.regions[2].map()[0].memory[:4] = b"kept"
                ivshmem.reset()
            with Client.connect(path, TIMEOUT) as ivshmem:
                assert ivshmem.region_read(2, 0, 4) == b"kept"

    def test_a_client_cannot_resize_the_memory(self) -> None:
        with attached(Ivshmem(size=MIB)) as ivshmem:
            fd = ivshmem.regions[2].fd
            assert fd is not None
            for size in (0, 2 * MIB):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd.fileno(), size)

    def test_the_doorbell_register(self) -> None:
        with attached(Ivshmem(size=MIB, vectors=3)) as ivshmem, events(3) as bells:
            ivshmem.set_irqs(PciIrq.MSIX, ASSIGN, 0, 3, [bell.fd for bell in bells])
            ring(ivshmem, 0, 2)
            ring(ivshmem, 0, 0)
            assert [bell.take() for bell in bells] == [1, 0, 1]
            ring(ivshmem, 0, 3)  # no such vector
            ring(ivshmem, 1, 1)  # no such peer
            assert [bell.take() for bell in bells] == [0, 0, 0]
            for size in (1, 2, 8):  # as in QEMU: what is not written of the register is 0
                ring(ivshmem, 0, 1, size)
                assert [bell.take() for bell in bells] == [0, 1, 0]
            assert ivshmem.region_read(0, DOORBELL, 4) == bytes(4)

    def test_the_doorbell_as_ioeventfds(self) -> None:
        with attached(Ivshmem(size=MIB, vectors=3)) as ivshmem, events(3) as bells:
            ivshmem.set_irqs(PciIrq.MSIX, ASSIGN, 0, 3, [bell.fd for bell in bells])
            doorbells = ivshmem.region_io_fds(0)
            assert [(d.type, d.offset, d.size, d.datamatch) for d in doorbells] == [
                (IoFdType.IOEVENTFD, DOORBELL, 4, vector) for vector in range(3)
            ]
            for vector in (2, 0, 1):
                fd = doorbells[vector].fd
                assert fd is not None
                os.eventfd_write(fd.fileno(), 1)
                assert bells[vector].wait() == 1
            assert [bell.take() for bell in bells] == [0, 0, 0]
            for doorbell in doorbells:
                assert doorbell.fd is not None
                doorbell.fd.close()
            assert ivshmem.region_io_fds(2) == ()

    def test_a_doorbell_that_was_rung_early_is_heard_with_the_first_eventfd(self) -> None:
        with attached(Ivshmem(size=MIB, vectors=2)) as ivshmem, events(1) as (bell,):
            ring(ivshmem, 0, 1)
            assert ivshmem.region_read(1, 2048, 8) == b"\2" + bytes(7)  # the pending bit
            ivshmem.set_irqs(PciIrq.MSIX, ASSIGN, 1, 1, [bell.fd])
            assert bell.take() == 1
            assert ivshmem.region_read(1, 2048, 8) == bytes(8)

    def test_doorbells_still_ring_for_the_next_client(self) -> None:
        with serving(Ivshmem(size=MIB)) as path:
            for _ in range(3):
                with Client.connect(path, TIMEOUT) as ivshmem, events(1) as (bell,):
                    ivshmem.set_irqs(PciIrq.MSIX, ASSIGN, 0, 1, [bell.fd])
                    (doorbell,) = ivshmem.region_io_fds(0)
                    assert doorbell.fd is not None
                    with doorbell.fd as fd:
                        os.eventfd_write(fd.fileno(), 1)
                        assert bell.wait() == 1

    def test_a_doorbell_that_was_rung_just_before_the_device_stops_migrates(self) -> None:
        source, target = Ivshmem(size=MIB, vectors=3), Ivshmem(size=MIB, vectors=3)
        os.eventfd_write(source.regions[0].io_fds[2].fd, 1)
        with attached(target) as client:
            client.migration_set_state(DeviceState.STOP)
            client.migration_set_state(DeviceState.RESUMING)
            source.migration_set_state(DeviceState.STOP_COPY)
            stream = memoryview(bytearray(source.migration_data_size() + 1))
            client.migration_write_data(stream[: source.migration_read_data(stream)])
            client.migration_set_state(DeviceState.RUNNING)
            assert client.region_read(1, 2048, 8) == b"\4" + bytes(7)

    def test_the_msix_table_holds_what_is_written(self) -> None:
        with attached(Ivshmem(size=MIB, vectors=2)) as ivshmem:
            assert ivshmem.region_read(1, 0, 16) == bytes(12) + b"\1\0\0\0"
            ivshmem.region_write(1, 16, bytes(range(16)))
            assert ivshmem.region_read(1, 16, 16) == bytes(range(12)) + bytes(4)
            ivshmem.region_write(1, 2048, b"\xff" * 8)  # pending bits are read-only
            assert ivshmem.region_read(1, 2048, 8) == bytes(8)
            ivshmem.reset()
            assert ivshmem.region_read(1, 16, 16) == bytes(12) + b"\1\0\0\0"

    def test_as_many_vectors_as_there_can_be(self) -> None:
        with attached(Ivshmem(size=MIB, vectors=2048)) as ivshmem, events(1) as (bell,):
            ivshmem.set_irqs(PciIrq.MSIX, ASSIGN, 2047, 1, [bell.fd])
            ring(ivshmem, 0, 2047)
            assert bell.take() == 1
            doorbells = ivshmem.region_io_fds(0)
            assert len(doorbells) == 253  # as many as one message carries; the register rings them all
            for doorbell in doorbells:
                assert doorbell.fd is not None
                doorbell.fd.close()

    @pytest.mark.parametrize(
        "options",
        [
            {"size": 0},
            {"size": -4096},
            {"size": 2048},
            {"size": 3 * MIB},
            {"size": 1 << 64},
            {"size": 4096, "trapped": 4096},
            {"size": 4096, "trapped": 4097},
            {"trapped": -1},
            {"trapped": -4096},
            {"trapped": 1 << 20, "size": 1 << 20},
            {"vectors": 0},
            {"vectors": -1},
            {"vectors": 2049},
        ],
        ids=str,
    )
    def test_options_that_cannot_be(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=r"size|trapped|vectors"):
            Ivshmem(**options)

    @pytest.mark.parametrize(
        ("text", "size"), [("4096", 4096), ("0x1000", 4096), ("4K", 4096), ("1m", MIB), ("1M", MIB), ("1G", 1 << 30)]
    )
    def test_sizes_as_text(self, text: str, size: int) -> None:
        assert Ivshmem.declared_options["size"].parse(text) == size

    @pytest.mark.parametrize("text", ["", "M", "4Q", "1.5M", "4MM", "4 M K", "four"])
    def test_sizes_that_are_none(self, text: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011
            Ivshmem.declared_options["size"].parse(text)
