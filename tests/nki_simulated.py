"""Steps of a kernel on the simulated nki, for the tests of its instructions and rules."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from vllm_neuron_rmsq.kernels.nki.simulator import (
    NkiSimulationError,
    as_nki,
    simulate,
)

with as_nki():
    import nki
    import nki.isa as nisa
    import nki.language as nl

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3
RNG = np.random.default_rng(7)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(np.float32).astype(dtype)


@nki.jit
def one_step(step, shape, dtype, inputs, buffer=nl.sbuf):
    """Load `inputs`, let `step(dst, *tiles)` fill a tile, store it."""
    tiles = []
    for array in inputs:
        tile = nl.ndarray(array.shape, dtype=array.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=array)
        tiles.append(tile)
    dst = nl.ndarray(shape, dtype=dtype, buffer=buffer)
    step(dst, *tiles)
    if buffer == nl.psum:
        copy = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=copy, src=dst)
        dst = copy
    out = nl.ndarray(shape, dtype=dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=dst)
    return out


def run(step, shape, dtype, *inputs, **kwargs):
    return simulate(one_step)(step, shape, dtype, inputs, **kwargs)


def body(statements):
    """Run `statements()`, which needs no input and gives no output, as a kernel."""
    return simulate(call_body)(statements)


def call_body(statements):
    statements()


def breaks(match, statements):
    with pytest.raises(NkiSimulationError, match=match):
        body(statements)


def sbuf(shape, dtype=nl.float32, value=1, name="", address=None):
    tile = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf, name=name, address=address)
    if value != None:  # noqa: E711
        nisa.memset(tile, value)
    return tile


def psum(shape, dtype=nl.float32, value=1, name="", address=None):
    tile = nl.ndarray(shape, dtype=dtype, buffer=nl.psum, name=name, address=address)
    if value != None:  # noqa: E711
        nisa.memset(tile, value)
    return tile


@nki.jit
def doubled(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    rows = x.shape[0] // nl.num_programs()
    start = nl.program_id(0) * rows
    tile = nl.load(x[start : start + rows])
    nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
    nl.store(out[start : start + rows], tile)
    return out
