"""Patterns, predicated copies and selections against plain NumPy."""

from __future__ import annotations

import numpy as np
from nki_simulated import RNG, nisa, nl, normal, run, sbuf


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
