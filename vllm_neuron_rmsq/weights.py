"""The weight's numbers: quantize a linear's weight to FP8, and bring FP8 weights within a target's range.

Dimensions:
    N: output features of a linear
    H: input features of a linear
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_neuron_rmsq.packed import NAN_CODE
from vllm_neuron_rmsq.target import Target

ROWS_AT_A_TIME = 1024
"""Weight rows converted at once while halving: bounds the bf16 copy."""


class Fitted(NamedTuple):
    """A weight within a target's range.

    Attributes:
        codes: ``[N, H]`` uint8.
        scale: ``[N]`` or ``[1]`` fp32.
        halved: whether the codes were halved and the scales doubled to get there.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    halved: bool


def quantize(weight: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a linear's weight to FP8, symmetrically, one scale an output channel.

    ``scale = max|w| / R`` and ``code = to_fp8_nearest_even(w / scale)``, in fp32; a channel of zeros has
    zero codes.

    Args:
        weight: ``[N, H]``, floating and finite.
        target: whose R.

    Returns:
        ``[N, H]`` float8_e4m3fn and ``[N, 1]`` fp32.
    """
    limit = target.fp8_max
    values = weight.float()
    scale = (values.abs().amax(dim=1, keepdim=True) / limit).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scale).clamp(-limit, limit).to(torch.float8_e4m3fn), scale


def fit(codes: torch.Tensor, scale: torch.Tensor, target: Target) -> Fitted:
    """Bring an FP8 weight within ``target``'s range: unchanged where it is, else :func:`halve` d.

    Args:
        codes: ``[N, H]`` uint8, codes of ``float8_e4m3fn``.
        scale: ``[N]`` or ``[1]`` fp32.
        target: whose range.

    Raises:
        ValueError: the codes or scales hold NaN or Inf.
    """
    largest = int((codes & 0x7F).amax())
    if largest == NAN_CODE or not scale.isfinite().all():
        raise ValueError(
            "weight: holds NaN or Inf in its codes or scales; the checkpoint is corrupt or was quantized "
            "from a corrupt one"
        )
    if largest <= target.max_code:
        return Fitted(codes, scale, False)
    return Fitted(*halve(codes, scale), True)


def halve(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring FP8 weights of the OCP range (±448) within Trainium2's (±240): half the codes, twice the scale.

    Exact but for odd codes among the subnormals, which round to even; the usual factor
    240/448 rounds nearly every weight anew.

    Args:
        codes: ``[N, H]`` uint8, e4m3fn codes without NaN.
        scale: ``[N]`` or ``[1]`` fp32.

    Returns:
        new ``codes`` and ``scale`` of the same shapes.
    """
    halved = torch.empty_like(codes)
    for start in range(0, codes.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        values = codes[rows].view(torch.float8_e4m3fn).to(torch.bfloat16) * 0.5
        halved[rows] = values.to(torch.float8_e4m3fn).view(torch.uint8)
    return halved, scale * 2
