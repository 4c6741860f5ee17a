"""Which checkpoints are served in row FP8 on vLLM Neuron, and why the others are not.

Taken: Llamas whose every decoder linear has FP8 weights (one scale a channel or a tensor) and activations
quantized as they come, a scale a token. Two spellings of that: compressed-tensors' ``FP8-dynamic``, and
ModelOpt's ``FP8_PER_CHANNEL_PER_TOKEN``. The tensors are the same in both.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARCHITECTURE = "LlamaForCausalLM"
LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def supported(hf_config: Any) -> str | None:
    """Say why a model is not served in row FP8, or return ``None`` when it is.

    Args:
        hf_config: Hugging Face's configuration of the model, an object or a mapping.
    """
    architectures = get(hf_config, "architectures") or []
    if list(architectures) != [ARCHITECTURE]:
        return f"its architecture is {', '.join(architectures) or 'unknown'}, not {ARCHITECTURE}"
    activation = get(hf_config, "hidden_act") or "silu"
    if activation != "silu":
        return f"its activation is {activation}, not silu"
    config = get(hf_config, "quantization_config")
    if not config:
        return "it is not quantized"
    layers = int(get(hf_config, "num_hidden_layers") or 0)
    method = str(config.get("quant_method", "")).lower()
    if method == "compressed-tensors":
        return _compressed_tensors(config, layers)
    if method.startswith("modelopt"):
        return _modelopt(config, layers)
    return f"its quantization method is {method or 'unknown'}, not compressed-tensors or modelopt"


def get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _compressed_tensors(config: Mapping[str, Any], layers: int) -> str | None:
    if config.get("format") != "float-quantized":
        return f"its format is {config.get('format')}, not float-quantized"
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            return f"it has a {key}"
    groups = config.get("config_groups") or {}
    if not groups:
        return "it has no config_groups"
    for name, group in groups.items():
        reason = _group(group)
        if reason:
            return f"config_groups[{name!r}]: {reason}"
    return _ignored(config.get("ignore") or [], layers, _matches_compressed_tensors)


def _group(group: Mapping[str, Any]) -> str | None:
    if group.get("targets") != ["Linear"]:
        return f"targets are {group.get('targets')}, not ['Linear']"
    if group.get("output_activations"):
        return "output activations are quantized"
    weights, activations = group.get("weights") or {}, group.get("input_activations") or {}
    for what, scheme in (("weights", weights), ("input activations", activations)):
        if (scheme.get("type"), scheme.get("num_bits")) != ("float", 8):
            return f"{what} are not FP8"
        if scheme.get("symmetric") is False:
            return f"{what} are not symmetric"
    if weights.get("strategy") not in ("channel", "tensor") or weights.get("dynamic"):
        return f"weights have strategy {weights['strategy']}, not a static scale a channel or a tensor"
    if not activations.get("dynamic"):
        return "activations have a static scale, not one a token, found as they come"
    if activations.get("strategy") not in ("token", "tensor"):
        return f"activations have strategy {activations['strategy']}, not token"
    return None


def _modelopt(config: Mapping[str, Any], layers: int) -> str | None:
    inner = config.get("quantization")
    source = inner if isinstance(inner, Mapping) else config
    algorithm = str(source.get("quant_algo", "")).upper()
    if algorithm != "FP8_PER_CHANNEL_PER_TOKEN":
        return f"its quant_algo is {algorithm or 'unknown'}, not FP8_PER_CHANNEL_PER_TOKEN"
    excluded = source.get("exclude_modules") or source.get("ignore") or []
    return _ignored(excluded, layers, fnmatch.fnmatchcase)


def _matches_compressed_tensors(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern


def _ignored(patterns: list[str], layers: int, matches) -> str | None:
    """The output layer must be left in bf16, and no decoder linear may be."""
    if not any(matches("lm_head", pattern) for pattern in patterns):
        return "its lm_head is quantized too"
    for layer in range(layers):
        for linear in LINEARS:
            name = f"model.layers.{layer}.{linear}"
            for pattern in patterns:
                if matches(name, pattern):
                    return f"{name} is not quantized (ignored by {pattern!r})"
    return None


def damage(folder: Path) -> str | None:
    """Name the first tensor that a damaged safetensors file of a folder has lost, or return ``None``.

    What safetensors says of a file that was cut off names neither the file nor a tensor.
    """
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                return f"{path} is cut off within its header: {size} of at least {8 + length} bytes"
            header = json.loads(file.read(length))
        tensors = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        for name, end in sorted(tensors.items(), key=lambda item: item[1]):
            if 8 + length + end > size:
                return (
                    f"{name}: the file {path.name} is cut off, {size} of "
                    f"{8 + length + max(tensors.values())} bytes; fetch it again"
                )
    return None


def read_as_bf16(hf_config: Any) -> bool:
    """Whether vLLM Neuron's Llama would take a model's weights for bf16 numbers, whatever they are."""
    config = get(hf_config, "quantization_config")
    return not config or str(config.get("quant_method", "")).lower() == "compressed-tensors"
