"""Embedding and output layer, their vocabulary shared among the ranks."""

from __future__ import annotations

import torch
from torch import nn
from vllm.distributed.parallel_state import get_tp_group


class VocabDimShardedEmbedding(nn.Module):
    """``[T] -> [T, H]``, or ``[T / tp, H]`` with ``scatter_tokens``."""

    def __init__(self, vocab_size: int, embed_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.group = get_tp_group()
        self.tp_size = self.group.world_size
        self.vocab_size_per_rank = vocab_size // self.tp_size
        self.weight = nn.Parameter(torch.empty(self.vocab_size_per_rank, embed_dim, dtype=dtype))

    def forward(self, input_ids: torch.Tensor, scatter_tokens: bool, rank=None) -> torch.Tensor:
        first = (self.group.rank_in_group if rank is None else rank) * self.vocab_size_per_rank
        local = input_ids - first
        mine = (local >= 0) & (local < self.vocab_size_per_rank)
        rows = self.weight[torch.where(mine, local, torch.zeros_like(local))]
        rows = torch.where(mine[:, None], rows, torch.zeros_like(rows))
        if self.tp_size == 1:
            return rows
        return self.group.reduce_scatter(rows, dim=0) if scatter_tokens else self.group.all_reduce(rows)


class ColumnParallelLinear(nn.Module):
    """``[T, H] -> [T, N]``, gathered."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, gather_output: bool) -> None:
        super().__init__()
        assert gather_output, "sharded logits are not in this stand-in"
        self.group = get_tp_group()
        self.tp_size = self.group.world_size
        self.gather_output = gather_output
        self.out_features_per_rank = out_features // self.tp_size
        self.weight = nn.Parameter(torch.empty(self.out_features_per_rank, in_features, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.all_gather(x @ self.weight.T, dim=-1)
