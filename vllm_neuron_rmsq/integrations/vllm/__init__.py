"""vLLM's own models: FP8 linears that multiply packed rows, and norms that write them where that is proven.

``apply()`` registers, ``loader`` binds after a model is loaded. ``versions`` is the only reader of vLLM's
names; nothing else here imports ``vllm``.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

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
    5. The model loader is patched: it binds norms to linears once the weights are final. So is what saves
       a ``sharded_state``.
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

    # Only now: these modules derive from vLLM's classes, and versions can be asked for without torch.
    from vllm_neuron_rmsq import settings
    from vllm_neuron_rmsq.integrations.vllm import linear, loader, rms_norm
    from vllm_neuron_rmsq.patches import (
        cpu_fp8_quant,
        env_variables,
        linear_kernel_order,
        model_loader,
        sharded_state,
    )

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
    sharded_state.apply(versions.ShardedStateLoader, loader.save_model)


PATCHES = ("cpu_fp8_quant", "env_variables", "linear_kernel_order", "model_loader", "sharded_state")
"""Modules of ``patches`` that :func:`apply` applies."""


def outlook(patches: Iterable[str]) -> dict[str, Any]:
    """Say what the plugin finds of vLLM here; for ``vllm-neuron-rmsq check``.

    Args:
        patches: modules of ``patches`` that would be applied.
    """
    missing = versions.missing()
    return {
        "version": versions.installed(),
        "supported": versions.SUPPORTED,
        "platform": None if missing else versions.current_platform.device_type,
        "missing": missing,
        "patches": {name: _what(name) for name in patches},
    }


def _what(patch: str) -> str:
    """What a patch changes: the first line of its docstring."""
    text = importlib.import_module(f"vllm_neuron_rmsq.patches.{patch}").__doc__ or ""
    return text.partition("\n")[0].removeprefix("Patch: ").rstrip(".").replace("``", "")


def threads() -> dict[str, Any]:
    """Say to which CPUs vLLM would bind the threads of one rank, as far as it can be told."""
    parallel = SimpleNamespace(local_world_size=1, data_parallel_rank_local=None, _api_process_count=1)
    config = SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)
    try:
        bound = versions.OMPProcessManager(config)
        return {"ranks": bound.cpu_lists, "reserved": bound.reserved_cpu_list}
    except Exception as error:  # not a CPU's platform, another vLLM, a list of CPUs that is none
        logger.debug("Where vLLM would bind threads is not known: %s", error)
        return {"ranks": None, "reserved": None}


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
