"""Every figure of the hardware the simulator checks against or computes with, and where AWS publishes it.

Sources are files of the public repository aws-neuron/aws-neuron-sdk:

[T2]  nki/guides/architecture/trainium2_arch.rst
[T1]  nki/guides/architecture/trainium_inferentia2_arch.rst (carried over where [T2] says nothing new)
[T3]  nki/guides/architecture/trainium3_arch.rst
[ISA] nki/api/nki/isa/__init__.py (the instruction's own page)
[OPS] nki/api/nki.api.shared.rst
[DMA] nki/deep-dives/nki-dma-bandwidth-guide.rst
[RN]  release-notes/components/nki.rst
[E]   general/nki/api/nki/isa/__init__.py at SDK 2.21.0, the last release with an estimated cost on each
      instruction's page (for NeuronCore-v2; [T2] gives its lifts relative to these)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

PARTITIONS = 128  # [T1] SBUF and PSUM partitions; lanes of every compute engine
PSUM_BYTES = 16 * 1024  # [T2] PSUM per partition (2 MiB / 128)
PSUM_BANK_BYTES = 2 * 1024  # [T1] 8 banks; a matmul's output lies inside one
PSUM_BANKS = PSUM_BYTES // PSUM_BANK_BYTES

MATMUL_STATIONARY_FREE = 128  # [ISA] nc_matmul
MATMUL_MOVING_FREE = 512  # [ISA] nc_matmul: fp32 elements of a PSUM bank (NeuronCore-v4: more; held to this)
TENSOR_TRANSPOSE = 128  # [ISA] nc_transpose on TensorE: [128, 128] or smaller
VECTOR_TRANSPOSE = 32  # [ISA] nc_transpose on VectorE: [32, 32] or smaller
DMA_COMPUTE_SOURCES = 16  # [ISA] dma_compute
FREE_ELEMENTS = 64 * 1024  # [T1] ScalarE: elements per partition of an instruction; sizes are 16 bits wide
FREE_STRIDE = 2**15 - 1  # [T1] strides of the free dimensions are int16, in elements
GPSIMD_CORE_PARTITIONS = 16  # [ISA] nonzero_with_count: SBUF partitions of each of GpSimdE's 8 cores
BN_STATS_FREE = 512  # [ISA] bn_stats: elements per partition
SEARCH_FREE = (8, 16384)  # [ISA] max8, nc_find_index8: elements per partition
FP32_MIN = -3.4028234663852886e38  # [ISA] range_select: what a deselected element becomes
GPSIMD_DMA_BYTES = {1: 256, 2: 512, 4: 1024}  # [ISA] sendrecv: most per partition, by the dtype's size
VIEW_DIMS = 5  # language guide: an access pattern has up to 5 dimensions, the partition included


@dataclass(frozen=True)
class Target:
    """What differs between generations: NeuronCore, SBUF per partition, TensorE's FP8, operators missing."""

    generation: str
    sbuf_bytes: int
    matmul_fp8: tuple[str, ...]
    double_row: bool
    refused_operators: tuple[str, ...]


_NEW_IN_V4 = ("abs_max", "abs_min", "square", "relu")  # [RN] 0.4.0, of VectorE; ScalarE has square and relu
_FP8 = ("float8_e4m3", "float8_e5m2")  # [ISA] nc_matmul
TARGETS = {
    "trn1": Target("gen2", 192 * 1024, _FP8, False, _NEW_IN_V4),  # [T1]
    "trn2": Target("gen3", 224 * 1024, _FP8, True, _NEW_IN_V4),  # [T2]
    "trn3": Target("gen4", 256 * 1024, (*_FP8, "float8_e4m3fn"), True, ()),  # [T3] 32 MiB / 128
}


TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"


def target(name: str | None = None) -> Target:
    """The target called trn1, trn2, trn3 or gen2, gen3, gen4.

    None: that of ``NEURON_PLATFORM_TARGET_OVERRIDE``, as in the Neuron SDK; trn2 where it is not set.
    Raises ValueError for another name.
    """
    name = name or os.environ.get(TARGET_VARIABLE, "trn2")
    for short, candidate in TARGETS.items():
        if name in (short, candidate.generation):
            return candidate
    raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")


# -- the cost model (Trainium2) ----------------------------------------------------------------------

CLOCK_GHZ = {"TensorE": 2.4, "VectorE": 0.96, "ScalarE": 1.2, "GpSimdE": 1.2}  # [T2] frequency table
MIN_CYCLES = 64  # [OPS], [E] MIN_II, the minimum initiation interval of an instruction
GPSIMD_START = 150  # [E] iota, affine_select: 150 + N cycles; assumed of every GpSimdE instruction
TWO_INPUT_CYCLES = 2  # [T1], [E] VectorE: two input tiles take 2 N cycles, N if just one of them is in PSUM
VECTOR_PAIR_SPEEDUP = 2  # [T2] tensor_tensor, all bf16/fp16, inputs in SBUF: N / 2 by its table of widths
VECTOR_COPY_SPEEDUP = 4  # [T2] tensor_copy, tensor_scalar: all bf16/fp16, in SBUF, contiguous
VECTOR_COPY_SPEEDUP_PARTLY = 2  # [T2] the same, not contiguous, or one side in PSUM
VECTOR_BF16_REDUCE_SPEEDUP = 2  # [E] tensor_reduce: N / 2 if all bf16 and the operator is add or maximum
VECTOR_ZERO_SPEEDUP = 2  # [E] memset: N / 2 for zeros in bf16/fp16
VECTOR_RECIPROCAL = 8  # [OPS], [E] cycles per element
GPSIMD_RSQRT = 4  # [OPS] cycles per element (ScalarE: 1)
WIDE_STRIDE_BYTES = 16  # [T1] an innermost stride beyond this halves SBUF/PSUM bandwidth
WIDE_STRIDE_SLOWDOWN = 2  # [T1]
ACCUMULATOR_READ = 64  # [T1], [E] cycles to read the accumulator registers out (reduce_res)
FP32_MATMUL = 4  # [T1], [E] an fp32 matmul costs 4x one of bf16/fp16/tf32/fp8
FP32_TRANSPOSE = 2  # [T2] transpose mode doubles the speed of fp32
MATMUL_START = 64  # [E] nc_matmul: max(min(64, stationary free size), moving free size) cycles on average
DMA_ENGINES = 16  # [DMA] per NeuronCore
DMA_BYTES_PER_NS = 23.0  # [DMA] per engine on Trainium2
DMA_TRANSPOSE_FROM_HBM = 0.9  # [T2] share of the DMA bandwidth a transpose reaches, HBM to SBUF
DMA_TRANSPOSE_ON_CHIP = 0.5  # [T2] the same, SBUF to SBUF
DMA_GOOD_RUN_BYTES = 2048  # [DMA] contiguous bytes from which on bandwidth approaches its peak
HBM_BYTES_PER_NS = 3000.0 / 8  # [T2] 3 TB/s of a device shared by its 8 NeuronCores


# What the schedule adds. [M] is a public record of single instructions and transfers measured on
# Trainium2: Joejoedesu/voyager-compiler, timing_trainium2.json and {isa,operand,native}_characterization.json
# (October 2026, neuronx-cc 2.22). docs/kernels/cost_model.md: how well either set meets AWS's records.


@dataclass(frozen=True, eq=False)
class Latencies:
    """How long results take to be there, in microseconds.

    pipeline: from the last cycle of an instruction's work to its result, by engine. matmul: the same of
    TensorE in parts of the work's own length, on top. semaphore: from one engine's result to another's
    start. dma_issue: a queue issues one transfer in this time. dma_start: from the start of that to the
    transfer's first byte. dma_end: from its last byte to its result.
    """

    pipeline: dict[str, float]
    matmul: float
    semaphore: float
    dma_issue: float
    dma_start: float
    dma_end: float


MEASURED = Latencies(
    # [M] VectorE 0.14 to 0.16, ScalarE's activations 0.26 to 0.29, GpSimdE 0.05 after its 150 cycles
    pipeline={"TensorE": 0.20, "VectorE": 0.155, "ScalarE": 0.29, "GpSimdE": 0.05},
    matmul=1.0,  # [M] bf16: complete 0.2 us and twice the work's length after its start
    semaphore=0.06,  # an assumption
    dma_issue=0.60,  # [M]
    dma_start=1.35,  # [M] issue and dispatch: 0.60 + 0.75 into SBUF, 0.61 + 0.57 out of it
    dma_end=0.60,  # [M] 0.29 + 0.31 into SBUF, 0.16 + 0.36 out of it
)
DOCUMENTED = Latencies(
    pipeline={engine: 60 / clock / 1e3 for engine, clock in CLOCK_GHZ.items()},  # [T1] 60 cycles an access
    matmul=0.0,
    semaphore=0.06,
    dma_issue=0.0,
    dma_start=1.3,  # [DMA]
    dma_end=0.7,  # 2 us in all
)
DMA_SMALL_RUN_BYTES = 512  # [DMA] contiguous pieces below are charged as this many bytes
DMA_TRANSPOSE_ROW = (
    16  # [T2] elements of a partition's row that a transpose writes at once, on 128 partitions
)
DMA_PARTITIONS = PARTITIONS // DMA_ENGINES  # nki-dma-overview.rst: one engine moves 8 partitions of SBUF
LAUNCH_US = 10.0  # fitted to AWS's records: what a launch takes beside the kernel's own work; [M] has 9.4
COST_MODEL_VERSION = 1  # one more with every change that moves figures
