"""The producer: stands in for vLLM's ``RMSNorm`` and, once bound, writes packed FP8 rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.transformers.fusers.rms_norm import TPAwareRMSNorm

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq.layers.activation import PackedActivation


class Binding(NamedTuple):
    """What a bound norm computes with."""

    backend: str
    target: str


class RMSNormQuant(RMSNorm):
    """vLLM's ``RMSNorm``, bit for bit, until :mod:`vllm_neuron_rmsq.fusion` proves that only packed FP8
    linears read its output and sets ``binding``. From then on it returns packed rows.

    Attributes:
        binding: backend and target of the fused norm; ``None`` is the stock norm.
        probe: wraps the stock norm's output while the fusion looks who reads it.
    """

    binding: Binding | None = None
    probe: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """Normalize, after adding the residual where there is one.

        Args:
            x: ``[..., H]`` in the model's dtype.
            residual: like ``x``.

        Returns:
            the normalized activation, ``[..., H]`` (stock) or a ``PackedActivation`` of that shape (fused);
            with a residual a pair of that and ``x + residual``.
        """
        if self.binding is not None:
            weight = self.weight if self.pass_weight else None
            options = {"eps": self.variance_epsilon, **self.binding._asdict()}
            if residual is None:
                return PackedActivation.of(ops.rms_norm_quant(x, weight, **options), x)
            packed, residual_out = ops.rms_norm_quant(x, weight, residual=residual, **options)
            return PackedActivation.of(packed, x), residual_out
        out = super().forward(x, residual)
        if self.probe is None:
            return out
        return self.probe(out) if residual is None else (self.probe(out[0]), out[1])


class TPAwareRMSNormQuant(TPAwareRMSNorm, RMSNormQuant):
    """The same for the norm that vLLM's Transformers backend builds (SmolLM3, OLMo 2/3, Arcee, ...)."""
