"""The ``vllm-neuron-rmsq`` command. What a command needs is imported when it runs: vLLM takes seconds."""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vllm_neuron_rmsq import __version__
from vllm_neuron_rmsq.cli.errors import CommandError, shown_without_trace
from vllm_neuron_rmsq.target import TARGETS, TRN2

console = Console()
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Target = StrEnum("Target", {name: name for name in TARGETS})  # type: ignore[misc]  # mypy wants a literal


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"vllm-neuron-rmsq {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Tools around the vLLM plugin vllm-neuron-rmsq."""


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="Checkpoint directory with safetensors, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint directory to make.")],
    target: Annotated[Target, typer.Option(help="Range of the codes: ±240 or ±448.")] = Target[TRN2.name],
) -> None:
    """Convert a bf16 checkpoint, or a GGUF file, to FP8: per-channel weights, per-token activations."""
    from vllm_neuron_rmsq import checkpoint

    with _progress() as progress, shown_without_trace():
        task = progress.add_task(f"Quantizing {source.name}")

        def tell(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total)

        linears = checkpoint.convert(source, out, target, tell)
    console.print(f"{out}: {linears} linears in FP8 for {target}", soft_wrap=True)


@app.command()
def check() -> None:
    """Print what the plugin finds here: versions, settings, and which backends can run, or why not."""
    from vllm_neuron_rmsq.cli.check import check

    check(console)


@app.command()
def demo(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="An FP8 chat model; by default SmolLM2-135M-Instruct, made in --cache."),
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where models and logs go.")] = Path(".cache"),
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 3,
) -> None:
    """Answer three questions through the plugin; tokens per second with the plugin and without it."""
    from vllm_neuron_rmsq.cli import smollm2
    from vllm_neuron_rmsq.cli.demo import demo

    if checkpoint is None:
        with _progress() as progress:
            task = progress.add_task("Making SmolLM2-135M-Instruct in FP8", total=None)
            checkpoint = smollm2.fp8(
                cache, lambda done, total, _: progress.update(task, completed=done, total=total)
            )
    demo(checkpoint, cache, repeats, console)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True)


def main() -> None:
    """Run the command; what the user can mend is one line on standard error and exit status 1."""
    # Like Ctrl-C: what is half made is removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except CommandError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: {error}", markup=False, style="red"
        )
        sys.exit(1)
