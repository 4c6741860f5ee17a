"""Architectures and their classes, bound when this module is imported."""

from .llama3.model import LlamaForCausalLM


class GptOssForCausalLM(LlamaForCausalLM):
    """Another architecture of the list; never ours to touch."""


def get_models() -> list[tuple[str, type]]:
    return [("LlamaForCausalLM", LlamaForCausalLM), ("GptOssForCausalLM", GptOssForCausalLM)]
