"""What the native kernels count: rows quantized in this process, and invalid ones."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq.backends import cpu


def counted(call) -> tuple[int, int]:
    before = cpu.counts()
    call()
    return tuple(now - then for now, then in zip(cpu.counts(), before, strict=True))


@pytest.mark.parametrize("static_scale", [None, 0.1])
def test_norms_count_their_rows_and_invalid_ones(isa, static_scale):
    hidden = torch.ones(3, 5, 40, dtype=torch.bfloat16)
    hidden[0, 1, 7], hidden[2, 4, 39] = math.nan, math.inf
    options = {"static_scale": static_scale, "backend": "cpu"}
    weight = torch.ones(40, dtype=torch.bfloat16)
    assert counted(lambda: ops.rms_norm_quant(hidden, weight, **options)) == (15, 2)
    assert counted(lambda: ops.rms_norm_quant(hidden, None, **options)) == (15, 2)
    assert counted(lambda: ops.rms_norm_quant(hidden, weight, residual=hidden, **options)) == (15, 2)
    assert counted(lambda: ops.rms_norm_quant(hidden[1], weight, **options)) == (5, 0)
    assert counted(lambda: ops.rms_norm_quant(hidden[:0], weight, **options)) == (0, 0)


def test_activation_functions_count_their_rows_and_invalid_ones(isa):
    gate_up = torch.ones(6, 64, dtype=torch.bfloat16)
    gate_up[5, 63] = math.nan
    assert counted(lambda: ops.silu_mul_quant(gate_up, backend="cpu")) == (6, 1)


def test_no_row_is_lost_between_threads(isa):
    hidden = torch.ones(4001, 64, dtype=torch.float32)
    hidden[::2, 3] = math.nan
    assert counted(lambda: ops.rms_norm_quant(hidden, None, backend="cpu")) == (4001, 2001)


def test_other_backends_do_not_count():
    hidden = torch.ones(2, 8)
    assert counted(lambda: ops.rms_norm_quant(hidden, None, backend="torch")) == (0, 0)


def test_the_level_in_force_has_a_name(isa):
    assert cpu.isa() == isa
