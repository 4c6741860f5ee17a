"""Loaders are attributes of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class SafetensorsWeightLoader:
    transform: Callable[[list[Any], int], torch.Tensor] | None = None

    def load(self, slices: list[Any], rank: int) -> torch.Tensor:
        if self.transform is None:
            assert len(slices) == 1, f"one slice without a transform, got {len(slices)}"
            return slices[0][:].contiguous()
        return self.transform(slices, rank).contiguous()


def set_weight_loader(param: nn.Parameter, loader: SafetensorsWeightLoader) -> None:
    param.weight_loader = loader


def get_weight_loader(param: nn.Parameter) -> SafetensorsWeightLoader:
    return getattr(param, "weight_loader", SafetensorsWeightLoader())


def with_rank_override(loader: SafetensorsWeightLoader, rank: int) -> SafetensorsWeightLoader:
    return SafetensorsWeightLoader(lambda slices, _: loader.load(slices, rank))


def sharding_weight_loader(
    shard_dim: int, shard_size: int, num_shards: int, is_storage_transposed: bool = False
) -> SafetensorsWeightLoader:
    def transform(slices, rank):
        (source,) = slices
        start = (rank % num_shards) * shard_size
        part = slice(start, start + shard_size)
        if is_storage_transposed:
            return (source[:, part] if shard_dim == 0 else source[part]).T
        return source[part] if shard_dim == 0 else source[:, part]

    return SafetensorsWeightLoader(transform)


def fused_qkv_weight_loader(
    q_size: int,
    kv_size: int,
    shard_dim: int,
    num_shards: int,
    is_storage_transposed: bool,
    num_kv_replicas: int,
) -> SafetensorsWeightLoader:
    assert shard_dim == 1 and is_storage_transposed

    def transform(slices, rank):
        q, k, v = slices
        kv = slice(rank // num_kv_replicas * kv_size, (rank // num_kv_replicas + 1) * kv_size)
        return torch.cat([q[rank * q_size : (rank + 1) * q_size], k[kv], v[kv]]).T

    return SafetensorsWeightLoader(transform)
