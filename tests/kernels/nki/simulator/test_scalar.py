"""ScalarE's activations against plain NumPy, inside and outside of their documented range."""

from __future__ import annotations

import math

import numpy as np
import pytest
from nki_simulated import nisa, nl, normal, run, sbuf

from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationWarning

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
    with pytest.warns(NkiSimulationWarning, match=r"(?s)within .*\(4 times\)"):
        got = run(lambda d, a: nisa.activation(d, nl.rsqrt, a), x.shape, nl.float32, x)
    assert np.isnan(got[0, [0, 3, 4, 5]]).all() and got[0, 1] == 2.0**40 and got[0, 2] == 1
    x = np.array([[-4.0, 0]], np.float32)
    with pytest.warns(NkiSimulationWarning, match=r"(?s)within .*\(1 times\)"):
        got = run(lambda d, a: nisa.activation(d, nl.reciprocal, a), x.shape, nl.float32, x)
    assert got[0, 0] == -0.25 and np.isnan(got[0, 1])


def test_activation_keeps_sums_in_the_engine():
    x, y = normal(128, 6), normal(128, 6)

    def step(d, a, b):
        nisa.activation(sbuf(x.shape), nl.copy, a, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reset_reduce)
        nisa.activation(
            sbuf(x.shape), nl.copy, b, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reduce, reduce_res=d
        )

    np.testing.assert_allclose(run(step, (128, 1), nl.float32, x, y)[:, 0], x.sum(1) + y.sum(1), atol=1e-5)
