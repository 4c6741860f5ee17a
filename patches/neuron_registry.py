"""Patch: our factory is registered where vLLM Neuron registers its Llama.

What: wraps ``register_model`` of vLLM's model registry. For a class that ours stand in for, ours are
    registered, under their names; everything else is registered as it comes.
Why: vLLM Neuron's worker registers its models itself, late, over whatever was there, and builds the model
    right after. There is no later moment, and no hook.
Versions: vLLM Neuron 0.24.0.1.1.0 and 0.29.0.1.2.0; vLLM 0.24 to 0.32.
Delete when: vLLM Neuron asks plugins for factories, or registers its models before plugins do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

Instead = Callable[[str, Any], Mapping[str, type]]
"""Of an architecture and its class, the classes to register instead, by architecture; none leaves it."""


def in_place(registry: type) -> bool:
    """Whether the registry's class is patched."""
    return getattr(registry.register_model, "rmsq", False)  # type: ignore[attr-defined]


def apply(registry: type, instead: Instead) -> None:
    """Patch the registry's class, once."""
    if in_place(registry):
        return
    original = registry.register_model  # type: ignore[attr-defined]

    @functools.wraps(original)
    def register_model(self: Any, model_arch: str, model_cls: Any) -> None:
        for architecture, ours in (instead(model_arch, model_cls) or {model_arch: model_cls}).items():
            original(self, architecture, ours)

    register_model.rmsq = True  # type: ignore[attr-defined]
    registry.register_model = register_model  # type: ignore[attr-defined]
