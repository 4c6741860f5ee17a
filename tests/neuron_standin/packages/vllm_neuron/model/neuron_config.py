"""What ``additional_config["neuron_config"]`` becomes; the fields our integration meets."""

from dataclasses import dataclass


@dataclass
class NeuronConfig:
    attention_dp_size: int = 1
    mlp_dp_size: int = 1
    embedding_dp_size: int = 1
    lm_head_dp_size: int = 1
    fp8_packed_kv: bool = False
    quantization: str | None = None
