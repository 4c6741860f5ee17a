"""The simulator's ``nki.isa``: each instruction checks its operands, computes in one NumPy step, is costed.

Instruction semantics and limits after nki/api/nki/isa/__init__.py of aws-neuron-sdk (NKI 0.6), Trainium2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np

from .. import cost_model, dtypes, hardware, ops
from .. import machine as _machine
from ..errors import NkiSimulationError as NkiValidationError
from ..errors import NotCovered, check, fail
from ..operands import (
    DMA_MEMORY,
    bits,
    column,
    issue,
    numbers,
    operator,
    put,
    put_bits,
    same_partitions,
    scalar,
    tensor,
    tile,
)
from ..tensor import NKIObject, NkiTensor, VirtualRegister

__all__ = ["NkiValidationError", "VirtualRegister"]


class engine(Enum):
    """Engines of a NeuronCore."""

    tensor = 1
    vector = 5
    scalar = 2
    gpsimd = 3
    dma = 4
    sync = 6
    unknown = 0


tensor_engine, vector_engine, scalar_engine = engine.tensor, engine.vector, engine.scalar
gpsimd_engine, unknown_engine = engine.gpsimd, engine.unknown


class reduce_cmd(Enum):
    """What an instruction does with the engine's accumulator registers."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


class dge_mode(Enum):
    """Who makes a DMA's descriptors."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class oob_mode(Enum):
    """What an out-of-bounds index of an indirect DMA does."""

    error = 0
    skip = 1


class matmul_perf_mode(Enum):
    """TensorE's performance modes."""

    none = "none"
    double_row = "double_row"


class nc_version(Enum):
    """NeuronCore generations."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class dma_engine(Enum):
    """Who moves the data of a sendrecv."""

    dma = 1
    gpsimd_dma = 2


class NkiInstruction(NKIObject):
    """What an instruction returns; instructions run in program order here."""

    def depends_on(self, *producers: NkiInstruction) -> NkiInstruction:
        """Order this one after `producers`: always so here."""
        return self


_DONE = NkiInstruction()
_WIDE_FLOATS = ("tfloat32", "float32")


def get_nc_version() -> nc_version:
    """The generation simulated."""
    return nc_version[_machine.target().generation]


def get_nc_sub_version() -> int:
    """The first revision."""
    return 0


def _engine(instruction: str, given: engine, default: engine, *allowed: engine) -> str:
    chosen = default if given == engine.unknown else given
    check(chosen in allowed, instruction, "engine", " or ".join(e.name for e in allowed), given.name)
    return chosen.name


# -- data movement --------------------------------------------------------------------------------


def dma_copy(
    dst: NkiTensor,
    src: NkiTensor,
    priority: int | None = None,
    oob_mode: Any = oob_mode.error,
    dge_mode: Any = dge_mode.unknown,
    engine: Any = engine.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = src`` between HBM and SBUF, cast by way of fp32 where the dtypes differ."""
    what = "nki.isa.dma_copy"
    dst, src = tensor(what, "dst", dst, DMA_MEMORY), tensor(what, "src", src, DMA_MEMORY)
    check(dst.size == src.size, what, "src", f"as many elements as dst ({dst.size})", src.size)
    check(priority is None, what, "priority", "None (NeuronCore-v4 and later)", priority)
    _dge_engine(what, dge_mode, engine)
    if dst.is_indirect() or src.is_indirect():
        _indirect_copy(what, dst, src, oob_mode, dge_mode)
    else:
        dst.write(what, "dst", _cast(src.read(what, "src"), src.dtype, dst.dtype))
    cost_model.dma("dma_copy", dst, [src])
    return _DONE


def _cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """By way of fp32, but bit for bit between the same dtypes."""
    if source == target:
        return values
    return dtypes.from_float32(dtypes.to_float32(values, source), target)


def _dge_engine(what: str, mode: Any, given: Any) -> None:
    check(
        given == engine.unknown or (mode == dge_mode.hwdge and given in (engine.sync, engine.scalar)),
        what, "engine", "unknown, or sync or scalar with dge_mode.hwdge", f"{given} with {mode}",
    )  # fmt: skip


def _indirect_copy(what: str, dst: NkiTensor, src: NkiTensor, oob: Any, mode: Any) -> None:
    """Gather rows into `dst`, or scatter the rows of `src`: partition p uses row ``index[p]``."""
    check(mode != dge_mode.hwdge, what, "dge_mode", "unknown or swdge for gather and scatter", mode)
    check(not (dst.is_indirect() and src.is_indirect()), what, "src, dst", "one indirect operand", "two")
    moving, name = (src, "src") if src.is_indirect() else (dst, "dst")
    check(moving.storage.on_chip is False, what, name, "a tensor in HBM to gather from or scatter to", moving)
    indirect = moving._indirect
    assert indirect is not None
    index = bits(what, f"{name}'s index", tile(what, f"{name}'s index", indirect.index, ("sbuf",)))
    rows = index.reshape(-1).astype(np.int64)
    check(rows.size == moving.shape[0], what, f"{name}'s index", f"{moving.shape[0]} indices", rows.size)
    for p, row in enumerate(rows):
        if not 0 <= row < indirect.extent:
            if oob is oob_mode.skip:
                continue
            fail(what, f"{name}'s index", f"rows below {indirect.extent}", f"{row} on partition {p}")
        line = NkiTensor(
            (1, *moving.shape[1:]), moving.dtype, moving.storage, moving.buffer, moving.name,
            strides=moving.strides, offset=moving.offset + int(row) * indirect.stride,
        )  # fmt: skip
        line._inside(what)
        if src.is_indirect():
            dst.slice(0, p, p + 1).write(what, "dst", _cast(line.read(what, "src"), src.dtype, dst.dtype))
        else:
            line.write(what, "dst", _cast(src.slice(0, p, p + 1).read(what, "src"), src.dtype, dst.dtype))


def dma_transpose(
    dst: NkiTensor,
    src: NkiTensor,
    axes: Sequence[int] | None = None,
    priority: int | None = None,
    dge_mode: Any = dge_mode.unknown,
    oob_mode: Any = oob_mode.error,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = src.transpose(axes)`` into SBUF: first and last dimension swap, bit-accurate."""
    what = "nki.isa.dma_transpose"
    dst, src = tensor(what, "dst", dst, ("sbuf",)), tensor(what, "src", src, DMA_MEMORY)
    if src.is_indirect():
        raise NotImplementedError(f"{what} with an indirect src (gather transpose)")
    order = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}.get(src.ndim)
    check(order is not None, what, "src", "2, 3 or 4 dimensions", src)
    check(axes is None or tuple(axes) == order, what, "axes", f"{order}", axes)
    check(priority is None, what, "priority", "None (NeuronCore-v4 and later)", priority)
    check(dge_mode in (_G.unknown, _G.hwdge), what, "dge_mode", "unknown or hwdge", dge_mode)
    check(dst.dtype == src.dtype, what, "dst", f"src's dtype {src.dtype}", dst)
    sizes = (2,) if dge_mode == _G.hwdge else (2, 4)
    check(src.itemsize in sizes, what, "src", f"a dtype of {' or '.join(map(str, sizes))} bytes", src)
    if dge_mode == _G.hwdge:
        rows, columns = src.shape[0], src.shape[-1]
        whole = rows == 16 if src.ndim == 2 else rows in (1, 2, 4, 8, 16) and rows * src.shape[-2] % 16 == 0
        check(
            whole, what, "src", "hwdge's shape[0]: 16 (2-D), or 1, 2, 4, 8, 16 with shape[-2] making 16", src
        )
        check(columns <= 128, what, "src", "hwdge's shape[-1]: at most 128", columns)
    turned = tuple(src.shape[axis] for axis in order or ())
    check(dst.shape == turned, what, "dst", f"shape {turned}", dst)
    dst.write(what, "dst", src.read(what, "src").transpose(order))
    on_chip = hardware.DMA_TRANSPOSE_ON_CHIP if src.on_chip else hardware.DMA_TRANSPOSE_FROM_HBM
    cost_model.dma("dma_transpose", dst, [src], on_chip)
    return _DONE


def dma_compute(
    dst: NkiTensor,
    srcs: Sequence[NkiTensor],
    reduce_op: Any,
    scales: Sequence[float] | None = None,
    unique_indices: bool = True,
    oob_mode: Any = oob_mode.error,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = srcs[0] + srcs[1] + ...`` in fp32 inside the DMA engines, between HBM and SBUF."""
    what = "nki.isa.dma_compute"
    operator(what, "reduce_op", reduce_op, {"add": 0})
    check(1 <= len(srcs) <= hardware.DMA_COMPUTE_SOURCES, what, "srcs", "1 to 16 tensors", len(srcs))
    ones = scales is None or (len(scales) == len(srcs) and all(s == 1.0 for s in scales))
    check(ones, what, "scales", "None or 1.0 for each source", scales)
    dst = tensor(what, "dst", dst, DMA_MEMORY)
    sources = [tensor(what, f"srcs[{i}]", src, DMA_MEMORY) for i, src in enumerate(srcs)]
    if any(t.is_indirect() for t in (dst, *sources)):
        raise NotImplementedError(f"{what} with vector_offset (read-modify-write)")
    total: Any = None
    for i, src in enumerate(sources):
        check(src.size == dst.size, what, f"srcs[{i}]", f"as many elements as dst ({dst.size})", src.size)
        values = dtypes.to_float32(src.read(what, f"srcs[{i}]"), src.dtype).reshape(dst.shape)
        with np.errstate(all="ignore"):
            total = values if total is None else total + values
    dst.write(what, "dst", dtypes.from_float32(total, dst.dtype))
    cost_model.dma("dma_compute", dst, sources)
    return _DONE


def memset(
    dst: NkiTensor, value: Any, engine: Any = engine.unknown, name: str | None = None
) -> NkiInstruction:
    """Fill `dst` with a constant."""
    what = "nki.isa.memset"
    on = _engine(what, engine, _E.vector, _E.vector, _E.gpsimd)
    dst = tile(what, "dst", dst, engine=on)
    check(isinstance(value, (int, float, np.number)), what, "value", "a constant", value)
    dtype = dtypes.NUMPY[dst.dtype]
    if dst.dtype in dtypes.INTEGERS:
        limits = np.iinfo(dtype)
        fits = limits.min <= value <= limits.max and value == int(value)
        check(fits, what, "value", f"a whole number of {dst.dtype}", value)
    put_bits(what, dst, np.full((), value).astype(dtype))
    issue("memset", on, cost_model.memset_cycles(on, dst, value), dst)
    return _DONE


def tensor_copy(
    dst: NkiTensor, src: NkiTensor, engine: Any = engine.unknown, name: str | None = None
) -> NkiInstruction:
    """``dst = src`` on chip; bit-accurate where the dtypes are the same."""
    what = "nki.isa.tensor_copy"
    on = _engine(what, engine, _E.vector, _E.vector, _E.scalar, _E.gpsimd)
    dst, src = tile(what, "dst", dst, engine=on), tile(what, "src", src, engine=on)
    same_partitions(what, dst, src=src)
    if dst.dtype == src.dtype:
        put_bits(what, dst, bits(what, "src", src))
    else:
        put(what, dst, numbers(what, "src", src))
    issue("tensor_copy", on, cost_model.copy_cycles(on, dst, src), dst, src)
    return _DONE


# -- VectorE and GpSimdE ----------------------------------------------------------------------------


def tensor_tensor(
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Any,
    engine: Any = engine.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = data1 <op> data2``."""
    what = "nki.isa.tensor_tensor"
    op = operator(what, "op", op, ops.ARITHMETIC, ops.BITVEC)
    words = all(getattr(t, "dtype", None) in ("int32", "uint32") for t in (dst, data1, data2))
    in_psum = any(getattr(t, "buffer", None) == "psum" for t in (dst, data1, data2))
    default = _E.gpsimd if op == "power" or (words and not in_psum) else _E.vector
    on = _engine(what, engine, default, _E.gpsimd, *(() if op == "power" else (_E.vector,)))
    dst = tile(what, "dst", dst, engine=on)
    data1, data2 = tile(what, "data1", data1, engine=on), tile(what, "data2", data2, engine=on)
    same_partitions(what, dst, data1=data1, data2=data2)
    both = data1.buffer == data2.buffer == "psum"
    check(not both, what, "data1, data2", "at most one of them in PSUM", "both in PSUM")
    if op in ops.BITVEC:
        x, y = _integers(what, data1=data1, data2=data2, dst=dst)
        put_bits(what, dst, ops.BITVEC[op](x, y))
    elif words and on == "gpsimd":
        put_bits(what, dst, ops.ARITHMETIC[op](bits(what, "data1", data1), bits(what, "data2", data2)))
    else:
        put(what, dst, _compute(op, numbers(what, "data1", data1), numbers(what, "data2", data2)))
    busy = cost_model.pair_cycles(on, dst, data1, data2)
    careful = cost_model.careful_pair_cycles(on, op, dst, data1, data2)
    issue("tensor_tensor", on, busy, dst, data1, data2, careful=careful)
    return _DONE


def _integers(what: str, **tiles: NkiTensor) -> list[np.ndarray]:
    """Operands of a bitvec operator (not `dst`) as bit patterns."""
    for name, t in tiles.items():
        check(t.dtype in dtypes.INTEGERS, what, name, "an integer dtype (bitvec operator)", t)
    return [bits(what, name, t) for name, t in tiles.items() if name != "dst"]


def _compute(op: str, x: Any, y: Any, reverse: bool = False) -> np.ndarray:
    """fp32 ``x <op> y``; unary operators ignore y."""
    with np.errstate(all="ignore"):
        if op in ops.UNARY:
            return ops.UNARY[op](x)
        return ops.ARITHMETIC[op](y, x) if reverse else ops.ARITHMETIC[op](x, y)


def tensor_scalar(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Any = engine.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = (data <op0> operand0) <op1> operand1``, operands constant or one value per partition."""
    what = "nki.isa.tensor_scalar"
    first = operator(what, "op0", op0, ops.ARITHMETIC, ops.BITVEC, ops.UNARY)
    second = None if op1 is None else operator(what, "op1", op1, ops.ARITHMETIC, ops.BITVEC, ops.UNARY)
    bitvec = first in ops.BITVEC
    check(second is None or (second in ops.BITVEC) == bitvec, what, "op1", "the kind of op0", second)
    check(op1 is not None or operand1 is None, what, "operand1", "None without op1", operand1)
    on = _tensor_scalar_engine(what, engine, first, second)
    dst, data = tile(what, "dst", dst, engine=on), tile(what, "data", data, engine=on)
    same_partitions(what, dst, data=data)
    steps = [(first, "operand0", operand0, reverse0)]
    if second is not None:
        steps.append((second, "operand1", operand1, reverse1))
    if bitvec:
        (values,) = _integers(what, data=data, dst=dst)
        for op, label, operand, reverse in steps:
            other = _bit_operand(what, label, operand, data)
            sides = (other, values) if reverse else (values, other)
            values = ops.BITVEC[op](*((values,) if op == "invert" else sides))
        put_bits(what, dst, values)
    else:
        values = numbers(what, "data", data)
        for op, label, operand, reverse in steps:
            values = _compute(op, values, _operand(what, label, op, operand, data), reverse)
        put(what, dst, values)
    issue("tensor_scalar", on, cost_model.copy_cycles(on, dst, data, first), dst, data, operand0, operand1)
    return _DONE


def _tensor_scalar_engine(what: str, given: Any, first: str, second: str | None) -> str:
    default = _E.gpsimd if "rsqrt" in (first, second) else _E.vector
    on = _engine(what, given, default, _E.vector, _E.scalar, _E.gpsimd)
    if on == "scalar":
        pairs = (("multiply", "add"), ("multiply", None), ("add", None))
        check((first, second) in pairs, what, "op0, op1", f"one of {pairs} on ScalarE", (first, second))
    check(on == "vector" or first not in ops.BITVEC, what, "engine", "vector for bitvec operators", on)
    rsqrt = "rsqrt" in (first, second)
    check((on == "gpsimd") == rsqrt, what, "engine", "gpsimd for rsqrt, and for nothing else", on)
    return on


def _operand(
    what: str, label: str, op: str, value: Any, data: NkiTensor, dtype: Sequence[str] | None = ("float32",)
) -> Any:
    if op in ops.UNARY:
        unused = value is None or (not isinstance(value, NkiTensor) and value == 0)
        check(unused, what, label, f"None or 0 with the unary nl.{op}", value)
        return None
    return scalar(what, label, value, data.shape[0], dtype)


def _bit_operand(what: str, label: str, value: Any, data: NkiTensor) -> Any:
    if isinstance(value, NkiTensor):
        return bits(what, label, column(what, label, value, data.shape[0], dtype=dtypes.INTEGERS))
    check(value is None or isinstance(value, int), what, label, "an integer (bitvec operator)", value)
    return None if value is None else np.asarray(value).astype(dtypes.NUMPY[data.dtype])


def tensor_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """Reduce the last free dimensions of `data`."""
    what = "nki.isa.tensor_reduce"
    op = operator(what, "op", op, dict.fromkeys((*ops.IDENTITY, *_BIT_REDUCTIONS), 0))
    dst, data = tile(what, "dst", dst), tile(what, "data", data)
    axes = sorted(a % data.ndim for a in ((axis,) if isinstance(axis, int) else axis))
    last = list(range(data.ndim - len(axes), data.ndim))
    check(axes == last and 0 not in axes, what, "axis", "the last free dimensions of data", axis)
    kept = data.free_size // math.prod(data.shape[a] for a in axes)
    check(
        dst.shape[0] == data.shape[0] and dst.free_size == kept,
        what, "dst", f"{data.shape[0]} partitions of {kept} elements", dst,
    )  # fmt: skip
    if op in _BIT_REDUCTIONS:
        check(not negate, what, "negate", "False for a bitvec operator", negate)
        (values,) = _integers(what, data=data, dst=dst)
        put_bits(what, dst, ops.reduce(op, values.reshape(data.shape[0] * kept, -1)))
    else:
        with np.errstate(all="ignore"):
            result = ops.reduce(op, numbers(what, "data", data).reshape(data.shape[0] * kept, -1))
        put(what, dst, -result if negate else result)
    issue("tensor_reduce", "vector", cost_model.reduce_cycles(op, dst, data), dst, data)
    return _DONE


_BIT_REDUCTIONS = ("bitwise_and", "bitwise_or", "bitwise_xor")


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
) -> NkiInstruction:
    """``dst = (data <op0> operand0) <op1> operand1``: a scalar per partition, then a tile."""
    what = "nki.isa.scalar_tensor_tensor"
    first = operator(what, "op0", op0, ops.ARITHMETIC, ops.UNARY)
    second = operator(what, "op1", op1, ops.ARITHMETIC)
    dst, data, operand1 = tile(what, "dst", dst), tile(what, "data", data), tile(what, "operand1", operand1)
    same_partitions(what, dst, data=data, operand1=operand1)
    both = data.buffer == operand1.buffer == "psum"
    check(not both, what, "data, operand1", "at most one of them in PSUM", "both in PSUM")
    column0 = _operand(what, "operand0", first, operand0, data, dtype=None)
    step = _compute(first, numbers(what, "data", data), column0, reverse0)
    put(what, dst, _compute(second, step, numbers(what, "operand1", operand1), reverse1))
    busy = cost_model.scalar_pair_cycles(first, second, dst, data, operand1)
    issue("scalar_tensor_tensor", "vector", busy, dst, data, operand0, operand1)
    return _DONE


def tensor_scalar_reduce(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reduce_op: Any,
    reduce_res: NkiTensor | None = None,
    reverse0: bool = False,
    reduce_cmd: Any = reduce_cmd.reset_reduce,
    reduce_init: Any = None,
    reduce_res_negate: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = data <op0> operand0`` and a reduction of that over all free dimensions."""
    what = "nki.isa.tensor_scalar_reduce"
    first = operator(what, "op0", op0, ops.ARITHMETIC, ops.UNARY)
    by = operator(what, "reduce_op", reduce_op, dict.fromkeys(("add", "multiply", "maximum", "minimum"), 0))
    check(not reverse0, what, "reverse0", "False (not supported yet)", reverse0)
    dst, data = tile(what, "dst", dst), tile(what, "data", data)
    same_partitions(what, dst, data=data)
    values = _compute(first, numbers(what, "data", data), _operand(what, "operand0", first, operand0, data))
    total = _accumulate(what, "vector", by, values, reduce_cmd, reduce_init)
    put(what, dst, values)
    if reduce_res is not None:
        reduce_res = column(what, "reduce_res", reduce_res, data.shape[0])
        put(what, reduce_res, -total if reduce_res_negate else total, "reduce_res")
    busy = cost_model.cycles(data.free_size, dst, data) + (
        0 if reduce_res is None else cost_model.ACCUMULATOR_READ
    )
    issue("tensor_scalar_reduce", "vector", busy, dst, data, reduce_res)
    return _DONE


def _accumulate(what: str, on: str, by: str, values: np.ndarray, cmd: Any, initial: Any = None) -> np.ndarray:
    """Reduce `values` into the accumulator registers of engine `on`, as `cmd` says; returns their content."""
    registers = _machine.current().registers
    partitions = values.shape[0]
    check((initial is not None) == (cmd == reduce_cmd.load_reduce), what, "reduce_init",
          "a value with reduce_cmd.load_reduce, and only then", f"{initial} with {cmd}")  # fmt: skip
    if cmd in (reduce_cmd.reset_reduce, reduce_cmd.reset):
        start: Any = np.full(hardware.PARTITIONS, ops.IDENTITY[by], np.float32)
    elif cmd == reduce_cmd.load_reduce:
        start = np.zeros(hardware.PARTITIONS, np.float32)
        start[:partitions] = np.broadcast_to(
            scalar(what, "reduce_init", initial, partitions), (partitions, 1)
        )[:, 0]
    else:
        start = registers.get(on)
        check(start is not None, what, "reduce_cmd", "a reset before the first reduce", cmd)
        start = start.copy()
    if cmd in (reduce_cmd.reduce, reduce_cmd.reset_reduce, reduce_cmd.load_reduce):
        with np.errstate(all="ignore"):
            start[:partitions] = ops.ARITHMETIC[by](start[:partitions], ops.reduce(by, values))
    registers[on] = start
    return start[:partitions].copy()


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
) -> NkiInstruction:
    """``dst[i] = (data0[i] <op0> dst[i - 1]) <op1> data1[i]`` along the free dimension, from `initial` on."""
    what = "nki.isa.tensor_tensor_scan"
    first, second = operator(what, "op0", op0, ops.ARITHMETIC), operator(what, "op1", op1, ops.ARITHMETIC)
    dst, data0, data1 = tile(what, "dst", dst), tile(what, "data0", data0), tile(what, "data1", data1)
    same_partitions(what, dst, data0=data0, data1=data1)
    both = data0.buffer == data1.buffer == "psum"
    check(not both, what, "data0, data1", "at most one of them in PSUM", "both in PSUM")
    x, y = numbers(what, "data0", data0), numbers(what, "data1", data1)
    state = np.broadcast_to(scalar(what, "initial", initial, dst.shape[0]), (dst.shape[0], 1))[:, 0]
    result = np.empty_like(x)
    for i in range(x.shape[1]):  # each element needs the one before: the one loop that cannot be vectorized
        state = _compute(second, _compute(first, x[:, i], state, reverse0), y[:, i], reverse1)
        result[:, i] = state
    put(what, dst, result)
    busy = cost_model.cycles(hardware.TWO_INPUT_CYCLES * dst.free_size)
    issue("tensor_tensor_scan", "vector", busy, dst, data0, data1)
    return _DONE


def reciprocal(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> NkiInstruction:
    """``dst = 1 / data`` on VectorE."""
    what = "nki.isa.reciprocal"
    dst, data = tile(what, "dst", dst), tile(what, "data", data)
    same_partitions(what, dst, data=data)
    put(what, dst, _compute("reciprocal", numbers(what, "data", data), None))
    issue("reciprocal", "vector", cost_model.cycles(cost_model.VECTOR_RECIPROCAL * data.free_size), dst, data)
    return _DONE


# -- selection and patterns -------------------------------------------------------------------------


def iota(
    dst: NkiTensor,
    pattern: Sequence[Sequence[int]],
    offset: int = 0,
    channel_multiplier: int = 0,
    name: str | None = None,
) -> NkiInstruction:
    """``dst[p, ...] = offset + p * channel_multiplier + pattern`` on GpSimdE."""
    what = "nki.isa.iota"
    dst = tile(what, "dst", dst, ("sbuf",))
    values = _affine(what, dst, pattern, offset, channel_multiplier)
    put_bits(what, dst, values) if dst.dtype in dtypes.INTEGERS else put(what, dst, values.astype(np.float32))
    issue("iota", "gpsimd", cost_model.gpsimd_cycles(dst.free_size), dst)
    return _DONE


def _affine(what: str, dst: NkiTensor, pattern: Any, offset: int, multiplier: int) -> np.ndarray:
    """int32 ``[partitions, elements]`` of an affine pattern of up to four ``[step, count]`` pairs."""
    counts = [int(n) for _, n in pattern]
    check(1 <= len(counts) <= 4, what, "pattern", "1 to 4 pairs [step, count]", pattern)
    matches = math.prod(counts) == dst.free_size
    check(matches, what, "pattern", f"counts whose product is {dst.free_size}", pattern)
    free = np.zeros(counts, np.int32)
    for axis, (step, n) in enumerate(pattern):
        shape = [1] * len(counts)
        shape[axis] = n
        free = free + (np.arange(n, dtype=np.int32) * np.int32(step)).reshape(shape)
    channels = np.arange(dst.shape[0], dtype=np.int32) * np.int32(multiplier)
    return np.int32(offset) + channels[:, None] + free.reshape(1, -1)


def affine_select(
    dst: NkiTensor,
    pattern: Sequence[Sequence[int]],
    channel_multiplier: int,
    on_true_tile: NkiTensor,
    on_false_value: float,
    cmp_op: Any = None,
    offset: int = 0,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = on_true_tile where affine pattern <cmp_op> 0, else on_false_value``, on GpSimdE."""
    what = "nki.isa.affine_select"
    compare = "equal" if cmp_op is None else operator(what, "cmp_op", cmp_op, _COMPARE)
    dst = tile(what, "dst", dst, ("sbuf",))
    on_true_tile = tile(what, "on_true_tile", on_true_tile, ("sbuf",))
    same_partitions(what, dst, on_true_tile=on_true_tile)
    affine = _affine(what, dst, pattern, offset, channel_multiplier)
    chosen = ops.ARITHMETIC[compare](affine, 0) != 0
    _select(what, dst, chosen, "on_true_tile", on_true_tile, np.float32(on_false_value))
    issue("affine_select", "gpsimd", cost_model.gpsimd_cycles(dst.free_size), dst, on_true_tile)
    return _DONE


_COMPARE = dict.fromkeys(("equal", "not_equal", "greater", "greater_equal", "less", "less_equal"), 0)


def _select(what: str, dst: NkiTensor, chosen: np.ndarray, label: str, true: NkiTensor, false: Any) -> None:
    values = numbers(what, label, true)
    put(what, dst, np.where(chosen, values, false))


def tensor_copy_predicated(
    dst: NkiTensor,
    src: Any,
    predicate: NkiTensor,
    reverse_pred: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """Copy the elements of `src`, a tile or a constant, to `dst` where `predicate` holds."""
    what = "nki.isa.tensor_copy_predicated"
    dst = tile(what, "dst", dst)
    predicate = tile(what, "predicate", predicate, dtype=("uint8", "uint16", "uint32"))
    same_partitions(what, dst, predicate=predicate)
    chosen = (bits(what, "predicate", predicate) != 0) != reverse_pred
    if isinstance(src, NkiTensor):
        src = tile(what, "src", src, dtype=(dst.dtype,))
        same_partitions(what, dst, src=src)
        both = src.buffer == predicate.buffer == "psum"
        check(not both, what, "src, predicate", "at most one of them in PSUM", "both in PSUM")
        values: Any = bits(what, "src", src)
    else:
        values = dtypes.from_float32(np.asarray(src, np.float32), dst.dtype)
    if chosen.all():
        old: Any = values
    else:  # the elements left alone are read too: they must exist
        old = bits(what, "dst", dst)
    put_bits(what, dst, np.where(chosen, values, old))
    streamed = src if isinstance(src, NkiTensor) else dst
    busy = cost_model.two_input_cycles(dst, streamed, predicate)
    issue("tensor_copy_predicated", "vector", busy, dst, src, predicate)
    return _DONE


def select_reduce(
    dst: NkiTensor,
    predicate: NkiTensor,
    on_true: NkiTensor,
    on_false: Any,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Any = reduce_cmd.idle,
    reduce_op: Any = None,
    reverse_pred: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = where(predicate, on_true, on_false)`` and on request its maximum over the free dimensions."""
    what = "nki.isa.select_reduce"
    dst = tile(what, "dst", dst)
    predicate = tile(what, "predicate", predicate, dtype=("int8", "uint8", "int16", "uint16"))
    allowed = tuple(n for n in dtypes.NUMPY if n not in ("tfloat32", "int32", "uint32"))
    on_true = tile(what, "on_true", on_true, dtype=allowed)
    same_partitions(what, dst, predicate=predicate, on_true=on_true)
    both = on_true.buffer == predicate.buffer == "psum"
    check(not both, what, "on_true, predicate", "at most one of them in PSUM", "both in PSUM")
    if reduce_op is not None:
        operator(what, "reduce_op", reduce_op, {"maximum": 0})
    chosen = (bits(what, "predicate", predicate) != 0) != reverse_pred
    otherwise = scalar(what, "on_false", on_false, dst.shape[0])
    values = np.where(chosen, numbers(what, "on_true", on_true), otherwise)
    put(what, dst, values)
    if reduce_cmd != _R.idle:
        total = _accumulate(what, "vector", "maximum", values, reduce_cmd)
        if reduce_res is not None:
            put(what, column(what, "reduce_res", reduce_res, dst.shape[0]), total, "reduce_res")
    else:
        check(reduce_res is None, what, "reduce_cmd", "reset_reduce or reduce with reduce_res", reduce_cmd)
    busy = cost_model.two_input_cycles(dst, predicate, on_true)
    issue("select_reduce", "vector", busy, dst, predicate, on_true, reduce_res)
    return _DONE


# -- ScalarE ----------------------------------------------------------------------------------------


def activation(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Any = reduce_cmd.idle,
    name: str | None = None,
) -> NkiInstruction:
    """``dst = op(data * scale + bias)`` on ScalarE, and a sum of that over the free dimensions on request.

    An input outside the range where the engine's polynomial is valid gives NaN.
    """
    what = "nki.isa.activation"
    function = operator(what, "op", op, ops.ACTIVATION)
    dst, data = tile(what, "dst", dst), tile(what, "data", data)
    same_partitions(what, dst, data=data)
    values = numbers(what, "data", data)
    factor = scalar(what, "scale", scale, data.shape[0])
    shift = None if bias is None else scalar(what, "bias", bias, data.shape[0], _BIAS)
    with np.errstate(all="ignore"):
        if isinstance(scale, NkiTensor) or scale != 1.0:
            values = values * factor
        if shift is not None:
            values = values + shift
        result = ops.ACTIVATION[function](values)
    if function in ops.ACTIVATION_RANGE:
        low, high = ops.ACTIVATION_RANGE[function]
        size = np.abs(values) if function == "reciprocal" else values
        result = np.where((size >= low) & (size <= high), result, np.float32(np.nan))
    if reduce_op is not None:
        operator(what, "reduce_op", reduce_op, {"add": 0})
    check(reduce_op is not None or reduce_cmd in (_R.idle, _R.reset), what, "reduce_op", "nl.add", reduce_op)
    check(reduce_cmd != _R.load_reduce, what, "reduce_cmd", "idle, reset, reduce or reset_reduce", reduce_cmd)
    put(what, dst, result)
    read_out = 0
    if reduce_cmd != _R.idle or reduce_res is not None:
        total = _accumulate(what, "scalar", "add", result, reduce_cmd)
        if reduce_res is not None:
            put(what, column(what, "reduce_res", reduce_res, data.shape[0]), total, "reduce_res")
            read_out = cost_model.ACCUMULATOR_READ
    issue(
        "activation", "scalar", cost_model.cycles(data.free_size, dst, data) + read_out, dst, data, reduce_res
    )
    return _DONE


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
    return activation(dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd.reset_reduce, name)


# -- TensorE ----------------------------------------------------------------------------------------


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
    perf_mode: Any = matmul_perf_mode.none,
    name: str | None = None,
) -> NkiInstruction:
    """``dst (+)= stationary.T @ moving``; contraction along the partitions (and a first free dimension of 2
    with ``double_row``), accumulation in fp32 in PSUM."""
    what = "nki.isa.nc_matmul"
    dst = tile(what, "dst", dst, ("psum",))
    double = perf_mode == matmul_perf_mode.double_row
    here = _machine.current().target
    check(here.double_row or not double, what, "perf_mode", f"none on {here.generation}", perf_mode)
    floats = here.matmul_fp8 if double else (*here.matmul_fp8, "bfloat16", "float16", *_WIDE_FLOATS)
    stationary = tile(what, "stationary", stationary, ("sbuf",), floats)
    moving = tile(what, "moving", moving, ("sbuf",), floats)
    wide = [t.dtype in _WIDE_FLOATS for t in (stationary, moving)]
    check(wide[0] == wide[1], what, "moving", "fp32/tf32 only together with fp32/tf32", (stationary, moving))
    formats = {stationary.dtype, moving.dtype}
    both = formats == {"float8_e4m3", "float8_e4m3fn"}
    check(not both, what, "moving", "float8_e4m3 and float8_e4m3fn not in one matmul", formats)
    check(
        dst.dtype == "float32" or (is_transpose and dst.dtype == stationary.dtype),
        what, "dst", "float32 (or stationary's dtype with is_transpose)", dst,
    )  # fmt: skip
    check(not (is_transpose and double), what, "perf_mode", "none with is_transpose", perf_mode)
    columns, elements = _matmul_free(what, stationary, double), _matmul_free(what, moving, double)
    rows, width = _matmul_tiling(what, stationary, tile_position, tile_size, double)
    k = stationary.shape[0]
    check(moving.shape[0] == k, what, "moving", f"{k} partitions, as stationary", moving)
    check(k <= rows, what, "stationary", f"at most {rows} partitions", k)
    check(columns <= width, what, "stationary", f"a free size of at most {width}", columns)
    limit = hardware.MATMUL_MOVING_FREE
    check(elements <= limit, what, "moving", f"a free size of at most {limit}", elements)
    fits = dst.shape[0] == columns and dst.free_size == elements
    check(fits, what, "dst", f"{columns} partitions of {elements} elements", dst)
    _inside_bank(what, dst)
    left = numbers(what, "stationary", stationary).reshape(-1, columns)
    right = numbers(what, "moving", moving).reshape(-1, elements)
    _accumulate_psum(what, dst, _product(left, right), accumulate)
    busy = cost_model.matmul_cycles(columns, elements, stationary.dtype)
    issue("nc_matmul", "tensor", busy, dst, stationary, moving)
    return _DONE


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


def _matmul_free(what: str, t: NkiTensor, double: bool) -> int:
    if not double:
        return t.free_size
    check(
        t.ndim >= 3 and t.shape[1] == 2, what, "perf_mode", "operands [partitions, 2, free] (double_row)", t
    )
    return t.free_size // 2


def _matmul_tiling(
    what: str, stationary: NkiTensor, position: Any, size: Any, double: bool
) -> tuple[int, int]:
    """Rows and columns of the PE array this matmul may use."""
    check(bool(position) == bool(size), what, "tile_position, tile_size", "both or neither", (position, size))
    if not size:
        return hardware.PARTITIONS, hardware.MATMUL_STATIONARY_FREE
    rows, columns = size
    check(rows in (32, 64, 128) and columns in (32, 64, 128), what, "tile_size", "sizes 32, 64 or 128", size)
    check(not (double and columns != 128), what, "tile_size", "no column tiling with double_row", size)
    inside = all(p % s == 0 and p >= 0 and p + s <= 128 for p, s in zip(position, size, strict=True))
    check(inside, what, "tile_position", f"multiples of {tuple(size)} inside 128 x 128", position)
    return rows, columns


def _inside_bank(what: str, dst: NkiTensor) -> None:
    reach = sum((n - 1) * s for n, s in zip(dst.shape[1:], dst.strides[1:], strict=True)) * dst.itemsize
    start = dst.storage.base % hardware.PSUM_BYTES + dst.offset * dst.itemsize % dst.storage.row
    bank = hardware.PSUM_BANK_BYTES
    inside = start // bank == (start + reach + dst.itemsize - 1) // bank
    check(
        inside, what, "dst", f"one PSUM bank of {bank} B", f"bytes {start} to {start + reach + dst.itemsize}"
    )


def _accumulate_psum(what: str, dst: NkiTensor, product: np.ndarray, accumulate: bool | None) -> None:
    """Overwrite or add to PSUM, where None adds to what a matmul wrote and overwrites what nothing wrote.

    Adding to a location that was never written, or last by something else than a matmul, is undefined.
    """
    memory, where = dst.storage.memory, dst.where()
    if memory.matmul is None:
        memory.matmul = np.zeros(memory.data.nbytes, np.uint8)
    started = where.of(memory.matmul)
    fits = bool(started.all()) if accumulate else where.count - memory.unwritten(where) == started.sum()
    check(
        fits or accumulate is False, what, "accumulate",
        "False for the first matmul into a PSUM location (one that nothing else has written since)",
        "True" if accumulate else "None on a location that something else wrote",
    )  # fmt: skip
    if accumulate or (accumulate is None and started.any()):
        old = dst.array().astype(np.float32)
        product = product + np.where(started.all(-1), old, np.float32(0)).reshape(product.shape)
    put(what, dst, product)
    where.of(memory.matmul)[...] = 1


def nc_transpose(
    dst: NkiTensor, data: NkiTensor, engine: Any = engine.unknown, name: str | None = None
) -> NkiInstruction:
    """``dst = data.T``, partitions against flattened free dimensions; bit-accurate."""
    what = "nki.isa.nc_transpose"
    check(isinstance(dst, NkiTensor), what, "dst", "a tensor", dst)
    default = _E.tensor if dst.buffer == "psum" else _E.vector
    on = _engine(what, engine, default, _E.tensor, _E.vector)
    if on == "tensor":
        dst, data = tile(what, "dst", dst, ("psum",)), tile(what, "data", data, ("sbuf",))
        limit = hardware.TENSOR_TRANSPOSE
        if data.itemsize == 1:
            raise NotImplementedError(f"{what}: 8-bit data on TensorE (PSUM receives 16-bit elements)")
    else:
        dst, data = tile(what, "dst", dst), tile(what, "data", data)
        limit = hardware.VECTOR_TRANSPOSE
    check(dst.dtype == data.dtype, what, "dst", f"data's dtype {data.dtype}", dst)
    p, f = data.shape[0], data.free_size
    check(p <= limit and f <= limit, what, "data", f"at most [{limit}, {limit}] on {on}", (p, f))
    check((dst.shape[0], dst.free_size) == (f, p), what, "dst", f"shape ({f}, {p})", dst)
    put_bits(what, dst, np.ascontiguousarray(bits(what, "data", data).T))
    cycles = (
        cost_model.matmul_cycles(f, p, data.dtype, transpose=True) if on == "tensor" else cost_model.cycles(f)
    )
    issue("nc_transpose", on, cycles, dst, data)
    return _DONE


# -- programs of a launch grid ------------------------------------------------------------------------


def core_barrier(
    data: NkiTensor, cores: Sequence[int], engine: Any = engine.gpsimd, name: str | None = None
) -> NkiInstruction:
    """Wait until all programs are here; then what they wrote to `data` in shared HBM may be read by all."""
    what = "nki.isa.core_barrier"
    here = _machine.current()
    data = tensor(what, "data", data, ("shared_hbm",))
    programs = math.prod(here.grid)
    check(
        tuple(cores) == (0, 1) and programs == 2, what, "cores", "(0, 1) on a grid of 2", (cores, here.grid)
    )
    here.shared.barrier(here.program, data.storage)
    return _DONE


# -- registers --------------------------------------------------------------------------------------


def register_alloc(x: int | None = None) -> VirtualRegister:
    """A register, holding `x` if given."""
    return VirtualRegister(x)


def register_move(dst: VirtualRegister, src: Any) -> None:
    """Put a constant or another register's value into `dst`."""
    _writable("nki.isa.register_move", dst).value = (
        src.read() if isinstance(src, VirtualRegister) else int(src)
    )


def register_load(dst: VirtualRegister, src: NkiTensor) -> None:
    """Load the single element of `src` into `dst`."""
    what = "nki.isa.register_load"
    src = tensor(what, "src", src, DMA_MEMORY)
    check(src.size == 1, what, "src", "one element", src)
    _writable(what, dst).value = int(src.read(what, "src").reshape(-1)[0])


def register_store(dst: NkiTensor, src: VirtualRegister) -> None:
    """Store a register in the single element of `dst`."""
    what = "nki.isa.register_store"
    dst = tensor(what, "dst", dst, DMA_MEMORY)
    check(dst.size == 1, what, "dst", "one element", dst)
    put_bits(what, dst, np.array(src.read()))


def _writable(what: str, register: Any) -> VirtualRegister:
    ok = isinstance(register, VirtualRegister) and not register.frozen
    check(ok, what, "dst", "a register that is no loop counter", register)
    return register


_E = engine
_R = reduce_cmd
_G = dge_mode


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotCovered(f"nki.isa.{name}")
