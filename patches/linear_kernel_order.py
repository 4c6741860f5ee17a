"""Patch: our FP8 linear kernels are asked before vLLM's own.

What: puts a kernel class first in the platform's lists of FP8 kernels in
    ``vllm.model_executor.kernels.linear``: ``_POSSIBLE_FP8_KERNELS``, ``_POSSIBLE_FP8_BLOCK_KERNELS`` (block
    scales) or ``_POSSIBLE_WFP8A16_KERNELS`` (weights only).
Why: the public ``register_linear_kernel`` appends, and selection takes the first kernel that can implement a
    layer, so a kernel registered from outside would only ever get what the stock ones refuse. For block
    scales and for weights only it has no registration at all (block scales as of 0.33).
Versions: vLLM 0.24 to 0.33.
Delete when: ``register_linear_kernel`` takes a priority and knows these two lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def apply(kernel: type, platform: Any, lists: Iterable[dict[Any, list[type]]]) -> None:
    """Put ``kernel`` first in ``kernels[platform]`` of each of ``lists``, once.

    Args:
        kernel: a linear kernel class.
        platform: the key of vLLM's platform.
        lists: of vLLM's ``_POSSIBLE_*_KERNELS``.
    """
    for kernels in lists:
        order = kernels.setdefault(platform, [])
        if kernel not in order:
            order.insert(0, kernel)
