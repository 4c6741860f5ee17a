"""The NKI matmul of packed rows against float64, in the simulator, and with ``-m neuron`` on hardware."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.kernels.nki import common
from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear as source
from vllm_neuron_rmsq.kernels.nki.digest import digest
from vllm_neuron_rmsq.kernels.nki.packed_fp8_linear import (
    layout,
    packed_fp8_linear_bytes_kernel,
    packed_fp8_linear_kernel,
    prepack,
    prepacked_shape,
)
from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationWarning, Zeros, cost, scheduled_us, simulate

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}


@pytest.fixture(params=["nki-sim", pytest.param("nki", marks=pytest.mark.neuron)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def place(tensor: torch.Tensor | None, backend: str) -> torch.Tensor | None:
    return tensor if tensor is None or backend == "nki-sim" else tensor.to("neuron")


def fp8(rows: int, width: int) -> torch.Tensor:
    """Codes within ±240, subnormals and zeros among them."""
    values = torch.randn(rows, width) * 10.0 ** torch.randint(-3, 3, (rows, width))
    return values.clamp(-240, 240).to(torch.float8_e4m3fn)


def assert_product(out, codes, scale, weight, weight_scale, bias) -> None:
    """``out`` within its rounding, and fp32 accumulation, of the float64 product."""
    factor = scale.double().reshape(-1, 1) * weight_scale.double()
    exact = codes.double() @ weight.double().t() * factor
    accumulated = (codes.double().abs() @ weight.double().abs().t()) * factor
    if bias is not None:
        exact, accumulated = exact + bias.double(), accumulated + bias.double().abs()
    error = (out.cpu().double() - exact).abs()
    assert (error <= ROUNDING[out.dtype] * exact.abs() + 2.0**-18 * accumulated).all()


@pytest.mark.parametrize(
    ("rows", "width", "features"),
    [
        (1, 576, 960),
        (32, 1536, 576),
        (7, 576, 3072),
        (129, 577, 130),
        (130, 2050, 70),
        (5, 64, 1),
        (3, 1, 5),
        (2, 255, 513),
        (2, 8192, 300),
        (1100, 258, 33),
        (32, 130, 2700),
        (64, 64, 5200),
    ],
)
@pytest.mark.parametrize("cores", [1, 2])
def test_kernel_computes_the_product(backend, monkeypatch, rows, width, features, cores):
    torch.manual_seed(rows + width + features)
    if backend == "nki-sim":
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", str(cores))
    codes, weight = fp8(rows, width), fp8(features, width)
    scale = torch.rand(rows) * 0.01
    for per_channel in (True, False):
        weight_scale = torch.rand(features if per_channel else 1) * 0.1
        for bias in (None, torch.randn(features).bfloat16()):
            prepacked = ops.prepack_fp8_weight(place(weight, backend), place(weight_scale, backend), backend)
            out = ops.packed_fp8_linear(
                place(fmt.pack(codes, scale), backend),
                prepacked,
                place(weight_scale, backend),
                bias=place(bias, backend),
            )
            assert out.shape == (rows, features)
            assert_product(out, codes, scale, weight, weight_scale, bias)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_output_dtypes(backend, dtype):
    codes, weight, scale = fp8(9, 300), fp8(20, 300), torch.rand(9) * 0.01
    for bias in (None, torch.randn(20)):
        out = ops.packed_fp8_linear(
            place(fmt.pack(codes, scale), backend),
            place(weight, backend),
            place(torch.ones(20), backend),
            bias=place(bias, backend),
            out_dtype=dtype,
            backend=backend,
        )
        assert out.dtype == dtype
        assert_product(out, codes, scale, weight, torch.ones(20), bias)


def test_longest_input(backend):
    codes, weight, scale = fp8(32768, 6), fp8(4, 6), torch.rand(32768)
    out = ops.packed_fp8_linear(
        place(fmt.pack(codes, scale), backend),
        place(weight, backend),
        place(torch.ones(4), backend),
        backend=backend,
    )
    assert_product(out, codes, scale, weight, torch.ones(4), None)


def test_a_lost_row_stays_alone(backend):
    """NaN scale, whatever the codes: a row of NaN, and the neighbours as if nothing had been."""
    codes, weight, scale = fp8(130, 576), fp8(40, 576), torch.rand(130)
    run = []
    for spoil in (False, True):
        packed = fmt.pack(codes, scale)
        if spoil:
            packed[[0, 77]] = fmt.pack(
                torch.full((2, 576), fmt.NAN_CODE, dtype=torch.uint8), torch.full((2,), math.nan)
            )
        run.append(
            ops.packed_fp8_linear(
                place(packed, backend),
                place(weight, backend),
                place(torch.ones(40), backend),
                backend=backend,
            ).cpu()
        )
    good = [row for row in range(130) if row not in (0, 77)]
    assert run[1][[0, 77]].isnan().all()
    assert torch.equal(run[1][good], run[0][good])


@pytest.mark.parametrize("ocp", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_the_entry_for_graphs_takes_plain_arguments(dtype, ocp, monkeypatch):
    """Strings and numbers name what the kernel is given as objects; the digest changes nothing."""
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3" if ocp else "trn2")
    codes, weight = fp8(9, 300), fp8(20, 300)
    packed, prepacked, bias = (
        fmt.pack(codes, torch.rand(9)),
        prepack(weight.view(torch.uint8)),
        torch.randn(20),
    )
    name = str(dtype).removeprefix("torch.")
    got = simulate(packed_fp8_linear_bytes_kernel)(
        packed, prepacked, torch.ones(20), bias, out_dtype=name, ocp=ocp, digest=digest()
    )
    mode = source.DtypeMode.OCP if ocp else source.DtypeMode.NON_OCP
    want = simulate(packed_fp8_linear_kernel)(
        packed, prepacked, torch.ones(20), bias, source.OUT_DTYPES[name], mode
    )
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize(("rows", "width"), [(1, 577), (70, 300), (129, 258), (5, 1)])
def test_pairs_side_by_side_give_the_same(monkeypatch, rows, width):
    """The stationary operand as the transpose leaves it: a constant, until hardware has spoken."""
    codes, weight, scale = fp8(rows, width), fp8(70, width), torch.rand(rows)
    arguments = fmt.pack(codes, scale), prepack(weight.view(torch.uint8)), torch.rand(70)
    want = simulate(packed_fp8_linear_kernel)(*arguments)
    monkeypatch.setattr(source, "DEINTERLEAVE", False)
    monkeypatch.setattr(source, "LEAST_ROWS", 1)
    with pytest.warns(NkiSimulationWarning, match="two dense halves"):
        got = simulate(packed_fp8_linear_kernel)(*arguments)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("rows", "width"), [(1, 577), (70, 300), (300, 258), (130, 2049)])
def test_either_engine_transposes(monkeypatch, rows, width):
    """TensorE as many rows as DMA, and DMA as few as TensorE, should hardware ask for it."""
    codes, weight, scale = fp8(rows, width), fp8(70, width), torch.rand(rows)
    arguments = fmt.pack(codes, scale), prepack(weight.view(torch.uint8)), torch.rand(70)
    want = simulate(packed_fp8_linear_kernel)(*arguments)
    for few_rows in (0, source.MAX_T):
        monkeypatch.setattr(source, "FEW_ROWS", few_rows)
        assert torch.equal(simulate(packed_fp8_linear_kernel)(*arguments), want)


def test_wider_apart_and_copied_by_dma_it_is_the_same(monkeypatch):
    """Halves of operands 128 bytes apart as in AWS's kernels; scales by DMA to all partitions."""
    codes, weight, scale = fp8(70, 600), fp8(700, 600), torch.rand(70)
    packed, weight_scale, bias = fmt.pack(codes, scale), torch.rand(700), torch.randn(700)
    want = simulate(packed_fp8_linear_kernel)(packed, prepack(weight.view(torch.uint8)), weight_scale, bias)
    monkeypatch.setattr(source, "ALIGNMENT", 128)
    monkeypatch.setattr(common, "SHUFFLE_FROM", 1024)
    got = simulate(packed_fp8_linear_kernel)(packed, prepack(weight.view(torch.uint8)), weight_scale, bias)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("rows", "width"), [(1, 65536), (129, 65535), (128, 65536), (300, 28672)])
def test_longest_contractions_fit(rows, width):
    codes, weight, scale = fp8(rows, width), fp8(100, width), torch.rand(rows) * 0.01
    packed, prepacked = fmt.pack(codes, scale), prepack(weight.view(torch.uint8))
    weight_scale, bias = torch.rand(100), torch.randn(100)
    out = simulate(packed_fp8_linear_bytes_kernel, 2)(packed, prepacked, weight_scale, bias, "float32")
    assert_product(out, codes, scale, weight, weight_scale, bias)


@given(st.integers(1, 3000), st.integers(1, 20000))
def test_layout_fits_the_hardware(features, width):
    partitions, chunks, block = layout(features, width)
    pairs = -(-width // 2)
    assert partitions <= 128
    assert (chunks - 1) * partitions < pairs <= chunks * partitions
    assert 1 <= block <= min(512, features)
    assert 2 * chunks * block <= source.BLOCK_BYTES
    assert block % 32 == 0 or block == features


@given(st.integers(1, 700), st.integers(1, 600), st.randoms(use_true_random=False))
def test_prepack_puts_every_code_where_it_says(features, width, random):
    weight = torch.randint(0, 256, (features, width), dtype=torch.uint8)
    packed = prepack(weight)
    partitions, chunks, block = layout(features, width)
    assert packed.shape == source.prepacked_shape(features, width)
    for _ in range(50):
        n, h = random.randrange(features), random.randrange(width)
        j, p, i = h // 2 // partitions, h // 2 % partitions, h % 2
        start = n // block * block
        size = min(block, features - start)
        assert packed[p, start * chunks * 2 + (j * 2 + i) * size + n - start] == weight[n, h]


def test_weight_is_read_once_for_1024_rows():
    packed, weight = torch.zeros(1024, 2052, dtype=torch.uint8), torch.zeros(1024, 2048, dtype=torch.uint8)
    report = cost(packed_fp8_linear_kernel, 2)(packed, prepack(weight), torch.ones(1))
    # Weights and a share of the outputs by one program each, rows by both.
    assert report.bytes["HBM->SBUF"] == weight.numel() + 2 * packed.numel() + 2 * 4 * 128
    assert report.bytes["SBUF->HBM"] == 1024 * 1024 * 2
    tiles, chunks, blocks = 8, 8, 1
    assert report.programs[0].instructions["TensorE", "nc_matmul"] == tiles * chunks * blocks


@pytest.mark.parametrize(
    ("rows", "width", "features", "us"),
    [
        (1, 8192, 1280, 21.0),  # 14.3 of weight; 18.2 with the latencies of one load and one store
        (64, 4096, 28672, 1.1 * 159.6),  # 159.6 of weight
        (2048, 8192, 1280, 165.0),  # 136.5 at TensorE's FP8 peak
    ],
)
def test_scheduled_time(rows, width, features, us):
    """By the cost model, two programs: no number of a clock."""
    packed, weight = Zeros((rows, width + 4), "uint8"), Zeros(prepacked_shape(features, width), "uint8")
    assert scheduled_us(packed_fp8_linear_kernel, 2, packed, weight, Zeros((features,), "float32")) <= us


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(1, 2, 68, dtype=torch.uint8)}, r"packed: expected shape \[T, H \+ 4\], got"),
        ({"packed": torch.zeros(32769, 68, dtype=torch.uint8)}, "packed: expected T <= 32768, got 32769"),
        ({"packed": torch.zeros(1, 4, dtype=torch.uint8)}, "packed: expected 1 <= H <= 65536, got 0"),
        ({"packed": torch.zeros(1, 70, dtype=torch.uint8)}, r"weight: expected the shape prepack\(\) gives"),
        ({"weight": torch.zeros(32, 20, dtype=torch.int8)}, "weight: expected dtype uint8, got int8"),
        ({"weight_scale": torch.ones(9)}, r"weight_scale: expected shape \[10\] or \[1\], got \[9\]"),
        ({"weight_scale": torch.ones(10).half()}, "weight_scale: expected dtype float32, got float16"),
        ({"bias": torch.ones(9)}, r"bias: expected shape \[10\], got \[9\]"),
        ({"out_dtype": "int8"}, "out_dtype: expected 'bfloat16', 'float16' or 'float32', got 'int8'"),
    ],
)
def test_limits(change, message):
    arguments = {
        "packed": torch.zeros(1, 68, dtype=torch.uint8),
        "weight": prepack(torch.zeros(10, 64, dtype=torch.uint8)),
        "weight_scale": torch.ones(10),
        **change,
    }
    with pytest.raises(AssertionError, match=message):
        simulate(packed_fp8_linear_bytes_kernel)(**arguments)
