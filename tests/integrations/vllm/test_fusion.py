"""Which norms are fused, on vLLM's own model classes built from tiny random checkpoints."""

from __future__ import annotations

import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm_models import ARCHITECTURES, Loaded, tiny_config, write_checkpoint

from vllm_neuron_rmsq.backends import BackendUnavailableError
from vllm_neuron_rmsq.integrations.vllm import fusion, proof, schemes, versions
from vllm_neuron_rmsq.integrations.vllm.rms_norm import RMSNormQuant
from vllm_neuron_rmsq.integrations.vllm.silu_mul import SiluMulQuant

# The others are built of the same classes of vLLM's as one of these.
DEFAULT = ("llama", "qwen3", "phi3", "glm4", "smollm3", "arcee", "gemma2", "olmo2", "exaone4", "cohere")

pytestmark = pytest.mark.engine  # each test loads a model as vLLM does


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "torch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a function from model type to a tiny FP8 checkpoint of it, made once."""
    made = {}

    def make(model_type, **changes):
        key = (model_type, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type) / "bf16"
            made[key] = write_checkpoint(tiny_config(model_type, **changes), folder)
        return made[key]

    return make


SHARDS = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
"""The first shard of what vLLM fuses; the Transformers backend of older ones does not in every model."""


def kernel_names(loaded):
    schemes = [getattr(module, "scheme", None) for module in loaded.model.modules()]
    return {type(s.fp8_linear).__name__ for s in schemes if hasattr(s, "fp8_linear")}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in ARCHITECTURES]
)
def test_fuses_exactly_the_layers_that_feed_fp8_linears(name, checkpoint, monkeypatch):
    model_type, count, pairs, activations, changes = ARCHITECTURES[name]
    path = checkpoint(model_type, **changes)
    loaded = Loaded(path)
    report = loaded.report
    linears = {name.rsplit(".", 1)[-1] for name, _ in loaded.model.named_modules()}
    pairs = {norm: linear if linear in linears else SHARDS[linear] for norm, linear in pairs.items()}
    if pairs and "gate_up_proj" not in linears:
        activations = 0  # gate and up are no linear, and SiLU and the product two operators
    assert len(report.norms) == count
    fused = {norm.name.rsplit(".", 1)[-1]: norm.linears for norm in report.fused}
    assert {name: linears[0].rsplit(".", 1)[-1] for name, linears in fused.items()} == pairs
    assert len(report.fused) == 2 * len(pairs)
    assert all(norm.reason for norm in report.norms if norm not in report.fused)
    assert len(report.activations) == len(report.fused_activations) == activations
    for layer, activation in enumerate(report.activations):
        (linear,) = activation.linears  # its own layer's
        assert linear.endswith(f".{layer}.mlp.down_proj")
        assert isinstance(loaded.model.get_submodule(activation.name), SiluMulQuant)
    logits = loaded.logits()
    monkeypatch.setenv("VLLM_RMSQ_FUSE", "0")
    unfused = Loaded(path)
    assert not unfused.report.fused and not unfused.report.fused_activations
    assert unfused.report.linears == report.linears
    stock = unfused.logits()
    if pairs or activations:  # how close, test_offline.py says; here, that nothing is grossly wrong
        assert torch.nn.functional.cosine_similarity(logits, stock).min() > 0.97
        assert not torch.equal(logits, stock)
    for activation in unfused.report.activations:
        module = unfused.model.get_submodule(activation.name)
        assert type(module) is SiluAndMul
        loaded.model.set_submodule(activation.name, module)
    assert torch.equal(loaded.logits(), stock) == (not pairs)  # where no norm is fused, all are stock


def test_a_router_that_reads_the_norm_refutes_it(tmp_path):
    config = tiny_config(
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        architectures=["Qwen3MoeForCausalLM"],
    )
    folder = write_checkpoint(tiny_config("qwen3"), tmp_path / "dense")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization["ignore"] += ["re:.*mlp.*"]
    content = config.to_diff_dict() | {"quantization_config": quantization, "dtype": "bfloat16"}
    moe = tmp_path / "moe"
    moe.mkdir()
    (moe / "config.json").write_text(json.dumps(content, default=str))
    report = Loaded(moe, load_format="dummy").report
    reasons = {norm.name: norm.reason for norm in report.norms}
    assert not reasons["model.layers.0.input_layernorm"]
    assert "read by" in reasons["model.layers.0.post_attention_layernorm"]
    assert not report.activations  # the experts' is inside vLLM's fused MoE layer, which is not touched


def keep_bf16(path, *prefixes):
    """Put the unquantized weights of some linears into an FP8 checkpoint."""
    config = json.loads((path / "config.json").read_text())
    bf16 = load_file(path.parent / "model.safetensors")
    fp8 = load_file(path / "model.safetensors")
    mixed = {k: v for k, v in fp8.items() if not k.startswith(prefixes)}
    mixed |= {k: v for k, v in bf16.items() if k.startswith(prefixes)}
    save_file(mixed, path / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"]["ignore"] += list(prefixes)
    (path / "config.json").write_text(json.dumps(config))


def test_layers_whose_linears_are_not_fp8_stay_stock(tmp_path):
    path = write_checkpoint(tiny_config("llama"), tmp_path / "m")
    keep_bf16(path, "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    report = Loaded(path).report
    assert [norm.name for norm in report.norms if norm.reason] == [
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    assert "gate_up_proj" in report.norms[3].reason


def test_bf16_checkpoint_runs_unfused_with_the_reason(tmp_path):
    loaded = Loaded(write_checkpoint(tiny_config("llama"), tmp_path / "m", fp8=False))
    assert not loaded.report.fused and loaded.report.linears == 0
    assert {norm.reason for norm in loaded.report.norms} == {
        "the model has no FP8 linear of a supported scheme"
    }
    assert loaded.logits().isfinite().all()


def test_layers_that_feed_linears_with_lora_adapters_stay_stock(checkpoint):
    report = Loaded(checkpoint("llama"), enable_lora=True, lora_target_modules=["q_proj", "down_proj"]).report
    reasons = {layer.name: layer.reason for layer in (*report.norms[:2], *report.activations[:1])}
    assert reasons == {
        "model.layers.0.input_layernorm": "LoRA adapters may change model.layers.0.self_attn.qkv_proj, which "
        "reads it unquantized then",
        "model.layers.0.post_attention_layernorm": "",
        "model.layers.0.mlp.act_fn": "LoRA adapters may change model.layers.0.mlp.down_proj, which reads it "
        "unquantized then",
    }
    assert len(report.fused) == 2 and not report.fused_activations


def test_lora_adapters_may_change_every_linear_unless_told_otherwise(checkpoint, monkeypatch):
    loaded = Loaded(checkpoint("llama"), enable_lora=True)
    assert not loaded.report.fused and not loaded.report.fused_activations and loaded.report.linears == 8
    assert loaded.report.norms[0].reason.endswith(
        "; --lora-target-modules would say which linears they change"
    )
    monkeypatch.setenv("VLLM_RMSQ_FUSE", "0")
    assert torch.equal(loaded.logits(), Loaded(checkpoint("llama"), enable_lora=True).logits())


def test_an_activation_whose_linear_is_not_fp8_stays_the_object_that_vllm_made(tmp_path):
    path = write_checkpoint(tiny_config("llama"), tmp_path / "m")
    keep_bf16(path, "model.layers.0.mlp.down_proj")
    loaded = Loaded(path)
    first, second = loaded.report.activations
    assert first.reason.startswith("its output is read by aten.") and not second.reason
    assert "down_proj" in first.reason
    assert type(loaded.model.get_submodule(first.name)) is SiluAndMul
    assert str(loaded.report).endswith("7 packed FP8 linears (per-token); 1 of 2 SiluAndMul layers fused")


def test_a_replaced_activation_is_left_in_place(checkpoint, monkeypatch):
    class OtherSiluAndMul(SiluAndMul):
        pass

    monkeypatch.setitem(op_registry_oot, "SiluAndMul", OtherSiluAndMul)
    loaded = Loaded(checkpoint("llama"))
    assert {a.reason for a in loaded.report.activations} == {"OtherSiluAndMul is not vLLM's SiluAndMul"}
    assert type(loaded.model.get_submodule("model.layers.0.mlp.act_fn")) is OtherSiluAndMul
    assert len(loaded.report.fused) == 4


def test_strict_refuses_an_unfused_decoder_norm(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_STRICT", "1")
    assert len(Loaded(checkpoint("llama")).report.fused) == 4  # the final norm is no decoder norm
    with pytest.raises(RuntimeError, match=r"VLLM_RMSQ_STRICT=1 .*post_attention_layernorm: .*aten\.add"):
        Loaded(checkpoint("olmo2"))


def test_off_is_stock(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "off")
    loaded = Loaded(checkpoint("llama"))
    assert loaded.report is None
    assert kernel_names(loaded) == {"ChannelWiseTorchFP8ScaledMMLinearKernel"}
    assert all(norm.binding is None for norm in loaded.model.modules() if isinstance(norm, RMSNormQuant))


def test_additional_config_wins(checkpoint):
    extra = {"rmsq": {"backend": "off"}, "another_plugin": {"x": 1}}
    assert Loaded(checkpoint("llama"), additional_config=extra).report is None
    extra = {"rmsq": {"target": "trn3", "fuse": False}}
    report = Loaded(checkpoint("llama"), additional_config=extra).report
    assert report.target == "trn3" and not report.fused


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("bakend", "torch", "unknown setting; expected one of backend, target, fuse, strict"),
        ("target", "trn1", "expected one of trn2, trn3; got 'trn1'"),
    ],
)
def test_misspelt_additional_config_stops_the_start(checkpoint, key, value, message):
    with pytest.raises(ValueError, match=message):
        Loaded(checkpoint("llama"), additional_config={"rmsq": {key: value}})


def test_backend_that_cannot_run_stops_the_start(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "nki")
    with pytest.raises(BackendUnavailableError, match="backend 'nki' cannot run here"):
        Loaded(checkpoint("llama"))


def test_settings_and_fused_norms_are_part_of_the_compilation_key(checkpoint, monkeypatch):
    keys = set()
    for fuse, target in (("1", "trn2"), ("0", "trn2"), ("1", "trn3")):
        monkeypatch.setenv("VLLM_RMSQ_FUSE", fuse)
        monkeypatch.setenv("VLLM_RMSQ_TARGET", target)
        keys.add(json.dumps(Loaded(checkpoint("llama")).config.additional_config["rmsq_graph"]))
    assert len(keys) == 3


def test_weights_beyond_240_are_halved_for_trn2_only(tmp_path, monkeypatch):
    path = write_checkpoint(tiny_config("llama"), tmp_path / "m", target="trn3")
    halved = Loaded(path)
    assert halved.report.halved == 8
    assert "8 with weights beyond ±240 halved" in str(halved.report)
    logits = halved.logits()
    monkeypatch.setenv("VLLM_RMSQ_TARGET", "trn3")
    whole = Loaded(path)
    assert whole.report.halved == 0
    assert torch.nn.functional.cosine_similarity(logits, whole.logits()).min() > 0.97


@pytest.mark.parametrize("tensor", ["weight", "weight_scale"])
def test_nan_in_a_checkpoint_stops_the_start(tmp_path, tensor):
    path = write_checkpoint(tiny_config("llama"), tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    name = f"model.layers.0.mlp.down_proj.{tensor}"
    tensors[name].view(torch.uint8)[0, :4] = 0x7F if tensor == "weight" else 0xFF
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds NaN or Inf in its codes or scales"):
        Loaded(path)


def test_a_truncated_checkpoint_stops_the_start(tmp_path):
    path = write_checkpoint(tiny_config("llama"), tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|header"):
        Loaded(path.parent)


def test_a_model_the_dummy_forward_cannot_run_stays_stock(checkpoint, monkeypatch):
    def fail(*args):
        raise IndexError("no such thing")

    monkeypatch.setattr(proof, "dummy_forward", fail)
    loaded = Loaded(checkpoint("llama"))
    assert not loaded.report.fused
    assert {n.reason for n in loaded.report.norms} == {"the dummy forward failed (IndexError: no such thing)"}
    assert loaded.logits().isfinite().all()


def test_a_forward_that_asks_for_something_else_keeps_the_model_stock(checkpoint, monkeypatch):
    def forward(self, input_ids, positions, weather, intermediate_tensors=None, *args, **kwargs):
        raise AssertionError("is not called")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(proof.logger, "warning", lambda *args, **kwargs: pytest.fail("no traceback is due"))
    report = Loaded(checkpoint("llama")).report
    assert {norm.reason for norm in report.norms} == {
        "LlamaForCausalLM.forward asks for weather, which the dummy forward does not know"
    }


def test_a_linear_whose_module_touches_its_input_first_refutes_the_norm(checkpoint, monkeypatch):
    """It would get a packed activation there, not only in its kernel."""
    forward = proof.dummy_forward

    def pad_first(model, *configs):
        linear = model.get_submodule("model.layers.1.mlp.gate_up_proj")
        monkeypatch.setattr(linear, "forward", lambda x: type(linear).forward(linear, x * 1))
        return forward(model, *configs)

    monkeypatch.setattr(proof, "dummy_forward", pad_first)
    report = Loaded(checkpoint("llama")).report
    assert len(report.fused) == 3
    assert (
        report.norms[3].reason == "its output is read by aten.mul.Tensor in model.layers.1.mlp.gate_up_proj"
    )


def test_the_dummy_forward_multiplies_nothing(checkpoint, monkeypatch):
    products = []
    forward = proof.dummy_forward

    def watch(model, *configs):
        linear = model.get_submodule("model.layers.0.mlp.down_proj")
        handle = linear.register_forward_hook(lambda module, args, output: products.append(output[0]))
        try:
            return forward(model, *configs)
        finally:
            handle.remove()

    monkeypatch.setattr(proof, "dummy_forward", watch)
    assert len(Loaded(checkpoint("llama")).report.fused) == 4
    (product,) = products
    assert product.shape == (proof.PROBE_TOKENS, 128) and not product.any()


def test_an_output_that_is_kept_is_not_fused(checkpoint, monkeypatch):
    kept = []
    forward = proof.dummy_forward

    def keep_first(model, *configs):
        first = next(m for m in model.modules() if isinstance(m, RMSNormQuant))
        handle = first.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            return forward(model, *configs)
        finally:
            handle.remove()

    monkeypatch.setattr(proof, "dummy_forward", keep_first)
    report = Loaded(checkpoint("llama")).report
    assert report.norms[0].reason == "its output is kept for later"
    assert len(report.fused) == 3


def test_width_mismatch_and_linears_that_need_plain_input_are_refuted(monkeypatch):
    linear = torch.nn.Linear(2, 2)
    kernel = types.SimpleNamespace(input_quant_key=lambda: schemes.SCHEMES[0].rows)
    versions.expose_input_quant_key(linear, kernel)
    linear.input_size_per_partition = 64
    linears, names = {linear: schemes.SCHEMES[0]}, {linear: "a.linear"}
    finding = proof.Finding(width=128, linears=[linear])
    assert fusion.misfit(finding, linears, names) == "it is 128 wide and a.linear takes 64 features"
    finding.width = 64
    assert fusion.misfit(finding, linears, names) == ""
    monkeypatch.setattr(versions, "get_input_quant_key", lambda linear: None)
    assert fusion.misfit(finding, linears, names) == "a.linear needs unquantized input"
