"""The hook around vLLM's model loader: settings before a model is loaded, fusion after it."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from vllm_neuron_rmsq import __version__, settings
from vllm_neuron_rmsq.integrations.vllm import fusion, linear


def load_model(original: Callable, loader: Any, vllm_config: Any, model_config: Any, *args, **kwargs) -> Any:
    """Load a model by ``original``, vLLM's method, and bind its layers.

    Before, ``VLLM_RMSQ_*`` and ``additional_config["rmsq"]`` become the settings in force. After, they, the
    resolved backend and the fused layers are written to ``additional_config["rmsq_graph"]``, which is part of
    the key of vLLM's compilation cache: a graph compiled for one is never loaded for another.

    Raises:
        ValueError: a setting is unknown or has a value that is not valid; or a linear is of an FP8 kind that
            neither the plugin nor vLLM can multiply here.
        BackendUnavailableError: a backend asked for by name cannot run here.
        RuntimeError: STRICT is set and a decoder norm stayed unfused.
    """
    extra = vllm_config.additional_config
    settings.install(settings.Settings.load(additional_config=extra if isinstance(extra, dict) else None))
    if vllm_config.load_config.load_format == "dummy":
        loader.load_weights = functools.partial(_load_dummy_weights, loader.load_weights)
    try:
        with _before_weights(loader, linear.prepare):
            model = original(loader, vllm_config, model_config, *args, **kwargs)
    except ValueError as error:
        refusal = _refusal(error)
        if refusal:
            raise ValueError(refusal) from error
        raise
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


@contextlib.contextmanager
def _before_weights(loader: Any, prepare: Callable) -> Iterator[None]:
    """Call ``prepare(model)`` between the model's construction and the loading of its weights."""
    load_weights = loader.load_weights

    def prepare_first(model: Any, *args, **kwargs) -> Any:
        prepare(model)
        return load_weights(model, *args, **kwargs)

    loader.load_weights = prepare_first
    try:
        yield
    finally:
        del loader.load_weights


def _refusal(error: ValueError) -> str:
    """Say in one sentence which linear has no FP8 kernel, why and what to do; empty for another error.

    vLLM lists what each kernel lacks and does not name the layer, which the frames of its constructors know.
    """
    reasons = [line for line in str(error).splitlines() if line.startswith(tuple(linear.NAMES))]
    if not reasons or not str(error).startswith("Failed to find a kernel"):
        return ""
    prefixes = [frame.f_locals.get("prefix") for frame, _ in traceback.walk_tb(error.__traceback__)]
    layer = next((prefix for prefix in reversed(prefixes) if isinstance(prefix, str) and prefix), "a linear")
    return (
        f"{layer}: no FP8 kernel takes it on this machine (vllm-neuron-rmsq {reasons[0].partition(' ')[2]}) "
        "Load the bf16 checkpoint that it was made of, with --quantization fp8_per_channel."
    )
