"""The reference against a float64 oracle that shares no code with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TARGETS = ("trn2", "trn3")


@st.composite
def arguments(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """``(hidden, weight, keywords)`` of every kind the contract knows, all finite."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lead = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    width = draw(st.integers(1, 100))
    dtype = draw(st.sampled_from(DTYPES))
    lowest, highest = (-10, 8) if dtype == torch.float16 else (-30, 40)
    shape = (*lead, width)

    def tensor() -> torch.Tensor:
        """Rows of normal numbers, each row of its own magnitude, some rows zero."""
        values = torch.randn(shape, generator=generator)
        powers = torch.randint(lowest, highest, (*lead, 1), generator=generator)
        zero = torch.rand((*lead, 1), generator=generator) < 0.1
        return (values * 2.0**powers).masked_fill(zero, 0).to(dtype)

    weight = None
    if draw(st.booleans()):
        weight = torch.randn(width, generator=generator).to(draw(st.sampled_from(DTYPES)))
    keywords: dict[str, Any] = {
        "eps": draw(st.sampled_from([1e-6, 1e-5, 0.5])),
        "target": draw(st.sampled_from(TARGETS)),
        "lower_bound": draw(st.sampled_from([0.0, 0.0, 0.75, 100.0])),
        "residual": tensor() if draw(st.booleans()) else None,
        "static_scale": draw(st.sampled_from([None, None, 0.01, 1.0])),
    }
    return tensor(), weight, keywords


@given(arguments())
def test_every_combination_agrees_with_the_oracle(case):
    hidden, weight, keywords = case
    result = reference.rms_norm_quant(hidden, weight, **keywords)
    expected = oracle.rms_norm_quant(hidden, weight, **keywords)
    if keywords["residual"] is not None:
        result, residual_out = result
        assert residual_out.dtype == hidden.dtype
        assert residual_out.shape == hidden.shape
        assert torch.equal(residual_out.reshape(expected.residual_out.shape), expected.residual_out)
    assert result.dtype == torch.uint8
    if keywords["static_scale"] is None:
        assert result.shape == (*hidden.shape[:-1], hidden.shape[-1] + 4)
        oracle.assert_packed(result, expected)
    else:
        assert result.shape == hidden.shape
        oracle.assert_codes(result.reshape(-1, hidden.shape[-1]).numpy(), expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        (torch.float32, 1e-4),
        (torch.float16, 1e-4),
        # With 8 significant bits many x / max|x| * R are ties to the last bit, and not even two float64
        # formulas agree on those: x / (max / R) and x * R / max differ on 1.8e-4 of them.
        (torch.bfloat16, 1e-3),
    ],
)
def test_ties_are_rare(dtype, most, target, norm):
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(128, 1024, generator=generator).to(dtype)
    weight = torch.rand(1024, generator=generator).to(dtype) + 0.5 if norm else None
    result = reference.rms_norm_quant(hidden, weight, target=target)
    expected = oracle.rms_norm_quant(hidden, weight, target=target)
    assert isinstance(result, torch.Tensor)
    assert oracle.assert_packed(result, expected) <= most * hidden.numel()


@given(arguments())
def test_codes_stay_within_the_target(case):
    hidden, weight, keywords = case
    result = reference.rms_norm_quant(hidden, weight, **keywords)
    codes = result[0] if isinstance(result, tuple) else result
    codes = codes[..., : hidden.shape[-1]]
    assert codes.view(torch.float8_e4m3fn).float().abs().max() <= oracle.FP8_MAX[keywords["target"]]


@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_value_of_a_row_takes_the_largest_code(target):
    hidden = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    codes, _ = fmt.unpack(reference.rms_norm_quant(hidden, torch.ones(64), target=target))
    peaks = codes.view(torch.float8_e4m3fn).float().abs().amax(dim=1)
    assert peaks.tolist() == [oracle.FP8_MAX[target]] * 16


@pytest.mark.parametrize("weight", [None, torch.ones(8)])
def test_a_row_of_zeros_has_zero_codes_and_the_smallest_scale(weight):
    packed = reference.rms_norm_quant(torch.zeros(3, 8), weight)
    codes, scale = fmt.unpack(packed)
    assert codes.count_nonzero() == 0
    assert torch.equal(scale, torch.full((3, 1), 1e-6))


@pytest.mark.parametrize("weight", [None, torch.ones(8)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", [0.0, 1.0])
@pytest.mark.parametrize("where", ["hidden", "residual"])
def test_a_row_that_is_not_finite_has_a_nan_scale_and_leaves_its_neighbours(weight, bad, bound, where):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(3, 8, generator=generator) for name in ("hidden", "residual")}

    def run(static_scale: float | None = None) -> torch.Tensor:
        return reference.rms_norm_quant(
            tensors["hidden"],
            weight,
            residual=tensors["residual"],
            lower_bound=bound,
            static_scale=static_scale,
        )[0]

    clean, clean_static = run(), run(0.1)
    tensors[where][1, 5] = bad
    packed, static = run(), run(0.1)
    codes, scale = fmt.unpack(packed)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert codes[1].tolist() == [0] * 8
    assert static[1].tolist() == [0x7F] * 8
    assert torch.equal(packed[[0, 2]], clean[[0, 2]])
    assert torch.equal(static[[0, 2]], clean_static[[0, 2]])


def test_infinity_minus_infinity_is_not_finite():
    inf = torch.full((1, 4), math.inf)
    packed, residual_out = reference.rms_norm_quant(inf, None, residual=-inf)
    assert fmt.unpack(packed)[1].isnan().all()
    assert residual_out.isnan().all()


def test_a_mean_square_that_overflows_has_a_nan_scale_never_zeros():
    """x * rsqrt(inf) would be a row of zeros: wrong, and finite."""
    packed = reference.rms_norm_quant(torch.full((1, 8), 1e30), torch.ones(8))
    assert fmt.unpack(packed)[1].isnan().all()
    assert fmt.unpack(reference.rms_norm_quant(torch.full((1, 8), 1e30), None))[1].isfinite().all()


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(lead, dtype):
    hidden = torch.zeros(*lead, 16, dtype=dtype)
    packed, residual_out = reference.rms_norm_quant(hidden, torch.ones(16), residual=hidden)
    assert packed.shape == (*lead, 20)
    assert residual_out.shape == hidden.shape
    assert reference.rms_norm_quant(hidden, None, static_scale=1.0).shape == hidden.shape


def test_layout_in_memory_does_not_matter():
    hidden = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, generator=torch.Generator().manual_seed(1))
    expected = reference.rms_norm_quant(hidden[::2].contiguous(), weight[::2].contiguous())
    assert torch.equal(reference.rms_norm_quant(hidden[::2], weight[::2]), expected)
    transposed = hidden.transpose(0, 1).contiguous().transpose(0, 1)[::2]
    assert torch.equal(reference.rms_norm_quant(transposed, weight[::2]), expected)


def test_static_scale_may_be_a_tensor():
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    expected = reference.rms_norm_quant(hidden, None, static_scale=0.25)
    for scale in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([[0.25]])):
        assert torch.equal(reference.rms_norm_quant(hidden, None, static_scale=scale), expected)


def test_arguments_are_left_as_they_were():
    hidden, residual, weight = torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)
    before = [t.clone() for t in (hidden, residual, weight)]
    reference.rms_norm_quant(hidden, weight, residual=residual, lower_bound=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, residual, weight), strict=True))


@given(st.integers(0, 0xFF))
def test_the_oracle_rounds_every_code_to_itself_and_ties_to_even(code):
    """The oracle must deserve its name: its FP8 against torch's, at every code and at every boundary."""
    if code & 0x7F == 0x7F:
        return
    value = torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    assert oracle.from_fp8(np.array([code], dtype=np.uint8))[0] == value[0]
    assert oracle.to_fp8(value)[0] == code
    if code & 0x7F < 0x7E:
        following = oracle.from_fp8(np.array([code + 1], dtype=np.uint8))
        boundary = (value + following) / 2
        assert oracle.to_fp8(boundary)[0] == code + code % 2
        assert (
            torch.from_numpy(boundary).float().to(torch.float8_e4m3fn).view(torch.uint8)[0] == code + code % 2
        )


@pytest.mark.parametrize("name", ["weight", "hidden", "residual", "eps", "lower_bound", "static_scale"])
def test_bad_arguments_are_named(name):
    hidden, weight = torch.zeros(2, 8), torch.ones(8)
    bad: dict[str, list[tuple[Any, str]]] = {
        "hidden": [
            (torch.zeros(8), r"expected rank >= 2 and H >= 1, got shape \[8\]"),
            (torch.zeros(2, 0), r"expected rank >= 2 and H >= 1, got shape \[2, 0\]"),
            (torch.zeros(2, 8, dtype=torch.float64), r"expected dtype .*, got torch.float64"),
            (torch.zeros(2, 8, dtype=torch.int32), r"expected dtype .*, got torch.int32"),
        ],
        "weight": [
            (torch.ones(9), r"expected shape \[8\] \(H of hidden\), got \[9\]"),
            (torch.ones(1, 8), r"expected shape \[8\] \(H of hidden\), got \[1, 8\]"),
            (torch.ones(8, dtype=torch.int64), r"expected dtype .*, got torch.int64"),
            (torch.ones(8, device="meta"), r"expected device cpu \(hidden's\), got meta"),
        ],
        "residual": [
            (torch.zeros(2, 9), r"expected shape \[2, 8\] \(hidden's\), got \[2, 9\]"),
            (torch.zeros(8), r"expected shape \[2, 8\] \(hidden's\), got \[8\]"),
            (torch.zeros(2, 8).half(), r"expected dtype torch.float32 \(hidden's\), got torch.float16"),
            (torch.zeros(2, 8, device="meta"), r"expected device cpu \(hidden's\), got meta"),
        ],
        "eps": [(-1e-6, "got -1e-06"), (math.nan, "got nan"), (math.inf, "got inf")],
        "lower_bound": [(-1.0, "got -1.0"), (math.nan, "got nan"), (math.inf, "got inf")],
        "static_scale": [
            (0.0, "expected a finite number > 0, got 0.0"),
            (-1.0, "got -1.0"),
            (math.nan, "got nan"),
            (torch.ones(2), r"expected one torch.float32 element, got shape \[2\] of torch.float32"),
            (torch.ones(1).double(), r"got shape \[1\] of torch.float64"),
        ],
    }
    for value, message in bad[name]:
        arguments = {"hidden": hidden, "weight": weight} | {name: value}
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            reference.rms_norm_quant(**arguments)
    with pytest.raises(ValueError, match="target: expected one of trn2, trn3; got 'trn1'"):
        reference.rms_norm_quant(hidden, weight, target="trn1")
