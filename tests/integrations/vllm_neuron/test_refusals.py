"""What is not served, and that nothing is served wrongly when a piece is missing."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from neuron_llamas import COMPRESSED_TENSORS, MODELOPT, Mirror, compare, write
from neuron_standin.run import drive
from safetensors.torch import load_file, save_file

ONLY_KV = (
    "Neuron only supports compressed-tensors for KV cache quantization (q_scale/k_scale/v_scale). Weight "
    "quantization in config_groups['group_0'] is not supported."
)
"""vLLM Neuron's own words."""


def group(**changes) -> dict:
    """compressed-tensors with changes to its one group: ``weights__strategy="block"``."""
    config = copy.deepcopy(COMPRESSED_TENSORS)
    for path, value in changes.items():
        part, _, key = path.partition("__")
        config["config_groups"]["group_0"][part][key] = value
    return config


REFUSED = {
    "block": (
        group(weights__strategy="block", weights__block_structure=[128, 128]),
        "weights have strategy block",
    ),
    "static": (
        group(input_activations__dynamic=False, input_activations__strategy="tensor"),
        "activations have a static scale",
    ),
    "int8": (group(weights__type="int", input_activations__type="int"), "weights are not FP8"),
    "ignored": (
        COMPRESSED_TENSORS | {"ignore": ["lm_head", "re:.*layers.1.mlp.down_proj"]},
        "model.layers.1.mlp.down_proj is not quantized",
    ),
    "lm_head": (COMPRESSED_TENSORS | {"ignore": []}, "its lm_head is quantized too"),
}
"""By the stock refusal, with our reason beside it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoints") / "plain")


@pytest.fixture(scope="module")
def results(checkpoint, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    short = {"tokens": tokens[:17], "prompt": 16, "fails": True}
    jobs = {}

    def add(name, model=checkpoint, rmsq=None, **more):
        rmsq = {"backend": "torch", **(rmsq or {})}
        jobs[name] = {"model": str(model), "rmsq": rmsq, **short, **more}

    def reconfigured(name, **changes):
        """The checkpoint with another config.json."""
        to = folder / name
        shutil.copytree(checkpoint, to)
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | changes))
        return to

    for name, (config, _) in REFUSED.items():
        add(name, reconfigured(name, quantization_config=config))
    moe = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    add("MoE", reconfigured("moe", **moe))
    add("off", rmsq={"backend": "off"})
    add("LoRA", engine={"enable_lora": True})
    add("attention DP", neuron={"attention_dp_size": 2})
    add(
        "DCP",
        rmsq={"attention": "fp8"},
        engine={"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
    )
    add("strict", rmsq={"strict": "1"})
    add("strict, fp8", rmsq={"strict": "1", "attention": "fp8"})
    add("strict, stock norms", rmsq={"strict": "1", "fuse": "0"})
    add("wide", reconfigured("wide", hidden_size=16640, head_dim=32), rmsq={"backend": "nki-sim"})
    add("inner", reconfigured("inner", intermediate_size=32768), rmsq={"backend": "nki-sim"})
    add("many tokens", rmsq={"backend": "nki-sim"}, engine={"max_num_batched_tokens": 65536})
    add("nki without simulator", rmsq={"backend": "nki"})
    add("unannounced", engine={"hf_overrides": {"quantization_config": {}}})
    add("unspoken of", reconfigured("unspoken", quantization_config=None))
    add("waived", neuron={"quantization": "mxfp8"})
    static = reconfigured("waived-static", quantization_config=REFUSED["static"][0])
    add("waived static", static, neuron={"quantization": "mxfp8"})
    add("modelopt", reconfigured("modelopt", quantization_config=MODELOPT), rmsq={"attention": "fp8"})
    ignored = MODELOPT | {"ignore": ["lm_head", "*.o_proj"]}
    add("modelopt, ignored", reconfigured("modelopt-ignored", quantization_config=ignored))
    add("modelopt, off", reconfigured("modelopt-off", quantization_config=MODELOPT), rmsq={"backend": "off"})
    unquantized = _bf16(checkpoint, folder / "bf16")
    add("not FP8", unquantized)
    add("strict, not FP8", unquantized, rmsq={"strict": "1"})
    log = folder / "run"
    found = dict(zip(jobs, drive(list(jobs.values()), log, NKI_SIMULATOR=""), strict=True))
    return found | {"folder": folder, "log": (log / "log").read_text()}


def _bf16(checkpoint, folder):
    """The checkpoint unquantized."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {
        name: (t.float() * tensors[f"{name}_scale"].float()).bfloat16() if f"{name}_scale" in tensors else t
        for name, t in tensors.items()
        if not name.endswith("_scale")
    }
    save_file(plain, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_is_not_ours_meets_the_stock_refusal(results, name):
    assert ONLY_KV in results[name]["error"]
    (line,) = [
        line for line in results["log"].splitlines() if f"does not take {results['folder']}/{name} " in line
    ]
    assert REFUSED[name][1] in line


def test_another_architecture_meets_it_too(results):
    assert ONLY_KV in results["MoE"]["error"]
    assert "its architecture is MixtralForCausalLM, not LlamaForCausalLM" in results["log"]


def test_off_gives_the_message_of_vllm_neuron_alone(results, checkpoint, tokens, tmp_path):
    job = {"model": str(checkpoint), "tokens": tokens, "prompt": 16, "fails": True}
    (alone,) = drive([job], tmp_path, VLLM_PLUGINS="neuron")  # our plugin filtered out
    assert results["off"]["error"] == alone["error"]
    assert ONLY_KV in alone["error"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("LoRA", "LoRA is not applied to FP8 weights; serve without --enable-lora"),
        ("attention DP", "neuron_config.attention_dp_size = 2; expected 1"),
        ("DCP", "attention=fp8 knows no decode context parallelism (it is 2); set VLLM_RMSQ_ATTENTION=bf16"),
        ("strict, stock norms", "VLLM_RMSQ_STRICT=1 and VLLM_RMSQ_FUSE=0: no norm would be fused"),
        ("strict, not FP8", "VLLM_RMSQ_STRICT=1 and no norm would be fused: it is not quantized"),
        ("wide", "hidden size: the kernels take 16384 at most, and it is 16640"),
        ("inner", "28672 at most, and it is 32768; set --tensor-parallel-size 2 or more"),
        ("many tokens", "--max-num-batched-tokens: the kernels take 32768 at most, and it is 65536"),
        ("nki without simulator", "backend 'nki' cannot run here"),
    ],
)
def test_what_cannot_be_served_says_why_and_what_to_do(results, name, message):
    assert message in results[name]["error"]


def test_strict_asks_for_the_norms_that_the_stage_fuses(results):
    assert "3 of 6 decoder norms fused" in results["strict"]["report"]  # those before attention are AWS's
    assert "6 of 6 decoder norms fused" in results["strict, fp8"]["report"]


class TestCodesAreNeverReadAsNumbers:
    def test_a_quantization_that_is_hidden(self, results):
        # vLLM 0.32 fills what was emptied with keys of its own, which the stock Llama refuses.
        assert "Unsupported quantization_config.quant_method=''" in results["unannounced"]["error"]
        error = results["unspoken of"]["error"]
        assert error.startswith("ValueError: model.layers.0.mlp.down_proj.weight: holds FP8 codes")
        assert "Serve the checkpoint with the quantization_config it came with" in error

    def test_a_refusal_waived_for_another_reason(self, results):
        assert results["waived"]["class"] == "RowFp8LlamaForCausalLM"
        assert "down_proj.weight: holds FP8 codes" in results["waived static"]["error"]


class TestModelOpt:
    def test_the_same_numbers_under_other_keys(self, results, checkpoint, tokens):
        # The validator lets ModelOpt pass, so the architecture keeps its name.
        assert results["modelopt"]["class"] == "RowFp8LlamaForCausalLM"
        assert results["modelopt"]["architecture"] == "LlamaForCausalLM"
        compare(results["modelopt"]["logprobs"], Mirror(checkpoint, "fp8"), tokens[:17])

    def test_ignored_linears_meet_the_stock_refusal(self, results):
        assert "only supports ModelOpt" in results["modelopt, ignored"]["error"]

    def test_off(self, results):
        assert "only supports ModelOpt" in results["modelopt, off"]["error"]


def test_an_unquantized_llama_is_the_stock_one(results):
    result = results["not FP8"]
    assert (result["class"], result["architecture"], result["report"]) == (
        "LlamaForCausalLM",
        "LlamaForCausalLM",
        "None",
    )
    assert torch.isfinite(result["logprobs"]).all()
