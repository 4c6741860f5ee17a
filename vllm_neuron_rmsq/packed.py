"""The packed row format: FP8 codes and their dequantization scale in one uint8 tensor.

Dimensions:
    T: rows (tokens), any number of leading dimensions
    H: hidden size, the number of codes in a row

One row of width H takes H + 4 bytes::

    byte  0 .. H-1      FP8 codes: sign, 4 exponent bits (bias 7), 3 mantissa bits
    byte  H .. H+3      dequantization scale, fp32, little endian

    x  ≈  value(code) * scale

This is the layout NKI Library's ``rmsnorm_quant_kernel`` returns. The tensor is ``torch.uint8``: bytes
cross every collective and graph boundary, where Trainium2's compiler refuses ``float8_e4m3fn`` outright.

How large codes may get is the target's (:mod:`vllm_neuron_rmsq.target`). An invalid row, one that held NaN or
Inf, has zero codes and a NaN scale.
"""

from __future__ import annotations

import sys

import torch

SCALE_BYTES = 4
"""Width of the scale at the end of every packed row, in bytes."""

SCALE_FLOOR = 1e-6
"""Smallest dequantization scale; what a row of zeros gets."""

NAN_CODE = 0x7F
"""The one byte that is NaN both in float8_e4m3 and in float8_e4m3fn."""

if sys.byteorder != "little":  # pragma: no cover - no supported platform is big endian
    raise ImportError(
        "vllm_neuron_rmsq.packed: the packed scale is little-endian fp32 and this machine is big endian"
    )


def check(packed: torch.Tensor, hidden_size: int | None = None) -> int:
    """Check that ``packed`` is a packed tensor and return H.

    Args:
        packed: ``[..., H + 4]`` uint8.
        hidden_size: the H the caller expects; ``None`` accepts any.

    Raises:
        ValueError: wrong dtype, no room for codes and scale, or another H than expected.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed: expected dtype torch.uint8, got {packed.dtype}")
    if packed.dim() < 1 or packed.shape[-1] <= SCALE_BYTES:
        raise ValueError(
            f"packed: expected shape [..., H + {SCALE_BYTES}] with H >= 1, got {list(packed.shape)}"
        )
    width = packed.shape[-1] - SCALE_BYTES
    if hidden_size is not None and width != hidden_size:
        raise ValueError(
            f"packed: expected last dimension {hidden_size + SCALE_BYTES} (H = {hidden_size} codes and a "
            f"{SCALE_BYTES}-byte scale), got {packed.shape[-1]}"
        )
    return width


def pack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Join codes and row scales into packed rows.

    Args:
        codes: ``[..., H]`` uint8 or float8_e4m3fn.
        scale: ``[..., 1]`` or ``[...]`` fp32 dequantization scale of each row.

    Returns:
        ``[..., H + 4]`` uint8, contiguous.

    Raises:
        ValueError: dtypes or shapes do not fit together.
    """
    if codes.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(f"codes: expected dtype torch.uint8 or torch.float8_e4m3fn, got {codes.dtype}")
    if codes.dim() < 1 or codes.shape[-1] < 1:
        raise ValueError(f"codes: expected shape [..., H] with H >= 1, got {list(codes.shape)}")
    if scale.dtype != torch.float32:
        raise ValueError(f"scale: expected dtype torch.float32, got {scale.dtype}")
    rows = codes.shape[:-1]
    if scale.shape not in (rows, (*rows, 1)):
        raise ValueError(f"scale: expected shape {[*rows, 1]} or {list(rows)}, got {list(scale.shape)}")
    # A copy: a stride of 0 along a dimension of size 1 counts as contiguous but cannot be viewed as bytes.
    tail = scale.reshape(*rows, 1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.cat([codes.view(torch.uint8), tail], dim=-1)


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split packed rows into codes and scales.

    Args:
        packed: ``[..., H + 4]`` uint8.

    Returns:
        codes: ``[..., H]`` uint8, a view of ``packed``; ``codes.view(torch.float8_e4m3fn)`` reads them.
        scale: ``[..., 1]`` fp32. A view of ``packed`` where the rows are 4-byte aligned (H a multiple of
            4 and no odd offset or stride), else a copy.

    Raises:
        ValueError: ``packed`` is not a packed tensor.
    """
    width = check(packed)
    codes, tail = packed[..., :width], packed[..., width:]
    aligned = width % 4 == 0 and packed.storage_offset() % 4 == 0
    if not aligned or any(s % 4 for s in packed.stride()[:-1]) or packed.stride(-1) != 1:
        tail = tail.clone(memory_format=torch.contiguous_format)
    return codes, tail.view(torch.float32)


def dequantize(packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the numbers packed rows stand for: ``value(code) * scale``, computed in fp32.

    Args:
        packed: ``[..., H + 4]`` uint8.
        dtype: floating dtype of the result.

    Returns:
        ``[..., H]`` of ``dtype``; rows with a NaN scale are NaN throughout.

    Raises:
        ValueError: ``packed`` is not a packed tensor.
    """
    codes, scale = unpack(packed)
    return (codes.view(torch.float8_e4m3fn).to(torch.float32) * scale).to(dtype)
