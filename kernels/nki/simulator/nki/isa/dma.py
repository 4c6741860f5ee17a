"""Instructions of the DMA engines, and the barrier between the programs of a launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import dtypes, hardware
from ... import machine as _machine
from ...operands import (
    DMA_MEMORY,
    bits,
    check,
    operator,
    out_of_bounds,
    put_bits,
    read,
    rounded,
    tensor,
    tile,
    write,
)
from ...tensor import NkiTensor
from . import constants
from .instruction import Moved, instruction


@instruction(engine="dma")
def dma_copy(
    dst: NkiTensor,
    src: NkiTensor,
    priority: int | None = None,
    oob_mode: Any = constants.oob_mode.error,
    dge_mode: Any = constants.dge_mode.unknown,
    engine: Any = constants.engine.unknown,
    name: str | None = None,
) -> Moved | None:
    """``dst = src`` between HBM and SBUF, cast by way of fp32 where the dtypes differ."""
    if oob_mode == constants.oob_mode.skip and (out_of_bounds("dst", dst) or out_of_bounds("src", src)):
        return None
    dst, src = tensor("dst", dst, DMA_MEMORY), tensor("src", src, DMA_MEMORY)
    check(dst.size == src.size, "src", f"as many elements as dst ({dst.size})", src.size)
    check(priority is None, "priority", "None (NeuronCore-v4 and later)", priority)
    _dge_engine(dge_mode, engine)
    if dst.dtype != src.dtype:
        moves = dge_mode == constants.dge_mode.hwdge
        check(
            not moves, "dge_mode", f"another to cast {src.dtype} to {dst.dtype}: hwdge moves bytes", dge_mode
        )
    if dst.is_indirect() or src.is_indirect():
        _indirect_copy(dst, src, oob_mode, dge_mode)
    else:
        write(dst, _cast(read("src", src), src.dtype, dst.dtype))
    return Moved(dst, [src])


def _cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """By way of fp32, but bit for bit between the same dtypes."""
    if source == target:
        return values
    return rounded(dtypes.to_float32(values, source), target)


def _dge_engine(mode: Any, given: Any) -> None:
    queues = (constants.engine.sync, constants.engine.scalar)
    check(
        given == constants.engine.unknown or (mode == constants.dge_mode.hwdge and given in queues),
        "engine", "unknown, or sync or scalar with dge_mode.hwdge", f"{given} with {mode}",
    )  # fmt: skip


def _indirect_copy(dst: NkiTensor, src: NkiTensor, oob: Any, mode: Any) -> None:
    """Gather rows into `dst`, or scatter the rows of `src`: partition p uses row ``index[p]``."""
    check(mode != constants.dge_mode.hwdge, "dge_mode", "unknown or swdge for gather and scatter", mode)
    check(not (dst.is_indirect() and src.is_indirect()), "src, dst", "one indirect operand", "two")
    moving, name = (src, "src") if src.is_indirect() else (dst, "dst")
    check(moving.storage.on_chip is False, name, "a tensor in HBM to gather from or scatter to", moving)
    indirect = moving._indirect
    assert indirect is not None
    index = bits(f"{name}'s index", tile(f"{name}'s index", indirect.index, ("sbuf",)))
    rows = index.reshape(-1).astype(np.int64)
    check(rows.size == moving.shape[0], f"{name}'s index", f"{moving.shape[0]} indices", rows.size)
    for p, row in enumerate(rows):
        if not 0 <= row < indirect.extent:
            if oob is constants.oob_mode.skip:
                continue
            check(False, f"{name}'s index", f"rows below {indirect.extent}", f"{row} on partition {p}")
        line = NkiTensor(
            (1, *moving.shape[1:]), moving.dtype, moving.storage, moving.buffer, moving.name,
            strides=moving.strides, offset=moving.offset + int(row) * indirect.stride,
        )  # fmt: skip
        line._inside("nki.isa.dma_copy")
        if src.is_indirect():
            write(dst.slice(0, p, p + 1), _cast(read("src", line), src.dtype, dst.dtype))
        else:
            write(line, _cast(read("src", src.slice(0, p, p + 1)), src.dtype, dst.dtype))


@instruction(engine="dma")
def dma_transpose(
    dst: NkiTensor,
    src: NkiTensor,
    axes: Sequence[int] | None = None,
    priority: int | None = None,
    dge_mode: Any = constants.dge_mode.unknown,
    oob_mode: Any = constants.oob_mode.error,
    name: str | None = None,
) -> Moved:
    """``dst = src.transpose(axes)`` into SBUF: first and last dimension swap, bit-accurate."""
    dst, src = tensor("dst", dst, ("sbuf",)), tensor("src", src, DMA_MEMORY)
    if src.is_indirect():
        raise NotImplementedError("nki.isa.dma_transpose with an indirect src (gather transpose)")
    order = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}.get(src.ndim)
    check(order is not None, "src", "2, 3 or 4 dimensions", src)
    check(axes is None or tuple(axes) == order, "axes", f"{order}", axes)
    check(priority is None, "priority", "None (NeuronCore-v4 and later)", priority)
    check(
        dge_mode in (constants.dge_mode.unknown, constants.dge_mode.hwdge),
        "dge_mode",
        "unknown or hwdge",
        dge_mode,
    )
    check(dst.dtype == src.dtype, "dst", f"src's dtype {src.dtype}", dst)
    sizes = (2,) if dge_mode == constants.dge_mode.hwdge else (2, 4)
    check(src.itemsize in sizes, "src", f"a dtype of {' or '.join(map(str, sizes))} bytes", src)
    if dge_mode == constants.dge_mode.hwdge:
        rows, columns = src.shape[0], src.shape[-1]
        whole = rows == 16 if src.ndim == 2 else rows in (1, 2, 4, 8, 16) and rows * src.shape[-2] % 16 == 0
        check(whole, "src", "hwdge's shape[0]: 16 (2-D), or 1, 2, 4, 8, 16 with shape[-2] making 16", src)
        check(columns <= 128, "src", "hwdge's shape[-1]: at most 128", columns)
    turned = tuple(src.shape[axis] for axis in order or ())
    check(dst.shape == turned, "dst", f"shape {turned}", dst)
    write(dst, read("src", src).transpose(order))
    share = hardware.DMA_TRANSPOSE_ON_CHIP if src.on_chip else hardware.DMA_TRANSPOSE_FROM_HBM
    return Moved(dst, [src], share)


@instruction(engine="dma")
def dma_compute(
    dst: NkiTensor,
    srcs: Sequence[NkiTensor],
    reduce_op: Any,
    scales: Sequence[float] | None = None,
    unique_indices: bool = True,
    oob_mode: Any = constants.oob_mode.error,
    name: str | None = None,
) -> Moved:
    """``dst = srcs[0] + srcs[1] + ...`` in fp32 inside the DMA engines, between HBM and SBUF."""
    operator("reduce_op", reduce_op, {"add": 0})
    check(1 <= len(srcs) <= hardware.DMA_COMPUTE_SOURCES, "srcs", "1 to 16 tensors", len(srcs))
    ones = scales is None or (len(scales) == len(srcs) and all(s == 1.0 for s in scales))
    check(ones, "scales", "None or 1.0 for each source", scales)
    dst = tensor("dst", dst, DMA_MEMORY)
    sources = [tensor(f"srcs[{i}]", src, DMA_MEMORY) for i, src in enumerate(srcs)]
    if any(t.is_indirect() for t in (dst, *sources)):
        raise NotImplementedError("nki.isa.dma_compute with vector_offset (read-modify-write)")
    total: Any = None
    for i, src in enumerate(sources):
        check(src.size == dst.size, f"srcs[{i}]", f"as many elements as dst ({dst.size})", src.size)
        values = dtypes.to_float32(read(f"srcs[{i}]", src), src.dtype).reshape(dst.shape)
        with np.errstate(all="ignore"):
            total = values if total is None else total + values
    write(dst, rounded(total, dst.dtype))
    return Moved(dst, sources)


@instruction(engine="dma")
def sendrecv(
    src: NkiTensor,
    dst: NkiTensor,
    send_to_rank: int,
    recv_from_rank: int,
    pipe_id: int,
    dma_engine: Any = constants.dma_engine.dma,
    name: str | None = None,
) -> Moved:
    """`src` goes to one NeuronCore of two while another's `src` comes into `dst`; all wait at `pipe_id`."""
    here = _machine.current()
    two = math.prod(here.grid) == 2 and here.target.generation != "gen2"
    check(two, "engine", "a grid of 2 on NeuronCore-v3 or newer", f"{here.grid} on {here.target.generation}")
    for label, rank in (("send_to_rank", send_to_rank), ("recv_from_rank", recv_from_rank)):
        check(rank in (0, 1), label, "0 or 1", rank)
    dst, src = tile("dst", dst, ("sbuf",)), tile("src", src, ("sbuf",))
    check(dst.dtype == src.dtype and dst.shape == src.shape, "dst", f"dtype and shape of src, {src!r}", dst)
    if dma_engine == constants.dma_engine.gpsimd_dma:
        most, row = hardware.GPSIMD_DMA_BYTES[src.itemsize], src.free_size * src.itemsize
        check(row <= most, "src", f"at most {most} B per partition with gpsimd_dma", row)
    parcel = (send_to_rank, bits("src", src).copy())
    address, values = here.shared.meet(here.program, ("nki.isa.sendrecv", pipe_id), parcel)[recv_from_rank]
    agreed = f"a program that sends to {here.program}"
    check(address == here.program, "recv_from_rank", agreed, f"{recv_from_rank}, which sends to {address}")
    same = values.shape == (dst.shape[0], dst.free_size) and values.dtype == dtypes.NUMPY[dst.dtype]
    check(same, "dst", "what the other program sends", f"{values.dtype}{values.shape} for {dst!r}")
    put_bits(dst, values)
    return Moved(dst, [src])


@instruction(engine="gpsimd")
def core_barrier(
    data: NkiTensor, cores: Sequence[int], engine: Any = constants.engine.gpsimd, name: str | None = None
) -> None:
    """Wait until all programs are here; then what they wrote to `data` in shared HBM may be read by all."""
    here = _machine.current()
    data = tensor("data", data, ("shared_hbm",))
    programs = math.prod(here.grid)
    check(tuple(cores) == (0, 1) and programs == 2, "cores", "(0, 1) on a grid of 2", (cores, here.grid))
    place = ("nki.isa.core_barrier", id(data.storage))
    here.shared.meet(here.program, place, release=data.storage.memory.barrier)
