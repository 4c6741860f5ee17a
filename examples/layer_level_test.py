"""How to test a layer of your own against the packed contract: ``pytest examples/layer_level_test.py``.

Dimensions:
    T: tokens
    H: hidden size
    N: output features

The layer here is the first half of a decoder layer: residual add, RMSNorm, FP8 quantization, projection. Put
yours in its place; ``reference`` states the numbers, ``packed`` the bytes, ``ops`` runs them on any backend.
"""

import pytest
import torch

from vllm_neuron_rmsq import backends, ops, packed, reference

T, H, N = 7, 256, 96
BACKENDS = [name for name in ("cpu", "torch", "nki-sim", "nki") if backends.unavailable(name) is None]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(T, H, dtype=torch.bfloat16)
    residual = torch.randn(T, H, dtype=torch.bfloat16)
    gamma = torch.rand(H, dtype=torch.bfloat16) + 0.5
    weight = (torch.randn(N, H) * 60).clamp(-240, 240).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(N) / 100
    return hidden, residual, gamma, weight, weight_scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_quant_projection(backend, inputs):
    hidden, residual, gamma, weight, weight_scale = inputs

    # What the layer computes.
    rows, residual_out = ops.rms_norm_quant(hidden, gamma, residual=residual, eps=1e-5, backend=backend)
    prepacked = ops.prepack_fp8_weight(weight, weight_scale, backend=backend)
    out = ops.packed_fp8_linear(rows, prepacked, weight_scale)

    # What it should: the same rows to within a step of a code (1/16 of its value, on few elements) ...
    expected_rows, expected_residual = reference.rms_norm_quant(hidden, gamma, residual=residual, eps=1e-5)
    torch.testing.assert_close(residual_out, expected_residual)
    torch.testing.assert_close(
        packed.dequantize(rows), packed.dequantize(expected_rows), rtol=1 / 8, atol=1e-2
    )
    # ... and the exact product of the rows it has, rounded to bf16.
    exact = packed.dequantize(rows, torch.float64) @ (weight.double() * weight_scale[:, None].double()).t()
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_token_stays_alone(backend, inputs):
    hidden, _, gamma, weight, weight_scale = inputs
    hidden[2, 5] = float("nan")
    rows = ops.rms_norm_quant(hidden, gamma, backend=backend)
    out = ops.packed_fp8_linear(rows, weight, weight_scale, backend=backend)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4, 5, 6]].isfinite().all()
