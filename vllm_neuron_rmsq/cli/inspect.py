"""What ``inspect`` says and draws of a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vllm_neuron_rmsq import target as targets
from vllm_neuron_rmsq.checkpoint import Inspection, Weight
from vllm_neuron_rmsq.measure.results import figure_of, save

WORST = 10


def show(found: Inspection, console: Console) -> None:
    """Print what is in a checkpoint. "halved": what halving changes, root mean square over the weight's."""
    limit = f"±{targets.get(found.target).fp8_max:g}"
    if found.weights:
        table = Table(
            Column("FP8 weights", no_wrap=True),
            Column("scales", no_wrap=True),
            f"beyond {limit}",
            "halving rounds",
            "dead",
            title=f"{len(found.weights)} FP8 weights",
        )
        kinds: dict[tuple[str, str, str], list[Weight]] = {}
        for weight in found.weights:
            kind = re.sub(r"\.\d+(?=\.)", ".*", weight.name.removesuffix(".weight"))
            kinds.setdefault((kind, weight.scheme, weight.activations), []).append(weight)
        for (kind, scheme, activations), members in kinds.items():
            count = sum(weight.count for weight in members)
            table.add_row(
                escape(f"{kind} ({len(members)})"),
                scheme if activations == "dynamic" else f"{scheme}, {activations}",
                _share(sum(weight.beyond for weight in members), count),
                _share(sum(weight.rounded for weight in members), count),
                str(sum(weight.dead for weight in members)),
            )
        console.print(table)
    worst = found.worst(WORST)
    if worst:
        table = Table(
            Column("weight", no_wrap=True), "halved", f"beyond {limit}", "dead", "broken", title="Worst"
        )
        for weight in worst:
            table.add_row(
                escape(weight.name.removesuffix(".weight")),
                f"{weight.halving_error:.2g}",
                _share(weight.beyond, weight.count),
                str(weight.dead),
                ", ".join(weight.broken),
            )
        console.print(table)
    if found.others:
        table = Table("other tensors", "how many", "million elements")
        for dtype, (number, elements) in found.others.items():
            table.add_row(dtype, str(number), f"{elements / 1e6:,.2f}")
        console.print(table)
    for problem in found.problems:
        console.print(escape(problem), style="red", soft_wrap=True, highlight=False)
    console.print(escape(f"{found.path}: {_verdict(found)}"), soft_wrap=True, highlight=False)


def _verdict(found: Inspection) -> str:
    broken = sum(1 for weight in found.weights if weight.broken)
    if found.problems:
        return "not whole"
    if broken:
        return f"whole, and {broken} of {len(found.weights)} FP8 weights are broken"
    if not found.weights:
        return "whole, without FP8 weights"
    beyond = sum(1 for weight in found.weights if weight.beyond)
    fits = (
        f"{beyond} to be halved for {found.target}" if beyond else f"all within the range of {found.target}"
    )
    return f"whole; {len(found.weights)} FP8 weights, {fits}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3%}" if part else "0"


def as_json(found: Inspection) -> str:
    """Return everything as JSON."""
    return json.dumps(found.as_dict(), indent=2)


def draw(found: Inspection, path: Path) -> None:
    """Draw how often each magnitude of a code is used, a line of the picture for each FP8 weight.

    Raises:
        ValueError: there are no FP8 weights, matplotlib is not installed, or the picture cannot be written.
    """
    if not found.weights:
        raise ValueError(f"{found.path}: holds no FP8 weights to draw")
    shares = torch.tensor([weight.magnitudes for weight in found.weights], dtype=torch.float64)
    shares /= shares.sum(dim=1, keepdim=True)
    logs = torch.where(shares > 0, shares.log10(), float("nan"))
    lines = len(found.weights)
    figure, axes = figure_of(10, min(3 + 0.06 * lines, 20))
    image = axes.imshow(logs.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, label="log10 of the share of the weight's codes")
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ticks = [0, *range(8, 127, 16), 126]
    axes.set_xticks(ticks, [f"{float(values[tick]):.3g}" for tick in ticks])
    limit = targets.get(found.target)
    axes.axvline(limit.max_code + 0.5, color="red", linewidth=1)
    axes.set(xlabel=f"magnitude of the code; red: ±{limit.fp8_max:g}")
    step = max(1, lines // 40)
    shown = set(range(0, lines, step))
    worst = {weight.name for weight in found.worst(WORST)}
    named = [
        i for i, weight in enumerate(found.weights) if weight.name in worst or (not worst and i in shown)
    ]
    axes.set_yticks(named, [found.weights[i].name for i in named], fontsize=6)
    axes.set_title(f"{found.path.name}: {lines} FP8 weights" + ("; the worst are named" if worst else ""))
    save(figure, path)
