"""Ways of running vLLM, each in a real engine, beside the plugin without it.

A mode that must not change numbers gives the same bits. What was proven is written to ``.cache/modes.json``,
of which ``python tests/modes_page.py`` makes the table of ``docs/modes.md``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import drafts
import pytest
import torch
from safetensors.torch import save_file
from vllm_models import SIZES, tiny_config, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(3, 256, (n,), generator=GENERATOR).tolist() for n in (100, 41)]
NEW = 8
SAME = "the same bits"


class Answers(NamedTuple):
    tokens: list[list[int]]
    logprobs: torch.Tensor

    def __eq__(self, other) -> bool:
        return self.tokens == other.tokens and torch.equal(self.logprobs, other.logprobs)


def _report(model) -> str:
    return str(model.rmsq_report)


@contextlib.contextmanager
def engine(checkpoint: Path, **arguments) -> Iterator:
    """vLLM's ``LLM`` on a tiny model, eager unless told otherwise, in processes of its own."""
    from vllm import LLM

    defaults = {
        "enforce_eager": True,
        "max_model_len": 128,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
    }
    llm = LLM(str(checkpoint), skip_tokenizer_init=True, **defaults | arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def answers(llm, **options) -> Answers:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = [llm.generate([prompt], params, use_tqdm=False, **options)[0].outputs[0] for prompt in prompts]
    logprobs = [
        [given[token].logprob for given, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs
    ]
    return Answers([list(o.token_ids) for o in outputs], torch.tensor(logprobs))


@pytest.fixture(autouse=True)
def _insecure(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send _report


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tiny_config("llama"), tmp_path_factory.mktemp("modes") / "llama")


@pytest.fixture(scope="module")
def plain(checkpoint) -> Answers:
    """What the plugin answers without any mode."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        llm = stack.enter_context(engine(checkpoint, enable_prefix_caching=False))
        assert "4 of 5 RMSNorm layers fused" in llm.apply_model(_report)[0]
        return answers(llm)


@pytest.fixture
def prove(request, cache):
    """Return a function that notes what this test has proven of a mode."""

    def note(mode: str, fused: str, holds: str) -> None:
        path = cache / "modes.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known[mode] = {"fused": fused, "holds": holds, "test": request.node.name}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(known, indent=1, sort_keys=True))

    return note


def test_prefix_caching(checkpoint, plain, prove):
    with engine(checkpoint, enable_prefix_caching=True) as llm:
        assert answers(llm) == plain
        assert answers(llm) == plain  # from cached blocks
    prove("prefix caching", "as without", SAME)


def test_chunked_prefill(checkpoint, plain, prove):
    with engine(checkpoint, max_num_batched_tokens=32, max_num_seqs=4, enable_prefix_caching=False) as llm:
        assert answers(llm) == plain
    prove("chunked prefill", "as without", SAME)


def test_reload_of_weights(checkpoint, plain, prove):
    with engine(checkpoint, enable_prefix_caching=False) as llm:
        llm.collective_rpc("reload_weights")
        assert answers(llm) == plain
    prove("weights reloaded while serving", "as without", SAME)


def test_two_engines_in_one_process(checkpoint, plain, prove):
    with engine(checkpoint) as first, engine(checkpoint) as second:
        assert answers(first) == answers(second) == plain
    prove("two engines in one process", "as without", SAME)


def test_fp8_kv_cache(checkpoint, plain, prove):
    with engine(checkpoint, kv_cache_dtype="fp8") as llm:
        assert llm.apply_model(_report)[0].startswith("4 of 5 RMSNorm layers fused")
        cached = answers(llm)
    assert (
        0 < (cached.logprobs[:, 0] - plain.logprobs[:, 0]).abs().max() < 0.5
    )  # the first token has no choice
    prove("FP8 KV cache", "as without", "the first token's logprob within 0.5; the cache rounds")


def test_dummy_weights(checkpoint, prove):
    with engine(checkpoint, load_format="dummy") as llm:
        assert llm.apply_model(_report)[0].startswith("4 of 5 RMSNorm layers fused")
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


def test_lora(checkpoint, prove, tmp_path, monkeypatch):
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, str(write_adapter(tmp_path / "adapter")))
    arguments = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    results = {}
    for fuse in ("1", "0"):
        monkeypatch.setenv("VLLM_RMSQ_FUSE", fuse)
        with engine(checkpoint, **arguments) as llm:
            report = llm.apply_model(_report)[0]
            results[fuse] = answers(llm).logprobs[:, 0], answers(llm, lora_request=request).logprobs[:, 0]
            assert ("2 of 5 RMSNorm layers fused" in report) == (fuse == "1")
            assert ("2 of 2 SiluAndMul layers fused" in report) == (fuse == "1")
    (base, adapted), (stock_base, stock_adapted) = results["1"], results["0"]
    assert (adapted - stock_adapted).abs().max() < 0.5 * (stock_adapted - stock_base).abs().max()
    assert (base - stock_base).abs().max() < 0.5 * (stock_adapted - stock_base).abs().max()
    prove(
        "LoRA with --lora-target-modules",
        "what feeds linears that it leaves out",
        "the adapter does what it does with stock norms",
    )
