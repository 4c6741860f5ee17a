"""Native silu_mul_quant on every instruction-set level: the contract, its edges, and what is not accepted."""

from __future__ import annotations

import itertools
import math

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
OP = torch.ops.neuron_rmsq.silu_mul_quant


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(gate_up, **arguments):
    return ops.silu_mul_quant(gate_up, backend="cpu", **arguments)


@st.composite
def calls(draw):
    """Arguments of a call: any dtype, rank, odd I, rows at any stride, gates and ups of any size."""
    dtype = draw(st.sampled_from(DTYPES))
    lead = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    width = draw(st.integers(1, 300) | st.sampled_from([512, 1000, 1057]))
    gap, offset = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    layout = draw(st.sampled_from(["gaps", "transposed", "last"]))
    wide = randn(*lead, offset + 2 * width + gap, dtype=torch.float32, seed=draw(st.integers(0, 2**20)))
    wide[..., : offset + width] *= draw(st.sampled_from([1.0, 3.0, 40.0, 1e-3]))
    wide[..., offset + width :] *= draw(st.sampled_from([1.0, 30.0, 1e-3]))
    view = wide.to(dtype)[..., offset : offset + 2 * width]
    if layout == "transposed":
        view = view.transpose(0, len(lead) - 1).contiguous().transpose(0, len(lead) - 1)
    if layout == "last":
        view = view.transpose(0, -1).contiguous().transpose(0, -1)
    arguments = {
        "static_scale": draw(st.sampled_from([None, None, 0.004, 0.03])),
        "target": draw(st.sampled_from(sorted(TARGETS))),
    }
    return view, arguments


@settings(max_examples=60, deadline=None)
@given(calls())
def test_contract(call):
    gate_up, arguments = call
    width = gate_up.shape[-1] // 2
    expected = oracle.silu_mul_quant(gate_up, **arguments)
    got = run(gate_up, **arguments)
    if arguments["static_scale"] is None:
        assert got.shape == (*gate_up.shape[:-1], width + 4)
        oracle.assert_packed(got, expected)
    else:
        assert got.shape == (*gate_up.shape[:-1], width)
        oracle.assert_codes(got.reshape(-1, width).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4096, 8191])
def test_ties_hardly_ever_go_the_other_way(dtype, width):
    gate_up = randn(40, 2 * width, dtype=dtype) * 3
    assert oracle.assert_packed(run(gate_up), oracle.silu_mul_quant(gate_up)) <= 40 * width / 10_000


def test_every_finite_bf16_gate():
    """Alone in its row, so that the row's scale shows SiLU to the contract's 2^-20, whatever it is."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()]
    silu = gate.double() / (1 + torch.exp(-gate.double()))
    for power in (0, 30, 90, 120):
        up = torch.full_like(gate, 2.0**power)
        y = (silu * 2.0**power).abs()
        # no overflow, and a scale that the floor does not decide
        some = (gate > -88.7) & (y < 3e38) & (y > 240e-6)
        assert some.sum() > 10_000
        _, scale = packed.unpack(run(torch.stack([gate, up], dim=1)[some]))
        assert ((scale.flatten().double() * 240 / y[some] - 1).abs() <= oracle.SCALE_RTOL).all()


def test_where_exp_overflows_the_gate_is_closed():
    gate_up = torch.tensor([[-88.8, -100.0, -1e5, -3e38, -1e30, 1e38, 1e36, 3e38, 1.0, -3e38]])
    codes, scale = packed.unpack(run(gate_up))
    assert (codes & 0x7F).eq(0).all()
    assert scale.item() == torch.tensor(packed.SCALE_FLOOR).item()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_conversion_is_torchs(target):
    """Every code, every boundary between two, and one fp32 step to each side of it: a gate of 100 is open."""
    limit = TARGETS[target].fp8_max
    centers = torch.from_numpy(oracle.VALUES).float()
    bounds = torch.from_numpy(oracle.BOUNDARIES).float()
    around = [bounds, bounds.nextafter(torch.tensor(0.0)), bounds.nextafter(torch.tensor(math.inf))]
    values = torch.cat([centers, *around])
    values = torch.cat([values, -values]).clamp(-limit, limit)[None]
    gate = torch.full_like(values, 128)
    want = values.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(run(torch.cat([gate, values], dim=1), static_scale=128.0, target=target), want)
    values[0, 0] = limit
    want = values.to(torch.float8_e4m3fn).view(torch.uint8)
    got, scale = packed.unpack(run(torch.cat([gate, values], dim=1), target=target))
    assert scale.item() == 128.0
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 70, 77, 153], ids=["gate", "last of gate", "up", "last of up"])
def test_an_invalid_row_is_marked_and_keeps_to_itself(dtype, bad, column):
    gate_up = randn(3, 154, dtype=dtype)
    clean = run(gate_up)
    gate_up[1, column] = bad
    got = run(gate_up)
    assert torch.equal(got, reference.silu_mul_quant(gate_up).where(torch.tensor([[0], [1], [0]]) > 0, clean))
    assert got[1, :77].eq(0).all() and packed.unpack(got)[1][1].isnan()
    codes = run(gate_up, static_scale=0.1)
    assert codes[1].eq(packed.NAN_CODE).all()
    assert not (codes[[0, 2]] & 0x7F).eq(packed.NAN_CODE).any()


def test_a_product_that_leaves_fp32_makes_its_row_invalid():
    gate_up = torch.tensor([[1e30, 1.0, 1e30, 1.0], [1.0, 1.0, 1.0, 1.0]])
    codes, scale = packed.unpack(run(gate_up))
    assert scale.isnan().flatten().tolist() == [True, False]
    assert codes[0].eq(0).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, 1e-12, 1e-5, 3e12, 1e18], ids=lambda v: f"{v:g}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ends_of_the_range(dtype, value):
    """Zero rows, the floor of the scale, large products: what the formula in fp32 gives."""
    gate_up = randn(1, 192, dtype=dtype).clamp(-1, 1) * value
    (codes, scale), (want_codes, want_scale) = map(
        packed.unpack, (run(gate_up), reference.silu_mul_quant(gate_up))
    )
    torch.testing.assert_close(scale, want_scale, rtol=2**-20, atol=0)
    assert (codes.int() - want_codes.int()).abs().max() <= 1
    if value == 0:
        assert scale.item() == torch.tensor(packed.SCALE_FLOOR).item()
        assert torch.equal(codes & 0x7F, torch.zeros_like(codes))


def test_every_level_computes_the_same_bits(isa):
    combinations = itertools.product(DTYPES, (33, 1300), (None, 0.01), (1, 40))
    for dtype, width, static_scale, size in combinations:
        gate_up = randn(3, 2 * width, dtype=dtype) * size
        gate_up[2] *= 1e-4
        results = []
        for level in cpu.isas():
            cpu.set_isa(level)
            results.append(run(gate_up, static_scale=static_scale))
        cpu.set_isa(isa)
        assert all(torch.equal(got, results[0]) for got in results)


def test_threads_and_batches_change_nothing():
    gate_up = randn(64, 4096)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(gate_up))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(got, results[0]) for got in results)
    for i in (0, 31, 63):
        assert torch.equal(run(gate_up[i : i + 1])[0], results[0][i])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(shape):
    assert run(torch.empty(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 12)


def test_large_outputs_are_their_own_and_their_memory_is_used_again():
    gate_up = randn(4100, 16384)  # 33.6 MB of packed rows; from 32 MiB on memory is kept
    first, second, third = run(gate_up), run(gate_up), run(-gate_up)
    assert len({first.data_ptr(), second.data_ptr(), third.data_ptr()}) == 3
    assert torch.equal(first, second) and not torch.equal(first, third)
    freed = second.data_ptr()
    del second
    fourth = run(-gate_up)
    assert fourth.data_ptr() == freed
    assert torch.equal(fourth, third)


def test_rows_that_overlap_and_memory_that_is_not_aligned():
    row = randn(1, 100)
    assert torch.equal(run(row.expand(5, 100)), run(row.repeat(5, 1)))
    odd = torch.frombuffer(
        bytearray(b"\0" + row.view(torch.uint8).numpy().tobytes()), dtype=torch.bfloat16, offset=1
    )
    assert odd.data_ptr() % 2 == 1
    assert torch.equal(run(odd[None]), run(row))


def test_opcheck():
    gate_up = randn(2, 3, 40)
    torch.library.opcheck(OP.cpu, (gate_up, None, 240.0))
    torch.library.opcheck(OP.cpu, (gate_up[..., ::2], torch.tensor([0.5]), 448.0))
    torch.library.opcheck(OP.cpu, (gate_up.transpose(0, 1), None, 240.0))


BAD = {
    "rank": ({"gate_up": randn(40)}, r"gate_up: expected rank >= 2 and an even last .* shape \[40\]"),
    "no columns": ({"gate_up": randn(2, 0)}, r"gate_up: expected rank >= 2 and an even .* shape \[2, 0\]"),
    "odd": ({"gate_up": randn(2, 41)}, r"gate_up: expected rank >= 2 and an even .* shape \[2, 41\]"),
    "dtype": ({"gate_up": randn(2, 40).double()}, "gate_up: expected dtype torch.bfloat16"),
    "integers": ({"gate_up": randn(2, 40).int()}, "gate_up: expected dtype torch.bfloat16"),
    "scales": ({"static_scale": torch.ones(2)}, "static_scale: expected one torch.float32 element"),
    "scale dtype": ({"static_scale": torch.ones(1).double()}, "static_scale: expected one torch.float32"),
    "zero scale": ({"static_scale": torch.zeros(1)}, "static_scale: expected a finite number > 0, got 0"),
    "NaN scale": ({"static_scale": torch.full((1,), math.nan)}, "static_scale: expected a finite number > 0"),
    "limit": ({"fp8_max": 1000.0}, "fp8_max: expected 240 or 448, got 1000"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_op_itself_refuses_bad_arguments(case):
    """Layers call the overload without passing through the checks of ``ops``."""
    changes, message = BAD[case]
    arguments = {"gate_up": randn(2, 40), "static_scale": None, "fp8_max": 240.0} | changes
    with pytest.raises(ValueError, match=message):
        OP.cpu(*arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": randn(2, 40).double()}, r"gate_up: expected dtype .*, got torch.float64"),
        ({"static_scale": torch.ones(1).double()}, r"static_scale: expected one .* of torch.float64"),
        ({"static_scale": torch.ones(1, device="meta")}, r"static_scale: expected device cpu .*, got meta"),
        ({"static_scale": -1.0}, r"static_scale: expected a finite number > 0, got -1.0"),
    ],
)
def test_the_public_function_says_what_came(change, message):
    with pytest.raises(ValueError, match=message):
        run(**{"gate_up": randn(2, 40)} | change)


def test_sparse_tensors_never_reach_the_kernel():
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        OP.cpu(torch.eye(40).to_sparse(), None, 240.0)
