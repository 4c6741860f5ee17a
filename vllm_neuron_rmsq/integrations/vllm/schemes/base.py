"""What a scheme is; see the package's docstring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq.target import Target


def quantize(
    hidden: torch.Tensor,
    *,
    lower_bound: float,
    static_scale: torch.Tensor | None,
    target: Target,
    backend: str,
) -> torch.Tensor:
    """Quantize ``hidden`` ``[..., H]`` as it is: the norm's op without a norm."""
    return ops.rms_norm_quant(
        hidden, None, lower_bound=lower_bound, static_scale=static_scale, target=target, backend=backend
    )


@dataclass(frozen=True)
class Scheme:
    """How one kind of FP8 checkpoint is quantized.

    Where ``static_scale`` stands below, it is what the linear's checkpoint gives, ``[1]`` fp32, when the
    scheme is ``static``, and ``None`` otherwise.

    Dimensions:
        H: features of a row
        I: intermediate size
        N: output features of a linear
        ...: rows (tokens)

    Attributes:
        name: for messages and the report.
        activation_keys: vLLM's ``QuantKey`` of the activations that it serves.
        activations: the same in words, "dynamic per-token".
        weight_keys: vLLM's ``QuantKey`` of the weights that it serves.
        weights: the same in words, "per-channel".
        rows: the key under which a linear takes rows and a producer hands them over. It stands for the format
            of the rows: schemes share it when they share the format.
        wrap: ``(rows, dtype, static_scale)``: what a producer hands over, a ``QuantizedActivation`` with key
            ``rows`` that stands for an activation of ``dtype``.
        static: whether activations are quantized by one scale that the checkpoint gives for each linear.
        blocks: whether a weight has a scale for each block of 128 x 128.
        bound: activations are clipped to ±bound before they are quantized; 0 does not clip.
        norm: ``(hidden, weight, *, eps, residual, lower_bound, static_scale, target, backend)``, as
            ``ops.rms_norm_quant``: rows of the normalized ``hidden`` (``[..., H]``), and ``residual_out``
            when a residual is given.
        silu_mul: ``(gate_up, *, static_scale, target, backend)``, as ``ops.silu_mul_quant``: rows of SiLU of
            the gate times up, of ``gate_up`` (``[..., 2 I]``). Does not clip.
        quantize: ``(hidden, *, lower_bound, static_scale, target, backend)``: rows of ``hidden`` as it is,
            for a linear that gets it plain.
        multiply: ``(rows, weight, weight_scale, *, bias, static_scale, out_dtype)``, as
            ``ops.packed_fp8_linear``: ``[..., N]``.
    """

    name: str
    activation_keys: tuple[Any, ...]
    activations: str
    weight_keys: tuple[Any, ...]
    weights: str
    rows: Any
    wrap: Callable[..., Any]
    static: bool = False
    blocks: bool = False
    bound: float = 0.0
    norm: Callable[..., Any] = ops.rms_norm_quant
    silu_mul: Callable[..., Any] = ops.silu_mul_quant
    quantize: Callable[..., Any] = quantize
    multiply: Callable[..., Any] = ops.packed_fp8_linear

    def refuse(self, activation_key: Any, weight_key: Any) -> str | None:
        """Say why a linear with these keys is not of this scheme, or return ``None`` when it is."""
        if activation_key not in self.activation_keys:
            return f"needs {self.activations} activations, not {activation_key}"
        if weight_key not in self.weight_keys:
            return f"needs {self.weights} weights, not {weight_key}"
        return None


class Binding(NamedTuple):
    """What a producer that is proven to feed only packed FP8 linears computes, and with what.

    Attributes:
        scheme, backend, target: of the linears that it feeds.
        static_scale: theirs, the tensor itself: when vLLM loads other weights into them, it changes with
            them. ``None`` when the scheme is not static.
    """

    scheme: Scheme
    backend: str
    target: Target
    static_scale: torch.Tensor | None = None
