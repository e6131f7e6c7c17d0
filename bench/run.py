"""Run the benchmarks: ``python -m bench.run [--quick] [--json] [--write] [--only WORD]`` from the top directory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.harness import BenchError, Tools
from bench.rows import FULL, QUICK, Effort, Result, Row, rows

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
COLUMNS = ("measured", "ours", "theirs", "unit", "ratio", "target", "")


@dataclass(frozen=True)
class Line:
    """A row and what came of it: a result, or the reason why there is none."""

    row: Row
    result: Result | None
    problem: str = ""

    @property
    def verdict(self) -> str:
        if self.result is None:
            return "not measured"
        return "ok" if self.row.target.met(self.result.ratio) else "MISS"

    def cells(self) -> tuple[str, ...]:
        ours, theirs, ratio = ("-", "-", "-")
        if self.result is not None:
            ours, ratio = number(self.result.ours), f"{self.result.ratio:.2f}"
            theirs = "-" if self.result.theirs is None else number(self.result.theirs)
        return (self.row.name, ours, theirs, self.row.unit, ratio, str(self.row.target), self.verdict)

    def as_dict(self) -> dict[str, object]:
        result = self.result
        return {
            "name": self.row.name,
            "unit": self.row.unit,
            "ours": result and result.ours,
            "theirs": result and result.theirs,
            "ratio": result and result.ratio,
            "target": str(self.row.target),
            "verdict": self.verdict,
            "problem": self.problem or None,
        }


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def machine() -> dict[str, str]:
    """What the figures depend on."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def measure(effort: Effort, only: str) -> Iterator[Line]:
    """A line for every row whose name contains ``only``, as soon as it is measured."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        tools = Tools(Path(directory))
        tools.compile()
        for row in rows():
            if only.lower() not in row.name.lower():
                continue
            try:
                yield Line(row, row.measure(tools, effort))
            except BenchError as error:
                yield Line(row, None, str(error))


def print_line(cells: tuple[str, ...]) -> None:
    name, ours, theirs, unit, ratio, target, verdict = cells
    print(f"{name:48} {ours:>10} {theirs:>10} {unit:6} {ratio:>6}  {target:8} {verdict}", flush=True)


def markdown(lines: list[Line]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    table = [COLUMNS, ("---", "--:", "--:", "---", "--:", "---", "---"), *(line.cells() for line in lines)]
    return "\n".join([f"{about}.", "", *(f"| {' | '.join(cells)} |" for cells in table)])


def write_readme(lines: list[Line]) -> None:
    """Put the figures between the two markers of README.md."""
    before, rest = README.read_text().split(BEGIN, 1)
    _, after = rest.split(END, 1)
    README.write_text(f"{before}{BEGIN}\n{markdown(lines)}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, less than half a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--write", action="store_true", help="put the figures into bench/README.md")
    parser.add_argument("--only", default="", metavar="WORD", help="only rows whose name contains WORD")
    arguments = parser.parse_args()

    begun, lines = time.monotonic(), list[Line]()
    if not arguments.json:
        print_line(COLUMNS)
    try:
        for line in measure(QUICK if arguments.quick else FULL, arguments.only):
            lines.append(line)
            if not arguments.json:
                print_line(line.cells())
            if line.problem:
                print(f"{line.row.name}: {line.problem}", file=sys.stderr)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": [line.as_dict() for line in lines]}))
    else:
        print(f"{time.monotonic() - begun:.0f} s")
    if arguments.write:
        write_readme(lines)
    return 1 if any(line.problem for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
