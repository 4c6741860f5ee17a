"""What the benchmarks share: taking turns, tables, files."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import statistics
import subprocess
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
    """Print ``rows`` as a table and append them to ``results/<name>.csv``; floats keep three digits.

    Each line of the file begins with :func:`this_run`, so that one file holds the history of a benchmark.
    A column that is new, or gone, is empty in the lines that have none.

    Args:
        name: of the benchmark.
        rows: all with the same keys, the columns.
    """
    lines = [{column: _text(value) for column, value in row.items()} for row in rows]
    table = Table(*rows[0], box=None)
    for column in table.columns:
        column.justify = "right"
    for line in lines:
        table.add_row(*line.values())
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    append(RESULTS / f"{name}.csv", [this_run() | line for line in lines])


def append(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Append ``lines`` to a CSV file that may have other columns, or may not be there yet."""
    before = read(path) if path.exists() else []
    columns = list(dict.fromkeys(column for line in (*before, *lines) for column in line))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*before, *lines])


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV file, each by its columns."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(name: str) -> list[dict[str, str]]:
    """Return the lines that the last run of benchmark ``name`` appended."""
    lines = read(RESULTS / f"{name}.csv")
    last = {column: lines[-1][column] for column in RUN_COLUMNS}
    return [line for line in lines if last.items() <= line.items()]


RUN_COLUMNS = ("date", "machine", "commit", "versions")


def this_run() -> dict[str, str]:
    """When and on what a line was measured: :data:`RUN_COLUMNS`."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":!results"], capture_output=True, text=True
    )
    values = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        f"{processor()}, {os.cpu_count()} cores",
        (commit.stdout.strip() or "unknown") + (" and changes" if changed.stdout else ""),
        f"vllm {_version('vllm')}, torch {torch.__version__}",
    )
    return dict(zip(RUN_COLUMNS, values, strict=True))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def processor() -> str:
    """Name of this machine's processor."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return model


def machine() -> str:
    """One line that says what this runs on."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
