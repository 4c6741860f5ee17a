"""The two operations of the packed contract, as ``torch.library`` ops with one overload per backend.

Dimensions:
    H: hidden size, the contraction dimension
    N: output features of a linear
    ...: rows (tokens)

``torch.ops.neuron_rmsq.<op>.<backend>`` is what appears in a compiled graph, so a graph says who computes
it. The functions here check the arguments, choose the backend and call the overload.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch

from vllm_neuron_rmsq import backends, reference, settings
from vllm_neuron_rmsq import packed as fmt

NAMESPACE = "neuron_rmsq"
SCHEMAS = {
    "rms_norm_quant": "(Tensor hidden, Tensor? weight, Tensor? static_scale, float eps, "
    "float lower_bound, float fp8_max) -> Tensor",
    "add_rms_norm_quant": "(Tensor hidden, Tensor residual, Tensor? weight, Tensor? static_scale, "
    "float eps, float lower_bound, float fp8_max) -> (Tensor, Tensor)",
    "prepack_fp8_weight": "(Tensor weight) -> Tensor",
    "packed_fp8_linear": "(Tensor packed, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "int out_features, ScalarType out_dtype) -> Tensor",
}

PLAIN_LAYOUT = ("torch", "triton")
"""Backends whose matmul reads the checkpoint's ``[N, H]`` as it is; the others prepack it by an op."""


class PrepackedWeight(NamedTuple):
    """An FP8 weight laid out for one backend's matmul.

    Attributes:
        data: uint8, in the backend's layout; one byte an element (and what padding the layout needs).
        out_features: N.
        in_features: H.
        backend: whose layout it is.
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    backend: str


@overload
def rms_norm_quant(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float = ...,
    residual: None = ...,
    lower_bound: float = ...,
    static_scale: torch.Tensor | float | None = ...,
    target: str | None = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def rms_norm_quant(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float = ...,
    residual: torch.Tensor,
    lower_bound: float = ...,
    static_scale: torch.Tensor | float | None = ...,
    target: str | None = ...,
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm_quant(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    lower_bound: float = 0.0,
    static_scale: torch.Tensor | float | None = None,
    target: str | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalize rows, quantize them to FP8 and pack each with its scale, in one pass.

    The numbers are :mod:`vllm_neuron_rmsq.reference`'s, the bytes :mod:`vllm_neuron_rmsq.packed`'s.

    Args:
        hidden: ``[..., H]``, rank >= 2, bf16, fp16 or fp32.
        weight: ``[H]`` gamma, bf16, fp16 or fp32; ``None`` quantizes without a norm (NO_NORM).
        eps: added to the mean square, >= 0.
        residual: like ``hidden``; added in fp32 before the norm.
        lower_bound: clip normalized values to ±lower_bound; 0 does not clip.
        static_scale: one given dequantization scale, > 0, a float or an fp32 tensor of one element.
        target: ``"trn2"`` (±240) or ``"trn3"`` (±448); ``None`` is the setting in force.
        backend: a backend's name; ``None`` is the setting in force.

    Returns:
        ``[..., H + 4]`` uint8 packed rows, or ``[..., H]`` uint8 codes when ``static_scale`` is given; with
        a residual a pair of that and ``residual_out``, ``hidden + residual`` rounded to hidden's dtype.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or range.
        BackendUnavailableError: the backend cannot run here.
    """
    name = _backend(backend, "cpu" if hidden.is_cpu else hidden.device.type)
    # The native op checks its arguments in a tenth of the time, but never sees those of another device.
    op_checks = (
        name == "cpu"
        and hidden.is_cpu
        and (weight is None or weight.is_cpu)
        and (residual is None or residual.is_cpu)
        and not torch.compiler.is_compiling()
    )
    if not op_checks:
        reference.check_rms_norm_quant(hidden, weight, eps, residual, lower_bound, static_scale)
    limit = _fp8_max(target)
    scale = static_scale
    if scale is not None and not isinstance(scale, torch.Tensor):
        scale = torch.full((1,), scale, dtype=torch.float32, device=hidden.device)
    try:
        if residual is None:
            return _overloads["rms_norm_quant", name](hidden, weight, scale, eps, lower_bound, limit)
        op = _overloads["add_rms_norm_quant", name]
        return op(hidden, residual, weight, scale, eps, lower_bound, limit)
    except ValueError:
        # Says the same, and what came.
        reference.check_rms_norm_quant(hidden, weight, eps, residual, lower_bound, static_scale)
        raise


def prepack_fp8_weight(
    weight: torch.Tensor, weight_scale: torch.Tensor, backend: str | None = None
) -> PrepackedWeight:
    """Lay an FP8 weight out for a backend's matmul, once, at load.

    Args:
        weight: ``[N, H]`` float8_e4m3fn or uint8.
        weight_scale: ``[N]`` or ``[1]`` fp32, checked against the weight.
        backend: a backend's name; ``None`` is the setting in force.

    Raises:
        ValueError: an argument has the wrong dtype or shape.
        BackendUnavailableError: the backend cannot run here.
    """
    if weight.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(f"weight: expected dtype torch.float8_e4m3fn or torch.uint8, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [N, H], got {list(weight.shape)}")
    out_features, in_features = weight.shape
    _check_scale(weight_scale, out_features)
    name = _backend(backend, weight.device.type)
    data = weight.view(torch.uint8)
    if name not in PLAIN_LAYOUT:
        data = _overloads["prepack_fp8_weight", name](data)
    return PrepackedWeight(data, out_features, in_features, name)


def packed_fp8_linear(
    packed: torch.Tensor,
    weight: torch.Tensor | PrepackedWeight,
    weight_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply packed rows by an FP8 weight, reading codes and row scales straight from the rows.

    ``out[..., n] = Σ_h value(code[..., h]) * value(weight[n, h]) * scale[...] * weight_scale[n] + bias[n]``,
    accumulated in fp32. On backend ``cpu`` a row's result depends neither on the batch it sits in nor on the
    number of threads: every sum takes H in one order. On the others its last bit may.

    Args:
        packed: ``[..., H + 4]`` uint8.
        weight: ``[N, H]`` float8_e4m3fn or uint8, or what :func:`prepack_fp8_weight` made of it.
        weight_scale: ``[N]`` or ``[1]`` fp32.
        bias: ``[N]``, floating.
        out_dtype: bf16, fp16 or fp32.
        backend: a backend's name; ``None`` is the prepacked weight's, else the setting in force.

    Returns:
        ``[..., N]`` of ``out_dtype``.

    Raises:
        ValueError: an argument has the wrong dtype, shape or device, or the weight was prepacked for
            another backend.
        BackendUnavailableError: the backend cannot run here.
    """
    if not isinstance(weight, PrepackedWeight):
        weight = prepack_fp8_weight(weight, weight_scale, backend)
    elif backend is not None and backend != weight.backend:
        raise ValueError(f"weight: prepacked for backend {weight.backend!r}, got backend {backend!r}")
    fmt.check(packed, weight.in_features)
    _check_scale(weight_scale, weight.out_features)
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias: expected shape [{weight.out_features}], got {list(bias.shape)}")
    if out_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"out_dtype: expected torch.bfloat16, torch.float16 or torch.float32, got {out_dtype}"
        )
    for name, tensor in (("weight", weight.data), ("weight_scale", weight_scale), ("bias", bias)):
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(f"{name}: expected device {packed.device} (packed's), got {tensor.device}")
    op = _overloads["packed_fp8_linear", weight.backend]
    return op(packed, weight.data, weight_scale, bias, weight.out_features, out_dtype)


def _check_scale(weight_scale: torch.Tensor, out_features: int) -> None:
    if weight_scale.dtype != torch.float32 or weight_scale.shape not in ((out_features,), (1,)):
        raise ValueError(
            f"weight_scale: expected shape [{out_features}] or [1] of torch.float32, got "
            f"{list(weight_scale.shape)} of {weight_scale.dtype}"
        )


# Settings do not change while a graph is compiled: torch.compile may take these for constants.
@torch.compiler.assume_constant_result
def _backend(name: str | None, device_type: str) -> str:
    return backends.resolve(settings.current().backend if name is None else name, device_type)


@torch.compiler.assume_constant_result
def _fp8_max(target: str | None) -> float:
    return fmt.fp8_max(settings.current().target if target is None else target)


_overloads: dict[tuple[str, str], torch._ops.OpOverload] = {}
"""By op and backend; looking them up under ``torch.ops`` each time would cost half a microsecond."""


def _rms_norm_quant_fake(hidden, weight, static_scale, eps, lower_bound, fp8_max):
    width = hidden.shape[-1] + (fmt.SCALE_BYTES if static_scale is None else 0)
    return hidden.new_empty((*hidden.shape[:-1], width), dtype=torch.uint8)


def _add_rms_norm_quant_fake(hidden, residual, weight, static_scale, eps, lower_bound, fp8_max):
    out = _rms_norm_quant_fake(hidden, weight, static_scale, eps, lower_bound, fp8_max)
    return out, torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _packed_fp8_linear_fake(packed, weight, weight_scale, bias, out_features, out_dtype):
    return packed.new_empty((*packed.shape[:-1], out_features), dtype=out_dtype)


def _prepack_fp8_weight_fake(backend):
    def fake(weight):
        return weight.new_empty(backends.module(backend).prepacked_shape(*weight.shape))

    return fake


_FAKES: dict[str, Callable[..., Any]] = {
    "rms_norm_quant": _rms_norm_quant_fake,
    "add_rms_norm_quant": _add_rms_norm_quant_fake,
    "packed_fp8_linear": _packed_fp8_linear_fake,
}

_library = torch.library.Library(NAMESPACE, "DEF")
_ops_of_library = getattr(torch.ops, NAMESPACE)


def _call_backend(op: str, backend: str):
    """The op's implementation: imports the backend's module when first called, not before."""

    def implementation(*args):
        return getattr(backends.module(backend), op)(*args)

    return implementation


for _op, _schema in SCHEMAS.items():
    for _name in settings.BACKENDS:
        if _op == "prepack_fp8_weight" and _name in PLAIN_LAYOUT:
            continue
        _overload_name = f"{_op}.{_name.replace('-', '_')}"
        _fake = _FAKES.get(_op) or _prepack_fp8_weight_fake(_name)
        _library.define(_overload_name + _schema)
        torch.library.register_fake(f"{NAMESPACE}::{_overload_name}", _fake, lib=_library)
        if _name != "cpu":  # its implementations are registered from C++
            _library.impl(_overload_name, _call_backend(_op, _name), "CompositeExplicitAutograd")
        _overloads[_op, _name] = getattr(getattr(_ops_of_library, _op), _name.replace("-", "_"))
