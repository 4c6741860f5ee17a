"""What the benchmarks share: taking turns, tables, files."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vllm_neuron_rmsq.measure.results import RUN_COLUMNS, append, processor, read, text, this_run

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
    lines = [{column: text(value) for column, value in row.items()} for row in rows]
    table = Table(*rows[0], box=None)
    for column in table.columns:
        column.justify = "right"
    for line in lines:
        table.add_row(*line.values())
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    append(RESULTS / f"{name}.csv", [this_run() | line for line in lines])


def latest(name: str) -> list[dict[str, str]]:
    """Return the lines that the last run of benchmark ``name`` appended."""
    lines = read(RESULTS / f"{name}.csv")
    return [line for line in lines if run_of(line) == run_of(lines[-1])]


def run_of(line: Mapping[str, str]) -> tuple[str, ...]:
    """Which run a line of a results file is of."""
    return tuple(line[column] for column in RUN_COLUMNS)


def machine() -> str:
    """One line that says what this runs on."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
