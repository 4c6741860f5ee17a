"""Instructions of VectorE and GpSimdE against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from nki_simulated import BF16, RNG, nisa, nl, normal, run, sbuf

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


@pytest.mark.parametrize("sizes", [(512,), (512, 301, 1)])
def test_batch_norm_statistics_are_mean_and_variance(sizes):
    x = normal(6, sum(sizes)) * 3 + 10

    def step(d, a):
        stats, start = sbuf((6, 6 * len(sizes)), value=None), 0
        for i, n in enumerate(sizes):
            nisa.bn_stats(stats[:, 6 * i : 6 * i + 6], a[:, start : start + n])
            start += n
        nisa.bn_aggr(d, stats)

    want = np.stack([x.mean(1, dtype=np.float64), x.var(1, dtype=np.float64)], 1)
    np.testing.assert_allclose(run(step, (6, 2), nl.float32, x), want, rtol=1e-5)


def test_batch_norm_statistics_of_even_and_odd_elements():
    x = np.array([[1, 10, 3, 20, 5]], np.float32)
    got = run(lambda d, a: nisa.bn_stats(d, a), (1, 6), nl.float32, x)
    assert got.tolist() == [[3, 3, 8, 2, 15, 50]]
