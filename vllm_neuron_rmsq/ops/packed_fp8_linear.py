"""FP8 matmul of packed rows: the op ``packed_fp8_linear``, and ``prepack_fp8_weight`` for its weight.

Dimensions:
    H: input features, the contraction dimension
    N: output features
    ...: rows (tokens)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_neuron_rmsq import backends
from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.backends import Backend, Functions
from vllm_neuron_rmsq.ops import dispatch


class PrepackedWeight(NamedTuple):
    """An FP8 weight laid out for one backend's matmul.

    Attributes:
        data: uint8, in the backend's layout; one byte an element (and what padding the layout needs).
        out_features: N.
        in_features: H.
        backend: whose layout it is.
    """

    data: Tensor
    out_features: int
    in_features: int
    backend: str


def prepack_fp8_weight(weight: Tensor, weight_scale: Tensor, backend: str | None = None) -> PrepackedWeight:
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
    name = dispatch.backend(backend, weight.device.type)
    data = weight.view(torch.uint8)
    if backends.get(name).prepacked_shape is not None:
        data = _PREPACK.overloads[name](data)
    return PrepackedWeight(data, out_features, in_features, name)


def packed_fp8_linear(
    packed: Tensor,
    weight: Tensor | PrepackedWeight,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
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
    arguments = (packed, weight.data, weight_scale, bias, weight.out_features, out_dtype)
    if torch.compiler.is_compiling() and dispatch.traced(weight.backend):
        return _linear(dispatch.functions(weight.backend), *arguments)
    return _LINEAR.overloads[weight.backend](*arguments)


def _check_scale(weight_scale: Tensor, out_features: int) -> None:
    if weight_scale.dtype != torch.float32 or weight_scale.shape not in ((out_features,), (1,)):
        raise ValueError(
            f"weight_scale: expected shape [{out_features}] or [1] of torch.float32, got "
            f"{list(weight_scale.shape)} of {weight_scale.dtype}"
        )


def _prepack(functions: Functions, weight: Tensor) -> Tensor:
    return functions.prepack_fp8_weight(weight)


def _prepack_fake(backend: Backend, weight: Tensor) -> Tensor:
    assert backend.prepacked_shape is not None
    return weight.new_empty(backend.prepacked_shape(weight.shape[0], weight.shape[1]))


def _linear(
    functions: Functions,
    packed: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return functions.packed_fp8_linear(packed, weight, weight_scale, bias, out_features, out_dtype)


def _linear_fake(
    backend: Backend,
    packed: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], out_features), dtype=out_dtype)


_PREPACK = dispatch.Op(
    "prepack_fp8_weight",
    "(Tensor weight) -> Tensor",
    _prepack,
    _prepack_fake,
    has=lambda backend: backend.prepacked_shape is not None,
)
_LINEAR = dispatch.Op(
    "packed_fp8_linear",
    "(Tensor packed, Tensor weight, Tensor weight_scale, Tensor? bias, int out_features, "
    "ScalarType out_dtype) -> Tensor",
    _linear,
    _linear_fake,
)
