"""A model looked at without its weights: the report that serving it would give, in little memory."""

from __future__ import annotations

import json
import resource
import shutil

import fp8_kinds
import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm_models import Loaded, tiny_config, write_checkpoint

from vllm_neuron_rmsq.integrations.vllm import preview, versions

pytestmark = pytest.mark.engine

MODELS = {
    "llama": {},
    # A layer that is read by others, experts, post-norms, vLLM's Transformers backend, a norm of its own.
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "olmo2": {},
    "smollm3": {},
    "gemma2": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "glm4": {},
    "arcee": {},
}
QUICK = ("llama", "qwen3_moe", "smollm3")
LONG = [pytest.param(model, True, marks=pytest.mark.slow) for model in MODELS if model not in QUICK]


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "torch")


def without_weights(report: dict) -> dict:
    """The report but for what only weights tell."""
    linears = [linear | {"halved": None} for linear in report["linears"]]
    halved = None if report["counts"]["packed_linears"] else 0
    return report | {"linears": linears, "counts": report["counts"] | {"halved_linears": halved}}


@pytest.mark.parametrize(("model", "fp8"), [*((model, True) for model in QUICK), ("llama", False), *LONG])
def test_it_is_the_report_of_the_served_model(model, fp8, tmp_path):
    if model == "qwen3_moe" and not hasattr(cpu_moe, "CPUUnquantizedExperts"):
        pytest.skip("no CPUUnquantizedExperts in this vLLM: its experts' forward is made of their numbers")
    if model == "smollm3" and versions.version() < (0, 28):
        pytest.skip("this vLLM's Transformers backend makes all parameters anew in a model without weights")
    checkpoint = write_checkpoint(tiny_config(model, **MODELS[model]), tmp_path / "model", fp8=fp8)
    served = Loaded(checkpoint).report
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    previewed = preview.report(str(bare))
    assert previewed.as_dict() == without_weights(served.as_dict())
    assert json.loads(json.dumps(served.as_dict())) == served.as_dict()


@pytest.mark.parametrize(
    "kind",
    [
        "compressed-tensors tensor static",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("compressed-tensors tensor", "fp8 block", "modelopt channel")
        ),
    ],
)
def test_kinds_of_checkpoint(kind, tmp_path, monkeypatch):
    """Scales of whole tensors are looked at when a model is loaded, so those are numbers here too."""
    monkeypatch.setenv("VLLM_RMSQ_TARGET", "trn3")  # only weights would tell which are halved
    config = tiny_config("llama", hidden_size=256, intermediate_size=384, head_dim=64)
    source = write_checkpoint(config, tmp_path / "bf16", fp8=False)
    checkpoint = fp8_kinds.write(source, tmp_path / "fp8", kind, calibration=[torch.arange(3, 40)])
    served = Loaded(checkpoint).report
    assert len(served.fused) == 4
    assert preview.report(str(checkpoint)).as_dict() == without_weights(served.as_dict())


def test_size_costs_nothing(tmp_path):
    """A Llama of 70 billion parameters: 140 GB in bf16."""
    config = tiny_config(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    )
    scheme = json.loads(
        (write_checkpoint(tiny_config("llama"), tmp_path / "tiny") / "config.json").read_text()
    )
    content = config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "quantization_config": scheme["quantization_config"],
    }
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content, default=str))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = preview.report(str(folder))
    assert (len(report.fused), report.linears, len(report.fused_activations)) == (160, 320, 80)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # KiB
