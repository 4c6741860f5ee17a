"""The same model as others would serve it: INT8 W8A8 for vLLM, GGUF in Q8_0 for llama.cpp.

For measuring speed. The INT8 checkpoint is a good one; the GGUF has the model's weights and shapes but no
tokenizer, since prompts are token numbers, and knows no rope scaling.
Dimensions:
    N: output features of a linear
    H: input features of a linear
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INT8_MAX = 127.0
GGUF_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""``model_type`` of a config to llama.cpp's name, where one checkpoint tensor is one of llama.cpp's."""


def int8(source: Path, fp8: Path, out: Path) -> Path:
    """Write ``out``: the linears that are FP8 in ``fp8`` as INT8, per-channel weights, dynamic activations.

    Each becomes ``weight`` ``[N, H]`` int8 and ``weight_scale`` ``[N, 1]`` fp32; all else is ``source``'s.

    Args:
        source: bf16 checkpoint directory.
        fp8: what :func:`vllm_neuron_rmsq.checkpoint.convert` made of it.
        out: directory to make.
    """
    out.mkdir()
    quantized = {name.removesuffix("_scale") for name in _names(fp8) if name.endswith(".weight_scale")}
    for file in fp8.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    tensors = {}
    for name, tensor in _tensors(source):
        if name in quantized:
            values = tensor.float()
            scale = (
                values.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
            )
            tensors[f"{name}_scale"] = scale
            tensor = (values / scale).round().to(torch.int8)
        tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    how = config["quantization_config"]
    how["format"] = "int-quantized"
    for part in ("weights", "input_activations"):
        how["config_groups"]["group_0"][part]["type"] = "int"
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def gguf_unavailable(source: Path) -> str | None:
    """Return why the model cannot be served by llama.cpp here, or ``None``."""
    import importlib.util

    for package in ("xllamacpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; pip install 'vllm-neuron-rmsq[bench]'"
    kind = json.loads((source / "config.json").read_text()).get("model_type")
    if kind not in GGUF_ARCHITECTURES:
        return f"model_type {kind} is not one of {', '.join(GGUF_ARCHITECTURES)}"
    return None


def gguf_q8(source: Path, out: Path) -> Path:
    """Write the GGUF file ``out``: every matrix of ``source`` in Q8_0, the rest fp32."""
    import gguf
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(source)
    architecture = gguf.MODEL_ARCH[GGUF_ARCHITECTURES[config.model_type]]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_vocab_size(config.vocab_size)
    # llama.cpp wants a tokenizer; these names stand for themselves.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in _tensors(source):
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ValueError(f"{source}: llama.cpp has no place for {name}")
        values = tensor.float()
        if architecture == gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbours of a head, Hugging Face its halves.
            parts = heads if name.endswith("q_proj.weight") else kv_heads
            values = values.view(parts, 2, head_dim // 2, -1).transpose(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType.F32
        data = values.contiguous().numpy()
        if values.dim() == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(place, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)
