"""Whole models in vLLM on the CPU: FP8 through the plugin, the same in stock vLLM, and bf16, in one run.

Each side is a vLLM engine of its own with the model loaded, eager, prefix caching off so that no run profits
from the one before. The sides take turns; a turn generates a number of tokens for a batch of prompts. Memory
is the resident memory of vLLM's worker process, less what the same process has without a model's weights
(SmolLM2's worker less SmolLM2's weights).

Models: SmolLM2-135M-Instruct, and a 1.1-billion-parameter Llama (hidden size 2048, 22 layers) with random
weights, both made under ``.cache/``. Prints a table and writes ``benchmarks/results/end_to_end.csv`` and
``.png``. It takes about six minutes::

    python benchmarks/end_to_end.py
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import matplotlib.pyplot as plt

from vllm_neuron_rmsq.cli import smollm2
from vllm_neuron_rmsq.cli.quantize import quantize

CACHE = Path(__file__).parents[1] / ".cache"
PROMPT_TOKENS = 4
"""Few, so that what is timed is decoding."""
ROUNDS = {"plugin": 5, "bf16": 5, "stock": 1}
"""Timed turns. Stock FP8 takes ten seconds for a token, so one must do."""
MODELS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    # model: (batch sizes, tokens generated for each prompt in a turn, by side)
    "SmolLM2-135M": ((1, 16), {"plugin": 64, "bf16": 64, "stock": 8}),
    "Llama-1.1B": ((1, 2, 4, 8), {"plugin": 16, "bf16": 16, "stock": 2}),
}
LABELS = {"plugin": "plugin (FP8)", "bf16": "stock vLLM (bf16)", "stock": "stock vLLM (FP8)"}


def llama() -> tuple[Path, Path]:
    """Return bf16 and FP8 checkpoint directories of the 1.1-billion-parameter Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    bf16, fp8 = CACHE / "llama-1b-bf16", CACHE / "llama-1b-fp8"
    if not bf16.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=32000,
            max_position_embeddings=2048,
        )
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(bf16)
        torch.set_default_dtype(torch.float32)
        gc.collect()
    if not fp8.is_dir():
        quantize(bf16, fp8)
    return bf16, fp8


class Engine:
    """One side: a process with a vLLM engine that runs what it is sent, see :func:`worker`."""

    def __init__(self, checkpoint: Path, **environment: str) -> None:
        log = CACHE / f"end_to_end-{checkpoint.name}-{environment['VLLM_RMSQ_BACKEND']}.log"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                # Imported, not run as a script: vLLM's own processes must find _memory by name.
                [sys.executable, "-c", f"import end_to_end; end_to_end.worker({str(checkpoint)!r})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ
                | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "PYTHONPATH": str(Path(__file__).parent)}
                | environment,
            )
        self.log = log

    def ask(self, *command: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended; see {self.log}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def worker(checkpoint: str) -> None:
    """Load the model; then answer ``["memory"]`` and ``["generate", batch, tokens]``, one line each."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints where replies belong
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=256 << 20,
    )
    for line in sys.stdin:
        kind, *numbers = json.loads(line)
        if kind == "memory":
            reply: Any = llm.apply_model(_memory)[0]
        else:
            batch, tokens = numbers
            prompts = [{"prompt_token_ids": [7 + i] * PROMPT_TOKENS} for i in range(batch)]
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            reply = time.perf_counter() - start
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _memory(model: Any) -> dict[str, int]:
    import ctypes

    import psutil

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return {"resident": psutil.Process().memory_info().rss, "weights": weights}


def measure(name: str, bf16: Path, fp8: Path) -> tuple[list[dict[str, object]], dict[str, dict[str, int]]]:
    batches, tokens = MODELS[name]
    engines = {
        "plugin": Engine(fp8, VLLM_RMSQ_BACKEND="auto"),
        "bf16": Engine(bf16, VLLM_RMSQ_BACKEND="off"),
        "stock": Engine(fp8, VLLM_RMSQ_BACKEND="off"),
    }
    memory = {side: engine.ask("memory") for side, engine in engines.items()}
    rows = []
    for batch in batches:
        speeds: dict[str, list[float]] = {side: [] for side in engines}
        for turn in range(max(ROUNDS.values()) + 1):
            for side, engine in engines.items():
                if turn > ROUNDS[side]:
                    continue
                seconds = engine.ask("generate", batch, tokens[side])
                if turn:  # the first warms up
                    speeds[side].append(batch * tokens[side] / seconds)
        medians = {side: statistics.median(values) for side, values in speeds.items()}
        row: dict[str, object] = {"model": name, "batch": batch}
        row |= {f"{side} tok/s": speed for side, speed in medians.items()}
        row |= {f"plugin / {side}": medians["plugin"] / medians[side] for side in ("bf16", "stock")}
        rows.append(row)
        print(row, flush=True)
    for engine in engines.values():
        engine.close()
    return rows, memory


def plot(rows: list[dict[str, object]]) -> None:
    figure, axes = plt.subplots(1, len(MODELS), figsize=(9, 4), layout="constrained")
    for axis, name in zip(axes, MODELS, strict=True):
        shown = [row for row in rows if row["model"] == name]
        for offset, (side, label) in enumerate(LABELS.items()):
            places = [i + 0.27 * (offset - 1) for i in range(len(shown))]
            bars = axis.bar(places, [row[f"{side} tok/s"] for row in shown], 0.25, label=label)
            axis.bar_label(bars, fmt="%.3g", fontsize=7)
        axis.set_xticks(range(len(shown)), [str(row["batch"]) for row in shown])
        axis.set(title=name, xlabel="sequences at once", ylabel="tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(f"Generation in vLLM — {common.machine()}", fontsize=10)
    figure.savefig(common.RESULTS / "end_to_end.png", dpi=120)


def main() -> None:
    print(common.machine())
    small = measure("SmolLM2-135M", smollm2.bf16(CACHE), smollm2.fp8(CACHE))
    large = measure("Llama-1.1B", *llama())
    common.report("end_to_end", small[0] + large[0])
    plot(small[0] + large[0])
    empty = {side: memory["resident"] - memory["weights"] for side, memory in small[1].items()}
    print("\nLlama-1.1B, resident memory in MB: worker, worker without weights, difference, weights")
    for side, memory in large[1].items():
        numbers = memory["resident"], empty[side], memory["resident"] - empty[side], memory["weights"]
        print(f"{LABELS[side]:>18}", *(f"{number / 1e6:8.0f}" for number in numbers))


if __name__ == "__main__":
    main()
