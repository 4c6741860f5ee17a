"""SmolLM2 through the NKI kernels: on the simulator here, on Trainium with ``-m neuron``."""

from __future__ import annotations

import pytest
import torch
from plain_llama import PlainLlama
from vllm_models import Loaded, in_vllm

from vllm_neuron_rmsq import settings

BACKENDS = ["nki-sim", pytest.param("nki", marks=pytest.mark.neuron)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_decoder_layer(backend, smollm2_fp8, monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", backend)
    try:
        loaded = Loaded(smollm2_fp8)
    finally:
        settings.install(None)
    assert str(loaded.report).startswith(f"60 of 61 RMSNorm layers fused (backend {backend}, target trn2)")
    plain = PlainLlama(smollm2_fp8)
    hidden = plain.tensors["model.embed_tokens.weight"][torch.arange(100, 148)]
    expected, expected_residual = plain.layer(0, hidden, None)
    with in_vllm(loaded, len(hidden)):
        layer = loaded.model.model.layers[0]
        got, residual = layer(torch.arange(len(hidden)), hidden, None)
    for ours, theirs in ((got, expected), (residual, expected_residual)):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        # Two percent of the codes may be a step off, a twelfth of their value on average, which makes
        # sqrt(0.02) / 12 = 0.012 in each of a layer's four matmuls: 0.024.
        assert error < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation(backend, smollm2_fp8, monkeypatch):
    from vllm import LLM, SamplingParams

    monkeypatch.setenv("VLLM_RMSQ_BACKEND", backend)
    llm = LLM(str(smollm2_fp8), enforce_eager=True, max_model_len=64, max_num_seqs=1)
    question = [{"role": "user", "content": "Complete: The capital of France is"}]
    output = llm.chat(question, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert output[0].outputs[0].text.startswith("The capital of France is Paris.")
