"""Native rms_norm_quant on every instruction-set level: the contract, its edges, and what is not accepted."""

from __future__ import annotations

import bisect
import itertools
import math
from fractions import Fraction

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_neuron_rmsq import ops, packed, reference
from vllm_neuron_rmsq.backends import cpu
from vllm_neuron_rmsq.target import TARGETS

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OP = torch.ops.neuron_rmsq.rms_norm_quant
ADD_OP = torch.ops.neuron_rmsq.add_rms_norm_quant


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(hidden, weight=None, **arguments):
    return ops.rms_norm_quant(hidden, weight, backend="cpu", **arguments)


@st.composite
def calls(draw):
    """Arguments of a call: any dtypes, rank, odd widths, rows at any stride, values of any size."""
    dtype = draw(st.sampled_from(DTYPES))
    lead = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    width = draw(st.integers(1, 300) | st.sampled_from([512, 1000, 1057]))
    seed = draw(st.integers(0, 2**20))

    def rows(seed):
        gap, offset = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        layout = draw(st.sampled_from(["gaps", "transposed", "last"]))
        wide = randn(*lead, offset + width + gap, dtype=dtype, seed=seed) * draw(
            st.sampled_from([1, 30, 1e-3])
        )
        view = wide[..., offset : offset + width]
        if layout == "transposed":
            view = view.transpose(0, len(lead) - 1).contiguous().transpose(0, len(lead) - 1)
        if layout == "last":
            view = view.transpose(0, -1).contiguous().transpose(0, -1)
        return view

    weight_dtype = draw(st.sampled_from((None, *DTYPES)))
    arguments = {
        "weight": None if weight_dtype is None else 1 + randn(width, dtype=weight_dtype, seed=seed + 1) / 4,
        "residual": rows(seed + 2) if draw(st.booleans()) else None,
        "eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "lower_bound": draw(st.sampled_from([0.0, 0.0, 0.5, 1.5])),
        "static_scale": draw(st.sampled_from([None, None, 0.004, 0.03])),
        "target": draw(st.sampled_from(["trn2", "trn3"])),
    }
    return rows(seed), arguments


@settings(max_examples=60, deadline=None)
@given(calls())
def test_contract(call):
    hidden, arguments = call
    expected = oracle.rms_norm_quant(hidden, **arguments)
    got = run(hidden, **arguments)
    if arguments["residual"] is not None:
        got, residual_out = got
        assert residual_out.shape == hidden.shape
        assert torch.equal(residual_out.reshape(expected.residual_out.shape), expected.residual_out)
    if arguments["static_scale"] is None:
        assert got.shape == (*hidden.shape[:-1], hidden.shape[-1] + 4)
        oracle.assert_packed(got, expected)
    else:
        assert got.shape == hidden.shape
        oracle.assert_codes(got.reshape(expected.scaled.shape).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4096, 8191])
def test_ties_hardly_ever_go_the_other_way(dtype, width):
    hidden, residual, weight = (
        randn(40, width, dtype=dtype),
        randn(40, width, dtype=dtype, seed=1),
        randn(width),
    )
    expected = oracle.rms_norm_quant(hidden, weight, residual=residual)
    got, _ = run(hidden, weight, residual=residual)
    assert oracle.assert_packed(got, expected) <= hidden.numel() / 10_000


def test_exact_ties_go_to_even():
    """Inputs of few bits often fall exactly between two codes, as many do here; none goes astray."""
    hidden = torch.arange(-240, 241, dtype=torch.float32).mul(7 / 8).to(torch.bfloat16).expand(2, -1)
    codes, _ = packed.unpack(run(hidden))
    exact = torch.from_numpy(oracle.to_fp8((hidden.double() / hidden.double().amax() * 240).numpy()))
    assert torch.equal(codes, exact)


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_conversion_is_torchs(target):
    """Every code, every boundary between two, and one fp32 step to each side of it."""
    limit = TARGETS[target].fp8_max
    centers = torch.from_numpy(oracle.VALUES).float()
    bounds = torch.from_numpy(oracle.BOUNDARIES).float()
    around = [bounds, bounds.nextafter(torch.tensor(0.0)), bounds.nextafter(torch.tensor(math.inf))]
    values = torch.cat([centers, *around])
    values = torch.cat([values, -values]).clamp(-limit, limit)[None]
    codes = run(values, static_scale=1.0, target=target)
    assert torch.equal(codes, values.to(torch.float8_e4m3fn).view(torch.uint8))
    values[0, 0] = limit  # the scale of the row becomes 1
    got, scale = packed.unpack(run(values, target=target))
    assert scale.item() == 1.0
    assert torch.equal(got, values.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "residual", "weight"])
def test_nonfinite(dtype, bad, where):
    hidden, residual, weight = (randn(n, 77, dtype=dtype, seed=n) for n in (3, 3, 1))
    weight = weight[0]
    {"hidden": hidden[1], "residual": residual[1], "weight": weight}[where][70] = bad
    got, residual_out = run(hidden, weight, residual=residual)
    want, want_residual_out = reference.rms_norm_quant(hidden, weight, residual=residual)
    torch.testing.assert_close(residual_out, want_residual_out, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], want[1])
    assert got[1, :77].eq(0).all() and packed.unpack(got)[1][1].isnan()
    codes, _ = run(hidden, weight, residual=residual, static_scale=0.1)
    assert codes[1].eq(packed.NAN_CODE).all()
    if where != "weight":
        hidden[1], residual[1] = 0, 0
        clean, clean_residual_out = run(hidden, weight, residual=residual)
        assert torch.equal(clean[[0, 2]], got[[0, 2]])
        assert torch.equal(clean_residual_out[[0, 2]], residual_out[[0, 2]])


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-38, 1e-30, 1e-12, 1e-5, 3e12, 1e18, 1e19, 1e20, 3e38], ids=lambda v: f"{v:g}"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ends_of_the_range(dtype, value, with_weight):
    """Zero rows, the floor of the scale, overflowing squares: what the formula in fp32 gives."""
    hidden = randn(1, 96, dtype=dtype).clamp(-1, 1) * value
    weight = randn(96, dtype=dtype, seed=1) if with_weight else None
    got, want = run(hidden, weight), reference.rms_norm_quant(hidden, weight)
    (codes, scale), (want_codes, want_scale) = packed.unpack(got), packed.unpack(want)
    torch.testing.assert_close(scale, want_scale, rtol=2**-20, atol=0, equal_nan=True)
    assert (codes.int() - want_codes.int()).abs().max() <= 1
    if value == 0:
        assert scale.item() == torch.tensor(packed.SCALE_FLOOR).item()
        assert torch.equal(codes & 0x7F, torch.zeros_like(codes))


def test_every_level_computes_the_same_bits(isa):
    combinations = itertools.product(DTYPES, (None, *DTYPES), (33, 1300), (0.0, 1.0))
    for dtype, weight_dtype, width, lower_bound in combinations:
        hidden, residual = randn(3, width, dtype=dtype), randn(3, width, dtype=dtype, seed=1)
        weight = None if weight_dtype is None else randn(width, dtype=weight_dtype, seed=2)
        results = []
        for level in cpu.isas():
            cpu.set_isa(level)
            results.append(run(hidden, weight, residual=residual, lower_bound=lower_bound))
        cpu.set_isa(isa)
        for got, residual_out in results[1:]:
            assert torch.equal(got, results[0][0]) and torch.equal(residual_out, results[0][1])


def test_threads_and_batches_change_nothing():
    hidden, residual, weight = randn(64, 2048), randn(64, 2048, seed=1), randn(2048, seed=2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(hidden, weight, residual=residual)[0])
    finally:
        torch.set_num_threads(threads)
    for got in results[1:]:
        assert torch.equal(got, results[0])
    for i in (0, 31, 63):
        alone, _ = run(hidden[i : i + 1], weight, residual=residual[i : i + 1])
        assert torch.equal(alone[0], results[0][i])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(shape):
    hidden = torch.empty(shape, dtype=torch.bfloat16)
    got, residual_out = run(hidden, randn(16), residual=hidden)
    assert got.shape == (*shape[:-1], 20) and residual_out.shape == shape


def test_a_tie_between_two_codes_goes_to_the_even_one():
    """Against exact arithmetic, on whole numbers, which fall on ties often."""
    values = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
    grid = [Fraction(value) for value in values if value <= 240]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(grid)]
    generator = torch.Generator().manual_seed(0)
    largest = torch.arange(1, 256)[:, None]  # each with a quotient R / peak of its own
    hidden = (largest * (2 * torch.rand(255, 256, generator=generator) - 1)).round().bfloat16()
    codes, _ = packed.unpack(run(hidden))
    ties = 0
    for row, got in zip(hidden.tolist(), codes.tolist(), strict=True):
        peak = max(map(abs, row))
        for number, code in zip(row, got, strict=True):
            quotient = Fraction(abs(number)) * 240 / Fraction(peak)
            expected = bisect.bisect_left(middles, quotient)  # how many middles lie below it
            if expected < len(middles) and middles[expected] == quotient:
                ties += 1
                expected += expected % 2
            assert code & 0x7F == expected, (number, peak)
    assert ties > 200


def test_large_outputs_are_their_own_and_their_memory_is_used_again():
    hidden = randn(1025, 8192, dtype=torch.float32)  # 33.6 MB; from 32 MiB on memory is kept
    residual = hidden.flip(0).contiguous()
    sums = hidden + residual
    first, first_out = run(hidden, residual=residual)
    second, second_out = run(hidden, residual=residual)
    third, third_out = run(-hidden, residual=residual)
    assert first_out.data_ptr() != second_out.data_ptr() != third_out.data_ptr()
    assert torch.equal(first_out, sums) and torch.equal(second_out, sums)
    assert torch.equal(third_out, residual - hidden)
    assert torch.equal(first, second) and not torch.equal(first, third)
    freed, row = second_out.data_ptr(), second_out[7]
    del second_out
    fourth, fourth_out = run(hidden, residual=residual)
    assert fourth_out.data_ptr() != freed  # a view still holds it
    del row
    fifth, fifth_out = run(-hidden, residual=residual)
    assert fifth_out.data_ptr() == freed
    assert torch.equal(fourth_out, sums) and torch.equal(fifth_out, third_out)
    assert torch.equal(fourth, first) and torch.equal(fifth, third)


def test_rows_that_overlap_and_memory_that_is_not_aligned():
    row = randn(1, 100)
    assert torch.equal(run(row.expand(5, 100)), run(row.repeat(5, 1)))
    odd = torch.frombuffer(
        bytearray(b"\0" + row.view(torch.uint8).numpy().tobytes()), dtype=torch.bfloat16, offset=1
    )
    assert odd.data_ptr() % 2 == 1
    assert torch.equal(run(odd[None]), run(row))


def test_opcheck():
    hidden, weight = randn(2, 3, 40), randn(40)
    torch.library.opcheck(OP.cpu, (hidden, weight, 1e-6, 0.0, None, 240.0))
    torch.library.opcheck(OP.cpu, (hidden[..., ::2], None, 1e-6, 0.5, torch.tensor([0.5]), 448.0))
    torch.library.opcheck(
        ADD_OP.cpu,
        (hidden, weight, 1e-6, hidden.transpose(0, 1).contiguous().transpose(0, 1), 0.0, None, 240.0),
    )


BAD = {
    "rank": ({"hidden": randn(40)}, r"hidden: expected rank >= 2 and H >= 1, got shape \[40\]"),
    "no columns": ({"hidden": randn(2, 0)}, r"hidden: expected rank >= 2 and H >= 1, got shape \[2, 0\]"),
    "dtype": ({"hidden": randn(2, 40).double()}, "hidden: expected dtype torch.bfloat16"),
    "integers": ({"hidden": randn(2, 40).int()}, "hidden: expected dtype torch.bfloat16"),
    "residual shape": ({"residual": randn(2, 41)}, r"residual: expected shape \[2, 40\].*got \[2, 41\]"),
    "residual rank": ({"residual": randn(1, 2, 40)}, r"residual: expected shape \[2, 40\]"),
    "residual dtype": ({"residual": randn(2, 40).float()}, "residual: expected hidden's dtype"),
    "weight shape": ({"weight": randn(39)}, r"weight: expected shape \[40\] \(H of hidden\), got \[39\]"),
    "weight rank": ({"weight": randn(1, 40)}, r"weight: expected shape \[40\]"),
    "weight dtype": ({"weight": randn(40).double()}, "weight: expected dtype torch.bfloat16"),
    "scales": ({"static_scale": torch.ones(2)}, "static_scale: expected one torch.float32 element"),
    "scale dtype": ({"static_scale": torch.ones(1).double()}, "static_scale: expected one torch.float32"),
    "zero scale": ({"static_scale": torch.zeros(1)}, "static_scale: expected a finite number > 0, got 0"),
    "NaN scale": ({"static_scale": torch.full((1,), math.nan)}, "static_scale: expected a finite number > 0"),
    "eps": ({"eps": -1e-6}, "eps: expected a finite number >= 0, got -1e-06"),
    "lower bound": ({"lower_bound": math.nan}, "lower_bound: expected a finite number >= 0, got nan"),
    "limit": ({"fp8_max": 1000.0}, "fp8_max: expected 240 or 448, got 1000"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_op_itself_refuses_bad_arguments(case):
    """Layers call the overload without passing through ops.py's checks."""
    changes, message = BAD[case]
    arguments = {
        "hidden": randn(2, 40),
        "weight": randn(40),
        "eps": 1e-6,
        "residual": randn(2, 40, seed=1),
        "lower_bound": 0.0,
        "static_scale": None,
        "fp8_max": 240.0,
    } | changes
    with pytest.raises(ValueError, match=message):
        ADD_OP.cpu(*arguments.values())
    if "residual" not in changes:
        del arguments["residual"]
        with pytest.raises(ValueError, match=message):
            OP.cpu(*arguments.values())


def test_sparse_tensors_never_reach_the_kernel():
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        OP.cpu(torch.eye(40).to_sparse(), None, 1e-6, 0.0, None, 240.0)
