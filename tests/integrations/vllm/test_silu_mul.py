"""The second producer: vLLM's own object until it is bound, packed rows afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion.quant_activation import as_quantized_activation

from vllm_neuron_rmsq import reference
from vllm_neuron_rmsq.integrations.vllm import schemes
from vllm_neuron_rmsq.integrations.vllm.activation import PACKED_KEY
from vllm_neuron_rmsq.integrations.vllm.schemes import Binding
from vllm_neuron_rmsq.integrations.vllm.silu_mul import Place, SiluMulQuant, in_place
from vllm_neuron_rmsq.target import TRN2

INTERMEDIATE = 96
BINDING = Binding(schemes.SCHEMES[0], "torch", TRN2)


@pytest.fixture
def stock():
    with set_current_vllm_config(VllmConfig()):
        return SiluAndMul()


@pytest.fixture
def bound(stock):
    module = SiluMulQuant(stock)
    module.bind(BINDING)
    return module


def test_unbound_is_stock(stock):
    x = torch.randn(3, 2 * INTERMEDIATE, dtype=torch.bfloat16)
    assert torch.equal(SiluMulQuant(stock)(x), stock(x))


@pytest.mark.parametrize("rows", [(3,), (1, 3), (0,)])
def test_bound_returns_packed_rows(bound, rows):
    x = torch.randn(*rows, 2 * INTERMEDIATE, dtype=torch.bfloat16)
    out = bound(x)
    assert torch.equal(out.data, reference.silu_mul_quant(x, target=TRN2))
    assert as_quantized_activation(out, PACKED_KEY) is out
    assert out.shape == (*rows, INTERMEDIATE) and out.dtype == x.dtype and out.device == x.device
    assert out.size() == out.shape and out.size(-1) == INTERMEDIATE


def test_compiles_without_graph_breaks(bound):
    x = torch.randn(5, 2 * INTERMEDIATE, dtype=torch.bfloat16)

    def run(x):
        out = bound(x)
        return out.data, out.shape[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for rows in (x, x[:3]):
        (data, count), (expected, expected_count) = compiled(rows), run(rows)
        assert torch.equal(data, expected) and count == expected_count


def test_what_is_not_bound_is_put_back(stock):
    parents = [nn.Module(), nn.Module(), nn.Module()]
    for parent in parents:
        parent.act_fn = stock  # vLLM may use one object in every layer
    with pytest.raises(RuntimeError, match="stop"), in_place(Place(p, "act_fn") for p in parents) as ours:
        assert [parent.act_fn for parent in parents] == ours
        ours[1].bind(BINDING)
        raise RuntimeError("stop")
    assert [parent.act_fn for parent in parents] == [stock, ours[1], stock]
