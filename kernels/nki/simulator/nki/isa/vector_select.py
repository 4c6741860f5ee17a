"""Instructions of VectorE that select and search elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import cost_model, dtypes, hardware, ops
from ... import machine as _machine
from ...operands import bits, check, column, numbers, operator, put, put_bits, same_partitions, scalar, tile
from ...tensor import NkiTensor
from . import constants
from .accumulators import accumulate, may_change
from .instruction import Busy, instruction

_RANGE = dict.fromkeys(("equal", "less", "less_equal", "greater", "greater_equal"), 0)
_INDICES = ("uint16", "uint32")


@instruction(engine="vector")
def tensor_copy_predicated(
    dst: NkiTensor,
    src: Any,
    predicate: NkiTensor,
    reverse_pred: bool = False,
    name: str | None = None,
) -> Busy:
    """Copy the elements of `src`, a tile or a constant, to `dst` where `predicate` holds."""
    dst = tile("dst", dst)
    predicate = tile("predicate", predicate, dtype=("uint8", "uint16", "uint32"))
    same_partitions(dst, predicate=predicate)
    chosen = (bits("predicate", predicate) != 0) != reverse_pred
    if isinstance(src, NkiTensor):
        src = tile("src", src, dtype=(dst.dtype,))
        same_partitions(dst, src=src)
        both = src.buffer == predicate.buffer == "psum"
        check(not both, "src, predicate", "at most one of them in PSUM", "both in PSUM")
        values: Any = bits("src", src)
    else:
        values = dtypes.from_float32(np.asarray(src, np.float32), dst.dtype)
    if chosen.all():
        old: Any = values
    else:  # the elements left alone are read too: they must exist
        old = bits("dst", dst)
    put_bits(dst, np.where(chosen, values, old))
    streamed = src if isinstance(src, NkiTensor) else dst
    busy = cost_model.two_input_cycles(dst, streamed, predicate)
    return Busy(busy, (dst, src, predicate))


@instruction(engine="vector")
def select_reduce(
    dst: NkiTensor,
    predicate: NkiTensor,
    on_true: NkiTensor,
    on_false: Any,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Any = constants.reduce_cmd.idle,
    reduce_op: Any = None,
    reverse_pred: bool = False,
    name: str | None = None,
) -> Busy:
    """``dst = where(predicate, on_true, on_false)`` and on request its maximum over the free dimensions."""
    dst = tile("dst", dst)
    predicate = tile("predicate", predicate, dtype=("int8", "uint8", "int16", "uint16"))
    allowed = tuple(n for n in dtypes.NUMPY if n not in ("tfloat32", "int32", "uint32"))
    on_true = tile("on_true", on_true, dtype=allowed)
    same_partitions(dst, predicate=predicate, on_true=on_true)
    both = on_true.buffer == predicate.buffer == "psum"
    check(not both, "on_true, predicate", "at most one of them in PSUM", "both in PSUM")
    if reduce_op is not None:
        operator("reduce_op", reduce_op, {"maximum": 0})
    chosen = (bits("predicate", predicate) != 0) != reverse_pred
    otherwise = scalar("on_false", on_false, dst.shape[0])
    values = np.where(chosen, numbers("on_true", on_true), otherwise)
    put(dst, values)
    if reduce_cmd != constants.reduce_cmd.idle:
        total = accumulate("maximum", values, reduce_cmd, read_out=reduce_res is not None)
        if reduce_res is not None:
            put(column("reduce_res", reduce_res, dst.shape[0]), total, "reduce_res")
    else:
        check(reduce_res is None, "reduce_cmd", "reset_reduce or reduce with reduce_res", reduce_cmd)
        may_change()
    busy = cost_model.two_input_cycles(dst, predicate, on_true)
    return Busy(busy, (dst, predicate, on_true, reduce_res))


@instruction(engine="vector")
def range_select(
    dst: NkiTensor,
    on_true_tile: NkiTensor,
    comp_op0: Any,
    comp_op1: Any,
    bound0: NkiTensor,
    bound1: NkiTensor,
    reduce_cmd: Any = constants.reduce_cmd.reset_reduce,
    reduce_res: NkiTensor | None = None,
    reduce_op: Any = None,
    range_start: int = 0,
    on_false_value: float = hardware.FP32_MIN,
    name: str | None = None,
) -> Busy:
    """``dst = on_true_tile`` where the index along the row passes both comparisons, each with a bound; else
    fp32's lowest value. On request the maximum of that over the row."""
    here = _machine.current().target
    check(here.generation != "gen2", "engine", "NeuronCore-v3 or newer", here.generation)
    first, second = operator("comp_op0", comp_op0, _RANGE), operator("comp_op1", comp_op1, _RANGE)
    if reduce_op is not None:
        operator("reduce_op", reduce_op, {"maximum": 0})
    dst, on_true_tile = tile("dst", dst), tile("on_true_tile", on_true_tile)
    check(on_true_tile.dtype not in dtypes.INTEGERS, "on_true_tile", "a float dtype", on_true_tile)
    same_partitions(dst, on_true_tile=on_true_tile)
    lowest = np.float32(on_false_value) == np.float32(hardware.FP32_MIN)
    check(bool(lowest), "on_false_value", f"fp32's lowest value {hardware.FP32_MIN}", on_false_value)
    end = range_start + dst.free_size
    check(range_start >= -(2**24) and end <= 2**24, "range_start", "indices within 2^24, exact in fp32", end)
    index = np.arange(range_start, end, dtype=np.float32)
    low, high = (
        numbers(label, column(label, bound, dst.shape[0], dtype=("float32",)))
        for label, bound in (("bound0", bound0), ("bound1", bound1))
    )
    inside = (ops.ARITHMETIC[first](index, low) != 0) & (ops.ARITHMETIC[second](index, high) != 0)
    values = np.where(inside, numbers("on_true_tile", on_true_tile), np.float32(hardware.FP32_MIN))
    put(dst, values)
    if reduce_cmd == constants.reduce_cmd.idle:
        check(reduce_res is None, "reduce_cmd", "reset_reduce or reduce with reduce_res", reduce_cmd)
    else:  # by default it reduces even for those who only select: nothing need read that out
        total = accumulate("maximum", values, reduce_cmd, read_out=True)
        if reduce_res is not None:
            put(column("reduce_res", reduce_res, dst.shape[0]), total, "reduce_res")
    return Busy(cost_model.cycles(dst.free_size, dst, on_true_tile), (dst, on_true_tile, reduce_res))


@instruction(engine="vector")
def max8(dst: NkiTensor, src: NkiTensor, name: str | None = None) -> Busy:
    """The 8 largest elements of each partition, the largest first."""
    dst, src = _eight("dst", dst), _searched("src", src, dst)
    put(dst, -np.sort(-numbers("src", src), axis=1)[:, :8])
    return Busy(cost_model.cycles(src.free_size, src), (dst, src))


@instruction(engine="vector")
def nc_find_index8(dst: NkiTensor, data: NkiTensor, vals: NkiTensor, name: str | None = None) -> Busy:
    """Where each of 8 values is first in the row; equal ones find the next place, a missing one all ones."""
    dst, vals = _eight("dst", dst, _INDICES), _eight("vals", vals)
    data = _searched("data", data, dst)
    row = numbers("data", data).copy()
    put_bits(dst, _take(row, numbers("vals", vals), range(8), dst.dtype))
    return Busy(cost_model.cycles(data.free_size, data), (dst, data, vals))


@instruction(engine="vector")
def nc_match_replace8(
    dst: NkiTensor,
    data: NkiTensor,
    vals: NkiTensor,
    imm: float,
    dst_idx: NkiTensor | None = None,
    name: str | None = None,
) -> Busy:
    """`data` with the first occurrence of each of 8 values, from the last of them on, replaced by `imm`."""
    dst, vals = tile("dst", dst), _eight("vals", vals)
    data = _searched("data", data, vals)
    same_partitions(dst, data=data)
    before = numbers("data", data)
    row = before.copy()
    places = _take(row, numbers("vals", vals), range(7, -1, -1), "uint32")
    put(dst, np.where(np.isnan(row) & ~np.isnan(before), np.float32(imm), before))
    if dst_idx is not None:
        put_bits(_eight("dst_idx", dst_idx, _INDICES), places, "dst_idx")
    return Busy(cost_model.cycles(data.free_size, data), (dst, data, vals, dst_idx))


def _take(row: np.ndarray, wanted: np.ndarray, order: range, dtype: str) -> np.ndarray:
    """Place of each wanted value in its row, searched for in `order`; what was found becomes NaN in `row`."""
    every = np.arange(len(row))
    integer = dtypes.NUMPY[dtype]
    places = np.full(wanted.shape, np.iinfo(integer).max, integer)
    for i in order:
        found = row == wanted[:, i : i + 1]
        first, some = found.argmax(axis=1), found.any(axis=1)
        places[some, i] = first[some]
        row[every[some], first[some]] = np.nan
    return places


def _eight(operand: str, value: Any, dtype: Any = None) -> NkiTensor:
    t = tile(operand, value, dtype=dtype)
    check(t.free_size == 8, operand, "8 elements per partition", t)
    return t


def _searched(operand: str, value: Any, like: NkiTensor) -> NkiTensor:
    t = tile(operand, value)
    check(t.ndim <= 3, operand, "up to 3 dimensions", t)
    low, high = hardware.SEARCH_FREE
    check(low <= t.free_size <= high, operand, f"{low} to {high} elements per partition", t)
    check(t.shape[0] == like.shape[0], operand, f"{like.shape[0]} partitions", t)
    return t
