"""What the integration needs of vLLM Neuron, and whether this one has it.

Written for 0.24.0.1.1.0 (Neuron SDK 2.32, vLLM 0.24), whose source was read, and meant for 0.29.0.1.2.0 (SDK
2.33, vLLM 0.29), whose source was not at hand. AWS promises none of these names to anybody. They are listed
here once and all looked up before anything is changed: with one missing, one line says so and vLLM Neuron
is as it was.
"""

from __future__ import annotations

import importlib.metadata

from vllm_neuron_rmsq.integrations import names

PACKAGE = "vllm-neuron"
TESTED = ("0.24.0.1.1.0", "0.29.0.1.2.0")

PLATFORM: dict[str, str | None] = {
    "vllm.envs:environment_variables": None,
    "vllm:ModelRegistry.register_model": "model_arch, model_cls",
    "vllm.config:get_current_vllm_config": "",
    "vllm.config:ModelConfig.architecture": None,
    "vllm.config:ModelConfig._architecture": None,
    "vllm.config:ModelConfig.hf_config": None,
    "vllm.config:VllmConfig.additional_config": None,
    "vllm.config:VllmConfig.lora_config": None,
    "vllm.config:VllmConfig.model_config": None,
    "vllm.config:VllmConfig.parallel_config": None,
    "vllm.config:VllmConfig.scheduler_config": None,
    "vllm.distributed.parallel_state:get_tp_group": "",
    "vllm.platforms:current_platform.device_type": None,
    "vllm.platforms:current_platform._validate_quantization_config": None,
}
"""In every process, before the platform's refusal and the registry are touched."""

_LLAMA = "vllm_neuron.model.llama3.model"
MODEL: dict[str, str | None] = {
    **{
        f"{_LLAMA}:LlamaForCausalLM.{name}": call
        for name, call in {
            "from_configs": "hf_config, neuron_config",
            "bind_kv_cache": "self, kv_caches",
            "load_weights": "self, checkpoint_path, device, cache_dir",
            "load_weights_lite": "self, checkpoint_path, device, cache_dir",
            "_load_kv_cache_scales": "self, checkpoint, device",
            **dict.fromkeys(("config", "model", "rank", "world_size", "lm_head")),
        }.items()
    },
    f"{_LLAMA}:LlamaModel.layers": None,
    f"{_LLAMA}:LlamaDecoderLayer.__init__": "self, config, layer_idx",
    f"{_LLAMA}:LlamaDecoderLayer.forward": (
        "self, hidden_states, positions, position_embeddings, attn_metadata"
    ),
    f"{_LLAMA}:LlamaDecoderLayer._is_decode": "self, attn_metadata",
    **{
        f"{_LLAMA}:LlamaDecoderLayer.{name}": None
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
    },
    f"{_LLAMA}:LlamaRMSNorm.forward": "self, hidden_states",
    f"{_LLAMA}:LlamaRMSNorm.weight": None,
    f"{_LLAMA}:LlamaRMSNorm.variance_epsilon": None,
    f"{_LLAMA}:LlamaAttention.__init__": "self, config, layer_idx",
    f"{_LLAMA}:LlamaAttention.forward": "self, hidden_states, positions, position_embeddings, attn_metadata",
    **{
        f"{_LLAMA}:LlamaAttention.{name}": None
        for name in (
            *("layer_idx", "head_dim", "dtype", "hidden_size", "scaling", "rank", "world_size"),
            *("tp_group", "attn_tp_group", "fp8_packed", "qkv_proj_weight", "o_proj_weight"),
            *("num_attention_heads_per_rank", "num_key_value_heads_per_rank", "num_kv_heads_for_weight"),
            *("num_kv_replicas", "num_key_value_groups", "q_size", "kv_size", "qkv_split_indices"),
            *("k_cache", "v_cache", "k_scale_float", "v_scale_float"),
        )
    },
    f"{_LLAMA}:LlamaMLP.__init__": "self, config",
    **{
        f"{_LLAMA}:LlamaMLP.{name}": None
        for name in (
            *("tp_group", "world_size", "mlp_tp_group", "mlp_tp_size", "mlp_tp_rank", "hidden_size"),
            "intermediate_size_per_rank",
        )
    },
    "vllm_neuron.model.llama3.config:LlamaConfig.from_configs": "hf_config, neuron_config",
    "vllm_neuron.utils.weight_loader:SafetensorsWeightLoader.transform": None,
    "vllm_neuron.utils.weight_loader:set_weight_loader": "param, loader",
    "vllm_neuron.utils.checkpoints:SafetensorsCheckpoint.load_sharded_pipelined": (
        "self, rank, world_size, model, mappings, device"
    ),
    "vllm_neuron.utils.checkpoints:SafetensorsCheckpoint.get_tensor_names": "self",
    "vllm_neuron.utils.checkpoints:SafetensorsCheckpoint._get_slice": "self, name",
    "vllm_neuron.utils.checkpoints:CheckpointLoadResult.state_dict": None,
    "vllm_neuron.utils.checkpoints:CheckpointLoadResult.unexpected_keys": None,
    "vllm_neuron.utils.dtype_utils:FP8_CLAMP_MAX": None,
    "vllm_neuron.utils.dtype_utils:validate_fp8_segmented_supported": "kv_is_fp8, fp8_packed",
    "vllm_neuron.functional:qkv_proj": (
        "*, hidden, qkv_weights, bias, d_head, cos_cache, sin_cache, num_q_heads, num_kv_heads"
    ),
    "vllm_neuron.functional:flash_attention": "q, k, v, *, scale, tp_q, tp_out",
    "vllm_neuron.functional:segmented_attention": (
        "q, *, k_cache, v_cache, block_tables, prior_tokens, block_size, kv_segment_size, scale, tp_q, "
        "tp_out, fp8_packed"
    ),
    "vllm_neuron.functional:attention_decode": (
        "*, X, X_hidden_dim_actual, rmsnorm_X_enabled, rmsnorm_X_eps, rmsnorm_X_gamma, W_qkv, bias_qkv, cos, "
        "sin, rope_contiguous_layout, K_cache_transposed, active_blocks_table, K_cache, V_cache, "
        "attention_mask, softmax_scale, update_cache, kv_cache_update_idx, k_scale, v_scale, fp8_packed, "
        "W_out, bias_out"
    ),
    "vllm_neuron.functional:gen_attention_decode_mask": (
        "*, pos_ids, bs, q_head, s_active, s_prior, start_pos, block_len"
    ),
    "vllm_neuron.functional:o_proj": "active, weight, bias",
}
"""Where the model is to be built, and where the refusal is to be lifted for it."""


def installed() -> str:
    """Return the version of vLLM Neuron."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def missing_of_platform() -> list[str]:
    """Return what this vLLM or vLLM Neuron lacks of ``PLATFORM``, in words, or an empty list."""
    return names.missing(PLATFORM)


def missing_of_model() -> list[str]:
    """Return what this vLLM Neuron lacks of ``MODEL``, in words, or an empty list. Imports its model."""
    return names.missing(MODEL)
