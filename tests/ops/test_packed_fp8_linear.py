"""``ops.packed_fp8_linear`` and its prepacked weight on backend ``torch``: the product, and refusals."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, HIDDEN, SCALE, WEIGHT, fp8_weight, rows

from vllm_neuron_rmsq import ops, reference, weights
from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.target import TARGETS

SCALES = ("channel", "one", "block")


def weight_scale_of(kind: str, scale: torch.Tensor, n: int, h: int) -> torch.Tensor:
    """A weight scale of each kind from ``[N]`` of them."""
    if kind == "block":
        return rows(*weights.block_scale_shape(n, h), seed=9).abs() + 0.01
    return scale if kind == "channel" else scale[:1]


@pytest.mark.parametrize("multiply", [ops.packed_fp8_linear, reference.packed_fp8_linear])
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 300])),
    h=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 300])),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(SCALES),
    bias=st.booleans(),
    as_bytes=st.booleans(),
    static_scale=st.sampled_from([None, 0.03, torch.tensor([0.5])]),
    target=st.sampled_from(list(TARGETS)),
)
def test_matmul_is_the_oracles(multiply, lead, n, h, seed, dtype, kind, bias, as_bytes, static_scale, target):
    hidden = rows(1, *lead, h, seed=seed)
    packed = reference.rms_norm_quant(hidden, None, static_scale=static_scale, target=target)[0]
    weight, scale = fp8_weight(n, h, seed)
    scale = weight_scale_of(kind, scale, n, h) / 64  # fp16 ends at 65504
    addend = rows(n, seed=seed + 5) if bias else None
    codes, row_scale = (packed, torch.as_tensor(static_scale)) if static_scale else fmt.unpack(packed)
    expected, magnitude = oracle.packed_fp8_linear(codes, row_scale, weight.view(torch.uint8), scale, addend)
    got = multiply(
        packed,
        weight.view(torch.uint8) if as_bytes else weight,
        scale,
        bias=addend,
        static_scale=static_scale,
        out_dtype=dtype,
        backend="torch",
    )
    assert got.dtype == dtype
    assert got.shape == (*lead, n)
    # fp32 sums, rounded to out_dtype: relative to what was added up.
    step = max(2.0**-20, torch.finfo(dtype).eps)
    assert ((got.double() - expected).abs() <= step * magnitude + 1e-30).all()


@pytest.mark.parametrize("kind", SCALES)
def test_static_codes_give_what_rows_with_that_scale_give(kind):
    hidden = rows(3, 5, 192)
    weight, scale = fp8_weight(136, 192)
    scale = weight_scale_of(kind, scale, 136, 192)
    codes = ops.rms_norm_quant(hidden, None, static_scale=0.02, backend="torch")
    packed = fmt.pack(codes, torch.full((3, 5, 1), 0.02))
    for backend in ("torch", "cpu"):
        out = ops.packed_fp8_linear(codes, weight, scale, static_scale=0.02, backend=backend)
        assert torch.equal(out, ops.packed_fp8_linear(packed, weight, scale, backend=backend))


@pytest.mark.parametrize("kind", SCALES)
def test_matmul_keeps_an_invalid_static_row_to_itself(kind):
    hidden = rows(3, 160)
    hidden[1, 3] = math.inf
    weight, scale = fp8_weight(8, 160)
    codes = ops.rms_norm_quant(hidden, None, static_scale=0.1, backend="torch")
    scale = weight_scale_of(kind, scale, 8, 160)
    out = ops.packed_fp8_linear(codes, weight, scale, static_scale=0.1, backend="torch")
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


def test_matmul_keeps_a_nan_row_to_itself():
    hidden = rows(3, 16)
    hidden[1, 3] = math.nan
    weight, scale = fp8_weight(8, 16)
    packed = ops.rms_norm_quant(hidden, None, backend="torch")
    out = ops.packed_fp8_linear(packed, weight, scale, backend="torch")
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", SCALES)
def test_matmul_of_a_weight_larger_than_a_block(kind):
    """The torch backend converts a wide weight piece by piece; the pieces must join."""
    h = 2048
    n = 2 * (1 << 20) // h + 131
    packed = reference.rms_norm_quant(rows(2, h), None)
    weight, scale = fp8_weight(n, h)
    scale = weight_scale_of(kind, scale, n, h)
    out = ops.packed_fp8_linear(packed, weight, scale, out_dtype=torch.float32, backend="torch")
    expected = reference.packed_fp8_linear(packed, weight, scale, out_dtype=torch.float32)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("h", [576, 8192])
def test_fp32_results_are_accurate(h):
    packed = reference.rms_norm_quant(rows(7, h), None)
    weight, scale = fp8_weight(48, h)
    out = ops.packed_fp8_linear(packed, weight, scale, out_dtype=torch.float32, backend="torch")
    expected = fmt.dequantize(packed, torch.float64) @ (weight.double() * scale.double()[:, None]).t()
    assert (out.double() - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("backend", ["torch", "cpu", "nki-sim"])
@pytest.mark.parametrize("shape", [(1, 1), (45, 7), (130, 514)])
@pytest.mark.parametrize("blocks", [False, True])
def test_codes_come_back_from_a_prepacked_weight(backend, shape, blocks):
    codes = (
        torch.randint(0, 0x78, shape, dtype=torch.uint8) | torch.randint(0, 2, shape, dtype=torch.uint8) << 7
    )
    scale = torch.ones(-(-shape[0] // 128), -(-shape[1] // 128)) if blocks else torch.ones(shape[0])
    prepacked = ops.prepack_fp8_weight(codes, scale, backend)
    assert torch.equal(ops.unpack_fp8_weight(prepacked), codes)


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
            None,
            8,
            torch.bfloat16,
        ),
        (
            reference.rms_norm_quant(HIDDEN[None], None),
            WEIGHT.view(torch.uint8),
            SCALE[:1],
            rows(8),
            None,
            8,
            torch.float32,
        ),
        (
            reference.rms_norm_quant(HIDDEN, None, static_scale=0.5),
            WEIGHT.view(torch.uint8),
            SCALE[:1, None],
            None,
            torch.tensor([0.5]),
            8,
            torch.bfloat16,
        ),
    ],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.neuron_rmsq.packed_fp8_linear.torch, arguments)


PACKED = reference.rms_norm_quant(HIDDEN, None)
CODES = PACKED[:, :16].clone()
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
        (
            {"weight_scale": SCALE[:3]},
            r"weight_scale: expected shape \[8\], \[1\] or .* \[1, 1\] .*, got \[3\]",
        ),
        (
            {"weight_scale": SCALE[:, None]},
            r"weight_scale: expected shape \[8\], \[1\] or .* \[1, 1\] .*, got \[8, 1\]",
        ),
        ({"weight_scale": SCALE.double()}, r"weight_scale: .* got \[8\] of torch.float64"),
        (
            {"weight": PREPACKED, "weight_scale": SCALE[:3]},
            r"weight_scale: expected shape \[8\], .* got \[3\]",
        ),
        (
            {"weight": PREPACKED, "weight_scale": SCALE[:1, None]},
            r"weight: prepacked for scales \[N\] or \[1\], got weight_scale \[1, 1\]",
        ),
        (
            {"weight": ops.prepack_fp8_weight(WEIGHT, SCALE[:1, None], backend="torch")},
            r"weight: prepacked for block scales, got weight_scale \[8\]",
        ),
        ({"weight_scale": torch.ones(2, 1)}, r"weight_scale: .* \[1, 1\] .* got \[2, 1\] of torch.float32"),
        ({"static_scale": 0.5}, r"packed: expected \[..., 16\] codes .* static_scale .* got \[3, 20\]"),
        ({"packed": CODES}, r"packed: expected last dimension 20 .*, got 16"),
        (
            {"packed": CODES.float(), "static_scale": 0.5},
            r"packed: expected .* torch.uint8, static_scale .*, got \[3, 16\] of torch.float32",
        ),
        ({"packed": CODES, "static_scale": 0.0}, r"static_scale: expected a finite number > 0, got 0.0"),
        ({"packed": CODES, "static_scale": -1.0}, r"static_scale: expected a finite number > 0, got -1.0"),
        ({"packed": CODES, "static_scale": math.nan}, r"static_scale: expected a finite number > 0, got nan"),
        ({"packed": CODES, "static_scale": math.inf}, r"static_scale: expected a finite number > 0, got inf"),
        (
            {"packed": CODES, "static_scale": torch.ones(2)},
            r"static_scale: expected one torch.float32 element, got shape \[2\] of torch.float32",
        ),
        (
            {"packed": CODES, "static_scale": torch.ones(1, dtype=torch.float64)},
            r"static_scale: expected one torch.float32 element, got shape \[1\] of torch.float64",
        ),
        (
            {"packed": CODES, "static_scale": torch.ones(1, device="meta")},
            r"static_scale: expected device cpu \(packed's\), got meta",
        ),
        ({"bias": torch.ones(8, dtype=torch.int64)}, r"bias: expected dtype .*, got torch.int64"),
        ({"bias": rows(9)}, r"bias: expected shape \[8\], got \[9\]"),
        ({"out_dtype": torch.float64}, r"out_dtype: expected .*, got torch.float64"),
        (
            {"weight": PREPACKED, "backend": "cpu"},
            r"weight: prepacked for backend 'torch', got backend 'cpu'",
        ),
        (
            {"weight": PREPACKED, "weight_scale": SCALE.to("meta")},
            r"weight_scale: expected device cpu \(packed's\), got meta",
        ),
        ({"bias": torch.zeros(8, device="meta")}, r"bias: expected device cpu \(packed's\), got meta"),
        ({"weight_scale": SCALE.to("meta")}, r"weight_scale: expected device cpu \(weight's\), got meta"),
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
    if not isinstance(change.get("weight"), ops.PrepackedWeight):
        with pytest.raises(ValueError, match=f"^{message}"):
            ops.packed_fp8_linear(**arguments | change | {"backend": "cpu"})
