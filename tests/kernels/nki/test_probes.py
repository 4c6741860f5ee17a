"""Probes for the first day on hardware: each construct that no kernel of AWS's uses, alone in a small kernel.

docs/hardware-day.md says what each is about and what to change should hardware not like it. On Trainium:
``python -m pytest -m neuron -k probe``. Here they run in the simulator, which says what our kernels expect.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch

from vllm_neuron_rmsq.kernels.nki.simulator import simulate

try:
    import nki
    import nki.isa as nisa
    import nki.language as nl
except ModuleNotFoundError:  # no Neuron SDK: the simulator's namespace
    from vllm_neuron_rmsq.kernels.nki.simulator import nki
    from vllm_neuron_rmsq.kernels.nki.simulator.nki import isa as nisa
    from vllm_neuron_rmsq.kernels.nki.simulator.nki import language as nl

ROWS = 128


@pytest.fixture(params=["nki-sim", pytest.param("nki", marks=pytest.mark.neuron)])
def launch(request) -> Callable:
    """Return a function that runs a kernel on tensors, in the simulator or on the device."""

    def simulated(kernel, *tensors):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a probe is about what the simulator warns of
            return simulate(kernel)(*tensors)

    def on_device(kernel, *tensors):
        # torch-neuronx compiles a kernel that is called on device tensors, at the first call.
        return kernel(*(tensor.to("neuron") for tensor in tensors)).cpu()

    return simulated if request.param == "nki-sim" else on_device


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """FP8 codes (uint8) of numbers within ±240."""
    return (randn(*shape, seed=seed) * 30).clamp(-240, 240).to(torch.float8_e4m3fn).view(torch.uint8)


def values(bytes_: torch.Tensor) -> torch.Tensor:
    return bytes_.view(torch.float8_e4m3fn).double()


@nki.jit
def gpsimd_rsqrt(x):
    """rsqrt on GpSimdE."""
    tile = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.rsqrt, operand0=0.0, engine=nisa.engine.gpsimd)
    out = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


def test_probe_rsqrt_on_gpsimd(launch):
    """Exact to 2^-20 over the whole range of a row's mean square; ScalarE's is documented for less of it."""
    x = 2.0 ** torch.linspace(-115, 125, ROWS).reshape(ROWS, 1)
    got = launch(gpsimd_rsqrt, x)
    assert ((got.double() * x.double().sqrt()) - 1).abs().max() <= 2.0**-20


@nki.jit
def gpsimd_uint32_multiply(x, y):
    """uint32 times uint32 on GpSimdE."""
    a = nl.ndarray(x.shape, dtype=nl.uint32, buffer=nl.sbuf)
    b = nl.ndarray(y.shape, dtype=nl.uint32, buffer=nl.sbuf)
    nisa.dma_copy(dst=a, src=x)
    nisa.dma_copy(dst=b, src=y)
    nisa.tensor_tensor(dst=a, data1=a, data2=b, op=nl.multiply, engine=nisa.engine.gpsimd)
    out = nl.ndarray(x.shape, dtype=nl.uint32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=a)
    return out


def test_probe_uint32_multiply_by_zero_and_one(launch):
    """Native integer arithmetic: four codes at a time stay as they are, or become zero."""
    x = codes(ROWS, 256).view(torch.uint32)
    keep = (torch.arange(ROWS) % 2).to(torch.int32).reshape(ROWS, 1).expand(ROWS, 64).contiguous()
    got = launch(gpsimd_uint32_multiply, x, keep.view(torch.uint32))
    assert torch.equal(got.view(torch.int32), x.view(torch.int32) * keep)


@nki.jit
def dma_add(x, y):
    """bf16 plus bf16 into fp32, inside the DMA engines."""
    tile = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_compute(dst=tile, srcs=[x, y], reduce_op=nl.add)
    out = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


def test_probe_dma_compute_of_mixed_dtypes(launch):
    """The sum is fp32's, not rounded to bf16 on the way."""
    x, y = randn(ROWS, 256).bfloat16(), (randn(ROWS, 256, seed=1) * 2.0**-9).bfloat16()
    assert torch.equal(launch(dma_add, x, y), x.float() + y.float())


@nki.jit
def scale_of_rows(packed):
    """The last four bytes of each packed row, as fp32."""
    width = packed.shape[1]
    tile = nl.ndarray((packed.shape[0], 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile.view(nl.uint8), src=packed[:, width - 4 : width])
    out = nl.ndarray((packed.shape[0], 1), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


@pytest.mark.parametrize("width", [256, 257, 258])
def test_probe_dma_of_four_bytes_a_row(launch, width):
    """Whatever boundary they lie on."""
    scale = randn(ROWS, 1).abs()
    packed = torch.cat([codes(ROWS, width), scale.view(torch.uint8)], dim=1)
    assert torch.equal(launch(scale_of_rows, packed), scale)


@nki.jit
def double_row(x, w):
    """``x [128, 2, T]`` by ``w [128, 2, N]``: 256 products a result, halves apart."""
    left = nl.ndarray(x.shape, dtype=nl.uint8, buffer=nl.sbuf)
    nisa.dma_copy(dst=left, src=x)
    return product_of(left.view(nl.float8_e4m3), w)


@nki.jit
def interleaved_double_row(x, w):
    """The same from ``x [128, 2 T]`` whose neighbouring bytes are a pair: stride 1 between halves."""
    left = nl.ndarray(x.shape, dtype=nl.uint8, buffer=nl.sbuf)
    nisa.dma_copy(dst=left, src=x)
    pairs = left.view(nl.float8_e4m3).reshape_dim(1, (x.shape[1] // 2, 2))
    return product_of(pairs.permute((0, 2, 1)), w)


def product_of(stationary, w):
    """``stationary [128, 2, T]`` FP8 on chip by ``w [128, 2, N]`` uint8 in HBM, to ``[T, N]`` fp32 in HBM."""
    rows, features = stationary.shape[2], w.shape[2]
    right = nl.ndarray(w.shape, dtype=nl.uint8, buffer=nl.sbuf)
    nisa.dma_copy(dst=right, src=w)
    bank = nl.ndarray((rows, features), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(
        dst=bank,
        stationary=stationary,
        moving=right.view(nl.float8_e4m3),
        accumulate=False,
        perf_mode=nisa.matmul_perf_mode.double_row,
    )
    result = nl.ndarray((rows, features), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=result, src=bank)
    out = nl.ndarray((rows, features), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=result)
    return out


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.einsum("pit,pin->tn", values(x), values(w))


@pytest.mark.parametrize("features", [512, 320, 96])
def test_probe_double_row(launch, features):
    """The form our matmul uses: halves a multiple of 32 bytes apart."""
    x, w = codes(ROWS, 2, ROWS), codes(ROWS, 2, features, seed=1)
    want = product(x, w)
    assert (launch(double_row, x, w).double() - want).abs().max() <= 2.0**-18 * want.abs().max()


def test_probe_double_row_of_one_row(launch):
    """A decode step of one sequence; our matmul gives the row twice unless this holds."""
    x, w = codes(ROWS, 2, 1), codes(ROWS, 2, 512, seed=1)
    want = product(x, w)
    assert (launch(double_row, x, w).double() - want).abs().max() <= 2.0**-18 * want.abs().max()


def test_probe_interleaved_double_row(launch):
    """The faster form, off in our kernels: no copy that takes pairs apart."""
    pairs, w = codes(ROWS, ROWS, 2), codes(ROWS, 2, 512, seed=1)
    want = product(pairs.permute(0, 2, 1), w)
    got = launch(interleaved_double_row, pairs.reshape(ROWS, 2 * ROWS).contiguous(), w)
    assert (got.double() - want).abs().max() <= 2.0**-18 * want.abs().max()


@nki.jit
def to_fp8(x):
    """fp32 to FP8 by ScalarE, as our kernels write codes."""
    tile = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
    zero = nl.ndarray((x.shape[0], 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    nisa.memset(zero, 0.0)
    result = nl.ndarray(x.shape, dtype=nl.float8_e4m3, buffer=nl.sbuf)
    nisa.activation(dst=result, op=nl.copy, data=tile, bias=zero)
    out = nl.ndarray(x.shape, dtype=nl.uint8, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=result.view(nl.uint8))
    return out


def test_probe_rounding_to_fp8(launch):
    """To the nearest, ties to even, subnormals among them."""
    steps = torch.arange(0, 0x77, dtype=torch.uint8)
    middle = (values(steps) + values(steps + 1)) / 2
    x = torch.cat([values(steps), middle, -middle]).float().expand(ROWS, -1).contiguous()
    got = launch(to_fp8, x)
    assert torch.equal(got & 0x7F, x.to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F)


def test_probe_fp8_overflow(launch, record_property):
    """Beyond 240: Inf or the largest code? Our kernels clip before, so either will do; this says which."""
    got = launch(to_fp8, torch.full((ROWS, 4), 1000.0))
    record_property("code of 1000", hex(int(got[0, 0])))
    assert int(got[0, 0]) in (0x78, 0x77), "neither Inf nor the largest code"


@nki.jit
def maximum(x, y):
    """max(x, y) on VectorE."""
    a = nl.ndarray(x.shape, dtype=nl.float16, buffer=nl.sbuf)
    b = nl.ndarray(x.shape, dtype=nl.float16, buffer=nl.sbuf)
    nisa.dma_copy(dst=a, src=x)
    nisa.dma_copy(dst=b, src=y)
    nisa.tensor_tensor(dst=a, data1=a, data2=b, op=nl.maximum, engine=nisa.engine.vector)
    out = nl.ndarray(x.shape, dtype=nl.float16, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=a)
    return out


def test_probe_maximum_with_nan(launch, record_property):
    """NaN or the number? Our kernels do not rely on either; whatever comes must be one of the two."""
    nan, one = torch.full((ROWS, 8), math.nan).half(), torch.ones(ROWS, 8).half()
    got = launch(maximum, nan, one)
    record_property("max(NaN, 1)", float(got[0, 0]))
    assert (got.isnan() | (got == 1)).all()
    assert torch.equal(launch(maximum, one, 2 * one), 2 * one)
