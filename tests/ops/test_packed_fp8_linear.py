"""``ops.packed_fp8_linear`` and its prepacked weight on backend ``torch``: the product, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, HIDDEN, SCALE, WEIGHT, fp8_weight, rows

from vllm_neuron_rmsq import ops, reference
from vllm_neuron_rmsq import packed as fmt


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n=st.integers(1, 70),
    h=st.integers(1, 70),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    per_channel=st.booleans(),
    bias=st.booleans(),
    as_bytes=st.booleans(),
)
def test_matmul_is_that_of_the_dequantized_rows(lead, n, h, seed, dtype, per_channel, bias, as_bytes):
    packed = reference.rms_norm_quant(rows(1, *lead, h, seed=seed), None)[0]
    weight, scale = fp8_weight(n, h, seed)
    scale = scale if per_channel else scale[:1]
    addend = rows(n, seed=seed + 5) if bias else None
    x = fmt.dequantize(packed, torch.float64)
    w = weight.double() * scale.double().reshape(-1, 1)
    expected = x @ w.t() + (addend.double() if bias else 0)
    got = ops.packed_fp8_linear(
        packed,
        weight.view(torch.uint8) if as_bytes else weight,
        scale,
        bias=addend,
        out_dtype=dtype,
        backend="torch",
    )
    assert got.dtype == dtype
    assert got.shape == (*lead, n)
    # fp32 sums, rounded to out_dtype: relative to what was added up.
    magnitude = x.abs() @ w.abs().t() + (addend.abs() if bias else 0)
    step = max(2.0**-20, torch.finfo(dtype).eps)
    assert ((got.double() - expected).abs() <= step * magnitude + 1e-30).all()


def test_matmul_keeps_a_nan_row_to_itself():
    hidden = rows(3, 16)
    hidden[1, 3] = math.nan
    weight, scale = fp8_weight(8, 16)
    packed = ops.rms_norm_quant(hidden, None, backend="torch")
    out = ops.packed_fp8_linear(packed, weight, scale, backend="torch")
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


def test_matmul_of_a_weight_larger_than_a_block():
    """The torch backend converts a wide weight piece by piece; the pieces must join."""
    h = 2048
    n = 2 * (1 << 20) // h + 3
    packed = reference.rms_norm_quant(rows(2, h), None)
    weight, scale = fp8_weight(n, h)
    out = ops.packed_fp8_linear(packed, weight, scale, out_dtype=torch.float32, backend="torch")
    expected = fmt.dequantize(packed) @ (weight.float() * scale[:, None]).t()
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("h", [576, 8192])
def test_fp32_results_are_accurate(h):
    packed = reference.rms_norm_quant(rows(7, h), None)
    weight, scale = fp8_weight(48, h)
    out = ops.packed_fp8_linear(packed, weight, scale, out_dtype=torch.float32, backend="torch")
    expected = fmt.dequantize(packed, torch.float64) @ (weight.double() * scale.double()[:, None]).t()
    assert (out.double() - expected).abs().max() < 2e-6 * expected.abs().max()


def test_prepacked_weight_computes_the_same():
    packed = reference.rms_norm_quant(rows(4, 32), None)
    weight, scale = fp8_weight(24, 32)
    prepacked = ops.prepack_fp8_weight(weight, scale, backend="torch")
    assert (prepacked.out_features, prepacked.in_features, prepacked.backend) == (24, 32, "torch")
    assert prepacked.data.data_ptr() == weight.data_ptr(), (
        "torch reads the checkpoint's layout: no second copy"
    )
    assert torch.equal(
        ops.packed_fp8_linear(packed, prepacked, scale),
        ops.packed_fp8_linear(packed, weight, scale, backend="torch"),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (
            reference.rms_norm_quant(HIDDEN, None),
            WEIGHT.view(torch.uint8),
            SCALE,
            None,
            8,
            torch.bfloat16,
        ),
        (
            reference.rms_norm_quant(HIDDEN[None], None),
            WEIGHT.view(torch.uint8),
            SCALE[:1],
            rows(8),
            8,
            torch.float32,
        ),
    ],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.neuron_rmsq.packed_fp8_linear.torch, arguments)


PACKED = reference.rms_norm_quant(HIDDEN, None)
PREPACKED = ops.prepack_fp8_weight(WEIGHT, SCALE, backend="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": HIDDEN}, r"packed: expected dtype torch.uint8, got torch.float32"),
        ({"packed": PACKED[:, :-1]}, r"packed: expected last dimension 20 .*, got 19"),
        ({"packed": PACKED[:, :4]}, r"packed: expected shape \[..., H \+ 4\] with H >= 1, got \[3, 4\]"),
        ({"weight": WEIGHT[:, :8]}, r"packed: expected last dimension 12 .*, got 20"),
        ({"weight": WEIGHT.float()}, r"weight: expected dtype .*float8_e4m3fn or .*uint8, got torch.float32"),
        ({"weight": WEIGHT[0]}, r"weight: expected shape \[N, H\], got \[16\]"),
        ({"weight": WEIGHT[:0]}, r"weight: expected shape \[N, H\], got \[0, 16\]"),
        ({"weight_scale": SCALE[:3]}, r"weight_scale: expected shape \[8\] or \[1\] .*, got \[3\]"),
        ({"weight_scale": SCALE[:, None]}, r"weight_scale: expected shape \[8\] or \[1\] .*, got \[8, 1\]"),
        ({"weight_scale": SCALE.double()}, r"weight_scale: .* got \[8\] of torch.float64"),
        (
            {"weight": PREPACKED, "weight_scale": SCALE[:3]},
            r"weight_scale: expected shape \[8\] .* got \[3\]",
        ),
        ({"bias": rows(9)}, r"bias: expected shape \[8\], got \[9\]"),
        ({"out_dtype": torch.float64}, r"out_dtype: expected .*, got torch.float64"),
        (
            {"weight": PREPACKED, "backend": "cpu"},
            r"weight: prepacked for backend 'torch', got backend 'cpu'",
        ),
        ({"bias": torch.zeros(8, device="meta")}, r"bias: expected device cpu \(packed's\), got meta"),
        ({"weight_scale": SCALE.to("meta")}, r"weight_scale: expected device cpu \(packed's\), got meta"),
    ],
)
def test_bad_matmul_arguments_are_named(change, message):
    arguments: dict[str, Any] = {
        "packed": PACKED,
        "weight": WEIGHT,
        "weight_scale": SCALE,
        "backend": None if isinstance(change.get("weight"), ops.PrepackedWeight) else "torch",
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.packed_fp8_linear(**arguments | change)
