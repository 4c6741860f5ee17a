"""Instructions of TensorE: the matmul and the transpose (which VectorE has too)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import cost_model, hardware
from ... import machine as _machine
from ...operands import bits, caution, check, numbers, put, put_bits, tile
from ...tensor import NkiTensor
from . import constants
from .instruction import Busy, choose, instruction

_WIDE_FLOATS = ("tfloat32", "float32")


@instruction(engine="tensor")
def nc_matmul(
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: Sequence[int] = (),
    tile_size: Sequence[int] = (),
    perf_mode: Any = constants.matmul_perf_mode.none,
    name: str | None = None,
) -> Busy:
    """``dst (+)= stationary.T @ moving``; contraction along the partitions (and a first free dimension of 2
    with ``double_row``), accumulation in fp32 in PSUM."""
    dst = tile("dst", dst, ("psum",))
    double = perf_mode == constants.matmul_perf_mode.double_row
    here = _machine.current().target
    check(here.double_row or not double, "perf_mode", f"none on {here.generation}", perf_mode)
    floats = here.matmul_fp8 if double else (*here.matmul_fp8, "bfloat16", "float16", *_WIDE_FLOATS)
    stationary = tile("stationary", stationary, ("sbuf",), floats)
    moving = tile("moving", moving, ("sbuf",), floats)
    wide = [t.dtype in _WIDE_FLOATS for t in (stationary, moving)]
    check(wide[0] == wide[1], "moving", "fp32/tf32 only together with fp32/tf32", (stationary, moving))
    formats = {stationary.dtype, moving.dtype}
    both = formats == {"float8_e4m3", "float8_e4m3fn"}
    check(not both, "moving", "float8_e4m3 and float8_e4m3fn not in one matmul", formats)
    check(
        dst.dtype == "float32" or (is_transpose and dst.dtype == stationary.dtype),
        "dst", "float32 (or stationary's dtype with is_transpose)", dst,
    )  # fmt: skip
    check(not (is_transpose and double), "perf_mode", "none with is_transpose", perf_mode)
    columns, elements = _matmul_free(stationary, double), _matmul_free(moving, double)
    _doubtful_patterns(stationary, moving, double)
    rows, width = _matmul_tiling(stationary, tile_position, tile_size, double)
    k = stationary.shape[0]
    check(moving.shape[0] == k, "moving", f"{k} partitions, as stationary", moving)
    check(k <= rows, "stationary", f"at most {rows} partitions", k)
    check(columns <= width, "stationary", f"a free size of at most {width}", columns)
    limit = hardware.MATMUL_MOVING_FREE
    check(elements <= limit, "moving", f"a free size of at most {limit}", elements)
    fits = dst.shape[0] == columns and dst.free_size == elements
    check(fits, "dst", f"{columns} partitions of {elements} elements", dst)
    _inside_bank(dst)
    left = numbers("stationary", stationary).reshape(-1, columns)
    right = numbers("moving", moving).reshape(-1, elements)
    _accumulate_psum(dst, _product(left, right), accumulate)
    busy = cost_model.matmul_cycles(columns, elements, stationary.dtype)
    return Busy(busy, (dst, stationary, moving))


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left.T @ right`` in pieces small enough that the BLAS keeps to this thread.

    Above 2^18 multiplications OpenBLAS wakes its threads, which on a busy machine spin for longer than
    the product takes; below, the stacked pieces are as fast as one thread at the whole.
    """
    (k, m), n = left.shape, right.shape[1]
    step = max(1, 2**18 // (k * m))
    whole = n // step * step
    product = np.empty((m, n), np.float32)
    with np.errstate(all="ignore"):
        pieces = right[:, :whole].reshape(k, whole // step, step).transpose(1, 0, 2)
        product[:, :whole] = (left.T @ pieces).transpose(1, 0, 2).reshape(m, whole)
        product[:, whole:] = left.T @ right[:, whole:]
    return product


def _matmul_free(t: NkiTensor, double: bool) -> int:
    if not double:
        return t.free_size
    check(t.ndim >= 3 and t.shape[1] == 2, "perf_mode", "operands [partitions, 2, free] (double_row)", t)
    return t.free_size // 2


def _doubtful_patterns(stationary: NkiTensor, moving: NkiTensor, double: bool) -> None:
    """Warn of patterns that documents do not refuse and that are known or feared to compute something else.

    A stationary of two free dimensions gave wrong products on Trn2 (public tests of another kernel say so).
    With double_row every published kernel has the two halves of a pair apart, dense and an even number of
    bytes from one another.
    """
    if not double:
        steps = _free_steps(stationary)
        if len(steps) > 1:
            caution("stationary", "one free dimension of one stride (more gave wrong products on Trn2)",
                    f"{stationary!r} of strides {steps}")  # fmt: skip
        return
    for name, t in (("stationary", stationary), ("moving", moving)):
        pair, dense = t.strides[1], math.prod(t.shape[2:]) == 1 or _free_steps(t[:, 0])[-1:] == [1]
        if pair == 1 or pair % 2 or not dense:
            caution(name, "with double_row two dense halves, an even number of bytes apart",
                    f"a pair stride of {pair} and the strides {t.strides[2:]}")  # fmt: skip


def _free_steps(t: NkiTensor) -> list[int]:
    """Strides of the free dimensions that are left when neighbours which continue one another are one."""
    steps: list[tuple[int, int]] = []
    for n, s in zip(t.shape[1:], t.strides[1:], strict=True):
        if n > 1:
            if steps and steps[-1][1] == n * s:
                steps.pop()
            steps.append((n, s))
    return [s for _, s in steps]


def _matmul_tiling(stationary: NkiTensor, position: Any, size: Any, double: bool) -> tuple[int, int]:
    """Rows and columns of the PE array this matmul may use."""
    check(bool(position) == bool(size), "tile_position, tile_size", "both or neither", (position, size))
    if not size:
        return hardware.PARTITIONS, hardware.MATMUL_STATIONARY_FREE
    rows, columns = size
    check(rows in (32, 64, 128) and columns in (32, 64, 128), "tile_size", "sizes 32, 64 or 128", size)
    check(not (double and columns != 128), "tile_size", "no column tiling with double_row", size)
    inside = all(p % s == 0 and p >= 0 and p + s <= 128 for p, s in zip(position, size, strict=True))
    check(inside, "tile_position", f"multiples of {tuple(size)} inside 128 x 128", position)
    return rows, columns


def _inside_bank(dst: NkiTensor) -> None:
    reach = sum((n - 1) * s for n, s in zip(dst.shape[1:], dst.strides[1:], strict=True)) * dst.itemsize
    start = dst.storage.base % hardware.PSUM_BYTES + dst.offset * dst.itemsize % dst.storage.row
    bank = hardware.PSUM_BANK_BYTES
    inside = start // bank == (start + reach + dst.itemsize - 1) // bank
    check(inside, "dst", f"one PSUM bank of {bank} B", f"bytes {start} to {start + reach + dst.itemsize}")


def _accumulate_psum(dst: NkiTensor, product: np.ndarray, accumulate: bool | None) -> None:
    """Overwrite or add to PSUM, where None adds to what a matmul wrote and overwrites what nothing wrote.

    Adding to a location that was never written is an error. One that something else than a matmul wrote last
    is undefined on the hardware before NeuronCore-v4: a warning, since kernels of AWS start from a memset.
    """
    memory, where = dst.storage.memory, dst.where()
    if memory.matmul is None:
        memory.matmul = np.zeros(memory.data.nbytes, np.uint8)
    started = where.of(memory.matmul)
    fits = bool(started.all()) if accumulate else where.count - memory.unwritten(where) == started.sum()
    if not fits and (accumulate or (accumulate is None and not dst.storage.overwritten(where))):
        expected = "False for the first matmul into a PSUM location (one that nothing else has written since)"
        got = "True" if accumulate else "None on a location that something else wrote"
        check(not (accumulate and memory.unwritten(where)), "accumulate", expected, got)
        caution("accumulate", expected, got)
    mine = not dst.storage.overwritten(where)  # else what another tensor left there, which None starts anew
    if accumulate or (accumulate is None and mine and memory.unwritten(where) < where.count):
        exists = memory.written(where)
        old = dst.array().astype(np.float32)
        product = product + np.where(exists.all(-1), old, np.float32(0)).reshape(product.shape)
    put(dst, product)
    where.of(memory.matmul)[...] = 1


@instruction(engine="tensor")
def nc_transpose(
    dst: NkiTensor, data: NkiTensor, engine: Any = constants.engine.unknown, name: str | None = None
) -> Busy:
    """``dst = data.T``, partitions against flattened free dimensions; bit-accurate."""
    check(isinstance(dst, NkiTensor), "dst", "a tensor", dst)
    on = choose(engine, *(("tensor", "vector") if dst.buffer == "psum" else ("vector", "tensor")))
    if on == "tensor":
        dst, data = tile("dst", dst, ("psum",)), tile("data", data, ("sbuf",))
        limit = hardware.TENSOR_TRANSPOSE
        if data.itemsize == 1:
            raise NotImplementedError(
                "nki.isa.nc_transpose: 8-bit data on TensorE (PSUM receives 16-bit elements)"
            )
    else:
        dst, data = tile("dst", dst), tile("data", data)
        limit = hardware.VECTOR_TRANSPOSE
    check(dst.dtype == data.dtype, "dst", f"data's dtype {data.dtype}", dst)
    p, f = data.shape[0], data.free_size
    check(p <= limit and f <= limit, "data", f"at most [{limit}, {limit}] on {on}", (p, f))
    check((dst.shape[0], dst.free_size) == (f, p), "dst", f"shape ({f}, {p})", dst)
    put_bits(dst, np.ascontiguousarray(bits("data", data).T))
    cycles = (
        cost_model.matmul_cycles(f, p, data.dtype, transpose=True) if on == "tensor" else cost_model.cycles(f)
    )
    return Busy(cycles, (dst, data))
