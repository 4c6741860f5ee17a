"""vLLM's ``LLM`` on tiny models, and what it answers, for the tests of ways of running it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(3, 256, (n,), generator=GENERATOR).tolist() for n in (100, 41)]
NEW = 8
SAME = "the same bits"
TINY: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 128,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
}
"""Arguments of an engine for a tiny model, unless a test says otherwise."""


class Answers(NamedTuple):
    """Greedy answers to ``PROMPTS``: their tokens, and the logprob of each, ``[prompts, NEW]``."""

    tokens: list[list[int]]
    logprobs: torch.Tensor

    def __eq__(self, other) -> bool:
        return self.tokens == other.tokens and torch.equal(self.logprobs, other.logprobs)


def report(model) -> str:
    """The start-up line; for ``apply_model``."""
    return str(model.rmsq_report)


@contextlib.contextmanager
def engine(checkpoint: Path, **arguments) -> Iterator:
    """vLLM's ``LLM`` on a tiny model, in processes of its own."""
    from vllm import LLM

    llm = LLM(str(checkpoint), **TINY | arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def parameters():
    """Greedy, ``NEW`` tokens, the logprob of each."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False)


def answers(llm, **options) -> Answers:
    """What an ``LLM`` answers to each of ``PROMPTS``, asked one by one."""
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    return collect(llm.generate([prompt], parameters(), use_tqdm=False, **options)[0] for prompt in prompts)


def collect(outputs) -> Answers:
    """The answers in vLLM's ``RequestOutput`` s."""
    outputs = [output.outputs[0] for output in outputs]
    logprobs = [
        [given[token].logprob for given, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs
    ]
    return Answers([list(o.token_ids) for o in outputs], torch.tensor(logprobs))


def one_core_a_rank() -> str:
    """``VLLM_CPU_OMP_THREADS_BIND`` for two ranks on a machine of one NUMA node."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[-1]}"
