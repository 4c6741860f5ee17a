"""What the NKI kernels should cost on Trainium2, by the simulator's cost MODEL. Nothing here was measured.

First what the schedule says: in-order engines that wait for one another, under both readings of VectorE's
16-bit modes, "first / careful". docs/kernels/cost_model.md has how well that meets times AWS recorded for its
own kernel, and what is not in it, the launch above all. Then the same with the latencies AWS documents, which
are shorter; the goals were set with those. The floor is the busy time of the busiest engine, the roof the
time the kernel's bytes take at full DMA bandwidth.

    python benchmarks/nki_cost.py [--timelines DIRECTORY]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import report

from vllm_neuron_rmsq.kernels.nki.packed_fp8_linear import packed_fp8_linear_bytes_kernel, prepacked_shape
from vllm_neuron_rmsq.kernels.nki.rms_norm_quant import rms_norm_quant_bytes_kernel
from vllm_neuron_rmsq.kernels.nki.silu_mul_quant import silu_mul_quant_bytes_kernel
from vllm_neuron_rmsq.kernels.nki.simulator import CostReport, cost, hardware
from vllm_neuron_rmsq.weights import block_scale_shape

LNC = 2


@dataclass(frozen=True)
class Case:
    """A kernel on one shape. goal: the most it should take, first and careful reading, in us."""

    kernel: str
    shape: str
    run: Callable[[], CostReport]
    goal: tuple[float, float] | None = None


def norm(rows: int, width: int, residual: bool = False, goal: tuple[float, float] | None = None) -> Case:
    """RMSNorm + quantization of ``[rows, width]`` bf16."""

    def run() -> CostReport:
        hidden = torch.zeros((rows, width), dtype=torch.bfloat16)
        weight = torch.ones(width, dtype=torch.bfloat16)
        return cost(rms_norm_quant_bytes_kernel, LNC)(
            hidden, weight=weight, residual=hidden if residual else None
        )

    return Case("rms_norm_quant", f"[{rows}, {width}]" + (" + residual" if residual else ""), run, goal)


def linear(
    rows: int, width: int, features: int, goal: float | None = None, scheme: str = "per-channel"
) -> Case:
    """Rows of `width` codes times a weight of `features`.

    scheme: "per-channel" and "block" (of 128 x 128) are the weight's scales, with packed rows; "static" is
    per-channel with codes of one given scale.
    """
    blocks, static = scheme == "block", scheme == "static"

    def run() -> CostReport:
        packed = torch.zeros((rows, width + (0 if static else 4)), dtype=torch.uint8)
        weight = torch.zeros(prepacked_shape(features, width, blocks), dtype=torch.uint8)
        scale = torch.ones(block_scale_shape(features, width) if blocks else features)
        static_scale = torch.ones((128, 1)) if static else None
        return cost(packed_fp8_linear_bytes_kernel, LNC)(packed, weight, scale, static_scale=static_scale)

    shape = f"[{rows}, {width}] x {features}" + (f", {scheme}" if scheme != "per-channel" else "")
    return Case("packed_fp8_linear", shape, run, None if goal is None else (goal, goal))


def silu(rows: int, width: int, goal: float | None = None) -> Case:
    """SiLU times up + quantization, ``[rows, 2 width]`` bf16 to rows of `width` codes."""

    def run() -> CostReport:
        return cost(silu_mul_quant_bytes_kernel, LNC)(torch.zeros((rows, 2 * width), dtype=torch.bfloat16))

    return Case("silu_mul_quant", f"[{rows}, 2 x {width}]", run, None if goal is None else (goal, goal))


def dma_us(nbytes: float) -> float:
    """Microseconds that one core's half of `nbytes` takes at full DMA bandwidth."""
    return nbytes / LNC / (hardware.DMA_ENGINES * hardware.DMA_BYTES_PER_NS) / 1e3


CASES = [
    norm(2048, 8192, goal=(110, 150)),
    norm(2048, 8192, residual=True, goal=(200, 250)),
    norm(2048, 4096, goal=(60, 85)),
    norm(2048, 576, goal=(27, 27)),  # AWS's own kernel
    norm(2048, 16384),
    norm(2, 8192, goal=(14, 14)),
    norm(16, 8192, goal=(14, 14)),
    norm(16, 8192, residual=True, goal=(18, 18)),
    norm(64, 8192),
    norm(256, 8192),
    linear(1, 8192, 1280, goal=18),
    linear(64, 4096, 28672, goal=1.1 * dma_us(4096 * 28672)),  # 1.1 times its weight's stream
    linear(2048, 8192, 1280, goal=165),
    linear(1, 8192, 7168),
    linear(32, 8192, 7168),
    linear(64, 8192, 1280),
    linear(512, 8192, 1280),
    linear(1, 8192, 1280, scheme="static"),
    linear(2048, 8192, 1280, scheme="static"),
    linear(1, 8192, 1280, scheme="block"),
    linear(1, 8192, 7168, scheme="block"),
    linear(64, 8192, 1280, scheme="block"),
    linear(64, 4096, 28672, scheme="block"),
    linear(512, 8192, 1280, scheme="block"),
    linear(2048, 8192, 1280, scheme="block"),
    silu(2048, 14336, goal=1.5 * dma_us(2048 * (5 * 14336 + 4))),  # 1.5 times its DMA roof
    silu(2048, 3584),
    silu(1, 14336),
    silu(64, 14336),
    silu(16, 3584),
]


def line(case: Case, found: CostReport) -> dict[str, object]:
    """What is reported of `case`."""
    documented = [found.schedule(careful, latencies=hardware.DOCUMENTED).us for careful in (False, True)]
    return {
        "model": hardware.COST_MODEL_VERSION,
        "kernel": case.kernel,
        "shape": case.shape,
        "scheduled us": readings(found.scheduled_us, found.careful_us),
        "goal us": "-" if case.goal is None else readings(*case.goal),
        "documented latencies us": readings(*documented),
        "floor us": found.time_us,
        "roof us": found.dma_roofline_us,
        "busiest": found.schedule().busiest,
    }


def readings(first: float, careful: float) -> str:
    """Both readings; one where they agree."""
    return f"{first:.1f}" if f"{first:.1f}" == f"{careful:.1f}" else f"{first:.1f} / {careful:.1f}"


def main(
    timelines: Annotated[Path | None, typer.Option(help="Write pictures and traces (Perfetto) here.")] = None,
) -> None:
    """Print the modelled cost of the NKI kernels on Trainium2, LNC 2."""
    lines = []
    for case in CASES:
        found = case.run()
        lines.append(line(case, found))
        if timelines is not None:
            timelines.mkdir(parents=True, exist_ok=True)
            title = f"{case.kernel} {case.shape}"
            path = timelines / "".join(c if c.isalnum() else "_" for c in title).strip("_")
            found.schedule().draw(path.with_suffix(".png"), title)
            found.schedule().write_trace(path.with_suffix(".json"))
    report("nki_cost", lines)
    print(f"A MODEL of Trainium2, no measurement. A launch takes about {hardware.LAUNCH_US:.0f} us more.")


if __name__ == "__main__":
    typer.run(main)
