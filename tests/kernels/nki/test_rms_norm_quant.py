"""The NKI norm kernel against the reference, in the simulator, and with ``-m neuron`` on hardware.

Bounds are the contract's for a kernel with 16-bit stages: scales within 2^-7, codes within one step on at
most 2 %.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math

import pytest
import torch

from vllm_neuron_rmsq import ops, reference
from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.kernels.nki import rms_norm_quant as source
from vllm_neuron_rmsq.kernels.nki import rms_norm_quant_rows as rows_source
from vllm_neuron_rmsq.kernels.nki.rmsnorm_quant import (
    DtypeMode,
    NormType,
    QuantizationType,
    RmsNormQuantKernelArgs,
    rmsnorm_quant_kernel,
)
from vllm_neuron_rmsq.kernels.nki.simulator import cost, simulate

SCALE_RTOL = 2.0**-7
FLIPS = 0.02

NARROW = (64, 576, 1024, 1536)
WIDE = (8192, 16384)
SHORT = (1, 2, 127, 128, 129, 160)


def gaussian(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width)


def uniform(rows: int, width: int) -> torch.Tensor:
    return torch.rand(rows, width) * 10


def constant(rows: int, width: int) -> torch.Tensor:
    return torch.full((rows, width), 3.25)


def duplicated(rows: int, width: int) -> torch.Tensor:
    return torch.randn(1, width).repeat(rows, 1)


def ones(rows: int, width: int) -> torch.Tensor:
    return torch.ones(rows, width)


def magnitudes(rows: int, width: int) -> torch.Tensor:
    """From 1e-9 to 1e9, row by row."""
    return torch.randn(rows, width) * 10.0 ** torch.linspace(-9, 9, rows)[:, None]


def zeros(rows: int, width: int) -> torch.Tensor:
    """Every second row, the others gaussian."""
    return torch.randn(rows, width) * (torch.arange(rows)[:, None] % 2 != 0)


ROWS = (gaussian, uniform, constant, duplicated, ones, magnitudes, zeros)


@pytest.fixture(
    params=["nki-sim", pytest.param("nki", marks=pytest.mark.neuron)],
)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lnc(monkeypatch: pytest.MonkeyPatch):
    """Set the NeuronCores that kernels are launched on; hardware has what its runtime was started with."""

    def set_lnc(backend: str, cores: int) -> None:
        if backend == "nki-sim":
            monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", str(cores))

    return set_lnc


def place(tensor: torch.Tensor | None, backend: str) -> torch.Tensor | None:
    return tensor if tensor is None or backend == "nki-sim" else tensor.to("neuron")


def gamma(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """fp32, so that a row of equal bf16 numbers does not quantize to exact ties, which fp32 noise decides."""
    return (1 + 0.3 * torch.randn(width)).to(dtype)


def steps(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """How many codes apart, value by value; the two zeros are one."""

    def ordinal(codes: torch.Tensor) -> torch.Tensor:
        magnitude = (codes & 0x7F).int()
        return torch.where(codes >= 0x80, -magnitude, magnitude)

    return (ordinal(got) - ordinal(want)).abs()


def assert_codes(got: torch.Tensor, want: torch.Tensor) -> None:
    off = steps(got, want)
    assert off.max() <= 1
    # One code in a row of 64 is 1.6 %; never refuse a single one.
    assert (off > 0).sum() <= max(1, FLIPS * off.numel())


def assert_within_bounds(got: torch.Tensor, want: torch.Tensor) -> None:
    codes, scale = fmt.unpack(got)
    expected_codes, expected_scale = fmt.unpack(want)
    assert ((scale - expected_scale).abs() <= SCALE_RTOL * expected_scale).all()
    assert_codes(codes, expected_codes)


def check(backend: str, hidden: torch.Tensor, weight: torch.Tensor | None, **keywords) -> None:
    """The op on ``backend`` within the contract's bounds of the reference."""
    want = reference.rms_norm_quant(hidden, weight, **keywords)
    on_device = {k: place(v, backend) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    got = ops.rms_norm_quant(place(hidden, backend), place(weight, backend), backend=backend, **on_device)
    if "residual" in keywords:
        got, residual_out = got
        want, expected_out = want
        assert torch.equal(residual_out.cpu(), expected_out)
    (assert_codes if keywords.get("static_scale") else assert_within_bounds)(got.cpu(), want)


def batches(rows: int, width: int) -> list[torch.Tensor]:
    """Every kind of row at ``[rows, width]``: in turn where there are enough rows, else each alone."""
    if rows < len(ROWS):
        return [make(rows, width).bfloat16() for make in ROWS]
    kinds = torch.stack([make(rows, width) for make in ROWS])
    return [kinds[torch.arange(rows) % len(ROWS), torch.arange(rows)].bfloat16()]


@pytest.mark.parametrize("width", NARROW)
@pytest.mark.parametrize("rows", SHORT)
def test_kernel_is_within_bounds(backend, lnc, rows, width):
    """Every kind of row, on one core and two, clipped and not, ROW and STATIC."""
    torch.manual_seed(rows * width)
    weight = gamma(width)
    for hidden in batches(rows, width):
        for cores, lower_bound, static_scale in itertools.product((1, 2), (0.0, 0.5), (None, 0.01)):
            lnc(backend, cores)
            check(backend, hidden, weight, lower_bound=lower_bound, static_scale=static_scale)


@pytest.mark.parametrize("width", WIDE)
@pytest.mark.parametrize("rows", SHORT)
def test_kernel_is_within_bounds_on_wide_rows(backend, lnc, rows, width):
    """Every kind of row; of cores, clipping and STATIC every pair."""
    torch.manual_seed(rows + width)
    weight = gamma(width)
    for hidden in batches(rows, width):
        for cores, lower_bound, static_scale in (
            (1, 0.0, None),
            (2, 0.5, None),
            (2, 0.0, 0.01),
            (1, 0.5, 0.01),
        ):
            lnc(backend, cores)
            check(backend, hidden, weight, lower_bound=lower_bound, static_scale=static_scale)


@pytest.mark.parametrize("width", NARROW + WIDE)
def test_kernel_is_within_bounds_on_many_rows(backend, lnc, width):
    """2048 rows of every kind; of cores, clipping and STATIC every pair, or one case where H >= 8192."""
    torch.manual_seed(width)
    (hidden,) = batches(2048, width)
    weight = gamma(width)
    cases = [(2, 0.0, None), (1, 0.5, None), (1, 0.0, 0.01), (2, 0.5, 0.01)]
    for cores, lower_bound, static_scale in cases if width in NARROW else [cases[width // 8192 - 1]]:
        lnc(backend, cores)
        check(backend, hidden, weight, lower_bound=lower_bound, static_scale=static_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 64), (2, 37, 577), (3, 2, 5, 1000), (1, 130, 1)])
def test_dtypes_ranks_and_odd_widths(backend, lnc, shape, dtype):
    torch.manual_seed(0)
    hidden, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    lnc(backend, 2)
    for weight in (None, gamma(shape[-1], dtype), gamma(shape[-1], torch.float32)):
        for keywords in ({}, {"residual": residual}, {"static_scale": 0.02}, {"lower_bound": 1.0}):
            check(backend, hidden, weight, **keywords)


def test_codes_beyond_240_for_trainium3(backend):
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 1536).bfloat16(), gamma(1536)
    check(backend, hidden, weight, target="trn3")
    check(backend, hidden, weight, target="trn3", static_scale=0.005)


@pytest.mark.parametrize("width", [64, 577, 1534, 1536])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_lost_alone(backend, lnc, width, weight, value):
    torch.manual_seed(0)
    hidden = torch.randn(130, width).bfloat16()
    factor = gamma(width) if weight else None
    bad = [0, 77, 129]
    spoiled = hidden.clone()
    spoiled[bad, width // 2] = value
    good = [row for row in range(130) if row not in bad]
    lnc(backend, 2)
    for keywords in ({}, {"residual": torch.randn(130, width).bfloat16()}, {"lower_bound": 0.5}):
        run = [
            ops.rms_norm_quant(
                place(h, backend),
                place(factor, backend),
                backend=backend,
                **{k: place(v, backend) if k == "residual" else v for k, v in keywords.items()},
            )
            for h in (hidden, spoiled)
        ]
        clean, got = (r[0].cpu() if "residual" in keywords else r.cpu() for r in run)
        codes, scale = fmt.unpack(got)
        assert scale[bad].isnan().all()
        assert not codes[bad].any()
        assert torch.equal(got[good], clean[good])
    codes = ops.rms_norm_quant(
        place(spoiled, backend), place(factor, backend), static_scale=0.01, backend=backend
    ).cpu()
    assert (codes[bad] == fmt.NAN_CODE).all()
    assert not ((codes[good] & 0x7F) == fmt.NAN_CODE).any()


def test_a_bad_gamma_loses_every_row(backend):
    for value in (math.nan, math.inf):
        weight = gamma(576)
        weight[5] = value
        got = ops.rms_norm_quant(
            place(torch.randn(3, 576).bfloat16(), backend), place(weight, backend), backend=backend
        )
        assert fmt.unpack(got.cpu())[1].isnan().all()


@pytest.mark.parametrize("peak", [1e-20, 1e-4, 300.0, 1e20])
def test_gamma_of_any_magnitude(backend, peak):
    """Neither small nor large gammas leave fp16's range; zeros and single large channels neither."""
    torch.manual_seed(0)
    hidden = torch.randn(20, 1536).bfloat16()
    weight = gamma(1536) * peak
    weight[::7] = 0
    check(backend, hidden, weight)
    weight = gamma(1536)
    weight[3] = 1000
    check(backend, hidden, weight)


def test_gamma_of_zeros(backend):
    hidden = torch.randn(3, 576).bfloat16()
    check(backend, hidden, torch.zeros(576).bfloat16())


def test_published_signature_and_dtype():
    """Called as NKI Library documents it: FP8 out, two results with a residual."""
    torch.manual_seed(0)
    hidden, residual = torch.randn(2, 70, 1024).bfloat16(), torch.randn(2, 70, 1024).bfloat16()
    weight = gamma(1024)
    kargs = RmsNormQuantKernelArgs(lower_bound=0.0)
    assert kargs.needs_rms_normalization()
    assert not kargs.has_lower_bound()
    for grid in (None, 1, 2):
        out = simulate(rmsnorm_quant_kernel, grid)(hidden, weight.reshape(1, -1), kargs)
        assert out.shape == (2, 70, 1028)
        assert_within_bounds(out.view(torch.uint8), reference.rms_norm_quant(hidden, weight))
    out, total = simulate(rmsnorm_quant_kernel, 2)(
        hidden, weight, kargs, residual=residual, dtype_mode=DtypeMode.OCP
    )
    want, expected = reference.rms_norm_quant(hidden, weight, residual=residual, target="trn3")
    assert out.dtype == torch.float8_e4m3fn
    assert_within_bounds(out.view(torch.uint8), want)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(130, 576), (300, 16384)])
def test_pre_norm(dtype, residual, rows, width):
    """Hidden normalized with a gamma of its own, then the residual, then the norm proper.

    At H = 16384 there is room in SBUF for one tile of each kind only.
    """
    torch.manual_seed(0)
    hidden, first, weight = torch.randn(rows, width).to(dtype), gamma(width, dtype), gamma(width, dtype)
    added = torch.randn(rows, width).to(dtype) if residual else None
    result = simulate(rmsnorm_quant_kernel)(
        hidden, weight, RmsNormQuantKernelArgs(), pre_norm_gamma=first, residual=added
    )
    x = hidden.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * first.float()
    if added is not None:
        result, total = result
        x = x + added.float()
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(total, x.to(dtype), rtol=rtol, atol=1e-6)
    assert_within_bounds(result.view(torch.uint8), reference.rms_norm_quant(x, weight.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 8192), (9, 16384), (33, 576), (300, 2049), (600, 1000), (300, 8192), (160, 16384)]
)
def test_gamma_of_16_bits(backend, lnc, rows, width, residual, dtype):
    """As models have it: both schedules, tiles of several sizes, every product exact in fp32."""
    torch.manual_seed(rows + width)
    hidden, weight = torch.randn(rows, width).to(dtype), gamma(width, dtype)
    keywords = {"residual": torch.randn(rows, width).to(dtype)} if residual else {}
    lnc(backend, 2 if rows > 1 else 1)
    check(backend, hidden, weight, **keywords)


@pytest.mark.parametrize("rows", [4, 200])
def test_a_sum_that_nearly_cancels(backend, rows):
    """The mean square is that of the sum; squares of hidden and residual apart would drown it."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, 1536).bfloat16() * 100
    check(backend, hidden, gamma(1536), residual=-(hidden * (1 + 2**-8)).bfloat16())


@pytest.mark.parametrize("rows", [3, 300])
def test_rows_padded_with_zeros(rows):
    """hidden_actual: the mean square is over so many elements."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 640).bfloat16(), gamma(640)
    hidden[:, 576:] = 0
    kargs = RmsNormQuantKernelArgs()
    got = simulate(rmsnorm_quant_kernel)(hidden, weight, kargs, hidden_actual=576).view(torch.uint8)
    want = reference.rms_norm_quant(hidden[:, :576], weight[:576])
    assert_within_bounds(torch.cat([got[:, :576], got[:, 640:]], 1), want)
    assert not got[:, 576:640].any()
    with pytest.raises(AssertionError, match=r"hidden_actual: expected 1 to 640 \(H of hidden\), got 641"):
        simulate(rmsnorm_quant_kernel)(hidden, weight, kargs, hidden_actual=641)


class TestPublishedApi:
    """What a caller of NKI Library's kernel would notice."""

    def test_arguments_are_frozen_and_hashable(self):
        kargs = RmsNormQuantKernelArgs(lower_bound=0.5)
        assert hash(kargs) == hash(RmsNormQuantKernelArgs(lower_bound=0.5))
        assert kargs == RmsNormQuantKernelArgs(lower_bound=0.5)
        with pytest.raises(dataclasses.FrozenInstanceError):
            kargs.eps = 0.0  # type: ignore[misc]

    def test_questions(self):
        row = RmsNormQuantKernelArgs()
        static = RmsNormQuantKernelArgs(quantization_type=QuantizationType.STATIC)
        assert (row.is_row_quant(), row.is_static_quant()) == (True, False)
        assert (static.is_row_quant(), static.is_static_quant()) == (False, True)

    @pytest.mark.parametrize(("lower_bound", "clips"), [(0.0, False), (1e-6, False), (1.1e-6, True)])
    def test_a_lower_bound_counts_from_1e_6_on(self, lower_bound, clips):
        assert RmsNormQuantKernelArgs(lower_bound=lower_bound).has_lower_bound() is clips

    def test_values_of_dtype_mode(self):
        assert [m.value for m in DtypeMode] == ["non_ocp", "ocp", "auto"]

    @pytest.mark.parametrize(("target", "dtype"), [("trn2", torch.uint8), ("trn3", torch.float8_e4m3fn)])
    def test_auto_is_what_the_hardware_has(self, target, dtype):
        hidden = torch.randn(4, 64).bfloat16()
        run = simulate(rmsnorm_quant_kernel, target=target)
        got = run(hidden, torch.ones(64), RmsNormQuantKernelArgs(), dtype_mode=DtypeMode.AUTO)
        mode = DtypeMode.OCP if target == "trn3" else DtypeMode.NON_OCP
        want = run(hidden, torch.ones(64), RmsNormQuantKernelArgs(), dtype_mode=mode)
        assert got.dtype == dtype  # torch has no float8_e4m3: its bytes
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))

    def test_enums_of_another_module(self):
        """NKI Library's own: other classes and more members, the same names."""
        norm = enum.Enum("NormType", {"NO_NORM": 0, "RMS_NORM": 1, "LAYER_NORM": 2})
        quantization = enum.Enum("QuantizationType", {"NONE": 0, "STATIC": 1, "ROW": 2, "MX": 3})
        mode = enum.Enum("DtypeMode", {"NON_OCP": "non_ocp", "OCP": "ocp", "AUTO": "auto"})
        kargs = RmsNormQuantKernelArgs(norm_type=norm.NO_NORM, quantization_type=quantization.ROW)
        assert not kargs.needs_rms_normalization()
        hidden = torch.randn(4, 64).bfloat16()
        got = simulate(rmsnorm_quant_kernel)(hidden, None, kargs, dtype_mode=mode.OCP)
        assert_within_bounds(got.view(torch.uint8), reference.rms_norm_quant(hidden, None, target="trn3"))
        with pytest.raises(AssertionError, match=r"norm_type: expected .* got NormType\.LAYER_NORM"):
            RmsNormQuantKernelArgs(norm_type=norm.LAYER_NORM)
        with pytest.raises(AssertionError, match=r"quantization_type: expected .* got QuantizationType\.MX"):
            RmsNormQuantKernelArgs(quantization_type=quantization.MX)

    def test_names_importable_where_nki_library_has_them(self):
        from vllm_neuron_rmsq.kernels.nki import rmsnorm_quant

        for name in rmsnorm_quant.__all__:
            assert getattr(rmsnorm_quant, name) is getattr(source, name)


@pytest.mark.parametrize("rows", [8, 300])
@pytest.mark.parametrize("switch", [True, False])
def test_either_rsqrt(monkeypatch, rows, switch):
    """Rows of any magnitude. ScalarE's ends at 2^97, so it gets 2^-32 times the mean square, unless eps would
    be lost: then rows beyond are invalid."""
    monkeypatch.setattr(rows_source, "RSQRT_ON_GPSIMD", switch)
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 1536).bfloat16(), gamma(1536)
    hidden[1] *= 1e16
    hidden[2] *= 1e-14
    for eps in (1e-5, 2.0**-54, 2.0**-60):
        got = simulate(source.rms_norm_quant_bytes_kernel)(hidden, weight, eps=eps)
        want = reference.rms_norm_quant(hidden, weight, eps=eps)
        lost = eps < 2.0**-55 and not switch
        if lost:
            assert fmt.unpack(got)[1][1].isnan().all()
            assert not fmt.unpack(got)[0][1].any()
        valid = torch.arange(rows) != 1
        assert_within_bounds(*(t[valid] if lost else t for t in (got, want)))


class TestLimits:
    """Every violation is an AssertionError that names the limit and the value."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"lower_bound": -0.5}, "lower_bound: expected >= 0 .* got -0.5"),
            ({"eps": -1e-6}, "eps: expected >= 0, got -1e-06"),
            ({"norm_type": "layer"}, "norm_type: expected .*RMS_NORM.*NO_NORM, got layer"),
            ({"quantization_type": NormType.NO_NORM}, "quantization_type: expected .*ROW.*STATIC, got"),
        ],
    )
    def test_kernel_arguments(self, arguments, message):
        with pytest.raises(AssertionError, match=message):
            RmsNormQuantKernelArgs(**arguments)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((3, 1, 64), "B <= 2, got 3"),
            ((1, 32769, 1), "S <= 32768, got 32769"),
            ((1, 16385), "H <= 16384, got 16385"),
            ((65537, 1), "at most 65536 rows, got 65537"),
            ((64,), "rank >= 2, got 1"),
            ((3, 1, 2, 8), "B <= 2, got 3"),
            ((1, 1, 16385, 1), r"shape\[2\] <= 16384, got 16385"),
        ],
    )
    def test_sizes(self, shape, message):
        hidden = torch.zeros(shape, dtype=torch.bfloat16)
        with pytest.raises(AssertionError, match=message):
            simulate(rmsnorm_quant_kernel)(hidden, torch.ones(shape[-1]), RmsNormQuantKernelArgs())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ln_w": None}, r"ln_w: expected shape \[64\] or \[1, 64\], got None"),
            ({"ln_w": torch.ones(65)}, r"ln_w: expected shape .* got \[65\]"),
            ({"pre_norm_gamma": torch.ones(2, 32)}, r"pre_norm_gamma: expected shape .* got \[2, 32\]"),
            ({"residual": torch.zeros(3, 64)}, r"residual: expected shape .* got \(3, 64\)"),
            ({"residual": torch.zeros(4, 64).half()}, "residual: expected dtype bfloat16 .* got float16"),
            ({"hidden": torch.zeros(4, 64, dtype=torch.int32)}, "hidden: expected dtype .* got int32"),
            ({"dtype_mode": "ocp"}, "dtype_mode: expected DtypeMode.NON_OCP .* got ocp"),
        ],
    )
    def test_tensors(self, change, message):
        arguments = {"hidden": torch.zeros(4, 64).bfloat16(), "ln_w": torch.ones(64), **change}
        with pytest.raises(AssertionError, match=message):
            simulate(rmsnorm_quant_kernel)(kargs=RmsNormQuantKernelArgs(), **arguments)

    @pytest.mark.parametrize(
        ("scale", "message"),
        [
            (None, r"input_dequant_scale: expected \[128, 1\] \(STATIC\), got None"),
            (torch.ones(1, 1), r"input_dequant_scale: expected shape \(128, 1\), got \(1, 1\)"),
            (torch.ones(128, 1).half(), "input_dequant_scale: expected dtype float32, got float16"),
        ],
    )
    def test_static_scale(self, scale, message):
        kargs = RmsNormQuantKernelArgs(quantization_type=QuantizationType.STATIC)
        hidden = torch.zeros(4, 64).bfloat16()
        with pytest.raises(AssertionError, match=message):
            simulate(rmsnorm_quant_kernel)(hidden, torch.ones(64), kargs, input_dequant_scale=scale)

    def test_fewer_rows_than_programs(self):
        hidden = torch.zeros(1, 64).bfloat16()
        with pytest.raises(AssertionError, match="at least 2 rows, one per program, got 1"):
            simulate(rmsnorm_quant_kernel, 2)(hidden, torch.ones(64), RmsNormQuantKernelArgs())


class TestCost:
    """The simulator's cost MODEL: deterministic figures, not timings."""

    SHAPE = (2048, 8192)
    PUBLISHED_US = 3 * 8192 / 0.96e3 * (2048 / 2 / 128)
    """Three full-width VectorE passes for each of a core's 8 tiles: the published schedule."""

    @staticmethod
    @functools.cache
    def report(shape: tuple[int, int], residual: bool):
        hidden = torch.zeros(shape).bfloat16()
        return cost(source.rms_norm_quant_bytes_kernel, 2)(
            hidden, torch.ones(shape[-1]).bfloat16(), residual=hidden if residual else None
        )

    def test_busiest_engine_is_at_most_0_55_of_the_published_schedule(self):
        report = self.report(self.SHAPE, residual=False)
        assert report.time_us <= 0.55 * self.PUBLISHED_US
        # Nothing is read twice: hidden in, packed rows out, gamma once per core.
        rows, width = 2048, 8192
        assert report.bytes["SBUF->HBM"] == rows * (width + 4)
        assert report.bytes["HBM->SBUF"] <= rows * width * 2 + 2 * 2 * (2 * width)

    def test_bound_by_dma_with_a_residual(self):
        assert self.report(self.SHAPE, residual=True).bound == "DMA"

    @pytest.mark.parametrize(
        ("shape", "residual", "goal"),
        [
            ((2048, 8192), False, 110),
            ((2048, 8192), True, 200),
            ((2048, 4096), False, 60),
            ((2048, 576), False, 27),
            ((16, 8192), False, 14),
            ((16, 8192), True, 18),
        ],
    )
    def test_schedule(self, shape, residual, goal):
        """Microseconds on two cores; 27 is the schedule of NKI Library's own kernel."""
        report = self.report(shape, residual)
        assert report.scheduled_us <= goal
        assert report.careful_us <= goal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("extra", [{}, {"residual"}, {"residual", "pre_norm_gamma"}])
def test_widest_rows_fit_in_sbuf(dtype, extra):
    """224 KiB per partition at H = 16384, whatever is asked for; the simulator counts."""
    width = source.MAX_H
    hidden, weight = torch.zeros(300, width, dtype=dtype), torch.ones(width, dtype=dtype)
    keywords = {"residual": hidden, "pre_norm_gamma": weight}
    report = cost(rmsnorm_quant_kernel)(
        hidden, weight, RmsNormQuantKernelArgs(lower_bound=1.0), **{k: keywords[k] for k in extra}
    )
    assert report.worst.peaks["SBUF"] <= 224 * 1024
