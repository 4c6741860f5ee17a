"""Every figure of the hardware the simulator checks against or computes with, and where AWS publishes it.

All for NeuronCore-v3 (Trainium2). Sources are files of the public repository aws-neuron/aws-neuron-sdk:

[T2]  nki/guides/architecture/trainium2_arch.rst
[T1]  nki/guides/architecture/trainium_inferentia2_arch.rst (carried over where [T2] says nothing new)
[ISA] nki/api/nki/isa/__init__.py (the instruction's own page)
[OPS] nki/api/nki.api.shared.rst
[DMA] nki/deep-dives/nki-dma-bandwidth-guide.rst
"""

from __future__ import annotations

PARTITIONS = 128  # [T1] SBUF and PSUM partitions; lanes of every compute engine
SBUF_BYTES = 224 * 1024  # [T2] SBUF per partition (28 MiB / 128)
PSUM_BYTES = 16 * 1024  # [T2] PSUM per partition (2 MiB / 128)
PSUM_BANK_BYTES = 2 * 1024  # [T1] 8 banks; a matmul's output lies inside one
PSUM_BANKS = PSUM_BYTES // PSUM_BANK_BYTES

MATMUL_STATIONARY_FREE = 128  # [ISA] nc_matmul
MATMUL_MOVING_FREE = 512  # [ISA] nc_matmul, NeuronCore-v2/v3
TENSOR_TRANSPOSE = 128  # [ISA] nc_transpose on TensorE: [128, 128] or smaller
VECTOR_TRANSPOSE = 32  # [ISA] nc_transpose on VectorE: [32, 32] or smaller
DMA_COMPUTE_SOURCES = 16  # [ISA] dma_compute
VIEW_DIMS = 5  # language guide: an access pattern has up to 5 dimensions, the partition included

# -- the cost model ---------------------------------------------------------------------------------

CLOCK_GHZ = {"TensorE": 2.4, "VectorE": 0.96, "ScalarE": 1.2, "GpSimdE": 1.2}  # [T2] frequency table
MIN_CYCLES = 64  # [OPS] minimum initiation interval of an instruction; [T1] MM_INIT_LATENCY of TensorE
TWO_INPUT_CYCLES = 2  # [T1] VectorE: an instruction with two input tiles takes 2 N cycles, N with one
VECTOR_COPY_SPEEDUP = 4  # [T2] tensor_copy, tensor_scalar: all bf16/fp16, in SBUF, contiguous
VECTOR_COPY_SPEEDUP_PARTLY = 2  # [T2] the same, not contiguous, or one side in PSUM
VECTOR_PAIR_SPEEDUP = 2  # [T2] tensor_tensor: all bf16/fp16, inputs in SBUF
VECTOR_RECIPROCAL = 8  # [OPS] cycles per element
GPSIMD_RSQRT = 4  # [OPS] cycles per element (ScalarE: 1)
WIDE_STRIDE_BYTES = 16  # [T1] an innermost stride beyond this halves SBUF/PSUM bandwidth
WIDE_STRIDE_SLOWDOWN = 2  # [T1]
ACCUMULATOR_READ = 64  # [T1] cycles to read the accumulator registers out (reduce_res)
FP32_MATMUL = 4  # [T1] an fp32 matmul costs 4x one of bf16/fp16/tf32/fp8
FP32_TRANSPOSE = 2  # [T2] transpose mode doubles the speed of fp32
LOAD_STATIONARY_SPEEDUP = 4  # [T1] fast LoadStationary: 4 columns a cycle, in the background of a matmul
DMA_ENGINES = 16  # [DMA] per NeuronCore
DMA_BYTES_PER_NS = 23.0  # [DMA] per engine on Trainium2
DMA_TRANSPOSE_FROM_HBM = 0.9  # [T2] share of the DMA bandwidth a transpose reaches, HBM to SBUF
DMA_TRANSPOSE_ON_CHIP = 0.5  # [T2] the same, SBUF to SBUF
DMA_GOOD_RUN_BYTES = 2048  # [DMA] contiguous bytes from which on bandwidth approaches its peak
HBM_BYTES_PER_NS = 3000.0 / 8  # [T2] 3 TB/s of a device shared by its 8 NeuronCores
