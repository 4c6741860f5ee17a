"""Tiny Llamas through vLLM's configuration, the platform's validator, the worker's registration and our
model, against a plain PyTorch forward that mirrors the stage."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from neuron_llamas import SIZES, Mirror, compare, write
from neuron_standin.run import drive

STAGES = ("bf16", "fp8-prefill", "fp8")
KINDS = {
    "plain": {},
    "tied": {"tied": True, "files": 3},
    "biased": {"biases": True},
    "per-tensor": {"per_tensor": True},
}
BACKENDS = {
    "torch": ("torch", {}),
    "cpu": ("cpu", {}),
    "nki-sim": ("nki-sim", {"NEURON_LOGICAL_NC_CONFIG": "1"}),
    "nki-sim-lnc2": ("nki-sim", {"NEURON_LOGICAL_NC_CONFIG": "2"}),
    "nki": ("nki", {"NKI_SIMULATOR": "1", "NEURON_LOGICAL_NC_CONFIG": "2"}),
}
PROMPT = 16
AUX = [0, 1, 2]
EVERYTHING = [*itertools.product((1, 2, 4), STAGES, KINDS, BACKENDS)]
QUICK = {
    *itertools.product((1,), STAGES, KINDS, ("torch",)),
    *itertools.product((1,), STAGES, ("plain", "biased"), ("cpu",)),
    *itertools.product((1,), ("bf16", "fp8"), ("plain",), ("nki-sim-lnc2",)),
    (1, "fp8-prefill", "biased", "nki-sim"),
    (1, "fp8", "biased", "nki"),
    *itertools.product((2,), STAGES, ("plain", "biased"), ("cpu",)),
    (2, "fp8", "per-tensor", "nki-sim-lnc2"),
    *itertools.product((4,), STAGES, ("tied",), ("cpu",)),
    (4, "fp8", "biased", "torch"),
}
"""What is run every time; the rest of the matrix is marked slow. Four ranks share two KV heads."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: write(folder / kind, **options) for kind, options in KINDS.items()}


@pytest.fixture(scope="module")
def runs(request, checkpoints, tokens, tmp_path_factory):
    """Results of the cases that were selected, so many ranks at a time."""
    wanted = {item.callspec.params["case"] for item in request.session.items if "case" in _params(item)}

    @functools.cache
    def on(ranks):
        cases = [case for case in EVERYTHING if case in wanted and case[0] == ranks]
        jobs = []
        for _, stage, kind, name in cases:
            backend, env = BACKENDS[name]
            rmsq = {"backend": backend, "attention": stage}
            job = {
                "model": str(checkpoints[kind]),
                "rmsq": rmsq,
                "tokens": tokens,
                "prompt": PROMPT,
                "env": env,
            }
            jobs.append(job)
        return dict(zip(cases, drive(jobs, tmp_path_factory.mktemp("runs"), ranks), strict=True))

    return on


def _params(item) -> dict:
    return getattr(getattr(item, "callspec", None), "params", {})


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(map(str, case)))
        for case in EVERYTHING
    ],
)
def test_first_choices_and_logprobs(runs, checkpoints, tokens, case):
    ranks, stage, kind, _ = case
    result = runs(ranks)[case]
    assert result["class"] == result["architecture"] == "RowFp8LlamaForCausalLM"
    compare(result["logprobs"], Mirror(checkpoints[kind], stage, ranks), tokens)


@pytest.fixture(scope="module")
def variants(checkpoints, tokens, tmp_path_factory):
    """One stage or checkpoint in other ways of running it, on two ranks."""
    plain = {"model": str(checkpoints["plain"]), "tokens": tokens, "prompt": PROMPT}
    jobs = {}
    for stage in STAGES:
        rmsq = {"backend": "torch", "attention": stage}
        jobs[stage, "whole"] = {**plain, "rmsq": rmsq}
        jobs[stage, "segmented"] = {**plain, "rmsq": rmsq, "chunks": 2}
        jobs[stage, "padded"] = {**plain, "rmsq": rmsq, "prompt": 13, "bucket": 16}
        jobs[stage, "two new tokens"] = {**plain, "rmsq": rmsq, "new": 2}
        longer = {"tokens": tokens + tokens[::-1], "prompt": 44, "shared": 32}
        jobs[stage, "prefix"] = {**plain, **longer, "rmsq": rmsq}
    for gather in ("float8", "int32", "bf16"):
        rmsq = {"backend": "torch", "attention": "fp8", "gather": gather}
        jobs["fp8", gather] = {**plain, "rmsq": rmsq}
    scaled = write(tmp_path_factory.mktemp("scaled") / "plain", kv_scale=0.03125)
    for stage in STAGES:
        jobs[stage, "FP8 cache"] = {
            **jobs[stage, "whole"],
            "model": str(scaled),
            "engine": {"kv_cache_dtype": "fp8"},
        }
    for stage in STAGES:
        jobs[stage, "aux"] = {**jobs[stage, "whole"], "aux": AUX}
    jobs["fp8", "stock norms"] = {**plain, "rmsq": {"backend": "torch", "attention": "fp8", "fuse": "0"}}
    results = drive(list(jobs.values()), tmp_path_factory.mktemp("variants"), ranks=2)
    return dict(zip(jobs, results, strict=True))


@pytest.mark.parametrize("way", ["segmented", "two new tokens"])
@pytest.mark.parametrize("stage", STAGES)
def test_other_steps_through_the_same_tokens(variants, checkpoints, tokens, stage, way):
    compare(variants[stage, way]["logprobs"], Mirror(checkpoints["plain"], stage, 2), tokens)


@pytest.mark.parametrize("stage", STAGES)
def test_a_prompt_padded_to_its_bucket(variants, checkpoints, tokens, stage):
    compare(variants[stage, "padded"]["logprobs"], Mirror(checkpoints["plain"], stage, 2, prompt=13), tokens)


@pytest.mark.parametrize("stage", STAGES)
def test_a_prefix_that_another_sequence_computed(variants, checkpoints, tokens, stage):
    mirror = Mirror(checkpoints["plain"], stage, 2, prompt=44)
    compare(variants[stage, "prefix"]["logprobs"], mirror, tokens + tokens[::-1])


@pytest.mark.parametrize("stage", STAGES)
def test_an_fp8_cache_with_scales(variants, stage):
    """Prefill does not read it. Decode loses what FP8 loses, as much with any attention; a scale that was
    forgotten would be a factor of 32."""
    plain, cached = variants[stage, "whole"]["logprobs"], variants[stage, "FP8 cache"]["logprobs"]
    assert torch.equal(plain[:PROMPT], cached[:PROMPT])
    assert 0 < (plain - cached)[PROMPT:].abs().mean() < 0.05


@pytest.mark.parametrize("stage", STAGES)
def test_what_eagle3_reads_between_layers_is_plain(variants, checkpoints, tokens, stage):
    """``[T, H]`` bf16 before each layer that was asked for, side by side, of all tokens on every rank."""
    result, mirror = variants[stage, "aux"], Mirror(checkpoints["plain"], stage, 2)
    assert torch.equal(result["logprobs"], variants[stage, "whole"]["logprobs"])
    states, aux = mirror.states(tokens), result["aux"]
    assert aux.dtype == torch.bfloat16 and aux.shape == (len(tokens), len(AUX) * SIZES["hidden_size"])
    ours = aux.float().chunk(len(AUX), dim=-1)
    assert torch.equal(ours[0], states[0].float())  # the embedding
    mirror.noise = 2.0**-8  # half a bf16 step in each matmul's result, as in compare()
    torch.manual_seed(0)
    moved = [mirror.states(tokens) for _ in range(8)]
    for layer in AUX[1:]:
        bound = max(_apart(draw[layer], states[layer]) for draw in moved)
        assert _apart(ours[layer], states[layer]) <= bound
        assert 4 * bound < min(_apart(states[layer], states[near]) for near in (layer - 1, layer + 1))


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


class TestBytesOnTheWire:
    """Prefill gathers twice a layer, once for attention and once for the MLP, and reduces as stock does."""

    ROWS, WIDTH, LAYERS = PROMPT // 2, SIZES["hidden_size"], SIZES["num_hidden_layers"]

    def gathered(self, result):
        wide = [
            (d, n) for name, d, n in result["wire"] if name == "all_gather" and n >= self.ROWS * self.WIDTH
        ]
        return wide[: 2 * self.LAYERS]

    @pytest.mark.parametrize("stage", STAGES)
    def test_packed_rows_travel(self, variants, stage):
        packed = ("torch.uint8", self.ROWS * (self.WIDTH + 4))
        plain = ("torch.bfloat16", self.ROWS * self.WIDTH * 2)
        before_attention = plain if stage == "bf16" else packed
        assert self.gathered(variants[stage, "whole"]) == self.LAYERS * [before_attention, packed]

    @pytest.mark.parametrize("gather", ["float8", "int32"])
    def test_another_view_of_them(self, variants, gather):
        dtype = {"float8": "torch.float8_e4m3fn", "int32": "torch.int32"}[gather]
        each = (dtype, self.ROWS * (self.WIDTH + 4))
        assert self.gathered(variants["fp8", gather]) == 2 * self.LAYERS * [each]
        assert torch.equal(variants["fp8", gather]["logprobs"], variants["fp8", "whole"]["logprobs"])

    def test_bf16(self, variants, checkpoints, tokens):
        each = ("torch.bfloat16", self.ROWS * self.WIDTH * 2)
        assert self.gathered(variants["fp8", "bf16"]) == 2 * self.LAYERS * [each]
        compare(variants["fp8", "bf16"]["logprobs"], Mirror(checkpoints["plain"], "fp8", 2), tokens)


def test_stock_norms(variants, checkpoints, tokens):
    result = variants["fp8", "stock norms"]
    assert "0 of 6 decoder norms fused, 21 of 21 linears in row FP8" in result["report"]
    compare(result["logprobs"], Mirror(checkpoints["plain"], "fp8", 2, fuse=False), tokens)


def test_report(variants):
    assert variants["bf16", "whole"]["report"].endswith(
        "on vLLM Neuron 0.24.0.1.1.0: 3 of 6 decoder norms fused, 9 of 21 linears in row FP8, attention "
        "bf16, backend torch, target trn2 (9 linears halved), gathering uint8, 1.2 MiB of weights a rank"
    )
    assert (
        "6 of 6 decoder norms fused, 21 of 21 linears in row FP8 (12 in decode), attention fp8-prefill"
        in (variants["fp8-prefill", "whole"]["report"])
    )
    assert (
        "6 of 6 decoder norms fused, 21 of 21 linears in row FP8, attention fp8, backend torch"
        in (variants["fp8", "whole"]["report"])
    )
