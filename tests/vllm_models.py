"""Tiny random checkpoints, and vLLM's model classes loaded from them without an engine."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
    model_parallel_is_initialized,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

from vllm_neuron_rmsq import checkpoint
from vllm_neuron_rmsq.integrations.vllm.report import FusionReport

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRE_NORMS = {"input_layernorm": "qkv_proj", "post_attention_layernorm": "gate_up_proj"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Architecture(NamedTuple):
    """One of vLLM's models, as a tiny checkpoint.

    Attributes:
        model_type: Hugging Face's name of it.
        norms: RMSNorm layers in all.
        pairs: the fused norms of a layer, and the linear that each feeds.
        activations: SiluAndMul layers, all of them fused.
        changes: of the configuration.
    """

    model_type: str
    norms: int
    pairs: dict[str, str]
    activations: int
    changes: dict[str, Any] = {}  # noqa: RUF012  # never changed


ARCHITECTURES = {
    "llama": Architecture("llama", 5, PRE_NORMS, 2),
    "llama3": Architecture(
        "llama", 5, PRE_NORMS, 2, {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}
    ),
    "mistral": Architecture("mistral", 5, PRE_NORMS, 2),
    "qwen2": Architecture("qwen2", 5, PRE_NORMS, 2),
    "qwen3": Architecture("qwen3", 9, PRE_NORMS, 2),
    "phi3": Architecture("phi3", 5, PRE_NORMS, 2),
    "granite": Architecture("granite", 5, PRE_NORMS, 2),
    "ernie4_5": Architecture("ernie4_5", 5, PRE_NORMS, 2),
    # Norms of inputs and of outputs beside each other.
    "glm4": Architecture("glm4", 9, PRE_NORMS, 2),
    # Through the Transformers backend, where all layers share one SiluAndMul.
    "smollm3": Architecture("smollm3", 5, PRE_NORMS, 2),
    "seed_oss": Architecture("seed_oss", 5, PRE_NORMS, 2),
    # Other activation functions.
    "arcee": Architecture(
        "arcee", 5, {"input_layernorm": "qkv_proj", "post_attention_layernorm": "up_proj"}, 0
    ),
    "apertus": Architecture(
        "apertus", 9, {"attention_layernorm": "qkv_proj", "feedforward_layernorm": "up_proj"}, 0
    ),
    # Norms that multiply by 1 + weight, and norms of outputs beside them.
    "gemma2": Architecture(
        "gemma2", 9, {"input_layernorm": "qkv_proj", "pre_feedforward_layernorm": "gate_up_proj"}, 0
    ),
    "gemma3": Architecture(
        "gemma3_text", 13, {"input_layernorm": "qkv_proj", "pre_feedforward_layernorm": "gate_up_proj"}, 0
    ),
    # Post-norm models: the same names, norms of outputs.
    "olmo2": Architecture("olmo2", 9, {}, 2),
    "exaone4": Architecture("exaone4", 9, {}, 2),
    # LayerNorm; and attention and MLP beside each other, behind one norm.
    "starcoder2": Architecture("starcoder2", 0, {}, 0),
    "stablelm": Architecture("stablelm", 0, {}, 2),
    "cohere": Architecture("cohere", 0, {}, 2),
    "phi": Architecture("phi", 0, {}, 0),
}
TOKENS = torch.tensor([3, 5, 8, 13, 21, 34, 55], dtype=torch.int32)


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """Return a config of ``model_type`` two layers deep and 128 wide."""
    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


def write_checkpoint(
    config: PreTrainedConfig, folder: Path, *, fp8: bool = True, target: str = "trn2"
) -> Path:
    """Write a checkpoint of random weights to ``folder``; with ``fp8`` in ``folder/fp8``, converted.

    Norm weights are not all ones, so that a norm left out or applied twice changes the logits.
    """
    shutil.copytree(_bf16(config.to_json_string(use_diff=False), config), folder)
    if not fp8:
        return folder
    checkpoint.convert(folder, folder / "fp8", target)
    return folder / "fp8"


_MADE: dict[str, Path] = {}


def _bf16(key: str, config: PreTrainedConfig) -> Path:
    """Make the checkpoint in bf16, once: some vLLMs change Hugging Face's classes when they load one."""
    if key in _MADE:
        return _MADE[key]
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    content = config.to_diff_dict() | {
        "architectures": [type(model).__name__],
        "model_type": config.model_type,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(content, default=str))
    _MADE[key] = folder
    return folder


class Loaded:
    """A model as vLLM's loader returns it; with ``draft``, the one that drafts for it instead.

    Attributes:
        model: the module.
        config: the configuration it was built with.
        report: what the plugin did to it; ``None`` when it is off.
    """

    def __init__(self, checkpoint: Path, *, draft: bool = False, **engine_args) -> None:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        _set_torch_accelerator_to_noop()  # what vLLM's CPU worker does before it loads a model
        self.config: VllmConfig = EngineArgs(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            enforce_eager=True,
            **{"max_model_len": 64} | engine_args,
        ).create_engine_config()
        with set_current_vllm_config(self.config):
            # Anew for every model: which groups exist depends on it (experts have one of their own).
            if model_parallel_is_initialized():
                destroy_model_parallel()
            init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            model_config = self.config.speculative_config.draft_model_config if draft else None
            dtype = torch.get_default_dtype()
            try:
                self.model = get_model(vllm_config=self.config, model_config=model_config)
            finally:
                torch.set_default_dtype(dtype)  # vLLM 0.24 leaves the model's when it fails
        self.report: FusionReport | None = getattr(self.model, "rmsq_report", None)

    def logits(self, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
        """Return ``[T, vocabulary]`` logits of one causal prefill, without KV cache."""
        with in_vllm(self, len(tokens)):
            hidden = self.model(
                input_ids=tokens, positions=torch.arange(len(tokens)), intermediate_tensors=None
            )
            return self.model.compute_logits(hidden)


@contextlib.contextmanager
def in_vllm(loaded: Loaded, count: int):
    """Run parts of ``loaded.model`` on ``count`` tokens, attention without KV cache."""
    # Before 0.30 the Transformers backend keeps its attention beside the modules.
    beside = getattr(loaded.model, "attention_instances", {}).values()
    for module in (*loaded.model.modules(), *beside):
        if isinstance(module, Attention):
            module.forward = functools.partial(_causal_attention, module)
    with (
        torch.no_grad(),
        set_current_vllm_config(loaded.config),
        set_forward_context(None, loaded.config, num_tokens=count),
    ):
        yield


def _causal_attention(layer: Attention, query, key, value):
    """Stand in for vLLM's attention, which needs an engine's KV cache: ``[T, heads * head_dim]`` each."""
    q, k, v = (x.reshape(len(query), -1, layer.head_size).transpose(0, 1) for x in (query, key, value))
    cap = layer.impl.logits_soft_cap
    if cap:  # Gemma 2
        k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
        scores = cap * torch.tanh(q.float() @ k.float().mT * (layer.impl.scale / cap))
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        out = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=layer.impl.scale, enable_gqa=True
        )
    return out.transpose(0, 1).reshape(len(query), -1)
