"""The hook around vLLM's model loader: settings before a model is loaded, fusion after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_neuron_rmsq import __version__, settings
from vllm_neuron_rmsq.integrations.vllm import fusion


def load_model(original: Callable, loader: Any, vllm_config: Any, model_config: Any, *args, **kwargs) -> Any:
    """Load a model by ``original``, vLLM's method, and bind its layers.

    Before, ``VLLM_RMSQ_*`` and ``additional_config["rmsq"]`` become the settings in force. After, they, the
    resolved backend and the fused layers are written to ``additional_config["rmsq_graph"]``, which is part of
    the key of vLLM's compilation cache: a graph compiled for one is never loaded for another.

    Raises:
        ValueError: a setting is unknown or has a value that is not valid.
        BackendUnavailableError: a backend asked for by name cannot run here.
        RuntimeError: STRICT is set and a decoder norm stayed unfused.
    """
    extra = vllm_config.additional_config
    settings.install(settings.Settings.load(additional_config=extra if isinstance(extra, dict) else None))
    if vllm_config.load_config.load_format == "dummy":
        loader.load_weights = functools.partial(_load_dummy_weights, loader.load_weights)
    model = original(loader, vllm_config, model_config, *args, **kwargs)
    report = fusion.bind(model, vllm_config, model_config)
    if report is not None:
        report.publish(model_config, vllm_config.parallel_config)
    if isinstance(extra, dict):
        backend = None if report is None else report.backend
        layers = [] if report is None else [*report.fused, *report.fused_activations]
        fused = [layer.name for layer in layers]
        # One entry for each model: a draft model is loaded after the one it drafts for.
        graph = extra.setdefault("rmsq_graph", {})
        graph[f"{model_config.model} {type(model).__name__}"] = [
            __version__,
            repr(settings.current()),
            backend,
            fused,
        ]
    return model


def _load_dummy_weights(original: Callable, model: Any, model_config: Any) -> None:
    """Fill ``model`` by ``original``, vLLM's method, with random numbers, but none below zero for a scale:
    a checkpoint that had one would be refused."""
    original(model, model_config)
    for name, parameter in model.named_parameters():
        if "scale" in name.rpartition(".")[2]:
            parameter.data.abs_()
