"""What a scheme is; see the package's docstring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_neuron_rmsq.target import Target


@dataclass(frozen=True)
class Scheme:
    """How one kind of FP8 checkpoint is quantized.

    Dimensions:
        H: features of a row
        I: intermediate size
        N: output features of a linear
        ...: rows (tokens)

    Attributes:
        name: for messages.
        activation_keys: vLLM's ``QuantKey`` of the activations that it serves.
        activations: the same in words, "dynamic per-token".
        weight_keys: vLLM's ``QuantKey`` of the weights that it serves.
        weights: the same in words, "per-channel".
        rows: the key under which a linear takes rows and a producer hands them over. It stands for the format
            of the rows, so no two formats share one.
        wrap: ``(rows, dtype)``: what a producer hands over, a ``QuantizedActivation`` with key ``rows`` that
            stands for an activation of ``dtype``.
        norm: ``(hidden, weight, *, eps, residual, target, backend)``, as ``ops.rms_norm_quant``: rows of the
            normalized ``hidden`` (``[..., H]``), and ``residual_out`` when a residual is given.
        silu_mul: ``(gate_up, *, target, backend)``, as ``ops.silu_mul_quant``: rows of SiLU of the gate times
            up, of ``gate_up`` (``[..., 2 I]``).
        quantize: ``(hidden, *, target, backend)``: rows of ``hidden`` as it is, for a linear that gets it
            plain.
        multiply: ``(rows, weight, weight_scale, *, bias, out_dtype)``, as ``ops.packed_fp8_linear``:
            ``[..., N]``.
    """

    name: str
    activation_keys: tuple[Any, ...]
    activations: str
    weight_keys: tuple[Any, ...]
    weights: str
    rows: Any
    wrap: Callable[..., Any]
    norm: Callable[..., Any]
    silu_mul: Callable[..., Any]
    quantize: Callable[..., Any]
    multiply: Callable[..., Any]

    def refuse(self, activation_key: Any, weight_key: Any) -> str | None:
        """Say why a linear with these keys is not of this scheme, or return ``None`` when it is."""
        if activation_key not in self.activation_keys:
            return f"needs {self.activations} activations, not {activation_key}"
        if weight_key not in self.weight_keys:
            return f"needs {self.weights} weights, not {weight_key}"
        return None


class Binding(NamedTuple):
    """What a producer that is proven to feed only packed FP8 linears computes, and with what."""

    scheme: Scheme
    backend: str
    target: Target
