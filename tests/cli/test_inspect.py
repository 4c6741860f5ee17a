"""``vllm-neuron-rmsq inspect``: what it says, draws and exits with."""

from __future__ import annotations

import json

import torch
from checkpoints import edit, write_llama
from typer.testing import CliRunner

from vllm_neuron_rmsq.checkpoint import convert
from vllm_neuron_rmsq.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "120"})


def test_a_sound_checkpoint(tmp_path):
    fp8 = tmp_path / "with [brackets]"
    convert(write_llama(tmp_path / "bf16"), fp8, "trn3")
    picture = tmp_path / "codes.png"
    result = run(fp8, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert f"{fp8}: whole; 14 FP8 weights, 14 to be halved for trn2" in result.output
    assert "model.layers.*.self_attn.q_proj (2)" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    about = json.loads(run(fp8, "--json").output)
    assert about["sound"] and len(about["weights"]) == 14
    assert run(fp8, "--target", "trn3").output.rstrip().endswith("all within the range of trn3")


def test_a_broken_checkpoint(tmp_path):
    convert(write_llama(tmp_path / "bf16"), tmp_path / "fp8")
    edit(tmp_path / "fp8", {"model.layers.0.mlp.up_proj.weight_scale": torch.full((48, 1), float("nan"))})
    result = run(tmp_path / "fp8")
    assert result.exit_code == 1
    assert "1 of 14 FP8 weights are broken" in result.output
    assert json.loads(run(tmp_path / "fp8", "--json").output)["sound"] is False
