"""Which quantized checkpoints the Llama takes, by its own account."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class QuantScheme(StrEnum):
    NONE = "none"
    FP8_STATIC_PER_TENSOR = "fp8_static_per_tensor"


@dataclass(frozen=True)
class QuantizationSpec:
    linear_scheme: QuantScheme
    kv_cache_scheme: QuantScheme

    def get_scheme(self, layer_index: int | None, prefix: str) -> QuantScheme:
        return self.linear_scheme

    @classmethod
    def from_hf_quantization_config(cls, config: dict[str, Any] | None) -> QuantizationSpec | None:
        if not config:
            return None
        method = str(config.get("quant_method", "")).lower()
        if method == "compressed-tensors":
            return None  # taken for a checkpoint whose KV cache alone is quantized
        if method != "modelopt":
            raise ValueError(f"Unsupported quantization_config.quant_method={method!r}.")
        inner = config.get("quantization")
        source = inner if isinstance(inner, dict) else config
        for key in ("quant_algo", "kv_cache_quant_algo"):
            if str(source.get(key, "")).upper() != "FP8":
                raise ValueError(f"Llama3 currently only supports ModelOpt {key}='FP8'")
        return cls(QuantScheme.FP8_STATIC_PER_TENSOR, QuantScheme.FP8_STATIC_PER_TENSOR)


def resolve_attention_mlp_classes(spec: QuantizationSpec | None, layer_index: int) -> tuple[type, type]:
    from . import model

    if spec is None or spec.get_scheme(layer_index, "self_attn") is QuantScheme.NONE:
        return model.LlamaAttention, model.LlamaMLP
    raise NotImplementedError("static FP8 is not in this stand-in")
