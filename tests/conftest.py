"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from vllm_neuron_rmsq.cli import smollm2

# vLLM would take nine tenths of the machine for each engine's KV cache; 1 GiB is plenty here.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

# A test's time depends on what else the machine does, so none is held to one. `make fast` tries fewer inputs.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("fast", deadline=None, max_examples=10)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever is under ``tests/e2e/`` starts vLLM's engine or a server: ``make fast`` leaves it out."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.engine)


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
