"""Checkpoints of every FP8 kind that people publish, made of a bf16 checkpoint, and their exact arithmetic.

A kind is who wrote the checkpoint (``config.json``'s ``quant_method``) and how: one weight scale for a
tensor, an output channel or a block of 128 x 128, activations quantized by one given scale or as they come.
:func:`write` makes the folder; :func:`reference_model` is what it stands for, in float32: codes times scales,
and every activation rounded to the FP8 code that the kind gives it.

Dimensions:
    N: output features of a linear
    H: input features of a linear
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

R = 448.0
"""Published checkpoints use the whole range of float8_e4m3fn."""

BLOCK = 128


@dataclass(frozen=True)
class Kind:
    """How one kind of checkpoint is quantized and written.

    Attributes:
        config: ``(names of the linears left alone) -> quantization_config``.
        weights: "channel", "tensor" or "block".
        activations: "token" or "tensor" (as they come), "static" (one given scale), "group" (as they come,
            128 features at a time) or "none".
        scale: name of a weight's scale beside ``weight``.
        shape: of that scale on disk, of its natural one: ``[N, 1]``, ``[]`` or ``[N / 128, H / 128]``.
    """

    config: Callable[[list[str]], dict[str, Any]]
    weights: str
    activations: str
    scale: str = "weight_scale"
    shape: Callable[[Tensor], Tensor] = lambda scale: scale


def _compressed_tensors(weights: str, activations: str) -> Callable[[list[str]], dict[str, Any]]:
    def config(ignore: list[str]) -> dict[str, Any]:
        arguments = {"num_bits": 8, "type": "float", "symmetric": True}
        inputs = {
            "none": None,
            "token": arguments | {"strategy": "token", "dynamic": True},
            "static": arguments | {"strategy": "tensor", "dynamic": False},
            "group": arguments | {"strategy": "group", "group_size": BLOCK, "dynamic": True},
        }
        block = {"block_structure": [BLOCK, BLOCK]} if weights == "block" else {}
        group = {
            "targets": ["Linear"],
            "weights": arguments | {"strategy": weights, "dynamic": False} | block,
            "input_activations": inputs[activations],
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "naive-quantized" if activations == "none" else "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignore,
        }

    return config


def _fp8(activations: str, **more: Any) -> Callable[[list[str]], dict[str, Any]]:
    return lambda ignore: (
        {"quant_method": "fp8", "activation_scheme": activations, "modules_to_not_convert": ignore} | more
    )


def _modelopt(algorithm: str) -> Callable[[list[str]], dict[str, Any]]:
    return lambda ignore: {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ignore}


def _quark(weights: str, activations: str, dynamic: bool) -> Callable[[list[str]], dict[str, Any]]:
    def config(ignore: list[str]) -> dict[str, Any]:
        block = {"block_size": [BLOCK, BLOCK]} if weights == "per_block" else {}
        group = {"group_size": BLOCK} if activations == "per_group" else {}
        common = {"dtype": "fp8_e4m3", "symmetric": True}
        return {
            "quant_method": "quark",
            "export": {"kv_cache_group": [], "pack_method": "reorder"},
            "global_quant_config": {
                "weight": common | {"qscheme": weights, "is_dynamic": False, "ch_axis": 0} | block,
                "input_tensors": common | {"qscheme": activations, "is_dynamic": dynamic} | group,
                "output_tensors": None,
                "bias": None,
            },
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "exclude": ignore,
        }

    return config


def _fbgemm(ignore: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ignore,
    }


KINDS: dict[str, Kind] = {
    "compressed-tensors channel": Kind(_compressed_tensors("channel", "token"), "channel", "token"),
    "compressed-tensors tensor": Kind(
        _compressed_tensors("tensor", "token"), "tensor", "token", shape=lambda s: s.reshape(1)
    ),
    "compressed-tensors tensor static": Kind(
        _compressed_tensors("tensor", "static"), "tensor", "static", shape=lambda s: s.reshape(1)
    ),
    "compressed-tensors channel static": Kind(_compressed_tensors("channel", "static"), "channel", "static"),
    "compressed-tensors block": Kind(_compressed_tensors("block", "group"), "block", "group"),
    "compressed-tensors channel weight-only": Kind(_compressed_tensors("channel", "none"), "channel", "none"),
    "compressed-tensors tensor weight-only": Kind(
        _compressed_tensors("tensor", "none"), "tensor", "none", shape=lambda s: s.reshape(1)
    ),
    "compressed-tensors block weight-only": Kind(_compressed_tensors("block", "none"), "block", "none"),
    "fp8 tensor": Kind(_fp8("dynamic"), "tensor", "tensor"),
    "fp8 tensor static": Kind(_fp8("static"), "tensor", "static"),
    "fp8 block": Kind(
        _fp8("dynamic", weight_block_size=[BLOCK, BLOCK]), "block", "group", scale="weight_scale_inv"
    ),
    "modelopt tensor static": Kind(_modelopt("FP8"), "tensor", "static"),
    "modelopt tensor": Kind(_modelopt("FP8"), "tensor", "tensor"),
    "modelopt channel": Kind(
        _modelopt("FP8_PER_CHANNEL_PER_TOKEN"), "channel", "token", shape=lambda s: s.reshape(-1)
    ),
    "modelopt block": Kind(
        _modelopt("FP8_PB_WO"), "block", "group", shape=lambda s: s[:, None, :, None].contiguous()
    ),
    "quark tensor": Kind(_quark("per_tensor", "per_tensor", True), "tensor", "tensor"),
    "quark tensor static": Kind(_quark("per_tensor", "per_tensor", False), "tensor", "static"),
    "quark channel": Kind(
        _quark("per_channel", "per_channel", True), "channel", "token", shape=lambda s: s.reshape(-1)
    ),
    "quark block": Kind(_quark("per_block", "per_group", True), "block", "group"),
    "fbgemm channel": Kind(_fbgemm, "channel", "token"),
}
"""Who wrote it and how, in words -> the kind."""


def quantize(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Quantize ``weight`` ``[N, H]``: codes float8_e4m3fn and the scales of :class:`Kind`, fp32."""
    values = weight.float()
    if weights == "tensor":
        scale = (values.abs().max() / R).clamp(min=1e-12)
        return (values / scale).to(torch.float8_e4m3fn), scale
    if weights == "channel":
        scale = (values.abs().amax(1, keepdim=True) / R).clamp(min=1e-12)
        return (values / scale).to(torch.float8_e4m3fn), scale
    rows, columns = (-(-size // BLOCK) for size in values.shape)
    padded = values.new_zeros(rows * BLOCK, columns * BLOCK)
    padded[: values.shape[0], : values.shape[1]] = values
    largest = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3))
    scale = (largest / R).clamp(min=1e-12)
    return (values / _spread(scale, values.shape)).to(torch.float8_e4m3fn), scale


def dequantize(codes: Tensor, scale: Tensor, weights: str) -> Tensor:
    """What ``codes`` ``[N, H]`` with a scale of :func:`quantize` stand for, float32."""
    return codes.float() * (_spread(scale, codes.shape) if weights == "block" else scale)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Block scales, one for each element of ``shape``."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def is_linear(name: str) -> bool:
    """Whether a tensor of a Llama checkpoint is the weight of a linear of a decoder layer."""
    return ".layers." in name and name.endswith("_proj.weight")


def load(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint directory."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def write(
    source: Path,
    folder: Path,
    kind: str,
    *,
    calibration: Iterable[Tensor] = (),
    leave: Callable[[str], bool] = lambda name: False,
) -> Path:
    """Make a checkpoint of a kind in ``folder`` of the bf16 checkpoint ``source``, and return ``folder``.

    Args:
        kind: a key of :data:`KINDS`.
        calibration: token ids, ``[T]`` each, that show how large activations get, for kinds that want to
        know.
        leave: of a linear's name, whether it stays bf16.
    """
    how = KINDS[kind]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "fp8"))
    largest = _largest_inputs(source, calibration) if how.activations == "static" else {}
    tensors = load(source)
    routers = [name.removesuffix(".weight") for name in tensors if name.endswith(".mlp.gate.weight")]
    ignore = ["lm_head", *routers]
    for name in list(filter(is_linear, tensors)):
        layer = name.removesuffix(".weight")
        if leave(layer):
            ignore.append(layer)
            continue
        codes, scale = quantize(tensors.pop(name), how.weights)
        tensors[name] = codes
        tensors[f"{layer}.{how.scale}"] = how.shape(scale)
        if how.activations == "static":
            tensors[f"{layer}.input_scale"] = largest[layer] / R
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = how.config(ignore)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _model(source: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if is_linear(f"{name}.weight")}


@torch.no_grad()
def _largest_inputs(source: Path, calibration: Iterable[Tensor]) -> dict[str, Tensor]:
    """The largest magnitude that each linear gets to read, fp32 of no dimensions."""
    model = _model(source)
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: Any) -> None:
            largest[name] = max(largest.get(name, torch.tensor(0.0)), args[0].abs().max())

        return hook

    for name, linear in _linears(model).items():
        linear.register_forward_pre_hook(watch(name))
    for ids in calibration:
        model(ids.reshape(1, -1))
    return largest


def rounded(x: Tensor, activations: str, static_scale: Tensor | None = None) -> Tensor:
    """``x`` ``[..., H]`` float32 as FP8 codes times their scales, float32, as a kind has it."""
    if activations == "none":
        return x
    if activations == "group":
        width = x.shape[-1]
        groups = nn.functional.pad(x, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
        return rounded(groups, "token").flatten(-2)[..., :width]
    if activations == "static":
        assert static_scale is not None
        scale = static_scale
    else:
        largest = x.abs().max() if activations == "tensor" else x.abs().amax(-1, keepdim=True)
        scale = (largest / R).clamp(min=1e-12)
    return (x / scale).clamp(-R, R).to(torch.float8_e4m3fn).float() * scale


def bound(folder: Path) -> float:
    """What activations are clipped to before they are quantized: FBGEMM has a bound, others infinity."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config.get("activation_scale_ub", float("inf"))


def reference_model(source: Path, folder: Path, kind: str, activations: str | None = None) -> nn.Module:
    """The float32 model that a checkpoint of a kind stands for: transformers' own, with the linears replaced.

    Args:
        source: the bf16 checkpoint it was made of.
        folder: what :func:`write` made.
        activations: another way to quantize activations than the kind's.
    """
    how, tensors, model = KINDS[kind], load(folder), _model(source)
    activations, limit = activations or how.activations, bound(folder)
    for name, linear in _linears(model).items():
        codes = tensors[f"{name}.weight"]
        if codes.dtype != torch.float8_e4m3fn:
            continue
        scale = tensors[f"{name}.{how.scale}"]
        scale = scale.reshape(-1, 1) if how.weights == "channel" else scale.squeeze()
        if how.weights == "block":
            scale = scale.reshape([-(-size // BLOCK) for size in codes.shape])
        linear.weight.data = dequantize(codes, scale, how.weights)
        static_scale = tensors.get(f"{name}.input_scale")

        def hook(module: nn.Module, args: Any, static_scale: Tensor | None = static_scale) -> Any:
            return (rounded(args[0].clamp(-limit, limit), activations, static_scale),)

        linear.register_forward_pre_hook(hook)
    return model


@torch.no_grad()
def logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Return ``[T - 1]``: what ``model`` gives each of ``ids`` ``[T]`` but the first."""
    scores = model(ids.reshape(1, -1)).logits[0].log_softmax(-1)
    return scores[:-1].gather(1, ids[1:, None].long()).squeeze(1)
