"""What holds for every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A test that is slow on a busy machine is not wrong; pytest's timeout ends one that hangs.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# A shell has whatever it starts with & ignore this, and so would every program that is interrupted here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def patient_controllers() -> Iterator[None]:
    """No NVMe command is interrupted because the machine is busy; test_nvme_workers has some that are."""
    from vfio_user.devices.nvme import execution, standstill  # only now: coverage is being measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "MAX_PATIENCE", standstill.QUIESCE_TIMEOUT)
        yield
