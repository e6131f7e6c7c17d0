"""How long things took: counted in memory that does not grow, and written for people."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

_SUB_BITS = 3
"""Each power of two of nanoseconds has 2**3 buckets: a latency is known to an eighth."""
_SUB = 1 << _SUB_BITS
_BUCKETS = 64 * _SUB


class Histogram:
    """Counts durations in nanoseconds, in memory that does not grow."""

    def __init__(self) -> None:
        self._buckets = [0] * _BUCKETS
        self.max = 0

    def add(self, duration: int) -> None:
        """Count one duration."""
        self._buckets[min(_bucket(duration), _BUCKETS - 1)] += 1
        if duration > self.max:
            self.max = duration

    def quantiles(self, shares: Iterable[float]) -> list[int]:
        """For each share, 0 to 1, the nanoseconds that such a part of the durations did not exceed; 0 without any."""
        counts = list(accumulate(self._buckets))  # a copy: another thread may be counting
        total = counts[-1]
        return [
            min(self.max, next((_highest(i) for i, count in enumerate(counts) if count >= max(1, share * total)), 0))
            for share in shares
        ]


def _bucket(duration: int) -> int:
    shift = max(0, duration.bit_length() - _SUB_BITS - 1)
    return (shift << _SUB_BITS) + (duration >> shift)


def _highest(bucket: int) -> int:
    """The longest duration that a bucket counts."""
    shift = max(0, (bucket >> _SUB_BITS) - 1)
    return ((bucket - (shift << _SUB_BITS) + 1) << shift) - 1


_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def duration(seconds: float) -> str:
    """A time with the unit that suits it, three digits at least."""
    unit, size = next((row for row in _UNITS if seconds >= row[1]), _UNITS[-1])
    value = seconds / size
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
