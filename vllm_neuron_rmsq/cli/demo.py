"""Three questions answered through the plugin, and how fast, against the same vLLM without it.

Each side is a process of its own, see :func:`worker`, that loads the model once and then does what it is
told, one JSON object a line. The timed runs of the two sides alternate, so that
what else the machine does falls on both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_neuron_rmsq.cli.errors import CommandError

QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Name three colours of the rainbow.",
    "Why is the sky blue? Answer in one sentence.",
)
ANSWER_TOKENS = 64
MAX_TOKENS = 512
KV_CACHE_BYTES = 256 << 20
"""Two models share the machine's memory; vLLM would reserve nearly all of it for one."""
TIMED_TOKENS = 16
"""Tokens generated for each question in a timed run, whether or not the answer would have ended before."""

SIDES = {"with the plugin": {}, "without it": {"VLLM_RMSQ_BACKEND": "off"}}


class Side:
    """A vLLM process with the model loaded.

    Args:
        checkpoint: the model.
        environment: environment variables that make the side what it is.
        log: file for everything vLLM prints.
    """

    def __init__(self, checkpoint: Path, environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import worker; worker()", str(checkpoint)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                # The report is fetched by a function sent to vLLM's worker process.
                env=os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} | environment,
            )

    def ask(self, **command: Any) -> Any:
        """Send a command and return what came back; without one, wait until the model is loaded.

        Raises:
            CommandError: the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            if command:
                self.process.stdin.write(json.dumps(command) + "\n")
                self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise CommandError(f"vLLM stopped; the end of its log {self.log}:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        """End the process, which ends vLLM's own processes when its input ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextlib.contextmanager
def _sides(checkpoint: Path, cache: Path) -> Iterator[dict[str, Side]]:
    sides: dict[str, Side] = {}
    try:
        for name, environment in SIDES.items():
            log = cache / f"demo-{'stock' if environment else 'plugin'}.log"
            sides[name] = Side(checkpoint, environment, log)
        yield sides
    finally:
        for side in sides.values():
            side.close()


def demo(checkpoint: Path, cache: Path, repeats: int, console: Console) -> None:
    """Print the answers, the fused layers and tokens per second of both sides.

    Args:
        checkpoint: directory of an FP8 chat model.
        cache: directory for vLLM's logs.
        repeats: timed runs of each side; their median is printed.

    Raises:
        CommandError: vLLM cannot load or run the model.
    """
    if not checkpoint.is_dir():
        raise CommandError(f"{checkpoint}: is not a directory; expected an FP8 checkpoint")
    cache.mkdir(parents=True, exist_ok=True)
    with (
        _sides(checkpoint, cache) as sides,
        console.status("Loading the model twice, with plugin and without"),
    ):
        for side in sides.values():
            side.ask()
        plugin = sides["with the plugin"]
        report = plugin.ask(do="report")
        if report is None:
            raise CommandError(
                "vLLM runs without the plugin; unset VLLM_PLUGINS and VLLM_RMSQ_BACKEND, and see the log "
                f"{plugin.log}"
            )
        console.print(_layers(report))
        with console.status("Answering"):
            for question, answer in zip(QUESTIONS, plugin.ask(do="answer"), strict=True):
                console.print(f"\n[bold]{question}[/]\n{answer.strip()}", highlight=False)
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side.ask(do="time", tokens=2)  # first calls make threads and buffers
        for repeat in range(repeats):
            for name, side in sides.items():
                with console.status(f"Timing {name}, run {repeat + 1} of {repeats}"):
                    speeds[name].append(side.ask(do="time", tokens=TIMED_TOKENS))
    console.print()
    console.print(_speeds(speeds))


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


def _speeds(speeds: dict[str, list[float]]) -> Table:
    runs = len(next(iter(speeds.values())))
    table = Table("vLLM", "tokens/s (range)", title=f"Median of {runs}, {len(QUESTIONS)} at once")
    for name, values in speeds.items():
        table.add_row(name, f"{statistics.median(values):.1f}  ({min(values):.1f} to {max(values):.1f})")
    return table


def worker() -> None:
    """Load the model, say so, then obey commands until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints where replies belong

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    from vllm import LLM, SamplingParams

    llm = LLM(
        sys.argv[1],
        enforce_eager=True,
        max_model_len=MAX_TOKENS,
        max_num_seqs=len(QUESTIONS),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    reply("loaded")
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "report":
                reply(llm.apply_model(_report)[0])
            case "answer":
                params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
                reply([output.outputs[0].text for output in llm.chat(chats, params, use_tqdm=False)])
            case "time":
                params = SamplingParams(temperature=0, max_tokens=command["tokens"], ignore_eos=True)
                start = time.perf_counter()
                outputs = llm.chat(chats, params, use_tqdm=False)
                seconds = time.perf_counter() - start
                reply(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)


def _report(model: Any) -> dict[str, Any] | None:
    report = getattr(model, "rmsq_report", None)
    return report and {
        "line": str(report),
        "backend": report.backend,
        "layers": [
            {"name": layer.name, "reason": layer.reason, "linears": layer.linears}
            for layer in (*report.norms, *report.activations)
        ],
    }
