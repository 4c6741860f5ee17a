"""The consumer: an FP8 linear kernel for vLLM that multiplies packed rows.

Dimensions:
    H: input features
    N: output features
    ...: rows (tokens)
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_neuron_rmsq import backends, ops, settings, target, weights
from vllm_neuron_rmsq.integrations.vllm import schemes, versions
from vllm_neuron_rmsq.integrations.vllm.versions import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
    QuantizedActivation,
    as_quantized_activation,
    replace_parameter,
)


class PackedFp8LinearKernel(FP8ScaledMMLinearKernel):
    """Multiplies packed rows by an FP8 weight with a per-channel or per-tensor scale.

    Takes a ``PackedActivation`` from a fused norm as it is; anything else it quantizes and packs itself,
    by the same contract.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if versions.VLLM_BATCH_INVARIANT:
            return False, "keeps its weight in a layout of its own, which VLLM_BATCH_INVARIANT=1 reads"
        backend, reason = _backend()
        return (True, None) if backend else (False, reason)

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        scheme, reason = schemes.find(c.activation_quant_key, c.weight_quant_key)
        return (True, None) if scheme else (False, reason)

    def __init__(self, c: FP8ScaledMMLinearLayerConfig, layer_param_names) -> None:
        super().__init__(c, layer_param_names)
        self.target = target.get(settings.current().target)
        scheme, _ = schemes.find(c.activation_quant_key, c.weight_quant_key)
        backend, _ = _backend()
        assert scheme is not None and backend is not None  # the base class has asked both questions above
        self.scheme, self.backend = scheme, backend

    def input_quant_key(self):
        return self.scheme.rows

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Bring the weight within the target's range and lay it out for the backend's matmul.

        vLLM hands it over as ``[H, N]``, a transposed view of ``[N, H]``; afterwards ``layer.weight`` is
        uint8 in the backend's layout and ``layer.weight_scale`` fp32 ``[N]`` or ``[1]``.

        Raises:
            ValueError: weight or scale have another shape than expected, or hold NaN or Inf.
        """
        weight_name, scale_name = self.layer_param_names[:2]
        weight, scale = getattr(layer, weight_name).data, getattr(layer, scale_name).data
        out_features, in_features = self.config.weight_shape
        if weight.shape != (in_features, out_features):
            raise ValueError(
                f"weight: expected shape {[in_features, out_features]} after loading, "
                f"got {list(weight.shape)}"
            )
        codes = weight.t().contiguous().view(torch.uint8)
        scale = scale.reshape(-1).float()
        codes, scale, halved = weights.fit(codes, scale, self.target)
        layer.rmsq_halved = halved  # type: ignore[assignment]
        prepacked = ops.prepack_fp8_weight(codes, scale, self.backend)
        replace_parameter(layer, weight_name, torch.nn.Parameter(prepacked.data, requires_grad=False))
        replace_parameter(layer, scale_name, torch.nn.Parameter(scale, requires_grad=False))

    def apply_weights(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor | QuantizedActivation,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ``[..., N]`` for ``x`` ``[..., H]``, plain or packed."""
        activation = as_quantized_activation(x, self.scheme.rows)
        if activation is None:
            rows = self.scheme.quantize(x, target=self.target, backend=self.backend)
            dtype = x.dtype
        else:
            rows, dtype = activation.data, activation.orig_dtype
        weight, scale = (getattr(layer, name) for name in self.layer_param_names[:2])
        out_features, in_features = self.config.weight_shape
        return self.scheme.multiply(
            rows,
            ops.PrepackedWeight(weight, out_features, in_features, self.backend),
            scale,
            bias=bias,
            out_dtype=self.config.out_dtype or dtype,
        )

    def apply_scaled_mm(self, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("PackedFp8LinearKernel multiplies packed rows in apply_weights")


def _backend() -> tuple[str | None, str]:
    """Return the backend that serves on vLLM's platform, or ``None`` and why none does."""
    return backends.for_serving(settings.current().backend, versions.current_platform.device_type)
