"""What holds for every test."""

from __future__ import annotations

import signal

from hypothesis import settings

# A test that is slow on a busy machine is not wrong; pytest's timeout ends one that hangs.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# A shell has whatever it starts with & ignore this, and so would every program that is interrupted here.
signal.signal(signal.SIGINT, signal.default_int_handler)
