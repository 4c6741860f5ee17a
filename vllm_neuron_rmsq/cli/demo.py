"""Three questions answered through the plugin, and how fast, against the same vLLM without it.

Each side is a vLLM of its own, see :mod:`vllm_neuron_rmsq.measure.engine`. The timed runs of the two sides
alternate, so that what else the machine does falls on both.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_neuron_rmsq.cli.errors import CommandError, shown_without_trace
from vllm_neuron_rmsq.measure.engine import STOCK, Engine

# Questions whose first word is clear: bf16, stock FP8 and the plugin all answer them rightly. Asked "What is
# the capital of France?", SmolLM2 gives "The" a quarter nat more than "L" in bf16, and one rounding more or
# less moves them by as much.
QUESTIONS = (
    "Complete: The capital of France is",
    "What is the capital of Japan?",
    "What is the capital of Germany?",
)
ANSWER_TOKENS = 16
MAX_TOKENS = 512
TIMED_TOKENS = 16
"""Tokens generated for each question in a timed run, whether or not the answer would have ended before."""

PLUGIN, WITHOUT = "with the plugin", "without it"
SIDES: dict[str, dict[str, str]] = {PLUGIN: {}, WITHOUT: STOCK}


@contextlib.contextmanager
def _sides(checkpoint: Path, cache: Path) -> Iterator[dict[str, Engine]]:
    sides: dict[str, Engine] = {}
    try:
        for name, environment in SIDES.items():
            log = cache / f"demo-{'stock' if environment else 'plugin'}.log"
            sides[name] = Engine(
                checkpoint, log, environment, max_model_len=MAX_TOKENS, max_num_seqs=len(QUESTIONS)
            )
        yield sides
    finally:
        for side in sides.values():
            side.close()


def demo(checkpoint: Path, cache: Path, repeats: int, console: Console) -> dict[str, Any]:
    """Print the fused layers, both sides' answers and their tokens per second.

    Args:
        checkpoint: directory of an FP8 chat model.
        cache: directory for vLLM's logs.
        repeats: timed runs of each side; their median is printed.

    Returns:
        What was printed: ``report``, ``answers`` (question to side to text) and ``speeds`` (side to tokens a
        second, one a run).

    Raises:
        CommandError: vLLM is not there, or cannot load or run the model.
    """
    if not checkpoint.is_dir():
        raise CommandError(f"{checkpoint}: is not a directory; expected an FP8 checkpoint")
    cache.mkdir(parents=True, exist_ok=True)
    with shown_without_trace(), _sides(checkpoint, cache) as sides:
        with console.status("Loading the model twice, with the plugin and without"):
            for side in sides.values():
                side.ask()
        report = sides[PLUGIN].report()
        if report is None:
            raise CommandError(
                "vLLM runs without the plugin; unset VLLM_PLUGINS and VLLM_RMSQ_BACKEND, and see the log "
                f"{sides[PLUGIN].log}"
            )
        console.print(_layers(report))
        answers: dict[str, dict[str, str]] = {question: {} for question in QUESTIONS}
        for name, side in sides.items():
            with console.status(f"Answering {name}"):
                for question, answer in zip(QUESTIONS, side.chat(QUESTIONS, ANSWER_TOKENS), strict=True):
                    answers[question][name] = answer.strip()
        console.print(_answers(answers))
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("Timing", total=(repeats + 1) * len(sides))
            for repeat in range(repeats + 1):
                for name, side in sides.items():
                    speed = side.speed(QUESTIONS, TIMED_TOKENS if repeat else 2)
                    if repeat:  # the first calls make threads and buffers
                        speeds[name].append(speed)
                    progress.advance(task)
        console.print(_speeds(speeds))
    return {"report": report, "answers": answers, "speeds": speeds}


def _layers(report: dict[str, Any]) -> Table:
    """One row for each kind of layer, named once for all the layers of the decoder."""
    table = Table("layer", "what became of it", title=report["line"])
    kinds: dict[tuple[str, str], list[str]] = {}
    for layer in report["layers"]:
        fate = f"not fused: {layer['reason']}"
        if not layer["reason"]:
            fate = f"fused on backend {report['backend']}, feeds " + ", ".join(layer["linears"])
        kinds.setdefault((_kind(layer["name"]), _kind(fate)), []).append(layer["name"])
    for (name, fate), members in kinds.items():
        table.add_row(f"{name} ({len(members)})" if len(members) > 1 else name, fate)
    return table


def _kind(text: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", text)


def _answers(answers: dict[str, dict[str, str]]) -> Table:
    table = Table("question", *SIDES, title=f"Answers, greedy, at most {ANSWER_TOKENS} tokens")
    for question, given in answers.items():
        table.add_row(question, *(given[name] for name in SIDES))
    return table


def _speeds(speeds: dict[str, list[float]]) -> Table:
    runs = len(next(iter(speeds.values())))
    title = f"Speed: median of {runs} runs, {len(QUESTIONS)} questions at once"
    table = Table("vLLM", "tokens/s", "slowest to fastest", title=title)
    for name, values in speeds.items():
        table.add_row(name, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}")
    return table
