"""Instructions of VectorE, some of which ScalarE or GpSimdE can run instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import cost_model, dtypes, hardware, ops
from ...operands import (
    bits,
    check,
    column,
    numbers,
    operator,
    put,
    put_bits,
    same_partitions,
    scalar,
    tile,
)
from ...tensor import NkiTensor
from . import constants
from .accumulators import accumulate
from .instruction import Busy, choose, instruction


@instruction(engine="vector")
def tensor_tensor(
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Any,
    engine: Any = constants.engine.unknown,
    name: str | None = None,
) -> Busy:
    """``dst = data1 <op> data2``."""
    op = operator("op", op, ops.ARITHMETIC, ops.BITVEC)
    words = all(getattr(t, "dtype", None) in ("int32", "uint32") for t in (dst, data1, data2))
    in_psum = any(getattr(t, "buffer", None) == "psum" for t in (dst, data1, data2))
    engines = ("gpsimd", "vector") if words and not in_psum else ("vector", "gpsimd")
    on = choose(engine, *(("gpsimd",) if op == "power" else engines))
    dst = tile("dst", dst)
    data1, data2 = tile("data1", data1), tile("data2", data2)
    same_partitions(dst, data1=data1, data2=data2)
    both = data1.buffer == data2.buffer == "psum"
    check(not both, "data1, data2", "at most one of them in PSUM", "both in PSUM")
    if op in ops.BITVEC:
        x, y = _integers(data1=data1, data2=data2, dst=dst)
        put_bits(dst, ops.BITVEC[op](x, y))
    elif words and on == "gpsimd":
        put_bits(dst, ops.ARITHMETIC[op](bits("data1", data1), bits("data2", data2)))
    else:
        put(dst, _compute(op, numbers("data1", data1), numbers("data2", data2)))
    busy = cost_model.pair_cycles(on, dst, data1, data2)
    careful = cost_model.careful_pair_cycles(on, op, dst, data1, data2)
    return Busy(busy, (dst, data1, data2), careful)


def _integers(**tiles: NkiTensor) -> list[np.ndarray]:
    """Operands of a bitvec operator (not `dst`) as bit patterns."""
    for name, t in tiles.items():
        check(t.dtype in dtypes.INTEGERS, name, "an integer dtype (bitvec operator)", t)
    return [bits(name, t) for name, t in tiles.items() if name != "dst"]


def _compute(op: str, x: Any, y: Any, reverse: bool = False) -> np.ndarray:
    """fp32 ``x <op> y``; unary operators ignore y."""
    with np.errstate(all="ignore"):
        if op in ops.UNARY:
            return ops.UNARY[op](x)
        return ops.ARITHMETIC[op](y, x) if reverse else ops.ARITHMETIC[op](x, y)


@instruction(engine="vector")
def tensor_scalar(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Any = constants.engine.unknown,
    name: str | None = None,
) -> Busy:
    """``dst = (data <op0> operand0) <op1> operand1``, operands constant or one value per partition."""
    first = operator("op0", op0, ops.ARITHMETIC, ops.BITVEC, ops.UNARY)
    second = None if op1 is None else operator("op1", op1, ops.ARITHMETIC, ops.BITVEC, ops.UNARY)
    bitvec = first in ops.BITVEC
    check(second is None or (second in ops.BITVEC) == bitvec, "op1", "the kind of op0", second)
    check(op1 is not None or operand1 is None, "operand1", "None without op1", operand1)
    on = _tensor_scalar_engine(engine, first, second)
    dst, data = tile("dst", dst), tile("data", data)
    same_partitions(dst, data=data)
    steps = [(first, "operand0", operand0, reverse0)]
    if second is not None:
        steps.append((second, "operand1", operand1, reverse1))
    if bitvec:
        (values,) = _integers(data=data, dst=dst)
        for op, label, operand, reverse in steps:
            other = _bit_operand(label, operand, data)
            sides = (other, values) if reverse else (values, other)
            values = ops.BITVEC[op](*((values,) if op == "invert" else sides))
        put_bits(dst, values)
    else:
        values = numbers("data", data)
        for op, label, operand, reverse in steps:
            values = _compute(op, values, _operand(label, op, operand, data), reverse)
        put(dst, values)
    return Busy(cost_model.copy_cycles(on, dst, data, first), (dst, data, operand0, operand1))


def _tensor_scalar_engine(given: Any, first: str, second: str | None) -> str:
    engines = ["vector", "scalar", "gpsimd"]
    on = choose(given, *(reversed(engines) if "rsqrt" in (first, second) else engines))
    if on == "scalar":
        pairs = (("multiply", "add"), ("multiply", None), ("add", None))
        check((first, second) in pairs, "op0, op1", f"one of {pairs} on ScalarE", (first, second))
    check(on == "vector" or first not in ops.BITVEC, "engine", "vector for bitvec operators", on)
    rsqrt = "rsqrt" in (first, second)
    check((on == "gpsimd") == rsqrt, "engine", "gpsimd for rsqrt, and for nothing else", on)
    return on


def _operand(
    label: str, op: str, value: Any, data: NkiTensor, dtype: Sequence[str] | None = ("float32",)
) -> Any:
    if op in ops.UNARY:
        unused = value is None or (not isinstance(value, NkiTensor) and value == 0)
        check(unused, label, f"None or 0 with the unary nl.{op}", value)
        return None
    return scalar(label, value, data.shape[0], dtype)


def _bit_operand(label: str, value: Any, data: NkiTensor) -> Any:
    if isinstance(value, NkiTensor):
        return bits(label, column(label, value, data.shape[0], dtype=dtypes.INTEGERS))
    check(value is None or isinstance(value, int), label, "an integer (bitvec operator)", value)
    return None if value is None else np.asarray(value).astype(dtypes.NUMPY[data.dtype])


@instruction(engine="vector")
def tensor_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> Busy:
    """Reduce the last free dimensions of `data`."""
    op = operator("op", op, dict.fromkeys((*ops.IDENTITY, *_BIT_REDUCTIONS), 0))
    dst, data = tile("dst", dst), tile("data", data)
    axes = sorted(a % data.ndim for a in ((axis,) if isinstance(axis, int) else axis))
    last = list(range(data.ndim - len(axes), data.ndim))
    check(axes == last and 0 not in axes, "axis", "the last free dimensions of data", axis)
    kept = data.free_size // math.prod(data.shape[a] for a in axes)
    check(
        dst.shape[0] == data.shape[0] and dst.free_size == kept,
        "dst", f"{data.shape[0]} partitions of {kept} elements", dst,
    )  # fmt: skip
    if op in _BIT_REDUCTIONS:
        check(not negate, "negate", "False for a bitvec operator", negate)
        (values,) = _integers(data=data, dst=dst)
        put_bits(dst, ops.reduce(op, values.reshape(data.shape[0] * kept, -1)))
    else:
        with np.errstate(all="ignore"):
            result = ops.reduce(op, numbers("data", data).reshape(data.shape[0] * kept, -1))
        put(dst, -result if negate else result)
    return Busy(cost_model.reduce_cycles(op, dst, data), (dst, data))


_BIT_REDUCTIONS = ("bitwise_and", "bitwise_or", "bitwise_xor")


@instruction(engine="vector")
def scalar_tensor_tensor(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    op1: Any,
    operand1: NkiTensor,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> Busy:
    """``dst = (data <op0> operand0) <op1> operand1``: a scalar per partition, then a tile."""
    first = operator("op0", op0, ops.ARITHMETIC, ops.UNARY)
    second = operator("op1", op1, ops.ARITHMETIC)
    dst, data, operand1 = tile("dst", dst), tile("data", data), tile("operand1", operand1)
    same_partitions(dst, data=data, operand1=operand1)
    both = data.buffer == operand1.buffer == "psum"
    check(not both, "data, operand1", "at most one of them in PSUM", "both in PSUM")
    column0 = _operand("operand0", first, operand0, data, dtype=None)
    step = _compute(first, numbers("data", data), column0, reverse0)
    put(dst, _compute(second, step, numbers("operand1", operand1), reverse1))
    busy = cost_model.scalar_pair_cycles(first, second, dst, data, operand1)
    return Busy(busy, (dst, data, operand0, operand1))


@instruction(engine="vector")
def tensor_scalar_reduce(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reduce_op: Any,
    reduce_res: NkiTensor | None = None,
    reverse0: bool = False,
    reduce_cmd: Any = constants.reduce_cmd.reset_reduce,
    reduce_init: Any = None,
    reduce_res_negate: bool = False,
    name: str | None = None,
) -> Busy:
    """``dst = data <op0> operand0`` and a reduction of that over all free dimensions."""
    first = operator("op0", op0, ops.ARITHMETIC, ops.UNARY)
    by = operator("reduce_op", reduce_op, dict.fromkeys(("add", "multiply", "maximum", "minimum"), 0))
    check(not reverse0, "reverse0", "False (not supported yet)", reverse0)
    dst, data = tile("dst", dst), tile("data", data)
    same_partitions(dst, data=data)
    values = _compute(first, numbers("data", data), _operand("operand0", first, operand0, data))
    total = accumulate(by, values, reduce_cmd, reduce_init, read_out=reduce_res is not None)
    put(dst, values)
    if reduce_res is not None:
        reduce_res = column("reduce_res", reduce_res, data.shape[0])
        put(reduce_res, -total if reduce_res_negate else total, "reduce_res")
    busy = cost_model.cycles(data.free_size, dst, data) + (
        0 if reduce_res is None else cost_model.ACCUMULATOR_READ
    )
    return Busy(busy, (dst, data, reduce_res))


@instruction(engine="vector")
def tensor_tensor_scan(
    dst: NkiTensor,
    data0: NkiTensor,
    data1: NkiTensor,
    initial: Any,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> Busy:
    """``dst[i] = (data0[i] <op0> dst[i - 1]) <op1> data1[i]`` along the free dimension, from `initial` on."""
    first, second = operator("op0", op0, ops.ARITHMETIC), operator("op1", op1, ops.ARITHMETIC)
    dst, data0, data1 = tile("dst", dst), tile("data0", data0), tile("data1", data1)
    same_partitions(dst, data0=data0, data1=data1)
    both = data0.buffer == data1.buffer == "psum"
    check(not both, "data0, data1", "at most one of them in PSUM", "both in PSUM")
    x, y = numbers("data0", data0), numbers("data1", data1)
    state = np.broadcast_to(scalar("initial", initial, dst.shape[0]), (dst.shape[0], 1))[:, 0]
    result = np.empty_like(x)
    for i in range(x.shape[1]):  # each element needs the one before: the one loop that cannot be vectorized
        state = _compute(second, _compute(first, x[:, i], state, reverse0), y[:, i], reverse1)
        result[:, i] = state
    put(dst, result)
    busy = cost_model.cycles(hardware.TWO_INPUT_CYCLES * dst.free_size)
    return Busy(busy, (dst, data0, data1))


@instruction(engine="vector")
def reciprocal(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> Busy:
    """``dst = 1 / data`` on VectorE."""
    dst, data = tile("dst", dst), tile("data", data)
    same_partitions(dst, data=data)
    put(dst, _compute("reciprocal", numbers("data", data), None))
    return Busy(cost_model.cycles(cost_model.VECTOR_RECIPROCAL * data.free_size), (dst, data))


@instruction(engine="vector")
def bn_stats(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> Busy:
    """Count, mean and count times variance of the even elements, then of the odd ones: ``[P, 6]``."""
    dst, data = tile("dst", dst), tile("data", data)
    limit = hardware.BN_STATS_FREE
    check(data.free_size <= limit, "data", f"at most {limit} elements per partition", data)
    _statistics(dst, data, 6)
    values = numbers("data", data)
    parts = []
    with np.errstate(all="ignore"):
        for half in (values[:, 0::2], values[:, 1::2]):
            n = half.shape[1]
            mean = half.sum(1, keepdims=True) / np.float32(max(n, 1))
            parts += [np.full_like(mean, n), mean, np.square(half - mean).sum(1, keepdims=True)]
    put(dst, np.concatenate(parts, axis=1))
    return Busy(cost_model.cycles(data.free_size, data), (dst, data))


@instruction(engine="vector")
def bn_aggr(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> Busy:
    """Mean and variance ``[P, 2]`` from the triples that :func:`bn_stats` made."""
    dst, data = tile("dst", dst), tile("data", data)
    check(data.free_size % 3 == 0, "data", "triples (count, mean, variance * count)", data)
    _statistics(dst, data, 2)
    count, mean, spread = numbers("data", data).reshape(data.shape[0], -1, 3).transpose(2, 0, 1)
    with np.errstate(all="ignore"):
        total = count.sum(1, keepdims=True)
        whole = (count * mean).sum(1, keepdims=True) / total
        variance = (spread + count * np.square(mean - whole)).sum(1, keepdims=True) / total
    put(dst, np.concatenate([whole, variance], axis=1))
    return Busy(cost_model.cycles(data.free_size, data), (dst, data))


def _statistics(dst: NkiTensor, data: NkiTensor, elements: int) -> None:
    fits = dst.shape[0] == data.shape[0] and dst.free_size == elements
    check(fits, "dst", f"{data.shape[0]} partitions of {elements} elements", dst)
