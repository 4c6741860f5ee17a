"""Patch: something of ours happens around ``BaseModelLoader.load_model``.

What: wraps the method of ``vllm.model_executor.model_loader.base_loader.BaseModelLoader``; what happens
    around it is the hook's business (``integrations/vllm/loader.py``).
Why: the proof needs the whole model with its final weights, and plugins are given neither: entry points
    run before a model exists, ``process_weights_after_loading`` sees one layer at a time.
Versions: vLLM 0.24 to 0.33. Loaders that override ``load_model`` (tensorizer, modelexpress, ipc_cache) are
    not covered: their models keep stock norms, with packed FP8 matmuls.
Delete when: vLLM has a hook for plugins after a model is loaded, or norms and linears negotiate
    ``QuantizedActivation`` in the model files (vLLM PR 45364).
"""

from __future__ import annotations

import functools
from collections.abc import Callable


def apply(loader: type, hook: Callable) -> None:
    """Make ``loader.load_model(...)`` call ``hook(original, self, ...)``, once.

    Args:
        loader: vLLM's ``BaseModelLoader``.
        hook: gets vLLM's method, then the method's own arguments, and returns the model.
    """
    original = loader.load_model  # type: ignore[attr-defined]
    if original.__module__ == __name__:
        return

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        return hook(original, self, *args, **kwargs)

    load_model.__module__ = __name__  # wraps() copied vLLM's; ours marks the loader as patched
    loader.load_model = load_model  # type: ignore[attr-defined]
