"""The stock Llama, bf16: names, shapes and collectives of the real one, no component data parallelism, no
DCP."""

from __future__ import annotations

import torch
from torch import nn
from vllm.distributed.parallel_state import get_dcp_group, get_tp_group

import vllm_neuron.functional as NF
from vllm_neuron.model.kv_cache import KVSpec, LayerSpec
from vllm_neuron.nn import ColumnParallelLinear, VocabDimShardedEmbedding
from vllm_neuron.parallel import neuron_parallel_state as groups
from vllm_neuron.utils.checkpoints import SafetensorsCheckpoint
from vllm_neuron.utils.dtype_utils import (
    FP8_CLAMP_MAX,
    QUANTIZED_KV_CACHE_DTYPES,
    is_fp8,
    validate_fp8_segmented_supported,
)
from vllm_neuron.utils.weight_loader import (
    fused_qkv_weight_loader,
    set_weight_loader,
    sharding_weight_loader,
    with_rank_override,
)
from vllm_neuron.vllm.spec_decode.decorator import async_speculative_decoding

from .config import LlamaConfig


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * x).to(hidden_states.dtype)


class LlamaRotaryEmbedding(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.theta, self.head_dim = config.rope_parameters["rope_theta"], config.head_dim

    def forward(self, position_ids, device, dtype):
        """``[T]`` -> cos, sin ``[T, Dh]``."""
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float, device=device) / self.head_dim
        angle = position_ids[:, None].float() * (1.0 / self.theta**half)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.dtype = config.torch_dtype
        self.hidden_size = config.hidden_size
        self.scaling = config.head_dim**-0.5
        dcp_group = get_dcp_group()
        self.dcp_size = dcp_group.world_size
        self.dcp_group = dcp_group if self.dcp_size > 1 else None
        self.tp_group = get_tp_group()
        self.world_size = self.tp_group.world_size
        self.rank = self.tp_group.rank_in_group
        self.attention_dp_size = config.neuron_config.attention_dp_size if config.neuron_config else 1
        self.attn_tp_group = groups.get_neuron_attention_tp_group()
        self.num_attention_heads_per_rank = config.num_attention_heads // self.world_size
        self.num_key_value_heads_per_rank = max(1, config.num_key_value_heads // self.world_size)
        self.num_kv_replicas = max(1, self.world_size // config.num_key_value_heads)
        self.num_kv_heads_for_weight = self.num_key_value_heads_per_rank
        self.num_key_value_groups = self.num_attention_heads_per_rank // self.num_kv_heads_for_weight
        self.q_size = self.num_attention_heads_per_rank * self.head_dim
        self.kv_size = self.num_kv_heads_for_weight * self.head_dim
        self.qkv_split_indices = [self.q_size, self.q_size + self.kv_size]
        self.qkv_proj_weight = nn.Parameter(
            torch.empty(self.hidden_size, self.q_size + 2 * self.kv_size, dtype=self.dtype)
        )
        self.o_proj_weight = nn.Parameter(torch.empty(self.q_size, self.hidden_size, dtype=self.dtype))
        self.k_cache = None
        self.v_cache = None
        self.fp8_packed = False
        self.register_buffer("k_scale", None, persistent=False)
        self.register_buffer("v_scale", None, persistent=False)
        self.k_scale_float = 1.0
        self.v_scale_float = 1.0
        set_weight_loader(
            self.qkv_proj_weight,
            fused_qkv_weight_loader(
                self.q_size, self.kv_size, 1, self.world_size, True, self.num_kv_replicas
            ),
        )
        set_weight_loader(self.o_proj_weight, sharding_weight_loader(0, self.q_size, self.world_size, True))

    def forward(self, hidden_states, positions, position_embeddings, attn_metadata=None):
        md = attn_metadata[f"layers.{self.layer_idx}.self_attn"]
        if md["max_query_len"] <= md["decode_token_threshold"]:
            return self.forward_decode(hidden_states, positions, position_embeddings, attn_metadata)
        if self.world_size > 1:
            hidden_states = self.tp_group.all_gather(hidden_states, dim=0)
        return self.forward_prefill(hidden_states, positions, position_embeddings, attn_metadata)

    def _write(self, k, v, slots, block_size):
        """Scatter ``[kv heads, T, Dh]`` into the caches."""
        for cache, new, scale in ((self.k_cache, k, self.k_scale), (self.v_cache, v, self.v_scale)):
            if is_fp8(cache.dtype):
                new = (new * scale).clamp(-FP8_CLAMP_MAX, FP8_CLAMP_MAX).to(cache.dtype).view(torch.uint8)
                cache = cache.view(torch.uint8)
            cache[slots // block_size, :, slots % block_size] = new.transpose(0, 1).to(cache.dtype)

    def forward_prefill(self, hidden_states, positions, position_embeddings, attn_metadata=None):
        md = attn_metadata[f"layers.{self.layer_idx}.self_attn"]
        assert self.dcp_size == 1, "DCP is not in this stand-in"
        tokens = hidden_states.shape[0]
        segment, block_size = md.get("kv_segment_size"), md["block_size"]
        slots = md["slot_mapping"]
        common = {
            "hidden": hidden_states.unsqueeze(0),
            "qkv_weights": self.qkv_proj_weight,
            "bias": None,
            "d_head": self.head_dim,
            "cos_cache": position_embeddings[0].unsqueeze(0),
            "sin_cache": position_embeddings[1].unsqueeze(0),
            "num_q_heads": self.num_attention_heads_per_rank,
            "num_kv_heads": self.num_kv_heads_for_weight,
        }
        if segment:
            validate_fp8_segmented_supported(is_fp8(self.k_cache.dtype), self.fp8_packed)
            inside = (slots >= 0) & (slots < self.k_cache.shape[0] * block_size)
            slots = torch.where(inside, slots, torch.zeros_like(slots)).to(torch.int32)
            q, _, _ = NF.qkv_proj(
                **common,
                k_cache=self.k_cache,
                v_cache=self.v_cache,
                use_block_kv=True,
                block_size=block_size,
                slot_mapping=slots.unsqueeze(0),
            )
            attention = NF.segmented_attention(
                q.view(tokens, -1, self.head_dim).transpose(0, 1),
                k_cache=self.k_cache,
                v_cache=self.v_cache,
                block_tables=md["block_table_tensor"],
                prior_tokens=md.get("cached_seq_len"),
                block_size=block_size,
                kv_segment_size=segment,
                scale=self.scaling,
                tp_q=True,
                tp_out=True,
                fp8_packed=self.fp8_packed,
            )
        else:
            qkv = NF.qkv_proj(**common).squeeze(0)
            q, k, v = (
                part.view(tokens, -1, self.head_dim).transpose(0, 1)
                for part in torch.tensor_split(qkv, self.qkv_split_indices, dim=-1)
            )
            self._write(k, v, slots, block_size)
            k, v = (t.repeat_interleave(self.num_key_value_groups, dim=0) for t in (k, v))
            attention = NF.flash_attention(
                q.transpose(1, 2), k.transpose(1, 2), v, scale=self.scaling, tp_q=False, tp_out=True
            )
        out = NF.o_proj(attention.unsqueeze(0), self.o_proj_weight, None).squeeze(0)
        if self.world_size > 1:
            out = self.tp_group.reduce_scatter(out, dim=0)
        return out.contiguous()

    def forward_decode(self, hidden_states, positions, position_embeddings, attn_metadata):
        md = attn_metadata[f"layers.{self.layer_idx}.self_attn"]
        table = md["block_table_tensor"]
        batch = table.shape[0]
        rows = hidden_states.shape[0] // batch
        half = self.head_dim // 2
        cos, sin = (
            t[:, :half].view(batch, rows, half).permute(2, 0, 1).contiguous() for t in position_embeddings
        )
        mask = attn_metadata.get("_cached_decode_mask")
        if mask is None:
            mask = NF.gen_attention_decode_mask(
                pos_ids=positions.view(1, batch * rows).to(torch.float32),
                bs=batch,
                q_head=self.num_attention_heads_per_rank,
                s_active=rows,
                s_prior=md["max_blocks_per_seq"] * md["block_size"],
                block_len=md["block_size"],
            )
            attn_metadata["_cached_decode_mask"] = mask
        quantized = is_fp8(self.k_cache.dtype)
        out = NF.attention_decode(
            X=hidden_states.view(batch, rows, -1),
            X_hidden_dim_actual=self.hidden_size,
            rmsnorm_X_enabled=False,
            W_qkv=self.qkv_proj_weight,
            cos=cos,
            sin=sin,
            active_blocks_table=table,
            K_cache=self.k_cache,
            V_cache=self.v_cache,
            attention_mask=mask,
            softmax_scale=self.scaling / self.k_scale_float,
            update_cache=True,
            kv_cache_update_idx=md["slot_mapping"].view(batch, rows).to(torch.uint32),
            fp8_packed=self.fp8_packed,
            W_out=self.o_proj_weight / self.v_scale_float,
            k_scale=self.k_scale if quantized else None,
            v_scale=self.v_scale if quantized else None,
        )
        self.attn_tp_group.all_reduce(out)
        return out


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.tp_group = get_tp_group()
        self.world_size = self.tp_group.world_size
        self.rank = self.tp_group.rank_in_group
        self.mlp_dp_size = config.neuron_config.mlp_dp_size if config.neuron_config else 1
        self.mlp_tp_group = groups.get_neuron_mlp_tp_group()
        self.mlp_tp_size = self.mlp_tp_group.world_size
        self.mlp_tp_rank = self.mlp_tp_group.rank_in_group
        self.hidden_size = config.hidden_size
        self.intermediate_size_per_rank = config.intermediate_size // self.mlp_tp_size
        size = (config.hidden_size, self.intermediate_size_per_rank)
        for name, shape, dim in (("gate", size, 1), ("up", size, 1), ("down", size[::-1], 0)):
            parameter = nn.Parameter(torch.empty(*shape, dtype=config.torch_dtype))
            loader = sharding_weight_loader(dim, self.intermediate_size_per_rank, self.mlp_tp_size, True)
            set_weight_loader(parameter, with_rank_override(loader, rank=self.mlp_tp_rank))
            self.register_parameter(f"{name}_proj_weight", parameter)

    def forward(self, hidden_states, is_prefill):
        if is_prefill and self.world_size > 1:
            hidden_states = self.tp_group.all_gather(hidden_states, dim=0)
        out = NF.mlp(hidden_states, self.gate_proj_weight, self.up_proj_weight, self.down_proj_weight)
        if not is_prefill:
            self.mlp_tp_group.all_reduce(out)
        elif self.world_size > 1:
            out = self.tp_group.reduce_scatter(out, dim=0)
        return out


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        from .quantization import resolve_attention_mlp_classes

        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, config.torch_dtype)
        self.post_attention_layernorm = LlamaRMSNorm(
            config.hidden_size, config.rms_norm_eps, config.torch_dtype
        )
        attention, mlp = resolve_attention_mlp_classes(config.quant_spec, layer_idx)
        self.self_attn = attention(config, layer_idx=layer_idx)
        self.mlp = mlp(config)
        self.layer_idx = layer_idx

    def _is_decode(self, attn_metadata) -> bool:
        md = attn_metadata[f"layers.{self.layer_idx}.self_attn"]
        return md["max_query_len"] <= md["decode_token_threshold"]

    def forward(self, hidden_states, positions, position_embeddings, attn_metadata=None):
        decode = self._is_decode(attn_metadata)
        hidden_states = hidden_states + self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            positions=positions,
            position_embeddings=position_embeddings,
            attn_metadata=attn_metadata,
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), is_prefill=not decode)


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tp_group = get_tp_group()
        self.world_size = self.tp_group.world_size
        self.embed_tokens = VocabDimShardedEmbedding(
            config.vocab_size, config.hidden_size, config.torch_dtype
        )
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, config.torch_dtype)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        set_weight_loader(
            self.embed_tokens.weight,
            sharding_weight_loader(0, self.embed_tokens.vocab_size_per_rank, self.embed_tokens.tp_size),
        )
        self.aux_hidden_state_layers: list[int] = []

    def forward(
        self, input_ids, positions, attn_metadata=None, rank=None, inputs_embeds=None, is_token_ids=None
    ):
        md = attn_metadata["layers.0.self_attn"]
        prefill = md["max_query_len"] > md["decode_token_threshold"]
        hidden = self.embed_tokens(input_ids, scatter_tokens=prefill, rank=rank)
        hidden = NF.merge_prompt_embeds(hidden, inputs_embeds, is_token_ids)
        embeddings = self.rotary_emb(positions, device=hidden.device, dtype=hidden.dtype)
        aux = []
        for index, layer in enumerate(self.layers):
            if index in self.aux_hidden_state_layers:
                aux.append(hidden)
            hidden = layer(
                hidden, positions=positions, position_embeddings=embeddings, attn_metadata=attn_metadata
            )
        hidden = self.norm(hidden)
        if prefill and self.world_size > 1:
            hidden = self.tp_group.all_gather(hidden, dim=0)
            aux = [self.tp_group.all_gather(states, dim=0) for states in aux]
        return hidden, aux


@async_speculative_decoding
class LlamaForCausalLM(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.tp_group = get_tp_group()
        self.world_size = self.tp_group.world_size
        self.rank = self.tp_group.rank_in_group
        self.lm_head = ColumnParallelLinear(
            config.hidden_size, config.vocab_size, config.torch_dtype, gather_output=True
        )
        set_weight_loader(
            self.lm_head.weight,
            sharding_weight_loader(0, self.lm_head.out_features_per_rank, self.lm_head.tp_size),
        )

    @classmethod
    def from_configs(cls, hf_config, neuron_config):
        return cls(LlamaConfig.from_configs(hf_config, neuron_config))

    @torch.no_grad()
    def forward(
        self,
        input_ids,
        positions,
        inputs_embeds=None,
        is_token_ids=None,
        attn_metadata=None,
        sampling_positions=None,
        sampling_params=None,
        spec_decode_metadata=None,
        logit_mask=None,
        rank=None,
        **kwargs,
    ):
        positions = positions.to(torch.int32)
        md = attn_metadata["layers.0.self_attn"]
        count = input_ids.shape[0]
        if md["max_query_len"] > md["decode_token_threshold"] and (
            count <= self.world_size or count % self.world_size
        ):
            raise ValueError(f"Prompt Length ({count}) must be > world_size ({self.world_size}) for SP.")
        hidden, aux = self.model(
            input_ids,
            positions,
            attn_metadata=attn_metadata,
            rank=rank,
            inputs_embeds=inputs_embeds,
            is_token_ids=is_token_ids,
        )
        logits = self.lm_head(torch.index_select(hidden, 0, sampling_positions))
        return (logits, torch.cat(aux, dim=-1)) if aux else logits

    def set_aux_hidden_state_layers(self, layers) -> None:
        self.model.aux_hidden_state_layers = list(layers)

    def get_kv_spec(self) -> KVSpec:
        return KVSpec(
            [
                LayerSpec(
                    f"layers.{i}.self_attn",
                    layer.self_attn.num_key_value_heads_per_rank,
                    layer.self_attn.head_dim,
                    layer.self_attn.dtype,
                )
                for i, layer in enumerate(self.model.layers)
            ]
        )

    def bind_kv_cache(self, kv_caches) -> None:
        for i, layer in enumerate(self.model.layers):
            layer.self_attn.k_cache, layer.self_attn.v_cache = kv_caches[f"layers.{i}.self_attn"]
            layer.self_attn.fp8_packed = layer.self_attn.k_cache.dim() == layer.self_attn.v_cache.dim() + 1

    def load_weights(self, checkpoint_path, device, cache_dir) -> None:
        mappings: dict[str, str | list[str]] = {}
        for index in range(len(self.model.layers)):
            prefix = f"model.layers.{index}"
            mappings[f"{prefix}.self_attn.qkv_proj_weight"] = [
                f"{prefix}.self_attn.{part}_proj.weight" for part in "qkv"
            ]
            mappings[f"{prefix}.self_attn.o_proj_weight"] = f"{prefix}.self_attn.o_proj.weight"
            for part in ("gate", "up", "down"):
                mappings[f"{prefix}.mlp.{part}_proj_weight"] = f"{prefix}.mlp.{part}_proj.weight"
        if self.config.tie_word_embeddings:
            mappings["lm_head.weight"] = "model.embed_tokens.weight"
        checkpoint = SafetensorsCheckpoint(checkpoint_path, cache_dir)
        loaded = checkpoint.load_sharded_pipelined(self.rank, self.world_size, self, mappings, device)
        self._load_kv_cache_scales(checkpoint, device)
        self.load_state_dict(loaded.state_dict, strict=False, assign=True)

    def load_weights_lite(self, checkpoint_path, device, cache_dir) -> None:
        checkpoint = SafetensorsCheckpoint(checkpoint_path, cache_dir)
        checkpoint._ensure_indexed()
        self._load_kv_cache_scales(checkpoint, device)

    def _load_kv_cache_scales(self, checkpoint, device) -> None:
        from vllm.config import get_current_vllm_config

        if get_current_vllm_config().cache_config.cache_dtype not in QUANTIZED_KV_CACHE_DTYPES:
            return
        for index, layer in enumerate(self.model.layers):
            for name in ("k_scale", "v_scale"):
                key = f"model.layers.{index}.self_attn.{name}"
                scale = torch.ones(1, dtype=torch.bfloat16)
                if key in checkpoint.get_tensor_names():
                    scale = 1.0 / checkpoint._get_slice(key)[:].to(torch.bfloat16)
                setattr(layer.self_attn, name, scale.reshape(1, 1).to(device))
                setattr(layer.self_attn, f"{name}_float", scale.item())
