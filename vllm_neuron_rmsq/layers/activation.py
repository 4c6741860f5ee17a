"""What a fused norm hands to the linears behind it: vLLM's ``QuantizedActivation`` holding a packed tensor,
and the probe that stands in for it while :mod:`vllm_neuron_rmsq.fusion` finds out who reads it.

Dimensions:
    H: hidden size
    ...: rows (tokens)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch.utils._pytree import tree_map_only
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, QuantKey, ScaleDesc

from vllm_neuron_rmsq import packed as fmt

PACKED_KEY = QuantKey(torch.uint8, ScaleDesc(torch.float32, False, GroupShape.PER_TOKEN))
"""Key of packed rows. No stock kernel has a uint8 key, so a packed tensor that strays is refused there."""


@dataclass
class PackedActivation(QuantizedActivation):
    """Packed rows on their way from a fused norm to its linears.

    ``data`` is the packed tensor, ``[..., H + 4]`` uint8, written once; ``scale`` is a view of its last
    4 bytes, ``[..., 4]`` uint8. ``shape``, ``dtype`` and ``size`` are those of the activation it stands
    for: Hugging Face's attention asks for them.
    """

    @classmethod
    def of(cls, packed: torch.Tensor, hidden: torch.Tensor) -> PackedActivation:
        """Wrap what ``ops.rms_norm_quant`` made of ``hidden`` (``[..., H]``)."""
        return cls(packed, packed[..., -fmt.SCALE_BYTES :], hidden.dtype, hidden.shape, PACKED_KEY)

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


class NormOutputProbe(torch.Tensor):
    """Stands in for a norm's output: reports every operation that reads it, then lets it happen.

    It has the output's shape, strides and dtype but no storage. Metadata may be read freely; any operator
    that PyTorch dispatches with it, from Python or C++, is passed to ``on_read`` by name and then run on
    the real output; code that asks for the memory gets an error. A packed FP8 linear calls
    :meth:`open`, which is passed to ``on_open`` instead.
    """

    output: torch.Tensor
    on_read: Callable[[str], None]
    on_open: Callable[[torch.nn.Module], None]

    @staticmethod
    def __new__(cls, output: torch.Tensor, on_read: Callable, on_open: Callable) -> Self:
        probe = torch.Tensor._make_wrapper_subclass(
            cls, output.shape, strides=output.stride(), dtype=output.dtype, device=output.device
        )
        torch._C._set_throw_on_mutable_data_ptr(probe)
        probe.output, probe.on_read, probe.on_open = output, on_read, on_open
        return probe

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        def unwrap(probe):
            probe.on_read(str(func))
            return probe.output

        args, kwargs = tree_map_only(cls, unwrap, (args, kwargs or {}))
        return func(*args, **kwargs)

    def open(self, linear: torch.nn.Module) -> torch.Tensor:
        """Report that ``linear`` reads the output, and return it."""
        self.on_open(linear)
        return self.output

    def __repr__(self) -> str:  # type: ignore[override]  # the default reads the data
        return f"NormOutputProbe(shape={list(self.shape)}, dtype={self.dtype})"
