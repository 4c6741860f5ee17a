"""Patterns, predicated copies and selections against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
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


def test_range_select_compares_places_with_bounds():
    x = normal(4, 10)
    low, high = np.array([[0], [2], [5], [10]], np.float32), np.array([[10], [4], [6], [20]], np.float32)

    def step(d, a, b, c):
        largest = sbuf((4, 1))
        nisa.range_select(
            d[:, 0:10], a, nl.greater_equal, nl.less, b, c, reduce_res=largest, reduce_op=nl.maximum
        )
        nisa.tensor_copy(d[:, 10:11], largest)

    place = np.arange(10)
    lowest = np.finfo(np.float32).min
    want = np.where((place >= low) & (place < high), x, lowest)
    got = run(step, (4, 11), nl.float32, x, low, high)
    np.testing.assert_array_equal(got, np.concatenate([want, want.max(1, keepdims=True)], 1))

    def shifted(d, a, b, c):
        nisa.range_select(d, a, nl.greater, nl.less_equal, b, c, range_start=3)

    want = np.where((place + 3 > low) & (place + 3 <= high), x, lowest)
    np.testing.assert_array_equal(run(shifted, (4, 10), nl.float32, x, low, high), want)


def test_max8_find_index8_and_match_replace8():
    x = normal(5, 40)
    x[1, 7] = x[1, 30] = 9.0  # found one after the other
    order = np.argsort(-x, axis=1, kind="stable")[:, :8]

    def largest(d, a):
        nisa.max8(d, a)

    def places(d, a):
        top = sbuf((5, 8))
        nisa.max8(top, a)
        nisa.nc_find_index8(d, a, top)

    np.testing.assert_array_equal(run(largest, (5, 8), nl.float32, x), np.take_along_axis(x, order, 1))
    for dtype in (nl.uint32, nl.uint16):
        np.testing.assert_array_equal(run(places, (5, 8), dtype, x), order)

    def missing(d, a):
        nisa.nc_find_index8(d, a, sbuf((5, 8), value=100.0))

    assert (run(missing, (5, 8), nl.uint16, x) == 0xFFFF).all()


def test_match_replace8_takes_equal_values_from_the_last_of_the_eight_on():
    data = np.array([[1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8]], np.float32)
    vals = np.array([[3, 8, 8, 8, 8, 8, 8, 8]], np.float32)

    def step(d, a, b):
        index = sbuf((1, 8), dtype=nl.uint32)
        nisa.nc_match_replace8(d[:, 0:11], a, b, imm=-1.0, dst_idx=index)
        nisa.tensor_copy(d[:, 11:19], index)

    got = run(step, (1, 19), nl.float32, data, vals)[0]
    assert got[:11].tolist() == [1, 2, -1, 4] + [-1] * 7
    assert got[11:].tolist() == [2, 10, 9, 8, 7, 6, 5, 4]  # the example of the instruction's page


def test_stream_shuffle_moves_partitions_inside_each_quadrant():
    x = normal(64, 3)
    mask = [(i + 5) % 32 for i in range(32)]
    mask[3] = 255

    def step(d, a):
        nisa.memset(d, 0)
        nisa.nc_stream_shuffle(d, a, mask)

    want = np.concatenate([x[:32][[m % 32 for m in mask]], x[32:][[m % 32 for m in mask]]])
    want[[3, 35]] = 0
    np.testing.assert_array_equal(run(step, (64, 3), nl.float32, x), want)

    def in_place(d, a):
        nisa.nc_stream_shuffle(a, a, [1, 0] + [255] * 30)
        nisa.tensor_copy(d, a)

    want = x.copy()
    want[[0, 1, 32, 33]] = x[[1, 0, 33, 32]]
    np.testing.assert_array_equal(run(in_place, (64, 3), nl.float32, x), want)

    def first_to_all(d, a):
        for start in (0, 32):
            nisa.nc_stream_shuffle(d[start : start + 32], a[0:1], [0] * 32)

    np.testing.assert_array_equal(run(first_to_all, (64, 3), nl.float32, x), x[[0] * 64])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_nonzero_with_count_works_on_one_partition_of_each_core(dtype):
    x = np.zeros((33, 8), dtype)
    x[0, [1, 2, 5]] = x[16, 7] = x[17] = 1  # partition 17 is nobody's first

    def step(d, a):
        nisa.memset(d, 9)
        nisa.nonzero_with_count(d, a, index_offset=16, padding_val=-1)

    want = np.full((33, 9), 9)
    want[0], want[16], want[32] = (
        [17, 18, 21, -1, -1, -1, -1, -1, 3],
        [23] + [-1] * 7 + [1],
        [-1] * 8 + [0],
    )
    np.testing.assert_array_equal(run(step, (33, 9), nl.int32, x), want)
