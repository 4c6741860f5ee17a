"""What every instruction does with its operands: check them, read them as numbers, write results back.

All of it is for the instruction that runs (``machine.instruction``): messages name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from . import dtypes, errors, hardware
from . import machine as _machine
from .ops import ACTIVATION, Operator
from .tensor import Indirect, NkiTensor, VirtualRegister

ON_CHIP = ("sbuf", "psum")
DMA_MEMORY = ("sbuf", "private_hbm", "shared_hbm")


def fail(operand: str, expected: str, got: Any) -> NoReturn:
    """Raise NkiSimulationError for `operand` of the running instruction."""
    errors.fail(_running(), operand, expected, got)


def check(condition: bool, operand: str, expected: str, got: Any) -> None:
    """:func:`fail` unless `condition` holds."""
    if not condition:
        fail(operand, expected, got)


def caution(operand: str, expected: str, got: Any, count: int = 1) -> None:
    """Note that `operand` of the running instruction is doubtful on the hardware: a warning, no error."""
    _machine.current().caution(_running(), operand, expected, got, count)


def _running() -> str:
    return _machine.current().instruction.name


def tensor(operand: str, value: Any, buffers: Sequence[str]) -> NkiTensor:
    """`value` as a tensor in one of `buffers`; a run-time scalar index is looked up."""
    check(isinstance(value, NkiTensor), operand, "a tensor", type(value).__name__)
    check(value.buffer in buffers, operand, f"a tensor in {' or '.join(buffers)}", value)
    if value.is_indirect() and not value._indirect.vector:
        return _resolve(operand, value)
    return value


def tile(
    operand: str, value: Any, buffers: Sequence[str] = ON_CHIP, dtype: Sequence[str] | None = None
) -> NkiTensor:
    """`value` as a tile the engine can access: buffer, dtype and partitions as the hardware allows."""
    t = tensor(operand, value, buffers)
    check(dtype is None or t.dtype in dtype, operand, f"dtype {' or '.join(dtype or ())}", t)
    check(not t.is_indirect(), operand, "a direct address (per-partition indices: DMA only)", t)
    gpsimd = _machine.current().instruction.engine == "gpsimd"
    check(not gpsimd or t.buffer != "psum", operand, "SBUF: GpSimdE cannot access PSUM", t)
    count, start = t.shape[0], t.start_partition
    starts = (0,) if count > 64 else (0, 64) if count > 32 else (0, 32, 64, 96)
    allowed = f"{count} partitions to start at partition {' or '.join(map(str, starts))}"
    check(start in starts, operand, allowed, f"start {start} ({t!r})")
    most, stride = hardware.FREE_ELEMENTS, hardware.FREE_STRIDE
    check(t.free_size <= most, operand, f"at most {most} elements per partition", t)
    steps = [s for n, s in zip(t.shape[1:], t.strides[1:], strict=True) if n > 1]
    check(max(steps, default=0) <= stride, operand, f"strides up to {stride} elements", steps)
    return t


def out_of_bounds(operand: str, t: Any) -> bool:
    """Whether `t` is addressed by one run-time index, and that lies outside of its dimension."""
    if not isinstance(t, NkiTensor) or t._indirect is None or t._indirect.vector:
        return False
    return not 0 <= _index(operand, t._indirect) < t._indirect.extent


def _index(operand: str, indirect: Indirect) -> int:
    if isinstance(indirect.index, VirtualRegister):
        return indirect.index.read()
    return int(read(f"{operand}'s index", indirect.index).reshape(-1)[0])


def _resolve(operand: str, t: NkiTensor) -> NkiTensor:
    indirect = t._indirect
    assert indirect is not None
    index = _index(operand, indirect)
    direct = NkiTensor(
        t.shape, t.dtype, t.storage, t.buffer, t.name,
        strides=t.strides, offset=t.offset + index * indirect.stride,
    )  # fmt: skip
    check(0 <= index < indirect.extent, operand, f"an index below {indirect.extent}", index)
    direct._inside(_running())
    return direct


def same_partitions(dst: NkiTensor, **others: NkiTensor) -> None:
    """All operands have the partitions of `dst` and as many elements in each, and none is shifted into it."""
    for name, t in others.items():
        check(t.shape[0] == dst.shape[0], name, f"{dst.shape[0]} partitions, as dst", t)
        check(t.free_size == dst.free_size, name, f"{dst.free_size} elements each, as dst", t)
        apart = "the very elements of dst or none of them (which is read or written first is not defined)"
        check(not _shifted(dst, t), name, apart, f"{t!r} overlapping dst")


def _shifted(dst: NkiTensor, t: NkiTensor) -> bool:
    """Whether an element of `t` lies where another element of `dst` is written, in the same storage.

    In place is fine, and so is the narrowing of a dense row onto its own start: writing stays behind reading.
    """
    if dst.storage.memory is not t.storage.memory:
        return False
    to, origin = dst.where(), t.where()
    if to.offset == origin.offset:
        if _merged(dst) == _merged(t):
            return False
        dense = dst.is_contiguous() and t.is_contiguous()
        if dense and dst.itemsize <= t.itemsize and to.strides[0] == origin.strides[0]:
            return False
    return np.shares_memory(dst.array(), t.array())


def _merged(t: NkiTensor) -> list[tuple[int, int]]:
    """``(count, stride in bytes)`` of each dimension, without those of one element, neighbours made one."""
    dims: list[tuple[int, int]] = []
    for n, s in zip(t.shape, t.where().strides, strict=True):
        if n == 1:
            continue
        if len(dims) > 1 and dims[-1][1] == n * s:
            dims[-1] = (dims[-1][0] * n, s)
        else:
            dims.append((n, s))
    return [*dims, (t.itemsize, 1)]


def column(operand: str, value: Any, partitions: int, **rules: Any) -> NkiTensor:
    """`value` as a ``[partitions, 1]`` tile."""
    t = tile(operand, value, **rules)
    check(t.shape[0] == partitions and t.free_size == 1, operand, f"shape ({partitions}, 1)", t)
    return t


def read(operand: str, t: NkiTensor) -> np.ndarray:
    """The elements as they are, in the shape of `t`."""
    return t.read(_running(), operand)


def write(dst: NkiTensor, values: np.ndarray, operand: str = "dst") -> None:
    """Write `values`, already of the dtype of `dst`."""
    dst.write(_running(), operand, values)


def numbers(operand: str, t: NkiTensor) -> np.ndarray:
    """The elements in fp32, ``[partitions, elements]``."""
    values = dtypes.to_float32(read(operand, t), t.dtype)
    return values.reshape(t.shape[0], t.free_size)


def bits(operand: str, t: NkiTensor) -> np.ndarray:
    """The elements as they are, ``[partitions, elements]``."""
    return read(operand, t).reshape(t.shape[0], t.free_size)


def scalar(operand: str, value: Any, partitions: int, dtype: Sequence[str] | None = ("float32",)) -> Any:
    """A constant as fp32, or the ``[partitions, 1]`` column of a tile."""
    if isinstance(value, NkiTensor):
        return numbers(operand, column(operand, value, partitions, dtype=dtype))
    check(
        isinstance(value, (int, float, np.number)) and not isinstance(value, bool),
        operand, f"a number or a tile of shape ({partitions}, 1)", value,
    )  # fmt: skip
    return np.float32(value)


def put(dst: NkiTensor, values: np.ndarray, operand: str = "dst") -> None:
    """Write fp32 `values` to `dst`, rounded to its dtype."""
    write(dst, rounded(values, dst.dtype, operand), operand)


def rounded(values: np.ndarray, dtype: str, operand: str = "dst") -> np.ndarray:
    """fp32 `values` in `dtype`. What is finite and too large for FP8 is a warning, counted.

    The documents do not say whether the hardware makes that Inf, NaN or the largest finite code; here it is
    what the format has beyond its largest value: Inf, or NaN for float8_e4m3fn.
    """
    result = dtypes.from_float32(values, dtype)
    if dtype in dtypes.FP8:
        lost = ~np.isfinite(dtypes.to_float32(result, dtype))
        if lost.any():
            count = int(np.count_nonzero(lost & np.isfinite(values)))
            if count:
                largest = dtypes.largest(dtype)
                caution(operand, f"values within ±{largest} ({dtype})", "larger ones", count)
    return result


def put_bits(dst: NkiTensor, values: np.ndarray, operand: str = "dst") -> None:
    """Write `values` to `dst` without a conversion by way of fp32."""
    if values.dtype != dtypes.NUMPY[dst.dtype]:
        values = values.astype(dtypes.NUMPY[dst.dtype])
    write(dst, values, operand)


def operator(operand: str, op: Any, *tables: dict[str, Any]) -> str:
    """The name of operator `op`, which one of `tables` must hold."""
    names = sorted(name for table in tables for name in table)
    check(isinstance(op, Operator), operand, "an operator of nki.language such as nl.add", op)
    name = {"max": "maximum", "min": "minimum"}.get(op.__name__, op.__name__)
    check(name in names, operand, f"one of {', '.join(names)}", op)
    here = _machine.current().target
    refused = tables[0] is not ACTIVATION and name in here.refused_operators
    check(not refused, operand, f"an operator {here.generation} has (this one: gen4)", op)
    return name


def issue(name: str, engine: str, cycles: float, *operands: Any, careful: float | None = None) -> None:
    """Note for the cost model that `engine` is busy with instruction `name` for `cycles` (or `careful`)."""
    recorder = _machine.current().cost
    if recorder is not None:
        tiles = [t for t in operands if isinstance(t, NkiTensor)]
        recorder.issue(name, engine, cycles, tiles, cycles if careful is None else careful)
