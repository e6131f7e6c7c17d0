"""A device at hand: what ``vfio-user shell`` offers, in few words and with names for places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from vfio_user.client import Client
from vfio_user.errors import UsageError
from vfio_user.tools import dump as dumping
from vfio_user.tools.info import gather
from vfio_user.tools.irq import Signal, Vectors, Watch, act
from vfio_user.tools.location import REGIONS, Extent, Location, Name, parse_place
from vfio_user.tools.registers import Registers
from vfio_user.wire.constants import IrqSetFlags

_IRQS = ("intx", "msi", "msix", "err", "req")


class Session:
    """A client, and the registers that have names. Lets go of interrupts when it is left; the client stays open."""

    def __init__(self, client: Client, registers: Registers) -> None:
        self.client = client
        self.registers = registers
        self.irq = Irqs(client)

    def read(self, place: str) -> int | bytes:
        """A register as a number, a range as bytes: read("bar0+0x4:u32"), read("config+0..")."""
        where = self._where(place)
        if isinstance(where, Extent):
            return b"".join(dumping.read_pieces(self.client, where))
        return int.from_bytes(self.client.region_read(where.region, where.offset, where.width), "little")

    def write(self, place: str, value: int | bytes | bytearray | memoryview) -> None:
        """Write a number to a register, or bytes from a place on: write("config.command", 6)."""
        where = self._where(place)
        if not isinstance(value, int):
            start = where.start if isinstance(where, Extent) else where.offset
            self.client.region_write(where.region, start, value)
            return
        if isinstance(where, Extent):
            raise UsageError(f"{place} is a range, which takes bytes")
        if value < 0:
            raise UsageError(f"{value} is negative: registers hold none")
        dumping.write_number(self.client, where, value)

    def dump(self, place: str) -> Iterator[str]:
        """A range in lines of sixteen bytes: dump("config+0..0x40"), dump("bar0+0..0x20:u32")."""
        where = self._where(place)
        if isinstance(where, Location):
            where = Extent(where.region, where.offset, where.offset + where.width, where.width)
        return dumping.lines(dumping.read_pieces(self.client, where), where.start, where.width)

    def info(self) -> dict[str, Any]:
        """All that the device says of itself."""
        return gather(self.client)

    def places(self) -> list[str]:
        """What may be written for a place: registers with a name, and the regions that there are."""
        regions = [name for name, index in REGIONS.items() if index < len(self.client.regions)]
        return [*self.registers.names(), *(name for name in regions if self.client.regions[REGIONS[name]].size), *_IRQS]

    def _where(self, text: str) -> Location | Extent:
        place = parse_place(text)
        return self.registers.find(place) if isinstance(place, Name) else place

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.irq.release()


class Irqs:
    """The interrupts of a device: irq.watch("msi"), irq.wait(), irq.trigger("msi:0"), irq.mask("msi")."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._held = ExitStack()
        self._watch: Watch | None = None

    def watch(self, *vectors: str) -> None:
        """Have an eventfd for each of these, in place of those before: watch("intx"), watch("msix:0-3", "err")."""
        wanted = [Vectors.parse(text) for text in vectors]
        self.release()
        self._watch = self._held.enter_context(Watch(self._client, wanted))

    def wait(self, count: int = 1, seconds: float = 1.0) -> Sequence[Signal]:
        """The signals of watched vectors, until there were ``count`` of them or so many seconds are over."""
        if self._watch is None:
            raise UsageError('nothing is watched: irq.watch("intx") first')
        return list(self._watch.until(count, seconds))

    def trigger(self, vectors: str) -> None:
        """Have the server signal them, as the device would."""
        self._act(IrqSetFlags.ACTION_TRIGGER, vectors)

    def mask(self, vectors: str) -> None:
        """Hold them back until they are unmasked."""
        self._act(IrqSetFlags.ACTION_MASK, vectors)

    def unmask(self, vectors: str) -> None:
        """Let them through again."""
        self._act(IrqSetFlags.ACTION_UNMASK, vectors)

    def release(self) -> None:
        """Watch none."""
        self._held.close()
        self._watch = None

    def _act(self, action: IrqSetFlags, text: str) -> None:
        wanted = Vectors.parse(text)
        act(self._client, action, wanted.index, wanted.of(self._client))
