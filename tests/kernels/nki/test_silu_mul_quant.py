"""The NKI kernel of SiLU times up against float64, in the simulator, and with ``-m neuron`` on hardware.

Every stage of the kernel is fp32, so that the simulator's result is held to the contract of the reference:
ties apart, the same codes. How exactly ScalarE computes SiLU is not documented; hardware gets the bounds of
the NKI norm kernel, scales within 2^-7 and codes within one step on at most 2 %.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq import reference
from vllm_neuron_rmsq.kernels.nki import silu_mul_quant as source
from vllm_neuron_rmsq.kernels.nki.digest import digest
from vllm_neuron_rmsq.kernels.nki.silu_mul_quant import (
    DtypeMode,
    silu_mul_quant_bytes_kernel,
    silu_mul_quant_kernel,
)
from vllm_neuron_rmsq.kernels.nki.simulator import Zeros, cost, scheduled_us, simulate

TIES = 1e-3


def run(gate_up: torch.Tensor, static_scale: float | None = None, target: str = "trn2", cores: int = 1):
    """The kernel's bytes, in the simulator of ``target``."""
    scale = None if static_scale is None else torch.full((128, 1), static_scale)
    kernel = simulate(silu_mul_quant_bytes_kernel, cores if cores > 1 else None, target=target)
    return kernel(gate_up, scale, ocp=target == "trn3", digest=digest())


def gaussian(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, 2 * width)


def magnitudes(rows: int, width: int) -> torch.Tensor:
    """Gate and up from 1e-9 to 1e9, row by row, gates that SiLU leaves alone, halves, or takes to 0."""
    return torch.randn(rows, 2 * width) * 10.0 ** torch.linspace(-9, 9, rows)[:, None]


def far_gates(rows: int, width: int) -> torch.Tensor:
    """Gates down to -400, where exp overflows fp32."""
    return torch.cat([torch.rand(rows, width) * 500 - 400, torch.randn(rows, width)], dim=1)


def with_zeros(rows: int, width: int) -> torch.Tensor:
    """Every second row."""
    return torch.randn(rows, 2 * width) * (torch.arange(rows)[:, None] % 2 != 0)


@pytest.mark.parametrize("make", [gaussian, magnitudes, far_gates, with_zeros])
@pytest.mark.parametrize("width", [1, 3, 64, 578, 1536, 2049, 5504])
@pytest.mark.parametrize(("rows", "cores"), [(1, 1), (1, 2), (7, 2), (130, 1), (257, 2)])
def test_row_scales_are_the_contract(make, width, rows, cores):
    torch.manual_seed(rows * width)
    gate_up = make(rows, width).bfloat16()
    for target in ("trn2", "trn3"):
        got = run(gate_up, None, target, cores)
        assert got.shape == (rows, width + 4)
        ties = oracle.assert_packed(got, oracle.silu_mul_quant(gate_up, target=target))
        assert ties <= max(1, TIES * rows * width)


@pytest.mark.parametrize("make", [gaussian, magnitudes, far_gates, with_zeros])
@pytest.mark.parametrize(("rows", "width", "cores"), [(1, 3, 1), (130, 578, 2), (5, 2049, 1)])
@pytest.mark.parametrize("scale", [0.003, 0.5])
def test_a_given_scale_clips(make, rows, width, cores, scale):
    gate_up = make(rows, width).bfloat16()
    for target in ("trn2", "trn3"):
        got = run(gate_up, scale, target, cores)
        assert got.shape == (rows, width)
        expected = oracle.silu_mul_quant(gate_up, static_scale=scale, target=target)
        assert oracle.assert_codes(got.numpy(), expected) <= max(1, TIES * rows * width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [576, 4096])
def test_input_dtypes(dtype, width):
    gate_up = gaussian(9, width).to(dtype)
    assert oracle.assert_packed(run(gate_up), oracle.silu_mul_quant(gate_up)) <= max(1, TIES * 9 * width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_widest_row(dtype):
    """SBUF holds it, and the next tile waits for the one before it to be encoded."""
    gate_up = gaussian(260, source.MAX_I).to(dtype)
    for scale in (None, 0.02):
        got, expected = run(gate_up, scale), oracle.silu_mul_quant(gate_up, static_scale=scale)
        if scale is None:
            assert oracle.assert_packed(got, expected) <= TIES * got.numel()
        else:
            assert oracle.assert_codes(got.numpy(), expected) <= TIES * got.numel()


def test_outer_dimensions():
    gate_up = torch.randn(2, 3, 5, 128).bfloat16()
    got = run(gate_up)
    assert got.shape == (2, 3, 5, 68)
    assert torch.equal(got.reshape(30, 68), run(gate_up.reshape(30, 128)))


INVALID = {
    "nan gate": (math.nan, 1.0),
    "nan up": (1.0, math.nan),
    "inf gate": (math.inf, 1.0),
    "minus inf gate": (-math.inf, 1.0),
    "inf up": (1.0, -math.inf),
    "inf up, gate of zero": (0.0, math.inf),
    "overflow": (3e38, 3e38),
}


@pytest.mark.parametrize("values", INVALID.values(), ids=INVALID)
@pytest.mark.parametrize(("rows", "width"), [(131, 5), (131, 576), (131, 4100), (3, 2048), (25, 1536)])
@pytest.mark.parametrize("scale", [None, 0.01])
def test_an_invalid_row_says_so_and_stays_alone(values, rows, width, scale):
    """NaN scale and codes of zero, or with a given scale codes of NaN; neighbours as if nothing had been."""
    gate_up = gaussian(rows, width)
    clean = run(gate_up, scale)
    for at in (0, width // 2, width - 1):
        spoiled = gate_up.clone()
        bad = [0, rows - 1]
        spoiled[bad, at], spoiled[bad, width + at] = values
        got = run(spoiled, scale)
        want = reference.silu_mul_quant(spoiled, static_scale=scale)
        if scale is None:
            assert fmt.unpack(got)[1][bad].isnan().all()
            assert (got[bad, :width] == 0).all()
            assert fmt.unpack(want)[1][bad].isnan().all()
        else:
            assert (got[bad] == fmt.NAN_CODE).all()
            assert torch.equal(got[bad], want[bad])
        good = [row for row in range(rows) if row not in bad]
        assert torch.equal(got[good], clean[good])


def test_zeros():
    got = run(torch.zeros(3, 128, dtype=torch.bfloat16))
    codes, scale = fmt.unpack(got)
    assert (codes & 0x7F == 0).all()
    assert torch.equal(scale, torch.full((3, 1), 1e-6))


def test_the_entry_for_graphs_returns_the_same_bytes():
    gate_up = gaussian(9, 200).bfloat16()
    assert torch.equal(simulate(silu_mul_quant_kernel)(gate_up), run(gate_up))
    ocp = simulate(silu_mul_quant_kernel, target="trn3")(gate_up, None, DtypeMode.OCP)
    assert torch.equal(ocp.view(torch.uint8), run(gate_up, target="trn3"))


@pytest.mark.parametrize(("rows", "width"), [(3, 2048), (130, 1536), (5, 300)])
@pytest.mark.parametrize(
    "change",
    [{"GPSIMD_SHARE": 1.0}, {"GPSIMD_SHARE": 0.0}, {"LEAST_PART": source.MAX_I}, {"CHUNK": source.MAX_I}],
)
def test_other_forms_give_the_same(monkeypatch, change, rows, width):
    """The constants that hardware may ask to change."""
    gate_up = gaussian(rows, width).bfloat16()
    want = run(gate_up)
    for name, value in change.items():
        monkeypatch.setattr(source, name, value)
    assert torch.equal(run(gate_up), want)


@pytest.mark.parametrize(
    ("rows", "width", "us"),
    [
        (2048, 14336, 1.5 * 199.5),  # 1.5 times what its bytes take
        (1, 14336, 14.0),
        (64, 3584, 18.0),
    ],
)
def test_scheduled_time(rows, width, us):
    """By the cost model, two programs: no number of a clock."""
    assert scheduled_us(silu_mul_quant_kernel, 2, Zeros((rows, 2 * width), "bfloat16")) <= us


def test_every_element_is_read_and_written_once():
    gate_up = torch.zeros(1024, 2 * 4096, dtype=torch.bfloat16)
    report = cost(silu_mul_quant_kernel, 2)(gate_up)
    assert report.bytes["HBM->SBUF"] == gate_up.numel() * 2
    assert report.bytes["SBUF->HBM"] == 1024 * (4096 + 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": torch.zeros(64)}, "gate_up: expected rank >= 2, got 1"),
        ({"gate_up": torch.zeros(2, 63)}, "gate_up: expected an even last dimension, gate then up, got 63"),
        ({"gate_up": torch.zeros(1, 2 * 28673)}, "gate_up: expected I <= 28672 .* got 28673"),
        ({"gate_up": torch.zeros(65537, 2)}, "gate_up: expected at most 65536 rows, got 65537"),
        ({"gate_up": torch.zeros(2, 64, dtype=torch.int32)}, "gate_up: expected dtype bfloat16, float16 or"),
        ({"static_scale": torch.ones(1)}, r"static_scale: expected shape \(128, 1\), got \(1,\)"),
        ({"static_scale": torch.ones(128, 1).half()}, "static_scale: expected dtype float32, got float16"),
    ],
)
def test_limits(change, message):
    with pytest.raises(AssertionError, match=message):
        simulate(silu_mul_quant_bytes_kernel)(**{"gate_up": torch.zeros(2, 64), **change})
