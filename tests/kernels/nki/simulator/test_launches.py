"""Launching kernels: grids, barriers, arrays in and out, and the Neuron SDK's own nki."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from nki_simulated import doubled, nisa, nki, nl, normal, sbuf

from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationError, as_nki, cost, simulate


@pytest.mark.parametrize("grid", [None, 1, 2, (2,)])
def test_programs_share_hbm(grid):
    x = normal(64, 32)
    np.testing.assert_array_equal(simulate(doubled, grid)(x), 2 * x)


def test_bracket_syntax_and_calling_a_kernel_directly():
    x = normal(64, 32)
    np.testing.assert_array_equal(simulate(doubled[2])(x), 2 * x)
    np.testing.assert_array_equal(nki.simulate(doubled[2])(x), 2 * x)
    np.testing.assert_array_equal(doubled(x), 2 * x)


@pytest.mark.parametrize("grid", [0, (2, 2), 1000, 3, 4])
def test_grids_that_cannot_be_launched(grid):
    with pytest.raises(ValueError, match="grid: expected"):
        simulate(doubled, grid)(normal(64, 32))


def exchange(x, barrier):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    shared = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    me, rows = nl.program_id(), x.shape[0] // 2
    mine, other = nl.ds(me * rows, rows), nl.ds((1 - me) * rows, rows)
    nl.store(shared[mine], nl.load(x[mine]))
    if barrier:
        nisa.core_barrier(shared, (0, 1))
    nl.store(out[mine], nl.load(shared[other]))
    return out


def test_a_barrier_lets_programs_read_what_the_other_wrote():
    x = normal(8, 4)
    np.testing.assert_array_equal(simulate(exchange, 2)(x, True), np.concatenate([x[4:], x[:4]]))


def test_programs_that_race_or_wait_for_ever_are_caught():
    x = normal(8, 4)
    with pytest.raises(NkiSimulationError, match="unwritten bytes"):
        simulate(exchange, 2)(x, False)

    def read_first(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        if nl.program_id() == 0:
            nl.store(out, nl.load(x))
        else:
            nl.load(out)
        return out

    def both_write(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        tile = nl.load(x)
        nisa.tensor_scalar(tile, tile, nl.add, float(nl.program_id()))
        nl.store(out, tile)
        return out

    def write_what_was_read(x):
        if nl.program_id() == 0:
            nl.load(x)
        else:
            nl.store(x, sbuf(x.shape))

    def wait_alone(x):
        if nl.program_id() == 0:
            nisa.core_barrier(x, (0, 1))

    with pytest.raises(NkiSimulationError, match=r"same barrier, got only programs \[0\]"):
        simulate(wait_alone, 2)(x)
    with pytest.raises(NkiSimulationError, match="program 1 reads bytes that program 0 wrote"):
        simulate(read_first, 2)(x)
    with pytest.raises(NkiSimulationError, match="program 1 writes bytes that program 0 wrote"):
        simulate(both_write, 2)(x)
    with pytest.raises(NkiSimulationError, match="program 1 writes bytes that another program reads"):
        simulate(write_what_was_read, 2)(x)


def test_two_programs_may_write_the_same_bytes():
    def both(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        for _ in range(2):
            nl.store(out, nl.load(x))
            nl.load(out)
        return out

    x = normal(4, 4)
    np.testing.assert_array_equal(simulate(both, 2)(x), x)


def test_programs_may_return_an_argument_that_both_wrote():
    def halves(x):
        me, rows = nl.program_id(), x.shape[0] // 2
        nl.store(x[nl.ds(me * rows, rows)], sbuf((rows, x.shape[1]), value=me))
        return x

    assert simulate(halves, 2)(normal(4, 2)).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_sendrecv_exchanges_tiles_between_two_programs():
    def swap(x, wrong_rank, gpsimd):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        me, rows = nl.program_id(), x.shape[0] // 2
        mine = nl.load(x[nl.ds(me * rows, rows)])
        theirs = nl.ndarray(mine.shape, mine.dtype)
        for pipe in range(2):
            nisa.sendrecv(
                mine,
                theirs,
                send_to_rank=me if wrong_rank else 1 - me,
                recv_from_rank=1 - me,
                pipe_id=pipe,
                dma_engine=nisa.dma_engine.gpsimd_dma if gpsimd else nisa.dma_engine.dma,
            )
            nisa.tensor_copy(mine, theirs)
        nl.store(out[nl.ds((1 - me) * rows, rows)], theirs)
        return out

    x = normal(8, 6)
    np.testing.assert_array_equal(simulate(swap, 2)(x, False, True), x[[4, 5, 6, 7, 0, 1, 2, 3]])
    with pytest.raises(NkiSimulationError, match="a program that sends to 0, got 1, which sends to 1"):
        simulate(swap, 2)(x, True, False)
    with pytest.raises(NkiSimulationError, match="a grid of 2"):
        simulate(swap)(x, False, False)
    with pytest.raises(NkiSimulationError, match="at most 1024 B per partition with gpsimd_dma, got 1200"):
        simulate(swap, 2)(normal(8, 300), False, True)


@pytest.mark.parametrize("buffer", [nl.private_hbm, nl.hbm])
def test_results_are_in_shared_hbm(buffer):
    def result(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=buffer)
        nisa.dma_copy(out, x)
        return out

    def given(x):
        return x

    with pytest.raises(NkiSimulationError, match=r"return: result: .*buffer=nl.shared_hbm"):
        simulate(result)(normal(4, 4))
    x = normal(4, 4)
    np.testing.assert_array_equal(simulate(given)(x), x)


def test_programs_must_allocate_shared_memory_alike():
    def kernel(x):
        return nl.zeros((4, 4 + nl.program_id()), dtype=nl.float32, buffer=nl.shared_hbm)

    with pytest.raises(NkiSimulationError, match="shared_hbm allocation 0"):
        simulate(kernel, 2)(normal(2, 2))


def test_each_program_has_a_core_of_its_own():
    x = normal(2, 57344)
    out = simulate(doubled, 2)(x)
    np.testing.assert_array_equal(out, 2 * x)


def test_inputs_are_updated_in_place_and_may_be_strided_or_read_only():
    def clear(x):
        nl.store(x, sbuf(x.shape, value=0))

    x = normal(8, 8)
    simulate(clear)(x)
    assert not x.any()
    wide = normal(8, 8)
    simulate(clear)(wide[:, ::2])
    assert not wide[:, ::2].any() and wide[:, 1::2].all()
    fixed = normal(64, 4)
    fixed.flags.writeable = False
    np.testing.assert_array_equal(simulate(doubled)(fixed), 2 * fixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_in_torch_out(dtype):
    x = torch.randn(64, 8).to(dtype)
    got = simulate(doubled)(x)
    assert isinstance(got, torch.Tensor) and got.dtype == dtype
    torch.testing.assert_close(got, x * 2, rtol=0, atol=0)


def test_fp8_bytes_pass_between_torch_and_nki():
    codes = torch.arange(0x00, 0x78, dtype=torch.uint8).reshape(8, 15)

    def decode(codes):
        out = nl.ndarray(codes.shape, dtype=nl.float32, buffer=nl.shared_hbm)
        same = nl.ndarray(codes.shape, dtype=nl.float8_e4m3, buffer=nl.shared_hbm)
        tile = nl.load(codes)
        nisa.dma_copy(dst=out, src=tile.view(nl.float8_e4m3))
        nisa.dma_copy(dst=same, src=tile.view(nl.float8_e4m3))
        return out, same

    values, same = simulate(decode)(codes)
    torch.testing.assert_close(values, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0)
    assert same.dtype == torch.uint8 and torch.equal(same, codes)
    fn = simulate(doubled)(codes.view(torch.float8_e4m3fn)[:, :8])
    assert fn.dtype == torch.float8_e4m3fn


@dataclass
class Arguments(nl.NKIObject):
    factor: float


def test_objects_and_tuples_are_arguments_but_lists_are_not():
    def kernel(pair, arguments):
        tile = nl.load(pair[0])
        nisa.tensor_tensor(tile, tile, nl.load(pair[1]), nl.add)
        nisa.tensor_scalar(tile, tile, nl.multiply, arguments.factor)
        out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
        nl.store(out, tile)
        return out

    x, y = normal(4, 4), normal(4, 4)
    np.testing.assert_array_equal(simulate(kernel)((x, y), Arguments(2.0)), (x + y) * 2)
    with pytest.raises(NkiSimulationError, match="lists are no kernel arguments"):
        simulate(kernel)([x, y], Arguments(2.0))


class Bare(nl.NKIObject):
    rows: int
    factor: float = 2.0
    sum: float = None

    def __post_init__(self):
        self.sum = self.rows + self.factor


class Wider(Bare):
    extra: int = 7


def test_an_object_without_init_takes_its_annotated_fields():
    assert (Bare(1).rows, Bare(1).factor, Bare(1).sum) == (1, 2.0, 3.0)
    assert Bare(rows=4, factor=1.0).sum == 5.0
    wide = Wider(1, 2, extra=9)
    assert (wide.factor, wide.extra) == (2, 9)
    for wrong in (lambda: Bare(1, 2, 3, 4), lambda: Bare(1, rows=1), lambda: Bare(none=1)):
        with pytest.raises(TypeError, match="Bare takes rows, factor, sum"):
            wrong()


@dataclass
class Untyped(nl.NKIObject):
    rows = None
    factor: float = 2.0
    last: int


def test_attributes_without_annotation_are_fields_too():
    assert (Untyped(rows=3).rows, Untyped().factor, Untyped().last) == (3, 2.0, None)


def test_versions_are_in_order_and_constants_have_a_module():
    with as_nki():
        from nki.isa.constants import dge_mode, nc_version
    assert nc_version.gen2 < nisa.nc_version.gen3 < nc_version.gen4
    assert dge_mode is nisa.dge_mode and nki.dtype is str


def test_language_calls_make_tiles():
    def kernel(x, row):
        tile, wide = nl.load(x), nl.broadcast_to(nl.load(row), x.shape)
        result = nl.add(nl.multiply(nl.exp(tile), 2.0), wide)
        result = nl.subtract(result, nl.max(result, axis=1, keepdims=True))
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.maximum(result, nl.full(x.shape, -1.0, x.dtype)))
        return out

    x, row = normal(100, 700), normal(1, 700)
    want = np.exp(x) * 2 + row
    want = np.maximum(want - want.max(1, keepdims=True), -1)
    np.testing.assert_allclose(simulate(kernel)(x, row), want, rtol=1e-5, atol=1e-5)


def test_as_nki_puts_back_what_was_there():
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "nki"}
    marker = type(sys)("nki")
    sys.modules["nki"] = marker
    try:
        with as_nki() as ours:
            import nki.isa
            import nki.language
            import nki.typing

            assert nki is ours and sys.modules["nki.isa"] is ours.isa and nki.language is ours.language
        assert sys.modules["nki"] is marker and "nki.isa" not in sys.modules
        with pytest.raises(RuntimeError), as_nki():
            raise RuntimeError
        assert sys.modules["nki"] is marker
    finally:
        del sys.modules["nki"]
        sys.modules.update(before)


def test_a_kernel_of_the_neuron_sdk_runs_in_its_simulator(monkeypatch):
    """A stand-in for the SDK: a module ``nki`` whose jit makes objects of a class of its own."""

    class Jitted:
        __module__ = "nki.kernel"

        def __init__(self, grid=None):
            self.grid = grid

        def __getitem__(self, grid):
            return Jitted(grid)

    sdk = type(sys)("nki")
    sdk.simulate = lambda kernel: (
        lambda x: (kernel.grid, x, os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE"))
    )
    monkeypatch.setitem(sys.modules, "nki", sdk)
    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE", raising=False)
    assert simulate(Jitted())(5) == (None, 5, None)
    assert simulate(Jitted(), (2,), target="trn2")(5) == (2, 5, "trn2")
    assert "NEURON_PLATFORM_TARGET_OVERRIDE" not in os.environ
    with pytest.raises(NkiSimulationError, match="under as_nki"):
        cost(Jitted())
    plain = type(lambda: 0)(compile("0", "f", "eval"), {"nki": sdk})
    sdk.simulate = lambda kernel: lambda: kernel
    assert simulate(plain)() is plain


def test_nki_calls_outside_of_a_kernel_are_refused():
    with pytest.raises(NkiSimulationError, match="outside of a kernel"):
        sbuf((4, 4))
