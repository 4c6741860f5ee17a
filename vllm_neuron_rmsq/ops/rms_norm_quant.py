"""RMSNorm + FP8 quantization: the ops ``rms_norm_quant`` and, with a residual, ``add_rms_norm_quant``.

Dimensions:
    H: hidden size
    ...: rows (tokens)
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from vllm_neuron_rmsq import reference
from vllm_neuron_rmsq.backends import Backend, Functions
from vllm_neuron_rmsq.ops import dispatch
from vllm_neuron_rmsq.packed import SCALE_BYTES
from vllm_neuron_rmsq.target import Target, of_fp8_max


@overload
def rms_norm_quant(
    hidden: Tensor,
    weight: Tensor | None,
    *,
    eps: float = ...,
    residual: None = ...,
    lower_bound: float = ...,
    static_scale: Tensor | float | None = ...,
    target: Target | str | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def rms_norm_quant(
    hidden: Tensor,
    weight: Tensor | None,
    *,
    eps: float = ...,
    residual: Tensor,
    lower_bound: float = ...,
    static_scale: Tensor | float | None = ...,
    target: Target | str | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def rms_norm_quant(
    hidden: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    lower_bound: float = 0.0,
    static_scale: Tensor | float | None = None,
    target: Target | str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize rows, quantize them to FP8 and pack each with its scale, in one pass.

    The numbers are :mod:`vllm_neuron_rmsq.reference`'s, the bytes :mod:`vllm_neuron_rmsq.packed`'s.

    Args:
        hidden: ``[..., H]``, rank >= 2, bf16, fp16 or fp32.
        weight: ``[H]`` gamma, bf16, fp16 or fp32; ``None`` quantizes without a norm (NO_NORM).
        eps: added to the mean square, >= 0.
        residual: like ``hidden``; added in fp32 before the norm.
        lower_bound: clip normalized values to ±lower_bound; 0 does not clip.
        static_scale: one given dequantization scale, > 0, a float or an fp32 tensor of one element.
        target: a target or its name, ``"trn2"`` (±240) or ``"trn3"`` (±448); ``None`` is the setting's.
        backend: a backend's name; ``None`` is the setting's.

    Returns:
        ``[..., H + 4]`` uint8 packed rows, or ``[..., H]`` uint8 codes when ``static_scale`` is given; with
        a residual a pair of that and ``residual_out``, ``hidden + residual`` rounded to hidden's dtype.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or range.
        BackendUnavailableError: the backend cannot run here.
    """
    on_cpu = hidden.is_cpu
    name = dispatch.backend(backend, "cpu" if on_cpu else hidden.device.type)
    compiling = torch.compiler.is_compiling()  # asked once: it takes as long as finding the backend
    # The native op checks its arguments in a tenth of the time, but never sees those of another device.
    op_checks = (
        on_cpu
        and name == "cpu"
        and (weight is None or weight.is_cpu)
        and (residual is None or residual.is_cpu)
        and (static_scale is None or not isinstance(static_scale, Tensor) or static_scale.is_cpu)
        and not compiling
    )
    if not op_checks:
        reference.check_rms_norm_quant(hidden, weight, eps, residual, lower_bound, static_scale)
    limit = dispatch.fp8_max(target)
    scale = None if static_scale is None else dispatch.scale_tensor(static_scale, hidden)
    if compiling and dispatch.traced(name):
        if residual is None:
            return _norm(dispatch.functions(name), hidden, weight, eps, lower_bound, scale, limit)
        functions = dispatch.functions(name)
        return _add_norm(functions, hidden, weight, eps, residual, lower_bound, scale, limit)
    try:
        if residual is None:
            return _NORM.overloads[name](hidden, weight, eps, lower_bound, scale, limit)
        return _ADD_NORM.overloads[name](hidden, weight, eps, residual, lower_bound, scale, limit)
    except ValueError:
        # Says the same, and what came.
        reference.check_rms_norm_quant(hidden, weight, eps, residual, lower_bound, static_scale)
        raise


def _norm(
    functions: Functions,
    hidden: Tensor,
    weight: Tensor | None,
    eps: float,
    lower_bound: float,
    static_scale: Tensor | None,
    fp8_max: float,
) -> Tensor:
    target = of_fp8_max(fp8_max)
    return functions.rms_norm_quant(hidden, weight, eps, None, lower_bound, static_scale, target)[0]


def _add_norm(
    functions: Functions,
    hidden: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor,
    lower_bound: float,
    static_scale: Tensor | None,
    fp8_max: float,
) -> tuple[Tensor, Tensor]:
    target = of_fp8_max(fp8_max)
    out = functions.rms_norm_quant(hidden, weight, eps, residual, lower_bound, static_scale, target)
    assert out[1] is not None
    return out[0], out[1]


def _norm_fake(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor | None,
    eps: float,
    lower_bound: float,
    static_scale: Tensor | None,
    fp8_max: float,
) -> Tensor:
    width = hidden.shape[-1] + (SCALE_BYTES if static_scale is None else 0)
    return hidden.new_empty((*hidden.shape[:-1], width), dtype=torch.uint8)


def _add_norm_fake(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor,
    lower_bound: float,
    static_scale: Tensor | None,
    fp8_max: float,
) -> tuple[Tensor, Tensor]:
    out = _norm_fake(backend, hidden, weight, eps, lower_bound, static_scale, fp8_max)
    return out, torch.empty_like(hidden, memory_format=torch.contiguous_format)


_NORM = dispatch.Op(
    "rms_norm_quant",
    "(Tensor hidden, Tensor? weight, float eps, float lower_bound, Tensor? static_scale, float fp8_max)"
    " -> Tensor",
    _norm,
    _norm_fake,
)
_ADD_NORM = dispatch.Op(
    "add_rms_norm_quant",
    "(Tensor hidden, Tensor? weight, float eps, Tensor residual, float lower_bound, Tensor? static_scale, "
    "float fp8_max) -> (Tensor, Tensor)",
    _add_norm,
    _add_norm_fake,
)
