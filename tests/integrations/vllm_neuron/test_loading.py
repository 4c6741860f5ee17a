"""Checkpoints that are damaged are named, and what the parameters are filled with."""

from __future__ import annotations

import shutil

import pytest
import torch
from neuron_llamas import write
from neuron_standin.run import drive
from safetensors.torch import load_file, save_file

NAME = "model.layers.1.mlp.up_proj"


def nan_codes(tensors):
    tensors[f"{NAME}.weight"].view(torch.uint8)[300, 7] = 0xFF


def no_scale(tensors):
    del tensors[f"{NAME}.weight_scale"]


def no_weight(tensors):
    del tensors[f"{NAME}.weight"]


def short_scale(tensors):
    tensors[f"{NAME}.weight_scale"] = tensors[f"{NAME}.weight_scale"][:-1].clone()


def scale_of_the_input(tensors):
    tensors[f"{NAME}.weight_scale"] = torch.ones(1, 256)


def infinite_scale(tensors):
    tensors[f"{NAME}.weight_scale"][5] = float("inf")


def bf16_weight(tensors):
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].bfloat16()


def narrow_weight(tensors):
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"][:, :128].clone()


def bias(tensors):
    tensors[f"{NAME}.bias"] = torch.ones(512)


def no_norm(tensors):
    del tensors["model.layers.0.input_layernorm.weight"]


DAMAGED = {
    nan_codes: f"ValueError: {NAME}.weight: holds NaN",
    no_scale: f"['{NAME}.weight_scale']",
    no_weight: f"['{NAME}.weight']",
    short_scale: f"ValueError: {NAME}.weight_scale: expected 512 scales, one a channel, or 1; got shape "
    "[511, 1]",
    scale_of_the_input: f"ValueError: {NAME}.weight_scale: expected 512 scales",
    infinite_scale: f"ValueError: {NAME}.weight_scale: holds NaN or Inf",
    bf16_weight: f"ValueError: {NAME}.weight: expected FP8 codes, F8_E4M3 of shape [512, 256], got BF16",
    narrow_weight: f"ValueError: {NAME}.weight: expected FP8 codes, F8_E4M3 of shape [512, 256], got F8_E4M3 "
    "of shape [512, 128]",
    bias: f"ValueError: {NAME}.bias: a bias that config.json does not speak of",
    no_norm: "['model.layers.0.input_layernorm.weight']",
}


@pytest.fixture(scope="module")
def errors(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    whole = write(folder / "whole", files=2)
    tensors = {k: v for file in whole.glob("*.safetensors") for k, v in load_file(file).items()}
    models = {}
    for damage in DAMAGED:
        models[damage] = folder / damage.__name__
        models[damage].mkdir()
        shutil.copy(whole / "config.json", models[damage])
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        damage(changed)
        save_file(changed, models[damage] / "model.safetensors")
    models["shard"] = folder / "shard"
    shutil.copytree(whole, models["shard"])
    (file,) = models["shard"].glob("*2-of-00002.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1000])
    models["header"] = folder / "header"
    shutil.copytree(whole, models["header"])
    (file,) = models["header"].glob("*2-of-00002.safetensors")
    file.write_bytes(content[:100])
    models["missing file"] = folder / "missing"
    shutil.copytree(whole, models["missing file"])
    next(models["missing file"].glob("*2-of-00002.safetensors")).unlink()
    jobs = [
        {"model": str(m), "rmsq": {"backend": "torch"}, "tokens": tokens, "prompt": 16, "fails": True}
        for m in models.values()
    ]
    results = dict(zip(models, drive(jobs, folder / "run"), strict=True))
    return {name: result["error"] for name, result in results.items()}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage.__name__)
def test_a_damaged_tensor_is_named(errors, damage):
    assert DAMAGED[damage] in errors[damage]


def test_a_shard_that_was_cut_off(errors):
    named = errors["shard"].split(": ")[1]
    assert named.startswith("model.") and "model-00002-of-00002.safetensors is cut off" in errors["shard"]
    assert "is cut off within its header" in errors["header"]


def test_a_shard_that_is_not_there(errors):
    assert "model-00002-of-00002.safetensors" in errors["missing file"]


class TestParts:
    """What a rank's parameters are, against the checkpoint's tensors."""

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, tmp_path_factory, tokens):
        folder = tmp_path_factory.mktemp("parts")
        checkpoint = write(folder / "plain")
        tensors = load_file(checkpoint / "model.safetensors")
        # Of the tensors stacked into one parameter, one is within Trainium2's range.
        name = "model.layers.0.self_attn.k_proj"
        codes, scale = tensors[f"{name}.weight"].float() / 2, tensors[f"{name}.weight_scale"].float() * 2
        tensors[f"{name}.weight"] = codes.to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = scale.bfloat16()
        # And of one, the only code beyond it is another rank's.
        name = "model.layers.0.mlp.up_proj"
        codes = tensors[f"{name}.weight"].float().clamp(-240, 240)
        codes[-1, 0] = 448.0
        tensors[f"{name}.weight"] = codes.to(torch.float8_e4m3fn)
        save_file(tensors, checkpoint / "model.safetensors")
        jobs = [
            {
                "model": str(checkpoint),
                "rmsq": {"backend": "torch", "attention": "fp8", "target": target},
                "tokens": tokens[:17],
                "prompt": 16,
                "parameters": True,
            }
            for target in ("trn2", "trn3")
        ]
        return tensors, drive(jobs, folder / "run", ranks=2)

    def test_halving_goes_by_whole_tensors(self, loaded):
        tensors, (trn2, trn3) = loaded
        for result, halves in ((trn2, True), (trn3, False)):
            parameters = result["parameters"]
            prefix = "model.layers.0.self_attn"
            # Rank 0 of 2: four of eight query heads, one of two KV heads.
            parts = [("q", 128, halves), ("k", 32, False), ("v", 32, halves)]
            codes, scales = [], []
            for part, rows, halved in parts:
                weight = tensors[f"{prefix}.{part}_proj.weight"][:rows].float()
                scale = tensors[f"{prefix}.{part}_proj.weight_scale"][:rows, 0].float()
                codes.append((weight / 2 if halved else weight).to(torch.float8_e4m3fn))
                scales.append(scale * 2 if halved else scale)
            expected = torch.cat([c.view(torch.uint8) for c in codes])
            assert torch.equal(parameters[f"{prefix}.qkv_proj.weight"], expected)
            assert torch.equal(parameters[f"{prefix}.qkv_proj.weight_scale"], torch.cat(scales))
            up = tensors["model.layers.0.mlp.up_proj.weight_scale"][:256, 0].float()
            assert torch.equal(
                parameters["model.layers.0.mlp.gate_up_proj.weight_scale"][256:], up * (1 + halves)
            )
        assert "(20 linears halved)" in trn2["report"] and "(0 linears halved)" in trn3["report"]

    def test_a_row_parallel_linear_has_its_columns_and_every_scale(self, loaded):
        tensors, (_, trn3) = loaded
        name = "model.layers.2.mlp.down_proj"
        weight = trn3["parameters"][f"{name}.weight"]
        assert torch.equal(weight, tensors[f"{name}.weight"][:, :256].view(torch.uint8))
        scale = trn3["parameters"][f"{name}.weight_scale"]
        assert torch.equal(scale, tensors[f"{name}.weight_scale"][:, 0].float())
