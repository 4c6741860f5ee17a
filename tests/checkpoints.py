"""Small checkpoints on disk for tests of their conversion."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_llama(folder: Path, *, tied: bool = False, shards: int = 1, seed: int = 0, **config) -> Path:
    """Write a random Llama checkpoint of two layers, as Hugging Face lays it out, and return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            tie_word_embeddings=tied,
            **config,
        )
    ).bfloat16()
    model.save_pretrained(folder, max_shard_size="10KB" if shards > 1 else "1GB")
    assert len(list(folder.glob("*.safetensors"))) >= shards
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint directory."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def edit(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (``None``) remove tensors of a checkpoint of one file."""
    tensors = load(folder) | change
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


def is_linear(name: str) -> bool:
    """Whether this tensor of :func:`write_llama` is a linear's weight."""
    return name.endswith("_proj.weight")
