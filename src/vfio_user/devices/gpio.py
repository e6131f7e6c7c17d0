"""PCI-IDIO-16, the sample that both libvfio-user and the Rust crate ship: a digital input card of ACCES I/O.

Not migratable: it shows how a device without migration refuses it.
"""

from __future__ import annotations

from vfio_user.device import Bar, Device, register, state
from vfio_user.server.backend import Irq
from vfio_user.wire.constants import PCI_NUM_IRQS, MigrationFlags, PciIrq


class Gpio(Device):
    """Every third read of the input pins gives 1 and raises the interrupt; all else reads 0."""

    vendor_id, device_id, class_code = 0x494F, 0x0DC8, 0xFFFF00
    bars = {2: Bar(0x100, io=True)}
    intx = True
    migration = MigrationFlags(0)
    inputs = register(0, bar=2, width=1)
    reads = state(0)

    def __init__(self) -> None:
        super().__init__()
        # As recorded from the Rust sample: an interrupt at INTx, and nothing at any other index.
        self.irqs = [Irq(1)] + [Irq(0, 0)] * (PCI_NUM_IRQS - 1)
        self.on_reset()

    def on_reset(self) -> None:
        """As recorded: I/O space enabled, interrupt line 1."""
        self.config.set("command", 1)
        self.config.set("interrupt_line", 1)

    @inputs.on_read
    def _sample(self) -> int:
        self.reads += 1
        third = self.reads % 3 == 0
        if third:
            self.irq.fire(PciIrq.INTX)
        return int(third)
