"""Instructions of ScalarE: activation functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import cost_model, dtypes, ops
from ...operands import caution, check, column, numbers, operator, put, same_partitions, scalar, tile
from ...tensor import NkiTensor
from . import constants
from .accumulators import accumulate
from .instruction import Busy, NkiInstruction, instruction


@instruction(engine="scalar")
def activation(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Any = constants.reduce_cmd.idle,
    name: str | None = None,
) -> Busy:
    """``dst = op(data * scale + bias)`` on ScalarE, and a sum of that over the free dimensions on request.

    An input outside the range where the engine's polynomial is valid gives NaN, and a warning.
    """
    function = operator("op", op, ops.ACTIVATION)
    dst, data = tile("dst", dst), tile("data", data)
    same_partitions(dst, data=data)
    values = numbers("data", data)
    factor = scalar("scale", scale, data.shape[0])
    shift = None if bias is None else scalar("bias", bias, data.shape[0], _BIAS)
    with np.errstate(all="ignore"):
        if isinstance(scale, NkiTensor) or scale != 1.0:
            values = values * factor
        if shift is not None:
            values = values + shift
        result = ops.ACTIVATION[function](values)
    if function in ops.ACTIVATION_RANGE:
        low, high = ops.ACTIVATION_RANGE[function]
        size = np.abs(values) if function == "reciprocal" else values
        outside = ~((size >= low) & (size <= high))
        result = np.where(outside, np.float32(np.nan), result)
        count = int(np.count_nonzero(outside & ~np.isnan(values)))
        if count:
            caution(
                "data",
                f"inputs of nl.{function} within [{low:g}, {high:g}], where it is valid",
                "others",
                count,
            )
    if reduce_op is not None:
        operator("reduce_op", reduce_op, {"add": 0})
    check(
        reduce_op is not None or reduce_cmd in (constants.reduce_cmd.idle, constants.reduce_cmd.reset),
        "reduce_op",
        "nl.add",
        reduce_op,
    )
    check(
        reduce_cmd != constants.reduce_cmd.load_reduce,
        "reduce_cmd",
        "idle, reset, reduce or reset_reduce",
        reduce_cmd,
    )
    put(dst, result)
    read_out = 0
    if reduce_cmd != constants.reduce_cmd.idle or reduce_res is not None:
        total = accumulate("add", result, reduce_cmd, read_out=reduce_res is not None)
        if reduce_res is not None:
            put(column("reduce_res", reduce_res, data.shape[0]), total, "reduce_res")
            read_out = cost_model.ACCUMULATOR_READ
    return Busy(cost_model.cycles(data.free_size, dst, data) + read_out, (dst, data, reduce_res))


_BIAS = tuple(name for name in dtypes.NUMPY if name != "tfloat32")


def activation_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    reduce_op: Any,
    reduce_res: NkiTensor | None,
    bias: Any = None,
    scale: Any = 1.0,
    name: str | None = None,
) -> NkiInstruction:
    """:func:`activation` with ``reduce_cmd.reset_reduce``."""
    return activation(
        dst, op, data, bias, scale, reduce_op, reduce_res, constants.reduce_cmd.reset_reduce, name
    )
