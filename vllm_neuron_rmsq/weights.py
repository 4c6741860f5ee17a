"""The weight's numbers: quantize a linear's weight to FP8, and bring FP8 weights within a target's range.

A weight has a scale for each output channel, one for all, or one for each block of 128 x 128 of it.

Dimensions:
    N: output features of a linear
    H: input features of a linear
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_neuron_rmsq.packed import NAN_CODE
from vllm_neuron_rmsq.target import Target

BLOCK = 128
"""Rows and columns of a weight's block, where blocks have scales; the last ones may be smaller."""

ROWS_AT_A_TIME = 1024
"""Weight rows halved at once: bounds the memory for what is computed of them."""


class Fitted(NamedTuple):
    """A weight within a target's range.

    Attributes:
        codes: ``[N, H]`` uint8.
        scale: fp32, of the shape it had.
        halved: whether the codes were halved and the scales doubled to get there.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    halved: bool


def block_scale_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Return the shape of a weight ``[N, H]``'s block scales: ``(ceil(N / 128), ceil(H / 128))``."""
    return -(-out_features // BLOCK), -(-in_features // BLOCK)


def expand_block_scale(scale: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """Return the scale of each element, ``[N, H]``, from block scales ``[ceil(N / 128), ceil(H / 128)]``."""
    by_row = scale.repeat_interleave(BLOCK, dim=0)[:out_features]
    return by_row.repeat_interleave(BLOCK, dim=1)[:, :in_features]


def quantize(
    weight: torch.Tensor, target: Target, *, blocks: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a linear's weight to FP8, symmetrically, one scale an output channel or a block of 128 x 128.

    ``scale = max|w| / R`` and ``code = to_fp8_nearest_even(w / scale)``, in fp32; a channel of zeros has
    zero codes.

    Args:
        weight: ``[N, H]``, floating and finite.
        target: whose R.
        blocks: a scale a block instead of a channel.

    Returns:
        ``[N, H]`` float8_e4m3fn and ``[N, 1]`` fp32, for blocks ``[ceil(N / 128), ceil(H / 128)]``.
    """
    values = weight.float()
    if not blocks:
        scale = scale_of(values.abs().amax(dim=1, keepdim=True), target)
        return encode(values, scale, target), scale
    down, across = block_scale_shape(*weight.shape)
    padding = (0, across * BLOCK - weight.shape[1], 0, down * BLOCK - weight.shape[0])
    padded = torch.nn.functional.pad(values.abs(), padding)
    scale = scale_of(padded.reshape(down, BLOCK, across, BLOCK).amax(dim=(1, 3)), target)
    return encode(values, expand_block_scale(scale, *weight.shape), target), scale


def scale_of(largest: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the scale, fp32, of numbers whose largest magnitude is ``largest``."""
    return (largest / target.fp8_max).clamp(min=torch.finfo(torch.float32).tiny)


def encode(values: torch.Tensor, scale: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the codes, float8_e4m3fn, of fp32 ``values`` under a given scale; larger ones are clipped."""
    return (values / scale).clamp_(-target.fp8_max, target.fp8_max).to(torch.float8_e4m3fn)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the numbers, fp32, that codes stand for; torch's own conversion takes much longer on a CPU.

    Args:
        codes: uint8, codes of ``float8_e4m3fn`` without NaN.
    """
    # A code's exponent and mantissa have the same order in bf16, with 3 bits of the mantissa's 7, and the
    # exponent counts from 2^-127, not 2^-7. The sign-extended code brings the sign to the top.
    wide = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(~0x7800)
    return wide.view(torch.bfloat16).float().mul_(2.0**120)


def fit(codes: torch.Tensor, scale: torch.Tensor, target: Target) -> Fitted:
    """Bring an FP8 weight within ``target``'s range: unchanged where it is, else :func:`halve` d.

    Args:
        codes: ``[N, H]`` uint8, codes of ``float8_e4m3fn``.
        scale: ``[N]``, ``[1]`` or ``[ceil(N / 128), ceil(H / 128)]`` fp32.
        target: whose range.

    Raises:
        ValueError: the codes or scales hold NaN or Inf, a scale is negative, or it is zero where codes are
            not.
    """
    largest = int((codes & 0x7F).amax())
    if largest == NAN_CODE or not scale.isfinite().all():
        raise ValueError(
            "weight: holds NaN or Inf in its codes or scales; the checkpoint is corrupt or was quantized "
            "from a corrupt one"
        )
    if not (scale > 0).all():
        _check_no_weight_is_lost(codes, scale)
    if largest <= target.max_code:
        return Fitted(codes, scale, False)
    return Fitted(*halve(codes, scale), True)


def _check_no_weight_is_lost(codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise ValueError for scales below zero, and for scales of zero but where all codes are zero too."""
    least = scale.min().item()
    if least < 0:
        raise ValueError(f"weight_scale: expected positive numbers, got {least:g}; the checkpoint is corrupt")
    if scale.dim() == 2:
        lost = expand_block_scale(scale, *codes.shape) == 0
    else:
        lost = (scale == 0).unsqueeze(1).expand_as(codes)
    wiped = int((lost & (codes & 0x7F != 0)).sum())
    if wiped:
        raise ValueError(
            f"weight_scale: expected positive numbers, got 0 for {wiped} weights that are not zero; the "
            "checkpoint is corrupt"
        )


def halve(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring FP8 weights of the OCP range (±448) within Trainium2's (±240): half the codes, twice the scale.

    Exact but for odd codes among the subnormals, which round to even; the usual factor
    240/448 rounds nearly every weight anew.

    Args:
        codes: ``[N, H]`` uint8, e4m3fn codes without NaN.
        scale: fp32, of any shape.

    Returns:
        new ``codes`` and ``scale`` of the same shapes.
    """
    halved = torch.empty_like(codes)
    for start in range(0, codes.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        magnitude = codes[rows] & 0x7F
        # Up to code 15 numbers are multiples of one step: half as many, to even. Above, one exponent less.
        small = (magnitude + ((magnitude >> 1) & 1)) >> 1
        halved[rows] = torch.where(magnitude < 16, small, magnitude - 8) | (codes[rows] & 0x80)
    return halved, scale * 2


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what an FP8 weight stands for, rounded once.

    Args:
        codes: ``[N, H]`` uint8, e4m3fn codes.
        scale: ``[N]``, ``[1]`` or ``[ceil(N / 128), ceil(H / 128)]`` fp32.
        dtype: floating.

    Returns:
        ``[N, H]`` of ``dtype``.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if scale.dim() == 1:
        scale = scale.expand(codes.shape[0])
    for start in range(0, codes.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        values = codes[rows].view(torch.float8_e4m3fn).float()
        if scale.dim() == 1:
            out[rows] = (values * scale[rows, None]).to(dtype)
        else:
            blocks = scale[start // BLOCK : (start + ROWS_AT_A_TIME) // BLOCK]
            out[rows] = (values * expand_block_scale(blocks, *values.shape)).to(dtype)
    return out
