"""Instructions of GpSimdE: patterns over partitions and free dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import cost_model, dtypes, hardware, ops
from ... import machine as _machine
from ...operands import bits, check, numbers, operator, put, put_bits, same_partitions, tile
from ...tensor import NkiTensor
from .instruction import Busy, instruction


@instruction(engine="gpsimd")
def iota(
    dst: NkiTensor,
    pattern: Sequence[Sequence[int]],
    offset: int = 0,
    channel_multiplier: int = 0,
    name: str | None = None,
) -> Busy:
    """``dst[p, ...] = offset + p * channel_multiplier + pattern`` on GpSimdE."""
    dst = tile("dst", dst, ("sbuf",))
    values = _affine(dst, pattern, offset, channel_multiplier)
    put_bits(dst, values) if dst.dtype in dtypes.INTEGERS else put(dst, values.astype(np.float32))
    return Busy(cost_model.gpsimd_cycles(dst.free_size), (dst,))


@instruction(engine="gpsimd")
def nonzero_with_count(
    dst: NkiTensor, src: NkiTensor, index_offset: int = 0, padding_val: int = -1, name: str | None = None
) -> Busy:
    """Indices of the elements that are not 0, then padding, then their number: one row of each GpSimdE core.

    Only partitions 0, 16, 32, ... are read and written; each of `dst` holds one element more than `src`.
    """
    here = _machine.current().target
    check(here.generation != "gen2", "engine", "NeuronCore-v3 or newer", here.generation)
    dst = tile("dst", dst, ("sbuf",), ("int32",))
    src = tile("src", src, ("sbuf",), ("float32", "int32"))
    n = src.free_size
    fits = dst.shape[0] == src.shape[0] and dst.free_size == n + 1
    check(fits, "dst", f"{src.shape[0]} partitions of {n + 1} elements", dst)
    step = hardware.GPSIMD_CORE_PARTITIONS
    rows = bits("src", src.slice(0, 0, src.shape[0], step))
    result = np.full((len(rows), n + 1), padding_val, np.int32)
    for row, out in zip(rows, result, strict=True):
        found = np.flatnonzero(row)
        out[: len(found)], out[n] = found + index_offset, len(found)
    put_bits(dst.slice(0, 0, dst.shape[0], step), result)
    return Busy(cost_model.gpsimd_cycles(n), (dst, src))


def _affine(dst: NkiTensor, pattern: Any, offset: int, multiplier: int) -> np.ndarray:
    """int32 ``[partitions, elements]`` of an affine pattern of up to four ``[step, count]`` pairs."""
    counts = [int(n) for _, n in pattern]
    check(1 <= len(counts) <= 4, "pattern", "1 to 4 pairs [step, count]", pattern)
    matches = math.prod(counts) == dst.free_size
    check(matches, "pattern", f"counts whose product is {dst.free_size}", pattern)
    free = np.zeros(counts, np.int32)
    for axis, (step, n) in enumerate(pattern):
        shape = [1] * len(counts)
        shape[axis] = n
        free = free + (np.arange(n, dtype=np.int32) * np.int32(step)).reshape(shape)
    channels = np.arange(dst.shape[0], dtype=np.int32) * np.int32(multiplier)
    return np.int32(offset) + channels[:, None] + free.reshape(1, -1)


@instruction(engine="gpsimd")
def affine_select(
    dst: NkiTensor,
    pattern: Sequence[Sequence[int]],
    channel_multiplier: int,
    on_true_tile: NkiTensor,
    on_false_value: float,
    cmp_op: Any = None,
    offset: int = 0,
    name: str | None = None,
) -> Busy:
    """``dst = on_true_tile where affine pattern <cmp_op> 0, else on_false_value``, on GpSimdE."""
    compare = "equal" if cmp_op is None else operator("cmp_op", cmp_op, _COMPARE)
    dst = tile("dst", dst, ("sbuf",))
    on_true_tile = tile("on_true_tile", on_true_tile, ("sbuf",))
    same_partitions(dst, on_true_tile=on_true_tile)
    affine = _affine(dst, pattern, offset, channel_multiplier)
    chosen = ops.ARITHMETIC[compare](affine, 0) != 0
    _select(dst, chosen, "on_true_tile", on_true_tile, np.float32(on_false_value))
    return Busy(cost_model.gpsimd_cycles(dst.free_size), (dst, on_true_tile))


_COMPARE = dict.fromkeys(("equal", "not_equal", "greater", "greater_equal", "less", "less_equal"), 0)


def _select(dst: NkiTensor, chosen: np.ndarray, label: str, true: NkiTensor, false: Any) -> None:
    values = numbers(label, true)
    put(dst, np.where(chosen, values, false))
