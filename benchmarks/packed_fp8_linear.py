"""FP8 linear on the CPU: backend ``cpu``, stock vLLM's FP8 linear and its bf16 linear, in one run.

Dimensions:
    T: rows (tokens)
    H: input features
    N: output features

Each multiplies an activation that is in its own format already (packed FP8, FP8, bf16) by a weight as vLLM
keeps it, prepacked where it does that, and returns bf16. Without AMX a product of FP8 values takes a bf16
multiplication, so the best rate that bf16 reaches with any number of rows is what FP8 could reach, too.
Prints a table, appends it to ``benchmarks/results/packed_fp8_linear.csv`` and draws ``.png``::

    python benchmarks/packed_fp8_linear.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import matplotlib.pyplot as plt
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_neuron_rmsq import ops, packed

SHAPES = ((2048, 11264), (4096, 14336), (8192, 8192))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LABELS = {"ours": "backend cpu (FP8)", "bf16": "vLLM (bf16)", "stock": "stock vLLM (FP8)"}


def stock_linear(h: int, n: int):
    """The kernel vLLM chooses here for per-channel weights and per-token activations."""
    with set_current_vllm_config(VllmConfig()):
        return init_fp8_linear_kernel(
            kFp8DynamicTokenSym,
            kFp8StaticChannelSym,
            input_dtype=torch.bfloat16,
            out_dtype=torch.bfloat16,
            weight_shape=(n, h),
        )


def bf16_linear(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """What vLLM multiplies an unquantized layer by: ``linear(x, weight, bias)``."""
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return layer.cpu_linear


def measure(h: int, n: int) -> list[dict[str, float]]:
    weight = torch.randn(n, h, dtype=torch.bfloat16)
    unquantized = bf16_linear(weight)
    codes, weight_scale = weight.to(torch.float8_e4m3fn), torch.rand(n) + 0.5
    prepacked = ops.prepack_fp8_weight(codes, weight_scale, backend="cpu")
    stock = stock_linear(h, n)

    def row(t: int) -> dict[str, float]:
        x = torch.randn(t, h, dtype=torch.bfloat16)
        x_codes, x_scale = x.to(torch.float8_e4m3fn), torch.rand(t, 1) + 0.5
        x_packed = packed.pack(x_codes, x_scale)

        def ours() -> torch.Tensor:
            return ops.packed_fp8_linear(x_packed, prepacked, weight_scale)

        def bf16() -> torch.Tensor:
            return unquantized(x, weight, None)

        def stock_fp8() -> torch.Tensor:
            return stock.apply_scaled_mm(
                A=x_codes,
                B=codes.t(),
                As=x_scale,
                Bs=weight_scale.unsqueeze(1),
                out_dtype=torch.bfloat16,
                bias=None,
                output_shape=[t, n],
            )

        torch.testing.assert_close(ours(), stock_fp8())
        torch.testing.assert_close(bf16(), torch.nn.functional.linear(x, weight))
        seconds = common.take_turns({"ours": ours, "bf16": bf16, "stock": stock_fp8})
        times = {f"{side} ms": 1e3 * taken for side, taken in seconds.items()}
        ratios = {f"{side} / ours": seconds[side] / seconds["ours"] for side in ("bf16", "stock")}
        return {"T": t, "H": h, "N": n, **times, **ratios}

    rows = [row(t) for t in ROWS]
    best = max(line["T"] / line["bf16 ms"] for line in rows)
    return [line | {"share": line["T"] / line["ours ms"] / best} for line in rows]


def plot(rows: list[dict[str, float]]) -> None:
    figure, axes = plt.subplots(1, len(SHAPES), figsize=(12, 4), sharey=True, layout="constrained")
    for axis, (h, n) in zip(axes, SHAPES, strict=True):
        shown = [row for row in rows if (row["H"], row["N"]) == (h, n)]
        for side, label in LABELS.items():
            axis.loglog(ROWS, [row[f"{side} ms"] for row in shown], marker="o", label=label, base=2)
        axis.set(title=f"H = {h}, N = {n}", xlabel="rows")
        axis.set_yscale("log")
        axis.grid(which="major", alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend()
    figure.suptitle(f"FP8 linear — {common.machine()}", fontsize=10)
    figure.savefig(common.RESULTS / "packed_fp8_linear.png", dpi=120)


def main() -> None:
    torch.manual_seed(0)
    print(common.machine())
    rows = [row for h, n in SHAPES for row in measure(h, n)]
    common.report("packed_fp8_linear", rows)
    plot(rows)


if __name__ == "__main__":
    main()
