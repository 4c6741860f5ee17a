"""The numbers: RMSNorm or SiLU + FP8 quantization, and the matmul of its rows, in plain torch.

The statement every backend is held to.

Dimensions:
    H: hidden size, the contraction of the matmul
    I: intermediate size, features of gate and of up
    N: output features
    ...: rows (tokens), any number of leading dimensions

All arithmetic is fp32; R is the largest code value of the target (240 on trn2, 448 on trn3)::

    x     = hidden [+ residual]
    y     = x * rsqrt(mean(x²) + eps) * gamma        NO_NORM (weight=None): y = x
    y     = clip(y, ±lower_bound)                    only when lower_bound > 0
    scale = max(max|y| / R, 1e-6)
    code  = to_fp8_nearest_even(clip(y / scale, ±R))

    y     = gate * sigmoid(gate) * up                the activation before a down projection

    out   = sum over H of value(code) * value(weight code) * scale * weight_scale + bias      the matmul

The norm's formula is that of NKI Library's ``rmsnorm_quant_kernel`` (RMSNorm: Zhang & Sennrich 2019,
arXiv:1910.07467; SiLU times up: SwiGLU, Shazeer 2020, arXiv:2002.05202). It says nothing about numbers that
do not fit fp32, so this does: a row whose max|y| or mean(x²) is not finite (it held NaN or Inf, or overflows)
is invalid. It gets zero codes and a NaN scale, and NaN codes (0x7F) where quantization is static and there is
no scale to say so. Its neighbours are untouched.
"""

from __future__ import annotations

import math

import torch

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.target import Target, get
from vllm_neuron_rmsq.weights import BLOCK, block_scale_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DTYPE_NAMES = "torch.bfloat16, torch.float16 or torch.float32"


def rms_norm_quant(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    lower_bound: float = 0.0,
    static_scale: torch.Tensor | float | None = None,
    target: Target | str | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalize rows, quantize them to FP8 and pack each with its scale.

    Takes the arguments of :func:`vllm_neuron_rmsq.ops.rms_norm_quant`, so that the two can stand in for
    each other.

    Args:
        hidden: ``[..., H]``, rank >= 2, bf16, fp16 or fp32.
        weight: ``[H]`` gamma, floating; ``None`` quantizes without a norm (NO_NORM).
        eps: added to the mean square, >= 0.
        residual: like ``hidden``; added in fp32 before the norm.
        lower_bound: clip normalized values to ±lower_bound; 0 does not clip.
        static_scale: one given dequantization scale, > 0, a float or an fp32 tensor of one element.
        target: a target or its name; ``None`` is trn2.
        backend: ignored.

    Returns:
        ``[..., H + 4]`` uint8 packed rows, or ``[..., H]`` uint8 codes when ``static_scale`` is given; with
        a residual a pair of that and ``residual_out``, ``hidden + residual`` rounded to hidden's dtype.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range.
    """
    check_rms_norm_quant(hidden, weight, eps, residual, lower_bound, static_scale)
    out, residual_out = compute(hidden, weight, eps, residual, lower_bound, static_scale, get(target))
    return out if residual is None else (out, residual_out)


def compute(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    lower_bound: float,
    static_scale: torch.Tensor | float | None,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula itself, on checked arguments; shapes as in :func:`rms_norm_quant`.

    Returns:
        ``(packed or codes, x rounded to hidden's dtype)``.
    """
    x = hidden.float()
    if residual is not None:
        x = x + residual.float()
    if weight is None:
        y = x
        valid = torch.ones_like(x[..., :1], dtype=torch.bool)
    else:
        mean_square = x.square().mean(dim=-1, keepdim=True)
        valid = mean_square.isfinite()
        y = x * torch.rsqrt(mean_square + eps) * weight.float()
    return _quantize(y, valid, lower_bound, static_scale, target), x.to(hidden.dtype)


def silu_mul_quant(
    gate_up: torch.Tensor,
    *,
    static_scale: torch.Tensor | float | None = None,
    target: Target | str | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply SiLU of the gate by up, quantize each row to FP8 and pack it with its scale.

    Takes the arguments of :func:`vllm_neuron_rmsq.ops.silu_mul_quant`.

    Args:
        gate_up: ``[..., 2 I]``, gate then up, rank >= 2, bf16, fp16 or fp32.
        static_scale: one given dequantization scale, > 0, a float or an fp32 tensor of one element.
        target: a target or its name; ``None`` is trn2.
        backend: ignored.

    Returns:
        ``[..., I + 4]`` uint8 packed rows, or ``[..., I]`` uint8 codes when ``static_scale`` is given.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range.
    """
    check_silu_mul_quant(gate_up, static_scale)
    return compute_silu_mul(gate_up, static_scale, get(target))


def compute_silu_mul(
    gate_up: torch.Tensor, static_scale: torch.Tensor | float | None, target: Target
) -> torch.Tensor:
    """The formula itself, on checked arguments; shapes as in :func:`silu_mul_quant`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    y = gate * torch.sigmoid(gate) * up
    return _quantize(y, torch.ones_like(y[..., :1], dtype=torch.bool), 0.0, static_scale, target)


def packed_fp8_linear(
    packed: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    static_scale: torch.Tensor | float | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply packed rows, or codes of one given scale, by an FP8 weight.

    Takes the arguments of :func:`vllm_neuron_rmsq.ops.packed_fp8_linear`, but no prepacked weight.

    Args:
        packed: ``[..., H + 4]`` uint8 packed rows, or ``[..., H]`` codes when ``static_scale`` is given.
        weight: ``[N, H]`` float8_e4m3fn or uint8.
        weight_scale: ``[N]``, ``[1]`` or, a scale for each block of 128 x 128,
            ``[ceil(N / 128), ceil(H / 128)]``; fp32.
        bias: ``[N]``, floating.
        static_scale: one given scale of all rows, > 0, a float or an fp32 tensor of one element.
        out_dtype: bf16, fp16 or fp32.
        backend: ignored.

    Returns:
        ``[..., N]`` of ``out_dtype``.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range.
    """
    check_fp8_weight(weight, weight_scale)
    out_features, in_features = weight.shape
    check_packed_fp8_linear(
        packed, weight, out_features, in_features, weight_scale, bias, static_scale, out_dtype
    )
    codes, scale = (packed, static_scale) if static_scale is not None else fmt.unpack(packed)
    x = codes.view(torch.float8_e4m3fn).float()
    w = weight.view(torch.float8_e4m3fn).float()
    if weight_scale.dim() == 1:
        out = x @ w.t() * scale * weight_scale
    else:
        out = x.new_zeros((*x.shape[:-1], out_features))
        for block, start in enumerate(range(0, in_features, BLOCK)):
            one = slice(start, start + BLOCK)
            out += (
                x[..., one] @ w[:, one].t() * weight_scale[:, block].repeat_interleave(BLOCK)[:out_features]
            )
        out = out * scale
    return (out if bias is None else out + bias.float()).to(out_dtype)


def _quantize(
    y: torch.Tensor,
    valid: torch.Tensor,
    lower_bound: float,
    static_scale: torch.Tensor | float | None,
    target: Target,
) -> torch.Tensor:
    """Quantize fp32 rows ``y [..., H]``; ``valid [..., 1]`` is False for rows known to be invalid.

    Returns:
        ``[..., H + 4]`` packed rows, or ``[..., H]`` codes when ``static_scale`` is given.
    """
    peak = y.abs().amax(dim=-1, keepdim=True)
    valid = valid & peak.isfinite()
    if lower_bound > 0:
        y = y.clamp(-lower_bound, lower_bound)
        peak = peak.clamp(max=lower_bound)
    if static_scale is not None:
        return _to_fp8(y / static_scale, target).masked_fill(~valid, fmt.NAN_CODE)
    scale = (peak / target.fp8_max).clamp(min=fmt.SCALE_FLOOR)
    codes = _to_fp8(y / scale, target).masked_fill(~valid, 0)
    return fmt.pack(codes, scale.masked_fill(~valid, math.nan))


def _to_fp8(values: torch.Tensor, target: Target) -> torch.Tensor:
    """Round fp32 values, clipped to the target's range, to FP8 codes (uint8), ties to even."""
    return values.clamp(-target.fp8_max, target.fp8_max).to(torch.float8_e4m3fn).view(torch.uint8)


def check_rms_norm_quant(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    lower_bound: float,
    static_scale: torch.Tensor | float | None,
) -> None:
    """Raise ValueError, naming argument, expected and got, unless the arguments fit the contract."""
    # Attributes are read once: each takes a call into torch, and a decode step comes through here often.
    shape, dtype, device = hidden.shape, hidden.dtype, hidden.device
    if len(shape) < 2 or shape[-1] < 1:
        raise ValueError(f"hidden: expected rank >= 2 and H >= 1, got shape {list(shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"hidden: expected dtype {_DTYPE_NAMES}, got {dtype}")
    if weight is not None:
        if weight.shape != shape[-1:]:
            raise ValueError(f"weight: expected shape [{shape[-1]}] (H of hidden), got {list(weight.shape)}")
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight: expected dtype {_DTYPE_NAMES}, got {weight.dtype}")
        if weight.device != device:
            raise ValueError(f"weight: expected device {device} (hidden's), got {weight.device}")
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"residual: expected shape {list(shape)} (hidden's), got {list(residual.shape)}")
        if residual.dtype != dtype:
            raise ValueError(f"residual: expected dtype {dtype} (hidden's), got {residual.dtype}")
        if residual.device != device:
            raise ValueError(f"residual: expected device {device} (hidden's), got {residual.device}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    if not 0 <= lower_bound < math.inf:
        raise ValueError(f"lower_bound: expected a finite number >= 0 (0 does not clip), got {lower_bound}")
    _check_static_scale(static_scale, device, "hidden")


def check_silu_mul_quant(gate_up: torch.Tensor, static_scale: torch.Tensor | float | None) -> None:
    """Raise ValueError, naming argument, expected and got, unless the arguments fit the contract."""
    shape, dtype = gate_up.shape, gate_up.dtype
    if len(shape) < 2 or shape[-1] < 2 or shape[-1] % 2:
        raise ValueError(f"gate_up: expected rank >= 2 and an even last dimension, got shape {list(shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"gate_up: expected dtype {_DTYPE_NAMES}, got {dtype}")
    _check_static_scale(static_scale, gate_up.device, "gate_up")


def check_fp8_weight(weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    """Raise ValueError, naming argument, expected and got, unless a weight and its scale fit the contract."""
    if weight.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(f"weight: expected dtype torch.float8_e4m3fn or torch.uint8, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [N, H], got {list(weight.shape)}")
    _check_weight_scale(weight_scale, weight.shape[0], weight.shape[1], weight.device, "weight")


def check_packed_fp8_linear(
    packed: torch.Tensor,
    weight: torch.Tensor,
    out_features: int,
    in_features: int,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    static_scale: torch.Tensor | float | None,
    out_dtype: torch.dtype,
) -> None:
    """Raise ValueError, naming argument, expected and got, unless the arguments fit the contract.

    Of the weight, which may be in any layout, only the device is looked at.
    """
    device = packed.device
    if static_scale is None:
        fmt.check(packed, in_features)
    elif packed.dtype != torch.uint8 or packed.dim() < 1 or packed.shape[-1] != in_features:
        raise ValueError(
            f"packed: expected [..., {in_features}] codes of torch.uint8, static_scale being given, got "
            f"{list(packed.shape)} of {packed.dtype}"
        )
    if weight.device != device:
        raise ValueError(f"weight: expected device {device} (packed's), got {weight.device}")
    _check_weight_scale(weight_scale, out_features, in_features, device, "packed")
    if bias is not None:
        if bias.shape != (out_features,):
            raise ValueError(f"bias: expected shape [{out_features}], got {list(bias.shape)}")
        if bias.dtype not in DTYPES:
            raise ValueError(f"bias: expected dtype {_DTYPE_NAMES}, got {bias.dtype}")
        if bias.device != device:
            raise ValueError(f"bias: expected device {device} (packed's), got {bias.device}")
    _check_static_scale(static_scale, device, "packed")
    if out_dtype not in DTYPES:
        raise ValueError(f"out_dtype: expected {_DTYPE_NAMES}, got {out_dtype}")


def _check_weight_scale(
    weight_scale: torch.Tensor, out_features: int, in_features: int, device: torch.device, whose: str
) -> None:
    blocks = block_scale_shape(out_features, in_features)
    if weight_scale.dtype != torch.float32 or weight_scale.shape not in ((out_features,), (1,), blocks):
        raise ValueError(
            f"weight_scale: expected shape [{out_features}], [1] or (blocks of {BLOCK} x {BLOCK}) "
            f"{list(blocks)} of torch.float32, got {list(weight_scale.shape)} of {weight_scale.dtype}"
        )
    if weight_scale.device != device:
        raise ValueError(f"weight_scale: expected device {device} ({whose}'s), got {weight_scale.device}")


def _check_static_scale(static_scale: torch.Tensor | float | None, device: torch.device, whose: str) -> None:
    if isinstance(static_scale, torch.Tensor):
        if static_scale.numel() != 1 or static_scale.dtype != torch.float32:
            raise ValueError(
                "static_scale: expected one torch.float32 element, got shape "
                f"{list(static_scale.shape)} of {static_scale.dtype}"
            )
        if static_scale.device != device:
            raise ValueError(f"static_scale: expected device {device} ({whose}'s), got {static_scale.device}")
    elif static_scale is not None and not 0 < static_scale < math.inf:
        raise ValueError(f"static_scale: expected a finite number > 0, got {static_scale}")
