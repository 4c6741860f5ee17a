"""A layer's steps are found with their real inputs, and every backend is held to the oracle there."""

from __future__ import annotations

import fp8_kinds
import pytest
import torch
from checkpoints import edit
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_models import SIZES, tiny_config, write_checkpoint

from vllm_neuron_rmsq import backends, packed, reference
from vllm_neuron_rmsq.measure import layers

BACKENDS = [name for name in backends.names() if backends.unavailable(name) is None]
TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A bf16 checkpoint of two layers, and what ``convert`` made of it in ``fp8/``."""
    folder = tmp_path_factory.mktemp("llama") / "bf16"
    write_checkpoint(tiny_config("llama"), folder)
    return folder


def steps_of(folder, numbers=(0,)):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return layers.capture(model, TOKENS, numbers)


def test_the_steps_of_a_llama_layer(llama):
    steps = {step.name.removeprefix("model.layers.1."): step for step in steps_of(llama, (1,))}
    assert {name: (step.kind, len(step.linears)) for name, step in steps.items()} == {
        "input_layernorm": ("norm", 3),
        "self_attn.o_proj": ("no norm", 1),
        "post_attention_layernorm": ("norm", 2),
        "mlp.down_proj": ("SiLU times up", 1),
    }
    assert steps["mlp.down_proj"].x.shape == (layers.ROWS, 2 * SIZES["intermediate_size"])


@pytest.mark.parametrize("kind", ["phi3", "qwen3", "gemma"])
def test_fused_linears_and_other_norms(kind):
    """Phi-3 has one linear for gate and up; Gemma multiplies by 1 + gamma, which is not our norm."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kinds = [step.kind for step in layers.capture(model, TOKENS, (0,))]
    assert kinds.count("norm") == (0 if kind == "gemma" else 2)
    assert kinds.count("SiLU times up") == (0 if kind == "gemma" else 1)


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_every_backend_keeps_the_contract(llama, target):
    found = layers.compare(steps_of(llama), llama / "fp8", target, BACKENDS)
    assert {one.backend for one in found} == set(BACKENDS) >= {"torch", "nki-sim"}
    assert all(one.passed for one in found), [one for one in found if not one.passed]
    # FP8 has 3 bits of mantissa: an error of 2^-4 at most, some 2.6 % rms each for weights and activations.
    assert all(0.01 < one.output_error < 0.06 for one in found)


@pytest.mark.parametrize("kind", ["fp8 block", "compressed-tensors tensor static", "modelopt block"])
def test_other_schemes(kind, llama, tmp_path):
    """Scales of blocks, and static activations, which have the largest scale of those that read them."""
    fp8 = fp8_kinds.write(llama, tmp_path / "fp8", kind, calibration=[torch.tensor(TOKENS)])
    steps = steps_of(llama)
    for target in ("trn2", "trn3"):
        found = layers.compare(steps, fp8, target, BACKENDS)
        assert all(one.passed for one in found), [one for one in found if not one.passed]
        assert all(0.01 < one.output_error < 0.06 for one in found)
    if "static" in kind:
        given = fp8_kinds.load(fp8)
        first = steps[0]
        scales = [float(given[f"{name}.input_scale"]) for name in first.linears]
        assert len(scales) == 3
        assert layers._static_scale(fp8, first, "trn2") == 2 * max(scales)


def test_scales_of_other_blocks_are_refused(llama, tmp_path):
    fp8 = fp8_kinds.write(llama, tmp_path / "fp8", "fp8 block")
    edit(fp8, {"model.layers.0.self_attn.o_proj.weight_scale_inv": torch.ones(7)})
    with pytest.raises(ValueError, match=r"o_proj are \[7\]; expected one, one for each output, or"):
        layers.compare(steps_of(llama), fp8, "trn2", ["torch"])


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("scale", lambda codes, scale: (codes, scale * (1 + 2**-12))),
        ("codes", lambda codes, scale: (codes ^ (torch.arange(codes.shape[-1]) % 50 == 0).byte(), scale)),
    ],
)
def test_a_wrong_backend_fails(llama, monkeypatch, what, spoil):
    def wrong(*args, **kwargs):
        codes, scale = spoil(*packed.unpack(reference.rms_norm_quant(*args, **kwargs)))
        return packed.pack(codes.contiguous(), scale)

    monkeypatch.setattr(layers.ops, "rms_norm_quant", wrong)
    found = layers.compare(steps_of(llama), llama / "fp8", "trn2", ["torch"])
    assert {one.passed for one in found if one.kind != "SiLU times up"} == {False}


def test_a_layer_that_is_not_there(llama):
    with pytest.raises(ValueError, match="layers: the model has no layer 7"):
        steps_of(llama, (0, 7))
