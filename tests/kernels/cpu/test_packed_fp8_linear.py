"""kernels/cpu/packed_fp8_linear.cpp against float64, on every instruction-set level this machine has.

Dimensions:
    T: rows (tokens)
    H: hidden size
    N: output features
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.backends import cpu

OP = torch.ops.neuron_rmsq.packed_fp8_linear.cpu
PREPACK = torch.ops.neuron_rmsq.prepack_fp8_weight.cpu
ONE = 0x38
"""The code of 1.0."""

pytestmark = pytest.mark.usefixtures("isa")


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random codes of every finite value."""
    drawn = torch.randint(0, 254, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return drawn + (drawn >= fmt.NAN_CODE)


def scales(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape).uniform_(0.25, 1.25, generator=torch.Generator().manual_seed(seed))


def case(t: int, n: int, h: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed rows ``[T, H + 4]``, weight ``[N, H]``, weight scale ``[N]``."""
    packed = fmt.pack(codes(t, h, seed=seed), scales(t, 1, seed=seed))
    return packed, codes(n, h, seed=seed + 1), scales(n, seed=seed + 1)


def multiply(packed, weight, weight_scale, bias=None, out_dtype=torch.float32) -> torch.Tensor:
    return OP(packed, PREPACK(weight), weight_scale, bias, weight.shape[0], out_dtype)


def check_against_float64(out, packed, weight, weight_scale, bias=None) -> None:
    """``out`` is fp32. Each of H products and 4 further steps may round: by half an ulp of the sum so far."""
    x = fmt.unpack(packed)[0].view(torch.float8_e4m3fn).double()
    w = weight.view(torch.float8_e4m3fn).double()
    scale = fmt.unpack(packed)[1].double() * weight_scale.double()
    shift = torch.zeros(()) if bias is None else bias.double()
    wanted = x @ w.t() * scale + shift
    bound = (x.abs() @ w.abs().t() * scale + shift.abs()) * (x.shape[-1] + 4) * 2**-24
    assert out.shape == wanted.shape
    assert ((out.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize(
    ("t", "n", "h"),
    [
        (1, 1, 1),
        (1, 32, 64),
        (2, 31, 63),
        (5, 33, 65),
        (12, 64, 128),
        (13, 96, 129),
        (61, 40, 127),
        (150, 70, 1000),
        (3, 40, 8211),  # more than the longest stretch of H that is multiplied at a time
    ],
)
def test_float64(t: int, n: int, h: int) -> None:
    packed, weight, weight_scale = case(t, n, h)
    check_against_float64(multiply(packed, weight, weight_scale), packed, weight, weight_scale)


def test_more_rows_than_fit_the_scratch() -> None:
    packed, weight, weight_scale = case(130, 5, 40000)
    check_against_float64(multiply(packed, weight, weight_scale), packed, weight, weight_scale)


@st.composite
def packed_views(draw) -> torch.Tensor:
    """Packed rows at any offset, with any strides."""
    lead = draw(st.lists(st.integers(0, 9), max_size=3))
    h = draw(st.integers(1, 200))
    step = draw(st.sampled_from([1, 1, 1, 2]))
    gap, offset = draw(st.integers(0, 70)), draw(st.integers(0, 7))
    order = draw(st.permutations(range(len(lead))))
    strides, stride = [0] * len(lead), (h + 4) * step + gap
    for d in order:
        strides[d] = stride
        stride *= max(lead[d], 1) + draw(st.integers(0, 1))
    storage = torch.zeros(offset + stride + (h + 4) * step, dtype=torch.uint8)
    view = storage.as_strided((*lead, h + 4), (*strides, step), offset)
    view.copy_(fmt.pack(codes(*lead, h), scales(*lead, 1)))
    if lead and all(lead) and draw(st.booleans()):
        repeated = draw(st.integers(0, len(lead) - 1))
        view = view.narrow(repeated, 0, 1).expand_as(view)
    return view


@settings(max_examples=60, deadline=None)
@given(
    packed=packed_views(),
    n=st.integers(1, 100),
    bias_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
)
def test_any_shape_and_stride(packed, n, bias_dtype, transposed) -> None:
    h = packed.shape[-1] - fmt.SCALE_BYTES
    weight = codes(h, n).t() if transposed else codes(n, h)
    weight_scale = scales(2 * n)[::2]
    bias = None if bias_dtype is None else torch.linspace(-900, 900, 3 * n, dtype=bias_dtype)[::3]
    out = multiply(packed, weight, weight_scale, bias)
    assert out.is_contiguous()
    check_against_float64(out, packed, weight, weight_scale, bias)
    assert torch.equal(
        out, multiply(packed.clone(memory_format=torch.contiguous_format), weight, weight_scale, bias)
    )


def test_every_product_of_two_bytes() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    out = multiply(fmt.pack(every, torch.ones(256, 1)), every, torch.ones(1))
    value = every.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(out, value * value.t(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shift", range(0, 256, 37))
def test_every_byte_in_every_place(shift: int) -> None:
    finite = torch.tensor([c for c in range(256) if c % 128 != fmt.NAN_CODE], dtype=torch.uint8)
    table = torch.stack([finite.roll(shift + i) for i in range(40)])
    unit = torch.eye(254, dtype=torch.uint8) * ONE
    value = table.view(torch.float8_e4m3fn).float()
    assert torch.equal(multiply(fmt.pack(unit, torch.ones(254, 1)), table, torch.ones(1)), value.t())
    assert torch.equal(multiply(fmt.pack(table, torch.ones(40, 1)), unit, torch.ones(1)), value)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_stays_in_its_row(out_dtype: torch.dtype) -> None:
    packed, weight, weight_scale = case(15, 70, 33)
    clean = multiply(packed, weight, weight_scale, out_dtype=out_dtype)
    packed[3] = fmt.pack(torch.zeros(33, dtype=torch.uint8), torch.tensor(float("nan")))
    packed[7, 32] = fmt.NAN_CODE
    packed[14, 0] = fmt.NAN_CODE | 0x80
    out = multiply(packed, weight, weight_scale, out_dtype=out_dtype)
    bad = torch.tensor([3, 7, 14])
    assert out[bad].isnan().all()
    good = torch.ones(15, dtype=torch.bool).index_fill(0, bad, False)
    assert torch.equal(out[good], clean[good])


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_is_added_in_fp32(bias_dtype: torch.dtype) -> None:
    packed, weight, weight_scale = case(5, 45, 77)
    # fp16's subnormals and extremes among them
    bias = torch.tensor([0.0, -0.0, 2**-24, -3 * 2**-24, 2**-15, 65504, float("inf")] + [0.1] * 38).to(
        bias_dtype
    )
    wanted = multiply(packed, weight, weight_scale) + bias.float()
    assert torch.equal(multiply(packed, weight, weight_scale, bias), wanted)
    tiny = fmt.pack(torch.zeros(5, 77, dtype=torch.uint8), scales(5, 1))
    assert torch.equal(multiply(tiny, weight, weight_scale, bias), bias.float().expand(5, 45))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(out_dtype: torch.dtype) -> None:
    packed, weight, _ = case(40, 200, 5)
    # from below either type's smallest subnormal to beyond its largest number
    weight_scale = torch.logspace(-45, 38, 200)
    exact = multiply(packed, weight, weight_scale)
    assert torch.equal(multiply(packed, weight, weight_scale, out_dtype=out_dtype), exact.to(out_dtype))


def test_one_scale() -> None:
    packed, weight, weight_scale = case(4, 37, 50)
    one = weight_scale[:1]
    assert torch.equal(multiply(packed, weight, one), multiply(packed, weight, one.repeat(37)))


def test_same_bits_in_any_batch_on_any_threads() -> None:
    packed, weight, weight_scale = case(140, 130, 700)
    prepacked = PREPACK(weight)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(PREPACK(weight), prepacked)
            for batch in (1, 7, 12, 16, 61, 140):
                parts = [
                    OP(p, prepacked, weight_scale, None, 130, torch.float32) for p in packed.split(batch)
                ]
                results.append(torch.cat(parts))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_same_bits_at_every_level(isa: str) -> None:
    packed, weight, weight_scale = case(20, 70, 3001)
    out = multiply(packed, weight, weight_scale)
    cpu.set_isa("portable")
    try:
        assert torch.equal(out, multiply(packed, weight, weight_scale))
    finally:
        cpu.set_isa(isa)


def test_prepacked_layout() -> None:
    weight = codes(45, 7)
    for given_weight in (weight, weight.t().contiguous().t(), weight.repeat(2, 3)[::2][:, ::3][:45]):
        prepacked = PREPACK(given_weight)
        assert prepacked.shape == (2, 4, 64)
        padded = torch.zeros(64, 8, dtype=torch.uint8)
        padded[:45, :7] = given_weight
        assert torch.equal(prepacked, padded.reshape(2, 32, 4, 2).transpose(1, 2).reshape(2, 4, 64))


def test_no_rows() -> None:
    _, weight, weight_scale = case(1, 40, 6)
    out = multiply(torch.empty(3, 0, 10, dtype=torch.uint8), weight, weight_scale, out_dtype=torch.bfloat16)
    assert out.shape == (3, 0, 40)
    assert out.dtype == torch.bfloat16


def test_through_the_public_functions() -> None:
    packed, weight, weight_scale = case(6, 50, 30)
    prepacked = ops.prepack_fp8_weight(weight.view(torch.float8_e4m3fn), weight_scale, backend="cpu")
    out = ops.packed_fp8_linear(packed.reshape(2, 3, 34), prepacked, weight_scale, out_dtype=torch.float32)
    assert torch.equal(out, multiply(packed, weight, weight_scale).reshape(2, 3, 50))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("packed", torch.zeros(2, 14), "packed: expected dtype"),
        ("packed", torch.zeros(2, 4, dtype=torch.uint8), r"packed: expected shape \[..., H \+ 4\]"),
        ("packed", torch.zeros(2, 16, dtype=torch.uint8), r"prepack_fp8_weight returns for \[40, 12\]"),
        ("weight", torch.zeros(40, 10, dtype=torch.uint8), r"weight: expected .*, got shape \[40, 10\]"),
        (
            "weight",
            torch.zeros(64, 5, 2, dtype=torch.uint8).transpose(0, 2),
            "weight: expected .* contiguous",
        ),
        ("weight", torch.zeros(2, 5, 64), "weight: expected .* uint8"),
        ("weight_scale", torch.ones(39), r"weight_scale: expected shape \[40\] or \[1\]"),
        ("weight_scale", torch.ones(40, 1), r"weight_scale: expected .*, got shape \[40, 1\]"),
        ("weight_scale", torch.ones(40, dtype=torch.bfloat16), "weight_scale: expected .* torch.float32"),
        ("bias", torch.ones(1), r"bias: expected shape \[40\]"),
        ("bias", torch.ones(40, dtype=torch.float64), "bias: expected .* of bf16, fp16 or fp32"),
        ("out_features", 0, "out_features: expected at least 1"),
        ("out_features", 65, r"prepack_fp8_weight returns for \[65, 10\]"),
        ("out_dtype", torch.float64, "out_dtype: expected"),
    ],
)
def test_bad_arguments(argument: str, value: object, message: str) -> None:
    arguments: dict[str, object] = {
        "packed": torch.zeros(2, 14, dtype=torch.uint8),
        "weight": torch.zeros(2, 5, 64, dtype=torch.uint8),
        "weight_scale": torch.ones(40),
        "bias": None,
        "out_features": 40,
        "out_dtype": torch.bfloat16,
    }
    OP(*arguments.values())
    arguments[argument] = value
    with pytest.raises(ValueError, match=message):
        OP(*arguments.values())


@pytest.mark.parametrize("shape", [(3, 4, 5), (3,), (0, 4), (4, 0)])
def test_bad_weight_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, H\]"):
        PREPACK(torch.zeros(shape, dtype=torch.uint8))


def test_bad_weight_dtype() -> None:
    with pytest.raises(ValueError, match="weight: expected dtype"):
        PREPACK(torch.zeros(3, 4))


def test_opcheck() -> None:
    packed, weight, weight_scale = case(3, 40, 9)
    torch.library.opcheck(PREPACK, (weight,))
    for rows, bias in ((packed, None), (packed.reshape(1, 3, 13), scales(40).bfloat16()), (packed[:0], None)):
        torch.library.opcheck(OP, (rows, PREPACK(weight), weight_scale, bias, 40, torch.bfloat16))
