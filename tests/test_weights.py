"""The weight's numbers: quantizing per channel, and bringing FP8 weights within a target's range."""

from __future__ import annotations

import math

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


@given(
    seed=st.integers(0, 1000),
    n=st.sampled_from([1, 127, 128, 129, 260]),
    k=st.sampled_from([1, 100, 128, 300]),
    target=st.sampled_from(list(TARGETS.values())),
)
def test_blocks_are_quantized_each_by_itself(seed, n, k, target):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    weight[:128, :128] *= 1000
    codes, scale = weights.quantize(weight, target, blocks=True)
    assert scale.shape == weights.block_scale_shape(n, k) == (-(-n // 128), -(-k // 128))
    for i in range(0, n, 128):
        for j in range(0, k, 128):
            part = weight[i : i + 128, j : j + 128]
            expected, one = weights.quantize(part.reshape(1, -1), target)
            assert torch.equal(scale[i // 128, j // 128], one[0, 0])
            block = codes[i : i + 128, j : j + 128]
            assert torch.equal(block.float(), expected.float().reshape(part.shape))
    expanded = weights.expand_block_scale(scale, n, k)
    assert expanded.shape == (n, k)
    assert expanded[-1, -1] == scale[-1, -1]
    assert expanded[0, -1] == scale[0, -1]


def test_fitting_block_scales_halves_codes_and_doubles_scales():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    codes, scale = weights.quantize(weight, TRN3, blocks=True)
    fitted = weights.fit(codes.view(torch.uint8), scale, TRN2)
    assert fitted.halved
    assert torch.equal(fitted.scale, scale * 2)
    before = codes.float() * weights.expand_block_scale(scale, 200, 300)
    after = fitted.codes.view(torch.float8_e4m3fn).float()
    after = after * weights.expand_block_scale(fitted.scale, 200, 300)
    torch.testing.assert_close(after, before, rtol=0, atol=2**-9 * scale.max().item() * 1.001)


@pytest.mark.parametrize("shape", [(200,), (1,), (2, 3)])
def test_scales_that_lose_weights_are_refused(shape):
    codes = torch.full((200, 300), 0x38, dtype=torch.uint8)
    for value, message in ((-0.5, r"got -0.5; the checkpoint"), (0.0, r"got 0 for [0-9]+ weights")):
        scale = torch.ones(shape)
        scale.view(-1)[-1] = value
        with pytest.raises(ValueError, match=rf"^weight_scale: expected positive numbers, {message}"):
            weights.fit(codes, scale, TRN2)
    scale = torch.ones(shape)
    scale.view(-1)[-1] = math.nan
    with pytest.raises(ValueError, match="weight: holds NaN or Inf in its codes or scales"):
        weights.fit(codes, scale, TRN2)


def test_a_scale_of_zero_is_taken_where_all_codes_are_zero():
    codes = torch.full((200, 300), 0x38, dtype=torch.uint8)
    codes[128:, 256:] = 0x80
    scale = torch.ones(2, 3)
    scale[1, 2] = 0
    assert weights.fit(codes, scale, TRN2) == (codes, scale, False)


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


def test_halving_and_decoding_are_torch_s_for_every_code():
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(weights.decode(codes), values)
    halved, scale = weights.halve(codes[:, None], torch.ones(1))
    assert torch.equal(halved[:, 0], (values / 2).to(torch.float8_e4m3fn).view(torch.uint8))
    assert scale == 2
