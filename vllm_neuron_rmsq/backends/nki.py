"""Backend ``nki``: the NKI kernels on a Neuron device, through the PyTorch binding that is installed
(:mod:`vllm_neuron_rmsq.backends.neuron_binding`).

What the kernels do not take is arranged here: leading dimensions are collapsed, inputs longer than a kernel's
limit split, rows padded to one per NeuronCore. Backend ``nki-sim`` is this module launching into the
simulator.

Dispatch, splitting and messages are tested against stand-ins for these packages; nothing here has run on
Neuron hardware yet. ``pytest -m neuron`` there is the acceptance run.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.backends import neuron_binding
from vllm_neuron_rmsq.backends.base import Backend
from vllm_neuron_rmsq.backends.neuron_binding import Launch
from vllm_neuron_rmsq.target import TARGETS, TRN2, TRN3, Target

NKI_VERSIONS = ((0, 6), (0, 7))
"""Oldest and newest NKI release the kernels are written for. A newer one is tried; ``check`` says so."""

PLATFORMS = {"trn2": TRN2, "gen3": TRN2, "trn3": TRN3, "gen4": TRN3}
"""Values of NEURON_PLATFORM_TARGET_OVERRIDE that the kernels run on, and what they mean."""

INSTALL = (
    "install the AWS Neuron SDK 2.32 or 2.33 (packages nki, neuronx-cc and torch-neuronx or "
    "libtorch_neuronx_lite from AWS's own package index; those of the same names on PyPI are empty)"
)

DEVICES = ("neuron", "privateuseone", "xla")
"""What ``torch.device.type`` is under the native binding, before that is named, and under torch_xla."""

WITHOUT_DEVICE = ("NKI_SIMULATOR", "VLLM_NEURON_CPU_COMPILE")
"""Variables that say, at 1, that there need be no device: AWS's simulator, and compiling on another host."""


def unavailable() -> str | None:
    """Return what is missing for Neuron, and how to get it, or ``None``."""
    version = _nki_version()
    if version is None:
        return f"the Neuron SDK's package `nki` is not installed; {INSTALL}"
    if version < NKI_VERSIONS[0]:
        return (
            f"the kernels are written for {_written_for()}, but nki {_text(version)} is installed; {INSTALL}"
        )
    if neuron_binding.find() is None:
        return f"no PyTorch binding for Neuron: torch_neuronx, libtorch_neuronx_lite or torch_xla; {INSTALL}"
    override = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if override is not None and override not in PLATFORMS:
        return (
            f"NEURON_PLATFORM_TARGET_OVERRIDE={override} is no platform the kernels run on; expected one of "
            f"{', '.join(PLATFORMS)}"
        )
    if not any(os.environ.get(name) == "1" for name in WITHOUT_DEVICE) and not glob.glob("/dev/neuron[0-9]*"):
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


def details() -> str:
    """Say by what the kernels would be called, on how many cores, and what is not sure."""
    version, binding = _nki_version(), neuron_binding.find()
    assert version is not None and binding is not None, "asked before unavailable() was None"
    cores, source = neuron_binding.lnc()
    text = f"nki {_text(version)}, {binding.name}, LNC {cores} ({source})"
    if version[:2] > NKI_VERSIONS[1]:
        text += f"; untried: the kernels are written for {_written_for()}"
    return text


def _written_for() -> str:
    return "NKI " + " to ".join(map(_text, NKI_VERSIONS))


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def platform() -> Target:
    """Return the target this machine computes for: the override, else the binding's report, else trn2."""
    return TARGETS[_platform_name()]


@torch.compiler.assume_constant_result
def _platform_name() -> str:
    override = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if override is not None:
        return PLATFORMS[override].name
    detect = neuron_binding.attribute("libtorch_neuronx_lite.compile.platform", "get_platform_target")
    return (TRN2 if detect is None else PLATFORMS.get(str(detect()), TRN2)).name


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
        arguments: dict[str, Any] = {"eps": eps, "lower_bound": lower_bound, "ocp": self._ocp(target)}
        if weight is not None:
            arguments["weight"] = weight
        if static_scale is not None:
            arguments["static_scale"] = _on_every_partition(static_scale)
        rows, kernel = {"hidden": hidden}, "rms_norm_quant"
        if residual is not None:
            rows, kernel = {"hidden": hidden, "residual": residual}, "add_rms_norm_quant"
        results = self._by_rows(kernel, rows, arguments, source.MAX_B * source.MAX_S)
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
        arguments: dict[str, Any] = {"ocp": self._ocp(target)}
        if static_scale is not None:
            arguments["static_scale"] = _on_every_partition(static_scale)
        results = self._by_rows("silu_mul_quant", {"gate_up": gate_up}, arguments, source.MAX_T)
        if not results:  # no rows
            tail = fmt.SCALE_BYTES if static_scale is None else 0
            return gate_up.new_empty((*gate_up.shape[:-1], width + tail), dtype=torch.uint8)
        return results[0]

    def _ocp(self, target: Target) -> bool:
        """Whether codes are of another range than Trainium2's."""
        if target.fp8_max <= TRN2.fp8_max:
            return False
        if self._platform() is not TRN3:
            raise ValueError("target: trn3 codes (±448) need Trainium3, and this is Trainium2")
        return True

    def _by_rows(
        self, kernel: str, tensors: dict[str, Tensor], arguments: dict[str, Any], limit: int
    ) -> list[Tensor]:
        """Launch the kernel of an op on ``tensors [..., H]`` as rows, at most ``limit`` at once.

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

    def prepack_fp8_weight(self, weight: Tensor, blocks: bool) -> Tensor:
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
        return source.prepack(weight, blocks)

    def packed_fp8_linear(
        self,
        packed: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        static_scale: Tensor | None,
        out_features: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See :class:`~vllm_neuron_rmsq.backends.base.Functions`."""
        from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear as source

        width = packed.shape[-1] - (fmt.SCALE_BYTES if static_scale is None else 0)
        most = source.MAX_H if weight_scale.dim() == 1 else source.MAX_H_BLOCKS
        if width > most:
            raise ValueError(f"packed: expected H <= {most} (the NKI kernel's limit), got {width}")
        arguments: dict[str, Any] = {
            "weight": weight,
            "weight_scale": weight_scale,
            "out_dtype": str(out_dtype).removeprefix("torch."),
            "ocp": self._platform() is TRN3,
        }
        if bias is not None:
            arguments["bias"] = bias
        if static_scale is not None:
            arguments["static_scale"] = _on_every_partition(static_scale)
        rows = packed.reshape(-1, packed.shape[-1])
        out = [
            self._launch("packed_fp8_linear", {"packed": rows[start:stop].contiguous()} | arguments)
            for start, stop in _parts(rows.shape[0], source.MAX_T)
        ]
        joined = torch.cat(out) if len(out) > 1 else (out or [rows.new_empty((0,), dtype=out_dtype)])[0]
        return joined.reshape(*packed.shape[:-1], out_features)


def _on_every_partition(static_scale: Tensor) -> Tensor:
    """One scale as ``[128, 1]`` fp32: a kernel reads a scalar operand on each partition."""
    return static_scale.reshape(1, 1).expand(128, 1).contiguous()


def _parts(rows: int, limit: int) -> list[tuple[int, int]]:
    if 0 < rows <= limit:  # what a traced graph sees: one part, whatever the number of rows
        return [(0, rows)]
    return [(start, min(start + limit, rows)) for start in range(0, rows, limit)]


def prepacked_shape(out_features: int, in_features: int, blocks: bool) -> tuple[int, int]:
    """Return the shape of a prepacked weight."""
    from vllm_neuron_rmsq.kernels.nki import packed_fp8_linear as source

    return source.prepacked_shape(out_features, in_features, blocks)


def _traced() -> bool:
    binding = neuron_binding.find()
    return binding is not None and binding.traced


BACKEND = Backend(
    name="nki",
    unavailable=lambda: unavailable(),
    functions=Kernels(neuron_binding.launch, neuron_binding.logical_cores, platform),
    devices=DEVICES,
    serves=DEVICES,
    prepacked_shape=prepacked_shape,
    details=details,
    traced=_traced,
)
