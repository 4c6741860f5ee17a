"""Patch: FP8 linears are saved to a ``sharded_state`` as a checkpoint has them.

What: wraps ``ShardedStateLoader.save_model``; what happens around it is the hook's business
    (``integrations/vllm/loader.py``).
Why: vLLM saves parameters as its kernels left them, and loads them into a model whose parameters are still as
    in a checkpoint, where any shape and dtype goes with a warning at most. A weight in the layout of our
    matmul would come back as other numbers. Kernels are not asked.
Versions: vLLM 0.24 to 0.33.
Delete when: vLLM asks kernels for what to save, or keeps what it saved from being processed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable


def apply(loader: type, hook: Callable) -> None:
    """Make ``loader.save_model(...)`` call ``hook(original, ...)``, once.

    Args:
        loader: vLLM's ``ShardedStateLoader``.
        hook: gets vLLM's function, then the function's own arguments.
    """
    original = loader.save_model  # type: ignore[attr-defined]
    if getattr(original, "rmsq", False):
        return

    @functools.wraps(original)
    def save_model(*args, **kwargs):
        return hook(original, *args, **kwargs)

    save_model.rmsq = True  # type: ignore[attr-defined]
    loader.save_model = staticmethod(save_model)  # type: ignore[attr-defined]
