"""What a decoder layer should cost on Trainium2, on paper: our three stages, stock bf16, ModelOpt static FP8.

Nothing here was measured. Ours are our NKI kernels' *scheduled* times (the simulator's cost model, see
docs/kernels/cost_model.md). Everything else is charged its roofline, the time its bytes or its
multiplications take at the published peak, which no kernel reaches: the comparison is on stock's side. For a
like-for-like reading the last columns give the roofline of our stages too. Left out on both sides, being the
same: rotary embedding, attention proper, the KV cache.

    python benchmarks/neuron_layer_cost.py [--quick]

Dimensions:
    T: tokens of a step; H: hidden size; I: intermediate size; Q, K: features of all query, of all key heads
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import typer
from common import report

from vllm_neuron_rmsq.kernels.nki.packed_fp8_linear import packed_fp8_linear_bytes_kernel, prepacked_shape
from vllm_neuron_rmsq.kernels.nki.rms_norm_quant import rms_norm_quant_bytes_kernel
from vllm_neuron_rmsq.kernels.nki.silu_mul_quant import silu_mul_quant_bytes_kernel
from vllm_neuron_rmsq.kernels.nki.simulator import Zeros, scheduled_us

LNC = 2

# Inputs and their sources, files of the public repository aws-neuron/aws-neuron-sdk. A chip's figures are in
# the table of about-neuron/arch/neuron-hardware/trainium2.rst; a logical core (LNC 2) has a quarter of each.
HBM_BYTES_PER_US = 2.9e6 / 4
BF16_PER_US = 667e6 / 4
FP8_PER_US = 1299e6 / 4
LINK_BYTES_PER_US = 1.28e6 / 4  # NeuronLink-v3
COLLECTIVE_US = 5.0
"""Latency of a small collective: 1 to 10 us by neuron-runtime/explore/intranode-collective-comm.rst (mesh:
one step, whatever the ranks). The same for every side; a layer has four in prefill, two in decode."""

PREFILL_ROWS = 2048
"""Longest matmul that is simulated; a longer one is extrapolated from it and half of it: from there on time
is linear in the rows."""


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder layer."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128


MODELS = (
    Model("Llama 8B", 4096, 14336, 32, 8),
    Model("Llama 70B", 8192, 28672, 64, 8),
)
TENSOR_PARALLEL = (8, 16, 32)
STEPS = {"prefill 1k": 1024, "prefill 4k": 4096, "decode 1": 1, "decode 8": 8, "decode 32": 32}
SIDES = ("stock bf16", "static FP8", "bf16", "fp8-prefill", "fp8")
"""Stock, ModelOpt's static FP8, and our stages by the value of the setting ``attention``."""


@dataclass
class Layer:
    """What a layer takes on one rank, in us: scheduled where the kernel is ours, and by rooflines alone."""

    us: float = 0.0
    roofline_us: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, roofline: float, scheduled: float | None = None) -> None:
        """Add a part; without a scheduled time its roofline stands for it."""
        us = roofline if scheduled is None else max(scheduled, roofline)
        self.us += us
        self.roofline_us += roofline
        self.parts[name] = self.parts.get(name, 0.0) + us


def norm_us(rows: int, width: int, gamma: bool, residual: bool) -> float:
    """Scheduled time of our norm kernel on ``[rows, width]`` bf16."""
    hidden = Zeros((max(rows, LNC), width), "bfloat16")
    weight = Zeros((width,), "bfloat16") if gamma else None
    added = hidden if residual else None
    return scheduled_us(rms_norm_quant_bytes_kernel, LNC, hidden, weight=weight, residual=added)


def silu_us(rows: int, width: int) -> float:
    """Scheduled time of our activation kernel, ``[rows, 2 width]`` to packed rows."""
    if rows > PREFILL_ROWS:
        return _extrapolated(silu_us, rows, width)
    gate_up = Zeros((max(rows, LNC), 2 * width), "bfloat16")
    return scheduled_us(silu_mul_quant_bytes_kernel, LNC, gate_up)


def linear_us(rows: int, width: int, features: int) -> float:
    """Scheduled time of our matmul kernel, ``[rows, width]`` packed by ``[features, width]``."""
    if rows > PREFILL_ROWS:
        return _extrapolated(linear_us, rows, width, features)
    packed = Zeros((max(rows, LNC), width + 4), "uint8")
    weight = Zeros(prepacked_shape(features, width), "uint8")
    scale = Zeros((features,), "float32")
    return scheduled_us(packed_fp8_linear_bytes_kernel, LNC, packed, weight, scale)


def _extrapolated(function, rows: int, *sizes: int) -> float:
    long, short = function(PREFILL_ROWS, *sizes), function(PREFILL_ROWS // 2, *sizes)
    return long + (long - short) * (rows - PREFILL_ROWS) / (PREFILL_ROWS / 2)


def matmul_roofline(rows: int, width: int, features: int, fp8_weight: bool, fp8_rate: bool) -> float:
    """Weights and rows through HBM, or multiplications, whichever takes longer."""
    moved = width * features * (1 if fp8_weight else 2) + rows * width * (1 if fp8_rate else 2)
    moved += rows * features * 2
    rate = FP8_PER_US if fp8_rate else BF16_PER_US
    return max(moved / HBM_BYTES_PER_US, 2 * rows * width * features / rate)


def collective(bytes_of_all: float, ranks: int) -> float:
    """An all-gather or a reduce-scatter of so many bytes in all; an all-reduce is both, in one latency."""
    return COLLECTIVE_US + bytes_of_all * (ranks - 1) / ranks / LINK_BYTES_PER_US


def layer(model: Model, ranks: int, rows: int, side: str) -> Layer:
    """Add up one layer on one rank."""
    out = Layer()
    prefill = rows > 64
    local = rows // ranks if prefill else rows  # sequence parallel outside attention and MLP
    h, width = model.hidden, model.intermediate // ranks
    q = model.heads * model.head_dim // ranks
    kv = 2 * max(1, model.kv_heads // ranks) * model.head_dim
    ours = side in ("bf16", "fp8-prefill", "fp8")
    static = side == "static FP8"
    fp8_qkv = static or side == "fp8" or (side == "fp8-prefill" and prefill)
    fp8_out = static or side in ("fp8", "fp8-prefill")
    fp8_mlp = static or ours

    # Each half of the layer: norm, gather, matmuls, reduce. Norms read and write their rows once.
    def norm(name: str, packed: bool, residual: bool) -> None:
        bytes_per_row = (
            2 * h * (2 if residual else 1) + (h + 4 if packed else 2 * h) + (2 * h if residual else 0)
        )
        ours_us = norm_us(local, h, True, residual) if ours and packed else None
        out.add(name, local * bytes_per_row / HBM_BYTES_PER_US, ours_us)

    def gather(name: str, packed: bool) -> None:
        if prefill:
            out.add(name, collective(rows * (h + 4 if packed else 2 * h), ranks))

    def reduce(name: str) -> None:
        # Prefill: reduce-scatter. Decode: all-reduce, which moves twice as much.
        out.add(name, collective(rows * 2 * h * (1 if prefill else 2), ranks))

    def linear(name: str, n_in: int, n_out: int, fp8: bool) -> None:
        # Stock's static FP8 decodes and prefills at FP8's rate too.
        scheduled = linear_us(rows, n_in, n_out) if ours and fp8 else None
        out.add(name, matmul_roofline(rows, n_in, n_out, fp8, fp8), scheduled)

    norm("input norm", packed=fp8_qkv and (ours or static), residual=False)
    gather("gather", packed=fp8_qkv and ours)
    linear("qkv", h, q + kv, fp8_qkv)
    if ours and fp8_out:
        bytes_moved = rows * (2 * q + q + 4)
        out.add("quantize attention", bytes_moved / HBM_BYTES_PER_US, norm_us(rows, q, False, False))
    linear("o", q, h, fp8_out)
    reduce("reduce")
    norm("post norm", packed=fp8_mlp, residual=True)
    gather("gather", packed=fp8_mlp)
    linear("gate_up", h, 2 * width, fp8_mlp)
    if ours:
        bytes_moved = rows * (4 * width + width + 4)
        out.add("silu", bytes_moved / HBM_BYTES_PER_US, silu_us(rows, width))
    # Stock's MLP kernels keep the activation on chip.
    linear("down", width, h, fp8_mlp)
    reduce("reduce")
    return out


def table(models: tuple[Model, ...], ranks: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """One row for each model, number of ranks and step."""
    for model in models:
        for tp in ranks:
            for step, rows in STEPS.items():
                layers = {side: layer(model, tp, rows, side) for side in SIDES}
                stages = {side: layers[side] for side in SIDES[2:]}
                best = min(stages, key=lambda side: stages[side].us)
                yield {
                    "model": model.name,
                    "TP": tp,
                    "step": step,
                    **{f"{side} us": layers[side].us for side in SIDES},
                    "best stage": best,
                    "stock bf16 / best": layers["stock bf16"].us / stages[best].us,
                    **{f"{side} roofline us": stages[side].roofline_us for side in stages},
                }


def main(quick: Annotated[bool, typer.Option(help="One model on 8 ranks.")] = False) -> None:
    """Print the table and keep it in results/neuron_layer_cost.csv."""
    rows = list(table(MODELS[:1] if quick else MODELS, TENSOR_PARALLEL[:1] if quick else TENSOR_PARALLEL))
    report("neuron_layer_cost", rows)


if __name__ == "__main__":
    typer.run(main)
