"""What a compiler of vLLM Neuron's gets: Dynamo's graphs (the route through torch_xla) and AOTAutograd's (the
native one), with backend nki, its kernels run by our simulator."""

from __future__ import annotations

import pytest
from neuron_llamas import Mirror, compare, write
from neuron_standin.run import drive

KERNELS_OF_A_LAYER = {
    # norm, gate_up, SiLU, down
    "bf16": (4, 4),
    # norm, qkv and quantization, o_proj before them; in decode the megakernel has norm and qkv
    "fp8-prefill": (8, 6),
    "fp8": (8, 8),
}
DECODED = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoints") / "plain", num_hidden_layers=2)


@pytest.fixture(scope="module")
def runs(checkpoint, tokens, tmp_path_factory):
    cases = [(stage, route) for stage in KERNELS_OF_A_LAYER for route in ("dynamo", "autograd")]
    jobs = [
        {
            "model": str(checkpoint),
            "rmsq": {"backend": "nki", "attention": stage},
            "tokens": tokens[: 16 + DECODED],
            "prompt": 16,
            "compile": route,
        }
        for stage, route in cases
    ]
    results = drive(jobs, tmp_path_factory.mktemp("graphs"), NKI_SIMULATOR="1")
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize("route", ["dynamo", "autograd"])
@pytest.mark.parametrize("stage", KERNELS_OF_A_LAYER)
class TestGraphs:
    def test_one_for_prefill_and_one_for_decode(self, runs, checkpoint, tokens, stage, route):
        run = runs[stage, route]
        assert len(run["graphs"]) == 2
        compare(run["logprobs"], Mirror(checkpoint, stage), tokens[: 16 + DECODED])

    def test_every_kernel_is_a_node(self, runs, stage, route):
        counts = [
            sum(node[0] == "nki_kernel_wrapper" for node in graph) for graph in runs[stage, route]["graphs"]
        ]
        layers = 2
        assert counts == [layers * count for count in KERNELS_OF_A_LAYER[stage]]

    def test_no_op_of_ours_and_nothing_done_to_bytes(self, runs, stage, route):
        for graph in runs[stage, route]["graphs"]:
            assert not [target for target, *_ in graph if "neuron_rmsq" in target]
            touched = {target for target, came, went, _ in graph if "torch.uint8" in came + went}
            # A kernel with two results gives a pair: getitem takes them apart.
            assert touched <= {"nki_kernel_wrapper", "<built-in function getitem>"}

    def test_indices_of_32_bits(self, runs, stage, route):
        for graph in runs[stage, route]["graphs"]:
            assert any(ours for *_, ours in graph)
            assert not [target for target, came, went, ours in graph if ours and "torch.int64" in came + went]
