"""What the benchmarks share: taking turns, tables, files."""

from __future__ import annotations

import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def take_turns(
    sides: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    least: int = 3,
    most: int = 101,
    in_a_row: int = 1,
) -> dict[str, float]:
    """Return each side's median time in seconds.

    The sides take turns, so that whatever else the machine does meets all alike. A turn is ``in_a_row``
    calls, each timed: with one, a side finds the caches as the other sides left them; with several, mostly
    its own data in them, as an op in a model finds what the op before it wrote. A side stays in until it has
    had ``seconds`` or ``most`` turns, and ``least`` turns at any rate.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    waiting = list(sides)
    while waiting:
        for name in waiting:
            for _ in range(in_a_row):
                start = time.perf_counter()
                sides[name]()
                times[name].append(time.perf_counter() - start)
        waiting = [
            name
            for name in waiting
            if len(times[name]) < least * in_a_row
            or (len(times[name]) < most * in_a_row and sum(times[name]) < seconds)
        ]
    return {name: statistics.median(taken) for name, taken in times.items()}


def report(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print ``rows`` as a table and write them to ``results/<name>.csv``; floats keep three digits."""
    lines = [[_text(value) for value in row.values()] for row in rows]
    table = Table(*rows[0], box=None)
    for column in table.columns:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([list(rows[0]), *lines])


def _text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> str:
    """One line that says what this ran on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"
