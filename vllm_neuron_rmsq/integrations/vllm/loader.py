"""The hooks around vLLM's model loaders: settings before a model is loaded, fusion after it; and saving."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from vllm_neuron_rmsq import __version__, settings
from vllm_neuron_rmsq.integrations.vllm import fusion, linear, versions


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
        with _before_weights(loader, linear.prepare, _keep_loaded_state):
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


def save_model(original: Callable, model: Any, *args: Any, **kwargs: Any) -> None:
    """Save a rank's ``sharded_state`` by ``original``, vLLM's function: FP8 linears and the scales of
    attention as a checkpoint has them.

    Loaded again, the linears get the codes and scales that they multiply by now: a weight that was halved for
    the target's range is saved so. A model without FP8 linears of ours is saved as vLLM does.

    Raises:
        ValueError: a linear of ours has no form in a checkpoint; nothing is written.
    """
    forms: dict[Any, Callable] = {}
    for name, layer in model.named_modules():
        kernel = linear.kernel_of(layer)
        if isinstance(kernel, linear.PackedFp8LinearKernel | linear.WeightOnlyFp8LinearKernel):
            linear.check_has_checkpoint_form(kernel, name)
            forms[layer] = functools.partial(linear.checkpoint_form, kernel, layer)
    if forms:
        forms |= {
            layer: functools.partial(_loaded_state, layer)
            for layer in model.modules()
            if _loaded_state(layer)
        }
    with contextlib.ExitStack() as stack:
        for layer, form in forms.items():
            hook = functools.partial(_put_checkpoint_form, form)
            stack.callback(layer.register_state_dict_post_hook(hook).remove)
        original(model, *args, **kwargs)


def _put_checkpoint_form(
    form: Callable, layer: Any, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Put what ``form`` returns into ``state`` in place of a layer's own tensors."""
    for name in [name for name in state if name.rpartition(".")[0] == prefix.removesuffix(".")]:
        del state[name]
    state.update({prefix + name: tensor for name, tensor in form().items()})


def _keep_loaded_state(model: Any) -> None:
    """Keep what attention layers are loaded with, a few scales, which vLLM drops when it processes them."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, versions.BaseKVCacheMethod):
            process = method.process_weights_after_loading
            method.process_weights_after_loading = functools.partial(_process_attention, process)


def _process_attention(process: Callable, layer: Any) -> None:
    layer.rmsq_loaded_state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    process(layer)


def _loaded_state(layer: Any) -> dict[str, Any]:
    return getattr(layer, "rmsq_loaded_state", {})


def _load_dummy_weights(original: Callable, model: Any, model_config: Any) -> None:
    """Fill ``model`` by ``original``, vLLM's method, with random numbers, but none below zero for a scale:
    a checkpoint that had one would be refused."""
    original(model, model_config)
    for name, parameter in model.named_parameters():
        if "scale" in name.rpartition(".")[2]:
            parameter.data.abs_()


@contextlib.contextmanager
def _before_weights(loader: Any, *prepare: Callable) -> Iterator[None]:
    """Call each ``prepare(model)`` between the model's construction and the loading of its weights."""
    load_weights = loader.load_weights

    def prepare_first(model: Any, *args, **kwargs) -> Any:
        for each in prepare:
            each(model)
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
