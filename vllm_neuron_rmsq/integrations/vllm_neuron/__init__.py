"""FP8-dynamic Llamas on vLLM Neuron, through our kernels.

vLLM Neuron brings its own Llama and refuses such checkpoints. The way in has two ends, in two kinds of
process:

- where vLLM's configuration is made, the platform refuses quantized weights. Its validator is asked first;
  when it refuses a checkpoint that we take, the refusal is lifted, and the model's architecture becomes
  :data:`ARCHITECTURE`.
- in each worker, where vLLM Neuron registers its Llama, our factory is registered in its place, and as
  :data:`ARCHITECTURE`.

The new name is what makes it safe. Behind the validator the stock Llama would read FP8 codes as bf16 numbers.
But a worker in which something of ours is missing, or in which somebody else has registered a Llama since,
knows no :data:`ARCHITECTURE`: it says so and ends.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm_neuron_rmsq import backends, settings
from vllm_neuron_rmsq.integrations.vllm_neuron import checkpoint, versions

# A child of vLLM's logger, which vLLM has set up by the time it loads plugins.
logger = logging.getLogger(f"vllm.{__name__}")

ARCHITECTURE = "RowFp8LlamaForCausalLM"
"""What a Llama is called for which the refusal was lifted; only our factory is registered for it."""


def apply() -> None:
    """Prepare this process; a second call changes nothing."""
    missing = versions.missing_of_platform()
    if missing:
        _inactive(missing)
        return
    from vllm import ModelRegistry, envs
    from vllm.platforms import current_platform

    from vllm_neuron_rmsq.patches import env_variables, neuron_platform, neuron_registry

    env_variables.apply(envs.environment_variables, settings.variables())
    neuron_registry.apply(type(ModelRegistry), instead)
    neuron_platform.apply(type(current_platform), lift)


def _inactive(missing: list[str]) -> None:
    logger.warning(
        "vllm-neuron-rmsq is inactive on vLLM Neuron %s (written for %s): %s. FP8 weights stay refused",
        versions.installed(),
        " and ".join(versions.TESTED),
        "; ".join(missing),
    )


@functools.cache
def _model_is_known() -> bool:
    """Whether this vLLM Neuron's Llama is the one ours is made for; says once what is missing."""
    missing = versions.missing_of_model()
    if missing:
        _inactive(missing)
    return not missing


def instead(architecture: str, model_class: Any) -> dict[str, type]:
    """Return what to register in place of a class: our factory for vLLM Neuron's Llama, nothing for any
    other."""
    theirs = isinstance(model_class, type) and model_class.__module__.startswith("vllm_neuron.")
    if architecture != checkpoint.ARCHITECTURE or not theirs or not _model_is_known():
        return {}
    from vllm_neuron_rmsq.integrations.vllm_neuron import llama

    return dict.fromkeys((architecture, ARCHITECTURE), llama.factory(model_class))


def lift(vllm_config: Any) -> bool:
    """Lift the platform's refusal for a checkpoint that our factory will take, and say whether that was
    done."""
    from vllm import ModelRegistry

    from vllm_neuron_rmsq.patches import neuron_registry

    extra = vllm_config.additional_config
    if settings.Settings.load(additional_config=extra if isinstance(extra, dict) else None).backend == "off":
        return False
    model_config = vllm_config.model_config
    reason = checkpoint.supported(model_config.hf_config)
    if reason:
        logger.warning("vllm-neuron-rmsq does not take %s either: %s", model_config.model, reason)
        return False
    if not neuron_registry.in_place(type(ModelRegistry)) or not _model_is_known():
        return False
    # What vLLM Neuron's worker resolves; vLLM itself renames a draft model like this.
    model_config._architecture = ARCHITECTURE
    logger.info("vllm-neuron-rmsq takes %s", model_config.model)
    return True


PATCHES = ("env_variables", "neuron_platform", "neuron_registry")
"""Modules of ``patches`` that :func:`apply` applies."""


def preview(model: str) -> dict[str, Any]:
    """Say what would become of a checkpoint; for ``vllm-neuron-rmsq check``.

    Args:
        model: a checkpoint folder, or a name that Hugging Face can resolve.

    Returns:
        ``model`` and ``reason``, why it would not be taken, with the remedy; empty when it would.
    """
    from transformers import AutoConfig

    said = list(outlook().values())[-1]
    reason = checkpoint.supported(AutoConfig.from_pretrained(model))
    if reason is None and said.startswith("stay refused"):
        reason = said
    return {"model": model, "reason": reason or "", "summary": said if reason is None else ""}


def outlook() -> dict[str, str]:
    """Say what the plugin would do on this machine, by topic; for ``vllm-neuron-rmsq check``."""
    from vllm_neuron_rmsq import integrations
    from vllm_neuron_rmsq.integrations.vllm_neuron import functional

    missing = [*versions.missing_of_platform(), *versions.missing_of_model()]
    rows = {
        "vllm-neuron": f"{versions.installed()}; written for {' and '.join(versions.TESTED)}",
        "its names that are needed": "; ".join(missing) or "all there",
    }
    choice = settings.Settings.load()
    reason = None
    if choice.backend == "off":
        reason = "VLLM_RMSQ_BACKEND=off"
    elif not integrations.on_neuron():
        reason = "vLLM's platform is another (VLLM_PLUGINS, VLLM_TARGET_DEVICE)"
    elif missing:
        reason = "names are missing"
    else:
        try:
            backend = functional.serving(choice.backend)
        except (ValueError, backends.BackendUnavailableError) as error:
            reason = str(error)
    served = f"would be served in row FP8: attention {choice.attention}, gathering {choice.gather}"
    rows["FP8-dynamic Llamas"] = f"stay refused: {reason}" if reason else f"{served}, backend {backend}"
    return rows
