"""The weight's numbers: quantizing per channel, and bringing FP8 weights within a target's range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_neuron_rmsq import packed, weights
from vllm_neuron_rmsq.target import TARGETS, TRN2, TRN3


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 20),
    k=st.integers(1, 40),
    target=st.sampled_from(list(TARGETS.values())),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    power=st.integers(-14, 10),
)
def test_codes_fit_the_target_and_are_the_nearest(seed, n, k, target, dtype, power):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) * 2.0**power).to(dtype)
    weight[torch.rand(n, generator=generator) < 0.2] = 0
    codes, scale = weights.quantize(weight, target)
    assert codes.dtype == torch.float8_e4m3fn
    assert (scale.dtype, scale.shape) == (torch.float32, (n, 1))
    assert (scale > 0).all()
    values = codes.double()
    assert values.abs().max() <= target.fp8_max
    used = weight.abs().amax(dim=1) > 0
    assert (values.abs().amax(dim=1)[used] == target.fp8_max).all(), "the range is used to its end"
    assert (values[~used] == 0).all()
    # Half a step: 3 mantissa bits, and 2^-9 the spacing of subnormals.
    exact = weight.double() / scale.double()
    assert (
        (values - exact).abs() <= torch.maximum(exact.abs() * 2.0**-4, torch.tensor(2.0**-10)) * (1 + 1e-6)
    ).all()


def test_halving_is_exact_but_for_odd_subnormals():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != packed.NAN_CODE].reshape(1, -1)
    halved, scale = weights.halve(codes, torch.ones(1))
    assert int((halved & 0x7F).max()) <= TRN2.max_code
    before = codes.view(torch.float8_e4m3fn).float()
    after = halved.view(torch.float8_e4m3fn).float() * scale
    inexact = codes[before != after]
    # Half of the odd multiples of 2^-9 below 2^-6 lies between two codes, of the normals below 2^-5 too.
    assert set((inexact & 0x7F).tolist()) == {1, 3, 5, 7, 9, 11, 13, 15}
    assert (before - after).abs().max() <= 2**-9


def test_only_what_does_not_fit_is_halved():
    scale = torch.ones(1)
    for largest, target, halved in ((0x77, TRN2, False), (0x78, TRN2, True), (0x7E, TRN3, False)):
        codes = torch.tensor([[0x08, 0x80 | largest]], dtype=torch.uint8)
        fitted = weights.fit(codes, scale, target)
        assert fitted.halved is halved
        assert int((fitted.codes & 0x7F).max()) <= target.max_code
        values = fitted.codes.view(torch.float8_e4m3fn).float() * fitted.scale
        assert torch.equal(values, codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    "code, scale", [(0x7F, 1.0), (0xFF, 1.0), (0x08, float("nan")), (0x08, float("inf"))]
)
def test_nan_and_inf_are_refused(code, scale):
    with pytest.raises(ValueError, match="weight: holds NaN or Inf in its codes or scales"):
        weights.fit(torch.tensor([[code]], dtype=torch.uint8), torch.tensor([scale]), TRN2)
