"""Offline generation with a real checkpoint: SmolLM2-135M-Instruct in FP8, through ``LLM``."""

from __future__ import annotations

import math
import pydoc_data.topics

import pytest
import torch
from neuron_standin.run import drive
from plain_llama import PlainLlama
from transformers import AutoTokenizer

TEXTS, LENGTH = 4, 1000


@pytest.fixture(scope="module")
def llm(smollm2_fp8):
    """SmolLM2 in vLLM's own engine process, eager, with the plugin's default settings."""
    from vllm import LLM

    llm = LLM(str(smollm2_fp8), enforce_eager=True, max_model_len=1100, max_num_batched_tokens=2048)
    yield llm
    # Now, not when Python ends: vLLM's client thread would free tensors then, which aborts the process.
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def tokens(smollm2_fp8):
    """The first 4 x 1000 tokens of Python's own help texts."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_fp8)
    ids = tokenizer("\n".join(pydoc_data.topics.topics.values())).input_ids
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(TEXTS)]


@pytest.fixture(scope="module")
def logprobs(llm, tokens):
    """``[4, 999]``: what the plugin's model gives each token but the first."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in tokens], params, use_tqdm=False)
    return torch.tensor(
        [
            [given[token].logprob for given, token in zip(o.prompt_logprobs[1:], ids[1:], strict=True)]
            for o, ids in zip(outputs, tokens, strict=True)
        ]
    )


def test_answers(llm):
    from vllm import SamplingParams

    # Questions whose first word is clear. Asked "What is the capital of France?", this model gives
    # "The" 0.25 nats more than "L" in bf16, and one rounding more or less moves them by as much.
    questions = ["Complete: The capital of France is", "What is the capital of Japan?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert outputs[0].outputs[0].text.startswith("The capital of France is Paris.")
    assert outputs[1].outputs[0].text.startswith("The capital of Japan is Tokyo.")


def test_perplexity(logprobs):
    # bf16 13.10, stock FP8 13.53 (Python 3.11's text; other versions differ in a few words).
    assert math.exp(-logprobs.mean()) <= 13.6


def test_vllm_neuron_has_the_same_perplexity(logprobs, tokens, smollm2_fp8, tmp_path):
    """The same checkpoint through vLLM Neuron's Llama on row FP8 (its stand-in), every linear in FP8."""
    rmsq = {"backend": "cpu", "attention": "fp8"}
    lengths = {"max_model_len": 1100, "max_num_batched_tokens": 2048}
    jobs = [
        {
            "model": str(smollm2_fp8),
            "rmsq": rmsq,
            "engine": lengths,
            "tokens": ids,
            "prompt": LENGTH,
            "context": 1024,
            "given": True,
        }
        for ids in tokens
    ]
    given = torch.stack([result["logprobs"] for result in drive(jobs, tmp_path)])
    assert math.exp(-given.mean()) <= 13.6
    # A token's logprobs differ by 0.22 (rounding), so their mean is sure to 0.0035; it is 0.0015 here.
    assert abs(given.mean() - logprobs.mean()) < 0.005


def test_logprobs_are_those_of_a_plain_forward_of_the_same_checkpoint(logprobs, tokens, smollm2_fp8):
    """Both follow the contract, so they may differ by what bf16 leaves open: the order of sums, one rounding
    more or less. Rounding noise flips FP8 codes, and 30 layers amplify it, so the bound is measured: how far
    the plain forward moves when each matmul's and attention's result is off by half a bf16 step (2^-9).
    """
    count = 300
    model = PlainLlama(smollm2_fp8)
    plain = model.logprobs(tokens[0][:count])
    torch.manual_seed(0)
    model.noise = 2**-9
    bound = (model.logprobs(tokens[0][:count]) - plain).abs().mean()
    difference = logprobs[0, : count - 1] - plain
    assert difference.abs().mean() < 1.25 * bound < 0.25
    assert difference.mean().abs() < 0.04  # no bias: three times the standard error of the mean
