"""The producer: stands in for vLLM's ``RMSNorm`` and, once bound, writes rows of a scheme."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_neuron_rmsq.integrations.vllm.schemes import Scheme
from vllm_neuron_rmsq.integrations.vllm.versions import RMSNorm, TPAwareRMSNorm
from vllm_neuron_rmsq.reference import DTYPES
from vllm_neuron_rmsq.target import Target


class Binding(NamedTuple):
    """What a bound norm computes, and with what."""

    scheme: Scheme
    backend: str
    target: Target


class RMSNormQuant(RMSNorm):
    """vLLM's ``RMSNorm``, bit for bit, until it is bound: from then on it returns packed rows.

    Attributes:
        binding: how the fused norm computes; ``None`` is the stock norm. Set only where it is proven that
            nothing but packed FP8 linears reads the output.
    """

    binding: Binding | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """Normalize, after adding the residual where there is one.

        Args:
            x: ``[..., H]`` in the model's dtype.
            residual: like ``x``.

        Returns:
            the normalized activation, ``[..., H]`` (stock) or a ``PackedActivation`` of that shape (fused);
            with a residual a pair of that and ``x + residual``.
        """
        if self.binding is None:
            return super().forward(x, residual)
        scheme, backend, target = self.binding
        weight = self.weight if self.pass_weight else None
        options = {"eps": self.variance_epsilon, "backend": backend, "target": target}
        if residual is None:
            return scheme.wrap(scheme.norm(x, weight, **options), x)
        rows, residual_out = scheme.norm(x, weight, residual=residual, **options)
        return scheme.wrap(rows, x), residual_out

    def unfit(self) -> str:
        """Say why this norm could not be fused whoever reads it, or return an empty string."""
        if self.variance_size_override is not None:
            return "it normalizes by a part of the row"
        if self.weight.dtype not in DTYPES:
            return f"its weight is {self.weight.dtype}"
        return ""


class TPAwareRMSNormQuant(TPAwareRMSNorm, RMSNormQuant):
    """The same for the norm that vLLM's Transformers backend builds (SmolLM3, OLMo 2/3, Arcee, ...)."""


REPLACEMENTS = {RMSNorm: RMSNormQuant, TPAwareRMSNorm: TPAwareRMSNormQuant}
"""vLLM's class -> what is registered in its place."""
