"""``validate`` as a table and a picture."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_neuron_rmsq.measure import results
from vllm_neuron_rmsq.measure import validation as v
from vllm_neuron_rmsq.measure.layers import Agreement


def show(found: v.Validation, console: Console) -> None:
    """Print both tables, what ±240 costs, and what is beyond a bound."""
    if found.texts:
        console.print(texts(found))
    cost = found.cost_of_trn2()
    if cost is not None:
        console.print(
            f"±240 (trn2) against ±448 (trn3): perplexity {cost[0] - 1:+.2%} ± {cost[1]:.2%} "
            f"(bound {v.COST_OF_TRN2 - 1:+.0%})",
            highlight=False,
        )
    if found.layers:
        console.print(layers(found))
    for backend, reason in found.skipped.items():
        console.print(f"not compared: backend {backend}: {reason}")
    run = found.run
    console.print(f"{run['date']}, {run['machine']}, {run['versions']}, commit {run['commit']}")
    for failure in found.failures:
        console.print(f"[red]fail[/] {failure}")
    if found.passed:
        console.print("[green]pass[/] everything is within the bounds")


def texts(found: v.Validation) -> Table:
    """The FP8 model beside bf16 on the text."""
    table = Table(
        "model",
        "perplexity",
        "of bf16's",
        "same top token",
        "mean |Δ logprob|",
        "verdict",
        title=f"{found.model} on {found.tokens} tokens of text",
    )
    for text in found.texts:
        if text.side == "bf16":
            table.add_row("bf16", f"{text.perplexity:.3f}", "", "", "", "")
        else:
            numbers = f"{text.ratio:.4f}", f"{text.top:.1%}", f"{text.logprob:.4f}"
            table.add_row(
                f"FP8, {text.side}", f"{text.perplexity:.3f}", *numbers, "pass" if text.passed else "FAIL"
            )
    table.add_row("bound", "", f"≤ {v.PERPLEXITY}", f"≥ {v.TOP:.0%}", f"≤ {v.LOGPROB}", "")
    return table


def layers(found: v.Validation) -> Table:
    """Every step of the layers, one row for each target: each backend beside the float64 oracle."""
    backends = list(dict.fromkeys(one.backend for one in found.layers))
    title = "Layers: error of outputs; by backend, error of scales and share of codes off"
    columns = "layer, step", "target", "outputs", *backends
    table = Table(*columns, title=title, box=None, pad_edge=False)
    table.columns[0].no_wrap, table.columns[0].min_width = True, len("29 post_attention_norm")
    steps = list(dict.fromkeys(one.step for one in found.layers))
    by_step: dict[tuple[str, str], dict[str, Agreement]] = {}
    for one in sorted(found.layers, key=lambda one: steps.index(one.step)):
        by_step.setdefault((one.step, one.target), {})[one.backend] = one
    last = ""
    for (step, target), on in by_step.items():
        cells = []
        for backend in backends:
            text = f"{on[backend].scale_error:.0e} {1 - on[backend].codes_equal:.2%}"
            cells.append(text if on[backend].passed else f"[red]{text} FAIL[/]")
        worst = max(one.output_error for one in on.values())
        table.add_row("" if step == last else _short(step), target, f"{worst:.4f}", *cells)
        last = step
    return table


def _short(step: str) -> str:
    return re.sub(r"^.*?layers\.(\d+)\.(?:.*\.)?", r"\1 ", step).replace("layernorm", "norm")


def plot(found: v.Validation, path: Path) -> None:
    """Draw how the tokens' logprobs differ from bf16's, and the layers' output errors.

    Raises:
        ValueError: matplotlib is not installed, or the picture cannot be written.
    """
    figure, (left, right) = results.figure_of(11, 4.2, 2)
    for text in found.texts[1:]:
        stock = found.texts[0].logprobs
        differences = sorted(abs(a - b) for a, b in zip(text.logprobs, stock, strict=True))
        shares = [(i + 1) / len(differences) for i in range(len(differences))]
        left.plot(differences, shares, label=f"{text.side}: mean {text.logprob:.3f}")
    left.axvline(v.LOGPROB, color="0.6", linestyle=":", label="bound of the mean")
    left.set(xscale="log", xlim=(1e-3, None), ylim=(0, 1))
    left.set(xlabel="|difference of logprobs| from bf16", ylabel="share of the tokens")
    left.legend(frameon=False)
    steps = list(dict.fromkeys(one.step for one in found.layers))
    for target, marker in zip(dict.fromkeys(one.target for one in found.layers), "ox", strict=False):
        of_target = [one for one in found.layers if one.target == target]
        errors = [max(one.output_error for one in of_target if one.step == step) for step in steps]
        right.plot(errors, range(len(steps)), marker, label=target)
    right.set_yticks(range(len(steps)), [_short(step) for step in steps], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="relative error of the linears' outputs, the worst backend's", xlim=(0, None))
    if steps:
        right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found.model}: {results.processor()}", fontsize=10)
    results.save(figure, path)
