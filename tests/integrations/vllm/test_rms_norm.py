"""The producer: stock until bound, packed rows afterwards."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation, as_quantized_activation
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym

import vllm_neuron_rmsq
from vllm_neuron_rmsq import reference
from vllm_neuron_rmsq.integrations.vllm import schemes
from vllm_neuron_rmsq.integrations.vllm.activation import PACKED_KEY, PackedActivation
from vllm_neuron_rmsq.integrations.vllm.rms_norm import REPLACEMENTS, GemmaRMSNormQuant, RMSNormQuant
from vllm_neuron_rmsq.integrations.vllm.schemes import Binding
from vllm_neuron_rmsq.target import TRN2

H = 96


@pytest.fixture
def make():
    """Return a function that constructs one of vLLM's norms, with weights."""
    vllm_neuron_rmsq.register()
    vllm_neuron_rmsq.register()  # vLLM may load plugins more than once

    def construct(cls):
        with set_current_vllm_config(VllmConfig()):
            norm = cls(H, eps=1e-5).bfloat16()
        norm.weight.data.uniform_(-0.5, 1.5)
        return norm

    return construct


@pytest.fixture
def norm(make):
    return make(RMSNorm)


def test_take_the_places_of_vllms(make):
    for stock, ours in REPLACEMENTS.items():
        assert type(make(stock)) is ours
    assert RMSNormQuant.name == RMSNorm.name == "rms_norm"
    assert GemmaRMSNormQuant.name == GemmaRMSNorm.name == "gemma_rms_norm"


@pytest.mark.parametrize("cls", REPLACEMENTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_unbound_is_stock(make, cls, with_residual):
    norm = make(cls)
    x = torch.randn(3, H, dtype=torch.bfloat16)
    residual = torch.randn_like(x) if with_residual else None
    copies = x.clone(), residual.clone() if with_residual else None
    stock = cls.forward_native(norm, *copies)
    ours = norm(x, residual)
    if with_residual:
        assert torch.equal(ours[0], stock[0]) and torch.equal(ours[1], stock[1])
    else:
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("shape", [(3, H), (1, 3, H)])
@pytest.mark.parametrize("cls", REPLACEMENTS)
def test_bound_returns_packed_rows(make, cls, shape):
    norm = make(cls)
    norm.binding = Binding(schemes.SCHEMES[0], "torch", TRN2)
    gamma = norm.weight.float() + 1 if issubclass(cls, GemmaRMSNorm) else norm.weight
    x, residual = torch.randn(shape, dtype=torch.bfloat16), torch.randn(shape, dtype=torch.bfloat16)
    options = {"eps": 1e-5, "target": "trn2"}
    out = norm(x)
    assert torch.equal(out.data, reference.rms_norm_quant(x, gamma, **options))
    out, residual_out = norm(x, residual)
    packed, expected = reference.rms_norm_quant(x, gamma, residual=residual, **options)
    assert torch.equal(out.data, packed) and torch.equal(residual_out, expected)
    # What Hugging Face's attention asks of a hidden state.
    assert out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
    assert out.size() == x.size() and out.size(-1) == H


def test_gemmas_norm_follows_a_weight_that_changes(make):
    """vLLM reloads weights in place."""
    norm = make(GemmaRMSNorm)
    norm.binding = Binding(schemes.SCHEMES[0], "torch", TRN2)
    x = torch.randn(3, H, dtype=torch.bfloat16)
    norm(x)
    norm.weight.data.copy_(torch.rand(H))
    expected = reference.rms_norm_quant(x, norm.weight.float() + 1, eps=1e-5, target="trn2")
    assert torch.equal(norm(x).data, expected)


def test_packed_activation_is_vllms_contract_and_strays_loudly(norm):
    norm.binding = Binding(schemes.SCHEMES[0], "torch", TRN2)
    out = norm(torch.randn(2, H, dtype=torch.bfloat16))
    assert isinstance(out, QuantizedActivation) and isinstance(out, PackedActivation)
    assert as_quantized_activation(out, PACKED_KEY) is out
    assert out.scale.untyped_storage().data_ptr() == out.data.untyped_storage().data_ptr()
    with pytest.raises(AssertionError, match="QuantizedActivation key"):
        as_quantized_activation(out, kFp8DynamicTokenSym)
    with pytest.raises((TypeError, AttributeError)):
        torch.nn.functional.linear(out, torch.ones(4, H))


def test_compiles_without_graph_breaks(norm):
    norm.binding = Binding(schemes.SCHEMES[0], "torch", TRN2)
    x = torch.randn(5, H, dtype=torch.bfloat16)

    def run(x, residual):
        out, residual = norm(x, residual)
        return out.data, out.shape[0], residual

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for rows in (x, x[:3]):
        for got, expected in zip(compiled(rows, rows), run(rows, rows), strict=True):
            assert got == expected if isinstance(got, int) else torch.equal(got, expected)


def test_norms_that_the_op_cannot_compute_are_unfit(norm):
    assert norm.unfit(schemes.SCHEMES[0]) == ""
    norm.variance_size_override = 32
    assert norm.unfit(schemes.SCHEMES[0]) == "it normalizes by a part of the row"
    norm.variance_size_override = None
    norm.weight = torch.nn.Parameter(torch.ones(H, dtype=torch.float64))
    assert norm.unfit(schemes.SCHEMES[0]) == "its weight is torch.float64"
