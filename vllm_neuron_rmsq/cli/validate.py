"""``validate`` as a table and a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_neuron_rmsq.measure import results
from vllm_neuron_rmsq.measure import validation as v


def show(found: v.Validation, console: Console) -> None:
    """Print both tables, what ±240 costs, and what is beyond a bound."""
    if found.texts:
        console.print(texts(found))
    cost = found.cost_of_trn2()
    if cost is not None:
        console.print(
            f"±240 (trn2) against ±448 (trn3): perplexity {cost - 1:+.2%}, bound {v.COST_OF_TRN2 - 1:+.0%}"
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
        f"of bf16's (≤ {v.PERPLEXITY})",
        f"same top token (≥ {v.TOP:.0%})",
        f"mean |Δ logprob| (≤ {v.LOGPROB})",
        "",
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
    return table


def layers(found: v.Validation) -> Table:
    """Every step of the layers beside the float64 oracle, one row for each target and backend."""
    table = Table(
        "step",
        "target",
        "backend",
        "scale error",
        "codes equal",
        "steps off",
        "output error",
        "",
        title="Layers on the bf16 model's activations, beside the float64 oracle",
    )
    last = ""
    for one in found.layers:
        step = f"{one.step} ({one.kind})"
        table.add_row(
            "" if step == last else step,
            one.target,
            one.backend,
            f"{one.scale_error:.1e}",
            f"{one.codes_equal:.3%}",
            str(one.steps),
            f"{one.output_error:.4f}",
            "pass" if one.passed else "FAIL",
        )
        last = step
    return table


def plot(found: v.Validation, path: Path) -> None:
    """Draw how the tokens' logprobs differ from bf16's, and the layers' output errors.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure, (left, right) = results.figure_of(11, 4.2, 2)
    for text in found.texts:
        if text.side != "bf16":
            places = sorted(text.differences)
            shares = [(i + 1) / len(places) for i in range(len(places))]
            left.plot(places, shares, label=f"{text.side}: mean {text.logprob:.3f}")
    left.axvline(v.LOGPROB, color="0.6", linestyle=":", label="bound of the mean")
    left.set(xscale="log", xlim=(1e-3, None), ylim=(0, 1))
    left.set(xlabel="|difference of logprobs| from bf16", ylabel="share of the tokens")
    left.legend(frameon=False)
    steps = list(dict.fromkeys(one.step for one in found.layers))
    for target in dict.fromkeys(one.target for one in found.layers):
        of_target = [one for one in found.layers if one.target == target]
        for backend in dict.fromkeys(one.backend for one in of_target):
            errors = {one.step: one.output_error for one in of_target if one.backend == backend}
            marker = "o" if target == "trn2" else "x"
            right.plot(
                [errors[step] for step in steps], range(len(steps)), marker, label=f"{target}, {backend}"
            )
    right.set_yticks(range(len(steps)), [step.removeprefix("model.layers.") for step in steps], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="relative error of the linears' outputs", xlim=(0, None))
    if steps:
        right.legend(frameon=False, fontsize=7)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found.model}: {results.processor()}", fontsize=10)
    figure.savefig(path, dpi=120)
