"""Patch: ``BaseModelLoader.load_model`` reads the plugin's settings before and binds norms after loading.

What: wraps the method. Before, ``VLLM_RMSQ_*`` and ``additional_config["rmsq"]`` become the settings in
    force; after, :func:`vllm_neuron_rmsq.fusion.bind` looks which norm feeds which linears. The settings in
    force, the resolved backend and the fused norms are written to ``additional_config["rmsq_graph"]``, which
    is part of the key of vLLM's compilation cache: a graph compiled for one is never loaded for another.
Why: the proof needs the whole model with its final weights, and plugins are given neither: entry points
    run before a model exists, ``process_weights_after_loading`` sees one layer at a time.
Versions: vLLM 0.32. Loaders that override ``load_model`` (tensorizer, modelexpress, ipc_cache) are not
    covered: their models keep stock norms, with packed FP8 matmuls.
Delete when: vLLM has a hook for plugins after a model is loaded, or norms and linears negotiate
    ``QuantizedActivation`` in the model files (vLLM PR 45364).
"""

from __future__ import annotations

import functools

from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_neuron_rmsq import __version__, fusion, settings


def apply() -> None:
    """Patch the loader, once."""
    original = BaseModelLoader.load_model
    if original.__module__ == __name__:
        return

    @functools.wraps(original)
    def load_model(self, vllm_config, model_config, *args, **kwargs):
        extra = vllm_config.additional_config
        settings.install(settings.Settings.load(additional_config=extra if isinstance(extra, dict) else None))
        model = original(self, vllm_config, model_config, *args, **kwargs)
        report = fusion.bind(model, vllm_config)
        if isinstance(extra, dict):
            fused = [] if report is None else [norm.name for norm in report.fused]
            backend = None if report is None else report.backend
            extra["rmsq_graph"] = [__version__, repr(settings.current()), backend, fused]
        return model

    load_model.__module__ = __name__  # wraps() copied vLLM's; ours marks the loader as patched
    BaseModelLoader.load_model = load_model
