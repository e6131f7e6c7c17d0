"""Fuzz with atheris: ``python -m fuzz.run server|client [options of libFuzzer] [corpus folder]``."""

from __future__ import annotations

import importlib
import sys

import atheris


def main() -> None:
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["vfio_user"]):
        target = importlib.import_module(f"fuzz.{name}")
    atheris.Setup(sys.argv, lambda data: target.run(bytes(data)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
