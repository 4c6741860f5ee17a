"""Fixtures of these tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def tokens() -> list[int]:
    """A prompt of 16 tokens and 12 more to decode."""
    return torch.randint(3, 256, (28,), generator=torch.Generator().manual_seed(3)).tolist()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that run the stand-in for vLLM Neuron, which is a program of its own."""
    module = item.getparent(pytest.Module)
    shared = [] if module is None else vars(module.obj).values()
    if any(getattr(value, "__module__", "") == "neuron_standin.run" for value in shared):
        item.add_marker(pytest.mark.engine)
