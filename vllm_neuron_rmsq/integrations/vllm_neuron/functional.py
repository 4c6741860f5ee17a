"""The kernels, as the model calls them: in a traced forward on Neuron, or through the ops in CPU mode.

Dimensions:
    T: rows (tokens) that a call gets
    H: input features   N: output features   I: intermediate size

On backend ``nki`` a kernel is called by ``wrap_nki(kernel)[lnc](...)`` and becomes one node of the graph that
is compiled. Whatever Dynamo and AOTAutograd see must have a lowering there: no op of our own (opaque to it),
no arithmetic on uint8. The kernels' digest goes into each node, and so into the key of the compile cache,
which does not look into kernels.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_neuron_rmsq import backends, ops
from vllm_neuron_rmsq.backends import neuron_binding, nki
from vllm_neuron_rmsq.target import TRN3, Target


class Kernels(Protocol):
    """What the layers need; packed rows are theirs to carry, not to look into.

    Attributes:
        backend: its name.
        cores: NeuronCores a kernel runs on; packed tensors have at least that many rows.
    """

    backend: str
    cores: int

    def rms_norm_quant(
        self, hidden: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``[T, H]`` to packed rows ``[max(T, cores), H + 4]`` and ``hidden + residual`` ``[T, H]``
        (``hidden`` itself without a residual)."""

    def silu_mul_quant(self, gate_up: Tensor) -> Tensor:
        """``[T, 2 I]`` to packed rows ``[max(T, cores), I + 4]``."""

    def linear(
        self,
        packed: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        """Packed rows of H codes by a weight of ``shape`` (N, H) to rows ``[..., N]``."""


class ThroughOps:
    """By the ops, on CPU tensors: backends ``cpu``, ``torch`` and ``nki-sim``."""

    cores = 1

    def __init__(self, backend: str, target: Target, dtype: torch.dtype) -> None:
        self.backend, self.target, self.dtype = backend, target, dtype

    def rms_norm_quant(self, hidden, weight, eps, residual):
        choice = {"eps": eps, "target": self.target, "backend": self.backend}
        if residual is None:
            return ops.rms_norm_quant(hidden, weight, **choice), hidden
        return ops.rms_norm_quant(hidden, weight, residual=residual, **choice)

    def silu_mul_quant(self, gate_up):
        return ops.silu_mul_quant(gate_up, target=self.target, backend=self.backend)

    def linear(self, packed, weight, weight_scale, bias, shape):
        laid_out = ops.PrepackedWeight(weight, shape[0], shape[1], self.backend)
        return ops.packed_fp8_linear(packed, laid_out, weight_scale, bias=bias, out_dtype=self.dtype)


class Traced:
    """By nodes of the graph: backend ``nki``.

    vLLM Neuron compiles with the binding it brings, whatever else is installed, so that one is called.

    Raises:
        ValueError: the target's codes are not this hardware's.
    """

    backend = "nki"

    def __init__(self, target: Target, dtype: torch.dtype) -> None:
        from libtorch_neuronx_lite.nki.nki_hop import wrap_nki

        hardware = nki.platform()
        if target.max_code > hardware.max_code:
            raise ValueError(f"target: {target} codes (±{target.fp8_max:g}) are not those of {hardware}")
        self.cores = neuron_binding.logical_cores()
        self.digest = neuron_binding.digest()
        self.out_dtype = str(dtype).removeprefix("torch.")
        self.ocp, self.reads_ocp = target is TRN3, hardware is TRN3
        kernels = map(neuron_binding.kernel, ("rms_norm_quant", "silu_mul_quant", "packed_fp8_linear"))
        self._rms_norm_quant, self._silu_mul_quant, self._linear = (wrap_nki(k)[self.cores] for k in kernels)

    def rms_norm_quant(self, hidden, weight, eps, residual):
        rows = hidden.shape[0]
        arguments: dict[str, Any] = {"hidden": self._padded(hidden), "eps": float(eps)}
        if weight is not None:
            arguments["weight"] = weight
        if residual is None:
            return self._rms_norm_quant(**arguments, ocp=self.ocp, digest=self.digest), hidden
        arguments["residual"] = self._padded(residual)
        packed, total = self._rms_norm_quant(**arguments, ocp=self.ocp, digest=self.digest)
        return packed, total if total.shape[0] == rows else total[:rows]

    def silu_mul_quant(self, gate_up):
        return self._silu_mul_quant(gate_up=self._padded(gate_up), ocp=self.ocp, digest=self.digest)

    def linear(self, packed, weight, weight_scale, bias, shape):
        more = {} if bias is None else {"bias": bias}
        return self._linear(
            packed=packed,
            weight=weight,
            weight_scale=weight_scale,
            out_dtype=self.out_dtype,
            ocp=self.reads_ocp,
            digest=self.digest,
            **more,
        )

    def _padded(self, rows: Tensor) -> Tensor:
        """One row for each core at least. Rows are padded before they are bytes, and cut after: uint8 is not
        cut or joined in a graph."""
        missing = self.cores - rows.shape[0]
        if missing > 0:
            rows = torch.cat([rows, torch.zeros_like(rows[:1]).expand(missing, -1)])
        return rows.contiguous()


def serving(name: str) -> str:
    """Return the backend that serves: kernels on Neuron and in AWS's simulator, else what the CPU has.

    Raises:
        ValueError: this one cannot serve here.
        BackendUnavailableError: it cannot run here.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.device_type == "cpu"
    simulated = os.environ.get("NKI_SIMULATOR") == "1"
    if name == "auto":
        name = "cpu" if on_cpu and not simulated else "nki"
        if name == "cpu":
            return backends.resolve("auto", "cpu")
    name = backends.resolve(name, "cpu")
    if name == "nki" and on_cpu and not simulated:
        raise ValueError(
            "backend: nki in CPU mode needs AWS's simulator (NKI_SIMULATOR=1); else choose cpu, torch or "
            "nki-sim"
        )
    if name != "nki" and not on_cpu:
        raise ValueError(
            f"backend: expected auto or nki on Neuron, got {name}, which runs in CPU mode alone "
            "(VLLM_NEURON_CPU_MODE=1)"
        )
    return name


def kernels(backend: str, target: Target, dtype: torch.dtype) -> Kernels:
    """Return the calls of a backend.

    Args:
        target: range of codes.
        dtype: of what linears return.
    """
    return Traced(target, dtype) if backend == "nki" else ThroughOps(backend, target, dtype)


class Limits(NamedTuple):
    """The most a backend's kernels take.

    Attributes:
        norm: H of ``rms_norm_quant``.
        silu: I of ``silu_mul_quant``.
        rows: T of all.
    """

    norm: int
    silu: int
    rows: int


def limits(backend: str) -> Limits:
    """Return a backend's limits; those of ``cpu`` and ``torch`` are no model's."""
    if not backend.startswith("nki"):
        return Limits(sys.maxsize, sys.maxsize, sys.maxsize)
    from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear, rms_norm_quant, silu_mul_quant

    return Limits(
        rms_norm_quant.MAX_H,
        silu_mul_quant.MAX_I,
        min(rms_norm_quant.MAX_S, silu_mul_quant.MAX_T, packed_fp8_linear.MAX_T),
    )
