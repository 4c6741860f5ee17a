"""What ``checkpoint.inspect`` finds in sound, odd and broken checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import edit, load, write_llama
from safetensors.torch import save_file

from vllm_neuron_rmsq import weights
from vllm_neuron_rmsq.checkpoint import convert, inspect
from vllm_neuron_rmsq.target import TRN3

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def fp8(tmp_path) -> Path:
    """A checkpoint with codes up to ±448."""
    convert(write_llama(tmp_path / "bf16"), tmp_path / "fp8", "trn3")
    return tmp_path / "fp8"


def of(found, name: str):
    return next(weight for weight in found.weights if weight.name == f"{name}.weight")


def test_counts_are_those_of_the_codes(fp8):
    told: list[tuple[int, int, str]] = []
    found = inspect(fp8, progress=lambda *step: told.append(step))
    assert found.sound
    assert [step[:2] for step in told] == [(done, 14) for done in range(1, 15)]
    tensors = load(fp8)
    assert {weight.name for weight in found.weights} == {n for n, t in tensors.items() if t.itemsize == 1}
    assert found.others == {
        "BF16": (7, sum(t.numel() for t in tensors.values() if t.dtype == torch.bfloat16))
    }
    for weight in found.weights:
        codes = tensors[weight.name].view(torch.uint8)
        magnitudes = codes & 0x7F
        assert weight.magnitudes == torch.bincount(magnitudes.flatten(), minlength=128).tolist()
        assert weight.beyond == int((magnitudes > 0x77).sum()) > 0
        halved, _ = weights.halve(codes, torch.ones(1))
        back = weights.decode(halved) * 2
        assert weight.rounded == int((back != weights.decode(codes)).sum())
        scale = tensors[f"{weight.name}_scale"]
        before, after = weights.decode(codes) * scale, back * scale
        assert weight.halving_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
        assert (weight.scheme, weight.activations) == ("per-channel", "dynamic")


def test_beyond_is_of_the_target(fp8):
    assert all(weight.beyond == 0 for weight in inspect(fp8, "trn3").weights)
    assert inspect(fp8, "trn3").worst(3) == []
    assert len(inspect(fp8).worst(3)) == 3


def found_names(found) -> list[str]:
    return [weight.name for weight in found]


def test_layers_are_in_their_order(tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (10, 2, 0)]
    save_file(
        {n: torch.ones(1, 4).to(torch.float8_e4m3fn) for n in names}
        | {f"{n}_scale": torch.ones(1) for n in names},
        tmp_path / "some.safetensors",
    )
    found = inspect(tmp_path / "some.safetensors")
    assert found_names(found.weights) == sorted(names, key=lambda n: int(n.split(".")[2]))
    assert {weight.scheme for weight in found.weights} == {"per-tensor"}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({f"{Q}.weight_scale": torch.full((32, 1), float("nan"))}, ["32 scales that are NaN or Inf"]),
        ({f"{Q}.weight_scale": torch.full((32, 1), -1.0)}, ["32 negative scales"]),
        ({f"{Q}.weight_scale": torch.zeros(32, 1)}, ["32 scales of zero"]),
        ({f"{Q}.weight_scale": torch.full((32, 1), 1e-40)}, ["32 denormal scales"]),
        (
            {f"{Q}.weight": torch.full((32, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)},
            ["1024 NaN codes"],
        ),
        ({f"{Q}.weight_scale": None}, ["no scale"]),
    ],
)
def test_broken_weights_are_named(fp8, change, broken):
    edit(fp8, change)
    found = inspect(fp8)
    assert not found.sound
    assert found.worst(1)[0] is of(found, Q)
    assert of(found, Q).broken == broken
    assert not any(weight.broken for weight in found.weights if weight.name != f"{Q}.weight")


def test_dead_channels_are_counted_and_no_fault(fp8):
    codes = load(fp8)[f"{Q}.weight"].view(torch.uint8)
    codes[3:5] = 0
    codes[7] = 0x80  # minus zero
    scale = load(fp8)[f"{Q}.weight_scale"]
    scale[3] = 0
    edit(fp8, {f"{Q}.weight": codes.view(torch.float8_e4m3fn), f"{Q}.weight_scale": scale})
    found = inspect(fp8)
    assert found.sound
    assert of(found, Q).dead == 3


def test_blocks_static_activations_and_experts_of_one_tensor(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 200, 256, generator=generator)
    codes, scales = zip(*(weights.quantize(w, TRN3, blocks=True) for w in weight), strict=True)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": codes[0],
        "model.layers.0.mlp.up_proj.weight_scale_inv": scales[0],
        "model.layers.0.mlp.up_proj.input_scale": torch.ones(1),
        "model.layers.0.mlp.experts.up_proj": torch.stack(codes),
        "model.layers.0.mlp.experts.up_proj_scale": torch.stack(scales),
    }
    save_file(tensors, tmp_path / "some.safetensors")
    found = inspect(tmp_path / "some.safetensors")
    assert found.sound
    assert {weight.scheme for weight in found.weights} == {"blocks of 128 x 128"}
    experts, linear = found.weights
    assert (linear.activations, experts.activations) == ("static", "dynamic")
    before = torch.stack([weights.decode(c.view(torch.uint8)) for c in codes])
    by_element = torch.stack([weights.expand_block_scale(s, 200, 256) for s in scales])
    halved, _ = weights.halve(torch.stack(codes).view(torch.uint8), torch.ones(1))
    difference = (weights.decode(halved) * 2 - before) * by_element
    assert experts.halving_error == pytest.approx(
        float(difference.norm() / (before * by_element).norm()), rel=1e-3
    )


def test_what_is_missing_is_said_and_the_rest_is_read(tmp_path):
    source = write_llama(tmp_path / "bf16", shards=3)
    convert(source, tmp_path / "fp8")
    shards = sorted((tmp_path / "fp8").glob("*.safetensors"))
    os.truncate(shards[0], shards[0].stat().st_size - 100)
    shards[1].unlink()
    found = inspect(tmp_path / "fp8")
    assert not found.sound
    assert f"{shards[0]}: is damaged or truncated" in found.problems[0]
    assert f"{shards[1]}: is not there though" in found.problems[1]
    assert 0 < len(found.weights) < 14


def test_missing_layers_are_said(fp8):
    config = json.loads((fp8 / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert inspect(fp8).problems == [f"{fp8}: has no weights of layers 2, 3"]


def test_a_checkpoint_without_fp8(tmp_path):
    found = inspect(write_llama(tmp_path / "bf16"))
    assert found.sound
    assert not found.weights
    assert list(found.others) == ["BF16"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", r"is not there; expected a checkpoint directory or a \.safetensors file"),
        ("", "has no config.json"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, path, message):
    with pytest.raises(ValueError, match=message):
        inspect(tmp_path / path)
