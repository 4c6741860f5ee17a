"""What a model says of its KV cache."""

from dataclasses import dataclass

import torch


@dataclass
class LayerSpec:
    name: str
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    sliding_window_size: int | None = None
    chunk_size: int | None = None


@dataclass
class KVSpec:
    layers: list[LayerSpec]
