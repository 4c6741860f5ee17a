"""Two tensor-parallel ranks against one: each has whole norms and half of every linear."""

from __future__ import annotations

import modes
import pytest
import torch
from vllm_models import tiny_config, write_checkpoint

TOKENS = [3, 5, 8, 13, 21, 34, 55, 89, 144, 233]


def run(checkpoint, ranks: int):
    """Return the start-up line of each rank, and the prompt's logprobs."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint),
        tensor_parallel_size=ranks,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=64 << 20,
    )
    try:
        lines = llm.apply_model(_report)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": TOKENS}], params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    given = zip(output.prompt_logprobs[1:], TOKENS[1:], strict=True)
    return lines, torch.tensor([logprobs[token].logprob for logprobs, token in given])


def _report(model) -> str:
    return str(model.rmsq_report)


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tiny_config("llama"), tmp_path / "llama")


def test_two_ranks_give_what_one_gives(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send _report
    one_line, one = run(checkpoint, 1)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", modes.one_core_a_rank())
    two_lines, two = run(checkpoint, 2)
    assert two_lines == 2 * one_line
    assert "4 of 5 RMSNorm layers fused" in one_line[0]
    # Each rank scales and rounds its own half of what o_proj and down_proj read, so FP8's noise is another.
    assert (two - one).abs().mean() < 0.1 < 0.3 < (one - one.mean()).abs().mean()
