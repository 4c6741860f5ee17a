"""TensorE's matmul and transpose against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from nki_simulated import BF16, F8, body, nisa, nl, normal, psum, run, sbuf

from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationWarning, simulate


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

    with pytest.warns(NkiSimulationWarning, match="accumulate: expected False .* got None on a location"):
        body(rewritten)


def test_nc_matmul_starts_anew_in_a_tensor_placed_over_another():
    def kernel(x):
        out = nl.ndarray((4, 4), nl.float32, nl.shared_hbm)
        tile = nl.load(x)
        for _ in range(2):
            product = psum((4, 4), value=None, address=(0, 0))
            nisa.nc_matmul(product, tile, tile)
            result = sbuf((4, 4))
            nisa.tensor_copy(result, product)
        nl.store(out, result)
        return out

    x = normal(4, 4)
    np.testing.assert_allclose(simulate(kernel)(x), x.T @ x, rtol=1e-5, atol=1e-6)


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
