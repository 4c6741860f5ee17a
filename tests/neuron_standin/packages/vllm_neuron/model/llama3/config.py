"""The Llama's configuration, from Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from vllm_neuron.model.neuron_config import NeuronConfig

from .quantization import QuantizationSpec


@dataclass
class LlamaConfig:
    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = 64
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 500000.0})
    tie_word_embeddings: bool = True
    torch_dtype: torch.dtype = torch.bfloat16
    neuron_config: NeuronConfig | None = None
    quant_spec: QuantizationSpec | None = None

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @classmethod
    def from_configs(cls, hf_config, neuron_config: NeuronConfig | None = None) -> LlamaConfig:
        values = hf_config.to_dict() if isinstance(hf_config, PretrainedConfig) else dict(hf_config)
        dtype = getattr(hf_config, "torch_dtype", None) or values.get("torch_dtype") or torch.bfloat16
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["torch_dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        known["neuron_config"] = neuron_config
        known["quant_spec"] = QuantizationSpec.from_hf_quantization_config(values.get("quantization_config"))
        return cls(**known)
