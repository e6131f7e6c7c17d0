"""What people see of a migration: numbers, the report, the progress display."""

from __future__ import annotations

import io
import math
from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vfio_user.cli.progress import follow, picture, render
from vfio_user.live import LocalDestination, Migration, Report, Round, Status, Step
from vfio_user.live.progress import Progress, Watch, time_to_go
from vfio_user.live.text import clean, duration, facts, rate, report_text, round_line, size, verdict

PAGE = 4096


def a_round(number: int, pages: int = 100, left: int = 10, *, stopped: bool = False, seconds: float = 0.5) -> Round:
    downtime = 0.0 if stopped else left / pages * seconds
    return Round(number, pages, pages * PAGE, 7, seconds, 0 if stopped else left, downtime, stopped)


# Numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (100 << 30, "100.0 GiB"),
        (5000 << 40, "5,000.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
    assert rate(count) == f"{text}/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 µs"),
        (4e-7, "0.4 µs"),
        (9.94e-5, "99.4 µs"),
        (9.96e-5, "0.10 ms"),
        (0.0312, "31 ms"),
        (0.9996, "1.0 s"),
        (59.96, "0:01:00"),
        (3723, "1:02:03"),
        (math.inf, "for ever"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e18), st.floats(0, 1e18))
def test_a_longer_time_is_never_written_in_a_smaller_unit(one: float, other: float) -> None:
    units = ["µs", "ms", "s"]

    def rank(seconds: float) -> int:
        unit = duration(seconds).rpartition(" ")[2]
        return units.index(unit) if unit in units else len(units)

    assert rank(min(one, other)) <= rank(max(one, other))


@given(st.text())
def test_what_a_peer_says_cannot_drive_a_terminal(text: str) -> None:
    assert clean(text).isprintable()
    assert clean(f"{text} end").endswith("end")


# The report


def test_the_verdict_says_which_side_runs() -> None:
    assert verdict(Report(Status.COMPLETED, Step.START)) == "completed: the destination runs"
    assert verdict(Report(Status.FAILED, Step.LOAD)) == "failed at load: the source is as it was"
    unconfirmed = verdict(Report(Status.UNCONFIRMED, Step.START))
    assert unconfirmed == "unconfirmed at start: the destination may run, the source stays stopped"


def test_the_report_as_text() -> None:
    rounds = [a_round(1), a_round(2, 10, 1), a_round(3, 1, stopped=True)]
    report = Report(Status.COMPLETED, Step.START, None, rounds, 21, 0.0312, 1.5)
    assert report_text(report).splitlines() == [
        "completed: the destination runs",
        "  rounds        3",
        "  pages sent    111, 11 of them again",
        "  memory        444.0 KiB",
        "  device state  21 bytes",
        "  downtime      31 ms",
        "  total         1.5 s",
        "      round  pages     memory   device    time    bandwidth  dirty again  pages/s  downtime",
        "          1    100  400.0 KiB  7 bytes  500 ms  800.0 KiB/s           10       20     50 ms",
        "          2     10   40.0 KiB  7 bytes  500 ms   80.0 KiB/s            1        2     50 ms",
        "3 (stopped)      1    4.0 KiB  7 bytes  500 ms    8.0 KiB/s",
    ]


def test_the_report_of_what_failed_at_once_has_its_reason_and_no_table() -> None:
    report = Report(error="identity differs:\n\x1b[31mred")
    assert ("reason", "identity differs: [31mred") in facts(report)
    assert "round  " not in report_text(report)


def test_a_round_without_memory_says_what_it_moved() -> None:
    assert round_line(Round(1, 0, 0, 2048, 0.001, 0, 0.0)).startswith("round 1: 2.0 KiB of device state in 1.00 ms")
    assert round_line(Round(2, 0, 0, 0, 0.0, 0, 0.0, True)) == (
        "round 2 (stopped): 0 bytes of device state in 0 µs, 0 bytes/s"
    )


def on_a_terminal(width: int, *, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [72, 80, 120])
@pytest.mark.parametrize("count", [0, 1, 20, 21, 1000])
def test_the_report_fits_a_terminal(width: int, count: int) -> None:
    rounds = [a_round(number, 26_214_400, 1_000_000) for number in range(1, count + 1)]
    console = on_a_terminal(width)
    console.print(render(Report(error="[bold]why[/bold] " * 20, rounds=rounds)))
    text = printed(console)
    assert max(map(len, text.splitlines())) <= width
    assert "[bold]why[/bold]" in text
    assert "…" not in text
    assert ("pages/s" in text) is (count > 0 and width == 120)
    assert (f"{count - 20:,} more" in text) is (count > 20)
    assert text.count("1,000,000") == min(count, 20)


# How far it is


def convergence(left: float, rate: float, dirty_rate: float, downtime: float, rounds: int) -> float:
    """Round after round, as it would happen."""
    now = 0.0
    for _ in range(rounds):
        seconds = left / rate
        now, left = now + seconds, dirty_rate * seconds
        if left / rate <= downtime:
            return now
    return math.inf


@given(
    pages=st.integers(1, 1 << 30),
    rate_=st.floats(1, 1e9),
    dirty_rate=st.floats(0, 1e9),
    downtime=st.floats(1e-3, 10),
    rounds=st.integers(1, 60),
)
def test_time_to_go_is_that_of_the_rounds_to_come(
    pages: int, rate_: float, dirty_rate: float, downtime: float, rounds: int
) -> None:
    found = time_to_go(pages, pages=pages, rate=rate_, dirty_rate=dirty_rate, downtime=downtime, rounds=rounds)
    expected = convergence(pages, rate_, dirty_rate, downtime, rounds)
    if math.isinf(expected) != math.isinf(found):  # on the edge, where a rounding of the last digit decides
        nudged = [convergence(pages, rate_, dirty_rate, downtime * by, rounds) for by in (1 - 1e-9, 1 + 1e-9)]
        assert math.isinf(nudged[0]) != math.isinf(nudged[1])
    elif not math.isinf(expected):
        assert found >= expected * (1 - 1e-6)


def test_time_to_go_counts_what_is_left_of_this_round_and_all_of_the_next() -> None:
    def to_go(left: float) -> float:
        return time_to_go(left, pages=1000, rate=100, dirty_rate=50, downtime=1.0, rounds=10)

    assert to_go(1000) == 10 + 5 + 2.5 + 1.25  # 0.625 s for the rest
    assert to_go(100) == 1 + 5 + 2.5 + 1.25
    assert time_to_go(1000, pages=1000, rate=100, dirty_rate=200, downtime=1.0, rounds=3) == math.inf
    assert time_to_go(1000, pages=1000, rate=100, dirty_rate=200, downtime=1.0, rounds=3, force=True) == 70
    assert time_to_go(1000, pages=1000, rate=0, dirty_rate=200, downtime=1.0, rounds=3) == math.inf


class FakeMigration(Migration):
    """One that is where the test says."""

    def __init__(self, pages: int, downtime: float = 0.05) -> None:
        super().__init__([], LocalDestination([]), downtime=downtime)
        self.left = pages

    @property
    def pages_left(self) -> int:
        return self.left


def test_a_watch_tells_the_rate_of_the_round_at_work() -> None:
    migration, now = FakeMigration(1000, downtime=0.5), [0.0]
    watch = Watch(migration, lambda: now[0])
    first = watch.look()
    assert (first.number, first.left, first.share) == (1, 1000, 0.0)
    assert (first.bandwidth, first.dirty_rate, first.to_go) == (None, None, None)

    now[0], migration.left = 100.0, 1000  # checks took their time: that is none of the rate
    watch.look()
    now[0], migration.left = 102.0, 800
    later = watch.look()
    assert later.share == pytest.approx(0.2)
    assert (later.bandwidth, later.to_go) == (100 * PAGE, 8.0)

    migration.report.rounds.append(Round(1, 1000, 1000 * PAGE, 0, 10.0, 400, 4.0))
    now[0], migration.left = 110.0, 300
    second = watch.look()
    assert (second.number, second.pages, second.share) == (2, 400, 0.25)
    assert (second.bandwidth, second.dirty_rate, second.downtime) == (100 * PAGE, 40.0, 4.0)
    assert second.to_go == pytest.approx(3 + 1.6 + 0.64)  # 0.256 s for the rest


def test_a_watch_of_a_guest_that_stands_still_tells_the_rest() -> None:
    migration, now = FakeMigration(1000), [0.0]
    migration.report.rounds.append(Round(1, 1000, 1000 * PAGE, 0, 10.0, 400, 4.0))
    migration.report.step = Step.STOP_COPY
    migration.left = 450
    watched = Watch(migration, lambda: now[0]).look()
    assert (watched.pages, watched.to_go) == (450, 4.5)


@pytest.mark.parametrize(
    "progress",
    [
        Progress(Step.CHECK, 1, 0, 0, PAGE, None, None, None, None),
        Progress(Step.PRE_COPY, 1, 1000, 250, PAGE, 1e6, None, None, 3.0),
        Progress(Step.PRE_COPY, 9, 1000, 250, PAGE, 1e6, 9e9, 4e9, math.inf),
        Progress(Step.STOP_COPY, 10, 1000, 0, PAGE, 1e6, 5.0, 4.0, 0.0),
    ],
)
def test_the_picture_of_a_moment(progress: Progress) -> None:
    console = on_a_terminal(80)
    console.print(picture(progress, 0.05))
    text = printed(console)
    assert f"{progress.step}, round {progress.number}" in text
    assert f"{progress.share:.0%}" in text
    assert ("does not converge" in text) is (progress.to_go == math.inf)
    assert ("50 ms are allowed" in text) is (progress.number == 9)
    assert max(map(len, text.splitlines())) <= 80


class Scripted(FakeMigration):
    def run(self) -> Generator[Round, None, None]:
        for number in range(1, 4):
            done = a_round(number, stopped=number == 3)
            self.report.rounds.append(done)
            yield done
        if self.left:
            raise KeyboardInterrupt


def test_following_without_a_terminal_is_a_line_per_round() -> None:
    console = on_a_terminal(40, terminal=False)
    follow(Scripted(0), console)
    lines = printed(console).splitlines()
    assert [line.split(":")[0] for line in lines] == ["round 1", "round 2", "round 3 (stopped)"]
    assert lines[0] == "round 1: 100 pages in 500 ms, 800.0 KiB/s; 10 dirty again, downtime 50 ms"


def test_following_quietly_prints_nothing() -> None:
    console = Console(file=io.StringIO(), quiet=True)
    migration = Scripted(0)
    follow(migration, console)
    assert (len(migration.report.rounds), printed(console)) == (3, "")


def test_an_interrupt_gives_the_terminal_back() -> None:
    console = on_a_terminal(80)
    with pytest.raises(KeyboardInterrupt):
        follow(Scripted(1), console)
    text = printed(console)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert "round 2: 100 pages" in text
