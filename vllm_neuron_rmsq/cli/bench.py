"""``bench`` as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vllm_neuron_rmsq.measure import results
from vllm_neuron_rmsq.measure.bench import Comparison


def show(found: Comparison, console: Console) -> None:
    """Print the table, what was left out and why, and on what it was measured."""
    sides = list(next(iter(found.speeds.values())))
    table = Table("tokens/s", *sides, title=f"{found.model}: median of the turns, the best in bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for work, speeds in found.speeds.items():
        best = max(speeds.values())
        cells = (results.text(speed) for speed in speeds.values())
        table.add_row(
            work, *(f"[bold]{c}[/]" if v == best else c for c, v in zip(cells, speeds.values(), strict=True))
        )
    table.add_row("memory, MB", *(results.text(found.memory[side] / 1e6) for side in sides))
    console.print(table)
    for side, reason in found.left_out.items():
        console.print(f"not measured: {side}: {reason}")
    run = results.this_run()
    console.print(f"{run['date']}, {run['machine']}, {run['versions']}, commit {run['commit']}")
