"""The consumer: an FP8 linear kernel for vLLM that multiplies packed rows.

Dimensions:
    H: input features
    N: output features
    ...: rows (tokens)
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import envs
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation, as_quantized_activation
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from vllm_neuron_rmsq import backends, ops, settings, target, weights
from vllm_neuron_rmsq.layers.activation import PACKED_KEY, NormOutputProbe

# Dynamic per-tensor activations are computed per token, which is finer, as vLLM itself does on CUDA.
ACTIVATION_KEYS = (kFp8DynamicTokenSym, kFp8DynamicTensorSym)
WEIGHT_KEYS = (kFp8StaticChannelSym, kFp8StaticTensorSym)


class PackedFp8LinearKernel(FP8ScaledMMLinearKernel):
    """Multiplies packed rows by an FP8 weight with a per-channel or per-tensor scale.

    Takes a ``PackedActivation`` from a fused norm as it is; anything else it quantizes and packs itself,
    by the same contract (``ops.rms_norm_quant`` without a norm).
    """

    probing = False
    """While the fusion looks who reads what, multiplying would be wasted: results are zeros."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if envs.VLLM_BATCH_INVARIANT:
            return False, "keeps its weight in a layout of its own, which VLLM_BATCH_INVARIANT=1 reads"
        backend, reason = backends.for_serving(settings.current().backend, current_platform.device_type)
        return (True, None) if backend else (False, reason)

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if c.activation_quant_key not in ACTIVATION_KEYS:
            return False, f"needs dynamic per-token or per-tensor activations, not {c.activation_quant_key}"
        if c.weight_quant_key not in WEIGHT_KEYS:
            return False, f"needs per-channel or per-tensor weights, not {c.weight_quant_key}"
        return True, None

    def __init__(self, c: FP8ScaledMMLinearLayerConfig, layer_param_names) -> None:
        super().__init__(c, layer_param_names)
        choice = settings.current()
        self.target = target.get(choice.target)
        backend, reason = backends.for_serving(choice.backend, current_platform.device_type)
        assert backend is not None, f"PackedFp8LinearKernel {reason}"  # is_supported() said so
        self.backend = backend

    def input_quant_key(self):
        return PACKED_KEY

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
        out_features, in_features = self.config.weight_shape
        if self.probing:
            if isinstance(x, NormOutputProbe):
                x = x.open(layer)
            return x.new_zeros((*x.shape[:-1], out_features), dtype=self.config.out_dtype or x.dtype)
        activation = as_quantized_activation(x, PACKED_KEY)
        if activation is None:
            packed = ops.rms_norm_quant(x, None, target=self.target, backend=self.backend)
            dtype = x.dtype
        else:
            packed, dtype = activation.data, activation.orig_dtype
        weight, scale = (getattr(layer, name) for name in self.layer_param_names[:2])
        return ops.packed_fp8_linear(
            packed,
            ops.PrepackedWeight(weight, out_features, in_features, self.backend),
            scale,
            bias=bias,
            out_dtype=self.config.out_dtype or dtype,
        )

    def apply_scaled_mm(self, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("PackedFp8LinearKernel multiplies packed rows in apply_weights")
