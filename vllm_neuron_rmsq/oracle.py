"""The packed contract in float64 NumPy, written from the contract: it imports nothing of the package.

What tests and ``validate`` hold every backend to.

Dimensions:
    T: rows
    H: hidden size
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

FP8_MAX = {"trn2": 240.0, "trn3": 448.0}
SCALE_RTOL = 2.0**-20
TIE_RTOL = 2.0**-18
"""How near a rounding boundary, relative to the value, fp32 arithmetic may fall on either side of it."""


def _code_values() -> np.ndarray:
    """Values of the codes 0x00 .. 0x7E: four exponent bits, bias 7, three mantissa bits, subnormals."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, (codes & 7) / 8.0
    return np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))


VALUES = _code_values()
BOUNDARIES = (VALUES[:-1] + VALUES[1:]) / 2


def to_fp8(values: np.ndarray) -> np.ndarray:
    """Round float64 ``values`` within ±448 to codes (uint8), ties to the even code; -0.0 keeps its sign."""
    magnitude = np.abs(values)
    below = np.searchsorted(BOUNDARIES, magnitude, side="left")
    tie = (below < len(BOUNDARIES)) & (BOUNDARIES[np.minimum(below, len(BOUNDARIES) - 1)] == magnitude)
    codes = below + (tie & (below % 2 == 1))
    return (codes + np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def from_fp8(codes: np.ndarray) -> np.ndarray:
    """Values (float64) of codes (uint8) that are not NaN."""
    return np.where(codes & 0x80, -1.0, 1.0) * VALUES[codes & 0x7F]


@dataclass
class Expected:
    """What the contract says of ``[T, H]`` rows that hold no NaN or Inf.

    Attributes:
        scale: ``[T, 1]`` float64.
        scaled: ``[T, H]`` float64, ``clip(y / scale, ±R)``, before rounding to codes.
        residual_out: ``[T, H]`` of hidden's dtype; ``None`` for an op that has none.
    """

    scale: np.ndarray
    scaled: np.ndarray
    residual_out: torch.Tensor | None


def rms_norm_quant(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    lower_bound: float = 0.0,
    static_scale: float | None = None,
    target: str = "trn2",
) -> Expected:
    """The contract in float64, on finite ``hidden`` of any rank, flattened to ``[T, H]``."""
    width = hidden.shape[-1]
    x = hidden.double()
    if residual is not None:
        x = x + residual.double()
    # float64 holds enough bits that rounding its sum to fp32 is the fp32 sum.
    residual_out = x.float().to(hidden.dtype).reshape(-1, width)
    y = x.reshape(-1, width).numpy()
    if weight is not None:
        y = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + eps) * weight.double().numpy()
    if lower_bound:
        y = np.clip(y, -lower_bound, lower_bound)
    return _quantized(y, residual_out, static_scale, target)


def silu_mul_quant(
    gate_up: torch.Tensor, *, static_scale: float | None = None, target: str = "trn2"
) -> Expected:
    """The contract of SiLU times up in float64, on finite ``gate_up [..., 2 I]``, flattened to ``[T, I]``."""
    gate, up = np.split(gate_up.double().reshape(-1, gate_up.shape[-1]).numpy(), 2, axis=1)
    with np.errstate(over="ignore"):  # exp of a gate far below zero: SiLU is 0 there
        y = gate / (1 + np.exp(-gate)) * up
    return _quantized(y, None, static_scale, target)


def packed_fp8_linear(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract's matmul in float64, of codes that are not NaN.

    Args:
        codes: ``[..., H]`` uint8.
        row_scale: ``[..., 1]``, or one.
        weight: ``[N, H]`` uint8.
        weight_scale: ``[N]``, ``[1]`` or a scale for each block of 128 x 128.
        bias: ``[N]``.

    Returns:
        ``[..., N]`` float64, and the same of magnitudes: what rounding errors are relative to.
    """
    x = from_fp8(codes.numpy()) * row_scale.double().numpy()
    scale = weight_scale.double().numpy()
    if scale.ndim == 2:
        n, h = np.indices(weight.shape) // 128
        scale = scale[n, h]
    else:
        scale = scale[:, None]
    w = from_fp8(weight.numpy()) * scale
    shift = 0.0 if bias is None else bias.double().numpy()
    out, magnitude = x @ w.T + shift, np.abs(x) @ np.abs(w).T + np.abs(shift)
    return torch.from_numpy(out), torch.from_numpy(magnitude)


def _quantized(
    y: np.ndarray, residual_out: torch.Tensor | None, static_scale: float | None, target: str
) -> Expected:
    limit = FP8_MAX[target]
    if static_scale is None:
        peak = np.max(np.abs(y), axis=1, keepdims=True)
        scale = np.maximum(peak / limit, 1e-6)
    else:
        scale = np.full((y.shape[0], 1), static_scale)
    return Expected(scale, np.clip(y / scale, -limit, limit), residual_out)


def ordinal(codes: np.ndarray) -> np.ndarray:
    """Codes (uint8) as whole numbers in the order of their values: one step is one."""
    magnitude = (codes & 0x7F).astype(int)
    return np.where(codes & 0x80, -magnitude, magnitude)
