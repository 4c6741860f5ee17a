"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_neuron_rmsq.cli import smollm2

# vLLM would take nine tenths of the machine for each engine's KV cache; 1 GiB is plenty here.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path:
    """``.cache/`` of the checkout: what takes long to make and outlives a test run."""
    return pytestconfig.rootpath / ".cache"


@pytest.fixture(scope="session")
def smollm2_bf16(cache: Path) -> Path:
    """Checkpoint directory of SmolLM2-135M-Instruct, unquantized."""
    return smollm2.bf16(cache)


@pytest.fixture(scope="session")
def smollm2_fp8(cache: Path) -> Path:
    """Checkpoint directory of SmolLM2-135M-Instruct in FP8, codes within ±240."""
    return smollm2.fp8(cache)
