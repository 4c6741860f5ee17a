"""Backend ``nki``'s way to the device: the PyTorch binding of the Neuron SDK that is installed.

Three bindings, in the order they are looked for:

* ``torch_neuronx`` 2.13 and later: ``@nki_op`` makes a kernel an operator of PyTorch's. It runs eagerly on
  ``neuron`` tensors and is a node of the graph under ``torch.compile(backend="neuron")``.
* ``libtorch_neuronx_lite``, what vLLM Neuron brings: ``wrap_nki(kernel)[lnc](...)`` is a node of the graph.
  It has no eager form.
* ``torch_xla``: the kernel itself is called on XLA tensors.

How each is called is from AWS's documentation and from public code that does; tested against stand-ins.
"""

# No `from __future__ import annotations`: operators' schemas are read off the annotations below.
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Launch = Callable[[str, dict[str, Any]], Any]
"""Runs the kernel of an op, by the op's name, on arguments by name."""

WRAPPERS = ("torch_neuronx", "torch_neuronx.nki_hop", "libtorch_neuronx_lite.nki.nki_hop")
"""Modules that may hold ``wrap_nki``, in the order they are tried."""


@dataclass(frozen=True)
class Binding:
    """How kernels are called.

    Attributes:
        name: the package and the function of it.
        launch: runs a kernel.
        traced: whether graphs must hold this call itself: a compiler that knows it does not know our ops.
    """

    name: str
    launch: Launch
    traced: bool


def kernel(name: str) -> Any:
    """Return the NKI kernel that computes the op ``name``: tensors, numbers and strings in, uint8 out."""
    from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear, rms_norm_quant, silu_mul_quant

    return {
        "rms_norm_quant": rms_norm_quant.rms_norm_quant_bytes_kernel,
        "add_rms_norm_quant": rms_norm_quant.rms_norm_quant_bytes_kernel,
        "silu_mul_quant": silu_mul_quant.silu_mul_quant_bytes_kernel,
        "packed_fp8_linear": packed_fp8_linear.packed_fp8_linear_bytes_kernel,
    }[name]


NAMES = ("rms_norm_quant", "add_rms_norm_quant", "silu_mul_quant", "packed_fp8_linear")


# Environment and sources do not change while a graph is compiled: torch.compile may take these for constants.
@torch.compiler.assume_constant_result
def digest() -> int:
    """Return the number of the kernels' sources, so that a compile cache never serves an old kernel."""
    from vllm_neuron_rmsq.kernels.nki.digest import digest

    return digest()


@torch.compiler.assume_constant_result
def logical_cores() -> int:
    """Return LNC, the NeuronCores a kernel is launched on; see :func:`lnc`."""
    return lnc()[0]


def lnc() -> tuple[int, str]:
    """Return LNC and where it comes from.

    It must be the runtime's: a kernel of another than its graph's is refused (NCC_EVRF066).
    NEURON_LOGICAL_NC_CONFIG says it; where that is not set, torch_neuronx is asked, and else it is 2, the
    compiler's default on Trainium2 and later.

    Raises:
        ValueError: it is neither 1 nor 2.
    """
    text, source = os.environ.get("NEURON_LOGICAL_NC_CONFIG"), "NEURON_LOGICAL_NC_CONFIG"
    if text is None:
        ask = attribute("torch_neuronx.utils", "get_logical_neuron_cores")
        if ask is None:
            return 2, "assumed, NEURON_LOGICAL_NC_CONFIG is not set"
        text, source = str(ask()), "from torch_neuronx"
    if text not in ("1", "2"):
        raise ValueError(f"NEURON_LOGICAL_NC_CONFIG: expected 1 or 2, got {text!r}")
    return int(text), source


def attribute(module: str, name: str) -> Any:
    """Return a module's attribute, ``None`` where module or attribute does not exist."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None


_launch: Launch | None = None
"""How to launch, once :func:`find` has found it. A global: torch.compile follows no function's cache."""


def launch(name: str, arguments: dict[str, Any]) -> Any:
    """Run the kernel of the op ``name`` on the device, by the binding that :func:`find` found."""
    assert _launch is not None, "find() comes first: backends.resolve() asks for it"
    return _launch(name, arguments)


@functools.cache
def find() -> Binding | None:
    """Return the binding that is installed, or ``None``."""
    global _launch
    nki_op = attribute("torch_neuronx", "nki_op")
    wrap = next(filter(None, (attribute(name, "wrap_nki") for name in WRAPPERS)), None)
    binding: Binding | None = None
    if nki_op is not None and wrap is not None:
        binding = Binding("torch_neuronx.nki_op", _by_operator(nki_op, wrap), traced=True)
    elif wrap is not None:
        binding = Binding(f"{wrap.__module__}.wrap_nki", _by_wrapper(wrap), traced=True)
    elif importlib.util.find_spec("torch_xla") is not None:
        binding = Binding("torch_xla", _by_call, traced=False)
    _launch = None if binding is None else binding.launch
    return binding


def _by_call(name: str, arguments: dict[str, Any]) -> Any:
    return kernel(name)[logical_cores()](**arguments, digest=digest())


def _by_wrapper(wrap: Any) -> Launch:
    wrapped = {name: wrap(kernel(name)) for name in NAMES}

    def launch(name: str, arguments: dict[str, Any]) -> Any:
        return wrapped[name][logical_cores()](**arguments, digest=digest())

    return launch


def _by_operator(nki_op: Any, wrap: Any) -> Launch:
    """Make an operator of each kernel. What is absent is not passed on: a kernel has its own defaults."""
    wrapped = {name: wrap(kernel(name)) for name in NAMES}

    def run(name: str, cores: int, **arguments: Any) -> Any:
        return wrapped[name][cores](**{k: v for k, v in arguments.items() if v is not None})

    @nki_op("neuron_rmsq_nki::rms_norm_quant", mutates_args={})
    def rms_norm_quant(
        hidden: Tensor,
        weight: Tensor | None,
        eps: float,
        lower_bound: float,
        static_scale: Tensor | None,
        ocp: bool,
        digest: int,
        cores: int,
    ) -> Tensor:
        return run(
            "rms_norm_quant",
            cores,
            hidden=hidden,
            weight=weight,
            eps=eps,
            lower_bound=lower_bound,
            static_scale=static_scale,
            ocp=ocp,
            digest=digest,
        )

    @nki_op("neuron_rmsq_nki::add_rms_norm_quant", mutates_args={})
    def add_rms_norm_quant(
        hidden: Tensor,
        weight: Tensor | None,
        eps: float,
        residual: Tensor,
        lower_bound: float,
        static_scale: Tensor | None,
        ocp: bool,
        digest: int,
        cores: int,
    ) -> tuple[Tensor, Tensor]:
        return run(
            "add_rms_norm_quant",
            cores,
            hidden=hidden,
            weight=weight,
            eps=eps,
            residual=residual,
            lower_bound=lower_bound,
            static_scale=static_scale,
            ocp=ocp,
            digest=digest,
        )

    @nki_op("neuron_rmsq_nki::silu_mul_quant", mutates_args={})
    def silu_mul_quant(
        gate_up: Tensor, static_scale: Tensor | None, ocp: bool, digest: int, cores: int
    ) -> Tensor:
        return run(
            "silu_mul_quant", cores, gate_up=gate_up, static_scale=static_scale, ocp=ocp, digest=digest
        )

    @nki_op("neuron_rmsq_nki::packed_fp8_linear", mutates_args={})
    def packed_fp8_linear(
        packed: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_dtype: str,
        ocp: bool,
        static_scale: Tensor | None,
        digest: int,
        cores: int,
    ) -> Tensor:
        return run(
            "packed_fp8_linear",
            cores,
            packed=packed,
            weight=weight,
            weight_scale=weight_scale,
            bias=bias,
            out_dtype=out_dtype,
            ocp=ocp,
            static_scale=static_scale,
            digest=digest,
        )

    operators = {
        "rms_norm_quant": (rms_norm_quant, ("weight", "static_scale")),
        "add_rms_norm_quant": (add_rms_norm_quant, ("weight", "static_scale")),
        "silu_mul_quant": (silu_mul_quant, ("static_scale",)),
        "packed_fp8_linear": (packed_fp8_linear, ("bias", "static_scale")),
    }

    def launch(name: str, arguments: dict[str, Any]) -> Any:
        operator, optional = operators[name]
        absent: dict[str, Any] = dict.fromkeys(optional)
        return operator(**absent | arguments, digest=digest(), cores=logical_cores())

    return launch
