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
GATHERED = {
    # dtype and width of a token's row, H = 256
    "uint8": ("torch.uint8", 256 + 4),
    "float8": ("torch.float8_e4m3fn", 256 + 4),
    "int32": ("torch.int32", (256 + 4) // 4),
    "bf16": ("torch.bfloat16", 256),
}
MOVES = {
    *("nki_kernel_wrapper", "<built-in function getitem>", "<built-in function getattr>"),
    *("<built-in method empty of type object>", "copy_", "reshape", "movedim", "view"),
    *(f"_c10d_functional.{name}" for name in ("all_gather_into_tensor", "wait_tensor")),
    *(f"_c10d_functional.{name}.default" for name in ("all_gather_into_tensor", "wait_tensor")),
    *(f"aten.{name}.default" for name in ("copy", "view", "permute", "detach")),
    *("aten.empty.memory_format", "aten.view.dtype"),
}
"""What may be done to packed rows between two kernels."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoints") / "plain", num_hidden_layers=2)


CASES = [(stage, route) for stage in KERNELS_OF_A_LAYER for route in ("dynamo", "autograd")]


def jobs(checkpoint, tokens):
    return [
        {
            "model": str(checkpoint),
            "rmsq": {"backend": "nki", "attention": stage},
            "tokens": tokens[: 16 + DECODED],
            "prompt": 16,
            "compile": route,
        }
        for stage, route in CASES
    ]


@pytest.fixture(scope="module")
def runs(checkpoint, tokens, tmp_path_factory):
    results = drive(jobs(checkpoint, tokens), tmp_path_factory.mktemp("graphs"), NKI_SIMULATOR="1")
    return dict(zip(CASES, results, strict=True))


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
            touched = {target for target, came, went, *_ in graph if "torch.uint8" in came + went}
            # A kernel with two results gives a pair: getitem takes them apart.
            assert touched <= {"nki_kernel_wrapper", "<built-in function getitem>"}

    def test_indices_of_32_bits(self, runs, stage, route):
        for graph in runs[stage, route]["graphs"]:
            assert any(ours for *_, ours, _ in graph)
            wide = [target for target, came, went, ours, _ in graph if ours and "torch.int64" in came + went]
            assert not wide


class TestCompilingOnAHostWithoutDevices:
    """VLLM_NEURON_CPU_COMPILE=1: the model has no weights and stays on the meta device."""

    @pytest.fixture(scope="class")
    @classmethod
    def compiled(cls, checkpoint, tokens, tmp_path_factory):
        # No device type "cpu" there, and no simulator: nothing is computed.
        env = {"VLLM_NEURON_CPU_MODE": "0", "VLLM_NEURON_CPU_COMPILE": "1"}
        env |= {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"}
        results = drive(jobs(checkpoint, tokens), tmp_path_factory.mktemp("compiled"), **env)
        return dict(zip(CASES, results, strict=True))

    @pytest.mark.parametrize("route", ["dynamo", "autograd"])
    @pytest.mark.parametrize("stage", KERNELS_OF_A_LAYER)
    def test_the_graphs_are_those_that_serve(self, compiled, runs, stage, route):
        run = compiled[stage, route]
        assert run["class"] == "RowFp8LlamaForCausalLM"
        assert run["graphs"] == runs[stage, route]["graphs"]
        assert run["logprobs"].is_meta
        fused, linears = (2, 6) if stage == "bf16" else (4, 14)
        said = f"{fused} of 4 decoder norms fused, {linears} of 14 linears in row FP8"
        assert said in run["report"] and "target trn2 (no weights read)" in run["report"]


class TestTwoRanks:
    """Prefill's all-gathers in the graph: one before attention and one before the MLP."""

    @pytest.fixture(scope="class")
    @classmethod
    def prefills(cls, tokens, tmp_path_factory):
        folder = tmp_path_factory.mktemp("ranks")
        checkpoint = write(folder / "plain", num_hidden_layers=1)
        cases = [(gather, route) for gather in GATHERED for route in ("dynamo", "autograd")]
        jobs = [
            {
                "model": str(checkpoint),
                "rmsq": {"backend": "nki", "attention": "fp8", "gather": gather},
                "tokens": tokens[:16],
                "prompt": 16,
                "compile": route,
                # Gloo knows no float8: that graph is not run.
                "env": {"VLLM_NEURON_CPU_COMPILE": str(int(gather == "float8"))},
            }
            for gather, route in cases
        ]
        env = {"NKI_SIMULATOR": "1", "NEURON_LOGICAL_NC_CONFIG": "1"}
        results = drive(jobs, folder / "run", ranks=2, **env)
        found = dict(zip(cases, results, strict=True))
        return {case: graph for case, run in found.items() for graph in run["graphs"]}

    @pytest.mark.parametrize("route", ["dynamo", "autograd"])
    @pytest.mark.parametrize("gather", GATHERED)
    def test_what_the_ranks_gather(self, prefills, gather, route):
        graph = prefills[gather, route]
        dtype, width = GATHERED[gather]
        gathers = [(came, went, shapes) for target, came, went, _, shapes in graph if "all_gather" in target]
        assert gathers[:2] == 2 * [([dtype], [dtype], [[16, width]])]
        assert all(went == ["torch.bfloat16"] for _, went, _ in gathers[2:])  # the last norm's and the logits

    @pytest.mark.parametrize("route", ["dynamo", "autograd"])
    @pytest.mark.parametrize("gather", GATHERED)
    def test_bytes_are_moved_and_nothing_else(self, prefills, gather, route):
        touched = {
            target for target, came, went, *_ in prefills[gather, route] if "torch.uint8" in came + went
        }
        assert "nki_kernel_wrapper" in touched
        assert touched <= MOVES
