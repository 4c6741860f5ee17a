"""Backends ``nki`` and ``nki-sim``: what is missing is said, inputs split, kernels launched as documented.

Where no Neuron SDK is, modules of its names stand in for it; they record how they are called and simulate.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map

from vllm_neuron_rmsq import backends, ops, reference, settings
from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.backends import neuron_binding, nki, nki_sim
from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear, rms_norm_quant, silu_mul_quant
from vllm_neuron_rmsq.kernels.nki.digest import digest
from vllm_neuron_rmsq.kernels.nki.simulator import simulate
from vllm_neuron_rmsq.target import TRN2, TRN3


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("NEURON_LOGICAL_NC_CONFIG", "NEURON_PLATFORM_TARGET_OVERRIDE", *nki.WITHOUT_DEVICE):
        monkeypatch.delenv(name, raising=False)
    caches = (backends.resolve, neuron_binding.find)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()
    settings.install(None)


def without(monkeypatch, package: str) -> None:
    """Take a package away again."""
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


def module(monkeypatch, name: str, **attributes) -> None:
    """Put a module of this name, and the packages it lies in, where imports find them."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        full = ".".join(parts[:i])
        if full not in sys.modules or i == len(parts):
            made = types.ModuleType(full)
            made.__path__ = []
            made.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=True)
            monkeypatch.setitem(sys.modules, full, made)
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


class Recorder:
    """Stands in for ``wrap_nki``: remembers kernels, grids and arguments; computes by simulation."""

    def __init__(self) -> None:
        self.wrapped: list = []
        self.launched: list = []

    def __call__(self, kernel):
        self.wrapped.append(kernel)
        recorder = self

        class Caller:
            def __getitem__(self, grid):
                def run(**arguments):
                    recorder.launched.append((kernel, grid, arguments))
                    return simulate(kernel, grid)(**arguments)

                return run

        return Caller()


@pytest.fixture
def sdk(monkeypatch) -> Recorder:
    """NKI 0.6, libtorch_neuronx_lite and a Trainium2 device."""
    recorder = Recorder()
    module(monkeypatch, "nki.isa")
    module(monkeypatch, "libtorch_neuronx_lite.nki.nki_hop", wrap_nki=recorder)
    monkeypatch.setattr(nki.importlib.metadata, "version", lambda name: {"nki": "0.6.0+g1"}[name])
    monkeypatch.setattr(nki.glob, "glob", lambda pattern: ["/dev/neuron0"])
    return recorder


class TestUnavailable:
    """Each thing that can be missing is named, and what to do about it."""

    def test_nothing_is_missing(self, sdk):
        assert nki.unavailable() is None

    def test_no_sdk(self):
        reason = nki.unavailable()
        assert reason is not None
        assert "`nki` is not installed; install the AWS Neuron SDK 2.32 or 2.33" in reason
        with pytest.raises(
            backends.BackendUnavailableError, match="backend 'nki' cannot run here: the Neuron SDK"
        ):
            backends.resolve("nki", "cpu")

    def test_a_placeholder_is_no_sdk(self, monkeypatch):
        module(monkeypatch, "nki")
        monkeypatch.setattr(nki.importlib.metadata, "version", lambda name: "0.0.1")
        assert "`nki` is not installed" in nki.unavailable()

    @pytest.mark.parametrize("version", ["0.5.2", "0.5rc1"])
    def test_an_older_nki(self, sdk, monkeypatch, version):
        monkeypatch.setattr(nki.importlib.metadata, "version", lambda name: version)
        reason = nki.unavailable()
        assert reason.startswith("the kernels are written for NKI 0.6 to 0.7, but nki 0.5")
        assert "install the AWS Neuron SDK 2.32 or 2.33" in reason

    @pytest.mark.parametrize("version", ["0.6.0", "0.7", "0.7.3+gabc"])
    def test_a_known_nki(self, sdk, monkeypatch, version):
        monkeypatch.setattr(nki.importlib.metadata, "version", lambda name: version)
        assert nki.unavailable() is None
        assert "untried" not in nki.details()

    def test_a_newer_nki_is_tried_and_said(self, sdk, monkeypatch):
        monkeypatch.setattr(nki.importlib.metadata, "version", lambda name: "0.8.1")
        assert nki.unavailable() is None
        assert nki.details().endswith("; untried: the kernels are written for NKI 0.6 to 0.7")

    def test_no_binding(self, sdk, monkeypatch):
        without(monkeypatch, "libtorch_neuronx_lite")
        assert nki.unavailable().startswith(
            "no PyTorch binding for Neuron: torch_neuronx, libtorch_neuronx_lite"
        )

    def test_an_old_platform(self, sdk, monkeypatch):
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn1")
        assert "NEURON_PLATFORM_TARGET_OVERRIDE=trn1 is no platform the kernels run on" in nki.unavailable()

    def test_no_device(self, sdk, monkeypatch):
        monkeypatch.setattr(nki.glob, "glob", lambda pattern: [])
        assert "no Neuron device (/dev/neuron0)" in nki.unavailable()
        for name in ("NKI_SIMULATOR", "VLLM_NEURON_CPU_COMPILE"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "1")
                assert nki.unavailable() is None

    def test_simulator_needs_ml_dtypes(self, monkeypatch):
        assert nki_sim.unavailable() is None
        monkeypatch.setattr(nki_sim.importlib.util, "find_spec", lambda name: name != "ml_dtypes" or None)
        assert nki_sim.unavailable() == "the simulator needs ml_dtypes; pip install ml_dtypes"


class TestLaunch:
    def test_wrapped_once_and_launched_on_lnc(self, sdk, monkeypatch):
        hidden, weight = torch.randn(4, 64).bfloat16(), torch.ones(64).bfloat16()
        for cores, expected in ((None, 2), ("1", 1), ("2", 2)):
            if cores is not None:
                monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", cores)
            ops.rms_norm_quant(hidden, weight, backend="nki")
            kernel, grid, _ = sdk.launched[-1]
            assert kernel is rms_norm_quant.rms_norm_quant_bytes_kernel
            assert grid == expected
        assert len(sdk.wrapped) == len(neuron_binding.NAMES)

    def test_lnc_is_said(self, sdk, monkeypatch):
        assert "LNC 2 (assumed, NEURON_LOGICAL_NC_CONFIG is not set)" in nki.details()
        module(monkeypatch, "torch_neuronx.utils", get_logical_neuron_cores=lambda: 1)
        assert "LNC 1 (from torch_neuronx)" in nki.details()
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "2")
        assert "LNC 2 (NEURON_LOGICAL_NC_CONFIG)" in nki.details()

    def test_lnc_is_1_or_2(self, sdk, monkeypatch):
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "4")
        with pytest.raises(ValueError, match="NEURON_LOGICAL_NC_CONFIG: expected 1 or 2, got '4'"):
            ops.rms_norm_quant(torch.randn(4, 64), torch.ones(64), backend="nki")

    def test_torch_neuronx_wraps_too(self, sdk, monkeypatch):
        without(monkeypatch, "libtorch_neuronx_lite")
        module(monkeypatch, "torch_neuronx.nki_hop", wrap_nki=sdk)
        assert nki.unavailable() is None
        ops.rms_norm_quant(torch.randn(4, 64), torch.ones(64), backend="nki")
        assert len(sdk.launched) == 1

    def test_torch_xla_calls_the_kernel_itself(self, sdk, monkeypatch):
        without(monkeypatch, "libtorch_neuronx_lite")
        module(monkeypatch, "torch_xla")
        hidden, weight = torch.randn(4, 64).bfloat16(), torch.ones(64).bfloat16()
        assert nki.unavailable() is None
        got = ops.rms_norm_quant(hidden, weight, backend="nki")
        assert torch.equal(got, ops.rms_norm_quant(hidden, weight, backend="nki-sim"))
        assert sdk.launched == []
        assert not neuron_binding.find().traced

    def test_only_what_is_given_is_passed(self, sdk):
        """A graph cannot hold None; and numbers, not objects, are what a compiled kernel is cached by."""
        hidden, weight = torch.randn(4, 64), torch.ones(64)
        always = {"ocp": False, "digest": digest()}
        ops.rms_norm_quant(hidden, None, backend="nki")
        arguments = sdk.launched[-1][2]
        assert set(arguments) == {"hidden", "eps", "lower_bound", *always}
        assert always.items() <= arguments.items()
        ops.rms_norm_quant(hidden, weight, residual=hidden, static_scale=0.5, backend="nki")
        arguments = sdk.launched[-1][2]
        optional = {"residual", "weight", "static_scale"}
        assert set(arguments) == {"hidden", "eps", "lower_bound", *always, *optional}
        assert arguments["static_scale"].shape == (128, 1)
        packed = ops.rms_norm_quant(hidden, weight, backend="nki")
        ops.packed_fp8_linear(packed, torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8), backend="nki")
        kernel, _, arguments = sdk.launched[-1]
        assert kernel is packed_fp8_linear.packed_fp8_linear_bytes_kernel
        assert set(arguments) == {"packed", "weight", "weight_scale", "out_dtype", *always}
        ops.silu_mul_quant(hidden, static_scale=0.5, backend="nki")
        kernel, _, arguments = sdk.launched[-1]
        assert kernel is silu_mul_quant.silu_mul_quant_bytes_kernel
        assert set(arguments) == {"gate_up", "static_scale", *always}
        assert all(isinstance(v, (torch.Tensor, int, float, bool, str)) for v in arguments.values())

    def test_trn3_codes_need_trainium3(self, sdk, monkeypatch):
        hidden, weight = torch.randn(4, 64), torch.ones(64)
        for call in (
            lambda: ops.rms_norm_quant(hidden, weight, target="trn3", backend="nki"),
            lambda: ops.silu_mul_quant(hidden, target="trn3", backend="nki"),
        ):
            with pytest.raises(ValueError, match=r"target: trn3 codes \(±448\) need Trainium3"):
                call()
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
        packed = ops.rms_norm_quant(hidden, weight, target="trn3", backend="nki")
        assert sdk.launched[-1][2]["ocp"] is True
        ops.packed_fp8_linear(packed, torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8), backend="nki")
        assert sdk.launched[-1][2]["ocp"] is True

    def test_platform_is_the_bindings(self, sdk, monkeypatch):
        assert nki.platform() is TRN2
        module(monkeypatch, "libtorch_neuronx_lite.compile.platform", get_platform_target=lambda: "trn3")
        assert nki.platform() is TRN3

    def test_trainium2_refuses_weights_it_would_misread(self, sdk):
        weight = torch.full((2, 64), 448.0).to(torch.float8_e4m3fn)
        with pytest.raises(ValueError, match="weight: expected FP8 codes within ±240"):
            ops.prepack_fp8_weight(weight, torch.ones(2), backend="nki")

    def test_simulator_runs_on_the_cpu(self):
        hidden = torch.empty(4, 64, device="meta")
        with pytest.raises(ValueError, match="backend nki-sim: expected tensors on the CPU, got meta"):
            nki_sim.BACKEND.functions.rms_norm_quant(hidden, None, 1e-6, None, 0.0, None, TRN2)


def layer(hidden, residual, prepacked, weight_scale):
    """A norm, a matmul, an activation and a matmul, as a model's own code calls them."""
    packed, total = ops.rms_norm_quant(hidden, GAMMA, residual=residual, backend="nki")
    gate_up = ops.packed_fp8_linear(packed, prepacked, weight_scale)
    return ops.silu_mul_quant(gate_up, backend="nki"), total, ops.rms_norm_quant(total, None, backend="nki")


GAMMA = 1 + torch.randn(64, generator=torch.Generator().manual_seed(7)) / 8


class TestOperators:
    """torch_neuronx 2.13 and later: each kernel is an operator of PyTorch's, made by ``nki_op``."""

    @pytest.fixture
    def operators(self, sdk, monkeypatch) -> list[str]:
        """A stand-in for ``torch_neuronx.nki_op`` that makes custom operators, as the real one does."""
        made: list[str] = []

        def nki_op(name, mutates_args):
            assert mutates_args == {}

            def decorate(function):
                # An operator's name can be taken once in a process, and each test makes them anew.
                made.append(name)
                op = torch.library.custom_op(f"{name}_{next(COUNT)}", function, mutates_args=())

                @op.register_fake
                def fake(*args, **kwargs):
                    def real(value):
                        is_tensor = isinstance(value, torch.Tensor)
                        return torch.zeros(tuple(value.shape), dtype=value.dtype) if is_tensor else value

                    with unset_fake_temporarily():
                        results = function(*map(real, args), **{k: real(v) for k, v in kwargs.items()})
                    return tree_map(lambda r: torch.empty(tuple(r.shape), dtype=r.dtype), results)

                return op

            return decorate

        module(monkeypatch, "torch_neuronx", nki_op=nki_op, wrap_nki=sdk)
        return made

    def arguments(self):
        generator = torch.Generator().manual_seed(3)
        weight = (torch.randn(32, 64, generator=generator) * 50).to(torch.float8_e4m3fn)
        weight_scale = torch.rand(32, generator=generator)
        hidden, residual = (torch.randn(4, 64, generator=generator).bfloat16() for _ in range(2))
        prepacked = ops.prepack_fp8_weight(weight, weight_scale, backend="nki")
        return hidden, residual, prepacked, weight_scale

    def test_they_are_made_and_called_eagerly(self, operators, sdk):
        assert nki.unavailable() is None
        assert neuron_binding.find().name == "torch_neuronx.nki_op"
        assert operators == [f"neuron_rmsq_nki::{name}" for name in neuron_binding.NAMES]
        out = layer(*self.arguments())
        assert [call[1] for call in sdk.launched] == [2] * 4
        assert all("digest" in call[2] for call in sdk.launched)
        assert out[0].shape == (4, 20)

    def test_a_graph_holds_the_operators(self, operators, sdk):
        """By Dynamo and after AOTAutograd: and no op of ours, which the Neuron compiler does not know."""
        expected = layer(*self.arguments())
        check_graphs(layer, self.arguments(), expected, "neuron_rmsq_nki.")

    def test_numbers_are_the_simulators(self, operators):
        hidden, residual, *_ = self.arguments()
        got = ops.rms_norm_quant(hidden, GAMMA, residual=residual, backend="nki")
        want = ops.rms_norm_quant(hidden, GAMMA, residual=residual, backend="nki-sim")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


COUNT = itertools.count()


def check_graphs(function, arguments, expected, operator):
    """``function`` compiles whole; Dynamo's graph and AOTAutograd's hold 4 calls of ``operator``."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    for backend in (record, aot_autograd(fw_compiler=record)):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
        with torch.no_grad():
            got = compiled(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        calls = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
        assert sum(call.startswith(operator) for call in calls) == 4, calls
        assert not any(call.startswith("neuron_rmsq.") for call in calls), calls


class TestSplitting:
    def test_one_row_on_two_cores(self, monkeypatch):
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "2")
        hidden, residual, weight = torch.randn(1, 64), torch.randn(1, 64), torch.ones(64)
        got, total = ops.rms_norm_quant(hidden, weight, residual=residual, backend="nki-sim")
        want, expected = reference.rms_norm_quant(hidden, weight, residual=residual)
        assert got.shape == (1, 68)
        assert torch.equal(total, expected)
        torch.testing.assert_close(fmt.unpack(got)[1], fmt.unpack(want)[1], rtol=1e-5, atol=0)

    def test_more_rows_than_the_norm_kernel_takes(self, sdk):
        rows = rms_norm_quant.MAX_B * rms_norm_quant.MAX_S + 1
        hidden = torch.randn(rows, 2)
        got, total = ops.rms_norm_quant(hidden, None, residual=hidden, backend="nki")
        assert [call[2]["hidden"].shape[0] for call in sdk.launched] == [
            rows - 1,
            2,
        ]  # one row, and one for LNC 2
        assert torch.equal(total, 2 * hidden)
        codes, scale = fmt.unpack(got)
        want = fmt.unpack(reference.rms_norm_quant(2 * hidden, None))
        torch.testing.assert_close(scale, want[1], rtol=1e-5, atol=0)
        assert codes.shape == (rows, 2)

    def test_more_rows_than_the_matmul_kernel_takes(self, sdk):
        rows = packed_fp8_linear.MAX_T + 3
        codes = torch.randint(0, 0x70, (rows, 2), dtype=torch.uint8)
        packed = fmt.pack(codes, torch.rand(rows))
        weight = torch.randn(4, 2).to(torch.float8_e4m3fn)
        out = ops.packed_fp8_linear(packed, weight, torch.ones(4), backend="nki")
        assert [call[2]["packed"].shape[0] for call in sdk.launched] == [rows - 3, 3]
        want = ops.packed_fp8_linear(packed, weight, torch.ones(4), backend="torch")
        torch.testing.assert_close(out, want, rtol=2**-6, atol=1e-2)

    def test_wider_rows_than_the_kernel_takes(self):
        with pytest.raises(ValueError, match=r"hidden: expected H <= 16384 .* got 16385"):
            ops.rms_norm_quant(torch.zeros(1, 16385), None, backend="nki-sim")

    @pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
    def test_no_rows(self, shape):
        hidden, weight = torch.zeros(shape).bfloat16(), torch.ones(64)
        assert ops.rms_norm_quant(hidden, weight, backend="nki-sim").shape == (*shape[:-1], 68)
        assert ops.rms_norm_quant(hidden, weight, static_scale=1.0, backend="nki-sim").shape == shape
        packed, total = ops.rms_norm_quant(hidden, weight, residual=hidden, backend="nki-sim")
        assert total.shape == shape
        out = ops.packed_fp8_linear(
            packed, torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8), backend="nki-sim"
        )
        assert out.shape == (*shape[:-1], 8)

    def test_views_are_taken_as_they_are(self):
        """Neither contiguous nor on a 4-byte boundary."""
        hidden = torch.randn(6, 130).bfloat16()[::2, 1::2]
        weight = torch.randn(65)
        got = ops.rms_norm_quant(hidden, weight, backend="nki-sim")
        want = ops.rms_norm_quant(hidden.contiguous(), weight, backend="nki-sim")
        assert torch.equal(got, want)


@pytest.mark.parametrize("consumer", ["torch", "nki-sim"])
@pytest.mark.parametrize("width", [576, 577])
def test_packed_rows_feed_every_matmul(consumer, width):
    """What nki-sim packs decodes by the format and multiplies on another backend to the same."""
    torch.manual_seed(0)
    hidden, gamma = torch.randn(2, 5, width).bfloat16(), 1 + 0.3 * torch.randn(width)
    packed = ops.rms_norm_quant(hidden, gamma, backend="nki-sim")
    x = hidden.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gamma
    decoded = fmt.dequantize(packed)
    assert (decoded - y).abs().max() <= y.abs().max() / 16
    weight = (torch.randn(48, width) * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(48) * 0.1
    out = ops.packed_fp8_linear(packed, weight, weight_scale, backend=consumer)
    want = (decoded.double() @ weight.double().t()) * weight_scale.double()
    assert (out.double() - want).abs().max() <= 2**-6 * want.abs().max()


def test_ops_of_both_backends_in_a_graph():
    """The fakes know the prepacked shape; torch.compile sees one op."""
    hidden, gamma = torch.randn(3, 64).bfloat16(), torch.ones(64)
    prepacked = ops.prepack_fp8_weight(
        torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8), backend="nki-sim"
    )

    @torch.compile(backend="eager", fullgraph=True)
    def layer(x):
        packed = ops.rms_norm_quant(x, gamma, backend="nki-sim")
        return ops.packed_fp8_linear(packed, prepacked, torch.ones(8))

    assert layer(hidden).shape == (3, 8)
    for name in ("nki", "nki-sim"):
        assert backends.get(name).prepacked_shape(8, 64, False) == tuple(prepacked.data.shape)
