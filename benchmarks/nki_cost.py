"""What the NKI kernels should cost on Trainium2, by the simulator's cost MODEL. Nothing here was measured.

The model adds up what a kernel issues, priced with published clock rates, lane counts, performance modes and
DMA bandwidth, per engine and as if nothing waited: the busiest engine is a floor of the latency, not a
prediction of it. Beside it stand AWS's published latency targets for its own rmsnorm_quant_kernel (LNC 2),
which are measured end to end, and what the three full-width VectorE passes of that kernel's published
schedule take in the same model.

    python benchmarks/nki_cost.py [--csv nki_cost.csv] [--quick]
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_neuron_rmsq.kernels.nki.packed_fp8_linear import packed_fp8_linear_kernel, prepack
from vllm_neuron_rmsq.kernels.nki.rmsnorm_quant import RmsNormQuantKernelArgs, rmsnorm_quant_kernel
from vllm_neuron_rmsq.kernels.nki.simulator import CostReport, cost

LNC = 2
NORMS = {
    (1, 2048, 8192): 458.2,
    (1, 32768, 8192): 6287.0,
    (1, 2048, 16384): 866.81,
    (1, 2, 8192): None,
    (1, 64, 8192): None,
    (1, 256, 8192): None,
    (1, 64, 16384): None,
}
"""Shapes ``[B, S, H]`` and AWS's latency target in us (NKI Library, RMSNorm-Quant design specification)."""

MATMULS = [(1, 8192, 1280), (32, 8192, 1280), (32, 8192, 7168), (512, 8192, 1280)]
"""``(T, H, N)``: Llama 3.3 70B's qkv and gate/up projections on one of 8 tensor-parallel ranks."""

ENGINES = ("TensorE", "VectorE", "ScalarE", "GpSimdE", "DMA")
COLUMNS = (
    "kernel",
    "shape",
    "residual",
    *(f"{engine} us" for engine in ENGINES),
    "VectorE us, careful",
    "bound",
    "model us",
    "DMA roofline us",
    "of 3 passes",
    "AWS target us",
)


def norm(shape: tuple[int, int, int], residual: bool) -> CostReport:
    """Cost of the norm kernel on bf16 rows."""
    hidden = torch.zeros(shape, dtype=torch.bfloat16)
    weight = torch.ones(shape[-1], dtype=torch.bfloat16)
    extra = {"residual": hidden} if residual else {}
    return cost(rmsnorm_quant_kernel, LNC)(hidden, weight, RmsNormQuantKernelArgs(), **extra)


def matmul(rows: int, width: int, features: int) -> CostReport:
    """Cost of the packed matmul."""
    packed = torch.zeros((rows, width + 4), dtype=torch.uint8)
    weight = prepack(torch.zeros((features, width), dtype=torch.uint8))
    return cost(packed_fp8_linear_kernel, LNC)(packed, weight, torch.ones(features))


def published_us(rows: int, width: int) -> float:
    """Three full-width passes of VectorE (0.96 GHz, a column a cycle) over a core's tiles of 128 rows."""
    tiles = math.ceil(math.ceil(rows / LNC) / 128)
    return tiles * 3 * width / 0.96e3


def line(kernel: str, shape: str, residual: bool, report: CostReport, passes: float | None, target) -> list:
    """One row of the table, numbers as they are."""
    busy = [report.engines[e].time_us if e in report.engines else 0.0 for e in ENGINES]
    return [
        kernel,
        shape,
        "yes" if residual else "no",
        *busy,
        report.worst.careful_vector_us,
        report.bound,
        report.time_us,
        report.dma_roofline_us,
        None if passes is None else report.time_us / passes,
        target,
    ]


def show(value) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.2f}"
        if isinstance(value, float) and value < 10
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def main(
    out: Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Leave out the longest input, minutes of simulation.")] = False,
) -> None:
    """Print the modelled cost of the NKI kernels on Trainium2, LNC 2."""
    lines = []
    for shape, target in NORMS.items():
        if quick and shape[1] > 2048:
            continue
        for residual in (False, True):
            report = norm(shape, residual)
            passes = published_us(shape[0] * shape[1], shape[2])
            lines.append(
                line(
                    "rmsnorm_quant", str(list(shape)), residual, report, passes, None if residual else target
                )
            )
    for rows, width, features in MATMULS:
        report = matmul(rows, width, features)
        lines.append(
            line("packed_fp8_linear", f"[{rows}, {width}] x [{features}]", False, report, None, None)
        )

    table = Table(
        title="MODEL of NKI kernel cost on Trainium2, LNC 2: busy time per engine, not a measurement"
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("kernel", "shape", "bound") else "right")
    for values in lines:
        table.add_row(*map(show, values))
    console = Console(width=200)
    console.print(table)
    console.print(
        "model us: busy time of the busiest engine, a floor. of 3 passes: that over three full-width VectorE "
        "passes, the published schedule. careful: VectorE if its 16-bit mode only doubles NeuronCore-v2's "
        "speed. AWS target: published latency target of AWS's own kernel; compare orders of magnitude only."
    )
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                [
                    f"{column} (MODEL)" if "us" in column and "AWS" not in column else column
                    for column in COLUMNS
                ]
            )
            writer.writerows(lines)


if __name__ == "__main__":
    typer.run(main)
