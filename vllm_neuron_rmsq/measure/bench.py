"""One model, served in turns by the plugin and by what a user would take instead: tokens a second.

Sides: FP8 through the plugin, without and with the output projection in FP8, which llama.cpp quantizes and
others do not; bf16, INT8 W8A8 and FP8 in stock vLLM; Q8_0 in llama.cpp. All are made of one
bf16 checkpoint and are up at once, idle but for the one whose turn it is. ``benchmarks/end_to_end.py`` and
the command ``bench`` are this.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_neuron_rmsq import checkpoint
from vllm_neuron_rmsq.checkpoint.folder import identity, require
from vllm_neuron_rmsq.measure import results, rivals, servers
from vllm_neuron_rmsq.measure.engine import STOCK, need_vllm

PLUGIN, HEAD = "plugin FP8", "plugin FP8 + head"
SIDES = (PLUGIN, HEAD, "bf16", "INT8 W8A8", "stock FP8", "llama.cpp Q8_0")
CLIENTS = (1, 4, 8, 16)
PROMPT = 900
TOKENS = 32
"""Decoded for each client in a turn."""
ROUNDS = 5
SLOW = "stock FP8"
"""It takes ten seconds for a token of a model with a billion parameters, so one turn of one token must do."""

Progress = Callable[[int, int, str], None]
"""Called as ``progress(steps done, steps in all, what comes next)``."""


@dataclass
class Comparison:
    """What was measured of one model.

    Attributes:
        model: its name.
        speeds: work (``decode x 4``, ``prefill 900``) to side to median tokens a second.
        turns: the same, every turn's.
        memory: side to bytes of resident memory of its largest process, after all turns.
        left_out: side to the reason why it was not measured.
    """

    model: str
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)
    turns: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[dict[str, str]]:
        """One line of a CSV file for each work."""
        return [
            results.this_run()
            | {"model": self.model, "work": work}
            | {f"{side} tok/s": results.text(speed) for side, speed in by_side.items()}
            | {f"{side} MB": results.text(size / 1e6) for side, size in self.memory.items()}
            for work, by_side in self.speeds.items()
        ]


def compare(
    source: Path,
    cache: Path,
    *,
    sides: Sequence[str] = SIDES,
    clients: Sequence[int] = CLIENTS,
    prompt: int = PROMPT,
    rounds: int = ROUNDS,
    tokens: int = TOKENS,
    fp8: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Comparison:
    """Serve a model by every side and time decoding and prefill; the sides take turns.

    Args:
        source: bf16 checkpoint directory, or a GGUF file.
        cache: where the other sides' checkpoints are made, once, and logs go.
        sides: which of :data:`SIDES`.
        clients: how many ask at once, one number after the other, at most 16.
        prompt: tokens of the prompt for prefill, below 1000; 0 leaves prefill out.
        rounds: timed turns of each side, after one that warms it up.
        tokens: decoded for each client in a turn.
        fp8: the FP8 checkpoint of ``source``; ``None`` makes it.
        progress: told about every step.

    Raises:
        ValueError: an argument is not valid, vLLM is not installed, or the plugin's server did not start.
    """
    need_vllm()
    _check(source, sides, clients, prompt, rounds, tokens)
    cache.mkdir(parents=True, exist_ok=True)
    starters, left_out = _starters(source, cache, sides, fp8, lambda what: progress(0, 1, what))
    found = Comparison(source.name, left_out=left_out)
    works = [f"decode x {n}" for n in clients] + ([f"prefill {prompt}"] if prompt else [])
    steps = len(starters) + len(works) * len(starters) * (rounds + 1)
    done = 0

    async def turn(server: servers.Server, side: str, work: str) -> float:
        nonlocal done
        progress(done, steps, f"{side}, {work}")
        done += 1
        kind, *_, number = work.split()
        if kind == "prefill":
            return await server.prefill(int(number))
        return await server.decode(int(number), 1 if side == SLOW else tokens)

    async def measure(up: Mapping[str, servers.Server]) -> None:
        nonlocal done
        for work in works:
            turns: dict[str, list[float]] = {side: [] for side in up}
            for count in range(rounds + 1):
                for side, server in up.items():
                    if side == SLOW and count != 1:
                        done += 1
                        continue
                    speed = await turn(server, side, work)
                    if count:  # the first one warms up
                        turns[side].append(speed)
            found.turns[work] = turns
            found.speeds[work] = {side: statistics.median(speeds) for side, speeds in turns.items()}

    with contextlib.ExitStack() as stack:
        up: dict[str, servers.Server] = {}
        for side, start in starters.items():
            progress(done, steps, f"starting {side}")
            try:
                up[side] = stack.enter_context(contextlib.closing(start()))
            except ValueError as error:
                if side == PLUGIN:
                    raise
                left_out[side] = f"its server did not start: {str(error).splitlines()[0]}"
            done += 1
        asyncio.run(measure(up))
        found.memory = {side: server.resident() for side, server in up.items()}
    return found


def _check(
    source: Path, sides: Sequence[str], clients: Sequence[int], prompt: int, rounds: int, tokens: int
) -> None:
    require(source, "a bf16 checkpoint directory or a .gguf file")
    if PLUGIN not in sides or set(sides) - set(SIDES):
        raise ValueError(f"sides: expected {PLUGIN} and others of {', '.join(SIDES)}; got {', '.join(sides)}")
    if not clients or not all(1 <= n <= servers.AT_ONCE for n in clients):
        raise ValueError(f"clients: expected numbers from 1 to {servers.AT_ONCE}, got {list(clients)}")
    if not 0 <= prompt < servers.CONTEXT - 1:
        raise ValueError(f"prompt: expected 0 to {servers.CONTEXT - 2} tokens, got {prompt}")
    if rounds < 1 or not 1 <= tokens <= servers.CONTEXT - servers.SHORT - 1:
        raise ValueError(f"rounds, tokens: expected at least 1 of each, got {rounds} and {tokens}")


def _starters(
    source: Path, cache: Path, sides: Sequence[str], fp8: Path | None, say: Callable[[str], None]
) -> tuple[dict[str, Callable[[], servers.Server]], dict[str, str]]:
    """Make what each side serves; how to start it, and why a side is left out."""
    name = _name(source)
    bf16 = source
    if source.is_file():
        bf16 = cache / f"{name}-bf16"
        say(f"unpacking {source.name}")
        _once(bf16, lambda out: checkpoint.unpack_gguf(source, out))
    if fp8 is None:
        fp8 = cache / f"{name}-fp8"
        say("making the FP8 checkpoint")
        _once(fp8, lambda out: checkpoint.convert(bf16, out))
    config = json.loads((bf16 / "config.json").read_text())
    vocabulary = int(config["vocab_size"])
    served: dict[str, tuple[Path, dict[str, str]]] = {
        PLUGIN: (fp8, {"VLLM_RMSQ_BACKEND": "auto"}),
        "bf16": (bf16, STOCK),
        "stock FP8": (fp8, STOCK),
    }
    left_out: dict[str, str] = {}
    if HEAD in sides:
        say("making the FP8 checkpoint with its output projection")
        folder = cache / f"{name}-fp8-head"
        _once(folder, lambda out: checkpoint.convert(bf16, out, lm_head=True))
        served[HEAD] = folder, {"VLLM_RMSQ_BACKEND": "auto"}
    if "INT8 W8A8" in sides:
        say("making the INT8 checkpoint")
        folder = cache / f"{name}-int8"
        _once(folder, lambda out: rivals.int8(bf16, fp8, out))
        served["INT8 W8A8"] = folder, STOCK
    gguf = cache / f"{name}-q8_0.gguf"
    if "llama.cpp Q8_0" in sides:
        reason = rivals.gguf_unavailable(bf16)
        if reason:
            left_out["llama.cpp Q8_0"] = reason
        else:
            say("making the GGUF file in Q8_0")
            _once(gguf, lambda out: rivals.gguf_q8(bf16, out))
    starters: dict[str, Callable[[], servers.Server]] = {}
    for side in sides:
        log = cache / f"bench-{name}-{side.replace(' ', '-')}.log"
        if side in served:
            starters[side] = _starter(*served[side], log, vocabulary)
        elif side not in left_out:
            starters[side] = lambda log=log: servers.llama_cpp(gguf, log, vocabulary)  # type: ignore[misc]
    return starters, left_out


def _name(source: Path) -> str:
    """A name for what is made of a model, in which no other model and no other state of it is found."""
    digest = hashlib.sha256(json.dumps(identity(source)).encode()).hexdigest()
    return f"{source.name.removesuffix('.gguf')}-{digest[:8]}"


def _starter(
    folder: Path, environment: dict[str, str], log: Path, vocabulary: int
) -> Callable[[], servers.Server]:
    return lambda: servers.vllm(folder, log, environment, vocabulary)


def _once(out: Path, make: Callable[[Path], Any]) -> None:
    """Make ``out`` unless it is there; what is half made never has its name."""
    if not out.exists():
        partial = out.with_name(f".{out.name}.partial")
        rivals.remove(partial)
        make(partial)
        partial.rename(out)


def plot(found: Comparison, path: Path) -> None:
    """Draw :class:`Comparison` as bars, one group for each work.

    Raises:
        ValueError: matplotlib is not installed, or the picture cannot be written.
    """
    figure, axis = results.figure_of(9, 4)
    works, sides = list(found.speeds), list(next(iter(found.speeds.values())))
    width = 0.8 / len(sides)
    for place, side in enumerate(sides):
        at = [i + width * (place - (len(sides) - 1) / 2) for i in range(len(works))]
        bars = axis.bar(at, [found.speeds[work][side] for work in works], width, label=side)
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
    axis.set_xticks(range(len(works)), works)
    axis.set(ylabel="tokens/s", title=f"{found.model}: {results.this_run()['machine']}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    results.save(figure, path)
