"""The only reader of vLLM's names: what the plugin needs of vLLM, and whether this vLLM has it.

vLLM promises none of these names to plugins. They are listed here once, and :func:`missing` looks all of them
up before anything of vLLM is changed. The other modules take them from here, as attributes:
``versions.RMSNorm`` or ``from ...versions import RMSNorm``.

To support another vLLM: run ``missing()`` there, mend what it names, and run ``tests/integrations/vllm``.
"""

from __future__ import annotations

import importlib
from typing import Any

from vllm_neuron_rmsq.integrations import names

SUPPORTED = "0.32"

NEEDED: dict[str, str | None] = {
    # "module:name" -> how it is called, or None where it is only read. Names in one call stand in the order
    # they are passed in; those after "*" are passed by name.
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
    "vllm.model_executor.models.transformers.fusers.rms_norm:TPAwareRMSNorm.forward": "self, x, residual",
    # Activation functions
    "vllm.model_executor.layers.activation:SiluAndMul.forward_native": "x",
    # FP8 linears
    "vllm.model_executor.kernels.linear:_POSSIBLE_FP8_KERNELS": None,
    "vllm.model_executor.kernels.linear:register_linear_kernel": "kernel_class, platform, kernel_type",
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
    "vllm.model_executor.utils:replace_parameter": "layer, param_name, new_tensor",
    # What a norm hands to a linear
    **{
        f"vllm.model_executor.layers.fusion.quant_activation:{name}": call
        for name, call in {
            "QuantizedActivation": "data, scale, orig_dtype, orig_shape, quant_key",
            "as_quantized_activation": "x, expected_key",
            "get_input_quant_key": "layer",
            "expose_input_quant_key._input_quant_key": None,
        }.items()
    },
    **{
        f"vllm.model_executor.layers.quantization.utils.quant_utils:{name}": call
        for name, call in {
            "GroupShape.PER_TOKEN": None,
            "QuantKey": "dtype, scale",
            "ScaleDesc": "dtype, static, group_shape",
            "kFp8DynamicTensorSym": None,
            "kFp8DynamicTokenSym": None,
            "kFp8StaticChannelSym": None,
            "kFp8StaticTensorSym": None,
        }.items()
    },
    # Loading a model, and running it once
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model": (
        "self, vllm_config, model_config"
    ),
    "vllm.config:VllmConfig.additional_config": None,
    "vllm.config:VllmConfig.device_config": None,
    "vllm.config:VllmConfig.lora_config": None,
    "vllm.config:VllmConfig.model_config": None,
    "vllm.config:VllmConfig.parallel_config": None,
    "vllm.config:DeviceConfig.device": None,
    "vllm.config:ModelConfig.dtype": None,
    "vllm.config:ModelConfig.get_hidden_size": "self",
    "vllm.config:ModelConfig.uses_mrope": None,
    "vllm.config:ParallelConfig.pipeline_parallel_size": None,
    "vllm.distributed:get_pp_group": "",
    "vllm.forward_context:set_forward_context": ("attn_metadata, vllm_config, *, num_tokens, skip_compiled"),
    "vllm.sequence:IntermediateTensors.tensors": None,
}

_MODULES = {path.partition(":")[2].partition(".")[0]: path.partition(":")[0] for path in NEEDED}


def __getattr__(name: str) -> Any:
    """vLLM's object of that name, for every name in ``NEEDED``."""
    if name not in _MODULES:
        raise AttributeError(f"{name}: not listed in {__name__}.NEEDED")
    return getattr(importlib.import_module(_MODULES[name]), name)


def installed() -> str:
    """Return vLLM's version, as the module gives it: distributions have several names."""
    return getattr(importlib.import_module("vllm"), "__version__", "of unknown version")


def missing() -> list[str]:
    """Return what this vLLM lacks of ``NEEDED``, in words, or an empty list. Changes nothing."""
    return names.missing(NEEDED)
