"""Models that draft for another (EAGLE, EAGLE-3, MTP), in FP8, as vLLM loads them beside it."""

from __future__ import annotations

import drafts
import pytest
from vllm_models import Loaded

from vllm_neuron_rmsq import settings
from vllm_neuron_rmsq.integrations.vllm import proof

pytestmark = pytest.mark.engine  # loads models as vLLM does

FUSED = {
    # method: fused norms and what they feed, norms that stay stock
    "eagle": ({"post_attention_layernorm": "gate_up_proj"}, set()),
    "eagle3": ({"post_attention_layernorm": "gate_up_proj"}, {"input_layernorm", "hidden_norm", "norm"}),
    "mtp": (
        {"input_layernorm": "qkv_proj", "post_attention_layernorm": "gate_up_proj"},
        {"token_layernorm", "hidden_layernorm", "final_layernorm"},
    ),
}


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


@pytest.mark.parametrize("method", FUSED)
def test_drafts_are_fused_and_strict_accepts_them(method, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "torch")
    monkeypatch.setenv("VLLM_RMSQ_STRICT", "1")
    monkeypatch.setattr(proof.logger, "warning", lambda *args, **kwargs: pytest.fail("no traceback is due"))
    model, config = drafts.speculative(method, tmp_path)
    try:
        loaded = Loaded(model, draft=True, speculative_config=config)
    finally:
        settings.install(None)
    fused, stock = FUSED[method]
    report = loaded.report
    assert {last(norm.name): last(norm.linears[0]) for norm in report.fused} == fused
    assert {last(norm.name) for norm in report.norms if norm.reason} == stock
    assert report.linears == 4 and len(report.fused_activations) == len(report.activations) == 1
