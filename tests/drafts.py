"""Tiny FP8 checkpoints of models that draft for another: EAGLE, EAGLE-3, MiMo's multi-token prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm_models import SIZES, tiny_config, write_checkpoint

from vllm_neuron_rmsq import target, weights
from vllm_neuron_rmsq.checkpoint.plan import quantization_config

H, KV, INTERMEDIATE = SIZES["hidden_size"], 64, SIZES["intermediate_size"]


def _linear(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * 0.08).bfloat16()


def _layer(qkv_columns: int = H) -> dict[str, torch.Tensor]:
    """The linears of one decoder layer, bf16."""
    return {
        "self_attn.q_proj": _linear(H, qkv_columns),
        "self_attn.k_proj": _linear(KV, qkv_columns),
        "self_attn.v_proj": _linear(KV, qkv_columns),
        "self_attn.o_proj": _linear(H, H),
        "mlp.gate_proj": _linear(INTERMEDIATE, H),
        "mlp.up_proj": _linear(INTERMEDIATE, H),
        "mlp.down_proj": _linear(H, INTERMEDIATE),
    }


def _fp8(linears: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in linears.items():
        codes, scale = weights.quantize(weight, target.TRN2)
        tensors |= {f"{prefix}{name}.weight": codes, f"{prefix}{name}.weight_scale": scale}
    return tensors


def _norms(prefix: str, *names: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}.weight": torch.empty(H).uniform_(0.5, 1.5).bfloat16() for name in names}


def _write(
    folder: Path, tensors: dict[str, torch.Tensor], architecture: str, ignore: list[str], **changes
) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = tiny_config("llama", num_hidden_layers=1, **changes).to_diff_dict() | {
        "architectures": [architecture],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "quantization_config": quantization_config(ignore),
    }
    (folder / "config.json").write_text(json.dumps(content, default=str))
    return folder


def write_eagle(folder: Path) -> Path:
    """One layer, whose first norm EAGLE leaves out, behind a linear that joins token and hidden state."""
    torch.manual_seed(1)
    tensors = {"fc.weight": _linear(H, 2 * H), "embed_tokens.weight": _linear(SIZES["vocab_size"], H)}
    tensors |= _fp8(_layer(), "layers.0.") | _norms("layers.0.", "post_attention_layernorm")
    return _write(folder, tensors, "LlamaForCausalLM", ["lm_head", "re:.*fc"])


def write_eagle3(folder: Path) -> Path:
    """One layer whose attention reads the norms of token and hidden state side by side."""
    torch.manual_seed(2)
    tensors = {"fc.weight": _linear(H, 3 * H), "lm_head.weight": _linear(SIZES["vocab_size"], H)}
    tensors["embed_tokens.weight"] = _linear(SIZES["vocab_size"], H)
    tensors |= _fp8(_layer(2 * H), "midlayer.")
    tensors |= _norms("midlayer.", "input_layernorm", "hidden_norm", "post_attention_layernorm")
    tensors |= _norms("", "norm")
    return _write(folder, tensors, "LlamaForCausalLMEagle3", ["lm_head", "re:.*fc"])


def write_mimo(folder: Path) -> Path:
    """A whole model, Qwen 2's layers and one of multi-token prediction, all linears in FP8."""
    path = write_checkpoint(tiny_config("qwen2"), folder)
    tensors = load_file(path / "model.safetensors")
    torch.manual_seed(3)
    prefix = "model.mtp_layers.0."
    tensors |= _fp8(_layer(), prefix) | {f"{prefix}input_proj.weight": _linear(H, 2 * H)}
    tensors |= _norms(prefix, "token_layernorm", "hidden_layernorm", "final_layernorm")
    tensors |= _norms(prefix, "input_layernorm", "post_attention_layernorm")
    for part, rows in (("q", H), ("k", KV), ("v", KV)):
        tensors[f"{prefix}self_attn.{part}_proj.bias"] = _linear(rows, 1)[:, 0].contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    config["quantization_config"]["ignore"].append("re:.*input_proj")
    (path / "config.json").write_text(json.dumps(config))
    return path


WRITERS = {"eagle": write_eagle, "eagle3": write_eagle3}


def speculative(method: str, folder: Path) -> tuple[Path, dict]:
    """Write a model and its draft; return the model and vLLM's ``speculative_config``."""
    if method == "mtp":
        return write_mimo(folder / "mimo"), {"method": "mtp", "num_speculative_tokens": 1}
    # EAGLE-3 reads the hidden states before three layers, which with fewer layers are not three.
    model = write_checkpoint(tiny_config("llama", num_hidden_layers=8), folder / "llama")
    draft = WRITERS[method](folder / method)
    return model, {"method": method, "model": str(draft), "num_speculative_tokens": 2}
