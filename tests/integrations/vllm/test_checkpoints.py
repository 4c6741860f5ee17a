"""Every kind of FP8 checkpoint that people publish, as a tiny Llama in vLLM's own model classes."""

from __future__ import annotations

import json

import fp8_kinds
import pytest
import torch
from safetensors.torch import save_file
from vllm import _custom_ops
from vllm_models import TOKENS, Loaded, tiny_config, write_checkpoint

import vllm_neuron_rmsq
from vllm_neuron_rmsq import checkpoint

pytestmark = pytest.mark.engine  # each test loads a model as vLLM does

# Wide enough for blocks of 128: q, k, v, gate and up are whole blocks, as vLLM wants them.
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}

SCHEMES = {
    "compressed-tensors tensor": "per-token",
    "fp8 tensor": "per-token",
    "modelopt channel": "per-token",
    "quark tensor": "per-token",
    "compressed-tensors channel": "per-token",
    "quark channel": "per-token",
    "modelopt tensor": "per-token",
    "compressed-tensors tensor static": "static",
    "compressed-tensors channel static": "static",
    "fp8 tensor static": "static",
    "modelopt tensor static": "static",
    "quark tensor static": "static",
    "fp8 block": "block",
    "compressed-tensors block": "block",
    "modelopt block": "block",
    "quark block": "block",
}
"""Kind of checkpoint -> the scheme that its linears are of."""

BY_DEFAULT = ("fp8 tensor", "modelopt channel", "compressed-tensors tensor static", "fp8 block")
"""The others are the long matrix."""


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "torch")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A Qwen3-MoE in bf16: a dense layer and one of experts, a tensor for each as they are published."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = tiny_config("qwen3_moe", **SIZES, **experts, decoder_sparse_step=1, mlp_only_layers=[0])
    folder = write_checkpoint(config, tmp_path_factory.mktemp("moe") / "bf16", fp8=False)
    tensors = fp8_kinds.load(folder)
    prefix = "model.layers.1.mlp.experts."
    fused = tensors.pop(f"{prefix}gate_up_proj"), tensors.pop(f"{prefix}down_proj")
    for number, (gate_up, down) in enumerate(zip(*fused, strict=True)):
        gate, up = gate_up.chunk(2)
        for name, weight in {"gate": gate, "up": up, "down": down}.items():
            tensors[f"{prefix}{number}.{name}_proj.weight"] = weight.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    config = tiny_config("llama", **SIZES)
    return write_checkpoint(config, tmp_path_factory.mktemp("llama") / "bf16", fp8=False)


def by_default(kinds):
    slow = pytest.mark.slow
    return [pytest.param(kind, marks=() if kind in BY_DEFAULT else slow) for kind in kinds]


def weight_of(linear):
    """The weight that a linear multiplies by, ``[N, H]``: of its product with a diagonal of one number.

    With a static scale the number is what has code 1; otherwise it is small enough for FBGEMM's bound below.
    """
    static = hasattr(linear, "rmsq_scheme") and linear.rmsq_scheme.static
    number = linear.input_scale.detach() if static else torch.tensor([0.25])
    diagonal = torch.eye(linear.input_size_per_partition) * number
    return linear.quant_method.apply(linear, diagonal.bfloat16()).float().t() / number


def assert_same_weight(linear, weight):
    """It is rounded to bf16's 8 bits, and halved: half the smallest code, 2^-9, may be lost. A shard brought
    to the scale of another would be off by up to 2^-4.
    """
    weight = weight.detach()
    smallest = weight.abs().max().item() / fp8_kinds.R * 2**-9
    torch.testing.assert_close(weight_of(linear), weight, rtol=2**-8, atol=smallest)


@pytest.mark.parametrize("kind", by_default(SCHEMES))
def test_is_fused_and_multiplies_by_the_weights_of_the_checkpoint(kind, bf16, tmp_path):
    ids = TOKENS.long()
    folder = fp8_kinds.write(bf16, tmp_path / "fp8", kind, calibration=[ids])
    loaded = Loaded(folder)
    report = loaded.report
    assert len(report.fused) == 4 and len(report.fused_activations) == 2
    assert report.schemes == {SCHEMES[kind]: 8}
    assert f"8 packed FP8 linears ({SCHEMES[kind]})" in str(report)

    # With block scales, too, the plugin gives activations one scale a row.
    activations = "token" if SCHEMES[kind] == "block" else None
    exact = fp8_kinds.reference_model(bf16, folder, kind, activations)
    attention, stands_for = loaded.model.model.layers[0].self_attn, exact.model.layers[0].self_attn
    projections = [getattr(stands_for, f"{name}_proj").weight for name in "qkv"]
    assert_same_weight(attention.qkv_proj, torch.cat(projections))
    assert_same_weight(attention.o_proj, stands_for.o_proj.weight)
    with torch.no_grad():
        logits = exact(ids[None]).logits[0]
    assert torch.nn.functional.cosine_similarity(loaded.logits().float(), logits).min() > 0.95


def configure(folder, **changes):
    """Change ``quantization_config`` of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_fbgemm_clips_activations_as_its_checkpoint_says(bf16, tmp_path):
    ids = TOKENS.long()
    folder = fp8_kinds.write(bf16, tmp_path / "fp8", "fbgemm channel")
    configure(folder, activation_scale_ub=0.5)  # of 1200 nothing would be seen here
    # vLLM calls the kind deprecated, and says how to have it all the same.
    loaded = Loaded(folder, allow_deprecated_quantization=True)
    report = loaded.report
    assert len(report.fused) == 4 and report.schemes == {"per-token": 8}
    reason = "activations are to be clipped to ±0.5, which the fused one cannot do"
    assert [layer.reason for layer in report.activations] == [reason] * 2

    exact = fp8_kinds.reference_model(bf16, folder, "fbgemm channel")
    attention, stands_for = loaded.model.model.layers[0].self_attn, exact.model.layers[0].self_attn
    projections = [getattr(stands_for, f"{name}_proj").weight for name in "qkv"]
    assert_same_weight(attention.qkv_proj, torch.cat(projections))
    configure(folder, activation_scale_ub=1200.0)
    unclipped = fp8_kinds.reference_model(bf16, folder, "fbgemm channel")
    logits = loaded.logits().float()
    with torch.no_grad():
        near, far = (
            torch.nn.functional.cosine_similarity(logits, model(ids[None]).logits[0]).min()
            for model in (exact, unclipped)
        )
    assert near > 0.95 and far < 0.9


@pytest.mark.parametrize(
    "kind",
    [
        "compressed-tensors tensor weight-only",
        pytest.param("compressed-tensors channel weight-only", marks=pytest.mark.slow),
        pytest.param("compressed-tensors block weight-only", marks=pytest.mark.slow),
    ],
)
def test_weights_alone_are_multiplied_in_bf16(kind, bf16, tmp_path):
    ids = TOKENS.long()
    folder = fp8_kinds.write(bf16, tmp_path / "fp8", kind)
    loaded = Loaded(folder)
    assert loaded.report.weight_only == 8 and loaded.report.linears == len(loaded.report.fused) == 0
    assert "8 weight-only FP8 linears" in str(loaded.report)
    exact = fp8_kinds.reference_model(bf16, folder, kind)
    name = "model.layers.1.mlp.down_proj"
    assert_same_weight(loaded.model.get_submodule(name), exact.get_submodule(name).weight)
    with torch.no_grad():
        logits = exact(ids[None]).logits[0]
    assert torch.nn.functional.cosine_similarity(loaded.logits().float(), logits).min() > 0.999


@pytest.mark.parametrize(
    "method, scheme",
    [
        ("fp8_per_tensor", "per-token"),
        pytest.param("fp8_per_channel", "per-token", marks=pytest.mark.slow),
        pytest.param("fp8_per_block", "block", marks=pytest.mark.slow),
    ],
)
def test_a_bf16_checkpoint_quantized_online_is_fused(method, scheme, bf16):
    loaded = Loaded(bf16, quantization=method)
    assert len(loaded.report.fused) == 4 and loaded.report.schemes == {scheme: 8}
    weight = fp8_kinds.load(bf16)["model.layers.0.self_attn.o_proj.weight"].float()
    got = weight_of(loaded.model.model.layers[0].self_attn.o_proj)
    assert (got - weight).abs().max() <= 2**-4 * weight.abs().max()


def test_each_row_of_a_weight_is_quantized_by_its_own_scale():
    """As vLLM 0.24 asks for it under ``fp8_per_channel``; its CPU build has no operator for that."""
    vllm_neuron_rmsq.register()
    weight = torch.randn(8, 32) * torch.logspace(-3, 3, 8)[:, None]
    weight[3] = 0
    codes, scale = _custom_ops.scaled_fp8_quant(weight, scale=None, use_per_token_if_dynamic=True)
    assert codes.dtype == torch.float8_e4m3fn and (scale.shape, scale.dtype) == ((8, 1), torch.float32)
    torch.testing.assert_close(codes.float(), weight / scale, rtol=2**-4, atol=2**-10)
    assert (codes.float().abs().amax(1) == torch.tensor([448.0] * 3 + [0.0] + [448.0] * 4)).all()


def test_a_checkpoint_whose_shards_are_fused_has_one_scale(tmp_path):
    """Phi-3's ``qkv_proj`` and ``gate_up_proj`` are one tensor on disk: one scale of three is loaded."""
    config = tiny_config("phi3", **SIZES)
    bf16 = write_checkpoint(config, tmp_path / "bf16", fp8=False)
    folder = fp8_kinds.write(bf16, tmp_path / "fp8", "fp8 tensor")
    loaded = Loaded(folder)
    assert loaded.report.schemes == {"per-token": 8} and len(loaded.report.fused) == 4
    tensors = fp8_kinds.load(folder)
    name = "model.layers.0.self_attn.qkv_proj"
    weight = fp8_kinds.dequantize(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], "tensor")
    assert_same_weight(loaded.model.model.layers[0].self_attn.qkv_proj, weight)


def test_blocks_that_two_linears_share_stop_the_start(tmp_path):
    """``fp8``'s vLLM loads, one linear's scales over the other's; as channels the checkpoint is served."""
    heads = {
        "hidden_size": 576,
        "head_dim": 64,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 256,
    }
    bf16 = write_checkpoint(tiny_config("llama", **heads), tmp_path / "bf16", fp8=False)
    folder = fp8_kinds.write(bf16, tmp_path / "fp8", "fp8 block")
    with pytest.raises(
        ValueError, match=r"qkv_proj: .*linears of \[576, 192, 192\] outputs in one weight; expected"
    ):
        Loaded(folder)
    checkpoint.convert(folder, tmp_path / "channels", from_fp8=True)
    report = Loaded(tmp_path / "channels").report
    assert report.schemes == {"per-token": 8} and len(report.fused) == 4


def test_a_kind_that_nobody_can_multiply_is_one_sentence(bf16, tmp_path):
    folder = fp8_kinds.write(bf16, tmp_path / "fp8", "fp8 block")
    configure(folder, weight_block_size=[64, 64])
    with pytest.raises(ValueError, match="no FP8 kernel") as caught:
        Loaded(folder)
    message = str(caught.value)
    assert message.startswith("model.layers.0.self_attn.qkv_proj: no FP8 kernel takes it on this machine")
    assert "needs dynamic per-group (1 x 128) activations, not" in message
    assert message.endswith("with --quantization fp8_per_channel.") and "\n" not in message


def test_fp8_experts_that_vllm_cannot_multiply_are_one_sentence(moe, tmp_path):
    """vLLM's own for CPUs are of blocks of 128 x 128, and need AMX."""
    folder = fp8_kinds.write(moe, tmp_path / "fp8", "compressed-tensors channel")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\S*: vLLM has no kernel") as caught:
        Loaded(folder)
    assert str(caught.value).endswith("quantize SOURCE OUTPUT --ignore 're:.*experts.*'")


def test_experts_in_bf16_stay_stock_and_the_rest_of_the_model_is_fused(moe, tmp_path):
    folder = tmp_path / "fp8"
    checkpoint.convert(moe, folder, ignore=["re:.*experts.*"])  # what the sentence above says
    loaded = Loaded(folder)
    report = loaded.report
    assert [layer.name for layer in (*report.fused, *report.fused_activations)] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.0.mlp.act_fn",
    ]
    assert report.schemes == {"per-token": 6}
    reasons = {layer.name: layer.reason for layer in (*report.norms, *report.linear_layers)}
    assert "read by" in reasons["model.layers.1.post_attention_layernorm"]
    (experts,) = (name for name in reasons if ".experts" in name)
    assert reasons[experts].startswith("not a linear with FP8 weights and activations")
    exact = fp8_kinds.reference_model(moe, folder, "compressed-tensors channel")
    ids = TOKENS.long()
    with torch.no_grad():
        logits = exact(ids[None]).logits[0]
    assert torch.nn.functional.cosine_similarity(loaded.logits().float(), logits).min() > 0.95


def test_a_corrupt_static_scale_stops_the_start_with_the_layers_name(bf16, tmp_path):
    folder = fp8_kinds.write(bf16, tmp_path / "fp8", "fp8 tensor static", calibration=[TOKENS.long()])
    tensors = fp8_kinds.load(folder)
    tensors["model.layers.1.mlp.down_proj.input_scale"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: input_scale: expected a positive"
    ):
        Loaded(folder)


@pytest.mark.parametrize("weights", ["channel", "tensor", "channel weight-only"])
def test_a_scale_that_is_not_there_stops_the_start_with_the_layers_name(bf16, tmp_path, weights):
    """A layer in bf16 that ``ignore`` does not name, as a router can be."""
    folder = fp8_kinds.write(bf16, tmp_path / "fp8", f"compressed-tensors {weights}")
    tensors = fp8_kinds.load(folder)
    del tensors["model.layers.1.mlp.gate_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"^model\.layers\.1\.mlp\.gate_up_proj: weight_scale: the checkpoint has none .*`ignore`"
    with pytest.raises(ValueError, match=message):
        Loaded(folder)


def test_each_stock_layer_has_its_reason(bf16, tmp_path):
    """Some layers in bf16, as ``ignore`` of a published checkpoint has them."""
    kept = ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.1.mlp.down_proj")
    folder = fp8_kinds.write(
        bf16, tmp_path / "fp8", "compressed-tensors tensor", leave=lambda name: name.endswith(kept)
    )
    report = Loaded(folder).report
    assert report.schemes == {"per-token": 6}
    reasons = {layer.name: layer.reason for layer in (*report.norms, *report.activations) if layer.reason}
    assert reasons.keys() == {
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.mlp.act_fn",
        "model.norm",
    }
    assert "gate_up_proj" in reasons["model.layers.0.post_attention_layernorm"]
    assert "down_proj" in reasons["model.layers.1.mlp.act_fn"]
