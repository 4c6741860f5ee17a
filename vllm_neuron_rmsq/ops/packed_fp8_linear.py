"""FP8 matmul of packed rows: the op ``packed_fp8_linear``; ``prepack_fp8_weight`` for its weight, and back.

Dimensions:
    H: input features, the contraction dimension
    N: output features
    ...: rows (tokens)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_neuron_rmsq import backends, reference
from vllm_neuron_rmsq.backends import Backend, Functions
from vllm_neuron_rmsq.ops import dispatch


class PrepackedWeight(NamedTuple):
    """An FP8 weight laid out for one backend's matmul.

    Attributes:
        data: uint8, in the backend's layout; one byte an element (and what padding the layout needs).
        out_features: N.
        in_features: H.
        backend: whose layout it is.
        blocks: whether it is laid out for block scales.
    """

    data: Tensor
    out_features: int
    in_features: int
    backend: str
    blocks: bool = False


def prepack_fp8_weight(weight: Tensor, weight_scale: Tensor, backend: str | None = None) -> PrepackedWeight:
    """Lay an FP8 weight out for a backend's matmul, once, at load.

    Args:
        weight: ``[N, H]`` float8_e4m3fn or uint8.
        weight_scale: ``[N]``, ``[1]`` or ``[ceil(N / 128), ceil(H / 128)]`` fp32. Checked against the weight;
            some backends lay a weight with block scales out in another way. The numbers do not matter.
        backend: a backend's name; ``None`` is the setting in force.

    Raises:
        ValueError: an argument has the wrong dtype, shape or device.
        BackendUnavailableError: the backend cannot run here.
    """
    reference.check_fp8_weight(weight, weight_scale)
    out_features, in_features = weight.shape
    name = dispatch.backend(backend, weight.device.type)
    data, blocks = weight.view(torch.uint8), weight_scale.dim() == 2
    if backends.get(name).prepacked_shape is not None:
        data = _PREPACK.overloads[name](data, blocks)
    return PrepackedWeight(data, out_features, in_features, name, blocks)


def unpack_fp8_weight(weight: PrepackedWeight) -> Tensor:
    """Return the codes, ``[N, H]`` uint8, of which :func:`prepack_fp8_weight` made ``weight``.

    A layout puts codes in another order, and zeros where it is wider than they are. Where each comes to lie
    is found by laying out their numbers, which takes some 20 bytes for each code meanwhile.
    """
    data, out_features, in_features, name, blocks = weight
    if backends.get(name).prepacked_shape is None:
        return data
    count = out_features * in_features
    numbers = torch.arange(1, count + 1, device=data.device).view(out_features, in_features)
    places = torch.zeros_like(data, dtype=torch.int64)
    for shift in range(0, count.bit_length(), 6):  # six bits are a code that every target has
        bits = (numbers >> shift & 0x3F).to(torch.uint8)
        places |= _PREPACK.overloads[name](bits, blocks).long() << shift
    codes = data.new_zeros(count + 1)
    codes[places.flatten()] = data.flatten()
    return codes[1:].view(out_features, in_features)


def packed_fp8_linear(
    packed: Tensor,
    weight: Tensor | PrepackedWeight,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    static_scale: Tensor | float | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """Multiply packed rows by an FP8 weight, reading codes and row scales straight from the rows.

    ``out[..., n] = Σ_h value(code[..., h]) * value(weight[n, h]) * scale[...] * weight_scale[n] + bias[n]``,
    accumulated in fp32; with block scales the sum over each 128 of H is multiplied by its
    ``weight_scale[n // 128, h // 128]`` before they are added up. On backend ``cpu`` a row's result depends
    neither on the batch it sits in nor on the number of threads: every sum takes H in one order. On the
    others its last bit may.

    Args:
        packed: ``[..., H + 4]`` uint8 packed rows; ``[..., H]`` uint8 codes when ``static_scale`` is given.
        weight: ``[N, H]`` float8_e4m3fn or uint8, or what :func:`prepack_fp8_weight` made of it.
        weight_scale: ``[N]``, ``[1]`` or, a scale for each block of 128 x 128 of the weight,
            ``[ceil(N / 128), ceil(H / 128)]``; fp32.
        bias: ``[N]``, bf16, fp16 or fp32.
        static_scale: the scale of every row, > 0, a float or an fp32 tensor of one element (quicker).
        out_dtype: bf16, fp16 or fp32.
        backend: a backend's name; ``None`` is the prepacked weight's, else the setting in force.

    Returns:
        ``[..., N]`` of ``out_dtype``.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or range, or the weight was prepacked for
            another backend or another kind of scale.
        BackendUnavailableError: the backend cannot run here.
    """
    if not isinstance(weight, PrepackedWeight):
        weight = prepack_fp8_weight(weight, weight_scale, backend)
    elif backend is not None and backend != weight.backend:
        raise ValueError(f"weight: prepacked for backend {weight.backend!r}, got backend {backend!r}")
    data, out_features, in_features, name, blocks = weight
    reference.check_packed_fp8_linear(
        packed, data, out_features, in_features, weight_scale, bias, static_scale, out_dtype
    )
    if blocks is not (weight_scale.dim() == 2):
        kind = "block scales" if blocks else "scales [N] or [1]"
        raise ValueError(f"weight: prepacked for {kind}, got weight_scale {list(weight_scale.shape)}")
    scale = None if static_scale is None else dispatch.scale_tensor(static_scale, packed)
    arguments = (packed, data, weight_scale, bias, scale, out_features, out_dtype)
    if torch.compiler.is_compiling() and dispatch.traced(name):
        return _linear(dispatch.functions(name), *arguments)
    return _LINEAR.overloads[name](*arguments)


def _prepack(functions: Functions, weight: Tensor, blocks: bool) -> Tensor:
    return functions.prepack_fp8_weight(weight, blocks)


def _prepack_fake(backend: Backend, weight: Tensor, blocks: bool) -> Tensor:
    assert backend.prepacked_shape is not None
    return weight.new_empty(backend.prepacked_shape(weight.shape[0], weight.shape[1], blocks))


def _linear(
    functions: Functions,
    packed: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    static_scale: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return functions.packed_fp8_linear(
        packed, weight, weight_scale, bias, static_scale, out_features, out_dtype
    )


def _linear_fake(
    backend: Backend,
    packed: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    static_scale: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], out_features), dtype=out_dtype)


_PREPACK = dispatch.Op(
    "prepack_fp8_weight",
    "(Tensor weight, bool blocks) -> Tensor",
    _prepack,
    _prepack_fake,
    has=lambda backend: backend.prepacked_shape is not None,
)
_LINEAR = dispatch.Op(
    "packed_fp8_linear",
    "(Tensor packed, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? static_scale, "
    "int out_features, ScalarType out_dtype) -> Tensor",
    _linear,
    _linear_fake,
)
