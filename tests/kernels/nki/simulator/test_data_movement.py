"""DMA instructions and copies move the elements they should."""

from __future__ import annotations

import numpy as np
import pytest
from nki_simulated import BF16, F8, RNG, nisa, nl, normal, run, sbuf

from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationError, simulate


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


def test_a_run_time_index_scales_with_the_view_it_is_taken_on_and_may_be_skipped_beyond_it():
    x = np.arange(40, dtype=np.float32).reshape(4, 10)

    def kernel(data, index, oob):
        out = nl.zeros((1, 3), nl.float32, nl.shared_hbm)
        flat = data.reshape((40,))
        place = nl.ndarray((1, 1), nl.int32)
        nisa.memset(place, index)
        tile = sbuf((1, 3), value=-1)
        part = flat.ap([[1, 1], [1, 3]], scalar_offset=place, indirect_dim=0)
        nisa.dma_copy(tile, part, oob_mode=oob)
        nl.store(out, tile)
        return out

    np.testing.assert_array_equal(simulate(kernel)(x, 17, nisa.oob_mode.error), [[17, 18, 19]])
    for outside in (-1000, 40):
        np.testing.assert_array_equal(simulate(kernel)(x, outside, nisa.oob_mode.skip), [[-1, -1, -1]])
        with pytest.raises(NkiSimulationError, match="an index below 40"):
            simulate(kernel)(x, outside, nisa.oob_mode.error)
