"""NKI's dtypes on NumPy, and the conversions between them.

NKI names dtypes by strings. Engines compute in fp32; reading converts to it and writing converts from it,
to the nearest value, ties to even. ml_dtypes converts bf16 quickly but FP8 one element at a time, so
FP8 goes through tables: 256 entries to decode, 65,536 to encode.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

# Four MX elements in one: moved as bits, never computed with here.
PACKED: dict[str, np.dtype] = {
    "float8_e5m2_x4": np.dtype(np.uint32),
    "float8_e4m3fn_x4": np.dtype(np.uint32),
    "float4_e2m1fn_x4": np.dtype(np.uint16),
}
NUMPY: dict[str, np.dtype] = {
    "bool": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "tfloat32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    **PACKED,
}
FP8 = ("float8_e4m3", "float8_e4m3fn", "float8_e5m2")
INTEGERS = ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32")
_FROM_NUMPY = {dtype: name for name, dtype in NUMPY.items() if name not in ("bool", "tfloat32", *PACKED)}
_FROM_NUMPY[np.dtype(np.bool_)] = "bool"


def name_of(dtype: Any) -> str:
    """NKI's name for `dtype`, an NKI name or anything NumPy knows. Raises TypeError for others."""
    if isinstance(dtype, str) and dtype in NUMPY:
        return dtype
    try:
        return _FROM_NUMPY[np.dtype(dtype)]
    except (TypeError, KeyError):
        raise TypeError(f"{dtype!r} is no NKI dtype; known are {', '.join(NUMPY)}") from None


def itemsize(name: str) -> int:
    """Bytes per element."""
    return NUMPY[name].itemsize


def largest(name: str) -> float:
    """The largest finite value of a float."""
    return float(ml_dtypes.finfo(NUMPY[name]).max)


@cache
def _decode_table(name: str) -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(NUMPY[name]).astype(np.float32)


@cache
def _encode_table(name: str) -> np.ndarray:
    """FP8 code of every fp32 whose low 16 bits are zero, by its high 16 bits."""
    halves = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        return halves.astype(NUMPY[name]).view(np.uint8)


def _no_packed(name: str) -> None:
    if name in PACKED:
        raise NotImplementedError(
            f"{name}: the simulator moves packed MX elements but does not compute with them"
        )


def to_float32(values: np.ndarray, name: str) -> np.ndarray:
    """`values` of dtype `name` in fp32 (itself where it is fp32 already)."""
    _no_packed(name)
    if values.dtype == np.float32:
        return values
    if name in FP8:
        return _decode_table(name)[values.view(np.uint8)]
    return values.astype(np.float32)


def _to_float16(values: np.ndarray) -> np.ndarray:
    """fp16 by NumPy, but for its subnormals, which NumPy takes eight times as long for.

    Adding 1/2 to a magnitude below 2^-14 rounds it to a multiple of 2^-24, as fp16 does; the low bits of
    the sum are the code.
    """
    small = np.abs(values) < np.float32(2.0**-14)
    if not small.any():
        return values.astype(np.float16)
    result = np.where(small, np.float32(0), values).astype(np.float16)
    few = values[small]
    codes = (np.abs(few) + np.float32(0.5)).view(np.uint32) - np.float32(0.5).view(np.uint32)
    result.view(np.uint16)[small] = codes | ((few.view(np.uint32) >> 16) & 0x8000)
    return result


def from_float32(values: np.ndarray, name: str) -> np.ndarray:
    """fp32 `values` rounded to dtype `name`, ties to even; integers saturate, NaN becomes 0 there.

    FP8 by table: cutting an fp32 to its high half with a sticky last bit (round to odd) keeps all that a
    correct rounding to 2 or 3 mantissa bits needs, subnormals included, so one look-up does the rest.
    """
    _no_packed(name)
    dtype = NUMPY[name]
    if name == "tfloat32":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (((bits >> 13) & 1) + 0x0FFF)) & np.uint32(0xFFFFE000)
        return np.where(np.isfinite(values), rounded.view(np.float32), values)
    if dtype == np.float32:
        return values
    if name in FP8:
        bits = np.ascontiguousarray(values).view(np.uint32)
        odd = (bits >> 16) | ((bits & 0xFFFF) != 0)
        return _encode_table(name)[odd].view(dtype)
    if name in INTEGERS:
        limits = np.iinfo(dtype)
        with np.errstate(invalid="ignore"):
            rounded = np.rint(np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=-np.inf))
        return np.clip(rounded, limits.min, limits.max).astype(dtype)
    with np.errstate(all="ignore"):
        return _to_float16(values) if name == "float16" else values.astype(dtype)
