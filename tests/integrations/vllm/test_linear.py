"""The consumer: an FP8 linear kernel of vLLM's that multiplies packed rows."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import choose_scaled_mm_linear_kernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    QuantKey,
    ScaleDesc,
    kFp8Dynamic128Sym,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    kFp8StaticTokenSym,
)
from vllm.platforms import current_platform

import vllm_neuron_rmsq
from vllm_neuron_rmsq import ops, packed, reference, settings, weights
from vllm_neuron_rmsq.integrations.vllm import schemes, versions
from vllm_neuron_rmsq.integrations.vllm.activation import (
    CODES_KEY,
    PACKED_KEY,
    CodesActivation,
    PackedActivation,
)
from vllm_neuron_rmsq.integrations.vllm.linear import PackedFp8LinearKernel

kFp8Dynamic64Sym = QuantKey(torch.float8_e4m3fn, ScaleDesc(torch.float32, False, GroupShape(1, 64)))
NAMES = ["weight", "weight_scale", "input_scale", "input_scale_ub"]
N, H = 48, 96


@pytest.fixture(autouse=True)
def _settings():
    settings.install(settings.Settings(backend="torch"))


def config(activation=kFp8DynamicTokenSym, weight=kFp8StaticChannelSym):
    return FP8ScaledMMLinearLayerConfig(
        weight_quant_key=weight,
        activation_quant_key=activation,
        weight_shape=(N, H),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )


def make(weight_key=kFp8StaticChannelSym, limit=240.0):
    """Return a kernel and the layer vLLM would hand it after loading, with the fp32 weight it stands for."""
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        kernel = PackedFp8LinearKernel(config(weight=weight_key), NAMES)
    codes = (torch.rand(N, H) * 2 - 1).mul(limit).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[0, 0] = 0x77 if limit == 240 else 0x7E
    scale = torch.rand(N, 1) + 0.5 if weight_key == kFp8StaticChannelSym else torch.tensor(0.7)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(codes.t(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    return kernel, layer, codes.float() * scale


def test_is_chosen_before_vllms_own():
    vllm_neuron_rmsq.register()
    from vllm.model_executor.kernels import linear

    kernels = linear._POSSIBLE_FP8_KERNELS
    options = {"quantization": "fp8_w8a8"} if versions.version() >= (0, 30) else {}
    assert kernels[current_platform._enum].count(PackedFp8LinearKernel) == 1
    with set_current_vllm_config(VllmConfig()):
        chosen = choose_scaled_mm_linear_kernel(config(), kernels, **options)
        assert chosen is PackedFp8LinearKernel
        settings.install(settings.Settings(backend="off"))
        chosen = choose_scaled_mm_linear_kernel(config(), kernels, **options)
        assert chosen is not PackedFp8LinearKernel


@pytest.mark.parametrize(
    "activation, weights, scheme",
    [
        (kFp8DynamicTokenSym, (kFp8StaticChannelSym, kFp8StaticTokenSym, kFp8StaticTensorSym), "per-token"),
        (kFp8DynamicTensorSym, (kFp8StaticChannelSym, kFp8StaticTokenSym, kFp8StaticTensorSym), "per-token"),
        (kFp8StaticTensorSym, (kFp8StaticChannelSym, kFp8StaticTokenSym, kFp8StaticTensorSym), "static"),
        (kFp8Dynamic128Sym, (kFp8Static128BlockSym,), "block"),
    ],
)
def test_schemes_it_implements(activation, weights, scheme):
    for weight in weights:
        assert PackedFp8LinearKernel.can_implement(config(activation, weight)) == (True, None)
        found, _ = schemes.find(activation, weight)
        assert found.name == scheme


@pytest.mark.parametrize(
    "activation, weight, reason",
    [
        (kFp8Dynamic64Sym, kFp8Static128BlockSym, "needs dynamic per-token"),
        (kFp8Dynamic128Sym, kFp8StaticChannelSym, "needs 128 x 128 block weights"),
        (kFp8DynamicTokenSym, kFp8Static128BlockSym, "needs per-channel or per-tensor weights"),
    ],
)
def test_schemes_it_leaves_to_vllm(activation, weight, reason):
    possible, why = PackedFp8LinearKernel.can_implement(config(activation, weight))
    assert not possible and reason in why


def test_batch_invariant_mode_is_left_to_vllm(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    supported, why = PackedFp8LinearKernel.is_supported()
    assert not supported and "VLLM_BATCH_INVARIANT" in why


@pytest.mark.parametrize("weight_key", [kFp8StaticChannelSym, kFp8StaticTensorSym])
@pytest.mark.parametrize("shape", [(5, H), (1, 5, H), (0, H)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_plain_and_packed_input_give_the_exact_product(weight_key, shape, with_bias):
    kernel, layer, weight = make(weight_key)
    kernel.process_weights_after_loading(layer)
    x = torch.randn(shape, dtype=torch.bfloat16)
    bias = torch.randn(N, dtype=torch.bfloat16) if with_bias else None
    rows = reference.rms_norm_quant(x, None, target="trn2")
    expected = packed.dequantize(rows, torch.float64) @ weight.double().t()
    if bias is not None:
        expected = expected + bias.double()
    for given in (x, PackedActivation.of(rows, x.dtype)):
        got = kernel.apply_weights(layer, given, bias)
        assert got.dtype == torch.bfloat16 and got.shape == (*shape[:-1], N)
        # Rounded to bf16's 8 bits at the end.
        torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("target, halved", [("trn2", True), ("trn3", False)])
def test_weights_of_the_ocp_range_are_halved_for_trn2(target, halved):
    settings.install(settings.Settings(backend="torch", target=target))
    kernel, layer, weight = make(limit=448.0)
    kernel.process_weights_after_loading(layer)
    assert layer.rmsq_halved is halved
    x = torch.eye(H, dtype=torch.bfloat16)
    got = kernel.apply_weights(layer, x)
    torch.testing.assert_close(got.float(), weight.t(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", ["weight", "weight_scale"])
def test_nan_is_refused(name):
    kernel, layer, _ = make()
    getattr(layer, name).data.view(torch.uint8)[0].fill_(0xFF)
    with pytest.raises(ValueError, match="holds NaN or Inf in its codes or scales"):
        kernel.process_weights_after_loading(layer)


def test_another_weight_layout_is_refused():
    kernel, layer, _ = make()
    layer.weight = torch.nn.Parameter(layer.weight.data.t(), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight: expected shape \[96, 48\] after loading, got \[48, 96\]"):
        kernel.process_weights_after_loading(layer)


def test_wrong_input_is_refused():
    kernel, layer, _ = make()
    kernel.process_weights_after_loading(layer)
    x = torch.randn(2, H + 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"packed: expected last dimension 100 \(H = 96 codes"):
        kernel.apply_weights(layer, x)
    wide = PackedActivation.of(ops.rms_norm_quant(x, None), x.dtype)
    with pytest.raises(ValueError, match="packed: expected last dimension 100"):
        kernel.apply_weights(layer, wide)
    wide.quant_key = kFp8DynamicTokenSym
    with pytest.raises(AssertionError, match="QuantizedActivation key"):
        kernel.apply_weights(layer, wide)


def test_advertises_packed_rows_only():
    kernel, _, _ = make()
    assert kernel.input_quant_key() == PACKED_KEY != kFp8DynamicTokenSym


def test_static_rows_and_plain_input_give_the_exact_product():
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        kernel = PackedFp8LinearKernel(config(kFp8StaticTensorSym, kFp8StaticTensorSym), NAMES)
    _, layer, weight = make(kFp8StaticTensorSym, limit=448.0)
    layer.input_scale = torch.nn.Parameter(torch.tensor(0.01), requires_grad=False)
    kernel.process_weights_after_loading(layer)
    assert kernel.input_quant_key() == CODES_KEY and layer.rmsq_halved
    assert layer.input_scale.tolist() == [pytest.approx(0.02)]  # the codes are half of those of ±448
    x = torch.randn(5, H, dtype=torch.bfloat16)
    codes = ops.rms_norm_quant(x, None, static_scale=layer.input_scale, backend="torch")
    expected = codes.view(torch.float8_e4m3fn).double() * 0.02 @ weight.double().t()
    for given in (x, CodesActivation.of(codes, x.dtype, layer.input_scale)):
        torch.testing.assert_close(
            kernel.apply_weights(layer, given).double(), expected, rtol=2**-7, atol=2**-7
        )


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_static_scale_that_is_no_positive_number_is_refused(scale):
    with set_current_vllm_config(VllmConfig()):
        kernel = PackedFp8LinearKernel(config(kFp8StaticTensorSym, kFp8StaticTensorSym), NAMES)
    _, layer, _ = make(kFp8StaticTensorSym)
    layer.input_scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)
    with pytest.raises(ValueError, match=r"input_scale: expected a positive number, got .*corrupt"):
        kernel.process_weights_after_loading(layer)


@pytest.mark.parametrize("read_by_vllm", [False, True])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_block_scales(name, read_by_vllm):
    """vLLM's MLA attention reads one of its weights itself: that one stays as the checkpoint has it."""
    torch.manual_seed(0)
    shape = (200, 160)
    block = config(kFp8Dynamic128Sym, kFp8Static128BlockSym)
    block.weight_shape = shape
    with set_current_vllm_config(VllmConfig()):
        kernel = PackedFp8LinearKernel(block, NAMES)
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2) + 0.5
    layer = torch.nn.Module()
    layer._cpu_skip_gemm_dispatch = read_by_vllm
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    setattr(layer, name, torch.nn.Parameter(scale, requires_grad=False))
    kernel.process_weights_after_loading(layer)
    assert (layer.weight.dtype == torch.float8_e4m3fn) == read_by_vllm
    got = kernel.apply_weights(layer, torch.eye(160, dtype=torch.bfloat16))
    expected = codes.float() * weights.expand_block_scale(scale, *shape)
    torch.testing.assert_close(got.float().t(), expected, rtol=2**-7, atol=1e-6)


def test_weights_of_shards_keep_their_scales():
    """What vLLM does to them in between is not seen: it takes them for one shard."""
    kernel, layer, _ = make(kFp8StaticTensorSym)
    layer.logical_widths = [32, 16]
    layer.weight_scale = torch.nn.Parameter(torch.tensor([0.5, 2.0]), requires_grad=False)
    kernel.keep_shard_scales(layer)
    assert layer.weight_scale.max() == 2 and layer.weight_scale[-1] < -448
    layer.weight_scale = torch.nn.Parameter(layer.weight_scale.max(), requires_grad=False)  # as vLLM does
    kernel.process_weights_after_loading(layer)
    assert layer.weight_scale.tolist() == [0.5] * 32 + [2.0] * 16
