"""A Llama forward in plain PyTorch, from an FP8 checkpoint's files, that follows the contract to the letter.

Dimensions:
    T: tokens of one sequence
    H: hidden size

It shares nothing with vLLM and the plugin but ``reference.py``: every FP8 linear gets the reference's packed
rows, dequantized, times the dequantized weight, in fp32, rounded once to bf16. The rest (rotary embedding,
attention, the last norm) rounds to bf16 where Hugging Face's Llama does.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from vllm_neuron_rmsq import packed, reference


class PlainLlama:
    """The model of an FP8 checkpoint directory (compressed-tensors, per-channel weights).

    Attributes:
        noise: largest relative error put on what each matmul and attention returns before it is rounded to
            bf16; 2^-9 is the rounding's own. What it does to the result is how far two right
            implementations may lie apart.
    """

    noise = 0.0

    def __init__(self, checkpoint: Path) -> None:
        self.config = json.loads((checkpoint / "config.json").read_text())
        self.tensors = {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}
        self.eps = self.config["rms_norm_eps"]
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.heads
        parameters = self.config.get("rope_parameters") or {}
        self.theta = parameters.get("rope_theta") or self.config.get("rope_theta", 10000.0)

    def linear(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.tensors[f"{name}.weight"].float() * self.tensors[f"{name}.weight_scale"]
        return self.round(packed.dequantize(rows) @ weight.t())

    def round(self, x: torch.Tensor) -> torch.Tensor:
        if self.noise:
            x = x * (1 + self.noise * (2 * torch.rand_like(x) - 1))
        return x.bfloat16()

    def norm(self, hidden: torch.Tensor, residual: torch.Tensor | None, name: str):
        """Return packed rows and the residual stream."""
        weight = self.tensors[f"{name}.weight"]
        out = reference.rms_norm_quant(hidden, weight, eps=self.eps, residual=residual)
        return (out, hidden) if residual is None else out

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of ``[heads, T, head_dim]``, halves (GPT-NeoX style)."""
        half = self.head_dim // 2
        frequency = self.theta ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[1])[:, None] * frequency
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``[T, H]`` as packed FP8, without a norm."""
        rows = reference.rms_norm_quant(x, None)
        assert isinstance(rows, torch.Tensor)
        return rows

    def layer(
        self, index: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prefix = f"model.layers.{index}"
        rows, residual = self.norm(hidden, residual, f"{prefix}.input_layernorm")
        q, k, v = (
            self.linear(rows, f"{prefix}.self_attn.{part}_proj")
            .view(len(rows), -1, self.head_dim)
            .transpose(0, 1)
            for part in "qkv"
        )
        attention = F.scaled_dot_product_attention(
            self.rotate(q).float(), self.rotate(k).float(), v.float(), is_causal=True, enable_gqa=True
        )
        attention = self.round(attention).transpose(0, 1).reshape(len(rows), -1)
        hidden = self.linear(self.quantize(attention), f"{prefix}.self_attn.o_proj")
        rows, residual = self.norm(hidden, residual, f"{prefix}.post_attention_layernorm")
        gate, up = (self.linear(rows, f"{prefix}.mlp.{part}_proj") for part in ("gate", "up"))
        rows = reference.silu_mul_quant(torch.cat([gate, up], dim=-1))
        return self.linear(rows, f"{prefix}.mlp.down_proj"), residual

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Return ``[T - 1]`` fp32: the log-probability of each token but the first."""
        hidden, residual = self.layer(0, self.tensors["model.embed_tokens.weight"][tokens], None)
        for index in range(1, self.config["num_hidden_layers"]):
            hidden, residual = self.layer(index, hidden, residual)
        x = hidden.float() + residual.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        x = (x * self.tensors["model.norm.weight"].float()).bfloat16()
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        logprobs = torch.log_softmax((x @ head.t()).float(), dim=-1)
        return logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
