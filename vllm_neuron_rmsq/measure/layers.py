"""One decoder layer on real activations: every backend beside the float64 oracle.

Dimensions:
    T: tokens
    H: input features of a linear
    I: intermediate size
    N: output features of a linear

The unquantized model is run by transformers on a text, with hooks in the layers asked for. What is quantized
there, and what reads it, is found as the plugin finds it: by which tensor reaches which linear.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_neuron_rmsq import backends, ops, oracle, packed, target, weights

NORM, SILU, PLAIN = "norm", "SiLU times up", "no norm"
ROWS = 32
"""Tokens looked at: the simulator takes seconds for more."""

TIES = 1e-3
"""Share of bf16 values that are exact ties, which fp32 arithmetic may round either way (docs/contract.md)."""

NKI_SCALES, NKI_CODES = 2.0**-7, 0.02
"""NKI's norm has stages in 16 bits."""

SCALES = ("weight_scale", "weight_scale_inv")


@dataclass
class Step:
    """A quantization in a layer, with its real input, and the linears that read it.

    Attributes:
        name: of the norm, or of the linear whose input is quantized.
        kind: :data:`NORM`, :data:`SILU` or :data:`PLAIN`.
        x: ``[T, H]`` bf16, or ``[T, 2 I]`` (gate, then up) for :data:`SILU`.
        gamma: ``[H]``, for :data:`NORM`.
        eps: of the norm.
        linears: name to the unquantized weight ``[N, H]``.
    """

    name: str
    kind: str
    x: Tensor
    gamma: Tensor | None = None
    eps: float = 1e-6
    linears: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Agreement:
    """One backend at one step, for one target.

    Attributes:
        step, kind, target, backend: which.
        scale_error: largest relative difference of a row's scale from the oracle's.
        codes_equal: share of the codes that are the oracle's.
        steps: most steps that a code is off.
        output_error: relative rms error of the linears' outputs, against bf16 weights and unquantized
            activations in float64: what FP8 costs, whoever computes it.
        passed: whether scales and codes are within the contract's tolerances.
    """

    step: str
    kind: str
    target: str
    backend: str
    scale_error: float
    codes_equal: float
    steps: int
    output_error: float
    passed: bool


def capture(model: Any, tokens: Sequence[int], layers: Sequence[int]) -> list[Step]:
    """Run a transformers model and return the steps of some of its decoder layers.

    Args:
        model: a causal language model in bf16.
        tokens: a text of T >= 1 tokens.
        layers: numbers of decoder layers.

    Raises:
        ValueError: the model has no such layer, or none of its linears is one that would be quantized.
    """
    inside = re.compile(rf"(^|\.)layers\.({'|'.join(map(str, layers))})\.")
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    modules = {name: module for name, module in model.named_modules() if inside.search(name)}
    found = {int(inside.search(name)[2]) for name in modules}  # type: ignore[index]
    if found != set(layers):
        raise ValueError(f"layers: the model has no layer {min(set(layers) - found)}")

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                inputs[name], outputs[name] = args[0], out

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            model(torch.tensor([list(tokens)]))
    finally:
        for handle in handles:
            handle.remove()
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name in inputs]
    steps: dict[int, Step] = {}  # by the tensor that is quantized
    for name in linears:
        x = inputs[name]
        if id(x) not in steps:
            norm = next((n for n in outputs if outputs[n] is x and "Norm" in type(modules[n]).__name__), None)
            steps[id(x)] = _norm(norm, modules, inputs, x) or _silu(name, outputs, x) or _plain(name, x)
        steps[id(x)].linears[name] = modules[name].weight.detach()
    if not steps:
        raise ValueError("layers: none of their linears was called; is this a decoder-only language model?")
    return list(steps.values())


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])[-ROWS:].contiguous()


def _norm(
    name: str | None, modules: dict[str, nn.Module], inputs: dict[str, Tensor], x: Tensor
) -> Step | None:
    if name is None:
        return None
    module = modules[name]
    gamma: Tensor = module.get_parameter("weight").detach()
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    hidden = inputs[name].float()
    ours = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * gamma.float()
    if not torch.allclose(ours, x.float(), rtol=2**-6, atol=1e-3):
        return None  # another norm than RMSNorm, such as one that multiplies by 1 + gamma
    return Step(name, NORM, _rows(inputs[name]), gamma, eps)


def _silu(name: str, outputs: dict[str, Tensor], x: Tensor) -> Step | None:
    parent = name.rpartition(".")[0]
    if f"{parent}.gate_up_proj" in outputs:
        gate_up = outputs[f"{parent}.gate_up_proj"]
    elif f"{parent}.gate_proj" in outputs and f"{parent}.up_proj" in outputs:
        gate_up = torch.cat([outputs[f"{parent}.gate_proj"], outputs[f"{parent}.up_proj"]], dim=-1)
    else:
        return None
    if gate_up.shape[-1] != 2 * x.shape[-1]:
        return None
    gate, up = gate_up.float().chunk(2, dim=-1)
    if not torch.allclose(F.silu(gate) * up, x.float(), rtol=2**-6, atol=1e-2):
        return None
    return Step(name, SILU, _rows(gate_up))


def _plain(name: str, x: Tensor) -> Step:
    return Step(name, PLAIN, _rows(x))


def compare(steps: Sequence[Step], fp8: Path, target_name: str, names: Sequence[str]) -> list[Agreement]:
    """Compute every step on every backend and compare with the oracle.

    Args:
        steps: of :func:`capture`.
        fp8: checkpoint directory whose FP8 weights the linears take, fitted to the target.
        target_name: whose range.
        names: backends that can run here.

    Raises:
        ValueError: ``fp8`` lacks a linear's weight and scales.
    """
    found = []
    for step in steps:
        static_scale = _static_scale(fp8, step, target_name)
        expected, exact = _expected(step, target_name, static_scale)
        exact_codes = oracle.to_fp8(expected.scaled)
        truth = {name: exact @ w.double().t() for name, w in step.linears.items()}
        for backend in names:
            device = next(iter(backends.get(backend).devices), "cpu")
            rows = _quantize(step, target_name, backend, device, static_scale)
            if static_scale is None:
                codes, scale = (part.cpu() for part in packed.unpack(rows))
            else:
                codes, scale = rows.cpu(), torch.full((len(rows), 1), static_scale)
            off = np.abs(oracle.ordinal(codes.numpy()) - oracle.ordinal(exact_codes))
            scale_error = float(np.max(np.abs(scale.double().numpy() / expected.scale - 1)))
            wrong = total = 0.0
            for name in step.linears:
                weight, weight_scale = _weight(fp8, name, target_name)
                out = ops.packed_fp8_linear(
                    rows,
                    weight.to(device),
                    weight_scale.to(device),
                    static_scale=static_scale,
                    out_dtype=torch.float32,
                    backend=backend,
                )
                wrong += float((out.cpu().double() - truth[name]).square().sum())
                total += float(truth[name].square().sum())
            differ = float((off > 0).mean())
            nki = backend.startswith("nki") and step.kind != SILU
            passed = (
                scale_error <= (NKI_SCALES if nki else oracle.SCALE_RTOL)
                and differ <= (NKI_CODES if nki else TIES)
                and int(off.max()) <= 1
            )
            found.append(
                Agreement(
                    step.name,
                    step.kind,
                    target_name,
                    backend,
                    scale_error,
                    1 - differ,
                    int(off.max()),
                    math.sqrt(wrong / total) if total else 0.0,
                    passed,
                )
            )
    return found


def _expected(step: Step, target_name: str, static_scale: float | None) -> tuple[oracle.Expected, Tensor]:
    """What the contract says, and the unquantized activation ``[T, H]`` in float64."""
    x = step.x.double()
    if step.kind == SILU:
        gate, up = x.chunk(2, dim=-1)
        expected = oracle.silu_mul_quant(step.x, static_scale=static_scale, target=target_name)
        return expected, F.silu(gate) * up
    if step.gamma is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + step.eps) * step.gamma.double()
    expected = oracle.rms_norm_quant(
        step.x, step.gamma, eps=step.eps, static_scale=static_scale, target=target_name
    )
    return expected, x


def _quantize(step: Step, target_name: str, backend: str, device: str, static_scale: float | None) -> Tensor:
    x = step.x.to(device)
    if step.kind == SILU:
        return ops.silu_mul_quant(x, static_scale=static_scale, target=target_name, backend=backend)
    gamma = None if step.gamma is None else step.gamma.to(device)
    rows = ops.rms_norm_quant(
        x, gamma, eps=step.eps, static_scale=static_scale, target=target_name, backend=backend
    )
    assert isinstance(rows, Tensor)
    return rows


def natural_scale(scale: Tensor, shape: torch.Size) -> Tensor | None:
    """Return a weight's scales as the contract has them, whatever shape the checkpoint has.

    Args:
        scale: the checkpoint's.
        shape: of the weight, ``[N, H]``.

    Returns:
        fp32 ``[1]``, ``[N]`` or ``[ceil(N / 128), ceil(H / 128)]``; ``None`` where they are none of these.
    """
    if scale.numel() in (1, shape[0]):
        return scale.float().reshape(-1)
    blocks = weights.block_scale_shape(*shape)
    return scale.float().reshape(blocks) if scale.numel() == math.prod(blocks) else None


def _static_scale(fp8: Path, step: Step, target_name: str) -> float | None:
    """The scale that the checkpoint gives for what a step's linears read; as vLLM, the largest of theirs."""
    names = {f"{name}.input_scale" for name in step.linears}
    given = list(_tensors(fp8, names).values())
    if not given:
        return None
    largest = torch.stack([scale.float().max() for scale in given]).max()
    return float(target.get(target_name).static_scale(largest))


def _tensors(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """Those of the tensors that a checkpoint directory has."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in names & set(file.keys())}
    return found


def _weight(fp8: Path, name: str, target_name: str) -> tuple[Tensor, Tensor]:
    """A linear's FP8 weight ``[N, H]`` uint8, within the target's range, and its scales."""
    found = _tensors(fp8, {f"{name}.{part}" for part in ("weight", *SCALES)})
    weight = found.pop(f"{name}.weight", None)
    scale = next(iter(found.values()), None)
    if weight is None or scale is None or weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{fp8}: has no FP8 weight and weight_scale for {name}")
    natural = natural_scale(scale, weight.shape)
    if natural is None:
        raise ValueError(
            f"{fp8}: the scales of {name} are {list(scale.shape)}; expected one, one for each output, or one "
            "for each block of 128 x 128"
        )
    fitted = weights.fit(weight.view(torch.uint8), natural, target.get(target_name))
    return fitted.codes, fitted.scale
