"""Copies, constants and shuffles on chip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import cost_model, dtypes
from ...operands import bits, check, numbers, put, put_bits, rounded, same_partitions, tile
from ...tensor import NkiTensor
from . import constants
from .instruction import Busy, instruction

_KEEP = 255


@instruction(engine=("vector", "gpsimd"))
def memset(
    dst: NkiTensor, value: Any, engine: Any = constants.engine.unknown, name: str | None = None
) -> Busy:
    """Fill `dst` with a constant."""
    dst = tile("dst", dst)
    check(isinstance(value, (int, float, np.number)), "value", "a constant", value)
    dtype = dtypes.NUMPY[dst.dtype]
    if dst.dtype in dtypes.INTEGERS:
        limits = np.iinfo(dtype)
        whole = isinstance(value, (int, np.integer)) and bool(limits.min <= value <= limits.max)
        got = value if isinstance(value, (int, np.integer)) else f"{value!r}, which is no integer"
        check(whole, "value", f"a whole number of {dst.dtype}", got)
    elif dst.dtype in dtypes.PACKED:
        check(value == 0, "value", f"0, the only constant for {dst.dtype}", value)
    elif dst.dtype in dtypes.FP8:
        rounded(np.full((), value, np.float32), dst.dtype)
    put_bits(dst, np.full((), value).astype(dtype))
    return Busy(cost_model.memset_cycles(engine, dst, value), (dst,))


@instruction(engine=("vector", "scalar", "gpsimd"))
def tensor_copy(
    dst: NkiTensor, src: NkiTensor, engine: Any = constants.engine.unknown, name: str | None = None
) -> Busy:
    """``dst = src`` on chip; bit-accurate where the dtypes are the same."""
    dst, src = tile("dst", dst), tile("src", src)
    same_partitions(dst, src=src)
    if dst.dtype == src.dtype:
        put_bits(dst, bits("src", src))
    else:
        put(dst, numbers("src", src))
    return Busy(cost_model.copy_cycles(engine, dst, src), (dst, src))


@instruction(engine="vector")
def nc_stream_shuffle(
    dst: NkiTensor, src: NkiTensor, shuffle_mask: Sequence[int], name: str | None = None
) -> Busy:
    """Partition i of each quadrant of 32 gets partition ``shuffle_mask[i]`` of the same quadrant of `src`.

    255 leaves a partition as it is. `dst` may be `src`.
    """
    dst, src = tile("dst", dst), tile("src", src)
    check(dst.dtype == src.dtype, "dst", f"src's dtype {src.dtype}", dst)
    check(dst.free_size == src.free_size, "src", f"{dst.free_size} elements each, as dst", src)
    mask = [int(source) for source in shuffle_mask]
    fits = len(mask) == 32 and all(0 <= source < 32 or source == _KEEP for source in mask)
    check(fits, "shuffle_mask", f"32 partitions of a quadrant, 0..31 or {_KEEP} to keep what is there", mask)
    active = -(-max(dst.shape[0], src.shape[0]) // 32) * 32
    starts = (0,) if active > 64 else (0, 64) if active > 32 else (0, 32, 64, 96)
    for label, t in (("dst", dst), ("src", src)):
        allowed = f"{active} active partitions to start at partition {' or '.join(map(str, starts))}"
        check(t.start_partition in starts, label, allowed, t.start_partition)
    moves = [(p, p - p % 32 + mask[p % 32]) for p in range(dst.shape[0]) if mask[p % 32] != _KEEP]
    missing = [source for _, source in moves if source >= src.shape[0]]
    check(not missing, "shuffle_mask", f"partitions of src, of which there are {src.shape[0]}", missing)
    values = {source: bits("src", src.slice(0, source, source + 1)).copy() for _, source in moves}
    for target, source in moves:
        put_bits(dst.slice(0, target, target + 1), values[source])
    return Busy(cost_model.cycles(dst.free_size, dst, src), (dst, src))
