"""What each FP8 scheme does to a real model, and what it costs: SmolLM2-135M in every kind of checkpoint.

Perplexity on 4 x 1000 tokens of Python's help texts, of the checkpoint in the plugin (vLLM's model classes,
layers fused) beside the float32 model that the checkpoint stands for: transformers' Llama with the codes
dequantized and activations quantized as the scheme says. For block checkpoints the same once more with one
activation scale for a token instead of one for each 128 features, which is what packed rows have.

Then what it costs: the time of a linear of 4096 x 4096 at one row, on one thread, beside the per-token
scheme's; and the tokens a second that ``vllm serve`` decodes for one client, compiled: a server for each
fused kind, taking turns, all with the shapes of the model that block scales need. The table goes into
``docs/schemes.md``::

    python benchmarks/schemes.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import pydoc_data.topics
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import fp8_kinds  # noqa: E402
import vllm_models  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from vllm_neuron_rmsq import ops, settings, target, weights  # noqa: E402
from vllm_neuron_rmsq.cli import smollm2  # noqa: E402
from vllm_neuron_rmsq.measure import servers  # noqa: E402
from vllm_neuron_rmsq.measure.results import RUN_COLUMNS  # noqa: E402

PAGE = ROOT / "docs" / "schemes.md"
TEXTS, LENGTH = 4, 1000
ROUNDS, DECODED = 9, 32
"""Timed turns of each server, and tokens in a turn."""
HEADS = 3
"""Query heads to a KV head, and how many of 64 features fill whole blocks of 128 with one KV head more."""

KINDS = (
    "compressed-tensors channel",
    "compressed-tensors tensor",
    "fp8 tensor",
    "compressed-tensors tensor static",
    "compressed-tensors channel static",
    "fp8 block",
    "compressed-tensors channel weight-only",
)
"""One of each arithmetic; other writers' checkpoints of the same give the same numbers."""


def tokens(folder: Path) -> list[torch.Tensor]:
    """Return the texts to measure on, ``[1000]`` each, and one more to calibrate static scales on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer("\n".join(pydoc_data.topics.topics.values())).input_ids)
    return list(ids[: (TEXTS + 1) * LENGTH].reshape(TEXTS + 1, LENGTH))


def with_whole_blocks(source: Path, folder: Path) -> Path:
    """Write SmolLM2 with a fourth KV head, and its three query heads, of zeros: the same model.

    vLLM takes fused q, k and v with block scales only if each fills whole blocks of 128; its own are 576 and
    192.
    """
    config = json.loads((source / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    config |= {"head_dim": width}
    config["num_attention_heads"] += HEADS
    config["num_key_value_heads"] += 1
    tensors = fp8_kinds.load(source)
    for name, tensor in tensors.items():
        rows = {"q_proj": HEADS * width, "k_proj": width, "v_proj": width}.get(name.split(".")[-2], 0)
        columns = HEADS * width if ".o_proj." in name else 0
        if rows or columns:
            tensors[name] = torch.nn.functional.pad(tensor, (0, columns, 0, rows)).contiguous()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_plugin(folder: Path, texts: list[torch.Tensor]) -> tuple[float, str]:
    """Return the perplexity of a checkpoint in model classes with the plugin, and the start-up line."""
    loaded = vllm_models.Loaded(folder)
    given = []
    for ids in texts:
        scores = loaded.logits(ids.int()).float().log_softmax(-1)
        given.append(scores[:-1].gather(1, ids[1:, None]))
    return math.exp(-torch.cat(given).mean().item()), str(loaded.report)


def exactly(
    source: Path, folder: Path, kind: str, texts: list[torch.Tensor], activations: str | None
) -> float:
    """Return the perplexity of the float32 model that a checkpoint stands for."""
    model = fp8_kinds.reference_model(source, folder, kind, activations)
    return math.exp(-torch.cat([fp8_kinds.logprobs(model, ids) for ids in texts]).mean().item())


def linear_times() -> dict[str, float]:
    """Return the time of a linear of 4096 x 4096 at one row on one thread, beside the per-token scheme's."""
    size = 4096
    torch.manual_seed(0)
    weight = torch.randn(size, size)
    hidden = torch.randn(1, size, dtype=torch.bfloat16)
    scale = torch.full((1,), 0.02)
    rows = ops.rms_norm_quant(hidden, None)
    codes = ops.rms_norm_quant(hidden, None, static_scale=scale)
    channel, channel_scale = weights.quantize(weight, target.get("trn2"))
    block, block_scale = weights.quantize(weight, target.get("trn2"), blocks=True)
    channel_scale = channel_scale.reshape(-1)
    one = ops.prepack_fp8_weight(channel, channel_scale)
    blocks = ops.prepack_fp8_weight(block, block_scale)
    sides = {
        "per-token": lambda: ops.packed_fp8_linear(rows, one, channel_scale),
        "static": lambda: ops.packed_fp8_linear(codes, one, channel_scale, static_scale=scale),
        "block": lambda: ops.packed_fp8_linear(rows, blocks, block_scale),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for _ in range(301):
            for name, call in sides.items():
                start = time.thread_time()  # the thread's own, whatever else the machine does
                call()
                times[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {name: taken / medians["per-token"] for name, taken in medians.items()}


def decode_speeds(checkpoints: dict[str, Path]) -> dict[str, float]:
    """Return the median tokens a second that a server of each checkpoint decodes for one client.

    Args:
        checkpoints: by kind, all of one model.
    """
    turns: dict[str, list[float]] = {kind: [] for kind in checkpoints}

    async def measure_in_turns(up: dict[str, servers.Server]) -> None:
        for count in range(ROUNDS + 1):
            for kind, server in up.items():
                speed = await server.decode(1, DECODED)
                if count:  # the first one warms up
                    turns[kind].append(speed)

    with contextlib.ExitStack() as stack:
        up = {}
        for kind, folder in checkpoints.items():
            print(f"starting a server of {kind}", flush=True)
            vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
            server = servers.vllm(folder, folder / "server.log", {}, vocabulary)
            up[kind] = stack.enter_context(contextlib.closing(server))
        asyncio.run(measure_in_turns(up))
    return {kind: statistics.median(speeds) for kind, speeds in turns.items()}


def measure(kinds: list[str]) -> list[dict[str, object]]:
    """Return a row for each kind of checkpoint."""
    source = smollm2.bf16(ROOT / ".cache")
    *texts, calibration = tokens(source)
    times = linear_times()
    rows: list[dict[str, object]] = []
    served: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as scratch:
        padded = with_whole_blocks(source, Path(scratch) / "padded")
        for kind in kinds:
            blocks = fp8_kinds.KINDS[kind].weights == "block"
            bf16 = padded if blocks else source
            folder = Path(scratch) / kind.replace(" ", "-")
            fp8_kinds.write(bf16, folder, kind, calibration=[calibration])
            if fp8_kinds.KINDS[kind].activations != "none":
                served[kind] = folder
                if not blocks:
                    served[kind] = folder.with_name(f"{folder.name}-padded")
                    fp8_kinds.write(padded, served[kind], kind, calibration=[calibration])
            plugin, line = in_plugin(folder, texts)
            found = re.search(r"FP8 linears \(([^)]*)\)", line)
            scheme = found[1] if found else "none"
            exact = exactly(bf16, folder, kind, texts, None)
            rows.append(
                {
                    "checkpoint": kind,
                    "scheme": scheme,
                    "plugin": f"{plugin:.3f}",
                    "float32": f"{exact:.3f}",
                    "difference %": f"{100 * (plugin / exact - 1):.2f}",
                    "float32, a scale a token": (
                        f"{exactly(bf16, folder, kind, texts, 'token'):.3f}" if blocks else ""
                    ),
                    "linear at 1 row": times.get(scheme, ""),
                }
            )
            print(rows[-1], line, flush=True)
        settings.install(None)
        speeds = decode_speeds(served)
    for row in rows:
        row["decode x 1 tok/s"] = speeds.get(str(row["checkpoint"]), "")
    return rows


def page(rows: list[dict[str, str]]) -> str:
    """Return the table of ``docs/schemes.md``."""
    lines = [
        "| checkpoint | scheme | plugin | float32 | difference | linear at one row | decode x 1, tokens/s |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        taken = f"{float(row['linear at 1 row']):.2f}" if row["linear at 1 row"] else ""
        cells = (
            row["checkpoint"],
            row["scheme"],
            f"{float(row['plugin']):.2f}",
            f"{float(row['float32']):.2f}",
            f"{float(row['difference %']):+.2f} %",
            taken,
            row.get("decode x 1 tok/s", ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row["float32, a scale a token"]:
            group, token = float(row["float32"]), float(row["float32, a scale a token"])
            lines += [
                "",
                f"Block checkpoints in float32: {group:.2f} with an activation scale for each 128 features,",
                f"{token:.2f} with one for the whole row, as packed rows have it: "
                f"{100 * (token / group - 1):+.2f} %.",
            ]
    run = [rows[-1][column] for column in RUN_COLUMNS]
    return "\n".join([*lines, "", f"{', '.join(run)}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "kinds", nargs="*", default=list(KINDS), help="kinds of tests/fp8_kinds.py; default: one of each"
    )
    common.report("schemes", measure(parser.parse_args().kinds))
    old = PAGE.read_text()
    new = re.sub(
        r"(<!-- schemes -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{page(common.latest('schemes'))}\n{match[2]}",
        old,
        flags=re.DOTALL,
    )
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
