"""Durations: counted, and written for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import histogram as histogram_module
from vfio_user.histogram import Histogram
from vfio_user.histogram import duration as format_duration


@given(st.lists(st.integers(0, 1 << 70), min_size=1), st.floats(0, 1))
def test_a_quantile_is_at_most_an_eighth_too_high(durations: list[int], share: float) -> None:
    histogram = Histogram()
    for nanoseconds in durations:
        histogram.add(nanoseconds)
    (found,) = histogram.quantiles([share])
    ordered = sorted(durations)
    exact = next(value for rank, value in enumerate(ordered, 1) if rank >= share * len(ordered))
    assert histogram.max == ordered[-1]
    if exact < 1 << 60:
        assert exact <= found <= exact + exact // 8


@given(st.integers(0, 1 << 62))
def test_buckets_are_in_order_and_hold_what_they_say(duration: int) -> None:
    bucket = histogram_module._bucket(duration)
    assert histogram_module._highest(bucket) >= duration
    assert histogram_module._bucket(histogram_module._highest(bucket)) == bucket
    assert histogram_module._bucket(histogram_module._highest(bucket) + 1) == bucket + 1


def test_a_histogram_of_nothing() -> None:
    assert Histogram().quantiles([0, 0.5, 1]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.00 us"), (4.2e-7, "0.42 us"), (1.234e-5, "12.3 us"), (0.5, "500 ms"), (1.0, "1.00 s"), (75.25, "75.2 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
