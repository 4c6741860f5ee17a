"""The cost model against kernels counted by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from nki_simulated import BF16, body, breaks, call_body, doubled, nisa, nki, nl, normal, psum, run, sbuf

from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationError, cost, simulate


@nki.jit
def hand_counted(x, w):
    """One instruction of each priced kind on [128, 1024] tiles."""
    out = nl.ndarray((128, 1024), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    a = nl.load(x)
    weight = nl.load(w)
    b = nl.ndarray((128, 1024), dtype=nl.bfloat16, buffer=nl.sbuf)
    wide = nl.ndarray((128, 1024), dtype=nl.float32, buffer=nl.sbuf)
    one = nl.ndarray((128, 1), dtype=nl.float32, buffer=nl.sbuf)
    product = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
    nisa.tensor_copy(b, a)  # 1024 / 4
    nisa.tensor_copy(b[:, 0:512], a[:, 0:1024:2])  # 512 / 2: strided
    nisa.tensor_copy(wide, a)  # 1024: fp32
    nisa.tensor_tensor(b, b, a, nl.add)  # 1024 / 2: all bf16
    nisa.tensor_tensor(wide, b, a, nl.add)  # 2 * 1024: fp32
    nisa.tensor_reduce(one, nl.maximum, b, 1)  # 1024
    nisa.reciprocal(one, one)  # 64 at least
    nisa.activation_reduce(wide, nl.square, a, nl.add, one)  # 1024 + 64
    nisa.nc_matmul(product, weight, a[:, 0:512])  # 512
    nisa.nc_matmul(product[:, 0:1], weight, a[:, 0:1], accumulate=False)  # 64 at least
    nisa.tensor_copy(b[:, 0:512], product)  # 512: fp32 in PSUM
    nl.store(out, b)
    return out


def test_cost_of_a_kernel_counted_by_hand():
    report = cost(hand_counted)(normal(128, 1024, dtype=BF16), normal(128, 128, dtype=BF16))
    engines = report.engines
    assert engines["VectorE"].cycles == 256 + 256 + 1024 + 512 + 2048 + 1024 + 64 + 512
    assert engines["VectorE"].instructions == 8
    assert engines["VectorE"].time_us == pytest.approx(5696 / 960)
    assert engines["ScalarE"].cycles == 1024 + 64 and engines["ScalarE"].time_us == pytest.approx(1088 / 1200)
    assert engines["TensorE"].cycles == 512 + 64 and engines["TensorE"].time_us == pytest.approx(576 / 2400)
    tile, weight = 128 * 1024 * 2, 128 * 128 * 2
    assert report.bytes["HBM->SBUF"] == tile + weight and report.bytes["SBUF->HBM"] == tile
    assert engines["DMA"].time_us == pytest.approx((2 * tile + weight) / 368e3)
    assert report.dma_roofline_us == pytest.approx(engines["DMA"].time_us)
    assert report.hbm_roofline_us == pytest.approx((2 * tile + weight) / 375e3)
    assert report.bound == "VectorE" and report.time_us == engines["VectorE"].time_us
    assert report.worst.peaks == {"SBUF": 2048 + 256 + 2048 + 4096 + 4, "PSUM": 2048}
    assert report.worst.short_run_bytes == weight
    text = str(report)
    assert text.startswith("MODEL") and "VectorE" in text and "bound: VectorE, 5.9 us" in text


def test_cost_of_dma_transposes_and_sums():
    def kernel(x):
        turned = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(turned, x)
        again = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(again, turned)
        nisa.dma_compute(x, [x, again], nl.add)

    report = cost(kernel)(normal(128, 128, dtype=BF16))
    size = 128 * 128 * 2
    assert report.engines["DMA"].time_us == pytest.approx((size / 0.9 + size / 0.5 + 2 * size) / 368e3)
    assert report.bytes == {"HBM->SBUF": size, "SBUF->SBUF": size, "HBM->HBM": size, "SBUF->HBM": size}


def test_cost_of_a_grid_is_its_slowest_program():
    def uneven(x):
        rows = nl.ds(0, 32) if nl.program_id() == 0 else nl.ds(32, 96)
        tile = nl.load(x[rows])
        for _ in range(1 + nl.program_id()):
            nisa.activation(tile, nl.copy, tile)

    report = cost(uneven, 2)(normal(128, 600))
    assert [p.engines["ScalarE"].cycles for p in report.programs] == [600, 1200]
    assert report.worst is report.programs[1] and "programs: 2" in str(report)
    assert report.bytes["HBM->SBUF"] == 128 * 600 * 4


def test_the_target_decides_what_is_allowed(monkeypatch):
    def ocp(d, a, b):
        nisa.nc_matmul(d, a, b, perf_mode=nisa.matmul_perf_mode.double_row)

    def version():
        assert nisa.get_nc_version() == nisa.nc_version.gen4
        sbuf((1, 65536))

    def mixed():
        nisa.nc_matmul(psum((4, 4)), sbuf((4, 4), dtype=nl.float8_e4m3fn), sbuf((4, 4), dtype=nl.float8_e4m3))

    codes = normal(2, 128, 2, 16, dtype=ml_dtypes.float8_e4m3fn)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    got = run(ocp, (16, 16), nl.float32, *codes, buffer=nl.psum)
    x, y = (c.astype(np.float32).reshape(256, 16) for c in codes)
    np.testing.assert_allclose(got, x.T @ y, rtol=1e-5, atol=1e-4)
    body(version)
    breaks("not in one matmul", mixed)
    with pytest.raises(NotImplementedError, match="Trainium2 only"):
        cost(doubled)(normal(4, 4))
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "gen2")
    breaks("at most 196608 B of SBUF", lambda: sbuf((1, 57344)))
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn9")
    with pytest.raises(ValueError, match="expected one of trn1, trn2, trn3, got 'trn9'"):
        simulate(doubled)(normal(4, 4))
    simulate(call_body, target="trn3")(version)
    with pytest.raises(NkiSimulationError, match="at most 229376 B"):
        simulate(call_body, target="trn2")(lambda: sbuf((1, 65536)))


@nki.jit
def pairs(x, y):
    """VectorE's instructions with two inputs, on [128, 1024]."""
    a, b = nl.load(x), nl.load(y)
    wide = nl.ndarray((128, 1024), dtype=nl.float32, buffer=nl.sbuf)
    half = nl.ndarray((128, 1024), dtype=nl.bfloat16, buffer=nl.sbuf)
    bank = nl.ndarray((128, 1024), dtype=nl.float32, buffer=nl.psum)
    nisa.memset(bank, 1.0)  # 1024
    nisa.memset(half, 0)  # 512: zeros of 16 bits
    nisa.tensor_tensor(half, a, b, nl.maximum)  # 512, or 1024 under the careful reading
    nisa.tensor_tensor(wide, a, bank, nl.add)  # 1024: one in PSUM
    nisa.scalar_tensor_tensor(wide, a, nl.multiply, 2.0, nl.add, b)  # 2048
    nisa.scalar_tensor_tensor(wide, a, nl.multiply, 2.0, nl.add, bank)  # 1024: one in PSUM
    nisa.scalar_tensor_tensor(wide, a, nl.subtract, 2.0, nl.multiply, b)  # 1024: bf16 mode
    nisa.tensor_reduce(half[:, 0:1], nl.maximum, a, 1)  # 512: bf16 mode


def test_cost_of_instructions_with_two_inputs():
    report = cost(pairs)(*normal(2, 128, 1024, dtype=BF16))
    assert report.engines["VectorE"].cycles == 1024 + 512 + 512 + 1024 + 2048 + 1024 + 1024 + 512
    assert report.worst.careful_vector_us == pytest.approx(report.engines["VectorE"].time_us + 512 / 960)
    assert "VectorE: 8.5 us if tensor_tensor's 16-bit mode" in str(report)


def test_tile_sizes_are_the_hardwares():
    assert nl.tile_size.pmax == 128 and nl.tile_size.psum_fmax == 512
    assert nl.tile_size.gemm_moving_fmax == 512 and nl.tile_size.gemm_stationary_fmax == 128
    assert nl.tile_size.total_available_sbuf_size == nl.tile_size.sbuf_fmax_bytes == 229376
    assert nl.tile_size.sbuf_size_bytes == 28 * 2**20 and nl.tile_size.sbuf_fmax == 57344
    assert nisa.get_nc_version() == nisa.nc_version.gen3
