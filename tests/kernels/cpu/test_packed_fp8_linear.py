"""kernels/cpu/packed_fp8_linear.cpp against float64, on every instruction-set level this machine has.

Dimensions:
    T: rows (tokens)
    H: hidden size
    N: output features
"""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.backends import cpu

OP = torch.ops.neuron_rmsq.packed_fp8_linear.cpu
ONE = 0x38
"""The code of 1.0."""

pytestmark = pytest.mark.usefixtures("isa")


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random codes of every finite value."""
    drawn = torch.randint(0, 254, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return drawn + (drawn >= fmt.NAN_CODE)


def scales(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape).uniform_(0.25, 1.25, generator=torch.Generator().manual_seed(seed))


def block_scales(n: int, h: int, seed: int = 0) -> torch.Tensor:
    return scales(-(-n // 128), -(-h // 128), seed=seed) ** 4


def case(t: int, n: int, h: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed rows ``[T, H + 4]``, weight ``[N, H]``, weight scale ``[N]``."""
    packed = fmt.pack(codes(t, h, seed=seed), scales(t, 1, seed=seed))
    return packed, codes(n, h, seed=seed + 1), scales(n, seed=seed + 1)


def prepack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.neuron_rmsq.prepack_fp8_weight.cpu(weight, False)


def multiply(
    packed, weight, weight_scale, bias=None, out_dtype=torch.float32, static_scale=None
) -> torch.Tensor:
    return OP(packed, prepack(weight), weight_scale, bias, static_scale, weight.shape[0], out_dtype)


def check_against_float64(out, packed, weight, weight_scale, bias=None) -> None:
    """``out`` is fp32. Each of H products and 4 further steps (and one a block) may round: by half an ulp of
    the sum so far."""
    codes, row_scale = fmt.unpack(packed)
    wanted, magnitude = oracle.packed_fp8_linear(codes, row_scale, weight, weight_scale, bias)
    bound = magnitude * (codes.shape[-1] + 4 + codes.shape[-1] // 64) * 2**-24
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
        (500, 40, 130),  # three groups of rows
        (3, 40, 8211),  # more than the longest stretch of H that is multiplied at a time
    ],
)
def test_float64(t: int, n: int, h: int) -> None:
    packed, weight, weight_scale = case(t, n, h)
    check_against_float64(multiply(packed, weight, weight_scale), packed, weight, weight_scale)


@pytest.mark.parametrize(
    ("t", "n", "h"),
    [(1, 1, 1), (1, 160, 256), (2, 129, 127), (13, 300, 129), (61, 40, 640), (3, 128, 8211)],
)
def test_block_scales(t: int, n: int, h: int) -> None:
    packed, weight, _ = case(t, n, h)
    weight_scale = block_scales(n, h)
    out = multiply(packed, weight, weight_scale)
    check_against_float64(out, packed, weight, weight_scale)
    if h <= 128:  # one block along H: the same sum, times its scale
        by_output = weight_scale[:, 0].repeat_interleave(128)[:n]
        torch.testing.assert_close(out, multiply(packed, weight, by_output), rtol=2**-22, atol=0)


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
    blocks=st.booleans(),
    static=st.booleans(),
)
def test_any_shape_and_stride(packed, n, bias_dtype, transposed, blocks, static) -> None:
    h = packed.shape[-1] - fmt.SCALE_BYTES
    weight = codes(h, n).t() if transposed else codes(n, h)
    weight_scale = block_scales(h, n).t() if blocks else scales(2 * n)[::2]
    bias = None if bias_dtype is None else torch.linspace(-900, 900, 3 * n, dtype=bias_dtype)[::3]
    static_scale = torch.tensor(0.3) if static else None
    rows, contiguous = packed, packed.clone(memory_format=torch.contiguous_format)
    if static:
        rows = packed[..., :h]
        contiguous = fmt.pack(rows, static_scale.expand(rows.shape[:-1]))
    out = multiply(rows, weight, weight_scale, bias, static_scale=static_scale)
    assert out.is_contiguous()
    check_against_float64(out, contiguous, weight, weight_scale, bias)
    assert torch.equal(out, multiply(contiguous, weight, weight_scale, bias)), (
        "what rows with that scale give"
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


def test_invalid_static_row_is_nan() -> None:
    packed, weight, weight_scale = case(3, 70, 200)
    rows, one = packed[:, :200].clone(), torch.tensor(0.5)
    clean = multiply(rows, weight, weight_scale, static_scale=one)
    rows[1] = fmt.NAN_CODE
    for scale in (weight_scale, block_scales(70, 200)):
        out = multiply(rows, weight, scale, static_scale=one)
        assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert torch.equal(multiply(rows, weight, weight_scale, static_scale=one)[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_stays_in_its_row(out_dtype: torch.dtype, blocks: bool) -> None:
    packed, weight, weight_scale = case(15, 70, 33)
    if blocks:
        weight_scale = block_scales(70, 33)
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


@pytest.mark.parametrize("blocks", [False, True])
def test_same_bits_in_any_batch_on_any_threads(blocks: bool) -> None:
    packed, weight, weight_scale = case(500, 130, 700)
    if blocks:
        weight_scale = block_scales(130, 700)
    prepacked = prepack(weight)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(prepack(weight), prepacked)
            for batch in (1, 7, 12, 16, 61, 250, 500):
                parts = [
                    OP(p, prepacked, weight_scale, None, None, 130, torch.float32)
                    for p in packed.split(batch)
                ]
                results.append(torch.cat(parts))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("blocks", [False, True])
def test_same_bits_at_every_level(isa: str, blocks: bool) -> None:
    packed, weight, weight_scale = case(20, 70, 3001)
    if blocks:
        weight_scale = block_scales(70, 3001)
    out = multiply(packed, weight, weight_scale)
    cpu.set_isa("portable")
    try:
        assert torch.equal(out, multiply(packed, weight, weight_scale))
    finally:
        cpu.set_isa(isa)


def test_prepacked_layout() -> None:
    weight = codes(45, 7)
    for given_weight in (weight, weight.t().contiguous().t(), weight.repeat(2, 3)[::2][:, ::3][:45]):
        prepacked = prepack(given_weight)
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
        ("weight_scale", torch.ones(39), r"weight_scale: expected shape \[40\], \[1\] or .* \[1, 1\]"),
        ("weight_scale", torch.ones(40, 1), r"weight_scale: expected .*, got shape \[40, 1\]"),
        ("weight_scale", torch.ones(40, dtype=torch.bfloat16), "weight_scale: expected .* torch.float32"),
        ("weight_scale", torch.ones(1, 2), r"weight_scale: expected .*, got shape \[1, 2\]"),
        ("weight_scale", torch.ones(()), r"weight_scale: expected .*, got shape \[\]"),
        ("static_scale", torch.ones(2), r"static_scale: expected one torch.float32 element, got shape \[2\]"),
        ("static_scale", torch.ones(1).double(), "static_scale: expected one torch.float32 element"),
        ("static_scale", torch.zeros(1), "static_scale: expected a finite number > 0, got 0"),
        ("static_scale", torch.tensor(float("nan")), "static_scale: expected a finite number > 0, got nan"),
        ("static_scale", torch.ones(1), r"prepack_fp8_weight returns for \[40, 14\]"),
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
        "static_scale": None,
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
        prepack(torch.zeros(shape, dtype=torch.uint8))


def test_bad_weight_dtype() -> None:
    with pytest.raises(ValueError, match="weight: expected dtype"):
        prepack(torch.zeros(3, 4))


def test_opcheck() -> None:
    packed, weight, weight_scale = case(3, 40, 9)
    torch.library.opcheck(torch.ops.neuron_rmsq.prepack_fp8_weight.cpu, (weight, False))
    for rows, bias, scale, static_scale in (
        (packed, None, weight_scale, None),
        (packed.reshape(1, 3, 13), scales(40).bfloat16(), weight_scale, None),
        (packed[:0], None, weight_scale, None),
        (packed, None, block_scales(40, 9), None),
        (packed[:, :9].contiguous(), None, weight_scale, torch.ones(1)),
    ):
        arguments = (rows, prepack(weight), scale, bias, static_scale, 40, torch.bfloat16)
        torch.library.opcheck(OP, arguments)
