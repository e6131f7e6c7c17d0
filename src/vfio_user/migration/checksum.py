"""The checksum of all that is saved or moves: zlib's CRC-32, by the fastest code that is installed.

Of 1 MiB, zlib takes as long as a socket takes to move it; zlib-ng, which uses the processor's carry-less
multiplication, a tenth of that. Both give the same value, so two hosts need not have the same one.
"""

from __future__ import annotations

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:  # there is no wheel of it for every processor
    from zlib import crc32

__all__ = ["crc32"]
