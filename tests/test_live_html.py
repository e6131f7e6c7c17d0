"""The report as a page: what it says, where its lines are, and what a browser makes of it."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.live import Report, Round, Status, Step
from vfio_user.live.html import HEIGHT, WIDTH, decades, nice_ticks, report_html

PAGE = 4096
HOSTILE = "</style><script>alert(1)</script>\"'&<svg onload=x>\x1b[31m"


def report(count: int, *, stopped: bool = True, status: Status = Status.COMPLETED, shrink: float = 0.5) -> Report:
    """Rounds of a 100 GiB guest, each by the factor ``shrink`` smaller than the one before; with a zigzag."""
    rounds, pages = [], 26_214_400
    for number in range(1, count + 1):
        last = stopped and number == count
        left = 0 if last else max(int(pages * shrink) + number % 7, 300)
        seconds = pages * PAGE / (1.1 + 0.1 * (number % 3)) / 2**30
        rounds.append(Round(number, pages, pages * PAGE, 0, seconds, left, left / pages * seconds, last))
        pages = left
    step = Step.START if status is not Status.FAILED else Step.PRE_COPY
    error = None if status is Status.COMPLETED else f"it does not converge: {HOSTILE}"
    downtime = 0.0412 if status is Status.COMPLETED else 0.0
    return Report(status, step, error, rounds, 1 << 20, downtime, sum(done.seconds for done in rounds))


REPORTS = {
    "nothing": report(0, status=Status.FAILED),
    "one round": report(1, status=Status.UNCONFIRMED),
    "completed": report(9, shrink=0.2),
    "failed": report(30, stopped=False, status=Status.FAILED, shrink=1.0),
    "a thousand": report(1000, shrink=0.9),
    "no memory": Report(
        Status.COMPLETED,
        Step.START,
        None,
        [Round(1, 0, 0, 0, 0.0, 0, 0.0), Round(2, 0, 0, 9, 0.1, 0, 0.0, True)],
        9,
        0.2,
    ),
}


class Page(HTMLParser):
    """What is in a page, and whether its elements are closed in their order."""

    VOID = {"meta", "line", "circle", "polyline"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag != "meta" and not (self.get_starttag_text() or "").endswith("/>"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def places(page: Page) -> Iterator[tuple[float, float]]:
    """Where something is in the pictures."""
    for tag, attributes in page.elements:
        if tag == "polyline":
            for point in attributes["points"].split():
                x, y = point.split(",")
                yield float(x), float(y)
        elif tag == "line":
            yield float(attributes["x1"]), float(attributes["y1"])
            yield float(attributes["x2"]), float(attributes["y2"])
        elif tag == "circle":
            yield float(attributes["cx"]), float(attributes["cy"])
        elif tag == "text":
            yield float(attributes["x"]), float(attributes["y"])


def expect_inside(page: Page) -> None:
    for x, y in places(page):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("allowed", [None, 0.0, 0.05, 1000.0])
def test_every_page_is_whole_and_its_lines_are_in_the_picture(name: str, allowed: float | None) -> None:
    one = REPORTS[name]
    page = Page(report_html(one, allowed=allowed))
    expect_inside(page)
    assert len(page.all("svg")) == (3 if one.rounds else 0)
    assert len(page.all("tr")) == (1 + len(one.rounds) if one.rounds else 0)
    assert len(page.all("li")) == len(Step)
    for polyline in page.all("polyline"):
        assert len(polyline["points"].split()) >= len(one.rounds) - 1


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = report_html(REPORTS["completed"])
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "section", "p", "dl", "dt", "dd", "ol",
        "li", "figure", "figcaption", "span", "svg", "line", "text", "polyline", "circle", "div", "table", "thead",
        "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert not {name for _, attributes in page.elements for name in attributes if name.startswith("on")}
    assert not re.search(r"https?:|url\(|@import|src=|href=", text)


@given(st.text(), st.text())
def test_what_comes_from_elsewhere_is_text(title: str, error: str) -> None:
    page = Page(report_html(Report(error=error), title))
    bare = Page(report_html(Report(error="x"), "x"))
    expected = len(bare.elements) - (0 if error else 2)
    assert len(page.elements) == expected


def test_a_hostile_reason_is_shown_as_it_is() -> None:
    text = report_html(REPORTS["failed"], HOSTILE)
    page = Page(text)
    assert not page.all("script")
    assert "\x1b" not in text
    [reason] = [text for text in page.text_of("dd") if "converge" in text]
    assert "<script>alert(1)</script>" in reason


@pytest.mark.parametrize(
    ("status", "step", "states"),
    [
        (Status.COMPLETED, Step.START, ["done"] * 7),
        (Status.FAILED, Step.CHECK, ["stuck"] + [""] * 6),
        (Status.FAILED, Step.STOP_COPY, ["done"] * 4 + ["stuck", "", ""]),
        (Status.UNCONFIRMED, Step.START, ["done"] * 6 + ["stuck"]),
    ],
)
def test_the_steps_say_where_it_ended(status: Status, step: Step, states: list[str]) -> None:
    page = Page(report_html(Report(status, step, None if status is Status.COMPLETED else "why")))
    assert [item.get("class", "") for item in page.all("li")] == states
    assert str(status) in page.text_of("p")[0]
    assert ("why" in page.text_of("dd")) is (status is not Status.COMPLETED)


@given(
    st.lists(
        st.builds(
            Round,
            number=st.just(0),
            pages=st.integers(0, 1 << 40),
            memory_bytes=st.integers(0, 1 << 60),
            device_bytes=st.integers(0, 1 << 60),
            seconds=st.floats(0, 1e12),
            left=st.integers(0, 1 << 40),
            downtime=st.floats(0, None, allow_nan=False),
        ),
        max_size=20,
    ),
    st.none() | st.floats(0, 1e9),
)
def test_no_numbers_lead_out_of_the_picture(rounds: list[Round], allowed: float | None) -> None:
    numbered = [
        Round(number, one.pages, one.memory_bytes, one.device_bytes, one.seconds, one.left, one.downtime)
        for number, one in enumerate(rounds, 1)
    ]
    expect_inside(Page(report_html(Report(rounds=numbered), allowed=allowed)))


# Axes


@given(st.floats(1e-9, 1e18), st.sampled_from([1e-4, 1.0]), st.sampled_from([1000, 1024]))
def test_ticks_are_even_and_reach_the_largest_but_not_far_beyond(largest: float, least: float, base: int) -> None:
    ticks = nice_ticks(largest, least, base)
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert ticks[0] == 0
    assert ticks[-1] >= largest * (1 - 1e-9)
    assert ticks[-2] < largest
    assert 2 <= len(ticks) <= 7
    assert all(step == pytest.approx(steps[0]) for step in steps)
    assert steps[0] >= least * 0.999


@given(st.lists(st.floats(1e-8, 1e18), min_size=1))
def test_decades_hold_all_values(values: list[float]) -> None:
    ticks = decades([*values, 0.0])
    if ticks:
        assert ticks[0] == 0
        assert ticks[1] <= min(values) * (1 + 1e-9)
        assert ticks[-1] >= max(values) * (1 - 1e-9)
        assert len(ticks) <= 9
    else:
        assert max(values) < 100 * min(values)


@pytest.mark.parametrize(
    ("largest", "base", "ticks"),
    [
        (0, 1000, [0, 1]),
        (1, 1000, [0, 1]),
        (7, 1000, [0, 2, 4, 6, 8]),
        (262_144, 1000, [0, 100_000, 200_000, 300_000]),
        (1.2 * 2**30, 1024, [0, 2**29, 2**30, 1.5 * 2**30]),
    ],
)
def test_ticks(largest: float, base: int, ticks: list[float]) -> None:
    assert nice_ticks(largest, 1, base) == pytest.approx(ticks)


def test_the_ticks_of_a_logarithmic_scale_are_powers_of_ten() -> None:
    assert decades([0.0, 3.0, 5_000_000.0]) == [0, *(10.0**power for power in range(0, 9, 2))]
    assert decades([0.0, 20.0, 3000.0]) == [0, 10, 100, 1000, 10_000]


# A browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = """<script>
const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1
  && a.bottom <= b.bottom + 1;
const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2;
const found = {wide: document.documentElement.scrollWidth - innerWidth, outside: [], overlap: [], pictures: []};
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].filter(text => !text.classList.contains("limit-name"));
  texts.forEach((one, index) => {
    const box = one.getBoundingClientRect();
    if (!inside(box, frame)) found.outside.push(one.textContent);
    for (const other of texts.slice(index + 1))
      if (meet(box, other.getBoundingClientRect())) found.overlap.push(one.textContent + " | " + other.textContent);
  });
  const curve = svg.querySelector(".curve");
  found.pictures.push(curve ? {width: curve.getBoundingClientRect().width / frame.width,
    stroke: getComputedStyle(curve).stroke, card: getComputedStyle(svg.closest("section")).backgroundColor} : null);
}
const result = document.createElement("pre"); result.id = "found"; result.textContent = JSON.stringify(found);
document.body.append(result);
</script>"""
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to look at the page with")


def chromium(*arguments: str | Path) -> str:
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *options, f"--user-data-dir={profile}", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


def pixels(path: Path) -> set[tuple[int, ...]]:
    """The colours in a PNG of 8 bits per channel, not interlaced."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, at + 8)
            assert (depth, interlace) == (8, 0)
            channels = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw, found = zlib.decompress(packed), set()
    before = bytearray(width * channels)
    for row in range(height):
        start = row * (width * channels + 1)
        before = unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + width * channels]), before, channels)
        found |= {tuple(before[index : index + 3]) for index in range(0, len(before), channels)}
    return found


def unfiltered(kind: int, row: bytearray, above: bytearray, channels: int) -> bytearray:
    """A row of a PNG, from its differences to what is left of and above it."""
    for index in range(len(row)):
        left = row[index - channels] if index >= channels else 0
        corner = above[index - channels] if index >= channels else 0
        up = above[index]
        estimate = left + up - corner
        nearest = min((left, up, corner), key=lambda value: abs(estimate - value))
        row[index] = (row[index] + (0, left, up, (left + up) // 2, nearest)[kind]) & 0xFF
    return row


@needs_chromium
@pytest.mark.timeout(240)
@pytest.mark.parametrize("width", [420, 1100])
def test_a_browser_shows_every_label_inside_and_apart(width: int, tmp_path: Path) -> None:
    for name, one in REPORTS.items():
        page = tmp_path / "report.html"
        page.write_text(report_html(one, allowed=0.05).replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
        dom = chromium(f"--window-size={width},1400", "--dump-dom", page)
        match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
        assert match is not None, name
        found = json.loads(html.unescape(match[1]))
        assert found["wide"] <= 0, name
        assert (found["outside"], found["overlap"]) == ([], []), name
        if len(one.rounds) > 1:
            assert all(picture["width"] > 0.5 for picture in found["pictures"]), name


@needs_chromium
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("scheme", "curve", "card"), [(1, (0x1F, 0x6F, 0xEB), (255, 255, 255)), (0, (0x6C, 0xB0, 0xFF), (0x18, 0x1D, 0x24))]
)
def test_a_browser_draws_it_in_light_and_in_dark(
    scheme: int, curve: tuple[int, ...], card: tuple[int, ...], tmp_path: Path
) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(report_html(REPORTS["failed"], HOSTILE), encoding="utf-8")
    chromium(
        f"--blink-settings=preferredColorScheme={scheme}", "--window-size=800,900", f"--screenshot={picture}", page
    )
    assert {curve, card} <= pixels(picture)


@pytest.mark.parametrize("largest", [0.0, 5e-324, 2.3e-308, 1e-9, 1.0, 1e300])
def test_ticks_of_any_size(largest: float) -> None:
    ticks = nice_ticks(largest)
    assert ticks[0] == 0
    assert ticks[-1] >= largest
    assert ticks == sorted(set(ticks))
