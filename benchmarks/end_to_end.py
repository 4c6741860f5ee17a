"""Whole models served by vLLM on the CPU: FP8 through the plugin, FP8 in stock vLLM, and bf16, in one run.

Each side is a ``vllm serve`` of its own with vLLM's defaults (among them torch.compile, and one core left to
the server's other processes), but prefix caching off, so that no run profits from the one before. The sides
take turns. In a turn a number of clients ask at once for one token each, then for more; the difference is
what decoding takes. Memory is the resident memory of vLLM's worker process, less what the same process has
without a model's weights (SmolLM2's worker less SmolLM2's weights).

Models: SmolLM2-135M-Instruct, and a 1.1-billion-parameter Llama (hidden size 2048, 22 layers) with random
weights, both made under ``.cache/``. Prints a table, appends it to ``benchmarks/results/end_to_end.csv`` and
draws ``.png``. It takes about 20 minutes::

    python benchmarks/end_to_end.py
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common
import httpx
import matplotlib.pyplot as plt
import openai
import psutil
from vllm.utils.network_utils import get_open_port

from vllm_neuron_rmsq import checkpoint
from vllm_neuron_rmsq.cli import smollm2

CACHE = Path(__file__).parents[1] / ".cache"
PROMPT_TOKENS = 4
ROUNDS = {"plugin": 5, "bf16": 5, "stock": 1}
"""Timed turns. Stock FP8 takes ten seconds for a token, so one must do."""
MODELS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    # model: (batch sizes, tokens generated for each prompt in a turn, by side)
    "SmolLM2-135M": ((1, 16), {"plugin": 64, "bf16": 64, "stock": 4}),
    "Llama-1.1B": ((1, 2, 4, 8), {"plugin": 32, "bf16": 32, "stock": 1}),
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
        for file in smollm2.bf16(CACHE).glob("*token*"):  # any will do: the server wants one
            shutil.copy(file, bf16)
        torch.set_default_dtype(torch.float32)
        gc.collect()
    if not fp8.is_dir():
        checkpoint.convert(bf16, fp8)
    return bf16, fp8


class Server:
    """One side: ``vllm serve``, up and answering."""

    def __init__(self, checkpoint: Path, **environment: str) -> None:
        log = CACHE / f"end_to_end-{checkpoint.name}-{environment['VLLM_RMSQ_BACKEND']}.log"
        port = get_open_port()
        command = f"serve {checkpoint} --port {port} --served-model-name model --max-model-len 256"
        options = f"--max-num-seqs 16 --no-enable-prefix-caching --kv-cache-memory-bytes {256 << 20}"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("vllm"), *command.split(), *options.split()],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )
        self.weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        self.client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=1200)
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended; see {log}")
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.5)

    async def generate(self, batch: int, tokens: int) -> float:
        """Return the seconds in which ``batch`` clients at once get ``tokens`` tokens each."""
        start = time.perf_counter()
        await asyncio.gather(
            *(
                self.client.completions.create(
                    model="model",
                    prompt=[7 + i] * PROMPT_TOKENS,
                    max_tokens=tokens,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                for i in range(batch)
            )
        )
        return time.perf_counter() - start

    async def decode(self, batch: int, tokens: int) -> float:
        """Return the tokens a second after the first one of each client."""
        first = await self.generate(batch, 1)
        return batch * tokens / (await self.generate(batch, 1 + tokens) - first)

    def resident(self) -> int:
        """Bytes of resident memory of the process that holds the model."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return max(process.memory_info().rss for process in processes)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


async def measure(
    name: str, bf16: Path, fp8: Path
) -> tuple[list[dict[str, object]], dict[str, tuple[int, int]]]:
    """Return a row for each batch size, and each side's resident memory and weight bytes."""
    batches, tokens = MODELS[name]
    sides = {"plugin": (fp8, "auto"), "bf16": (bf16, "off"), "stock": (fp8, "off")}
    rows = []
    with contextlib.ExitStack() as stack:
        servers = {
            side: stack.enter_context(contextlib.closing(Server(checkpoint, VLLM_RMSQ_BACKEND=backend)))
            for side, (checkpoint, backend) in sides.items()
        }
        memory = {side: (server.resident(), server.weights) for side, server in servers.items()}
        for batch in batches:
            speeds: dict[str, list[float]] = {side: [] for side in servers}
            for server in servers.values():
                await server.generate(batch, 2)  # warms up
            for turn in range(max(ROUNDS.values())):
                for side, server in servers.items():
                    if turn < ROUNDS[side]:
                        speeds[side].append(await server.decode(batch, tokens[side]))
            medians = {side: statistics.median(values) for side, values in speeds.items()}
            row: dict[str, object] = {"model": name, "batch": batch}
            row |= {f"{side} tok/s": speed for side, speed in medians.items()}
            row |= {f"plugin / {side}": medians["plugin"] / medians[side] for side in ("bf16", "stock")}
            rows.append(row)
            print(row, flush=True)
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
    figure.suptitle(f"Decoding in vllm serve — {common.machine()}", fontsize=10)
    figure.savefig(common.RESULTS / "end_to_end.png", dpi=120)


async def main() -> None:
    print(common.machine())
    small = await measure("SmolLM2-135M", smollm2.bf16(CACHE), smollm2.fp8(CACHE))
    large = await measure("Llama-1.1B", *llama())
    memory: dict[str, float] = {}
    for side, (resident, _) in large[1].items():
        without_weights = small[1][side][0] - small[1][side][1]
        memory[f"{side} MB"] = (resident - without_weights) / 1e6
    rows = [row | dict.fromkeys(memory, "") for row in small[0]] + [row | memory for row in large[0]]
    common.report("end_to_end", rows)
    plot(rows)


if __name__ == "__main__":
    asyncio.run(main())
