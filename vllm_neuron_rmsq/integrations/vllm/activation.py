"""What a fused layer hands to the linears behind it: vLLM's ``QuantizedActivation`` holding rows of a scheme.

Dimensions:
    H: features of the activation
    ...: rows (tokens)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.integrations.vllm.versions import GroupShape, QuantizedActivation, QuantKey, ScaleDesc

# No stock kernel has a uint8 key, so rows that stray are refused there.
PACKED_KEY = QuantKey(torch.uint8, ScaleDesc(torch.float32, False, GroupShape.PER_TOKEN))
"""Key of packed rows, which bring their scale."""

CODES_KEY = QuantKey(torch.uint8, ScaleDesc(torch.float32, True, GroupShape.PER_TENSOR))
"""Key of codes whose scale the linear knows."""


class RowsActivation(QuantizedActivation):
    """Rows on their way from a fused layer to its linears.

    ``data`` is what the layer wrote, once. ``shape``, ``dtype`` and ``size`` are those of the activation it
    stands
    for: Hugging Face's attention asks for them.
    """

    @property
    def shape(self) -> torch.Size:
        return self.orig_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.orig_dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.orig_shape if dim is None else self.orig_shape[dim]


@dataclass
class PackedActivation(RowsActivation):
    """Packed rows, ``[..., H + 4]`` uint8; ``scale`` is a view of their last 4 bytes, ``[..., 4]`` uint8."""

    @classmethod
    def of(
        cls, packed: torch.Tensor, dtype: torch.dtype, static_scale: torch.Tensor | None = None
    ) -> PackedActivation:
        """Wrap packed rows, ``[..., H + 4]``, of an activation ``[..., H]`` that had ``dtype``."""
        shape = torch.Size((*packed.shape[:-1], packed.shape[-1] - fmt.SCALE_BYTES))
        return cls(packed, packed[..., -fmt.SCALE_BYTES :], dtype, shape, PACKED_KEY)


@dataclass
class CodesActivation(RowsActivation):
    """Codes, ``[..., H]`` uint8; ``scale`` is the one given for all of them, ``[1]`` fp32."""

    @classmethod
    def of(cls, codes: torch.Tensor, dtype: torch.dtype, static_scale: torch.Tensor) -> CodesActivation:
        """Wrap codes ``[..., H]`` of an activation that had ``dtype``."""
        return cls(codes, static_scale, dtype, codes.shape, CODES_KEY)
