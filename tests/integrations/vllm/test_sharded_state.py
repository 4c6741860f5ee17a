"""``sharded_state``: what a rank has loaded, saved and loaded again."""

from __future__ import annotations

import shutil

import fp8_kinds
import pytest
import torch
from fp8_kinds import KINDS
from safetensors.torch import load_file
from vllm.model_executor.model_loader import ShardedStateLoader
from vllm_models import TOKENS, Loaded, tiny_config, write_checkpoint

from vllm_neuron_rmsq.integrations.vllm import versions

pytestmark = pytest.mark.engine  # loads models as vLLM does

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}
BY_DEFAULT = ("compressed-tensors channel", "fp8 tensor static", "fp8 block")
PACKED = [kind for kind in KINDS if "weight-only" not in kind and not kind.startswith("modelopt")]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    config = tiny_config("llama", attention_bias=True, tie_word_embeddings=True, **SIZES)
    return write_checkpoint(config, tmp_path_factory.mktemp("llama") / "bf16", fp8=False)


def load(kind, folder, **engine_args):
    return Loaded(folder, allow_deprecated_quantization=kind.startswith("fbgemm"), **engine_args)


def save(loaded, checkpoint, folder):
    folder.mkdir()
    ShardedStateLoader.save_model(loaded.model, str(folder))
    shutil.copy(checkpoint / "config.json", folder)
    return folder


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in BY_DEFAULT else pytest.mark.slow) for k in PACKED]
)
def test_what_is_loaded_again_gives_the_same_bits(kind, bf16, tmp_path):
    """Codes of these kinds go up to 448, so all weights were halved; the second time none is."""
    checkpoint = fp8_kinds.write(bf16, tmp_path / "fp8", kind, calibration=[TOKENS.long()])
    first = load(kind, checkpoint)
    assert first.report.halved == 8
    logits = first.logits()
    saved = save(first, checkpoint, tmp_path / "saved")
    assert torch.equal(first.logits(), logits)
    again = load(kind, saved, load_format="sharded_state")
    assert again.report.halved == 0 and len(again.report.fused) == 4
    assert torch.equal(again.logits(), logits)


def test_a_weight_that_vllm_drops_is_missed(bf16, tmp_path):
    """ModelOpt's lm_head is a bf16 linear, whose weight vLLM's CPU build gives to oneDNN and drops."""
    if versions.version() < (0, 28):
        pytest.skip("this vLLM cannot load ModelOpt's checkpoints of models with tied embeddings")
    kind = "modelopt channel"
    checkpoint = fp8_kinds.write(bf16, tmp_path / "fp8", kind, calibration=[TOKENS.long()])
    saved = save(load(kind, checkpoint), checkpoint, tmp_path / "saved")
    with pytest.raises((KeyError, ValueError), match=r"embed_tokens.weight|lm_head.weight"):
        load(kind, saved, load_format="sharded_state")


def test_the_codes_are_the_checkpoints(bf16, tmp_path, monkeypatch):
    """So stock vLLM can load them, too."""
    monkeypatch.setenv("VLLM_RMSQ_TARGET", "trn3")
    kind = "compressed-tensors channel"
    checkpoint = fp8_kinds.write(bf16, tmp_path / "fp8", kind, calibration=[TOKENS.long()])
    saved = save(load(kind, checkpoint), checkpoint, tmp_path / "saved")
    (shard,) = saved.glob("*.safetensors")
    written, original = load_file(shard), fp8_kinds.load(checkpoint)
    down = "model.layers.1.mlp.down_proj"
    assert torch.equal(
        written[f"{down}.weight"].view(torch.uint8), original[f"{down}.weight"].view(torch.uint8)
    )
    assert torch.equal(written[f"{down}.weight_scale"], original[f"{down}.weight_scale"])


def test_what_has_no_checkpoint_form_is_refused(bf16, tmp_path):
    kind = "compressed-tensors tensor weight-only"
    checkpoint = fp8_kinds.write(bf16, tmp_path / "fp8", kind, calibration=[TOKENS.long()])
    with pytest.raises(ValueError, match=r"layers.0.self_attn.qkv_proj: expected .* got FP8 weights alone"):
        save(load(kind, checkpoint), checkpoint, tmp_path / "weights")
    online = Loaded(bf16, quantization="fp8_per_channel")
    with pytest.raises(ValueError, match=r"qkv_proj: expected .* got a weight that was quantized at load"):
        save(online, bf16, tmp_path / "online")
