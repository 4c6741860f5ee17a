"""Tiny FP8-dynamic Llamas on disk, and a plain forward of them that mirrors a stage of the integration."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from plain_llama import PlainLlama
from safetensors.torch import save_file
from torch.nn import functional as F

from vllm_neuron_rmsq import packed, reference

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FP8 = {"type": "float", "num_bits": 8, "symmetric": True}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**FP8, "strategy": "channel", "dynamic": False},
            "input_activations": {**FP8, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
    "ignore": ["lm_head"],
}


def write(
    folder: Path,
    *,
    biases: bool = False,
    tied: bool = False,
    per_tensor: bool = False,
    fp8_max: float = 448.0,
    files: int = 1,
    kv_scale: float | None = None,
    quantization: dict | None = None,
    **changes,
) -> Path:
    """Write a random checkpoint.

    Args:
        biases: of attention and MLP.
        per_tensor: one scale a weight, not one a channel.
        fp8_max: the largest code's value.
        files: over how many the tensors are spread.
        kv_scale: of the K and V caches, where those are FP8.
        quantization: what config.json says; ``None`` is compressed-tensors.
        changes: of config.json.
    """
    folder.mkdir(parents=True)
    config = {
        **SIZES,
        "tie_word_embeddings": tied,
        "attention_bias": biases,
        "mlp_bias": biases,
        "quantization_config": COMPRESSED_TENSORS if quantization is None else quantization,
        **changes,
    }
    generator = torch.Generator().manual_seed(7)

    def normal(*shape, std):
        return torch.randn(shape, generator=generator) * std

    hidden, head = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    inner = config["intermediate_size"]
    linears = {
        **{f"self_attn.{n}_proj": (size, hidden) for n, size in (("q", q), ("k", kv), ("v", kv))},
        "self_attn.o_proj": (hidden, q),
        **{f"mlp.{n}_proj": (inner, hidden) for n in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, std=1.0).bfloat16()}
    if not tied:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden, std=0.06).bfloat16()
    tensors["model.norm.weight"] = (1 + normal(hidden, std=0.2)).bfloat16()
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = (1 + normal(hidden, std=0.2)).bfloat16()
        for cache in ("k_scale", "v_scale") if kv_scale else ():
            tensors[f"{prefix}.self_attn.{cache}"] = torch.tensor([kv_scale])
        for name, shape in linears.items():
            # Channels of different size, so that a scale in the wrong place shows.
            weight = normal(*shape, std=0.05) * (0.5 + torch.rand(shape[0], 1, generator=generator))
            peak = weight.abs().amax().reshape(1) if per_tensor else weight.abs().amax(1, keepdim=True)
            scale = (peak / fp8_max).bfloat16()
            codes = (weight / scale.float()).clamp(-fp8_max, fp8_max).to(torch.float8_e4m3fn)
            tensors[f"{prefix}.{name}.weight"] = codes
            tensors[f"{prefix}.{name}.weight_scale"] = scale
            if biases:
                tensors[f"{prefix}.{name}.bias"] = normal(shape[0], std=0.3).bfloat16()
    save(folder, tensors, files)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> None:
    """Write the tensors in turn to so many files, with an index if there are several."""
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {
        name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def quantized(rows: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """Packed rows, by the reference."""
    out = reference.rms_norm_quant(rows, weight, eps=eps)
    assert isinstance(out, torch.Tensor)
    return out


class Mirror(PlainLlama):
    """The model of an FP8 checkpoint as a stage computes it, on as many ranks.

    Attributes:
        stage: setting ``attention``.
        ranks: each quantizes its own columns of what o_proj and down_proj read.
        prompt: so many tokens were prefilled, the others decoded.
        fuse: setting ``fuse``.
    """

    def __init__(self, folder: Path, stage: str, ranks: int = 1, prompt: int = 16, fuse: bool = True) -> None:
        super().__init__(folder)
        self.of = (folder, stage, ranks, prompt, fuse)
        self.stage, self.ranks, self.prompt, self.fuse = stage, ranks, prompt, fuse

    def product(self, x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
        out = x.float() @ weight.t()
        bias = self.tensors.get(f"{name}.bias")
        return self.round(out if bias is None else out + bias.float())

    def weight(self, name: str) -> torch.Tensor:
        return self.tensors[f"{name}.weight"].float() * self.tensors[f"{name}.weight_scale"].float()

    def linear(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        return self.product(packed.dequantize(rows), self.weight(name), name)

    def bf16_linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.product(x, self.weight(name).bfloat16().float(), name)

    def row_parallel(self, parts: list[torch.Tensor], weight: torch.Tensor, name: str) -> torch.Tensor:
        """Each rank's columns by its part of the weight, rounded by that rank; the first one has the bias."""
        total = torch.zeros((), dtype=torch.bfloat16)
        for rank, (part, own) in enumerate(zip(parts, weight.chunk(self.ranks, dim=1), strict=True)):
            out = part @ own.t()
            if rank == 0 and f"{name}.bias" in self.tensors:
                out = out + self.tensors[f"{name}.bias"].float()
            total = total + self.round(out)
        return total

    def plain_norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.tensors[f"{name}.weight"].float()).bfloat16()

    def norm_quant(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed rows and the sum, in one pass or, stock, with rounding in between."""
        if self.fuse:
            weight = self.tensors[f"{name}.weight"]
            if residual is None:
                return quantized(hidden, weight, self.eps), hidden
            both = reference.rms_norm_quant(hidden, weight, eps=self.eps, residual=residual)
            assert isinstance(both, tuple)
            return both
        total = hidden if residual is None else residual + hidden
        return quantized(self.plain_norm(total, name)), total

    def qkv(self, hidden: torch.Tensor, prefix: str, part: str) -> torch.Tensor:
        name = f"{prefix}.self_attn.{part}_proj"
        norm = f"{prefix}.input_layernorm"
        fp8 = self.linear(self.norm_quant(hidden, None, norm)[0], name)
        bf16 = self.bf16_linear(self.plain_norm(hidden, norm), name)
        count = {"bf16": 0, "fp8-prefill": self.prompt, "fp8": len(hidden)}[self.stage]
        return torch.cat([fp8[:count], bf16[count:]])

    def plain_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        prefix = f"model.layers.{index}"
        q, k, v = (
            self.qkv(hidden, prefix, part).view(len(hidden), -1, self.head_dim).transpose(0, 1)
            for part in "qkv"
        )
        attention = F.scaled_dot_product_attention(
            self.rotate(q).float(), self.rotate(k).float(), v.float(), is_causal=True, enable_gqa=True
        )
        attention = self.round(attention).transpose(0, 1).reshape(len(hidden), -1)
        name = f"{prefix}.self_attn.o_proj"
        columns = attention.chunk(self.ranks, dim=1)
        if self.stage == "bf16":
            out = self.row_parallel(
                [part.float() for part in columns], self.weight(name).bfloat16().float(), name
            )
        else:
            rows_of = [packed.dequantize(quantized(part)) for part in columns]
            out = self.row_parallel(rows_of, self.weight(name), name)
        rows, hidden = self.norm_quant(out, hidden, f"{prefix}.post_attention_layernorm")
        gate, up = (
            self.linear(rows, f"{prefix}.mlp.{part}_proj").chunk(self.ranks, 1) for part in ("gate", "up")
        )
        halves = [torch.cat(both, dim=1) for both in zip(gate, up, strict=True)]
        rows_of = [packed.dequantize(reference.silu_mul_quant(both)) for both in halves]
        name = f"{prefix}.mlp.down_proj"
        return hidden + self.row_parallel(rows_of, self.weight(name), name)

    @torch.no_grad()
    def states(self, tokens: list[int]) -> list[torch.Tensor]:
        """Return ``[T, H]`` before each layer and after the last."""
        found = [self.tensors["model.embed_tokens.weight"][tokens]]
        for index in range(self.config["num_hidden_layers"]):
            found.append(self.plain_layer(index, found[-1]))
        return found

    @torch.no_grad()
    def distribution(self, tokens: list[int]) -> torch.Tensor:
        """Return ``[T, V]`` fp32 log-probabilities of what follows each token."""
        x = self.plain_norm(self.states(tokens)[-1], "model.norm")
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return torch.log_softmax((x @ head.t()).float(), dim=-1)


def compare(ours: torch.Tensor, mirror: Mirror, tokens: list[int]) -> tuple[float, float]:
    """Hold log-probabilities ``[T, V]`` against the mirror's.

    First choices must be the mirror's, except where its two first are nearly equal. The distance, root mean
    square over all of them, may be what rounding of every matmul's result does to the mirror itself, which is
    measured; and no single one may be half as far again as rounding was seen to take one.

    Returns:
        the distance and the most it may be.
    """
    theirs, bound, furthest = _measured(mirror.of, tuple(tokens))
    first, second = theirs.topk(2, dim=-1).values.unbind(-1)
    differ = (ours.argmax(-1) != theirs.argmax(-1)) & (first - second >= 0.1)
    assert not differ.any(), f"first choices differ at {differ.nonzero().flatten().tolist()}"
    distance, furthest_apart = _distance(ours, theirs)
    assert distance <= bound, f"log-probabilities are {distance:.4f} apart, rounding explains {bound:.4f}"
    assert furthest_apart <= 1.5 * furthest
    return distance, bound


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Root mean square of the differences, and the largest."""
    difference = ours - theirs
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


@functools.cache
def _measured(
    of: tuple[Path, str, int, int, bool], tokens: tuple[int, ...]
) -> tuple[torch.Tensor, float, float]:
    """The mirror's log-probabilities and how far rounding moves them, by sixteen draws of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these sizes are not worth more
    mirror = Mirror(*of)
    theirs, distances = mirror.distribution([*tokens]), []
    mirror.noise = 2.0**-8
    for seed in range(16):
        torch.manual_seed(seed)
        distances.append(_distance(mirror.distribution([*tokens]), theirs))
    torch.set_num_threads(threads)
    typical, furthest = zip(*distances, strict=True)
    return theirs, max(typical), max(furthest)
