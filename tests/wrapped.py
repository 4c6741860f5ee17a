"""Tiny FP8 checkpoints of a Llama inside something else, and tokenizers for them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from vllm_models import tiny_config

from vllm_neuron_rmsq import checkpoint

SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
VOCABULARY = 288
"""Tokens of a model with :func:`tokenizer`: the special ones, every byte, and a few nobody uses."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate((*SPECIAL, *alphabet))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    pad, bos, eos, *others = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, bos_token=bos, eos_token=eos, additional_special_tokens=others
    )


def write_idefics3(folder: Path) -> Path:
    """An Idefics 3 whose language model is a Llama in FP8; a picture is 28 x 28, and one token."""
    text = tiny_config("llama", vocab_size=VOCABULARY)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    torch.manual_seed(4)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "vision" not in name:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder / "bf16")
    path = folder / "fp8"
    checkpoint.convert(folder / "bf16", path, "trn2", ignore=["re:.*vision.*", "re:.*connector.*"])
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    Idefics3Processor(pictures, tokenizer(), image_seq_len=1).save_pretrained(path)
    return path
