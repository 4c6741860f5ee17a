"""vLLM Neuron's Llama on row FP8.

Dimensions:
    T: rows (tokens)   H: hidden size   I: intermediate size of this rank   Dh: head size
    Nh: query heads of this rank   q, kv: Nh * Dh, and the same of the KV heads   B, S: sequences, new tokens
    of each

The stock model stays what it is (embedding, final norm, output layer, sampling, KV cache, Eagle3); its
decoder layers are replaced. In ours the norm before the MLP adds the residual, normalizes and quantizes in
one kernel, and linears multiply packed rows. In prefill each rank has T / tp tokens, and what the ranks
gather are packed rows, H + 4 bytes a token instead of 2 H.

How much of attention is ours is the setting ``attention``:

============  =====================  ==================  ==========  =========================
stage         QKV in prefill         QKV in decode       o_proj      bytes a layer's weight
============  =====================  ==================  ==========  =========================
bf16          stock, bf16            stock, bf16         stock       1.19 (of Llama 3.1 8B)
fp8-prefill   row FP8                bf16, megakernel    row FP8     1.23
fp8           row FP8                row FP8             row FP8     1.00
============  =====================  ==================  ==========  =========================

bf16 weights are the checkpoint's, dequantized while loading. In decode AWS's attention megakernel projects
QKV itself and knows no row FP8: where QKV is ours it gets the projected rows and an identity matrix for a
weight.

This module imports vLLM Neuron's, so it is imported only where those are: when they register their Llama.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm_neuron.functional as NF
from torch import Tensor, nn
from vllm_neuron.model.llama3 import model as stock
from vllm_neuron.utils.checkpoints import SafetensorsCheckpoint
from vllm_neuron.utils.dtype_utils import FP8_CLAMP_MAX, validate_fp8_segmented_supported

from vllm_neuron_rmsq.distributed import gather_packed
from vllm_neuron_rmsq.integrations.vllm_neuron import checkpoint
from vllm_neuron_rmsq.integrations.vllm_neuron.functional import Kernels
from vllm_neuron_rmsq.integrations.vllm_neuron.report import Report
from vllm_neuron_rmsq.integrations.vllm_neuron.weights import (
    WHOLE,
    Part,
    RowFp8Linear,
    bias,
    dequantize_into,
    mappings,
)
from vllm_neuron_rmsq.target import Target

WIRE = {"uint8": torch.uint8, "float8": torch.float8_e4m3fn, "int32": torch.int32}
"""As what packed rows travel, by the setting ``gather``; with ``bf16`` it is not packed rows that do."""


@dataclass(frozen=True)
class Plan:
    """How a model is built: what the settings say, once it is known that they can be had.

    Attributes:
        kernels: who computes.
        target: range of codes.
        attention: stage.
        gather: what prefill's all-gather carries.
        fuse: norms and quantization in one kernel.
        attention_bias: q, k, v and o_proj have a bias.
        mlp_bias: gate, up and down_proj have one.
    """

    kernels: Kernels
    target: Target
    attention: str
    gather: str
    fuse: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def stock_attention(self) -> bool:
        """Whether the stock attention serves; it knows no bias."""
        return self.attention == "bf16" and not self.attention_bias

    def quantize(
        self, hidden: Tensor, norm: Any, residual: Tensor | None, group: Any, prefill: bool
    ) -> tuple[Tensor, Tensor]:
        """Add, normalize, quantize and, in prefill, gather.

        Args:
            hidden: ``[T, H]``, in prefill this rank's tokens.
            norm: a stock RMSNorm.
            residual: like hidden, or ``None``.

        Returns:
            packed rows ``[T, H + 4]`` of all tokens, and ``hidden + residual`` of this rank's.
        """
        scattered = prefill and group.world_size > 1
        if scattered and self.gather == "bf16":
            total = hidden if residual is None else residual + hidden
            return self._norm(group.all_gather(total, dim=0), norm, None)[0], total
        packed, total = self._norm(hidden, norm, residual)
        if not scattered:
            return packed, total
        return gather_packed(packed, group, dim=0, wire=WIRE[self.gather]), total

    def _norm(self, hidden: Tensor, norm: Any, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fuse:
            return self.kernels.rms_norm_quant(hidden, norm.weight, norm.variance_epsilon, residual)
        total = hidden if residual is None else residual + hidden
        return self.kernels.rms_norm_quant(norm(total), None, norm.variance_epsilon, None)[0], total

    def quantize_only(self, hidden: Tensor) -> Tensor:
        """``[T, H]`` to packed rows, without a norm."""
        return self.kernels.rms_norm_quant(hidden, None, 1e-6, None)[0]


class MLP(nn.Module):
    """gate and up in one linear, SiLU x up with quantization, down.

    Args:
        like: the stock MLP in whose place this one stands; its groups and sizes are taken over.
        name: of the module in the checkpoint.
    """

    def __init__(self, plan: Plan, like: Any, name: str) -> None:
        super().__init__()
        self.plan = plan
        self.tp_group, self.world_size, self.mlp_tp_group = like.tp_group, like.world_size, like.mlp_tp_group
        hidden, own = like.hidden_size, like.intermediate_size_per_rank
        mine = slice(like.mlp_tp_rank * own, (like.mlp_tp_rank + 1) * own)
        total = own * like.mlp_tp_size
        gate_up = [Part(f"{name}.{part}_proj", (total, hidden), mine, WHOLE) for part in ("gate", "up")]
        down = [Part(f"{name}.down_proj", (hidden, total), WHOLE, mine)]
        self.gate_up_proj = RowFp8Linear(gate_up, plan.target, plan.kernels)
        self.down_proj = RowFp8Linear(down, plan.target, plan.kernels)
        dtype = like.down_proj_weight.dtype
        self.gate_up_bias = bias(gate_up, dtype, once=False) if plan.mlp_bias else None
        self.down_bias = bias(down, dtype, once=True) if plan.mlp_bias else None

    def forward(self, packed: Tensor, rows: int, is_prefill: bool) -> Tensor:
        """``rows`` tokens as packed rows, of all ranks, to ``[T, H]``, in prefill this rank's."""
        packed = self.plan.kernels.silu_mul_quant(self.gate_up_proj(packed, self.gate_up_bias))
        out = _first(self.down_proj(packed, self.down_bias), rows)
        if not is_prefill:
            return self.mlp_tp_group.all_reduce(out)
        return self.tp_group.reduce_scatter(out, dim=0) if self.world_size > 1 else out


class Attention(stock.LlamaAttention):
    """Attention whose projections are ours, as far as the stage says; and the bf16 ones of a model with
    biases."""

    def __init__(self, plan: Plan, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.plan = plan
        self.fp8 = plan.attention != "bf16"
        self.fp8_decode = plan.attention == "fp8"
        qkv, o = projections(self, config)
        if self.fp8:
            self.qkv_proj = RowFp8Linear(qkv, plan.target, plan.kernels)
            self.o_proj = RowFp8Linear(o, plan.target, plan.kernels)
            del self.o_proj_weight
        else:
            dequantize_into(self.o_proj_weight, o, plan.target)
        if self.fp8_decode:
            del self.qkv_proj_weight
            self.register_buffer("identity", None, persistent=False)
        else:
            dequantize_into(self.qkv_proj_weight, qkv, plan.target)
        self.qkv_bias = bias(qkv, self.dtype, once=False) if plan.attention_bias else None
        self.o_bias = bias(o, self.dtype, once=True) if plan.attention_bias else None

    def forward(self, hidden_states, positions, position_embeddings, attn_metadata=None, norm=None):
        """``[T, H]`` before the norm to ``[T, H]``, in prefill this rank's tokens."""
        md = attn_metadata[f"layers.{self.layer_idx}.self_attn"]
        if md["max_query_len"] <= md["decode_token_threshold"]:
            return self._decode(hidden_states, positions, position_embeddings, attn_metadata, md, norm)
        return self._prefill(hidden_states, position_embeddings, md, norm)

    def _prefill(self, hidden, position_embeddings, md, norm):
        qkv = self._project(hidden, position_embeddings, norm)
        rows = qkv.shape[0]
        q, k, v = (
            part.view(rows, -1, self.head_dim).transpose(0, 1)
            for part in torch.tensor_split(qkv, self.qkv_split_indices, dim=-1)
        )
        segment, block_size = md.get("kv_segment_size"), md["block_size"]
        if segment:
            validate_fp8_segmented_supported(_is_fp8(self.k_cache), False)
        self._write(k, v, md["slot_mapping"], block_size)
        if segment:
            attention = NF.segmented_attention(
                q,
                k_cache=self.k_cache,
                v_cache=self.v_cache,
                block_tables=md["block_table_tensor"],
                prior_tokens=md.get("cached_seq_len"),
                block_size=block_size,
                kv_segment_size=segment,
                scale=self.scaling,
                tp_q=True,
                tp_out=True,
                fp8_packed=False,
            )
        else:
            k, v = (t.repeat_interleave(self.num_key_value_groups, dim=0) for t in (k, v))
            attention = NF.flash_attention(
                q.transpose(1, 2), k.transpose(1, 2), v, scale=self.scaling, tp_q=False, tp_out=True
            )
        if self.fp8:
            merged = attention.permute(2, 0, 1).reshape(rows, -1)
            out = self.o_proj(self.plan.quantize_only(merged), self.o_bias)
        else:
            out = NF.o_proj(attention.unsqueeze(0), self.o_proj_weight, _row(self.o_bias)).squeeze(0)
        return self.tp_group.reduce_scatter(out, dim=0).contiguous() if self.world_size > 1 else out

    def _project(self, hidden, position_embeddings, norm):
        """This rank's tokens to everybody's ``[T, q + 2 kv]``, queries and keys turned."""
        cos, sin = position_embeddings
        if not self.fp8:
            normed = norm(hidden)
            if self.world_size > 1:
                normed = self.tp_group.all_gather(normed, dim=0)
            return NF.qkv_proj(
                hidden=normed.unsqueeze(0),
                qkv_weights=self.qkv_proj_weight,
                bias=_row(self.qkv_bias),
                d_head=self.head_dim,
                cos_cache=cos.unsqueeze(0),
                sin_cache=sin.unsqueeze(0),
                num_q_heads=self.num_attention_heads_per_rank,
                num_kv_heads=self.num_kv_heads_for_weight,
            ).squeeze(0)
        packed, _ = self.plan.quantize(hidden, norm, None, self.tp_group, prefill=True)
        qkv = self.qkv_proj(packed, self.qkv_bias)
        turned, v = qkv.split([self.q_size + self.kv_size, self.kv_size], dim=-1)
        heads = turned.view(qkv.shape[0], -1, self.head_dim)
        first, second = heads.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
        heads = heads * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)
        return torch.cat([heads.flatten(1), v], dim=-1)

    def _write(self, k, v, slots, block_size):
        """Put ``[heads, T, Dh]`` where the slots say; a slot outside the cache is nobody's, as its last one
        is."""
        last = self.k_cache.shape[0] * block_size - 1
        slots = slots.to(torch.int32)
        slots = torch.where((slots < 0) | (slots > last), torch.full_like(slots, last), slots)
        heads = torch.arange(k.shape[0], dtype=torch.int32, device=slots.device).repeat_interleave(
            slots.shape[0]
        )
        index = ((slots // block_size).repeat(k.shape[0]), heads, (slots % block_size).repeat(k.shape[0]))
        for cache, new, scale in ((self.k_cache, k, self.k_scale), (self.v_cache, v, self.v_scale)):
            rows = new.reshape(-1, self.head_dim)
            if _is_fp8(cache):
                rows = (rows * scale).clamp(-FP8_CLAMP_MAX, FP8_CLAMP_MAX)
            cache.index_put_(index, rows.to(cache.dtype))

    def _decode(self, hidden, positions, position_embeddings, attn_metadata, md, norm):
        table, block_size = md["block_table_tensor"], md["block_size"]
        batch = table.shape[0]
        rows = hidden.shape[0]
        new, half = rows // batch, self.head_dim // 2
        cos, sin = (
            t[:, :half].view(batch, new, half).permute(2, 0, 1).contiguous().to(self.dtype)
            for t in position_embeddings
        )
        mask = attn_metadata.get("_cached_decode_mask")
        if mask is None:
            mask = NF.gen_attention_decode_mask(
                pos_ids=positions.view(1, rows).to(torch.float32),
                bs=batch,
                q_head=self.num_attention_heads_per_rank,
                s_active=new,
                s_prior=md["max_blocks_per_seq"] * block_size,
                start_pos=None,
                block_len=block_size,
            )
            attn_metadata["_cached_decode_mask"] = mask
        if self.fp8_decode:
            packed, _ = self.plan.quantize(hidden, norm, None, self.tp_group, prefill=False)
            qkv = _first(self.qkv_proj(packed, self.qkv_bias), rows)
            project = {"X": qkv.view(batch, new, -1), "W_qkv": self.identity, "rmsnorm_X_enabled": False}
        else:
            project = {
                "X": hidden.view(batch, new, -1),
                "X_hidden_dim_actual": self.hidden_size,
                "rmsnorm_X_enabled": True,
                "rmsnorm_X_eps": norm.variance_epsilon,
                "rmsnorm_X_gamma": norm.weight.view(1, -1),
                "W_qkv": self.qkv_proj_weight,
                "bias_qkv": _row(self.qkv_bias),
            }
        output: dict[str, Any] = {"W_out": None, "bias_out": None}
        if not self.fp8:
            output = {"W_out": self.o_proj_weight / self.v_scale_float, "bias_out": _row(self.o_bias)}
        quantized = _is_fp8(self.k_cache)
        attention = NF.attention_decode(
            **project,
            **output,
            cos=cos,
            sin=sin,
            rope_contiguous_layout=True,
            K_cache_transposed=False,
            active_blocks_table=table,
            K_cache=self.k_cache,
            V_cache=self.v_cache,
            attention_mask=mask,
            softmax_scale=self.scaling / self.k_scale_float,
            update_cache=True,
            kv_cache_update_idx=md["slot_mapping"].view(batch, new).to(torch.uint32),
            fp8_packed=False,
            k_scale=self.k_scale if quantized else None,
            v_scale=self.v_scale if quantized else None,
        )
        if self.fp8:
            merged = attention.permute(0, 3, 1, 2).reshape(rows, -1)
            if self.v_scale_float != 1.0:
                merged = merged / self.v_scale_float
            attention = _first(self.o_proj(self.plan.quantize_only(merged), self.o_bias), rows)
        return self.attn_tp_group.all_reduce(attention)


def projections(attention: Any, config: Any) -> tuple[list[Part], list[Part]]:
    """Return this rank's parts of q, k and v_proj, and of o_proj."""
    name = f"model.layers.{attention.layer_idx}.self_attn"
    hidden, head = attention.hidden_size, attention.head_dim
    heads, kv_heads = config.num_attention_heads * head, config.num_key_value_heads * head
    q_start = attention.rank * attention.q_size
    q = slice(q_start, q_start + attention.q_size)
    # With more ranks than KV heads, neighbouring ranks have the same one.
    kv_start = attention.rank // attention.num_kv_replicas * attention.kv_size
    kv = slice(kv_start, kv_start + attention.kv_size)
    qkv = [
        Part(f"{name}.q_proj", (heads, hidden), q, WHOLE),
        Part(f"{name}.k_proj", (kv_heads, hidden), kv, WHOLE),
        Part(f"{name}.v_proj", (kv_heads, hidden), kv, WHOLE),
    ]
    return qkv, [Part(f"{name}.o_proj", (hidden, heads), WHOLE, q)]


def _first(rows: Tensor, count: int) -> Tensor:
    """Without the rows a kernel was given to have one for each core."""
    return rows if rows.shape[0] == count else rows[:count]


def _row(bias: Tensor | None) -> Tensor | None:
    """As AWS's kernels take a bias: ``[1, N]``."""
    return None if bias is None else bias.view(1, -1)


def _is_fp8(cache: Tensor) -> bool:
    return cache.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


class DecoderLayer(stock.LlamaDecoderLayer):
    """A stock layer with our MLP, and our attention where the plan has it."""

    def __init__(self, plan: Plan, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.plan = plan
        like: Any = self.mlp
        self.mlp: Any = MLP(plan, like, f"model.layers.{layer_idx}.mlp")
        attention: Any = self.self_attn
        self.self_attn: Any = attention if plan.stock_attention else Attention(plan, config, layer_idx)
        if plan.stock_attention:
            qkv, o = projections(attention, config)
            dequantize_into(attention.qkv_proj_weight, qkv, plan.target)
            dequantize_into(attention.o_proj_weight, o, plan.target)

    def forward(self, hidden_states, positions, position_embeddings, attn_metadata=None):
        """``[T, H]`` to ``[T, H]``, in prefill this rank's tokens. What lies between layers is plain: Eagle3
        reads it."""
        prefill = not self._is_decode(attn_metadata)
        where = {
            "positions": positions,
            "position_embeddings": position_embeddings,
            "attn_metadata": attn_metadata,
        }
        if self.plan.stock_attention:
            attention = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **where)
        else:
            attention = self.self_attn(hidden_states, norm=self.input_layernorm, **where)
        norm, group = self.post_attention_layernorm, self.mlp.tp_group
        packed, hidden_states = self.plan.quantize(attention, norm, hidden_states, group, prefill)
        rows = packed.shape[0] if prefill else hidden_states.shape[0]
        return hidden_states + self.mlp(packed, rows, prefill)


class RowFp8LlamaForCausalLM(stock.LlamaForCausalLM):
    """The stock model with :class:`DecoderLayer` s.

    Attributes:
        rmsq_report: what was done, once the weights are loaded.
    """

    rmsq_report: Report

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config)
        self.plan = plan
        # The model is built on the meta device: the stock layers cost nothing.
        self.model.layers = nn.ModuleList(
            DecoderLayer(plan, config, index) for index in range(config.num_hidden_layers)
        )

    @classmethod
    def from_configs(cls, hf_config: Any, neuron_config: Any) -> RowFp8LlamaForCausalLM:
        """Build the model.

        Raises:
            ValueError: the checkpoint is not one for it, or this configuration cannot serve it; says why.
        """
        from vllm_neuron.model.llama3.config import LlamaConfig

        from vllm_neuron_rmsq.integrations.vllm_neuron.plan import make_plan

        plan = make_plan(hf_config, neuron_config)
        return cls(LlamaConfig.from_configs(_unquantized(hf_config), neuron_config), plan)

    def bind_kv_cache(self, kv_caches) -> None:
        super().bind_kv_cache(kv_caches)
        if not self.plan.stock_attention and any(layer.self_attn.fp8_packed for layer in self.model.layers):
            raise ValueError(
                f"vllm-neuron-rmsq: attention={self.plan.attention} cannot read a packed FP8 KV cache; unset "
                "fp8_packed_kv, or set VLLM_RMSQ_ATTENTION=bf16"
            )

    def load_weights(self, checkpoint_path, device, cache_dir) -> None:
        """Fill every parameter.

        Raises:
            RuntimeError: the checkpoint lacks a tensor; names it.
            ValueError: a tensor is not what it should be; names it.
        """
        keys = mappings(self)
        if self.config.tie_word_embeddings:
            keys["lm_head.weight"] = "model.embed_tokens.weight"
        try:
            files = SafetensorsCheckpoint(checkpoint_path, cache_dir)
            loaded = files.load_sharded_pipelined(self.rank, self.world_size, self, keys, device)
        except Exception as error:
            damage = checkpoint.damage(Path(checkpoint_path)) if Path(checkpoint_path).is_dir() else None
            if damage:
                raise ValueError(damage) from error
            raise
        biases = [key for key in loaded.unexpected_keys if key.endswith(".bias")]
        if biases:
            raise ValueError(
                f"{biases[0]}: a bias that config.json does not speak of (attention_bias, mlp_bias); "
                "without it the model would compute something else"
            )
        self._load_kv_cache_scales(files, device)
        self.load_state_dict(loaded.state_dict, strict=False, assign=True)
        empty = [name for name, parameter in self.named_parameters() if parameter.is_meta]
        if empty:
            raise RuntimeError(f"{empty[0]}: was not loaded, and {len(empty) - 1} more")
        self._loaded(device, read=True)

    def load_weights_lite(self, checkpoint_path, device, cache_dir) -> None:
        """What compiling on a host without devices needs: no weights."""
        super().load_weights_lite(checkpoint_path, device, cache_dir)
        self._loaded(device, read=False)

    def _loaded(self, device: torch.device, read: bool) -> None:
        """Complete the model and say what it is; ``read``: its weights were."""
        self._set_identity(device)
        self.rmsq_report = Report.of(self, read)
        self.rmsq_report.log(self.rank)

    def _set_identity(self, device: torch.device) -> None:
        """One matrix for all layers' megakernels, which would project QKV."""
        identity = None
        for layer in self.model.layers:
            attention = layer.self_attn
            if hasattr(attention, "identity"):
                if identity is None:
                    width = attention.q_size + 2 * attention.kv_size
                    identity = torch.eye(width, dtype=attention.dtype, device=device)
                attention.identity = identity


def _unquantized(hf_config: Any) -> Any:
    """The configuration without its quantization: what is quantized here is not the stock classes'
    business."""
    if isinstance(hf_config, Mapping):
        return {key: value for key, value in hf_config.items() if key != "quantization_config"}
    plain = copy.copy(hf_config)
    del plain.quantization_config
    return plain


def factory(stock_class: Any) -> type:
    """Return the class to register in place of ``stock_class``: ours for the checkpoints it takes.

    A stock Llama that was told of no FP8 weights, or only of compressed-tensors (which it takes for a
    quantized KV cache), reads FP8 codes as if they were bf16 numbers. So its checkpoint is looked through for
    codes.
    """

    class Guarded(stock_class):
        def load_weights(self, checkpoint_path, device, cache_dir) -> None:
            super().load_weights(checkpoint_path, device, cache_dir)
            files = SafetensorsCheckpoint(checkpoint_path, cache_dir)
            for name in sorted(files.get_tensor_names()):
                if name.endswith(".weight") and files._get_slice(name).get_dtype().startswith("F8"):
                    raise ValueError(
                        f"{name}: holds FP8 codes, in a checkpoint that vllm-neuron-rmsq does not take "
                        f"({self.reason}); vLLM Neuron has read them as bf16 numbers, without their scales. "
                        "Serve the checkpoint with the quantization_config it came with"
                    )

    # It is the stock one to everybody who asks for its name.
    Guarded.__name__, Guarded.__qualname__ = stock_class.__name__, stock_class.__qualname__

    def from_configs(cls, hf_config, neuron_config):
        from vllm_neuron_rmsq.integrations.vllm_neuron.plan import in_force

        reason, choice = checkpoint.supported(hf_config), in_force()
        if choice.backend == "off":
            reason = "VLLM_RMSQ_BACKEND=off"
        elif choice.strict and reason:
            raise ValueError(f"vllm-neuron-rmsq: VLLM_RMSQ_STRICT=1 and no norm would be fused: {reason}")
        if reason is None:
            return RowFp8LlamaForCausalLM.from_configs(hf_config, neuron_config)
        if checkpoint.read_as_bf16(hf_config):
            model = Guarded.from_configs(hf_config, neuron_config)
            model.reason = reason
            return model
        return stock_class.from_configs(hf_config, neuron_config)

    return type(
        stock_class.__name__,
        (stock_class,),
        {"from_configs": classmethod(from_configs), "__module__": __name__, "__doc__": factory.__doc__},
    )
