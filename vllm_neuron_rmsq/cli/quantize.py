"""What ``quantize`` says about a conversion."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_neuron_rmsq.checkpoint import Report

WORST = 10


def show(report: Report, console: Console) -> None:
    """Print what became of a checkpoint.

    Args:
        report: of the conversion.
        console: where to.
    """
    if report.cleared:
        console.print("Removed what a killed run with other arguments had left.")
    if report.resumed:
        console.print(f"Went on from a killed run, which had finished {report.resumed} shards.")
    if report.layers:
        table = Table(
            "linear",
            "error, % of the weight",
            "codes",
            title=escape(f"Largest errors of {len(report.layers)} linears"),
        )
        for layer in report.worst(WORST):
            table.add_row(escape(layer.name), f"{100 * layer.error:.3g}", "halved" if layer.halved else "")
        console.print(table)
    console.print(escape(_sizes(report)), soft_wrap=True, highlight=False)
    if report.left:
        console.print(escape(_left(report)), soft_wrap=True, highlight=False)
    line = f"{report.out}: {len(report.layers)} linears in FP8 for {report.target}"
    console.print(escape(line), soft_wrap=True, highlight=False)


def _sizes(report: Report) -> str:
    return (
        f"{report.parameters / 1e6:,.1f} million parameters in FP8; "
        f"{report.bytes_before / 1e9:.3g} GB became {report.bytes_after / 1e9:.3g} GB"
    )


def _left(report: Report) -> str:
    """One line for the linears and experts left as they were, the same kind of every layer named once."""
    kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in report.left)
    total = sum(report.left.values())
    return f"{total / 1e6:,.1f} million parameters of other linears stayed as they were: {', '.join(kinds)}"


def as_json(report: Report) -> str:
    """Return the whole report as JSON."""
    return json.dumps(report.as_dict(), indent=2)


def write(path: Path, report: Report) -> None:
    """Write the whole report.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        path.write_text(as_json(report) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{report.out}: is complete, but its report cannot be written ({error})") from error
