"""The first producer: stands in for vLLM's ``RMSNorm`` and, once bound, writes rows of a scheme."""

from __future__ import annotations

import torch

from vllm_neuron_rmsq.integrations.vllm import versions
from vllm_neuron_rmsq.integrations.vllm.schemes import Binding
from vllm_neuron_rmsq.integrations.vllm.versions import RMSNorm
from vllm_neuron_rmsq.reference import DTYPES


class RMSNormQuant(RMSNorm):
    """vLLM's ``RMSNorm``, bit for bit, until it is bound: from then on it returns packed rows.

    Attributes:
        binding: how the fused norm computes; ``None`` is the stock norm.
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
            return scheme.wrap(scheme.norm(x, weight, **options), x.dtype)
        rows, residual_out = scheme.norm(x, weight, residual=residual, **options)
        return scheme.wrap(rows, x.dtype), residual_out

    def bind(self, binding: Binding) -> None:
        """Write rows from now on. Only where nothing but packed FP8 linears reads the output."""
        self.binding = binding

    def unfit(self) -> str:
        """Say why it could not be fused whoever reads it, or return an empty string."""
        if self.variance_size_override is not None:
            return "it normalizes by a part of the row"
        if self.weight.dtype not in DTYPES:
            return f"its weight is {self.weight.dtype}"
        return ""


REPLACEMENTS = {RMSNorm: RMSNormQuant}
"""vLLM's class -> what is registered in its place."""

if versions.has("TPAwareRMSNorm"):

    class TPAwareRMSNormQuant(versions.TPAwareRMSNorm, RMSNormQuant):
        """The same for the norm that vLLM's Transformers backend builds (SmolLM3, OLMo 2/3, Arcee, ...)."""

    REPLACEMENTS[versions.TPAwareRMSNorm] = TPAwareRMSNormQuant
