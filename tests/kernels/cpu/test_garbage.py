"""What nobody promised the native kernels: any bytes as packed rows, any strides, any place in memory.

The numbers are compared where they mean something. The rest is for the sanitizers: ``make asan``.

Dimensions:
    T: rows (tokens)
    H: hidden size
    N: output features
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_neuron_rmsq import ops, packed, reference

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SIZES = st.integers(1, 200)
ROWS = st.integers(0, 40)


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Any bytes: codes and scales that are NaN, Inf, zero, negative or subnormal among them."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def placed(rows: torch.Tensor, gap: int, start: int) -> torch.Tensor:
    """The same rows ``[T, W]`` with ``gap`` elements between them, ``start`` elements into their memory."""
    count, width = rows.shape
    memory = torch.full((start + count * (width + gap),), 7, dtype=rows.dtype)
    view = memory.as_strided(rows.shape, (width + gap, 1), start)
    view.copy_(rows)
    return view


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@given(
    t=ROWS,
    h=SIZES,
    n=SIZES,
    seed=st.integers(0, 10**6),
    gap=st.integers(0, 9),
    start=st.integers(0, 9),
    out_dtype=DTYPES,
    kind=st.sampled_from(["channel", "tensor", "block"]),
    static=st.booleans(),
    bias=st.booleans(),
)
def test_any_bytes_as_packed_rows(t, h, n, seed, gap, start, out_dtype, kind, static, bias):
    rows = noise(seed, t, h if static else h + packed.SCALE_BYTES)
    weight = noise(seed + 1, n, h)
    shape = {"channel": (n,), "tensor": (1,), "block": (-(-n // 128), -(-h // 128))}[kind]
    scale = noise(seed + 2, *shape, 4).view(torch.float32).reshape(shape)
    shift = noise(seed + 3, n, out_dtype.itemsize).view(out_dtype).reshape(n) if bias else None
    options = {
        "out_dtype": out_dtype,
        "static_scale": 0.5 if static else None,
        "backend": "cpu",
        "bias": shift,
    }
    out = ops.packed_fp8_linear(placed(rows, gap, start), weight, scale, **options)
    assert out.shape == (t, n)
    assert same(out, ops.packed_fp8_linear(rows, weight, scale, **options))
    if not static and kind != "block":
        invalid = packed.unpack(rows)[1].isnan().expand(t, n)
        assert out.isnan()[invalid].all()


@given(
    t=ROWS,
    h=SIZES,
    seed=st.integers(0, 10**6),
    gap=st.integers(0, 9),
    start=st.integers(0, 9),
    dtype=DTYPES,
    residual=st.booleans(),
    static=st.booleans(),
    gamma=st.one_of(st.none(), DTYPES),
    lower_bound=st.sampled_from([0.0, 2.5]),
)
def test_any_bits_to_normalize(t, h, seed, gap, start, dtype, residual, static, gamma, lower_bound):
    def tensor(seed: int) -> torch.Tensor:
        return noise(seed, t, h * dtype.itemsize).view(dtype)

    weight = None if gamma is None else torch.linspace(-2, 2, h).to(gamma)
    hidden, rest = tensor(seed), tensor(seed + 1) if residual else None
    options = {"static_scale": 0.1 if static else None, "lower_bound": lower_bound, "backend": "cpu"}
    moved = None if rest is None else placed(rest, start, gap)
    out = ops.rms_norm_quant(placed(hidden, gap, start), weight, residual=moved, **options)
    wanted = ops.rms_norm_quant(hidden, weight, residual=rest, **options)
    for got, expected in zip(out if residual else (out,), wanted if residual else (wanted,), strict=True):
        assert same(got, expected)
    if not static:
        found = packed.unpack(out[0] if residual else out)[1].isnan()
        exact = reference.rms_norm_quant(hidden, weight, residual=rest, lower_bound=lower_bound)
        assert torch.equal(found, packed.unpack(exact[0] if residual else exact)[1].isnan())


@given(
    t=ROWS, i=SIZES, seed=st.integers(0, 10**6), gap=st.integers(0, 9), start=st.integers(0, 9), dtype=DTYPES
)
def test_any_bits_to_activate(t, i, seed, gap, start, dtype):
    gate_up = noise(seed, t, 2 * i * dtype.itemsize).view(dtype)
    out = ops.silu_mul_quant(placed(gate_up, gap, start), backend="cpu")
    assert same(out, ops.silu_mul_quant(gate_up, backend="cpu"))
    exact = reference.silu_mul_quant(gate_up)
    assert torch.equal(packed.unpack(out)[1].isnan(), packed.unpack(exact)[1].isnan())
