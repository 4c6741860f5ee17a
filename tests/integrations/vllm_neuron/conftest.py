"""Fixtures of these tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for what these tests share


@pytest.fixture(scope="session")
def tokens() -> list[int]:
    """A prompt of 16 tokens and 12 more to decode."""
    return torch.randint(3, 256, (28,), generator=torch.Generator().manual_seed(3)).tolist()
