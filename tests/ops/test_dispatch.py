"""How ops find their backend: settings, ``auto``, ``off``, torch.compile, and a backend from outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_inputs import GAMMA, HIDDEN, SCALE, WEIGHT, rows

from vllm_neuron_rmsq import backends, ops, reference, settings
from vllm_neuron_rmsq.backends.torch import TorchFunctions
from vllm_neuron_rmsq.settings import Settings
from vllm_neuron_rmsq.target import TRN3


@pytest.fixture(autouse=True)
def fresh_settings():
    yield
    settings.install(None)


@pytest.mark.parametrize("static_scale", [None, 0.1])
def test_compiles_whole_with_a_dynamic_number_of_rows(static_scale):
    prepacked = ops.prepack_fp8_weight(WEIGHT, SCALE, backend="torch")
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def layer(hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        packed, residual = ops.rms_norm_quant(
            hidden, GAMMA, residual=residual, static_scale=static_scale, backend="torch"
        )
        if static_scale is not None:
            return packed, residual
        return ops.packed_fp8_linear(packed, prepacked, SCALE), residual

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=record)
    for tokens in (2, 5, 33):
        hidden, residual = rows(tokens, 16, seed=tokens), rows(tokens, 16, seed=99)
        for got, expected in zip(compiled(hidden, residual), layer(hidden, residual), strict=True):
            assert torch.equal(got, expected)
    assert len(graphs) == 1, "one graph must serve every number of rows"
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("add_rms_norm_quant.torch" in target for target in targets), targets


def test_inductor_agrees_with_eager():
    def layer(hidden: torch.Tensor) -> torch.Tensor:
        packed = ops.rms_norm_quant(hidden * 2, GAMMA, backend="torch")
        return ops.packed_fp8_linear(packed, WEIGHT, SCALE, backend="torch") + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (3, 8):
        hidden = rows(tokens, 16, seed=tokens)
        torch.testing.assert_close(compiled(hidden), layer(hidden))


def test_target_and_backend_come_from_the_settings():
    settings.install(Settings(backend="torch", target="trn3"))
    expected = reference.rms_norm_quant(HIDDEN, GAMMA, target="trn3")
    assert torch.equal(ops.rms_norm_quant(HIDDEN, GAMMA), expected)
    assert ops.prepack_fp8_weight(WEIGHT, SCALE).backend == "torch"
    assert torch.equal(
        ops.rms_norm_quant(HIDDEN, GAMMA, target="trn2"),
        reference.rms_norm_quant(HIDDEN, GAMMA, target="trn2"),
    )


def test_auto_takes_what_can_run(monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None if name == "torch" else "not today")
    backends.resolve.cache_clear()
    try:
        assert backends.resolve("auto", "cpu") == "torch"
        assert backends.resolve("auto", "cuda") == "torch"
        with pytest.raises(
            backends.BackendUnavailableError, match="backend 'cpu' cannot run here: not today"
        ):
            backends.resolve("cpu", "cpu")
        with pytest.raises(backends.BackendUnavailableError, match="backend 'nki' cannot run here"):
            backends.resolve("auto", "neuron")
    finally:
        backends.resolve.cache_clear()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend: expected one of auto, nki, .*; got 'cup'"):
        ops.rms_norm_quant(HIDDEN, GAMMA, backend="cup")


def test_off_is_a_setting_of_serving_only(monkeypatch):
    monkeypatch.setenv("VLLM_RMSQ_BACKEND", "off")
    settings.install(None)
    expected = ops.rms_norm_quant(HIDDEN, GAMMA, backend="auto")
    assert torch.equal(ops.rms_norm_quant(HIDDEN, GAMMA), expected)
    assert backends.for_serving("off", "cpu")[0] is None


class Doubling(TorchFunctions):
    """A toy: plain torch, with one bit of every code another, so that one sees who computed."""

    def rms_norm_quant(self, *arguments):
        out, residual_out = super().rms_norm_quant(*arguments)
        return out ^ 1, residual_out

    def prepack_fp8_weight(self, weight, blocks):
        return weight.t().contiguous()

    def packed_fp8_linear(self, packed, weight, *rest):
        return super().packed_fp8_linear(packed, weight.t(), *rest)


def test_a_backend_is_one_record(monkeypatch):
    """Settings, overloads and fakes follow from the registry, also for a backend that comes late."""
    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    toy = backends.Backend(
        "toy-2", unavailable=lambda: None, functions=Doubling(), prepacked_shape=lambda n, h, blocks: (h, n)
    )
    backends.register(toy)
    assert Settings.load({"VLLM_RMSQ_BACKEND": "toy-2"}).backend == "toy-2"
    settings.install(Settings(backend="toy-2", target="trn3"))
    expected = reference.rms_norm_quant(HIDDEN, GAMMA, target=TRN3)
    assert torch.equal(ops.rms_norm_quant(HIDDEN, GAMMA), expected ^ 1)
    prepacked = ops.prepack_fp8_weight(WEIGHT, SCALE)
    assert (prepacked.backend, tuple(prepacked.data.shape)) == ("toy-2", (16, 8))

    @torch.compile(backend="eager", fullgraph=True)
    def layer(hidden):
        return ops.packed_fp8_linear(ops.rms_norm_quant(hidden, GAMMA) ^ 1, prepacked, SCALE)

    assert torch.equal(layer(HIDDEN), ops.packed_fp8_linear(expected, WEIGHT, SCALE, backend="torch"))
    assert backends.for_serving("toy-2", "cpu") == ("toy-2", "")
    assert torch.equal(ops.silu_mul_quant(HIDDEN), reference.silu_mul_quant(HIDDEN, target="trn3"))


@pytest.mark.parametrize("name", ["torch", "auto", "off"])
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(ValueError, match=f"backend: expected a name that is not taken, got '{name}'"):
        backends.register(backends.Backend(name, lambda: None, TorchFunctions()))


@pytest.mark.parametrize("target", ["trn2", TRN3])
def test_a_target_by_name_or_whole_in_a_graph(target):
    compiled = torch.compile(
        lambda hidden: ops.rms_norm_quant(hidden, GAMMA, target=target, backend="torch"),
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(HIDDEN), reference.rms_norm_quant(HIDDEN, GAMMA, target=target))
