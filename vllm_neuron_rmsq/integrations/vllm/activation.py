"""What a fused layer hands to the linears behind it: vLLM's ``QuantizedActivation`` holding a packed tensor.

Dimensions:
    H: features of the activation
    ...: rows (tokens)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.integrations.vllm.versions import GroupShape, QuantizedActivation, QuantKey, ScaleDesc

PACKED_KEY = QuantKey(torch.uint8, ScaleDesc(torch.float32, False, GroupShape.PER_TOKEN))
"""Key of packed rows. No stock kernel has a uint8 key, so a packed tensor that strays is refused there."""


@dataclass
class PackedActivation(QuantizedActivation):
    """Packed rows on their way from a fused layer to its linears.

    ``data`` is the packed tensor, ``[..., H + 4]`` uint8, written once; ``scale`` is a view of its last
    4 bytes, ``[..., 4]`` uint8. ``shape``, ``dtype`` and ``size`` are those of the activation it stands
    for: Hugging Face's attention asks for them.
    """

    @classmethod
    def of(cls, packed: torch.Tensor, dtype: torch.dtype) -> PackedActivation:
        """Wrap packed rows, ``[..., H + 4]``, of an activation ``[..., H]`` that had ``dtype``."""
        shape = torch.Size((*packed.shape[:-1], packed.shape[-1] - fmt.SCALE_BYTES))
        return cls(packed, packed[..., -fmt.SCALE_BYTES :], dtype, shape, PACKED_KEY)

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
