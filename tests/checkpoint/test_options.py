"""What ``convert`` makes of a checkpoint when it is asked for more than the default."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fp8_kinds
import pytest
import torch
from checkpoints import edit, is_linear, load, write_llama, write_model, write_tokenizer
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_models import SIZES

from vllm_neuron_rmsq import weights
from vllm_neuron_rmsq.checkpoint import convert, inspect
from vllm_neuron_rmsq.target import TARGETS, TRN2

Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
TEXT = "one two three four " * 300


def how(folder: Path) -> dict:
    """Return ``quantization_config``, which compressed-tensors itself can read."""
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(found)
    return found


def value(folder: Path, module: str) -> torch.Tensor:
    """Return what a linear's codes and scales stand for."""
    tensors = load(folder)
    return tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"]


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_one_scale_for_a_weight(target, tmp_path):
    source, out = write_llama(tmp_path / "bf16", shards=3), tmp_path / "fp8"
    report = convert(source, out, target, scheme="per-tensor")
    before, after = load(source), load(out)
    for name in filter(is_linear, before):
        scale = before[name].float().abs().max() / TARGETS[target].fp8_max
        assert torch.equal(after[f"{name}_scale"], scale.view(1))
        expected = weights.encode(before[name].float(), scale, TARGETS[target])
        assert torch.equal(after[name].view(torch.uint8), expected.view(torch.uint8))
    assert how(out)["config_groups"]["group_0"]["weights"]["strategy"] == "tensor"
    layer = next(layer for layer in report.layers if layer.name == Q)
    original = before[f"{Q}.weight"].float()
    error = (value(out, Q) - original).norm() / original.norm()
    assert layer.error == pytest.approx(float(error), rel=1e-4)


def test_static_scales_are_the_largest_inputs_on_the_text(tmp_path):
    source, out = write_llama(tmp_path / "bf16", shards=3), tmp_path / "fp8"
    write_tokenizer(source)
    told: list[str] = []
    convert(source, out, "trn2", lambda *step: told.append(step[2]), scheme="static", calibration_text=TEXT)
    assert told.count("calibration") == math.ceil(1200 / 512)
    after = load(out)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    largest: dict[str, float] = {}
    for name, module in model.named_modules():
        if is_linear(f"{name}.weight"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: largest.update(
                    {name: max(largest.get(name, 0.0), float(inputs[0].abs().max()))}
                )
            )
    with torch.no_grad():
        for window in (
            AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt").input_ids[0].split(512)
        ):
            model(window[None])
    assert len(largest) == 14
    for name, found in largest.items():
        assert after[f"{name}.input_scale"].item() == pytest.approx(found / 240)
        expected = weights.quantize(load(source)[f"{name}.weight"], TRN2)
        assert torch.equal(after[f"{name}.weight"].view(torch.uint8), expected[0].view(torch.uint8))
    activations = how(out)["config_groups"]["group_0"]["input_activations"]
    assert (activations["strategy"], activations["dynamic"]) == ("tensor", False)
    assert {weight.activations for weight in inspect(out).weights} == {"static"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "static"}, "scheme static needs a text for calibration"),
        (
            {"calibration_text": TEXT},
            "scheme static needs a text for calibration, and the other schemes use none",
        ),
        ({"scheme": "static", "calibration_text": ""}, "calibration text: is empty"),
        ({"scheme": "per-row"}, "scheme: expected one of per-channel, per-tensor, static; got 'per-row'"),
        (
            {"ignore": ["model.layers.9.mlp.up_proj"]},
            r"no linear is called model\.layers\.9\.mlp\.up_proj; expected",
        ),
        ({"include": ["re:.*w1"]}, r"no linear is called re:\.\*w1; expected names like model\.layers\.0\."),
        ({"ignore": ["re:("]}, r"re:\(: is no regular expression"),
        (
            {"ignore": [Q]},
            r"vLLM holds .*k_proj and .*q_proj in one weight; quantize all of .*, or ignore them all",
        ),
        ({"ignore": ["re:.*_proj"]}, "has no decoder linears to quantize"),
        (
            {"include": ["model.embed_tokens"], "from_fp8": True},
            "from_fp8: keeps the linears that are in FP8 already",
        ),
        ({"from_fp8": True}, "holds no FP8 weights; leave --from-fp8 out"),
        ({"target": "trn1"}, "trn1"),
    ],
)
def test_what_does_not_go_together(tmp_path, options, message):
    source = write_llama(tmp_path / "bf16")
    write_tokenizer(source)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "fp8", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_ignored_linears_stay_and_are_named(tmp_path):
    source, out = write_llama(tmp_path / "bf16"), tmp_path / "fp8"
    ignored = ["model.layers.1.mlp.down_proj", r"re:.*\.0\.self_attn\.[qkv]_proj"]
    report = convert(source, out, ignore=ignored)
    left = {"model.layers.1.mlp.down_proj", *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")}
    before, after = load(source), load(out)
    assert len(report.layers) == 10
    assert set(report.left) == left | {"lm_head"}
    assert set(how(out)["ignore"]) == left | {"lm_head"}
    for name in left:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
        assert report.left[name] == before[f"{name}.weight"].numel()


def test_included_linears_are_quantized(tmp_path):
    source, out = write_llama(tmp_path / "bf16"), tmp_path / "fp8"
    edit(source, {"model.layers.0.mlp.gate.weight": torch.randn(4, 32).bfloat16()})
    report = convert(source, out, include=["model.layers.0.mlp.gate"])
    assert len(report.layers) == 15
    assert load(out)["model.layers.0.mlp.gate.weight"].dtype == torch.float8_e4m3fn
    assert how(out)["ignore"] == ["lm_head"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_projection(tied, tmp_path):
    source, out = write_llama(tmp_path / "bf16", tied=tied), tmp_path / "fp8"
    report = convert(source, out, lm_head=True)
    before, after = load(source), load(out)
    assert len(report.layers) == 15
    head = before["model.embed_tokens.weight" if tied else "lm_head.weight"]
    expected = weights.quantize(head, TRN2)
    assert torch.equal(after["lm_head.weight"].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    found = how(out)
    assert found["ignore"] == []
    assert found["config_groups"]["group_0"]["targets"] == ["Linear", r"re:.*\blm_head$"]


def test_codes_beyond_the_range_are_halved(tmp_path):
    source, ocp, out = write_llama(tmp_path / "bf16", shards=3), tmp_path / "ocp", tmp_path / "fp8"
    convert(source, ocp, "trn3")
    within = "model.layers.0.mlp.up_proj"
    shard = json.loads((ocp / "model.safetensors.index.json").read_text())["weight_map"][f"{within}.weight"]
    tensors = load_file(ocp / shard)
    codes, scale = weights.quantize(load(source)[f"{within}.weight"], TRN2)
    save_file(tensors | {f"{within}.weight": codes, f"{within}.weight_scale": scale}, ocp / shard)
    (ocp / "hf_quant_config.json").write_text("{}")
    report = convert(ocp, out, from_fp8=True)
    assert {layer.name for layer in report.layers if not layer.halved} == {within}
    before, after = load(ocp), load(out)
    assert before.keys() == after.keys()
    for name in filter(is_linear, before):
        fitted = weights.fit(before[name].view(torch.uint8), before[f"{name}_scale"].view(-1), TRN2)
        assert torch.equal(after[name].view(torch.uint8), fitted.codes)
        assert torch.equal(after[f"{name}_scale"].view(-1), fitted.scale)
    assert all(weight.beyond == 0 for weight in inspect(out).weights)
    assert not (out / "hf_quant_config.json").exists()
    # What the configuration says of FP8 does not matter: the dtypes tell.
    config = json.loads((ocp / "config.json").read_text())
    (ocp / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "quantization_config"})
    )
    convert(ocp, tmp_path / "again", from_fp8=True)
    assert how(tmp_path / "again") == how(out)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Llama whose linears are of several blocks, not all of them whole."""
    return write_llama(
        tmp_path_factory.mktemp("wide") / "bf16", hidden_size=256, intermediate_size=300, head_dim=64
    )


@pytest.mark.parametrize("kind", sorted(fp8_kinds.KINDS))
def test_every_published_kind_is_brought_within_the_range(kind, wide, tmp_path):
    """Blocks become channels, which rounds once more; everything else keeps its numbers."""
    source, out = tmp_path / "ocp", tmp_path / "fp8"
    fp8_kinds.write(wide, source, kind, calibration=[torch.arange(3, 40)])
    report = convert(source, out, from_fp8=True)
    before, after, about = load(source), load(out), fp8_kinds.KINDS[kind]
    assert len(report.layers) == 14
    for name in filter(is_linear, before):
        module = name.removesuffix(".weight")
        scale = before[f"{module}.{about.scale}"]
        shape = [math.ceil(size / 128) for size in before[name].shape]
        scale = scale.reshape(shape if about.weights == "block" else (-1, 1))
        was = fp8_kinds.dequantize(before[name], scale, about.weights)
        if about.weights == "block":
            expected = weights.quantize(was, TRN2)[0].view(torch.uint8)
        else:
            expected = weights.fit(before[name].view(torch.uint8), scale.view(-1), TRN2).codes
        assert torch.equal(after[name].view(torch.uint8), expected)
        assert (value(out, module) - was).norm() < (0.04 if about.weights == "block" else 1e-3) * was.norm()
        if about.activations == "static":
            given = before[f"{module}.input_scale"] * (448 / 240)
            torch.testing.assert_close(after[f"{module}.input_scale"].squeeze(), given)
    activations = how(out)["config_groups"]["group_0"]["input_activations"]
    found = activations and ("static" if not activations["dynamic"] else "token")
    assert found == {"none": None, "static": "static"}.get(about.activations, "token")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.weight_scale": torch.full((32, 1), float("nan"))}, "a scale that is NaN, Inf or negative"),
        ({f"{Q}.weight_scale": torch.full((32, 1), -1.0)}, "a scale that is NaN, Inf or negative"),
        ({f"{Q}.weight_scale": torch.zeros(32, 1)}, "holds weights whose scale is zero"),
        ({f"{Q}.weight_scale": torch.ones(5, 7)}, r"is \[5, 7\]; expected \[1\], \[32\], \[32, 1\] or"),
        (
            {f"{Q}.weight_scale": None},
            r"expected F8_E4M3 \[N, H\], named \.weight, and .*q_proj\.weight_scale",
        ),
        (
            {f"{Q}.weight": torch.full((32, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)},
            "holds NaN; the checkpoint is broken",
        ),
        ({f"{Q}.input_scale": torch.ones(1)}, "some linears have an input_scale and others none"),
    ],
)
def test_broken_fp8_is_refused(change, message, tmp_path):
    convert(write_llama(tmp_path / "bf16"), tmp_path / "ocp", "trn3")
    edit(tmp_path / "ocp", change)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ocp", tmp_path / "fp8", from_fp8=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "ocp"]


MOE = {"num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MODELS = {
    # (configuration, FP8 linears of layer 1 and what of it stays, as names after the layer's)
    "mixtral": (
        MOE | {"num_local_experts": 4},
        {f"self_attn.{name}_proj" for name in "qkvo"},
        {"block_sparse_moe.gate"}
        | {f"block_sparse_moe.experts.{i}.w{n}" for i in range(4) for n in (1, 2, 3)},
    ),
    "qwen3_moe": (
        MOE | {"num_experts": 4, "moe_intermediate_size": 64},
        {f"self_attn.{name}_proj" for name in "qkvo"}
        | {f"mlp.experts.{i}.{name}_proj" for i in range(4) for name in ("gate", "up", "down")},
        {"mlp.gate"},
    ),
    "gpt_oss": (
        MOE | {"num_local_experts": 4},
        {f"self_attn.{name}_proj" for name in "qkvo"},
        {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router"},
    ),
    "granitemoe": (
        MOE | {"num_local_experts": 4},
        {f"self_attn.{name}_proj" for name in "qkvo"},
        {f"block_sparse_moe.{name}" for name in ("input_linear", "output_linear", "router.layer")},
    ),
    # vLLM makes one linear of q_a_proj and kv_a_proj_with_mqa.
    "deepseek_v3": (
        MOE | DEEPSEEK | {"moe_intermediate_size": 64},
        {
            f"self_attn.{name}"
            for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        }
        | {f"mlp.experts.{i}.{name}_proj" for i in range(4) for name in ("gate", "up", "down")}
        | {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
        {"mlp.gate"},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_experts(kind, tmp_path):
    """What is left is counted, and ``ignore`` means it by the names that vLLM asks for, and nothing else."""
    changes, quantized, left = MODELS[kind]
    source, out = write_model(tmp_path / "bf16", kind, **changes), tmp_path / "fp8"
    report = convert(source, out)
    layer = "model.layers.1."
    assert {one.name.removeprefix(layer) for one in report.layers if one.name.startswith(layer)} == quantized
    assert {name.removeprefix(layer) for name in report.left if name.startswith(layer)} == left
    before, after = load(source), load(out)
    for name in report.left:
        stored = f"{name}.weight" if f"{name}.weight" in before else name
        assert report.left[name] == before[stored].numel()
        assert torch.equal(after[stored], before[stored])
    ignore = how(out)["ignore"]
    asked = left | {f"{name.rpartition('.')[0]}.experts.0.up_proj" for name in left if "_linear" in name}
    asked |= {"mlp.experts.0.down_proj"} if "mlp.experts.down_proj" in left else set()
    fused = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    for name in asked - fused:
        assert ignored(ignore, layer + name), name
    assert not [one.name for one in report.layers if ignored(ignore, one.name)]


def ignored(ignore: list[str], module: str) -> bool:
    """As compressed-tensors decides it."""
    return any(match_name(module, one) for one in ignore)


def test_experts_that_are_asked_for(tmp_path):
    source = write_model(tmp_path / "bf16", "mixtral", **MODELS["mixtral"][0])
    report = convert(source, tmp_path / "fp8", include=[r"re:.*\.experts\."])
    assert {name.rpartition(".")[2] for name in report.left} == {"lm_head", "gate"}
    assert len(report.layers) == 2 * (4 + 4 * 3)
    with pytest.raises(ValueError, match=r"in one weight; quantize all of .*experts"):
        convert(source, tmp_path / "some", include=[r"re:.*\.experts\.[012]\."])


VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A model with a vision tower, whose linears are called as the decoder's are."""
    return write_model(
        tmp_path_factory.mktemp("llava") / "bf16",
        "llava",
        vision_config={"model_type": "siglip_vision_model"} | VISION,
        text_config={"model_type": "llama"} | SIZES,
        image_token_index=7,
    )


def test_a_vision_tower_is_left_alone(llava, tmp_path):
    report = convert(llava, tmp_path / "fp8")
    assert len(report.layers) == 14
    assert all(one.name.startswith("language_model.model.layers.") for one in report.layers)
    before, after = load(llava), load(tmp_path / "fp8")
    beside = [name for name in before if name.startswith(("vision_tower", "multi_modal_projector"))]
    assert all(torch.equal(before[name], after[name]) for name in beside)
    ignore = how(tmp_path / "fp8")["ignore"]
    # By the checkpoint's names, which vLLM translates, and by those of transformers' modules.
    tower = [name for name in report.left if "lm_head" not in name]
    assert len(tower) > 10
    assert all(ignored(ignore, name) and ignored(ignore, f"model.{name}") for name in tower)
    assert not [one.name for one in report.layers if ignored(ignore, one.name)]
    assert not ignored(ignore, "model.language_model.layers.0.self_attn.q_proj")


def test_a_vision_tower_that_is_asked_for(llava, tmp_path):
    asked = [r"re:vision_tower\.encoder\.layers\.\d\.mlp\."]
    report = convert(llava, tmp_path / "fp8", include=asked)
    assert len(report.layers) == 14 + 4
    ignore = how(tmp_path / "fp8")["ignore"]
    assert not [one.name for one in report.layers if ignored(ignore, one.name)]
    assert ignored(ignore, "vision_tower.encoder.layers.0.self_attn.q_proj")
