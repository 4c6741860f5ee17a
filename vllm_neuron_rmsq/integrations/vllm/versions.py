"""The only reader of vLLM's names: which vLLM the plugin takes, what it needs of it, what differs by version.

vLLM promises none of these names to plugins. They are listed here once, and :func:`missing` looks all of them
up before anything of vLLM is changed. The other modules take them from here, as attributes
(``versions.RMSNorm`` or ``from ...versions import RMSNorm``), and need not know in which version they run:
a name that some supported versions lack is asked for by :func:`has`, and what is called otherwise in some has
one function here, under the newest version's name.

To support another vLLM: ``docs/supporting-a-vllm-version.md``.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from vllm_neuron_rmsq.integrations import names

Version = tuple[int, int]

OLDEST: Version = (0, 24)
NEWEST: Version = (0, 33)
SUPPORTED = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"

_QUANT_ACTIVATION = "vllm.model_executor.layers.fusion.quant_activation"

NEEDED: dict[str, str | None] = {
    "vllm.envs:environment_variables": None,
    "vllm.envs:VLLM_BATCH_INVARIANT": None,
    "vllm.platforms:current_platform._enum": None,
    "vllm.platforms:current_platform.device_type": None,
    # Norms
    "vllm.model_executor.custom_op:op_registry_oot": None,
    "vllm.model_executor.layers.layernorm:RMSNorm.register_oot": "_decorated_op_cls",
    "vllm.model_executor.layers.layernorm:RMSNorm.forward_native": "self, x, residual",
    "vllm.model_executor.layers.layernorm:RMSNorm.name": None,
    "vllm.model_executor.layers.layernorm:RMSNorm.weight": None,
    "vllm.model_executor.layers.layernorm:RMSNorm.pass_weight": None,
    "vllm.model_executor.layers.layernorm:RMSNorm.hidden_size": None,
    "vllm.model_executor.layers.layernorm:RMSNorm.variance_epsilon": None,
    "vllm.model_executor.layers.layernorm:RMSNorm.variance_size_override": None,
    "vllm.model_executor.layers.layernorm:GemmaRMSNorm.register_oot": "_decorated_op_cls",
    "vllm.model_executor.layers.layernorm:GemmaRMSNorm.forward_native": "self, x, residual",
    "vllm.model_executor.layers.layernorm:GemmaRMSNorm.name": None,
    "vllm.model_executor.layers.layernorm:GemmaRMSNorm.weight": None,
    "vllm.model_executor.layers.layernorm:GemmaRMSNorm.variance_epsilon": None,
    # Activation functions
    "vllm.model_executor.layers.activation:SiluAndMul.forward_native": "x",
    # FP8 linears
    "vllm.model_executor.kernels.linear:_POSSIBLE_FP8_KERNELS": None,
    "vllm.model_executor.kernels.linear:_POSSIBLE_FP8_BLOCK_KERNELS": None,
    "vllm.model_executor.kernels.linear:_POSSIBLE_WFP8A16_KERNELS": None,
    "vllm._custom_ops:scaled_fp8_quant": "input, scale",
    **{
        f"vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel:{name}": call
        for name, call in {
            "FP8ScaledMMLinearKernel": None,
            "FP8ScaledMMLinearKernel.__init__": "self, c, layer_param_names",
            "FP8ScaledMMLinearKernel.is_supported": "compute_capability",
            "FP8ScaledMMLinearKernel.can_implement": "c",
            "FP8ScaledMMLinearKernel.input_quant_key": "self",
            "FP8ScaledMMLinearKernel.process_weights_after_loading": "self, layer",
            "FP8ScaledMMLinearKernel.apply_weights": "self, layer, x, bias",
            "FP8ScaledMMLinearKernel.apply_scaled_mm": None,
            "FP8ScaledMMLinearKernel.config": None,
            "FP8ScaledMMLinearKernel.layer_param_names": None,
            "FP8ScaledMMLinearLayerConfig.activation_quant_key": None,
            "FP8ScaledMMLinearLayerConfig.weight_quant_key": None,
            "FP8ScaledMMLinearLayerConfig.weight_shape": None,
            "FP8ScaledMMLinearLayerConfig.out_dtype": None,
        }.items()
    },
    # Which linears LoRA adapters may change
    "vllm.model_executor.utils:get_packed_modules_mapping": "model",
    "vllm.lora.utils:is_in_target_modules": "module_name, target_modules, packed_modules_mapping",
    # What a norm hands to a linear
    **{
        f"{_QUANT_ACTIVATION}:{name}": call
        for name, call in {
            "QuantizedActivation": "data, scale, orig_dtype, orig_shape, quant_key",
            "as_quantized_activation": "x, expected_key",
            "expose_input_quant_key": "layer, kernel",
        }.items()
    },
    **{
        f"vllm.model_executor.layers.quantization.utils.quant_utils:{name}": call
        for name, call in {
            "GroupShape.PER_TENSOR": None,
            "GroupShape.PER_TOKEN": None,
            "QuantKey": "dtype, scale",
            "ScaleDesc": "dtype, static, group_shape",
            "kFp8Dynamic128Sym": None,
            "kFp8DynamicTensorSym": None,
            "kFp8DynamicTokenSym": None,
            "kFp8Static128BlockSym": None,
            "kFp8StaticChannelSym": None,
            "kFp8StaticTensorSym": None,
            "kFp8StaticTokenSym": None,
        }.items()
    },
    # Loading a model, and running it once
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model": (
        "self, vllm_config, model_config"
    ),
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_weights": "self, model, model_config",
    "vllm.model_executor.model_loader.sharded_state_loader:ShardedStateLoader.save_model": (
        "model, path, pattern, max_size"
    ),
    "vllm.model_executor.layers.quantization.kv_cache:BaseKVCacheMethod.process_weights_after_loading": (
        "self, layer"
    ),
    "vllm.config:VllmConfig.additional_config": None,
    "vllm.config:VllmConfig.device_config": None,
    "vllm.config:VllmConfig.load_config": None,
    "vllm.config:LoadConfig.load_format": None,
    "vllm.config:VllmConfig.lora_config": None,
    "vllm.config:LoRAConfig.target_modules": None,
    "vllm.config:VllmConfig.model_config": None,
    "vllm.config:VllmConfig.parallel_config": None,
    "vllm.config:DeviceConfig.device": None,
    "vllm.config:ModelConfig.dtype": None,
    "vllm.config:ModelConfig.served_model_name": None,
    "vllm.config:ModelConfig.get_hidden_size": "self",
    "vllm.config:ModelConfig.uses_mrope": None,
    "vllm.config:ParallelConfig.data_parallel_index": None,
    "vllm.config:ParallelConfig.pipeline_parallel_size": None,
    "vllm.config:ParallelConfig.rank": None,
    "vllm.distributed:get_pp_group": "",
    "vllm.forward_context:set_forward_context": ("attn_metadata, vllm_config, *, num_tokens, skip_compiled"),
    "vllm.sequence:IntermediateTensors.tensors": None,
}
"""In every supported version: "module:name" -> how it is called, or None where it is only read. Names in one
call stand in the order they are passed in; those after "*" are passed by name."""

NEEDED_SINCE: dict[Version, dict[str, str | None]] = {
    # The Transformers backend builds plain norms before.
    (0, 25): {
        f"vllm.model_executor.models.transformers.fusers.rms_norm:{name}.forward": "self, x, residual"
        for name in ("TPAwareRMSNorm", "TPAwareGemmaRMSNorm")
    },
    (0, 28): {"vllm.model_executor.utils:replace_parameter": "layer, param_name, new_tensor"},
    (0, 30): {
        f"{_QUANT_ACTIVATION}:get_input_quant_key": "layer",
        f"{_QUANT_ACTIVATION}:expose_input_quant_key._input_quant_key": None,
    },
}
"""The same, from the version on that has them."""

NEEDED_BEFORE: dict[Version, dict[str, str | None]] = {
    (0, 28): {"vllm.model_executor.utils:replace_parameter": "layer, param_name, new_data"},
    (0, 30): {f"{_QUANT_ACTIVATION}:expose_input_quant_key.input_quant_key": None},
}
"""The same, up to the version that has them no more, or calls them otherwise."""

CHECK: dict[str, str | None] = {
    "vllm.utils.ompmultiprocessing:OMPProcessManager": "config",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self",
    "vllm.config:set_current_vllm_config": "vllm_config",
    "vllm.distributed:init_distributed_environment": (
        "world_size, rank, distributed_init_method, local_rank, backend"
    ),
    "vllm.distributed:ensure_model_parallel_initialized": (
        "tensor_model_parallel_size, pipeline_model_parallel_size"
    ),
    "vllm.utils.torch_utils:set_default_torch_dtype": "dtype",
    "vllm.model_executor.model_loader.utils:initialize_model": "*, vllm_config",
}
"""What ``vllm-neuron-rmsq check`` needs besides; serving does without."""


def __getattr__(name: str) -> Any:
    """vLLM's object of that name, for every name that this version has of the tables above."""
    if name not in _modules():
        raise AttributeError(f"{name}: not listed in {__name__}.NEEDED for vLLM {installed()}")
    return getattr(importlib.import_module(_modules()[name]), name)


def has(name: str) -> bool:
    """Whether this vLLM has ``name``, one that is in the tables for some versions only."""
    return name in _modules()


def get_input_quant_key(layer: Any) -> Any:
    """Return the key under which a linear takes quantized input, or ``None`` where it, or what is around it
    (a LoRA layer, for one), wants it plain.

    vLLM's function of that name; before 0.30 there is none, and what is around a linear has no key.
    """
    if has("get_input_quant_key"):
        return __getattr__("get_input_quant_key")(layer)
    return exposed_input_quant_key(layer)


def exposed_input_quant_key(layer: Any) -> Any:
    """Return the key that ``expose_input_quant_key`` stored on a linear, or ``None``."""
    return getattr(layer, "_input_quant_key" if version() >= (0, 30) else "input_quant_key", None)


def installed() -> str:
    """Return vLLM's version, as the module gives it: distributions have several names."""
    return getattr(importlib.import_module("vllm"), "__version__", "of unknown version")


def version() -> Version:
    """Return vLLM's version as far as the tables go by it; ``(0, 0)`` where it cannot be told."""
    found = re.match(r"(\d+)\.(\d+)", installed())
    return (int(found[1]), int(found[2])) if found else (0, 0)


def needed(of: Version) -> dict[str, str | None]:
    """Return what is needed of a vLLM of version ``of``, as :data:`NEEDED` has it."""
    table = dict(NEEDED)
    for first, some in NEEDED_SINCE.items():
        table |= some if of >= first else {}
    for first, some in NEEDED_BEFORE.items():
        table |= some if of < first else {}
    return table


def missing() -> list[str]:
    """Return why the plugin cannot work with this vLLM, in words, or an empty list. Changes nothing.

    Its version must be a supported one, which is said without a look at its names, and it must have every
    name that is needed of that version.
    """
    if version() > NEWEST:
        return ["newer than any it was tried with"]
    if version() < OLDEST:
        return ["older than any it was tried with" if version() > (0, 0) else "no version that can be read"]
    return names.missing(needed(version()))


@functools.cache
def _modules() -> dict[str, str]:
    """The module of each of this vLLM's names."""
    paths = [*needed(version()), *CHECK]
    return {path.partition(":")[2].partition(".")[0]: path.partition(":")[0] for path in paths}
