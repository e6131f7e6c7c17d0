"""What of a device goes into its migration stream, besides the memory of its BARs, and how it comes out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from vfio_user.device.declarations import restored_values, saved_values

if TYPE_CHECKING:
    from vfio_user.device.device import Device
    from vfio_user.migration import LoadedStream


class Contents(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a device, part by part."""

    config: dict[str, bytes]
    interrupts: dict[str, Any]
    msix: bytes
    registers: dict[str, bytes]
    fields: dict[str, Any]
    device: dict[str, Any]


def collect(device: Device) -> dict[str, object]:
    """All of a device's state but the memory of its BARs, as the stream has it."""
    registers = {name: value for file in device.registers.values() for name, value in file.save().items()}
    return msgspec.structs.asdict(
        Contents(
            config=device.config.save(),
            interrupts=dict(device.irq.save()),
            msix=device.msix.save() if device.msix else b"",
            registers=registers,
            fields=saved_values(device.declared_state, device),
            device=device.save(),
        )
    )


def apply(device: Device, collected: dict[str, object], loaded: LoadedStream) -> None:
    """Make ``device`` what :func:`collect` of such a one gave. Raises ValueError, and may then have done half of it."""
    try:
        contents = msgspec.convert(collected, Contents)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    complete = loaded.state_version == device.state_version
    values = restored_values(device.declared_state, contents.fields, complete=complete)
    device.config.load(contents.config, complete=complete)
    device.load_interrupts(contents.interrupts)
    if device.msix:
        device.msix.load(contents.msix)
    _load_registers(device, contents.registers, complete)
    for name, value in values.items():
        setattr(device, name, value)
    device.load(contents.device, loaded.pre_copy)


def _load_registers(device: Device, saved: dict[str, bytes], complete: bool) -> None:
    if unknown := saved.keys() - device.declared_registers.keys():
        raise ValueError(f"unknown registers: {', '.join(sorted(unknown))}")
    for file in device.registers.values():
        own = {register.name for register in file}
        file.load({name: value for name, value in saved.items() if name in own}, complete=complete)
