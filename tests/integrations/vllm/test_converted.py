"""Stock vLLM, the plugin and transformers load what ``convert`` makes, and it is the model it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_model, write_tokenizer
from transformers import AutoModelForCausalLM
from vllm_models import TOKENS, Loaded

from vllm_neuron_rmsq.checkpoint import convert

pytestmark = pytest.mark.engine  # each test loads a model as vLLM does

MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", MOE),
    "granitemoe": ("granitemoe", MOE),
    "qwen3_moe": ("qwen3_moe", {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 64}),
}
TEXT = "one two three four " * 300
EXPERTS = r"re:.*\.experts\."
BOTH = ("off", "torch")
CASES = {
    # name: (model, arguments of convert, linears in FP8, those of vLLM's that multiply packed rows, backends)
    "per-channel": ("llama", {}, 14, 8, BOTH),
    "per-tensor": ("llama", {"scheme": "per-tensor"}, 14, 8, BOTH),
    # vLLM has no kernel for static activations on a CPU.
    "static": ("llama", {"scheme": "static", "calibration_text": TEXT}, 14, 8, ("torch",)),
    "some ignored": ("llama", {"ignore": ["re:.*down_proj"]}, 12, 6, BOTH),
    "lm_head": ("llama", {"lm_head": True}, 15, 9, BOTH),
    "tied lm_head": ("tied", {"lm_head": True}, 15, 9, BOTH),
    "experts as linears": ("mixtral", {}, 8, 4, BOTH),
    "fused experts": ("granitemoe", {}, 8, 4, BOTH),
    "ignored experts": ("qwen3_moe", {"ignore": [EXPERTS]}, 8, 4, BOTH),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write a bf16 model of :data:`MODELS` once; a text has something to calibrate it by."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            kind, changes = MODELS[name]
            folders[name] = write_model(tmp_path_factory.mktemp(name) / "bf16", kind, **changes)
            write_tokenizer(folders[name])
        return folders[name]

    return make


def logits(folder: Path) -> torch.Tensor:
    """What transformers makes of a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        return model(TOKENS.long()[None]).logits[0].float()


def served(folder: Path, backend: str) -> Loaded:
    return Loaded(folder, additional_config={"rmsq": {"backend": backend}})


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.nn.functional.cosine_similarity(found.float(), expected.float()).min() > 0.98)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_model(name, source, tmp_path):
    model, options, linears, packed, backends = CASES[name]
    bf16, out = source(model), tmp_path / "fp8"
    assert len(convert(bf16, out, **options).layers) == linears
    expected = served(bf16, "off").logits()
    for backend in backends:
        loaded = served(out, backend)
        assert close(loaded.logits(), expected), backend
        assert (loaded.report.linears if loaded.report else None) == (None if backend == "off" else packed)
    assert close(logits(out), logits(bf16))


@pytest.mark.parametrize("scheme", ["per-channel", "per-tensor"])
def test_bringing_codes_within_the_range_changes_nothing(scheme, source, tmp_path):
    """The plugin halves what is beyond ±240 at load, ``--from-fp8`` before: the same bits are served."""
    convert(source("llama"), tmp_path / "ocp", "trn3", scheme=scheme)
    convert(tmp_path / "ocp", tmp_path / "fp8", from_fp8=True)
    before, after = (served(tmp_path / name, "torch") for name in ("ocp", "fp8"))
    assert (before.report.halved, after.report.halved) == (8, 0)
    assert torch.equal(before.logits(), after.logits())
