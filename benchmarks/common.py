"""What the benchmarks share: taking turns, tables, files."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def take_turns(
    sides: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 3, most: int = 101
) -> dict[str, float]:
    """Return each side's median time in seconds.

    The sides take turns, one call each, so that whatever else the machine does meets all alike. A side stays
    in until it has had ``seconds`` or ``most`` turns, and ``least`` turns at any rate.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    waiting = list(sides)
    while waiting:
        for name in waiting:
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
        waiting = [
            name
            for name in waiting
            if len(times[name]) < least or (len(times[name]) < most and sum(times[name]) < seconds)
        ]
    return {name: statistics.median(taken) for name, taken in times.items()}


def report(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print ``rows`` as a table and write them to ``results/<name>.csv``; floats keep three decimals."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


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
