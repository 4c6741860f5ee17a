"""SiLU times up + FP8 quantization on the CPU: backend ``cpu`` and stock vLLM, in one run.

Dimensions:
    T: rows (tokens)
    I: intermediate size

Stock vLLM runs its SiluAndMul and then its per-token FP8 quantization, op by op and compiled into one graph
by torch.compile. Beside them stock vLLM's activation alone, as a bf16 model has it, and a copy of the
``[T, 2 I]`` bf16 input into existing memory.

Prints a table, appends it to ``benchmarks/results/silu_mul_quant.csv`` and draws ``.png``::

    python benchmarks/silu_mul_quant.py
"""

from __future__ import annotations

import common
import matplotlib.pyplot as plt
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from vllm_neuron_rmsq import ops

GOALS = [(t, i) for i in (4096, 8192, 14336) for t in (1, 16, 128, 512, 2048)]
OVER_T = [(2**i, 4096) for i in range(12)]
OVER_I = [(512, i) for i in (512, 1024, 1536, 2048, 4096, 8192, 14336)]
LABELS = {
    "ours": "backend cpu",
    "stock": "stock vLLM",
    "compiled": "stock vLLM, compiled",
    "activation": "stock vLLM, activation alone (bf16)",
}
OURS_BYTES, COPY_BYTES = 5, 8
"""Moved per element of I: gate and up (2 each) and a code; a copy reads and writes 2 of both."""


def compiled_stock(activation: SiluAndMul, quantize: QuantFP8):
    """The same two steps, in their plain torch form, as one graph for any number of rows."""

    def step(gate_up):
        return quantize.forward_native(activation.forward_native(gate_up))

    return torch.compile(step, dynamic=True)


def measure(t: int, i: int, activation: SiluAndMul, quantize: QuantFP8, compiled) -> dict[str, object]:
    gate_up = torch.randn(t, 2 * i, dtype=torch.bfloat16)
    target = torch.empty_like(gate_up)
    sides = {
        "ours": lambda: ops.silu_mul_quant(gate_up, backend="cpu"),
        "stock": lambda: quantize(activation(gate_up)),
        "compiled": lambda: compiled(gate_up),
        "activation": lambda: activation(gate_up),
        "copy": lambda: target.copy_(gate_up),
    }
    with torch.inference_mode():
        seconds = common.take_turns(sides, seconds=0.3, in_a_row=5)
    speed = OURS_BYTES * t * i / seconds["ours"]
    return {
        "T": t,
        "I": i,
        **{f"{side} us": 1e6 * taken for side, taken in seconds.items()},
        **{f"{side} / ours": seconds[side] / seconds["ours"] for side in ("stock", "compiled", "activation")},
        "ours GB/s": speed / 1e9,
        "of copy": speed / (COPY_BYTES * t * i / seconds["copy"]),
    }


def plot(rows: dict[tuple[int, int], dict[str, object]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, cases, name, fixed in ((axes[0], OVER_T, "T", "I = 4096"), (axes[1], OVER_I, "I", "T = 512")):
        for side, label in LABELS.items():
            x = [rows[case][name] for case in cases]
            axis.loglog(x, [rows[case][f"{side} us"] for case in cases], marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set(title=fixed, xlabel=name)
        axis.grid(which="major", alpha=0.3)
    axes[0].set_ylabel("us")
    axes[0].legend()
    figure.suptitle(f"SiLU times up + FP8 quantization, bf16 — {common.machine()}", fontsize=10)
    figure.savefig(common.RESULTS / "silu_mul_quant.png", dpi=120)


def main() -> None:
    torch.manual_seed(0)
    print(common.machine())
    with set_current_vllm_config(VllmConfig()):
        activation = SiluAndMul()
        quantize = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
    compiled = compiled_stock(activation, quantize)
    cases = sorted({*GOALS, *OVER_T, *OVER_I}, key=lambda case: (case[1], case[0]))
    rows = {case: measure(*case, activation, quantize, compiled) for case in cases}
    common.report("silu_mul_quant", list(rows.values()))
    plot(rows)


if __name__ == "__main__":
    main()
