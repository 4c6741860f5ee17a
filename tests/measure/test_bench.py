"""The same model for vLLM in INT8 and for llama.cpp, and what ``bench`` refuses and writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import is_linear, load, write_llama
from rich.console import Console
from typer.testing import CliRunner
from vllm_models import tiny_config, write_checkpoint

from vllm_neuron_rmsq import checkpoint
from vllm_neuron_rmsq.cli import app
from vllm_neuron_rmsq.cli.bench import show
from vllm_neuron_rmsq.measure import bench, results, rivals


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A bf16 checkpoint, and what ``convert`` made of it in ``fp8/`` beside it."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder / "bf16")
    checkpoint.convert(folder / "bf16", folder / "fp8")
    return folder


def test_int8_is_within_half_a_step(llama, tmp_path):
    rivals.int8(llama / "bf16", llama / "fp8", tmp_path / "int8")
    made, source = load(tmp_path / "int8"), load(llama / "bf16")
    for name, tensor in source.items():
        if is_linear(name):
            scale = made[f"{name}_scale"]
            assert made[name].dtype == torch.int8
            assert ((made[name] * scale - tensor.float()).abs() <= 0.501 * scale).all()
        else:
            torch.testing.assert_close(made[name], tensor)
    how = json.loads((tmp_path / "int8/config.json").read_text())["quantization_config"]
    assert how["format"] == "int-quantized"
    group = how["config_groups"]["group_0"]
    assert {group[part]["type"] for part in ("weights", "input_activations")} == {"int"}


def test_the_gguf_is_the_model(llama, tmp_path):
    """Read back by transformers, which knows llama.cpp's order of a head's rows."""
    import gguf

    path = rivals.gguf_q8(llama / "bf16", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    source = load(llama / "bf16")
    assert len(tensors) == len(source)
    down = source["model.layers.0.mlp.gate_proj.weight"].float().numpy()
    np.testing.assert_allclose(tensors["blk.0.ffn_gate.weight"], down, atol=np.abs(down).max() / 200)
    # A head's rows 0, d/2, 1, d/2 + 1, ... for what Hugging Face has as 0, 1, ..., d/2, d/2 + 1, ...
    q = source["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    half = q.shape[0] // 4 // 2
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight"][1], q[half], atol=np.abs(q).max() / 200)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sides": ("bf16",)}, "sides: expected plugin FP8 and others of"),
        ({"clients": (1, 17)}, r"clients: expected numbers from 1 to 16, got \[1, 17\]"),
        ({"prompt": 5000}, "prompt: expected 0 to 1022 tokens, got 5000"),
        ({"rounds": 0}, "rounds, tokens: expected at least 1 of each"),
    ],
)
def test_what_is_refused(llama, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        bench.compare(llama / "bf16", tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def found() -> bench.Comparison:
    speeds = {
        "decode x 1": {"plugin FP8": 31.0, "bf16": 19.0},
        "prefill 900": {"plugin FP8": 453.0, "bf16": 487.0},
    }
    memory = {"plugin FP8": 1_400_000_000, "bf16": 2_400_000_000}
    return bench.Comparison("m", speeds, {}, memory, {"llama.cpp Q8_0": "xllamacpp is not installed"})


def test_lines_and_table(tmp_path):
    results.append(tmp_path / "bench.csv", found().lines())
    first, second = results.read(tmp_path / "bench.csv")
    assert (first["model"], first["work"], first["plugin FP8 tok/s"], first["bf16 MB"]) == (
        "m",
        "decode x 1",
        "31",
        "2400",
    )
    assert second["bf16 tok/s"] == "487"
    console = Console(width=200, record=True)
    show(found(), console)
    text = console.export_text()
    assert "not measured: llama.cpp Q8_0: xllamacpp is not installed" in text
    assert all(title.strip() for row in text.splitlines() if "┃" in row for title in row.split("┃")[1:-1])


def test_the_picture(tmp_path):
    bench.plot(found(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_is_not_there(tmp_path):
    result = CliRunner().invoke(app, ["bench", str(tmp_path / "nothing"), "--cache", str(tmp_path)])
    assert "nothing: is not there; expected a bf16 checkpoint directory or a .gguf file" in str(
        result.exception
    )


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--csv", "no/bench.csv"), "no/bench.csv: cannot be written, no is no directory"),
        (("--csv", "."), ".: cannot be written, is a directory"),
        (("--plot", "bench.docx"), "bench.docx: expected the name of a picture"),
    ],
)
def test_a_file_that_cannot_be_written_is_found_out_first(option, said, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app, ["bench", str(llama / "bf16"), "--cache", str(tmp_path / "new"), *option]
    )
    assert said in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # six servers, four of which compile the model
def test_every_side_answers(tmp_path, smollm2_bf16):
    """Of a tiny Llama with SmolLM2's tokenizer, which vLLM's servers want."""
    source = tmp_path / "bf16"
    write_checkpoint(tiny_config("llama", vocab_size=49152, max_position_embeddings=2048), source, fp8=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((smollm2_bf16 / name).read_bytes())
    measured = bench.compare(source, tmp_path / "cache", clients=(2,), prompt=64, rounds=1, tokens=4)
    assert set(measured.speeds) == {"decode x 2", "prefill 64"}
    for speeds in measured.speeds.values():
        assert set(speeds) == set(bench.SIDES)
    assert not measured.left_out
