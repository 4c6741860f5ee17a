"""Ways of running vLLM, each in a real engine, beside the plugin without it.

A mode that must not change numbers gives the same bits. What was proven is written to ``.cache/modes.json``,
of which ``python tests/modes_page.py`` makes the table of ``docs/modes.md``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import drafts
import pytest
import torch
import wrapped
from modes import SAME, answers, engine, report
from safetensors.torch import save_file
from vllm_models import SIZES, tiny_config, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _insecure(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send modes.report


def test_prefix_caching(tiny, plain, prove):
    with engine(tiny, enable_prefix_caching=True) as llm:
        assert answers(llm) == plain
        assert answers(llm) == plain  # from cached blocks
    prove("prefix caching", "as without", SAME)


def test_chunked_prefill(tiny, plain, prove):
    with engine(tiny, max_num_batched_tokens=32, max_num_seqs=4, enable_prefix_caching=False) as llm:
        assert answers(llm) == plain
    prove("chunked prefill", "as without", SAME)


def test_reload_of_weights(tiny, plain, prove):
    with engine(tiny, enable_prefix_caching=False) as llm:
        llm.collective_rpc("reload_weights")
        assert answers(llm) == plain
    prove("weights reloaded while serving", "as without", SAME)


def test_two_engines_in_one_process(tiny, plain, prove):
    with engine(tiny) as first, engine(tiny) as second:
        assert answers(first) == answers(second) == plain
    prove("two engines in one process", "as without", SAME)


def test_fp8_kv_cache(tiny, plain, prove):
    with engine(tiny, kv_cache_dtype="fp8") as llm:
        assert llm.apply_model(report)[0].startswith("4 of 5 RMSNorm layers fused")
        cached = answers(llm)
    assert (
        0 < (cached.logprobs[:, 0] - plain.logprobs[:, 0]).abs().max() < 0.5
    )  # the first token has no choice
    prove("FP8 KV cache", "as without", "the first token's logprob within 0.5; the cache rounds")


def test_dummy_weights(tiny, prove):
    with engine(tiny, load_format="dummy") as llm:
        assert llm.apply_model(report)[0].startswith("4 of 5 RMSNorm layers fused")
        assert answers(llm).logprobs.isfinite().all()
    prove("dummy weights", "as without", "finite logprobs")


def write_adapter(folder: Path) -> Path:
    """A LoRA adapter of q_proj and v_proj."""
    folder.mkdir()
    torch.manual_seed(5)
    tensors = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for part, rows in (("q", SIZES["hidden_size"]), ("v", drafts.KV)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj"
            tensors[f"{name}.lora_A.weight"] = (torch.randn(8, SIZES["hidden_size"]) * 0.1).bfloat16()
            tensors[f"{name}.lora_B.weight"] = (torch.randn(rows, 8) * 0.1).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"bias": "none", "task_type": "CAUSAL_LM"})
    )
    return folder


def test_lora(tiny, prove, tmp_path, monkeypatch):
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, str(write_adapter(tmp_path / "adapter")))
    arguments = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    results = {}
    for fuse in ("1", "0"):
        monkeypatch.setenv("VLLM_RMSQ_FUSE", fuse)
        with engine(tiny, **arguments) as llm:
            line = llm.apply_model(report)[0]
            results[fuse] = answers(llm).logprobs[:, 0], answers(llm, lora_request=request).logprobs[:, 0]
            assert ("2 of 5 RMSNorm layers fused" in line) == (fuse == "1")
            assert ("2 of 2 SiluAndMul layers fused" in line) == (fuse == "1")
    (base, adapted), (stock_base, stock_adapted) = results["1"], results["0"]
    assert (adapted - stock_adapted).abs().max() < 0.5 * (stock_adapted - stock_base).abs().max()
    assert (base - stock_base).abs().max() < 0.5 * (stock_adapted - stock_base).abs().max()
    prove(
        "LoRA with --lora-target-modules",
        "what feeds linears that it leaves out",
        "the adapter does what it does with stock norms",
    )


def test_structured_output(prove, tmp_path):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    path = write_checkpoint(tiny_config("llama", vocab_size=wrapped.VOCABULARY), tmp_path / "llama")
    wrapped.tokenizer().save_pretrained(path)
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "city": {"enum": ["Paris", "Lima"]}},
        "required": ["sure", "city"],
        "additionalProperties": False,
    }
    kinds = {"json": schema, "regex": r"[0-9]{3}-[a-f]{2}", "choice": ["yes", "no", "perhaps"]}
    options = {"temperature": 0, "max_tokens": 80, "logprobs": -1}

    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    arguments = {"skip_tokenizer_init": False, "max_logprobs": -1, "enable_prefix_caching": False}
    with engine(path, structured_outputs_config=compact, **arguments) as llm:
        assert "4 of 5 RMSNorm layers fused" in llm.apply_model(report)[0]
        before = answers(llm)
        free = SamplingParams(**options | {"max_tokens": 1})
        outputs = {}
        for kind, wanted in kinds.items():
            structure = StructuredOutputsParams(**{kind: wanted})
            asked = [free, SamplingParams(**options, structured_outputs=structure)]
            both = llm.generate(["Where?", "Where?"], asked, use_tqdm=False)
            outputs[kind] = [output.outputs[0] for output in both]
        assert answers(llm) == before
    sure = json.loads(outputs["json"][1].text)
    assert sure["sure"] in (True, False) and sure["city"] in ("Paris", "Lima")
    assert re.fullmatch(kinds["regex"], outputs["regex"][1].text)
    assert outputs["choice"][1].text in kinds["choice"]
    for loose, bound in outputs.values():
        # What is allowed is as likely, beside the rest of it, as it is without structure.
        allowed = [t for t, logprob in bound.logprobs[0].items() if logprob.logprob > -torch.inf]
        assert 0 < len(allowed) < 100
        without, given = (
            torch.tensor([output.logprobs[0][token].logprob for token in allowed])
            for output in (loose, bound)
        )
        torch.testing.assert_close(given, without.log_softmax(0), rtol=0, atol=1e-5)
    prove("structured output", "as without", "valid, by the same logits; other requests the same bits")


def draft_report(worker) -> str:
    return str(worker.model_runner.drafter.model.rmsq_report)


DRAFTS = {
    "eagle": "1 of 1 RMSNorm layers fused",
    "eagle3": "1 of 4 RMSNorm layers fused",
    "mtp": "2 of 5 RMSNorm layers fused",
}


@pytest.mark.parametrize("method", DRAFTS)
def test_drafts(method, prove, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_STRICT", "1")
    model, config = drafts.speculative(method, tmp_path)
    with engine(model) as llm:
        without = answers(llm)
    with engine(model, speculative_config=config, disable_log_stats=False) as llm:
        (line,) = llm.collective_rpc(draft_report)
        assert line.startswith(DRAFTS[method])
        assert answers(llm).tokens == without.tokens
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0
    prove(
        f"{method.upper()} draft in FP8".replace("EAGLE3", "EAGLE-3"),
        "the draft's, too; STRICT accepts",
        "the same tokens",
    )


def test_a_language_model_in_a_multimodal_one(prove, tmp_path):
    from PIL import Image
    from vllm import SamplingParams

    path = wrapped.write_idefics3(tmp_path / "idefics3")
    with engine(path, skip_tokenizer_init=False) as llm:
        assert "4 of 5 RMSNorm layers fused" in llm.apply_model(report)[0]
        assert answers(llm).logprobs.isfinite().all()
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=0)
        logprobs = []
        for color in ("black", "orange"):
            picture = {
                "prompt": "<image> What?",
                "multi_modal_data": {"image": Image.new("RGB", (28, 28), color)},
            }
            (output,) = llm.generate([picture], params, use_tqdm=False)
            (answer,) = output.outputs
            logprobs.append(
                [given[t].logprob for given, t in zip(answer.logprobs, answer.token_ids, strict=True)]
            )
    assert torch.tensor(logprobs).isfinite().all() and logprobs[0] != logprobs[1]
    prove("a multimodal model (Idefics 3)", "its language model", "text, and pictures that are seen")
