"""The NKI simulator: every instruction against plain NumPy, every rule broken once."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_neuron_rmsq.kernels.nki.simulator import (
    NkiSimulationError,
    as_nki,
    check_language,
    cost,
    dtypes,
    simulate,
)

with as_nki():
    import nki
    import nki.isa as nisa
    import nki.language as nl

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3
RNG = np.random.default_rng(7)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(np.float32).astype(dtype)


@nki.jit
def one_step(step, shape, dtype, inputs, buffer=nl.sbuf):
    """Load `inputs`, let `step(dst, *tiles)` fill a tile, store it."""
    tiles = []
    for array in inputs:
        tile = nl.ndarray(array.shape, dtype=array.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=array)
        tiles.append(tile)
    dst = nl.ndarray(shape, dtype=dtype, buffer=buffer)
    step(dst, *tiles)
    if buffer == nl.psum:
        copy = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=copy, src=dst)
        dst = copy
    out = nl.ndarray(shape, dtype=dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=dst)
    return out


def run(step, shape, dtype, *inputs, **kwargs):
    return simulate(one_step)(step, shape, dtype, inputs, **kwargs)


def body(statements):
    """Run `statements()`, which needs no input and gives no output, as a kernel."""
    return simulate(call_body)(statements)


def call_body(statements):
    statements()


def breaks(match, statements):
    with pytest.raises(NkiSimulationError, match=match):
        body(statements)


def sbuf(shape, dtype=nl.float32, value=1, name="", address=None):
    tile = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf, name=name, address=address)
    if value != None:  # noqa: E711
        nisa.memset(tile, value)
    return tile


def psum(shape, dtype=nl.float32, value=1, name="", address=None):
    tile = nl.ndarray(shape, dtype=dtype, buffer=nl.psum, name=name, address=address)
    if value != None:  # noqa: E711
        nisa.memset(tile, value)
    return tile


# -- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "float16", *dtypes.FP8])
def test_conversions_agree_with_ml_dtypes_on_every_boundary(name):
    """Every value of the dtype, every midpoint of two, and their fp32 neighbours on both sides."""
    dtype = dtypes.NUMPY[name]
    codes = np.arange(2 ** (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}")
    values = codes.view(dtype).astype(np.float32)
    finite = np.unique(values[np.isfinite(values)])
    middles = finite[1:] / 2 + finite[:-1] / 2
    points = np.concatenate([finite, middles, [np.inf, -np.inf, np.nan, 1e30, -0.0]])
    points = points.astype(np.float32)
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, -np.float32(np.inf))]
    )
    with np.errstate(all="ignore"):
        expected = points.astype(dtype)
    raw = f"u{dtype.itemsize}"
    got = dtypes.from_float32(points, name)
    same = (got.view(raw) == expected.view(raw)) | (np.isnan(points) & np.isnan(got.astype(np.float32)))
    assert same.all(), points[~same][:5]
    np.testing.assert_array_equal(dtypes.to_float32(codes.view(dtype), name), values)


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.sampled_from(dtypes.FP8))
def test_fp8_agrees_with_ml_dtypes_on_any_float(values, name):
    points = np.array(values, np.float32)
    with np.errstate(all="ignore"):
        expected = points.astype(dtypes.NUMPY[name]).astype(np.float32)
    np.testing.assert_array_equal(dtypes.from_float32(points, name).astype(np.float32), expected)


def test_integers_round_to_even_and_saturate():
    points = np.array([0.5, 1.5, 2.5, -1.5, 300.0, -7.0, np.nan, np.inf], np.float32)
    assert dtypes.from_float32(points, "uint8").tolist() == [0, 2, 2, 0, 255, 0, 0, 255]
    assert dtypes.from_float32(points, "int8").tolist() == [0, 2, 2, -2, 127, -7, 0, 127]


def test_tf32_keeps_ten_mantissa_bits():
    points = np.array([1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-12], np.float32)
    assert dtypes.from_float32(points, "tfloat32").tolist() == [1 + 2**-10, 1.0, 1 + 2**-9, 1.0]


# -- data movement ----------------------------------------------------------------------------------


def test_dma_copy_moves_bits_and_casts_by_way_of_fp32():
    x = normal(128, 96)
    np.testing.assert_array_equal(run(lambda d, a: nisa.dma_copy(d, a), x.shape, nl.float32, x), x)
    got = run(lambda d, a: nisa.dma_copy(d, a), x.shape, nl.bfloat16, x)
    np.testing.assert_array_equal(got.view(np.uint16), x.astype(BF16).view(np.uint16))
    nan = np.array([[0x7FC1, 0xFFFF]], np.uint16).view(BF16)
    got = run(lambda d, a: nisa.dma_copy(d, a), nan.shape, nl.bfloat16, nan)
    np.testing.assert_array_equal(got.view(np.uint16), nan.view(np.uint16))


def test_dma_copy_takes_the_elements_in_order_whatever_the_shapes():
    x = np.arange(6 * 20, dtype=np.int32).reshape(6, 20)
    got = run(lambda d, a: nisa.dma_copy(d.reshape((2, 5, 12)), a.reshape((6, 4, 5))), (2, 60), nl.int32, x)
    np.testing.assert_array_equal(got, x.reshape(2, 60))


def gather(data, indices):
    out = nl.ndarray((indices.shape[0], data.shape[1]), dtype=data.dtype, buffer=nl.shared_hbm)
    index = nl.load(indices)
    pattern = [[data.shape[1], indices.shape[0]], [1, data.shape[1]]]
    tile = nl.ndarray(out.shape, dtype=data.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=data.ap(pattern=pattern, vector_offset=index, indirect_dim=0))
    nisa.dma_copy(dst=out, src=tile)
    other = nl.ndarray(out.shape, dtype=data.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=other, src=data.vector_select(0, index))
    nisa.dma_copy(
        dst=data.ap(pattern=pattern, vector_offset=index, indirect_dim=0), src=sbuf(out.shape, value=0)
    )
    return out, other


def test_dma_copy_gathers_and_scatters_rows():
    data, rows = normal(40, 24), np.array([[3], [39], [0], [17]], np.uint32)
    before = data.copy()
    for got in simulate(gather)(data, rows):
        np.testing.assert_array_equal(got, before[rows[:, 0]])
    assert not data[rows[:, 0]].any() and (data[1] == before[1]).all()
    words = np.array([[2**24 + 1], [2**31 - 1]], np.int32)
    np.testing.assert_array_equal(
        simulate(gather)(words.copy(), np.array([[1], [0]], np.uint32))[0], words[::-1]
    )
    with pytest.raises(NkiSimulationError, match="rows below 40, got 40 on partition 1"):
        simulate(gather)(data, np.array([[0], [40]], np.uint32))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, BF16])
def test_dma_transpose(dtype):
    x = np.arange(4 * 6 * 5 * 8).astype(dtype)
    for shape, order in [((40, 24), (1, 0)), ((5, 8, 24), (2, 1, 0)), ((4, 6, 5, 8), (3, 1, 2, 0))]:
        a = x.reshape(shape)
        want = a.transpose(order)
        got = run(lambda d, t, o=order: nisa.dma_transpose(d, t, axes=o), want.shape, a.dtype, a)
        np.testing.assert_array_equal(got, want)


def test_dma_compute_adds_in_fp32():
    a, b, c = (normal(128, 64, dtype=BF16) for _ in range(3))
    got = run(lambda d, *t: nisa.dma_compute(d, t, nl.add), (128, 64), nl.bfloat16, a, b, c)
    want = (a.astype(np.float32) + b.astype(np.float32) + c.astype(np.float32)).astype(BF16)
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


def test_memset_and_tensor_copy():
    got = run(lambda d: nisa.memset(d, 1.5), (64, 10), nl.bfloat16)
    assert (got.astype(np.float32) == 1.5).all()
    x = RNG.integers(-(2**31), 2**31, (128, 8)).astype(np.int32)
    np.testing.assert_array_equal(run(lambda d, a: nisa.tensor_copy(d, a), x.shape, nl.int32, x), x)
    y = normal(128, 8)
    got = run(lambda d, a: nisa.tensor_copy(d, a, engine=nisa.engine.scalar), y.shape, nl.float8_e4m3, y)
    np.testing.assert_array_equal(got.view(np.uint8), y.astype(F8).view(np.uint8))


# -- VectorE and GpSimdE ----------------------------------------------------------------------------

BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "greater": np.greater,
    "less_equal": np.less_equal,
    "abs_max": lambda x, y: np.where(np.abs(x) > np.abs(y), x, y),
    "logical_and": lambda x, y: (x != 0) & (y != 0),
}


@pytest.mark.parametrize("name", BINARY)
def test_tensor_tensor(name, monkeypatch):
    if name == "abs_max":
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    x, y = normal(128, 40, dtype=BF16), normal(128, 40)
    got = run(lambda d, a, b: nisa.tensor_tensor(d, a, b, getattr(nl, name)), x.shape, nl.float32, x, y)
    np.testing.assert_array_equal(got, BINARY[name](x.astype(np.float32), y).astype(np.float32))


def test_tensor_tensor_on_32_bit_integers_is_exact_on_gpsimd_and_fp32_on_vector():
    x, y = np.full((1, 1), 2**24, np.int32), np.ones((1, 1), np.int32)
    assert run(lambda d, a, b: nisa.tensor_tensor(d, a, b, nl.add), (1, 1), nl.int32, x, y) == 2**24 + 1

    def vector(d, a, b):
        return nisa.tensor_tensor(d, a, b, nl.add, engine=nisa.engine.vector)

    assert run(vector, (1, 1), nl.int32, x, y) == 2**24


def test_bitvec_operators_treat_elements_as_bits():
    x, y = RNG.integers(0, 256, (2, 128, 16)).astype(np.uint8)
    got = run(lambda d, a, b: nisa.tensor_tensor(d, a, b, nl.bitwise_xor), x.shape, nl.uint8, x, y)
    np.testing.assert_array_equal(got, x ^ y)
    signed = x.view(np.int8)

    def step(d, a):
        return nisa.tensor_scalar(d, a, nl.right_shift, 3, op1=nl.bitwise_and, operand1=5)

    np.testing.assert_array_equal(run(step, x.shape, nl.int8, signed).view(np.uint8), (x >> 3) & 5)


def test_tensor_scalar_orders_its_operands():
    x, c = normal(128, 33), normal(128, 1)

    def step(d, a, s):
        return nisa.tensor_scalar(
            d, a, nl.subtract, s, reverse0=True, op1=nl.greater, operand1=0.25, reverse1=True
        )

    np.testing.assert_array_equal(run(step, x.shape, nl.float32, x, c), np.float32(0.25) > c - x)

    def absolute(d, a):
        return nisa.tensor_scalar(d, a, nl.abs, None, op1=nl.minimum, operand1=0.5)

    np.testing.assert_array_equal(
        run(absolute, x.shape, nl.float32, x), np.minimum(np.abs(x), np.float32(0.5))
    )

    def scalar(d, a, s):
        return nisa.tensor_scalar(d, a, nl.multiply, s, op1=nl.add, operand1=1.0, engine=nisa.engine.scalar)

    np.testing.assert_array_equal(run(scalar, x.shape, nl.float32, x, c), x * c + np.float32(1))


def test_scalar_tensor_tensor():
    x, y, c = normal(128, 20, dtype=BF16), normal(128, 20), normal(128, 1, dtype=BF16)

    def step(d, a, s, b):
        return nisa.scalar_tensor_tensor(d, a, nl.multiply, s, nl.subtract, b, reverse1=True)

    want = y - x.astype(np.float32) * c.astype(np.float32)
    np.testing.assert_array_equal(run(step, x.shape, nl.float32, x, c, y), want)


@pytest.mark.parametrize("name", ["add", "maximum", "minimum", "multiply", "logical_or"])
def test_tensor_reduce(name):
    x = normal(128, 3, 4, 5)
    ufunc = getattr(np, name)
    for axis, shape in [((3,), (128, 3, 4)), ((2, 3), (128, 3)), ([1, 2, 3], (128, 1)), (-1, (128, 3, 4))]:

        def step(d, a, at=axis):
            return nisa.tensor_reduce(d, getattr(nl, name), a, at, negate=True)

        want = -ufunc.reduce(x, axis=tuple(axis) if axis != -1 else -1).astype(np.float32).reshape(shape)
        np.testing.assert_allclose(run(step, shape, nl.float32, x), want, rtol=1e-5, atol=1e-6)


def test_tensor_scalar_reduce_accumulates_in_the_engine():
    x, y = normal(128, 30), normal(128, 30)

    def step(d, a):
        return nisa.tensor_scalar_reduce(sbuf(x.shape), a, nl.abs, None, nl.maximum, d)

    np.testing.assert_array_equal(run(step, (128, 1), nl.float32, x)[:, 0], np.abs(x).max(1))

    def two(d, a, b):
        nisa.tensor_scalar_reduce(sbuf(x.shape), a, nl.multiply, 2.0, nl.add)
        nisa.tensor_scalar_reduce(
            sbuf(x.shape),
            b,
            nl.add,
            0.0,
            nl.add,
            d,
            reduce_cmd=nisa.reduce_cmd.reduce,
            reduce_res_negate=True,
        )

    got = run(two, (128, 1), nl.float32, x, y)[:, 0]
    np.testing.assert_allclose(got, -(2 * x.sum(1) + y.sum(1)), rtol=1e-4, atol=1e-4)


def test_reciprocal_and_scan():
    x, y = normal(128, 9), normal(128, 9)
    np.testing.assert_array_equal(run(lambda d, a: nisa.reciprocal(d, a), x.shape, nl.float32, x), 1 / x)

    def step(d, a, b):
        return nisa.tensor_tensor_scan(d, a, b, 0.5, nl.multiply, nl.add)

    want, state = np.empty_like(x), np.full(128, 0.5, np.float32)
    for i in range(9):
        want[:, i] = state = x[:, i] * state + y[:, i]
    np.testing.assert_array_equal(run(step, x.shape, nl.float32, x, y), want)


# -- selection --------------------------------------------------------------------------------------


def test_iota_and_affine_select():
    pattern = [[10, 3], [1, 4]]

    def step(d):
        return nisa.iota(d, pattern, offset=5, channel_multiplier=100)

    free = (10 * np.arange(3)[:, None] + np.arange(4)).reshape(-1)
    want = 5 + 100 * np.arange(8)[:, None] + free
    np.testing.assert_array_equal(run(step, (8, 12), nl.int32), want)
    np.testing.assert_array_equal(run(step, (8, 12), nl.float32), want)
    x = normal(8, 8)

    def causal(d, a):
        return nisa.affine_select(d, [[-1, 8]], 1, a, -1e9, cmp_op=nl.greater_equal)

    want = np.where(np.tri(8, dtype=bool), x, np.float32(-1e9))
    np.testing.assert_array_equal(run(causal, (8, 8), nl.float32, x), want)


def test_predicated_copies():
    x, mask = normal(128, 12), (RNG.random((128, 12)) < 0.5).astype(np.uint8)

    def step(d, a, p):
        nisa.memset(d, 7.0)
        nisa.tensor_copy_predicated(d, a, p, reverse_pred=True)

    np.testing.assert_array_equal(run(step, x.shape, nl.float32, x, mask), np.where(mask, np.float32(7), x))
    reset = nisa.reduce_cmd.reset_reduce

    def highest(d, a, p):
        return nisa.select_reduce(sbuf(x.shape), p, a, -3.0, d, reset)

    want = np.where(mask, x, np.float32(-3)).max(1, keepdims=True)
    np.testing.assert_array_equal(run(highest, (128, 1), nl.float32, x, mask), want)


# -- ScalarE ----------------------------------------------------------------------------------------

ACTIVATIONS = {
    "copy": lambda x: x,
    "square": np.square,
    "exp": np.exp,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "abs": np.abs,
    "sign": np.sign,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_scales_shifts_and_sums(name):
    x, scale, bias = normal(128, 25), normal(128, 1), normal(128, 1)

    def total(d, a, s, b):
        return nisa.activation_reduce(sbuf(x.shape), getattr(nl, name), a, nl.add, d, bias=b, scale=s)

    want = ACTIVATIONS[name](x.astype(np.float64) * scale + bias)
    got = run(
        lambda d, a, s, b: nisa.activation(d, getattr(nl, name), a, b, s), x.shape, nl.float32, x, scale, bias
    )
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    got = run(total, (128, 1), nl.float32, x, scale, bias)
    np.testing.assert_allclose(got[:, 0], want.sum(1), rtol=2e-5, atol=2e-4)


def test_activation_outside_its_documented_range_is_nan():
    x = np.array([[2.0**-88, 2.0**-80, 1.0, 2.0**98, np.inf, 0.0]], np.float32)
    got = run(lambda d, a: nisa.activation(d, nl.rsqrt, a), x.shape, nl.float32, x)
    assert np.isnan(got[0, [0, 3, 4, 5]]).all() and got[0, 1] == 2.0**40 and got[0, 2] == 1
    got = run(
        lambda d, a: nisa.activation(d, nl.reciprocal, a),
        (1, 2),
        nl.float32,
        np.array([[-4.0, 0]], np.float32),
    )
    assert got[0, 0] == -0.25 and np.isnan(got[0, 1])


def test_activation_keeps_sums_in_the_engine():
    x, y = normal(128, 6), normal(128, 6)

    def step(d, a, b):
        nisa.activation(sbuf(x.shape), nl.copy, a, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reset_reduce)
        nisa.activation(
            sbuf(x.shape), nl.copy, b, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reduce, reduce_res=d
        )

    np.testing.assert_allclose(run(step, (128, 1), nl.float32, x, y)[:, 0], x.sum(1) + y.sum(1), atol=1e-5)


# -- TensorE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16, F8])
def test_nc_matmul_accumulates_in_psum(dtype):
    x, y = normal(2, 100, 64, dtype=dtype), normal(2, 100, 512, dtype=dtype)
    flat = [x[0], x[1], y[0], y[1]]
    want = sum(a.astype(np.float32).T @ b.astype(np.float32) for a, b in zip(x, y, strict=True))
    for flags in [(False, True), (None, None)]:

        def step(d, a, b, c, e, flags=flags):
            nisa.nc_matmul(d, a, c, accumulate=flags[0])
            nisa.nc_matmul(d, b, e, accumulate=flags[1])

        got = run(step, (64, 512), nl.float32, *flat, buffer=nl.psum)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)

    def overwrite(d, a, b, c, e):
        nisa.nc_matmul(d, a, c)
        nisa.nc_matmul(d, b, e, accumulate=False)

    got = run(overwrite, (64, 512), nl.float32, *flat, buffer=nl.psum)
    np.testing.assert_allclose(got, x[1].astype(np.float32).T @ y[1].astype(np.float32), rtol=1e-5, atol=1e-4)


def test_nc_matmul_adds_to_what_a_matmul_wrote_and_overwrites_the_rest():
    x, y = normal(16, 8), normal(16, 24)

    def step(d, a, b):
        nisa.nc_matmul(d[:, 0:16], a, b[:, 0:16])
        nisa.nc_matmul(d[:, 8:24], a, b[:, 8:24])

    want = x.T @ y
    want[:, 8:16] *= 2
    np.testing.assert_allclose(
        run(step, (8, 24), nl.float32, x, y, buffer=nl.psum), want, rtol=1e-5, atol=1e-5
    )

    def rewritten():
        tile, ones = psum((4, 4), value=None), sbuf((4, 4))
        nisa.nc_matmul(tile, ones, ones)
        nisa.memset(tile[:, 0:1], 0)
        nisa.nc_matmul(tile, ones, ones)

    breaks("accumulate: expected False .* got None on a location that something else wrote", rewritten)


def test_nc_matmul_double_row_contracts_pairs():
    x, y = normal(128, 2, 96, dtype=F8), normal(128, 2, 300, dtype=F8)
    double = nisa.matmul_perf_mode.double_row

    def step(d, a, b):
        return nisa.nc_matmul(d, a, b, perf_mode=double)

    want = x.astype(np.float32).reshape(256, 96).T @ y.astype(np.float32).reshape(256, 300)
    got = run(step, (96, 300), nl.float32, x, y, buffer=nl.psum)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_nc_transpose():
    x = normal(100, 6, 8, dtype=BF16)
    x[0, 0, 0], x[1, 1, 1] = np.nan, np.inf
    got = run(lambda d, a: nisa.nc_transpose(d, a), (48, 100), nl.bfloat16, x, buffer=nl.psum)
    np.testing.assert_array_equal(got.view(np.uint16), x.reshape(100, 48).T.view(np.uint16))
    y = normal(32, 16)
    np.testing.assert_array_equal(run(lambda d, a: nisa.nc_transpose(d, a), (16, 32), nl.float32, y), y.T)


# -- views ------------------------------------------------------------------------------------------


def through_view(x, change, shape):
    out = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=change(x))
    tile = nl.load(x)
    nisa.dma_copy(dst=out, src=change(tile))
    return out


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_chains_of_views_agree_with_numpy(data):
    array = np.arange(8 * 6 * 4 * 5, dtype=np.int32).reshape(8, 6, 4, 5)
    steps, want = [], array
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["slice", "permute", "flatten", "split", "expand", "index"]))
        dim = data.draw(st.integers(0 if kind == "slice" else 1, max(want.ndim - 1, 1)))
        if kind == "slice":
            start = data.draw(st.integers(0, want.shape[dim] - 1))
            stop = data.draw(st.integers(start + 1, want.shape[dim]))
            step = data.draw(st.integers(1, 3))
            key = (slice(None),) * dim + (slice(start, stop, step if dim else 1),)
            steps.append(lambda t, key=key: t[key])
            want = want[key]
        elif kind == "permute":
            order = (0, *data.draw(st.permutations(range(1, want.ndim))))
            steps.append(lambda t, order=order: t.permute(order))
            want = want.transpose(order)
        elif kind == "flatten" and want.flags.c_contiguous and want.ndim > 2:
            steps.append(lambda t: t.flatten_dims(1, t.ndim - 1))
            want = want.reshape(want.shape[0], -1)
        elif kind == "split" and want.ndim < 5 and want.shape[dim] % 2 == 0:
            steps.append(lambda t, dim=dim: t.reshape_dim(dim, (2, -1)))
            want = want.reshape(*want.shape[:dim], 2, want.shape[dim] // 2, *want.shape[dim + 1 :])
        elif kind == "expand" and want.ndim < 5:
            steps.append(lambda t, dim=dim: t.expand_dim(dim))
            want = np.expand_dims(want, dim)
        elif kind == "index" and want.ndim > 2:
            index = data.draw(st.integers(-want.shape[dim], want.shape[dim] - 1))
            steps.append(lambda t, key=(slice(None),) * dim + (index,): t[key])
            want = want[(slice(None),) * dim + (index,)]

    def change(tensor):
        for step in steps:
            tensor = step(tensor)
        assert tensor.shape == want.shape
        return tensor

    np.testing.assert_array_equal(simulate(through_view)(array, change, want.shape), want)


def test_view_attributes_are_those_of_the_language_guide():
    def statements():
        t = nl.ndarray((128, 64), dtype=nl.float32, buffer=nl.sbuf)
        assert (t.shape, t.strides, t.offset, t.ndim, t.size) == ((128, 64), (64, 1), 0, 2, 8192)
        assert t.dtype == nl.float32 and t.buffer == nl.sbuf and t.is_contiguous()
        u = t.slice(dim=1, start=8, end=24)
        assert u.get_pattern() == [[64, 128], [1, 16]] and u.offset == 8
        assert t.view(nl.uint8).shape == (128, 256) and t.view(nl.uint8).view(nl.bfloat16).shape == (128, 128)
        c = nl.ndarray((64, 64, 64), dtype=nl.float32, buffer=nl.sbuf)
        assert c[0, 0, 10].shape == (1, 1) and c[:, 0, 10].shape == (64, 1) and c[0].shape == (1, 64, 64)
        assert c[..., ::2].shape == (64, 64, 32) and c[:, nl.ds(3, 5)].shape == (64, 5, 64)
        h = nl.ndarray((4, 128, 32), dtype=nl.float32, buffer=nl.shared_hbm)
        assert h[0].shape == (128, 32) and h[-1, 5].shape == (32,)
        r = t.rearrange(("b", ("h", "w")), ("b", "w", "h"), {"h": 4})
        assert r.shape == (128, 16, 4) and r.strides == (64, 1, 16) and not r.is_contiguous()
        assert c.permute((0, 2, 1)).broadcast is not None and t.expand_dim(1).broadcast(1, 8).shape == (
            128,
            8,
            64,
        )
        assert t.ap([[64, 128], [2, 32]], offset=1).shape == (128, 32) and t.address is None

    body(statements)


def test_ap_reinterprets_and_a_register_selects():
    x = normal(4, 128, 8)

    def kernel(x, index):
        out = nl.ndarray((3, 128, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        at = nl.load(index)
        nisa.dma_copy(dst=out[0], src=x.select(0, at))
        register = nisa.register_alloc()
        nisa.register_load(register, at)
        nisa.dma_copy(dst=out[1], src=x.ap([[8, 128], [1, 8]], scalar_offset=register, indirect_dim=0))
        for i in nl.dynamic_range(register, 4):
            nisa.dma_copy(dst=out[2], src=x[i])
        return out

    got = simulate(kernel)(x, np.array([[3]], np.int32))
    np.testing.assert_array_equal(got, np.stack([x[3]] * 3))

    def halves(d, a):
        return nisa.tensor_copy(d, a.ap([[16, 128], [2, 8]], offset=1, dtype=nl.bfloat16))

    got = run(halves, (128, 8), nl.bfloat16, x[0])
    np.testing.assert_array_equal(got.view(np.uint16), (x[0].view(np.uint32) >> 16).astype(np.uint16))


def test_a_placed_tensor_shares_bytes_with_one_placed_over_it():
    def statements():
        a = sbuf((128, 64), address=(0, 1024), value=3)
        assert a.address == (0, 1024)
        b = sbuf((32, 16), address=(96, 1024 + 128), value=5)
        assert (b.read("test", "b") == 5).all()
        assert (a[:, 0:32].read("test", "a") == 3).all() and (a[0:64].read("test", "a") == 3).all()
        nisa.tensor_copy(sbuf((128, 64)), a)

    breaks(r"tensor_copy: src: .* bytes that float32\[32, 16\], placed over it, wrote", statements)


# -- rules ------------------------------------------------------------------------------------------


def partly_written():
    tile = sbuf((1, 8), value=None)
    nisa.memset(tile[:, 0:7], 0)
    return tile


FP8_FN = "float8_e4m3fn"
double_row = nisa.matmul_perf_mode.double_row
BROKEN = {
    "129 partitions": (r"ndarray: shape\[0\]: expected at most 128, got 129", lambda: sbuf((129, 4))),
    "no free dimension": ("a partition and a free dimension", lambda: sbuf((128,))),
    "SBUF overrun": (
        r"at most 229376 B of SBUF .* got 229380 B \(4 B more on top of 229376 B: 229376 B big float32",
        lambda: (sbuf((128, 57344), name="big", value=None), sbuf((1, 1)))[0],
    ),
    "SBUF overrun by address": ("end at byte 229380", lambda: sbuf((1, 1), address=(0, 229376))),
    "SBUF overrun beside addresses": (
        "at most 229376 B of SBUF",
        lambda: (sbuf((1, 1), address=(0, 229372)), sbuf((1, 1))),
    ),
    "PSUM overrun": ("at most 16384 B of PSUM", lambda: [psum((1, 1)) for _ in range(9)]),
    "PSUM address inside a bank": ("start of a PSUM bank", lambda: psum((1, 1), address=(0, 512))),
    "address off the partitions": ("partitions within 0..127", lambda: sbuf((64, 1), address=(96, 0))),
    "unwritten read": (
        r"tensor_copy: src: expected memory that was written, got 2048 unwritten bytes of <'t' sbuf",
        lambda: nisa.tensor_copy(sbuf((128, 4)), sbuf((128, 4), value=None, name="t")),
    ),
    "partly unwritten read": ("4 unwritten bytes", lambda: nisa.tensor_copy(sbuf((1, 8)), partly_written())),
    "start partition": (
        "start at partition 0 or 32 or 64 or 96, got start 5",
        lambda: nisa.memset(sbuf((128, 4))[5:9], 0),
    ),
    "start partition of 64": (
        "start at partition 0 or 64, got start 32",
        lambda: nisa.memset(sbuf((128, 4))[32:96], 0),
    ),
    "too many elements": (
        "at most 65536 elements per partition",
        lambda: nisa.memset(sbuf((1, 65537), dtype=nl.int8, value=None), 0),
    ),
    "stride too wide": (
        "strides up to 32767 elements",
        lambda: nisa.memset(sbuf((1, 2, 32768), dtype=nl.int8, value=None)[:, :, 0:1], 0),
    ),
    "kernel in a kernel": ("to have no decorator, got a kernel", lambda: doubled(None)),
    "DMA from PSUM": (
        "dma_copy: src: expected a tensor in sbuf or",
        lambda: nisa.dma_copy(sbuf((1, 1)), psum((1, 1))),
    ),
    "DMA of other sizes": ("as many elements as dst", lambda: nisa.dma_copy(sbuf((1, 4)), sbuf((1, 5)))),
    "DMA priority": ("NeuronCore-v4", lambda: nisa.dma_copy(sbuf((1, 4)), sbuf((1, 4)), priority=1)),
    "DMA engine": (
        "with dge_mode.hwdge",
        lambda: nisa.dma_copy(sbuf((1, 4)), sbuf((1, 4)), engine=nisa.engine.sync),
    ),
    "transpose of bytes": (
        "a dtype of 2 or 4 bytes",
        lambda: nisa.dma_transpose(sbuf((8, 8), dtype=nl.uint8), sbuf((8, 8), dtype=nl.uint8)),
    ),
    "transpose hwdge": (
        r"shape\[0\]: 16",
        lambda: nisa.dma_transpose(
            sbuf((8, 32), dtype=nl.uint16), sbuf((32, 8), dtype=nl.uint16), dge_mode=nisa.dge_mode.hwdge
        ),
    ),
    "transpose shape": (r"shape \(8, 4\)", lambda: nisa.dma_transpose(sbuf((4, 8)), sbuf((4, 8)))),
    "dma_compute operator": (
        "reduce_op: expected one of add",
        lambda: nisa.dma_compute(sbuf((1, 1)), [sbuf((1, 1))], nl.maximum),
    ),
    "dma_compute scales": (
        "1.0 for each",
        lambda: nisa.dma_compute(sbuf((1, 1)), [sbuf((1, 1))], nl.add, scales=[2.0]),
    ),
    "memset's value": ("a whole number of uint8, got 256", lambda: sbuf((1, 1), dtype=nl.uint8, value=256)),
    "engine cannot memset": (
        "vector or gpsimd, got scalar",
        lambda: nisa.memset(sbuf((1, 1)), 0, engine=nisa.engine.scalar),
    ),
    "GpSimdE and PSUM": (
        "GpSimdE cannot access PSUM",
        lambda: nisa.tensor_copy(sbuf((1, 1)), psum((1, 1)), engine=nisa.engine.gpsimd),
    ),
    "both inputs in PSUM": (
        "at most one of them in PSUM",
        lambda: nisa.tensor_tensor(sbuf((1, 1)), psum((1, 1)), psum((1, 1)), nl.add),
    ),
    "partitions differ": ("64 partitions, as dst", lambda: nisa.tensor_copy(sbuf((64, 4)), sbuf((32, 4)))),
    "elements differ": ("4 elements each, as dst", lambda: nisa.tensor_copy(sbuf((64, 4)), sbuf((64, 5)))),
    "no operator": (
        "an operator of nki.language",
        lambda: nisa.tensor_tensor(sbuf((1, 1)), sbuf((1, 1)), sbuf((1, 1)), np.add),
    ),
    "an activation as operator": (
        "op: expected one of abs_max",
        lambda: nisa.tensor_tensor(sbuf((1, 1)), sbuf((1, 1)), sbuf((1, 1)), nl.exp),
    ),
    "operator of a later generation": (
        r"an operator gen3 has \(this one: gen4\), got nl.abs_max",
        lambda: nisa.tensor_tensor(sbuf((1, 1)), sbuf((1, 1)), sbuf((1, 1)), nl.abs_max),
    ),
    "bitvec on floats": (
        "an integer dtype",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.bitwise_and, 3),
    ),
    "mixed operator kinds": (
        "op1: expected the kind of op0",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.add, 1.0, op1=nl.bitwise_and, operand1=3),
    ),
    "operand dtype": (
        "operand0: expected dtype float32",
        lambda: nisa.tensor_scalar(sbuf((4, 2)), sbuf((4, 2)), nl.add, sbuf((4, 1), dtype=nl.bfloat16)),
    ),
    "operand shape": (
        r"operand0: expected shape \(4, 1\)",
        lambda: nisa.tensor_scalar(sbuf((4, 2)), sbuf((4, 2)), nl.add, sbuf((4, 2))),
    ),
    "ScalarE's tensor_scalar": (
        "on ScalarE",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.maximum, 1.0, engine=nisa.engine.scalar),
    ),
    "GpSimdE's tensor_scalar": (
        "gpsimd for rsqrt",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.add, 1.0, engine=nisa.engine.gpsimd),
    ),
    "operand without operator": (
        "None without op1",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.add, 1.0, operand1=1.0),
    ),
    "reduced partitions": (
        "last free dimensions",
        lambda: nisa.tensor_reduce(sbuf((1, 4)), nl.add, sbuf((8, 4)), axis=0),
    ),
    "reduced middle": (
        "last free dimensions",
        lambda: nisa.tensor_reduce(sbuf((8, 4)), nl.add, sbuf((8, 3, 4)), axis=1),
    ),
    "reduction result": (
        "8 partitions of 3 elements",
        lambda: nisa.tensor_reduce(sbuf((8, 4)), nl.add, sbuf((8, 3, 4)), axis=2),
    ),
    "accumulator never reset": (
        "a reset before",
        lambda: nisa.activation(
            sbuf((1, 4)), nl.copy, sbuf((1, 4)), reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reduce
        ),
    ),
    "activation's reduction": (
        "reduce_op: expected one of add",
        lambda: nisa.activation_reduce(sbuf((1, 4)), nl.copy, sbuf((1, 4)), nl.maximum, sbuf((1, 1))),
    ),
    "matmul into SBUF": (
        "dst: expected a tensor in psum",
        lambda: nisa.nc_matmul(sbuf((4, 4)), sbuf((4, 4)), sbuf((4, 4))),
    ),
    "matmul from PSUM": (
        "moving: expected a tensor in sbuf",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), psum((4, 4))),
    ),
    "matmul dtype": (
        "stationary: expected dtype",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4), dtype=nl.int8), sbuf((4, 4))),
    ),
    "matmul OCP FP8": (
        "stationary: expected dtype",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4), dtype=FP8_FN), sbuf((4, 4), dtype=FP8_FN)),
    ),
    "matmul mixes fp32": (
        "only together",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((4, 4), dtype=nl.bfloat16)),
    ),
    "matmul into bf16": (
        "dst: expected float32",
        lambda: nisa.nc_matmul(psum((4, 4), dtype=nl.bfloat16), sbuf((4, 4)), sbuf((4, 4))),
    ),
    "moving too wide": (
        "moving: expected a free size of at most 512, got 513",
        lambda: nisa.nc_matmul(psum((4, 513)), sbuf((4, 4)), sbuf((4, 513))),
    ),
    "stationary too wide": (
        "stationary: expected a free size of at most 128, got 129",
        lambda: nisa.nc_matmul(psum((128, 4)), sbuf((4, 129)), sbuf((4, 4))),
    ),
    "contraction differs": (
        "moving: expected 4 partitions",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((8, 4))),
    ),
    "matmul's output": (
        "dst: expected 4 partitions of 8 elements",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((4, 8))),
    ),
    "across PSUM banks": (
        "one PSUM bank of 2048 B",
        lambda: nisa.nc_matmul(psum((4, 1024), value=None)[:, 256:768], sbuf((4, 4)), sbuf((4, 512))),
    ),
    "double_row shape": (
        r"operands \[partitions, 2, free\]",
        lambda: nisa.nc_matmul(
            psum((4, 4)),
            sbuf((4, 8), dtype=nl.float8_e4m3),
            sbuf((4, 8), dtype=nl.float8_e4m3),
            perf_mode=double_row,
        ),
    ),
    "double_row dtype": (
        "stationary: expected dtype float8_e4m3 or float8_e5m2",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 2, 4)), sbuf((4, 2, 4)), perf_mode=double_row),
    ),
    "tile position": (
        "multiples of",
        lambda: nisa.nc_matmul(
            psum((4, 4)), sbuf((4, 4)), sbuf((4, 4)), tile_position=(16, 0), tile_size=(32, 128)
        ),
    ),
    "accumulate onto a memset": (
        "accumulate: expected False for the first matmul",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((4, 4)), accumulate=True),
    ),
    "accumulate onto nothing": (
        "accumulate: expected False for the first matmul",
        lambda: nisa.nc_matmul(psum((4, 4), value=None), sbuf((4, 4)), sbuf((4, 4)), accumulate=True),
    ),
    "VectorE's transpose": (
        r"at most \[32, 32\] on vector",
        lambda: nisa.nc_transpose(sbuf((4, 64)), sbuf((64, 4)), engine=nisa.engine.vector),
    ),
    "transpose's dtype": (
        "data's dtype float32",
        lambda: nisa.nc_transpose(psum((4, 4), dtype=nl.bfloat16), sbuf((4, 4))),
    ),
    "predicate dtype": (
        "predicate: expected dtype uint8",
        lambda: nisa.tensor_copy_predicated(sbuf((4, 4)), sbuf((4, 4)), sbuf((4, 4))),
    ),
    "iota pattern": ("counts whose product is 4", lambda: nisa.iota(sbuf((4, 4)), [[1, 5]])),
    "broadcast destination": (
        "without a broadcast dimension",
        lambda: nisa.memset(sbuf((4, 1)).broadcast(1, 4), 0),
    ),
    "index out of bounds": ("an index within 0..3, got 4", lambda: sbuf((8, 4))[:, 4]),
    "slice out of bounds": ("a non-empty slice within 0..4", lambda: sbuf((8, 4))[:, 2:5]),
    "ds out of bounds": ("ds within 0..4", lambda: sbuf((8, 4))[:, nl.ds(2, 3)]),
    "partition moved": ("partition dimension left where it is", lambda: sbuf((8, 4)).permute((1, 0))),
    "partition reshaped": ("partition dimension left where it is", lambda: sbuf((8, 4)).reshape((4, 8))),
    "reshape of a strided view": ("without a copy", lambda: sbuf((8, 4, 4))[:, :, 0:2].reshape((8, 8))),
    "partition stride": ("the partition stride 4", lambda: sbuf((8, 4)).ap([[8, 4], [1, 4]])),
    "ap out of bounds": ("elements below 4", lambda: sbuf((8, 4)).ap([[4, 8], [1, 5]])),
    "six dimensions": ("at most 5 dimensions", lambda: sbuf((8, 32)).reshape((8, 2, 2, 2, 2, 2))),
    "unaligned view": ("divisible by 4", lambda: sbuf((8, 6), dtype=nl.uint8).view(nl.float32)),
    "assignment": ("an instruction that writes", lambda: sbuf((8, 4)).__setitem__(0, 1)),
    "register never written": ("a register that was written", lambda: nisa.register_alloc().read()),
    "frozen counter": (
        "no loop counter",
        lambda: [nisa.register_move(i, 1) for i in nl.dynamic_range(2)],
    ),
    "barrier alone": (
        r"\(0, 1\) on a grid of 2",
        lambda: nisa.core_barrier(nl.zeros((4,), nl.float32, nl.shared_hbm), (0, 1)),
    ),
    "shift by a float": (
        "an integer",
        lambda: nisa.tensor_scalar(
            sbuf((1, 1), dtype=nl.int8), sbuf((1, 1), dtype=nl.int8), nl.left_shift, 1.0
        ),
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_caught(rule):
    match, statements = BROKEN[rule]
    breaks(match, statements)


def test_the_message_names_instruction_operand_and_source_line():
    def statements():
        nisa.tensor_copy(dst=sbuf((4, 4)), src=sbuf((4, 5)))

    with pytest.raises(NkiSimulationError) as caught:
        body(statements)
    message = str(caught.value)
    assert message.startswith(
        "nki.isa.tensor_copy: src: expected 4 elements each, as dst, got <sbuf float32[4, 5]>"
    )
    assert f"{__file__}:" in message and "nisa.tensor_copy(dst=sbuf((4, 4)), src=sbuf((4, 5)))" in message


def test_a_kernels_own_assertion_is_no_simulation_error():
    def kernel(x):
        assert x.shape[0] == 3, "three rows"

    with pytest.raises(AssertionError, match="three rows"):
        simulate(kernel)(normal(4, 4))
    assert not issubclass(NkiSimulationError, AssertionError)


def test_memory_is_free_again_when_the_last_view_is_gone():
    def statements():
        for _ in range(5):
            view = sbuf((128, 50000))[:, 0:1]
            assert view.shape == (128, 1)
            del view
        del _
        sbuf((128, 57344))

    body(statements)


def test_a_result_not_written_completely_is_an_error():
    def kernel(x):
        out = nl.ndarray((4, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out[:, 0:4], src=x)
        return out

    with pytest.raises(NkiSimulationError, match=r"return: result: .* 64 unwritten bytes"):
        simulate(kernel)(normal(4, 4))
    with pytest.raises(NkiSimulationError, match="a tensor in HBM"):
        simulate(lambda: sbuf((4, 4)))()


@pytest.mark.parametrize("name", ["bn_stats", "sendrecv", "nc_matmul_mx", "no_such_instruction"])
def test_what_is_not_covered_names_the_instruction(name):
    with pytest.raises(NotImplementedError, match=f"nki.isa.{name} is not covered"):
        getattr(nisa, name)
    assert not hasattr(nisa, name) and not hasattr(nl, name) and not hasattr(nki, name)


def test_indirect_forms_that_are_not_covered_say_so():
    def rows():
        return nl.zeros((8, 8), nl.float32, nl.shared_hbm).vector_select(
            0, sbuf((4, 1), dtype=nl.int32, value=1)
        )

    for instruction, step in {
        "dma_transpose": lambda: nisa.dma_transpose(sbuf((8, 4)), rows()),
        "dma_compute": lambda: nisa.dma_compute(sbuf((4, 8)), [rows()], nl.add),
    }.items():
        with pytest.raises(NotImplementedError, match=f"nki.isa.{instruction} with"):
            body(step)


# -- launches ---------------------------------------------------------------------------------------


@nki.jit
def doubled(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    rows = x.shape[0] // nl.num_programs()
    start = nl.program_id(0) * rows
    tile = nl.load(x[start : start + rows])
    nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
    nl.store(out[start : start + rows], tile)
    return out


@pytest.mark.parametrize("grid", [None, 1, 2, (2,), 4])
def test_programs_share_hbm(grid):
    x = normal(64, 32)
    np.testing.assert_array_equal(simulate(doubled, grid)(x), 2 * x)


def test_bracket_syntax_and_calling_a_kernel_directly():
    x = normal(64, 32)
    np.testing.assert_array_equal(simulate(doubled[2])(x), 2 * x)
    np.testing.assert_array_equal(nki.simulate(doubled[2])(x), 2 * x)
    np.testing.assert_array_equal(doubled(x), 2 * x)


@pytest.mark.parametrize("grid", [0, (2, 2), 1000])
def test_grids_that_cannot_be_launched(grid):
    with pytest.raises(ValueError, match="grid: expected"):
        simulate(doubled, grid)(normal(64, 32))


def exchange(x, barrier):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    shared = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    me, rows = nl.program_id(), x.shape[0] // 2
    mine, other = nl.ds(me * rows, rows), nl.ds((1 - me) * rows, rows)
    nl.store(shared[mine], nl.load(x[mine]))
    if barrier:
        nisa.core_barrier(shared, (0, 1))
    nl.store(out[mine], nl.load(shared[other]))
    return out


def test_a_barrier_lets_programs_read_what_the_other_wrote():
    x = normal(8, 4)
    np.testing.assert_array_equal(simulate(exchange, 2)(x, True), np.concatenate([x[4:], x[:4]]))


def test_programs_that_race_or_wait_for_ever_are_caught():
    x = normal(8, 4)
    with pytest.raises(NkiSimulationError, match="unwritten bytes"):
        simulate(exchange, 2)(x, False)

    def read_first(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        if nl.program_id() == 0:
            nl.store(out, nl.load(x))
        else:
            nl.load(out)
        return out

    def both_write(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.load(x))
        return out

    def write_what_was_read(x):
        if nl.program_id() == 0:
            nl.load(x)
        else:
            nl.store(x, sbuf(x.shape))

    def wait_alone(x):
        if nl.program_id() == 0:
            nisa.core_barrier(x, (0, 1))

    with pytest.raises(NkiSimulationError, match=r"same barrier, got only programs \[0\]"):
        simulate(wait_alone, 2)(x)
    with pytest.raises(NkiSimulationError, match="program 1 reads bytes that program 0 wrote"):
        simulate(read_first, 2)(x)
    with pytest.raises(NkiSimulationError, match="program 1 writes bytes that program 0 wrote"):
        simulate(both_write, 2)(x)
    with pytest.raises(NkiSimulationError, match="program 1 writes bytes that another program reads"):
        simulate(write_what_was_read, 2)(x)


def test_programs_must_allocate_shared_memory_alike():
    def kernel(x):
        return nl.zeros((4, 4 + nl.program_id()), dtype=nl.float32, buffer=nl.shared_hbm)

    with pytest.raises(NkiSimulationError, match="shared_hbm allocation 0"):
        simulate(kernel, 2)(normal(2, 2))


def test_each_program_has_a_core_of_its_own():
    x = normal(2, 57344)
    out = simulate(doubled, 2)(x)
    np.testing.assert_array_equal(out, 2 * x)


def test_inputs_are_updated_in_place_and_may_be_strided_or_read_only():
    def clear(x):
        nl.store(x, sbuf(x.shape, value=0))

    x = normal(8, 8)
    simulate(clear)(x)
    assert not x.any()
    wide = normal(8, 8)
    simulate(clear)(wide[:, ::2])
    assert not wide[:, ::2].any() and wide[:, 1::2].all()
    fixed = normal(64, 4)
    fixed.flags.writeable = False
    np.testing.assert_array_equal(simulate(doubled)(fixed), 2 * fixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_in_torch_out(dtype):
    x = torch.randn(64, 8).to(dtype)
    got = simulate(doubled)(x)
    assert isinstance(got, torch.Tensor) and got.dtype == dtype
    torch.testing.assert_close(got, x * 2, rtol=0, atol=0)


def test_fp8_bytes_pass_between_torch_and_nki():
    codes = torch.arange(0x00, 0x78, dtype=torch.uint8).reshape(8, 15)

    def decode(codes):
        out = nl.ndarray(codes.shape, dtype=nl.float32, buffer=nl.shared_hbm)
        same = nl.ndarray(codes.shape, dtype=nl.float8_e4m3, buffer=nl.shared_hbm)
        tile = nl.load(codes)
        nisa.dma_copy(dst=out, src=tile.view(nl.float8_e4m3))
        nisa.dma_copy(dst=same, src=tile.view(nl.float8_e4m3))
        return out, same

    values, same = simulate(decode)(codes)
    torch.testing.assert_close(values, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0)
    assert same.dtype == torch.uint8 and torch.equal(same, codes)
    fn = simulate(doubled)(codes.view(torch.float8_e4m3fn)[:, :8])
    assert fn.dtype == torch.float8_e4m3fn


@dataclass
class Arguments(nl.NKIObject):
    factor: float


def test_objects_and_tuples_are_arguments_but_lists_are_not():
    def kernel(pair, arguments):
        tile = nl.load(pair[0])
        nisa.tensor_tensor(tile, tile, nl.load(pair[1]), nl.add)
        nisa.tensor_scalar(tile, tile, nl.multiply, arguments.factor)
        out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
        nl.store(out, tile)
        return out

    x, y = normal(4, 4), normal(4, 4)
    np.testing.assert_array_equal(simulate(kernel)((x, y), Arguments(2.0)), (x + y) * 2)
    with pytest.raises(NkiSimulationError, match="lists are no kernel arguments"):
        simulate(kernel)([x, y], Arguments(2.0))


def test_language_calls_make_tiles():
    def kernel(x, row):
        tile, wide = nl.load(x), nl.broadcast_to(nl.load(row), x.shape)
        result = nl.add(nl.multiply(nl.exp(tile), 2.0), wide)
        result = nl.subtract(result, nl.max(result, axis=1, keepdims=True))
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.maximum(result, nl.full(x.shape, -1.0, x.dtype)))
        return out

    x, row = normal(100, 700), normal(1, 700)
    want = np.exp(x) * 2 + row
    want = np.maximum(want - want.max(1, keepdims=True), -1)
    np.testing.assert_allclose(simulate(kernel)(x, row), want, rtol=1e-5, atol=1e-5)


def test_as_nki_puts_back_what_was_there():
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "nki"}
    marker = type(sys)("nki")
    sys.modules["nki"] = marker
    try:
        with as_nki() as ours:
            import nki.isa
            import nki.language
            import nki.typing

            assert nki is ours and sys.modules["nki.isa"] is ours.isa and nki.language is ours.language
        assert sys.modules["nki"] is marker and "nki.isa" not in sys.modules
        with pytest.raises(RuntimeError), as_nki():
            raise RuntimeError
        assert sys.modules["nki"] is marker
    finally:
        del sys.modules["nki"]
        sys.modules.update(before)


def test_a_kernel_of_the_neuron_sdk_runs_in_its_simulator(monkeypatch):
    """A stand-in for the SDK: a module ``nki`` whose jit makes objects of a class of its own."""

    class Jitted:
        __module__ = "nki.kernel"

        def __init__(self, grid=None):
            self.grid = grid

        def __getitem__(self, grid):
            return Jitted(grid)

    sdk = type(sys)("nki")
    sdk.simulate = lambda kernel: (
        lambda x: (kernel.grid, x, os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE"))
    )
    monkeypatch.setitem(sys.modules, "nki", sdk)
    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE", raising=False)
    assert simulate(Jitted())(5) == (None, 5, None)
    assert simulate(Jitted(), (2,), target="trn2")(5) == (2, 5, "trn2")
    assert "NEURON_PLATFORM_TARGET_OVERRIDE" not in os.environ
    with pytest.raises(NkiSimulationError, match="under as_nki"):
        cost(Jitted())
    plain = type(lambda: 0)(compile("0", "f", "eval"), {"nki": sdk})
    sdk.simulate = lambda kernel: lambda: kernel
    assert simulate(plain)() is plain


def test_nki_calls_outside_of_a_kernel_are_refused():
    with pytest.raises(NkiSimulationError, match="outside of a kernel"):
        sbuf((4, 4))


# -- the language -----------------------------------------------------------------------------------


def helper_with_lambda():
    return lambda: 1


def calls_helper(x):
    helper_with_lambda()


def catches(x):
    try:
        nl.load(x)
    except ValueError:
        return


def compares_identity(x=None):
    if x is None:
        return


def keyword_only(x, *, flag=True): ...


def closes_over(x):
    def inner():
        return x

    inner()


def generates(x):
    return sum(i for i in range(3))


def has_context(x):
    with open(x):
        return


def imports(x):
    import math

    return math


def allowed(x, scale=1.0):
    """Everything the guide shows."""
    items = [i * 2 for i in range(3)] + [len((1, 2))]
    table = {"a": 1}
    assert x.shape[0] >= 1, f"{x.shape}"
    if scale == None:  # noqa: E711
        print(items, table)
    with nl.no_reorder():
        tile = nl.load(x)

    def loop_body(i):
        nl.store(x, tile)

    nl.fori_loop(0, 2, loop_body)
    while table["a"] < 3:
        table["a"] += 1


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (calls_helper, "helper_with_lambda: a lambda"),
        (catches, "try/except"),
        (compares_identity, "`is`"),
        (keyword_only, "keyword-only"),
        (closes_over, "a closure"),
        (generates, "a generator"),
        (has_context, "`with`"),
        (imports, "an import"),
    ],
)
def test_python_that_is_not_nki_is_refused(kernel, what):
    with pytest.raises(
        NkiSimulationError, match=f"{what}.* is no part of the NKI language\n  at {__file__}:"
    ):
        simulate(kernel)(normal(4, 4))


def test_what_the_language_guide_shows_is_accepted():
    check_language(allowed)
    simulate(allowed)(normal(4, 4))


# -- the cost model ---------------------------------------------------------------------------------


@nki.jit
def hand_counted(x, w):
    """One instruction of each priced kind on [128, 1024] tiles."""
    out = nl.ndarray((128, 1024), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    a = nl.load(x)
    weight = nl.load(w)
    b = nl.ndarray((128, 1024), dtype=nl.bfloat16, buffer=nl.sbuf)
    wide = nl.ndarray((128, 1024), dtype=nl.float32, buffer=nl.sbuf)
    one = nl.ndarray((128, 1), dtype=nl.float32, buffer=nl.sbuf)
    product = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
    nisa.tensor_copy(b, a)  # 1024 / 4
    nisa.tensor_copy(b[:, 0:512], a[:, 0:1024:2])  # 512 / 2: strided
    nisa.tensor_copy(wide, a)  # 1024: fp32
    nisa.tensor_tensor(b, b, a, nl.add)  # 1024 / 2: all bf16
    nisa.tensor_tensor(wide, b, a, nl.add)  # 2 * 1024: fp32
    nisa.tensor_reduce(one, nl.maximum, b, 1)  # 1024
    nisa.reciprocal(one, one)  # 64 at least
    nisa.activation_reduce(wide, nl.square, a, nl.add, one)  # 1024 + 64
    nisa.nc_matmul(product, weight, a[:, 0:512])  # 512
    nisa.nc_matmul(product[:, 0:1], weight, a[:, 0:1], accumulate=False)  # 64 at least
    nisa.tensor_copy(b[:, 0:512], product)  # 512: fp32 in PSUM
    nl.store(out, b)
    return out


def test_cost_of_a_kernel_counted_by_hand():
    report = cost(hand_counted)(normal(128, 1024, dtype=BF16), normal(128, 128, dtype=BF16))
    engines = report.engines
    assert engines["VectorE"].cycles == 256 + 256 + 1024 + 512 + 2048 + 1024 + 64 + 512
    assert engines["VectorE"].instructions == 8
    assert engines["VectorE"].time_us == pytest.approx(5696 / 960)
    assert engines["ScalarE"].cycles == 1024 + 64 and engines["ScalarE"].time_us == pytest.approx(1088 / 1200)
    assert engines["TensorE"].cycles == 512 + 64 and engines["TensorE"].time_us == pytest.approx(576 / 2400)
    tile, weight = 128 * 1024 * 2, 128 * 128 * 2
    assert report.bytes["HBM->SBUF"] == tile + weight and report.bytes["SBUF->HBM"] == tile
    assert engines["DMA"].time_us == pytest.approx((2 * tile + weight) / 368e3)
    assert report.dma_roofline_us == pytest.approx(engines["DMA"].time_us)
    assert report.hbm_roofline_us == pytest.approx((2 * tile + weight) / 375e3)
    assert report.bound == "VectorE" and report.time_us == engines["VectorE"].time_us
    assert report.worst.peaks == {"SBUF": 2048 + 256 + 2048 + 4096 + 4, "PSUM": 2048}
    assert report.worst.short_run_bytes == weight
    text = str(report)
    assert text.startswith("MODEL") and "VectorE" in text and "bound: VectorE, 5.9 us" in text


def test_cost_of_dma_transposes_and_sums():
    def kernel(x):
        turned = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(turned, x)
        again = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(again, turned)
        nisa.dma_compute(x, [x, again], nl.add)

    report = cost(kernel)(normal(128, 128, dtype=BF16))
    size = 128 * 128 * 2
    assert report.engines["DMA"].time_us == pytest.approx((size / 0.9 + size / 0.5 + 2 * size) / 368e3)
    assert report.bytes == {"HBM->SBUF": size, "SBUF->SBUF": size, "HBM->HBM": size, "SBUF->HBM": size}


def test_cost_of_a_grid_is_its_slowest_program():
    def uneven(x):
        rows = nl.ds(0, 32) if nl.program_id() == 0 else nl.ds(32, 96)
        tile = nl.load(x[rows])
        for _ in range(1 + nl.program_id()):
            nisa.activation(tile, nl.copy, tile)

    report = cost(uneven, 2)(normal(128, 600))
    assert [p.engines["ScalarE"].cycles for p in report.programs] == [600, 1200]
    assert report.worst is report.programs[1] and "programs: 2" in str(report)
    assert report.bytes["HBM->SBUF"] == 128 * 600 * 4


def test_the_target_decides_what_is_allowed(monkeypatch):
    def ocp(d, a, b):
        nisa.nc_matmul(d, a, b, perf_mode=nisa.matmul_perf_mode.double_row)

    def version():
        assert nisa.get_nc_version() == nisa.nc_version.gen4
        sbuf((1, 65536))

    def mixed():
        nisa.nc_matmul(psum((4, 4)), sbuf((4, 4), dtype=FP8_FN), sbuf((4, 4), dtype=nl.float8_e4m3))

    codes = normal(2, 128, 2, 16, dtype=ml_dtypes.float8_e4m3fn)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    got = run(ocp, (16, 16), nl.float32, *codes, buffer=nl.psum)
    x, y = (c.astype(np.float32).reshape(256, 16) for c in codes)
    np.testing.assert_allclose(got, x.T @ y, rtol=1e-5, atol=1e-4)
    body(version)
    breaks("not in one matmul", mixed)
    with pytest.raises(NotImplementedError, match="Trainium2 only"):
        cost(doubled)(normal(4, 4))
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "gen2")
    breaks("at most 196608 B of SBUF", lambda: sbuf((1, 57344)))
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn9")
    with pytest.raises(ValueError, match="expected one of trn1, trn2, trn3, got 'trn9'"):
        simulate(doubled)(normal(4, 4))
    simulate(call_body, target="trn3")(version)
    with pytest.raises(NkiSimulationError, match="at most 229376 B"):
        simulate(call_body, target="trn2")(lambda: sbuf((1, 65536)))


@nki.jit
def pairs(x, y):
    """VectorE's instructions with two inputs, on [128, 1024]."""
    a, b = nl.load(x), nl.load(y)
    wide = nl.ndarray((128, 1024), dtype=nl.float32, buffer=nl.sbuf)
    half = nl.ndarray((128, 1024), dtype=nl.bfloat16, buffer=nl.sbuf)
    bank = nl.ndarray((128, 1024), dtype=nl.float32, buffer=nl.psum)
    nisa.memset(bank, 1.0)  # 1024
    nisa.memset(half, 0)  # 512: zeros of 16 bits
    nisa.tensor_tensor(half, a, b, nl.maximum)  # 512, or 1024 under the careful reading
    nisa.tensor_tensor(wide, a, bank, nl.add)  # 1024: one in PSUM
    nisa.scalar_tensor_tensor(wide, a, nl.multiply, 2.0, nl.add, b)  # 2048
    nisa.scalar_tensor_tensor(wide, a, nl.multiply, 2.0, nl.add, bank)  # 1024: one in PSUM
    nisa.scalar_tensor_tensor(wide, a, nl.subtract, 2.0, nl.multiply, b)  # 1024: bf16 mode
    nisa.tensor_reduce(half[:, 0:1], nl.maximum, a, 1)  # 512: bf16 mode


def test_cost_of_instructions_with_two_inputs():
    report = cost(pairs)(*normal(2, 128, 1024, dtype=BF16))
    assert report.engines["VectorE"].cycles == 1024 + 512 + 512 + 1024 + 2048 + 1024 + 1024 + 512
    assert report.worst.careful_vector_us == pytest.approx(report.engines["VectorE"].time_us + 512 / 960)
    assert "VectorE: 8.5 us if tensor_tensor's 16-bit mode" in str(report)


def test_tile_sizes_are_the_hardwares():
    assert nl.tile_size.pmax == 128 and nl.tile_size.psum_fmax == 512
    assert nl.tile_size.gemm_moving_fmax == 512 and nl.tile_size.gemm_stationary_fmax == 128
    assert nl.tile_size.total_available_sbuf_size == nl.tile_size.sbuf_fmax_bytes == 229376
    assert nl.tile_size.sbuf_size_bytes == 28 * 2**20 and nl.tile_size.sbuf_fmax == 57344
    assert nisa.get_nc_version() == nisa.nc_version.gen3
