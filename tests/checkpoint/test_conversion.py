"""Conversion to FP8: the format, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import is_linear, load, write_llama
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from vllm_neuron_rmsq import weights
from vllm_neuron_rmsq.checkpoint import convert, unpack_gguf
from vllm_neuron_rmsq.target import TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoint(tmp_path, target, tied, shards):
    source, out = write_llama(tmp_path / "bf16", tied=tied, shards=shards), tmp_path / "fp8"
    told: list[tuple[int, int, str]] = []
    report = convert(source, out, target, lambda *step: told.append(step))
    assert len(report.layers) == 14
    before, after = load(source), load(out)
    linears = {name for name in before if is_linear(name)}
    scales = {name.removesuffix("weight") + "weight_scale" for name in linears}
    assert set(after) == set(before) | scales
    assert ("lm_head.weight" in after) == (not tied)
    for name, tensor in before.items():
        if name in linears:
            expected = weights.quantize(tensor, TARGETS[target])
            assert torch.equal(after[name].view(torch.uint8), expected[0].view(torch.uint8))
            assert torch.equal(after[name.removesuffix("weight") + "weight_scale"], expected[1])
        else:
            assert torch.equal(after[name], tensor)
    assert [step[:2] for step in told] == [(done, len(before)) for done in range(1, len(before) + 1)]
    assert {name for _, _, name in told} == set(before)
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert {name: index["weight_map"][name] for name in after} == index["weight_map"]
        for name, file in index["weight_map"].items():
            assert name in load_file(out / file)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())
    assert {p.name for p in out.iterdir() if p.suffix != ".safetensors"} - {
        "model.safetensors.index.json"
    } == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16", "fp8"]


def test_config_is_what_compressed_tensors_writes(tmp_path):
    source, out = write_llama(tmp_path / "bf16"), tmp_path / "fp8"
    convert(source, out)
    config = json.loads((out / "config.json").read_text())
    ours = QuantizationConfig.model_validate(config.pop("quantization_config"))
    theirs = QuantizationConfig(
        config_groups={"FP8_DYNAMIC": ["Linear"]},
        format="float-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    (scheme,), (preset,) = ours.config_groups.values(), theirs.config_groups.values()
    assert scheme == preset
    for field in ("quant_method", "format", "quantization_status", "ignore", "kv_cache_scheme"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert config == json.loads((source / "config.json").read_text())


def test_linears_outside_the_usual_places_are_left_and_listed(tmp_path):
    """A router decides on small differences and is no ``_proj``: vLLM must be told it is not quantized."""
    source, out = write_llama(tmp_path / "bf16"), tmp_path / "fp8"
    weights = load(source)
    router = "model.layers.0.mlp.gate.weight"
    save_file(weights | {router: torch.randn(4, 32).bfloat16()}, source / "model.safetensors")
    convert(source, out)
    assert load(out)[router].dtype == torch.bfloat16
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]


def test_biases_stay(tmp_path):
    source, out = write_llama(tmp_path / "bf16", attention_bias=True), tmp_path / "fp8"
    convert(source, out)
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(load(out)[name], load(source)[name])


def test_an_existing_directory_is_never_touched(tmp_path):
    source, out = write_llama(tmp_path / "bf16"), tmp_path / "fp8"
    out.mkdir()
    with pytest.raises(ValueError, match="exists already; choose another name or delete it first"):
        convert(source, out)
    assert list(out.iterdir()) == []
    with pytest.raises(ValueError, match="is not a directory; make it first"):
        convert(source, tmp_path / "nowhere" / "fp8")


def test_a_failure_half_way_leaves_nothing(tmp_path):
    source, out = write_llama(tmp_path / "bf16", shards=3), tmp_path / "fp8"

    def stop(done: int, total: int, name: str) -> None:
        if done == total - 1:
            assert list(tmp_path.glob(".fp8.partial/**/*.safetensors")), "something had been written"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["bf16"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 3 // 4)


def edit_config(folder: Path, **change) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_weights(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load(folder) | {name: tensor}, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"
NAN = torch.full((32, 32), float("nan")).bfloat16()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "bf16: has no config.json; expected a Hugging Face checkpoint",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is no valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object, got list"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "bf16: has neither model.safetensors nor model.safetensors.index.json; only safetensors",
        ),
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors: is damaged or truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: is damaged or truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"<html>" * 99), "is damaged or truncated"),
        (
            lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}),
            r"bf16: is quantized already \(fp8\); give the original",
        ),
        (
            lambda f: edit_weights(f, Q, torch.zeros(32, 32).to(torch.float8_e4m3fn)),
            rf"bf16: is quantized already \({Q} is F8_E4M3\); give the original .* or .* with --from-fp8",
        ),
        (lambda f: edit_weights(f, Q, NAN), f"{Q} holds NaN or Inf; the checkpoint is broken"),
        (lambda f: edit_weights(f, "model.norm.weight", NAN[0]), "model.norm.weight holds NaN or Inf"),
        (
            lambda f: save_file({"h.0.attn.c_attn.weight": NAN[:, :0]}, f / "model.safetensors"),
            "bf16: has no decoder linears to quantize; expected names like .*, got h.0.attn.c_attn.weight",
        ),
    ],
)
def test_bad_checkpoints(tmp_path, damage, message):
    source = write_llama(tmp_path / "bf16")
    damage(source)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["bf16"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, shard: shard.unlink(), "is not there though model.safetensors.index.json names it"),
        (lambda f, shard: truncate(shard), "is damaged or truncated"),
        (
            lambda f, shard: save_file({"other": torch.zeros(1)}, shard),
            "model.safetensors.index.json names tensors that are in no file: ",
        ),
        (
            lambda f, shard: (f / "model.safetensors.index.json").write_text("{}"),
            "model.safetensors.index.json: has no weight_map",
        ),
    ],
)
def test_bad_shards(tmp_path, damage, message):
    source = write_llama(tmp_path / "bf16", shards=3)
    damage(source, sorted(source.glob("*.safetensors"))[1])
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["bf16"]


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"nothing: is not there; expected a checkpoint directory or a \.gguf file"
    ):
        convert(tmp_path / "nothing", tmp_path / "fp8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip archive", b"not a model" * 1000])
def test_a_file_that_is_no_gguf(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf: is no GGUF file"):
        convert(tmp_path / "model.gguf", tmp_path / "fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """A GGUF file of a random Llama, weights in fp32, with a tokenizer of one letter a token."""
    from gguf import GGUFWriter, TokenType

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    generator = np.random.default_rng(0)
    vocabulary = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    shapes = {
        "token_embd": (len(vocabulary), 32),
        "output": (len(vocabulary), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(gguf, tmp_path):
    assert len(convert(gguf, tmp_path / "fp8").layers) == 7
    unpack_gguf(gguf, tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "again")
    one, other = load(tmp_path / "fp8"), load(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8)) for k in one)
    assert all(t.dtype == torch.bfloat16 for t in load(tmp_path / "bf16").values())
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert str(gguf.parent) not in json.dumps(config), "no path of the machine that made it"
    assert (tmp_path / "fp8" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "bf16", "fp8"]


@pytest.mark.parametrize("part", [0.01, 0.1, 0.8, 0.99])
def test_a_truncated_gguf(gguf, tmp_path, part):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf.read_bytes()[: int(gguf.stat().st_size * part)])
    with pytest.raises(ValueError, match=r"damaged.gguf: cannot be read as a GGUF model \("):
        convert(damaged, tmp_path / "fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.gguf"]


def test_smollm2(smollm2_bf16, smollm2_fp8):
    config = json.loads((smollm2_fp8 / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (576, 30)
    weights, original = load(smollm2_fp8), load(smollm2_bf16)
    quantized = {name for name, t in weights.items() if t.dtype == torch.float8_e4m3fn}
    assert quantized == {name for name in original if is_linear(name)}
    assert len(quantized) == 210
    assert max(weights[name].float().abs().max() for name in quantized) == 240
    assert "lm_head.weight" not in weights
    assert "chat_template.jinja" in {p.name for p in smollm2_fp8.iterdir()}
