"""Tiny Llamas through vLLM's configuration, the platform's validator, the worker's registration and our
model, against a plain PyTorch forward that mirrors the stage."""

from __future__ import annotations

import itertools

import pytest
from standin import drive
from tiny import Mirror, compare, write

STAGES = ("bf16", "fp8-prefill", "fp8")
KINDS = {
    "plain": {},
    "tied": {"tied": True, "files": 3},
    "biased": {"biases": True},
    "per-tensor": {"per_tensor": True},
}
BACKENDS = ("torch",)
PROMPT = 16


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: write(folder / kind, **options) for kind, options in KINDS.items()}


@pytest.fixture(scope="module")
def one_rank(checkpoints, tokens, tmp_path_factory):
    """Every stage, kind and backend on one rank, in one process."""
    cases = [*itertools.product(STAGES, KINDS, BACKENDS)]
    jobs = [
        {
            "model": str(checkpoints[kind]),
            "rmsq": {"backend": backend, "attention": stage},
            "tokens": tokens,
            "prompt": PROMPT,
        }
        for stage, kind, backend in cases
    ]
    return dict(zip(cases, drive(jobs, tmp_path_factory.mktemp("one")), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank(one_rank, checkpoints, tokens, stage, kind, backend):
    result = one_rank[stage, kind, backend]
    assert result["class"] == "RowFp8LlamaForCausalLM"
    compare(result["logprobs"], Mirror(checkpoints[kind], stage), tokens)
