"""Backend ``nki``: the NKI kernels on a Neuron device, through the PyTorch binding that is installed.

``libtorch_neuronx_lite`` is what vLLM Neuron brings: its ``wrap_nki(kernel)[lnc](...)`` puts a kernel into a
graph. ``torch_neuronx`` has the same function in its native form; with ``torch_xla`` the kernel itself is
called on device tensors. LNC, the NeuronCores a kernel is launched on, must be the runtime's:
NEURON_LOGICAL_NC_CONFIG, 2 where it is not set (Trainium2's and Trainium3's default).

What the kernels do not take is arranged here: leading dimensions are collapsed, inputs longer than a kernel's
limit split, rows padded to one per NeuronCore. Backend ``nki-sim`` is this module launching into the
simulator.

Dispatch, splitting and messages are tested against stand-ins for these packages; nothing here has run on
Neuron hardware yet. ``pytest -m neuron`` there is the acceptance run.
"""

from __future__ import annotations

import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.backends.base import Backend
from vllm_neuron_rmsq.target import TRN2, TRN3, Target

NKI_VERSION = (0, 6)
"""The NKI release the kernels are written for."""

PLATFORMS = {"trn2": TRN2, "gen3": TRN2, "trn3": TRN3, "gen4": TRN3}
"""Values of NEURON_PLATFORM_TARGET_OVERRIDE that the kernels run on, and what they mean."""

INSTALL = (
    "install the AWS Neuron SDK 2.32 (packages nki 0.6, neuronx-cc and libtorch_neuronx_lite from AWS's own "
    "package index; those of the same names on PyPI are empty)"
)

DEVICES = ("neuron", "privateuseone", "xla")
"""What ``torch.device.type`` is under the native binding, before that is named, and under torch_xla."""

Launch = Callable[[Any, dict[str, Any]], Any]
"""Runs a kernel on the arguments it is given by name."""


def unavailable() -> str | None:
    """Return what is missing for Neuron, and how to get it, or ``None``."""
    version = _nki_version()
    if version is None:
        return f"the Neuron SDK's package `nki` is not installed; {INSTALL}"
    if version[:2] != NKI_VERSION:
        found, wanted = (".".join(map(str, v)) for v in (version, NKI_VERSION))
        return f"the kernels are written for NKI {wanted}, but nki {found} is installed; {INSTALL}"
    if _binding() is None:
        return f"no PyTorch binding for Neuron: libtorch_neuronx_lite, torch_neuronx or torch_xla; {INSTALL}"
    override = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if override is not None and override not in PLATFORMS:
        return (
            f"NEURON_PLATFORM_TARGET_OVERRIDE={override} is no platform the kernels run on; expected one of "
            f"{', '.join(PLATFORMS)}"
        )
    if not glob.glob("/dev/neuron[0-9]*") and os.environ.get("NKI_SIMULATOR") != "1":
        return (
            "this machine has no Neuron device (/dev/neuron0); run on a Trainium2 or Trainium3 instance with "
            "the Neuron driver, or choose VLLM_RMSQ_BACKEND=nki-sim"
        )
    return None


def _nki_version() -> tuple[int, ...] | None:
    """Version of the SDK's ``nki``; None where there is none, or only a placeholder of that name."""
    try:
        if importlib.util.find_spec("nki.isa") is None:
            return None
        text = importlib.metadata.version("nki")
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return None
    numbers = []
    for part in text.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


WRAPPERS = ("libtorch_neuronx_lite.nki.nki_hop", "torch_neuronx.nki_hop", "torch_neuronx")
"""Modules that may hold ``wrap_nki``, in the order they are tried."""


@functools.cache
def _binding() -> Callable[[Any, int], Callable[..., Any]] | None:
    """Return a function ``(kernel, lnc) -> callable on device tensors``, or None without a binding."""
    for name in WRAPPERS:
        wrap = _attribute(name, "wrap_nki")
        if wrap is not None:
            wrapped = functools.cache(wrap)
            return lambda kernel, lnc: wrapped(kernel)[lnc]
    if importlib.util.find_spec("torch_xla") is not None:
        return lambda kernel, lnc: kernel[lnc]
    return None


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None


def platform() -> Target:
    """Return the target this machine computes for: the override, else the binding's report, else trn2."""
    override = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if override is not None:
        return PLATFORMS[override]
    detect = _attribute("libtorch_neuronx_lite.compile.platform", "get_platform_target")
    return TRN2 if detect is None else PLATFORMS.get(str(detect()), TRN2)


def logical_cores(default: int) -> int:
    """Return LNC from NEURON_LOGICAL_NC_CONFIG.

    Raises:
        ValueError: it is neither 1 nor 2.
    """
    text = os.environ.get("NEURON_LOGICAL_NC_CONFIG", str(default))
    if text not in ("1", "2"):
        raise ValueError(f"NEURON_LOGICAL_NC_CONFIG: expected 1 or 2, got {text!r}")
    return int(text)


class Kernels:
    """The backend's functions over one way to launch a kernel.

    Args:
        launch: runs a kernel on named arguments, the tensor that says the device first.
        cores: returns the programs it is launched on.
        platform: returns what the hardware computes for. Only Trainium3 has ±448 and ``float8_e4m3fn``.
    """

    def __init__(self, launch: Launch, cores: Callable[[], int], platform: Callable[[], Target]) -> None:
        self._launch = launch
        self._cores = cores
        self._platform = platform

    def rms_norm_quant(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        eps: float,
        residual: Tensor | None,
        lower_bound: float,
        static_scale: Tensor | None,
        target: Target,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`~vllm_neuron_rmsq.backends.base.Functions`.

        Raises:
            ValueError: rows wider than the kernel takes, or codes that this hardware has not.
        """
        from vllm_neuron_rmsq.kernels.nki import rms_norm_quant as source

        width = hidden.shape[-1]
        if width > source.MAX_H:
            raise ValueError(f"hidden: expected H <= {source.MAX_H} (the NKI kernel's limit), got {width}")
        arguments: dict[str, Any] = {"eps": eps, "lower_bound": lower_bound}
        if weight is not None:
            arguments["weight"] = weight
        if static_scale is not None:
            arguments["static_scale"] = _on_every_partition(static_scale)
        arguments |= self._mode(target)
        rows = {"hidden": hidden} if residual is None else {"hidden": hidden, "residual": residual}
        results = self._by_rows(
            source.rms_norm_quant_bytes_kernel, rows, arguments, source.MAX_B * source.MAX_S
        )
        if not results:  # no rows
            tail = fmt.SCALE_BYTES if static_scale is None else 0
            results = [
                hidden.new_empty((*hidden.shape[:-1], width + tail), dtype=torch.uint8),
                torch.empty_like(hidden),
            ]
        return results[0], None if residual is None else results[1]

    def silu_mul_quant(self, gate_up: Tensor, static_scale: Tensor | None, target: Target) -> Tensor:
        """See :class:`~vllm_neuron_rmsq.backends.base.Functions`.

        Raises:
            ValueError: rows wider than the kernel takes, or codes that this hardware has not.
        """
        from vllm_neuron_rmsq.kernels.nki import silu_mul_quant as source

        width = gate_up.shape[-1] // 2
        if width > source.MAX_I:
            raise ValueError(f"gate_up: expected I <= {source.MAX_I} (the NKI kernel's limit), got {width}")
        arguments = self._mode(target)
        if static_scale is not None:
            arguments["static_scale"] = _on_every_partition(static_scale)
        results = self._by_rows(
            source.silu_mul_quant_bytes_kernel, {"gate_up": gate_up}, arguments, source.MAX_T
        )
        if not results:  # no rows
            tail = fmt.SCALE_BYTES if static_scale is None else 0
            return gate_up.new_empty((*gate_up.shape[:-1], width + tail), dtype=torch.uint8)
        return results[0]

    def _mode(self, target: Target) -> dict[str, Any]:
        """The argument that asks for codes of another range than Trainium2's."""
        if target.fp8_max <= TRN2.fp8_max:
            return {}
        if self._platform() is not TRN3:
            raise ValueError("target: trn3 codes (±448) need Trainium3, and this is Trainium2")
        return {"ocp": True}

    def _by_rows(
        self, kernel: Any, tensors: dict[str, Tensor], arguments: dict[str, Any], limit: int
    ) -> list[Tensor]:
        """Launch ``kernel`` on ``tensors [..., H]`` as rows, at most ``limit`` at once.

        Returns:
            its results with the tensors' leading dimensions; none where there are no rows.
        """
        lead = next(iter(tensors.values())).shape[:-1]
        flat = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in tensors.items()}
        parts = []
        for start, stop in _parts(lead.numel(), limit):
            part = {name: self._pad(rows[start:stop]) for name, rows in flat.items()}
            result = self._launch(kernel, part | arguments)
            results = result if isinstance(result, tuple) else (result,)
            parts.append([r[: stop - start] for r in results])
        joined = [torch.cat(r) if len(r) > 1 else r[0] for r in zip(*parts, strict=True)]
        return [r.reshape(*lead, r.shape[-1]) for r in joined]

    def _pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Contiguous rows, at least one for each NeuronCore."""
        missing = self._cores() - rows.shape[0]
        if missing > 0:
            rows = torch.cat([rows, rows.new_zeros((missing, rows.shape[1]))])
        return rows.contiguous()

    def prepack_fp8_weight(self, weight: Tensor) -> Tensor:
        """Lay a weight out for the matmul kernel.

        Raises:
            ValueError: the weight holds codes that this hardware's FP8 reads as Inf or NaN.
        """
        from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear as source

        if bool(((weight & 0x7F) > self._platform().max_code).any()):
            raise ValueError(
                "weight: expected FP8 codes within ±240, all that Trainium2's float8_e4m3 has; halve the "
                "codes and double the scale first"
            )
        return source.prepack(weight)

    def packed_fp8_linear(
        self,
        packed: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See :class:`~vllm_neuron_rmsq.backends.base.Functions`."""
        from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear as source
        from vllm_neuron_rmsq.kernels.nki.rms_norm_quant import DtypeMode

        arguments: dict[str, Any] = {"weight": weight, "weight_scale": weight_scale}
        if bias is not None:
            arguments["bias"] = bias
        if out_dtype != torch.bfloat16:
            arguments["out_dtype"] = source.OUT_DTYPES[str(out_dtype).removeprefix("torch.")]
        if self._platform() is TRN3:
            arguments["dtype_mode"] = DtypeMode.OCP
        rows = packed.reshape(-1, packed.shape[-1])
        out = [
            self._launch(
                source.packed_fp8_linear_kernel, {"packed": rows[start:stop].contiguous()} | arguments
            )
            for start, stop in _parts(rows.shape[0], source.MAX_T)
        ]
        joined = torch.cat(out) if len(out) > 1 else (out or [rows.new_empty((0,), dtype=out_dtype)])[0]
        return joined.reshape(*packed.shape[:-1], out_features)


def _on_every_partition(static_scale: Tensor) -> Tensor:
    """One scale as ``[128, 1]`` fp32: a kernel reads a scalar operand on each partition."""
    return static_scale.reshape(1, 1).expand(128, 1).contiguous()


def _parts(rows: int, limit: int) -> list[tuple[int, int]]:
    return [(start, min(start + limit, rows)) for start in range(0, rows, limit)]


def prepacked_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Return the shape of a prepacked weight."""
    from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear as source

    return source.prepacked_shape(out_features, in_features)


def _on_device(kernel: Any, arguments: dict[str, Any]) -> Any:
    binding = _binding()
    if binding is None:
        raise RuntimeError(unavailable() or "no PyTorch binding for Neuron")
    return binding(kernel, logical_cores(default=2))(**arguments)


BACKEND = Backend(
    name="nki",
    unavailable=lambda: unavailable(),
    functions=Kernels(_on_device, functools.partial(logical_cores, default=2), platform),
    devices=DEVICES,
    serves=DEVICES,
    prepacked_shape=prepacked_shape,
)
