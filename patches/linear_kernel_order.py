"""Patch: the packed FP8 linear kernel is asked before vLLM's own.

What: moves our class to the front of the platform's list of FP8 kernels, ``_POSSIBLE_FP8_KERNELS`` in
    ``vllm.model_executor.kernels.linear``, right after registering it with the public
    ``register_linear_kernel``.
Why: registration appends and selection takes the first kernel that can implement a layer, so a kernel
    registered from outside would only ever get what the stock ones refuse.
Versions: vLLM 0.24 to 0.33 (``register_linear_kernel`` as of 0.19).
Delete when: ``register_linear_kernel`` takes a priority.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def apply(kernel: type, platform: Any, register: Callable, kernels: dict[Any, list[type]]) -> None:
    """Register ``kernel`` for ``platform`` and put it first in ``kernels[platform]``, once.

    Args:
        kernel: an FP8 linear kernel class.
        platform: the key of vLLM's platform.
        register: vLLM's ``register_linear_kernel``.
        kernels: vLLM's ``_POSSIBLE_FP8_KERNELS``.
    """
    if kernel in kernels.get(platform, []):
        return
    register(kernel, platform, "fp8")
    order = kernels[platform]
    order.insert(0, order.pop())
