"""Numbers: every fused model against what its checkpoint means, beside stock vLLM."""

from __future__ import annotations

import pytest
import torch
from exact_forward import ExactForward
from vllm_models import ARCHITECTURES, Loaded, tiny_config, write_checkpoint

pytestmark = pytest.mark.engine  # loads models as vLLM does

FUSED = [name for name, architecture in ARCHITECTURES.items() if architecture.pairs]
DEFAULT = ("llama3", "gemma2")
LENGTH = 160


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in FUSED]
)
def test_logprobs_are_no_farther_from_the_exact_ones_than_stocks(name, tmp_path, monkeypatch):
    """Target trn3 has stock's range, so both quantize to the same numbers, had they the same input."""
    architecture = ARCHITECTURES[name]
    config = tiny_config(architecture.model_type, **architecture.changes)
    path = write_checkpoint(config, tmp_path / name)
    tokens = torch.randint(3, 256, (LENGTH,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    exact = ExactForward(path, "trn3").logits(tokens).log_softmax(-1)
    errors = {}
    for backend in ("auto", "off"):
        monkeypatch.setenv("VLLM_RMSQ_BACKEND", backend)
        monkeypatch.setenv("VLLM_RMSQ_TARGET", "trn3")
        loaded = Loaded(path, max_model_len=LENGTH)
        logprobs = loaded.logits(tokens).float().log_softmax(-1)
        errors[backend] = (logprobs - exact).abs().mean().item()
    assert errors["auto"] <= errors["off"]
    assert errors["off"] < 0.2 * (exact - exact.mean(0)).abs().mean()  # they are the same model at all
