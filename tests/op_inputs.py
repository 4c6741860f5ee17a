"""Inputs of the ops' tests."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fp8_weight(n: int, h: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, H]`` float8_e4m3fn over its whole range, and ``[N]`` scales."""
    weight = (rows(n, h, seed=seed) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return weight, rows(n, seed=seed + 1).abs() + 0.01


HIDDEN, GAMMA = rows(3, 16), rows(16, seed=3)
WEIGHT, SCALE = fp8_weight(8, 16)
