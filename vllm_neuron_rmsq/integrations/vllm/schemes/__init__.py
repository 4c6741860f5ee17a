"""How kinds of FP8 checkpoint are quantized: one ``Scheme`` each, one file each, and their registry.

A scheme answers four questions. Which checkpoints are meant: the keys under which vLLM hands their layers to
a linear kernel. What a row looks like on its way from a producer (a norm, an activation function) to a
linear: ``rows``. What the producer must do: ``norm``, ``silu_mul``. What the linear must do with a plain
activation and with rows: ``quantize`` and ``multiply``. The layers ask nothing else, so a new scheme is one
file beside ``per_token.py`` and one line in ``SCHEMES``.
"""

from __future__ import annotations

from typing import Any

from vllm_neuron_rmsq.integrations.vllm.schemes import block, per_token, static
from vllm_neuron_rmsq.integrations.vllm.schemes.base import Binding, Scheme

__all__ = ["SCHEMES", "Binding", "Scheme", "find"]

SCHEMES: tuple[Scheme, ...] = (per_token.SCHEME, static.SCHEME, block.SCHEME)


def find(activation_key: Any, weight_key: Any) -> tuple[Scheme | None, str]:
    """Return the scheme of a linear with these keys, or ``None`` and why it is of none."""
    reasons = []
    for scheme in SCHEMES:
        reason = scheme.refuse(activation_key, weight_key)
        if reason is None:
            return scheme, ""
        reasons.append(reason)
    return None, "; or ".join(reasons)
