"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# A test that is slow on a busy machine is not wrong; pytest's timeout ends one that hangs.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
