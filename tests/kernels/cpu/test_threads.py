"""The native kernels called from several threads at once, each sharing its rows out among threads of its own.

Wrong numbers would show here, races only by chance: ``make tsan`` sees them.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_inputs import rows

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq.backends import cpu

pytestmark = pytest.mark.usefixtures("isa")

T, H, N, CALLERS = 1200, 320, 96, 4


def layer(seed: int) -> list[torch.Tensor]:
    """A norm, its linear, the activation and its linear, each of a size that is shared out among threads."""
    hidden, residual = rows(2, T, H, seed=seed).bfloat16()
    hidden[seed, 3] = torch.nan  # so that invalid rows are counted by several threads
    packed, total = ops.rms_norm_quant(hidden, torch.ones(H), residual=residual, backend="cpu")
    weight = (rows(2 * N, H, seed=seed + 1) * 100).to(torch.float8_e4m3fn)
    gate_up = ops.packed_fp8_linear(packed, weight, torch.ones(2 * N), backend="cpu")
    activated = ops.silu_mul_quant(gate_up, backend="cpu")
    down = (rows(H, N, seed=seed + 2) * 100).to(torch.float8_e4m3fn)
    return [
        packed,
        total,
        gate_up,
        activated,
        ops.packed_fp8_linear(activated, down, torch.ones(H), backend="cpu"),
    ]


def test_callers_do_not_disturb_each_other():
    alone = [layer(seed) for seed in range(CALLERS)]
    before = cpu.counts()
    together = threading.Barrier(CALLERS)

    def call(seed: int) -> list[torch.Tensor]:
        together.wait()
        return [tensor for _ in range(3) for tensor in layer(seed)]

    with ThreadPoolExecutor(CALLERS) as pool:
        results = list(pool.map(call, range(CALLERS)))
    for got, wanted in zip(results, alone, strict=True):
        for tensor, expected in zip(got, wanted * 3, strict=True):
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
    rows_counted, invalid = (now - then for now, then in zip(cpu.counts(), before, strict=True))
    assert (rows_counted, invalid) == (2 * T * 3 * CALLERS, 2 * 3 * CALLERS)


def test_blocks_that_are_used_again_belong_to_one_caller():
    """Outputs of 32 MiB and more are kept for the next call (``large_blocks.h``)."""
    hidden = rows(1, 8192, seed=1).bfloat16().expand(5000, 8192).contiguous()
    wanted = ops.rms_norm_quant(hidden[:1], None, backend="cpu")
    together = threading.Barrier(2)

    def call(_: int) -> bool:
        together.wait()
        for _ in range(3):
            packed = ops.rms_norm_quant(hidden, None, backend="cpu")
            if not torch.equal(packed, wanted.expand_as(packed)):
                return False
            del packed
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(call, range(2)))
