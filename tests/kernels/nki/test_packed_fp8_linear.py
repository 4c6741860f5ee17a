"""The NKI matmul of packed rows against float64, in the simulator, and with ``-m neuron`` on hardware."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_neuron_rmsq import ops, reference
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


def block_scales(features: int, width: int) -> torch.Tensor:
    return torch.rand(-(-features // 128), -(-width // 128)) * 0.1


def assert_product(out, codes, scale, weight, weight_scale, bias) -> None:
    """``out`` within its rounding, and fp32 accumulation, of the float64 product."""
    exact, accumulated = oracle.packed_fp8_linear(
        codes.view(torch.uint8), scale.reshape(-1, 1), weight.view(torch.uint8), weight_scale, bias
    )
    error = (out.cpu().double() - exact).abs()
    subnormal = 2.0**-25 if out.dtype == torch.float16 else 0.0  # half of the least fp16
    assert (error <= ROUNDING[out.dtype] * exact.abs() + 2.0**-18 * accumulated + subnormal).all()


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


@pytest.mark.parametrize(
    ("rows", "width", "features"),
    [
        (1, 64, 5),
        (1, 576, 300),  # four blocks of H at a time, and one left
        (32, 1536, 576),
        (33, 700, 130),  # two at a time, a last one of 60
        (7, 577, 960),
        (130, 2050, 70),
        (64, 256, 1300),  # results of two blocks of features leave together
        (200, 130, 33),
    ],
)
@pytest.mark.parametrize("static", [False, True])
def test_kernel_scales_the_sums_of_blocks(backend, monkeypatch, rows, width, features, static):
    torch.manual_seed(rows + width + features)
    if backend == "nki-sim":
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "2" if static else "1")
    codes, weight, weight_scale = fp8(rows, width), fp8(features, width), block_scales(features, width)
    scale = torch.full((1,), 0.3) if static else torch.rand(rows) * 0.01
    packed = codes.view(torch.uint8) if static else fmt.pack(codes, scale)
    for bias in (None, torch.randn(features).bfloat16()):
        out = ops.packed_fp8_linear(
            place(packed, backend),
            place(weight, backend),
            place(weight_scale, backend),
            bias=place(bias, backend),
            static_scale=place(scale, backend) if static else None,
            out_dtype=torch.float32 if static else torch.bfloat16,
            backend=backend,
        )
        assert out.shape == (rows, features)
        assert_product(out, codes, scale, weight, weight_scale, bias)


@pytest.mark.parametrize(("rows", "width", "features"), [(1, 576, 960), (129, 577, 130), (300, 1024, 70)])
def test_static_codes_give_what_rows_with_that_scale_give(backend, rows, width, features):
    codes, weight, scale = fp8(rows, width), fp8(features, width), torch.tensor([0.07])
    for weight_scale in (torch.rand(features), torch.rand(1), block_scales(features, width)):
        prepacked = ops.prepack_fp8_weight(place(weight, backend), place(weight_scale, backend), backend)
        out = [
            ops.packed_fp8_linear(
                place(rows_or_codes, backend),
                prepacked,
                place(weight_scale, backend),
                static_scale=place(static_scale, backend),
            )
            for rows_or_codes, static_scale in (
                (fmt.pack(codes, scale.expand(rows)), None),
                (codes.view(torch.uint8), scale),
            )
        ]
        assert torch.equal(*out)


@given(
    rows=st.integers(1, 140),
    width=st.integers(1, 700),
    features=st.integers(1, 300),
    seed=st.integers(0, 99),
    static=st.booleans(),
    blocks=st.booleans(),
    bias_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    out_dtype=st.sampled_from(list(ROUNDING)),
    lost=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_any_shape_and_scale(rows, width, features, seed, static, blocks, bias_dtype, out_dtype, lost):
    torch.manual_seed(seed)
    codes, weight = fp8(rows, width), fp8(features, width)
    weight_scale = block_scales(features, width) if blocks else torch.rand(features) * 0.1
    bias = None if bias_dtype is None else torch.randn(features).to(bias_dtype)
    scale = torch.full((1,), 0.003) if static else torch.rand(rows) * 0.01
    packed = codes.view(torch.uint8).clone() if static else fmt.pack(codes, scale)
    if lost:
        packed[rows // 2] = fmt.NAN_CODE  # invalid in either form
    out = ops.packed_fp8_linear(
        packed, weight, weight_scale, bias=bias, static_scale=scale if static else None,
        out_dtype=out_dtype, backend="nki-sim",
    )  # fmt: skip
    if lost:
        assert out[rows // 2].isnan().all()
        out[rows // 2] = reference.packed_fp8_linear(
            fmt.pack(codes, scale.expand(rows)), weight, weight_scale, bias=bias, out_dtype=out_dtype
        )[rows // 2]
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


@pytest.mark.parametrize("ocp", [False, True])
def test_the_entry_for_graphs_takes_static_codes_and_block_scales(ocp, monkeypatch):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3" if ocp else "trn2")
    codes, weight, scale = fp8(9, 300), fp8(20, 300), torch.full((128, 1), 0.5)
    arguments = codes.view(torch.uint8), prepack(weight.view(torch.uint8), True), block_scales(20, 300)
    got = simulate(packed_fp8_linear_bytes_kernel)(
        *arguments, out_dtype="float32", ocp=ocp, static_scale=scale, digest=digest()
    )
    mode = source.DtypeMode.OCP if ocp else source.DtypeMode.NON_OCP
    want = simulate(packed_fp8_linear_kernel)(
        *arguments, out_dtype=source.OUT_DTYPES["float32"], dtype_mode=mode, static_scale=scale
    )
    assert torch.equal(got, want)
    assert_product(got, codes, scale[:1], weight, arguments[2], None)


@pytest.mark.parametrize(("rows", "width"), [(1, 32768), (70, 32768)])
def test_longest_contractions_with_block_scales_fit(rows, width):
    codes, weight, scale = fp8(rows, width), fp8(100, width), torch.rand(rows) * 0.01
    weight_scale, bias = block_scales(100, width), torch.randn(100)
    arguments = fmt.pack(codes, scale), prepack(weight.view(torch.uint8), True), weight_scale, bias
    out = simulate(packed_fp8_linear_bytes_kernel, 2)(*arguments, "float32")
    assert_product(out, codes, scale, weight, weight_scale, bias)


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


def test_wider_apart_and_copied_by_dma(monkeypatch):
    """Halves of operands 128 bytes apart as in AWS's kernels, which are added in another order; scales by DMA
    to all partitions."""
    codes, weight, scale = fp8(70, 600), fp8(700, 600), torch.rand(70)
    packed, weight_scale, bias = fmt.pack(codes, scale), torch.rand(700), torch.randn(700)
    monkeypatch.setattr(source, "ALIGNMENT", 128)
    monkeypatch.setattr(common, "SHUFFLE_FROM", 1024)
    got = simulate(packed_fp8_linear_kernel)(packed, prepack(weight.view(torch.uint8)), weight_scale, bias)
    assert_product(got, codes, scale, weight, weight_scale, bias)


@pytest.mark.parametrize(("rows", "width"), [(1, 65536), (129, 65535), (128, 65536), (300, 28672)])
def test_longest_contractions_fit(rows, width):
    codes, weight, scale = fp8(rows, width), fp8(100, width), torch.rand(rows) * 0.01
    packed, prepacked = fmt.pack(codes, scale), prepack(weight.view(torch.uint8))
    weight_scale, bias = torch.rand(100), torch.randn(100)
    out = simulate(packed_fp8_linear_bytes_kernel, 2)(packed, prepacked, weight_scale, bias, "float32")
    assert_product(out, codes, scale, weight, weight_scale, bias)


@given(st.integers(1, 3000), st.integers(1, 20000), st.booleans())
def test_layout_fits_the_hardware(features, width, blocks):
    partitions, chunks, block = layout(features, width, blocks)
    assert not blocks or partitions == 128 or chunks == 1, "blocks of H are on 64 partitions each"
    pairs = -(-width // 2)
    assert partitions <= 128
    assert (chunks - 1) * partitions < pairs <= chunks * partitions
    assert 1 <= block <= min(512, features)
    assert 2 * chunks * block <= source.BLOCK_BYTES
    assert block % 32 == 0 or block == features


@given(st.integers(1, 700), st.integers(1, 600), st.booleans(), st.randoms(use_true_random=False))
def test_prepack_puts_every_code_where_it_says(features, width, blocks, random):
    weight = torch.randint(0, 256, (features, width), dtype=torch.uint8)
    packed = prepack(weight, blocks)
    partitions, chunks, block = layout(features, width, blocks)
    assert packed.shape == source.prepacked_shape(features, width, blocks)
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
        ({"weight_scale": torch.ones(2, 1)}, r"weight_scale: expected shape \[1, 1\], got \[2, 1\]"),
        (
            {
                "packed": torch.zeros(1, 32773, dtype=torch.uint8),
                "weight_scale": torch.ones(1, 257),
            },
            "packed: expected 1 <= H <= 32768, got 32769",
        ),
        (
            {"packed": torch.zeros(1, 64, dtype=torch.uint8), "static_scale": torch.ones(1)},
            r"static_scale: expected shape \[128, 1\] of float32, got \[1\] of float32",
        ),
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
