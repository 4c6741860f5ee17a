"""Small checkpoints on disk for tests of their conversion."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_llama(folder: Path, *, tied: bool = False, shards: int = 1, seed: int = 0, **config) -> Path:
    """Write a random Llama checkpoint of two layers, as Hugging Face lays it out, and return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **sizes | config)).bfloat16()
    model.save_pretrained(folder, max_shard_size="10KB" if shards > 1 else "1GB")
    assert len(list(folder.glob("*.safetensors"))) >= shards
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    return folder


def write_model(folder: Path, kind: str, **changes) -> Path:
    """Write a random checkpoint of another model, as transformers lays it out, and return its folder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from vllm_models import tiny_config

    torch.manual_seed(0)
    model = AutoModelForImageTextToText if "vision_config" in changes else AutoModelForCausalLM
    model.from_config(tiny_config(kind, **changes), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Add a tokenizer of four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3, "four": 4}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


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
