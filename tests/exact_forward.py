"""What an FP8 checkpoint means: Hugging Face's model in float32, with exact per-token quantization.

Every linear that is FP8 in the checkpoint gets its activation quantized by ``reference.py`` from float32, row
by row, and multiplies it by the dequantized weight in float32. Nothing else is rounded. So what an
implementation's result is away from this is what the implementation itself rounds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_neuron_rmsq import packed, reference


class ExactForward:
    """The model of an FP8 checkpoint directory (compressed-tensors, per-channel weights, dynamic).

    Args:
        checkpoint: its folder.
        target: whose range activations are quantized to.
    """

    def __init__(self, checkpoint: Path, target: str) -> None:
        tensors = {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}
        config = AutoConfig.from_pretrained(checkpoint)
        del config.quantization_config
        self.model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()  # from_config leaves dropout on
        state = {}
        for name, tensor in tensors.items():
            if name.endswith("_scale"):
                continue
            scale = tensors.get(f"{name}_scale")
            state[name] = tensor.float() if scale is None else tensor.float() * scale
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self.model.tie_weights()
        for name, module in self.model.named_modules():
            if f"{name}.weight_scale" in tensors:
                assert isinstance(module, nn.Linear)
                module.register_forward_pre_hook(_quantize_to(target))

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return ``[T, vocabulary]`` of one sequence, ``tokens`` ``[T]``."""
        return self.model(tokens[None].long()).logits[0]


def _quantize_to(target: str):
    def hook(module: nn.Module, args: tuple) -> tuple:
        rows = reference.rms_norm_quant(args[0], None, target=target)
        assert isinstance(rows, torch.Tensor)
        return (packed.dequantize(rows),)

    return hook
