"""SiLU of the gate times up + FP8 quantization, what a down projection reads: the op ``silu_mul_quant``.

Dimensions:
    I: intermediate size, features of gate and of up
    ...: rows (tokens)
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_neuron_rmsq import reference
from vllm_neuron_rmsq.backends import Backend, Functions
from vllm_neuron_rmsq.ops import dispatch
from vllm_neuron_rmsq.packed import SCALE_BYTES
from vllm_neuron_rmsq.target import Target, of_fp8_max


def silu_mul_quant(
    gate_up: Tensor,
    *,
    static_scale: Tensor | float | None = None,
    target: Target | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply SiLU of the gate by up, quantize each row to FP8 and pack it with its scale, in one pass.

    The numbers are :mod:`vllm_neuron_rmsq.reference`'s, the bytes :mod:`vllm_neuron_rmsq.packed`'s.

    Args:
        gate_up: ``[..., 2 I]``, gate then up, rank >= 2, bf16, fp16 or fp32.
        static_scale: one given dequantization scale, > 0, a float or an fp32 tensor of one element.
        target: a target or its name, ``"trn2"`` (±240) or ``"trn3"`` (±448); ``None`` is the setting's.
        backend: a backend's name; ``None`` is the setting's.

    Returns:
        ``[..., I + 4]`` uint8 packed rows, or ``[..., I]`` uint8 codes when ``static_scale`` is given.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or range.
        BackendUnavailableError: the backend cannot run here.
    """
    name = dispatch.backend(backend, "cpu" if gate_up.is_cpu else gate_up.device.type)
    compiling = torch.compiler.is_compiling()  # asked once: it takes as long as finding the backend
    # The native op checks its arguments in less time, but never sees those of another device.
    op_checks = (
        name == "cpu"
        and gate_up.is_cpu
        and (static_scale is None or not isinstance(static_scale, Tensor) or static_scale.is_cpu)
        and not compiling
    )
    if not op_checks:
        reference.check_silu_mul_quant(gate_up, static_scale)
    scale = None if static_scale is None else dispatch.scale_tensor(static_scale, gate_up)
    limit = dispatch.fp8_max(target)
    if compiling and dispatch.traced(name):
        return _compute(dispatch.functions(name), gate_up, scale, limit)
    try:
        return _OP.overloads[name](gate_up, scale, limit)
    except ValueError:
        # Says the same, and what came.
        reference.check_silu_mul_quant(gate_up, static_scale)
        raise


def _compute(functions: Functions, gate_up: Tensor, static_scale: Tensor | None, fp8_max: float) -> Tensor:
    return functions.silu_mul_quant(gate_up, static_scale, of_fp8_max(fp8_max))


def _fake(backend: Backend, gate_up: Tensor, static_scale: Tensor | None, fp8_max: float) -> Tensor:
    width = gate_up.shape[-1] // 2 + (SCALE_BYTES if static_scale is None else 0)
    return gate_up.new_empty((*gate_up.shape[:-1], width), dtype=torch.uint8)


_OP = dispatch.Op(
    "silu_mul_quant",
    "(Tensor gate_up, Tensor? static_scale, float fp8_max) -> Tensor",
    _compute,
    _fake,
)
