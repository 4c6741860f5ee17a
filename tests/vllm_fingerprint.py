"""What the plugin computes in one vLLM, for comparison with another one: packed rows and greedy tokens.

A script for the environment of the vLLM in question. It prints one JSON object::

    python tests/vllm_fingerprint.py CHECKPOINT eager|compiled 1|0

    {"vllm": version, "torch": version, "report": the start-up line,
     "tokens": [[id, ...], ...], "logprobs": [[float, ...], ...],
     "rows": {layer: SHA-256 of all packed rows that it wrote, ...}}

The last argument is the setting ``fuse``. Rows are seen when eager only: a compiled graph has no layers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

PROMPTS = (
    # SmolLM2's tokens of "The capital of France is Paris, a city on the river Seine. The capital of Japan is"
    [
        504,
        3575,
        282,
        4649,
        314,
        7042,
        28,
        253,
        2240,
        335,
        260,
        4626,
        1268,
        462,
        30,
        378,
        3575,
        282,
        3085,
        314,
    ],
    # and of the first lines of a Python function.
    [1604, 3987, 46477, 24, 94, 727, 472, 1620, 14362, 260, 808, 304, 24681, 46477, 2966, 7996, 472, 2966],
)
LENGTH = 24


def fingerprint(checkpoint: str, *, compiled: bool, fuse: bool) -> dict[str, Any]:
    """Start an ``LLM`` in this process, continue the prompts greedily, one after the other."""
    import torch
    import vllm

    llm = vllm.LLM(
        checkpoint,
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        max_model_len=128,
        max_num_seqs=1,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"rmsq": {"fuse": str(int(fuse))}},
    )
    digests: dict[str, Any] = {}
    (report,) = llm.apply_model(lambda model: _watch(model, digests))
    params = vllm.SamplingParams(
        temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0, detokenize=False
    )
    answers = [
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0].outputs[0] for ids in PROMPTS
    ]
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "report": report,
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [given[token].logprob for given, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            for answer in answers
        ],
        "rows": {name: digest.hexdigest() for name, digest in digests.items()},
    }


def _watch(model: Any, digests: dict[str, Any]) -> str | None:
    """Take a digest of the rows of each layer that writes some; return the model's start-up line."""
    from vllm_neuron_rmsq.integrations.vllm.activation import PackedActivation

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, PackedActivation):
                rows = first.data.contiguous().numpy().tobytes()
                digests.setdefault(name, hashlib.sha256()).update(rows)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(watch(name))
    return str(model.rmsq_report) if hasattr(model, "rmsq_report") else None


def main(checkpoint: str, mode: str, fuse: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model in the process that watches it
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    found = fingerprint(checkpoint, compiled=mode == "compiled", fuse=fuse == "1")
    os.write(answer, (json.dumps(found) + "\n").encode())
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads may not end by themselves


if __name__ == "__main__":
    main(*sys.argv[1:])
