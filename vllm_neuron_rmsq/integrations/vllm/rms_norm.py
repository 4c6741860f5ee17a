"""The first producer: stands in for vLLM's norms and, once bound, writes rows of a scheme.

Dimensions:
    H: hidden size
    ...: rows (tokens)
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_neuron_rmsq.integrations.vllm import versions
from vllm_neuron_rmsq.integrations.vllm.schemes import Binding, Scheme
from vllm_neuron_rmsq.integrations.vllm.versions import GemmaRMSNorm, RMSNorm
from vllm_neuron_rmsq.reference import DTYPES


class FusableNorm:
    """What a norm of vLLM's becomes: itself, bit for bit, until it is bound; then it returns packed rows.

    Stands before vLLM's class among the bases of the norm that is registered in its place.

    Attributes:
        binding: how the fused norm computes; ``None`` is the stock norm.
    """

    binding: Binding | None = None
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Normalize, after adding the residual where there is one.

        Args:
            x: ``[..., H]`` in the model's dtype.
            residual: like ``x``.

        Returns:
            the normalized activation, ``[..., H]`` (stock) or rows that stand for it (fused);
            with a residual a pair of that and ``x + residual``.
        """
        if self.binding is None:
            return super().forward(x, residual)  # type: ignore[misc]  # vLLM's class comes after this one
        scheme, backend, target, scale = self.binding
        options = {
            "eps": self.variance_epsilon,
            "lower_bound": scheme.bound,
            "static_scale": scale,
            "backend": backend,
            "target": target,
        }
        if residual is None:
            return scheme.wrap(scheme.norm(x, self.gamma(), **options), x.dtype, scale)
        rows, residual_out = scheme.norm(x, self.gamma(), residual=residual, **options)
        return scheme.wrap(rows, x.dtype, scale), residual_out

    def gamma(self) -> torch.Tensor | None:
        """Return what a normalized row is multiplied by, ``[H]``, or ``None`` for nothing."""
        return self.weight

    def bind(self, binding: Binding) -> None:
        """Write rows from now on. Only where nothing but packed FP8 linears reads the output."""
        self.binding = binding

    def unfit(self, scheme: Scheme) -> str:
        """Say why it could not be fused with linears of ``scheme``, or return an empty string."""
        return "" if self.weight.dtype in DTYPES else f"its weight is {self.weight.dtype}"


class RMSNormQuant(FusableNorm, RMSNorm):
    """vLLM's ``RMSNorm``."""

    def gamma(self) -> torch.Tensor | None:
        return self.weight if self.pass_weight else None

    def unfit(self, scheme: Scheme) -> str:
        if self.variance_size_override is not None:
            return "it normalizes by a part of the row"
        return super().unfit(scheme)


class GemmaRMSNormQuant(FusableNorm, GemmaRMSNorm):
    """vLLM's ``GemmaRMSNorm``, which multiplies by ``1 + weight``: the same op, with another gamma."""

    def gamma(self) -> torch.Tensor:
        # In fp32, as vLLM has it: bf16 has no room for 1 + a small weight. In each call anew: vLLM can
        # load other weights into the parameter while it serves, without a word to the module.
        return self.weight.float() + 1.0


REPLACEMENTS = {RMSNorm: RMSNormQuant, GemmaRMSNorm: GemmaRMSNormQuant}
"""vLLM's class -> what is registered in its place."""

if versions.has("TPAwareRMSNorm"):

    class TPAwareRMSNormQuant(versions.TPAwareRMSNorm, RMSNormQuant):
        """The same for the norm that vLLM's Transformers backend builds (SmolLM3, OLMo 2/3, Arcee, ...)."""

    class TPAwareGemmaRMSNormQuant(versions.TPAwareGemmaRMSNorm, GemmaRMSNormQuant):
        """The same for its norms that multiply by ``1 + weight``."""

    REPLACEMENTS[versions.TPAwareRMSNorm] = TPAwareRMSNormQuant
    REPLACEMENTS[versions.TPAwareGemmaRMSNorm] = TPAwareGemmaRMSNormQuant
