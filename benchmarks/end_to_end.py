"""Whole models in servers on the CPU: the plugin beside what a user would take instead, all in one run.

This is ``vllm-neuron-rmsq bench`` (:mod:`vllm_neuron_rmsq.measure.bench` says how it measures) on models that
need no download. Each is made under ``.cache/``:

- ``SmolLM2-135M``, a real one;
- ``Qwen2.5-0.5B`` and ``Llama-1.1B``, random weights in the shape of those models.

Prints a table, appends it to ``benchmarks/results/end_to_end.csv`` and draws ``end_to_end-<model>.png``. One
model takes about ten minutes, of which half is the servers' start::

    python benchmarks/end_to_end.py Qwen2.5-0.5B
"""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path

import common
import torch
from rich.console import Console

from vllm_neuron_rmsq.cli import smollm2
from vllm_neuron_rmsq.cli.bench import show
from vllm_neuron_rmsq.measure import bench, results

CACHE = Path(__file__).parents[1] / ".cache"
RANDOM = {
    "Qwen2.5-0.5B": (
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-1.1B": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
        },
    ),
}


def checkpoint(name: str) -> Path:
    """Return the bf16 checkpoint directory of a model, making it if it is not there.

    Raises:
        ValueError: there is no model of that name.
    """
    if name == "SmolLM2-135M":
        return smollm2.bf16(CACHE)
    if name not in RANDOM:
        raise ValueError(f"model: expected SmolLM2-135M, {' or '.join(RANDOM)}; got {name}")
    out = CACHE / name
    if not out.is_dir():
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        kind, sizes = RANDOM[name]
        partial = CACHE / f".{name}.partial"
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)
        model.save_pretrained(partial)
        for file in smollm2.bf16(CACHE).glob("*token*"):  # any will do: the server wants one
            shutil.copy(file, partial)
        partial.rename(out)
        del model
        gc.collect()
    return out


def measure(name: str) -> None:
    """Measure one model by every side; print, append and draw."""
    steps = ""

    def say(done: int, total: int, what: str) -> None:
        nonlocal steps
        if what != steps:
            print(f"{done}/{total} {what}", file=sys.stderr, flush=True)
        steps = what

    found = bench.compare(checkpoint(name), CACHE, progress=say)
    found.model = name
    show(found, Console(width=160))
    results.append(common.RESULTS / "end_to_end.csv", found.lines())
    bench.plot(found, common.RESULTS / f"end_to_end-{name}.png")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ("SmolLM2-135M", *RANDOM):
        measure(chosen)
