"""Patch: the packed FP8 linear kernel is asked before vLLM's own.

What: moves our class to the front of the platform's list of FP8 kernels, right after registering it with
    the public ``register_linear_kernel``.
Why: registration appends and selection takes the first kernel that can implement a layer, so a kernel
    registered from outside would only ever get what the stock ones refuse.
Versions: vLLM 0.32 (``register_linear_kernel`` as of 0.19).
Delete when: ``register_linear_kernel`` takes a priority.
"""

from __future__ import annotations

from vllm.model_executor.kernels import linear
from vllm.platforms import current_platform

from vllm_neuron_rmsq.layers.fp8_linear import PackedFp8LinearKernel


def apply() -> None:
    """Register the kernel for the current platform and put it first, once."""
    platform = current_platform._enum
    if PackedFp8LinearKernel in linear._POSSIBLE_FP8_KERNELS.get(platform, []):
        return
    linear.register_linear_kernel(PackedFp8LinearKernel, platform, "fp8")
    kernels = linear._POSSIBLE_FP8_KERNELS[platform]
    kernels.insert(0, kernels.pop())
