"""The second producer: takes the place of vLLM's ``SiluAndMul`` and writes rows of a scheme.

vLLM's module has no weights, so ours is not registered for vLLM to construct, as the norm is: it is put into
the model for it. Where it is not proven, the object that vLLM made comes back. So a model that the plugin
does nothing to is not touched; vLLM's own fusion of activation and quantization, for one, asks for
``SiluAndMul`` by its type. And vLLM may use one object in every layer, where each of ours is bound by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_neuron_rmsq.integrations.vllm.schemes import Binding, Scheme


class Place(NamedTuple):
    """Where in a model a ``SiluAndMul`` is: ``getattr(parent, attribute)``."""

    parent: nn.Module
    attribute: str


class SiluMulQuant(nn.Module):
    """SiLU of the gate times up: ``stock`` until bound, from then on rows for a down projection.

    Attributes:
        binding: how the fused one computes; ``None`` until bound.
    """

    binding: Binding | None = None

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.forward = stock.forward  # type: ignore[method-assign]

    def bind(self, binding: Binding) -> None:
        """Compute rows from now on. Only where nothing but packed FP8 linears reads the output."""
        self.binding = binding
        del self.forward

    def forward(self, x: torch.Tensor) -> Any:
        """Return rows of the scheme, an activation ``[..., I]``, of ``x`` ``[..., 2 I]``, gate then up."""
        assert self.binding is not None
        scheme, backend, target, scale = self.binding
        rows = scheme.silu_mul(x, static_scale=scale, target=target, backend=backend)
        return scheme.wrap(rows, x.dtype, scale)

    def unfit(self, scheme: Scheme) -> str:
        """Say why it could not be fused with linears of ``scheme``, or return an empty string."""
        if scheme.bound:
            return f"activations are to be clipped to ±{scheme.bound:g}, which the fused one cannot do"
        return ""


@contextlib.contextmanager
def in_place(places: Iterable[Place]) -> Iterator[list[SiluMulQuant]]:
    """Put one of ours into each place, and what was there back where it is not bound in the end."""
    stock = [(place, getattr(*place)) for place in places]
    ours = [SiluMulQuant(module) for _, module in stock]
    for (place, _), module in zip(stock, ours, strict=True):
        setattr(*place, module)
    try:
        yield ours
    finally:
        for (place, module), mine in zip(stock, ours, strict=True):
            if mine.binding is None:
                setattr(*place, module)
