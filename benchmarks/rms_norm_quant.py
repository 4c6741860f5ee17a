"""add + RMSNorm + FP8 quantization on the CPU: backend ``cpu`` and stock vLLM, in one run.

Dimensions:
    T: rows (tokens)
    H: hidden size

Stock vLLM runs its fused_add_rms_norm and then its per-token FP8 quantization, op by op and compiled into one
graph by torch.compile. Beside them stock vLLM's norm alone, as a bf16 model has it, and copies of a
``[T, H]`` bf16 tensor: into existing memory, and into new memory, where an op puts its results.

Prints a table, appends it to ``benchmarks/results/rms_norm_quant.csv`` and draws ``.png``::

    python benchmarks/rms_norm_quant.py
"""

from __future__ import annotations

import common
import matplotlib.pyplot as plt
import torch
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from vllm_neuron_rmsq import ops

GOALS = [(t, h) for h in (2048, 4096, 8192) for t in (1, 16, 128, 512, 2048)]
OVER_T = [(2**i, 4096) for i in range(14)]
OVER_H = [(512, h) for h in (256, 512, 1024, 2048, 4096, 8192, 16384)]
LABELS = {
    "ours": "backend cpu",
    "stock": "stock vLLM",
    "compiled": "stock vLLM, compiled",
    "norm": "stock vLLM, norm alone (bf16)",
}
OURS_BYTES, COPY_BYTES = 7, 4
"""Moved per element: hidden, residual and residual_out (2 each) and a code; a copy reads and writes 2."""


def compiled_stock(quantize: QuantFP8):
    """The same two steps, in their plain torch form, as one graph for any number of rows."""
    norm = ir.ops.fused_add_rms_norm.impls["native"].impl_fn

    def step(hidden, residual, weight):
        normalized, residual_out = norm(hidden, residual, weight, 1e-6)
        return *quantize.forward_native(normalized), residual_out

    return torch.compile(step, dynamic=True)


def measure(t: int, h: int, compiled, quantize: QuantFP8) -> dict[str, object]:
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(h, dtype=torch.bfloat16)
    weight = norm.weight.data.uniform_(0.5, 1.5)
    hidden, residual = torch.randn(2, t, h, dtype=torch.bfloat16)
    target = torch.empty_like(hidden)

    def stock():
        normalized, residual_out = norm(hidden, residual)
        return *quantize(normalized), residual_out

    sides = {
        "ours": lambda: ops.rms_norm_quant(hidden, weight, residual=residual, backend="cpu"),
        "stock": stock,
        "compiled": lambda: compiled(hidden, residual, weight),
        "norm": lambda: norm(hidden, residual),
        "copy": lambda: target.copy_(hidden),
        "clone": lambda: hidden.clone(),
    }
    with torch.inference_mode():
        seconds = common.take_turns(sides, seconds=0.3, in_a_row=5)
    speed = OURS_BYTES * t * h / seconds["ours"]
    return {
        "T": t,
        "H": h,
        **{f"{side} us": 1e6 * taken for side, taken in seconds.items()},
        **{f"{side} / ours": seconds[side] / seconds["ours"] for side in ("stock", "compiled", "norm")},
        "ours GB/s": speed / 1e9,
        **{f"of {side}": speed / (COPY_BYTES * t * h / seconds[side]) for side in ("copy", "clone")},
    }


def plot(rows: dict[tuple[int, int], dict[str, object]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, cases, name, fixed in ((axes[0], OVER_T, "T", "H = 4096"), (axes[1], OVER_H, "H", "T = 512")):
        for side, label in LABELS.items():
            x = [rows[case][name] for case in cases]
            axis.loglog(x, [rows[case][f"{side} us"] for case in cases], marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set(title=fixed, xlabel=name)
        axis.grid(which="major", alpha=0.3)
    axes[0].set_ylabel("us")
    axes[0].legend()
    figure.suptitle(f"add + RMSNorm + FP8 quantization, bf16 — {common.machine()}", fontsize=10)
    figure.savefig(common.RESULTS / "rms_norm_quant.png", dpi=120)


def main() -> None:
    torch.manual_seed(0)
    print(common.machine())
    with set_current_vllm_config(VllmConfig()):
        quantize = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
    compiled = compiled_stock(quantize)
    cases = sorted({*GOALS, *OVER_T, *OVER_H}, key=lambda case: (case[1], case[0]))
    rows = {case: measure(*case, compiled, quantize) for case in cases}
    common.report("rms_norm_quant", list(rows.values()))
    plot(rows)


if __name__ == "__main__":
    main()
