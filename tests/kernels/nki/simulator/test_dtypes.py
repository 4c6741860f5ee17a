"""Conversions between dtypes agree with ml_dtypes, NumPy and the formats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_neuron_rmsq.kernels.nki.simulator import dtypes


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


@pytest.mark.parametrize("name", dtypes.PACKED)
def test_packed_dtypes_are_moved_but_not_computed_with(name):
    assert dtypes.name_of(name) == name and dtypes.itemsize(name) in (2, 4)
    for convert in (dtypes.to_float32, dtypes.from_float32):
        with pytest.raises(NotImplementedError, match=f"{name}: the simulator moves packed"):
            convert(np.zeros(2, dtypes.NUMPY[name]), name)
