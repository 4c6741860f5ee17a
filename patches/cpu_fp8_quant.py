"""Patch: ``scaled_fp8_quant`` works on a CPU.

What: wraps ``vllm._custom_ops.scaled_fp8_quant``. Tensors in the CPU's memory, with one scale that is given
    or found, or one found for each row, are quantized by PyTorch's own operators; everything else goes to
    vLLM's function.
Why: vLLM's CPU build registers the operators behind it without arguments or a kernel
    (``_C::static_scaled_fp8_quant() -> ()``, and the dynamic ones). Weights are quantized by it at load:
    those of a bf16 checkpoint under ``--quantization fp8_per_tensor`` and ``fp8_per_channel``, for which vLLM
    0.24 has it find the scales, and the shards of a per-tensor checkpoint, to bring them to one scale.
Versions: vLLM 0.24 to 0.33.
Delete when: vLLM's CPU build has that operator.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

SMALLEST = 1 / (448.0 * 512)
"""The smallest scale that vLLM's kernels find, of a tensor of zeros."""
PER_ROW = "use_per_token_if_dynamic"


def apply(ops: ModuleType) -> None:
    """Patch ``ops``, the module ``vllm._custom_ops``, once."""
    original = ops.scaled_fp8_quant
    if getattr(original, "rmsq", False):
        return

    @functools.wraps(original)
    def scaled_fp8_quant(
        input: torch.Tensor, scale: torch.Tensor | None = None, *args: Any, **options: Any
    ) -> Any:
        others = {name: value for name, value in options.items() if name != PER_ROW}
        asked = [value for value in (*args, *others.values()) if value is not None and value is not False]
        if asked or (scale is not None and scale.numel() != 1) or not input.is_cpu:
            return original(input, scale, *args, **options)
        limit = torch.finfo(torch.float8_e4m3fn).max
        if scale is None:
            largest = (
                input.abs().amax(-1, keepdim=True) if options.get(PER_ROW) else input.abs().max().reshape(1)
            )
            scale = (largest.float() / limit).clamp(min=SMALLEST)
        return (input.float() / scale).clamp(-limit, limit).to(torch.float8_e4m3fn), scale

    scaled_fp8_quant.rmsq = True  # type: ignore[attr-defined]
    ops.scaled_fp8_quant = scaled_fp8_quant  # type: ignore[attr-defined]
