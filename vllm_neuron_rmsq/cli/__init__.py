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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_neuron_rmsq import __version__
from vllm_neuron_rmsq.cli.errors import NO, CommandError, shown_without_trace
from vllm_neuron_rmsq.target import TARGETS, TRN2

console = Console()
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Target = StrEnum("Target", {name: name for name in TARGETS})  # type: ignore[misc]  # mypy wants a literal
Scheme = StrEnum("Scheme", {name: name for name in ("per-channel", "per-tensor", "static")})  # type: ignore[misc]


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


EXIT_STATUS = "Exit status: 0 done, 2 wrong use or bad input."


@app.command(epilog=EXIT_STATUS)
def quantize(
    source: Annotated[Path, typer.Argument(help="Checkpoint directory with safetensors, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint directory to make.")],
    target: Annotated[Target, typer.Option(help="Range of the codes: ±240 or ±448.")] = Target[TRN2.name],
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="Scales: one for each output channel of a weight, or one for the weight, and one found at "
            "run time for each token; or static, one for a channel and, by --calibration, one for all tokens."
        ),
    ] = Scheme["per-channel"],
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text to run the model on for static scales, a few thousand words like those it will see."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A linear to leave as it is: its name, or re:REGEX of names. May be repeated."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="A linear to quantize besides the decoder's *_proj: of a vision tower, say, or Mixtral's "
            "experts. Name or re:REGEX. May be repeated."
        ),
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output projection, too.")] = False,
    from_fp8: Annotated[
        bool,
        typer.Option(
            "--from-fp8",
            help="SOURCE is in FP8: halve the codes of weights that go beyond the target's range; one scale "
            "a channel instead of one a block.",
        ),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write the error of every linear there, as JSON.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert a bf16 checkpoint, or a GGUF file, to FP8.

    OUT appears complete or not at all. A run that was killed leaves .OUT.partial; the next one goes on there.
    """
    with _progress() as progress, shown_without_trace():
        from vllm_neuron_rmsq import checkpoint
        from vllm_neuron_rmsq.cli.quantize import as_json, show, write
        from vllm_neuron_rmsq.measure.results import check_folder

        if report is not None:
            check_folder(report)
        task = progress.add_task("Quantizing", total=None)

        def tell(done: int, total: int, what: str) -> None:
            description = "Calibrating" if what == "calibration" else "Quantizing"
            progress.update(task, completed=done, total=total, description=description)

        made = checkpoint.convert(
            source,
            out,
            target,
            tell,
            scheme=scheme,
            ignore=ignore or (),
            include=include or (),
            lm_head=lm_head,
            from_fp8=from_fp8,
            calibration_text=None if calibration is None else _read_text(calibration),
        )
        if report is not None:
            write(report, made)
    if json:
        typer.echo(as_json(made))
    else:
        show(made, console)


@app.command(
    epilog="Exit status: 0 whole and sound, 1 not whole, or broken scales or codes, 2 wrong use or bad input."
)
def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint directory with safetensors, or one .safetensors file.")
    ],
    target: Annotated[Target, typer.Option(help="Range to compare codes with: ±240 or ±448.")] = Target[
        TRN2.name
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the codes of every FP8 weight (.png); needs matplotlib.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what is in a checkpoint: how its linears are quantized, what ±240 does to them, what is broken.

    All files' headers are read, then FP8 weights and scales, some rows at a time: memory stays under 500 MB.
    """
    with _progress() as progress, shown_without_trace():
        from vllm_neuron_rmsq import checkpoint as checkpoints
        from vllm_neuron_rmsq.cli.inspect import as_json, draw, show
        from vllm_neuron_rmsq.measure.results import check_picture

        if plot is not None:
            check_picture(plot)
        found = checkpoints.inspect(checkpoint, target, _teller(progress, "Reading"))
        if plot is not None:
            draw(found, plot)
    if json:
        typer.echo(as_json(found))
    else:
        show(found, console)
    if not found.sound:
        raise typer.Exit(NO)


@app.command(
    epilog="Exit status: 0 the plugin is active here, or takes over layers of MODEL; 1 it would do nothing, "
    "and why is said; 2 wrong use or bad input."
)
def check(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint directory, of which config.json is enough.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what the plugin finds here: versions, vLLM, backends, or why not. With MODEL, what would become of
    its layers when it is served, without loading its weights."""
    from vllm_neuron_rmsq import check as library
    from vllm_neuron_rmsq.cli.check import does_something, show_environment, show_model

    with Console(stderr=True).status("Asking vLLM"), shown_without_trace():
        found = library.environment() if model is None else library.model(model)
        if not found:  # the plugin would not get as far as the model
            model, found = None, library.environment()
    if json:
        typer.echo(dumps(found, indent=2))
    elif model is None:
        show_environment(found, console)
    else:
        show_model(model, found, console)
    if not (found["active"] if model is None else does_something(found)):
        raise typer.Exit(NO)


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
        from vllm_neuron_rmsq.measure.results import check_picture

        if plot is not None:
            check_picture(plot)
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
            help="A side beside the plugin: 'plugin FP8 + head' (the output projection in FP8, too), bf16, "
            "'INT8 W8A8', 'stock FP8' or 'llama.cpp Q8_0'; by default all. May be repeated."
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
    with shown_without_trace():
        from vllm_neuron_rmsq.cli import smollm2
        from vllm_neuron_rmsq.cli.bench import show
        from vllm_neuron_rmsq.measure import bench, engine, results

        engine.need_vllm()  # before anything is downloaded
        if plot is not None:
            results.check_picture(plot)
        if csv is not None:
            results.check_folder(csv)
        source = smollm2.bf16(cache) if model is None else model
        with _progress() as progress:
            found = bench.compare(
                source,
                cache,
                sides=(bench.PLUGIN, *side) if side else bench.SIDES,
                clients=clients or bench.CLIENTS,
                prompt=prompt,
                rounds=rounds,
                progress=_teller(progress, "Measuring"),
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    return Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)


def main() -> None:
    """Run the command; what the user can mend is one line on standard error and the error's exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        app()
    except CommandError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: {error}", markup=False, style="red"
        )
        sys.exit(error.status)


def _leave(number: int, _: object) -> None:
    """End the command; what is half made is removed on the way out, which no second signal interrupts."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)
