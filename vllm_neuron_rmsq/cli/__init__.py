"""The ``vllm-neuron-rmsq`` command. What a command needs is imported when it runs: vLLM takes seconds."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from json import dumps
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


@app.command(
    epilog="Exit status: 0 every number is within its bound, 1 one is not, 2 wrong use or bad input."
)
def validate(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory, bf16 or FP8, or a .gguf file.")],
    reference: Annotated[
        Path | None, typer.Option(help="The bf16 checkpoint that an FP8 MODEL was made of.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file to read; by default CPython's documentation.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens of it; 0 looks at layers alone.")] = 4000,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="A decoder layer to look at; by default the first, middle and last. May be repeated."
        ),
    ] = None,
    target: Annotated[
        list[Target] | None, typer.Option(help="Range of the codes; by default both, side by side.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Who computes the whole model.")] = "auto",
    work: Annotated[
        Path | None, typer.Option(help="Keep checkpoints and vLLM's logs there; by default they go.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture (.png); needs matplotlib.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Say what FP8 in packed rows, and Trainium2's ±240, do to a model.

    The bf16 model is stock vLLM's, the FP8 one the plugin's: perplexity, top token and logprobs on a text. In
    a few layers every backend that can run here, the NKI kernels' simulator among them, stands beside a
    float64 oracle.
    """
    with _progress() as progress, shown_without_trace():
        from vllm_neuron_rmsq.cli.validate import plot as draw
        from vllm_neuron_rmsq.cli.validate import show
        from vllm_neuron_rmsq.measure import validation
        from vllm_neuron_rmsq.measure.results import figure_of

        if plot is not None:
            figure_of(1, 1)  # not found out after minutes
        found = validation.validate(
            model,
            reference=reference,
            text=None if text is None else _read_text(text),
            tokens=tokens,
            layers=layer,
            targets=[str(one) for one in target or Target],
            backend=backend,
            work=work,
            progress=_teller(progress, "Validating"),
        )
        if plot is not None:
            draw(found, plot)
    if json:
        typer.echo(dumps(found.json(), indent=2))
    else:
        show(found, console)
    raise typer.Exit(0 if found.passed else 1)


@app.command(epilog="Exit status: 0 measured, 2 wrong use or bad input.")
def bench(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint directory in bf16, or a .gguf file; by default SmolLM2-135M, made in --cache."
        ),
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where the sides' checkpoints and logs go, and stay.")] = Path(
        ".cache"
    ),
    side: Annotated[
        list[str] | None,
        typer.Option(
            help="A side beside the plugin: bf16, 'INT8 W8A8', 'stock FP8' or 'llama.cpp Q8_0'; by default "
            "all. May be repeated."
        ),
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option(help="How many ask at once; by default 1, then 4, then 16. May be repeated."),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt for prefill; 0 leaves it out.")] = 900,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each side.")] = 5,
    csv: Annotated[Path | None, typer.Option(help="Append the lines to this CSV file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture (.png); needs matplotlib.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Tokens per second of this machine: the plugin beside stock vLLM's bf16, INT8 and FP8, and llama.cpp.

    Every side is a server of its own made of the same bf16 model; they are up at once and take turns.
    """
    with _progress() as progress, shown_without_trace():
        from vllm_neuron_rmsq.cli import smollm2
        from vllm_neuron_rmsq.cli.bench import show
        from vllm_neuron_rmsq.measure import bench, results

        if plot is not None:
            results.figure_of(1, 1)
        tell = _teller(progress, "Measuring")
        found = bench.compare(
            smollm2.bf16(cache) if model is None else model,
            cache,
            sides=(bench.PLUGIN, *side) if side else bench.SIDES,
            clients=clients or bench.CLIENTS,
            prompt=prompt,
            rounds=rounds,
            progress=tell,
        )
        if plot is not None:
            bench.plot(found, plot)
    lines = found.lines()
    if csv is not None:
        results.append(csv, lines)
    if json:
        typer.echo(dumps(asdict(found) | {"run": results.this_run()}, indent=2))
    else:
        show(found, console)


@app.command(epilog="Exit status: 0 done, 2 wrong use or bad input, or vLLM stopped.")
def demo(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="An FP8 chat model; by default SmolLM2-135M-Instruct, made in --cache."),
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where models and logs go.")] = Path(".cache"),
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print answers and speeds as JSON.")] = False,
) -> None:
    """Answer three questions through the plugin; tokens per second with the plugin and without it."""
    with shown_without_trace():
        from vllm_neuron_rmsq.measure import engine

        engine.need_vllm()  # before anything is downloaded
        from vllm_neuron_rmsq.cli import smollm2
        from vllm_neuron_rmsq.cli.demo import demo

        if checkpoint is None:
            checkpoint = smollm2.fp8(cache, _progress)
        printed = Console(stderr=True, quiet=not sys.stderr.isatty()) if json else console
        found = demo(checkpoint, cache, repeats, printed)
    if json:
        typer.echo(dumps(found, indent=2))


def _teller(progress: Progress, doing: str) -> Callable[[int, int, str], None]:
    """A function ``(steps done, steps in all, what comes next)`` that moves a new bar of ``progress``."""
    task = progress.add_task(doing, total=None)
    return lambda done, total, what: progress.update(
        task, completed=done, total=total, description=f"{doing}: {what}"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: cannot be read as text ({error})") from error


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
