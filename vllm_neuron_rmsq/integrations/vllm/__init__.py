"""vLLM's own models: FP8 linears that multiply packed rows, and norms that write them where that is proven.

``apply()`` registers, ``loader`` binds after a model is loaded. ``versions`` is the only reader of vLLM's
names; nothing else here imports ``vllm``.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from vllm_neuron_rmsq import backends, settings
from vllm_neuron_rmsq.integrations.vllm import versions

# A child of vLLM's logger, which vLLM has set up by the time it loads plugins.
logger = logging.getLogger(f"vllm.{__name__}")


def apply() -> None:
    """Register norms, linear kernel and loader hook with vLLM; a second call changes nothing.

    1. vLLM's version is read and every name of it that will be needed is looked up. If it is not a supported
       one, or a name is missing, vLLM stays as it is and one warning says so.
    2. The plugin's environment variables are made known to vLLM.
    3. ``RMSNormQuant`` is registered as the out-of-tree ``RMSNorm``, and its sister as the norm of vLLM's
       Transformers backend: stock until they are bound.
    4. Our FP8 linear kernels are put first among vLLM's, and what vLLM's CPU build lacks to
       process weights for it is there.
    5. The model loader is patched: it binds norms to linears once the weights are final.
    """
    missing = versions.missing()
    if missing:
        logger.warning(
            "vllm-neuron-rmsq is inactive: it needs vLLM %s and this is %s (%s)",
            versions.SUPPORTED,
            versions.installed(),
            "; ".join(missing),
        )
        return

    # Only now: these modules derive from vLLM's classes.
    from vllm_neuron_rmsq.integrations.vllm import linear, loader, rms_norm
    from vllm_neuron_rmsq.patches import cpu_fp8_quant, env_variables, linear_kernel_order, model_loader

    env_variables.apply(versions.environment_variables, settings.variables())
    for in_tree, ours in rms_norm.REPLACEMENTS.items():
        _replace(in_tree, ours)
    platform = versions.current_platform._enum
    with_activations = [versions._POSSIBLE_FP8_KERNELS, versions._POSSIBLE_FP8_BLOCK_KERNELS]
    linear_kernel_order.apply(linear.PackedFp8LinearKernel, platform, with_activations)
    linear_kernel_order.apply(
        linear.WeightOnlyFp8LinearKernel, platform, [versions._POSSIBLE_WFP8A16_KERNELS]
    )
    cpu_fp8_quant.apply(sys.modules[versions.scaled_fp8_quant.__module__])
    model_loader.apply(versions.BaseModelLoader, loader.load_model)


def outlook() -> dict[str, str]:
    """Say what the plugin would do in this vLLM, by topic; for ``vllm-neuron-rmsq check``."""
    try:
        missing = versions.missing()
    except Exception as error:  # as broken as it may be, the rest of the answer is worth having
        return {"version": f"vLLM cannot be imported: {type(error).__name__}: {error}"}
    rows = {
        "version": f"{versions.installed()}; supported are {versions.SUPPORTED}",
        "the plugin": f"is inactive: {'; '.join(missing)}" if missing else "has every name that it needs",
    }
    if not missing:
        choice = settings.Settings.load()
        try:
            backend, reason = backends.for_serving(choice.backend, versions.current_platform.device_type)
        except backends.BackendUnavailableError as error:
            backend, reason = None, str(error)
        rows["FP8 linears"] = (
            f"would multiply packed rows: backend {backend}, target {choice.target}"
            if backend
            else f"stay vLLM's own: the plugin {reason}"
        )
    return rows


def _replace(in_tree: Any, ours: Any) -> None:
    """Make ``in_tree(...)`` construct ``ours``, unless another plugin was first."""
    taken = versions.op_registry_oot.get(in_tree.__name__)
    if taken is None:
        name = in_tree.name
        in_tree.register_oot(ours)
        # register_oot names the class after the class; vLLM's custom_ops switches go by the op's name.
        ours.name = name
    elif taken is not ours:
        logger.warning(
            "Another plugin has replaced %s by %s: those norms stay unfused, FP8 linears multiply packed "
            "rows all the same",
            in_tree.__name__,
            taken.__qualname__,
        )
