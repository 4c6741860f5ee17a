"""Offline generation through the plugin: ``python examples/offline_generate.py CHECKPOINT``.

The plugin needs no code: installed beside vLLM it is loaded by ``LLM`` itself. The environment variables
VLLM_RMSQ_BACKEND, _TARGET, _FUSE and _STRICT set what it does. So does ``LLM``'s argument
``additional_config={"rmsq": {"backend": "cpu"}}``, which wins over them: leave it out where they shall count.
"""

import sys

from vllm import LLM, SamplingParams

PROMPTS = [
    "Complete: The capital of France is",
    "Name three primary colors.",
    "What is the capital of Japan?",
]


def main(checkpoint: str) -> None:
    llm = LLM(
        checkpoint,
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=256 << 20,
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    for prompt, output in zip(
        PROMPTS, llm.chat(chats, SamplingParams(temperature=0, max_tokens=32)), strict=True
    ):
        print(f"\n{prompt}\n  {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(
            "usage: python examples/offline_generate.py CHECKPOINT (`make demo` makes .cache/smollm2-fp8)"
        )
    main(sys.argv[1])
