"""Certificates for tests of TLS."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("source", "destination", "stranger")


def make_certificates(folder: Path, *, host: str | None = None) -> Path:
    """A key and a self-signed certificate for each of NAMES, in ``folder``: for ``host``, else for a host of that name.

    Skips the test where nothing can make them.
    """
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    for name in NAMES:
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
            f" -addext subjectAltName=DNS:{host or name} -keyout {name}.key -out {name}.crt".split(),
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=60,
        )
    return folder
