"""Which norm or activation function feeds which linears: find, prove, bind, report.

Names prove nothing: post-norm models use the decoder's usual attribute names for norms of outputs, routers
read the norm beside the experts. So :mod:`.proof` runs the loaded model once. A layer is bound when its
output was opened by packed FP8 linears and read by nobody else; any other stays vLLM's own, with the reason
in the report.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vllm_neuron_rmsq import backends, settings, target
from vllm_neuron_rmsq.integrations.vllm import proof, silu_mul, versions
from vllm_neuron_rmsq.integrations.vllm.linear import linear_reports
from vllm_neuron_rmsq.integrations.vllm.report import FusionReport, LayerReport
from vllm_neuron_rmsq.integrations.vllm.rms_norm import FusableNorm
from vllm_neuron_rmsq.integrations.vllm.schemes import Binding, Scheme

logger = logging.getLogger(f"vllm.{__name__}")


def bind(model: nn.Module, vllm_config: Any, model_config: Any) -> FusionReport | None:
    """Bind norms and activation functions of a freshly loaded model to the linears they feed, and report.

    The report is logged (one line at INFO, every layer at DEBUG) and kept as ``model.rmsq_report``.

    Args:
        model: what vLLM's model loader returned, weights final.
        vllm_config: the configuration it was built with.
        model_config: the part that describes it; a draft model's is not ``vllm_config.model_config``.

    Returns:
        the report, or ``None`` when the plugin is switched off or has no fast backend for the device.

    Raises:
        RuntimeError: STRICT is set and a decoder norm stayed unfused.
    """
    choice = settings.current()
    backend, reason = backends.for_serving(choice.backend, versions.current_platform.device_type)
    if backend is None:
        logger.info("vllm-neuron-rmsq %s: nothing replaced", reason)
        return None
    report = FusionReport(backend, choice.target)
    names = {module: name for name, module in model.named_modules()}
    linears = {module: scheme for module in names if (scheme := _scheme(module))}
    report.schemes = dict(Counter(scheme.name for scheme in linears.values()))
    report.weight_only = sum(getattr(module, "rmsq_weight_only", False) for module in names)
    report.linear_layers = linear_reports(names)
    report.halved = sum(getattr(module, "rmsq_halved", False) for module in linears)
    norms = _norms(names, report, model_config.get_hidden_size())
    activations = _activations(names, report)
    general = _general_reason(choice, linears)
    if general:
        for layer in (*norms.values(), *activations.values()):
            layer.reason = general
    else:
        # vLLM gives adapters to the model itself, never to its draft model.
        lora = vllm_config.lora_config if model_config is vllm_config.model_config else None
        with silu_mul.in_place(activations) as ours:
            producers = {**norms, **dict(zip(ours, activations.values(), strict=True))}
            findings = proof.observe(model, vllm_config, model_config, producers, linears)
            for producer, finding in findings.items():
                layer = producers[producer]
                layer.decoder &= not finding.outer
                layer.linears = [names[linear] for linear in finding.linears]
                layer.reason = (
                    finding.reason
                    or producer.unfit(linears[finding.linears[0]])
                    or misfit(finding, linears, names)
                    or adapted(model, lora, layer.linears)
                )
                if not layer.reason:
                    first = finding.linears[0]
                    scale = static_scale(first, linears[first])
                    producer.bind(Binding(linears[first], backend, target.get(choice.target), scale))
    report.log()
    model.rmsq_report = report  # type: ignore[assignment]
    unfused = [entry for entry in report.norms if entry.decoder and entry.reason]
    if choice.strict and unfused:
        raise RuntimeError(
            f"VLLM_RMSQ_STRICT=1 and {len(unfused)} decoder norms are not fused: "
            + "; ".join(f"{entry.name}: {entry.reason}" for entry in unfused[:4])
            + ("; ..." if len(unfused) > 4 else "")
        )
    return report


def _norms(names: Mapping, report: FusionReport, width: int) -> dict[Any, LayerReport]:
    """Enter every RMSNorm in the report; return those that could be fused, with their entries."""
    norms: dict[Any, LayerReport] = {}
    for module, name in names.items():
        if "RMSNorm" not in type(module).__name__:
            continue
        decoder = re.search(r"\.\d+\.", f".{name}.") is not None and module.weight.numel() == width
        report.norms.append(LayerReport(name, decoder=decoder))
        if isinstance(module, FusableNorm):
            norms[module] = report.norms[-1]
        else:
            report.norms[-1].reason = f"{type(module).__name__} is not vLLM's RMSNorm"
    return norms


def _activations(names: Mapping, report: FusionReport) -> dict[silu_mul.Place, LayerReport]:
    """Enter every SiluAndMul in the report; return the places of those that could be fused."""
    places: dict[silu_mul.Place, LayerReport] = {}
    for parent, prefix in names.items():
        for attribute, module in parent.named_children():
            if "SiluAndMul" not in type(module).__name__:
                continue
            report.activations.append(LayerReport(f"{prefix}.{attribute}"))
            if type(module) is versions.SiluAndMul:
                places[silu_mul.Place(parent, attribute)] = report.activations[-1]
            else:
                report.activations[-1].reason = f"{type(module).__name__} is not vLLM's SiluAndMul"
    return places


def _scheme(module: nn.Module) -> Scheme | None:
    """The scheme of a packed FP8 linear, as its kernel wrote it there; ``None`` for other modules."""
    return getattr(module, "rmsq_scheme", None)


def _general_reason(choice: settings.Settings, linears: Mapping) -> str:
    """Why no layer of the model can be fused, or an empty string."""
    if not choice.fuse:
        return "switched off (VLLM_RMSQ_FUSE=0)"
    if not linears:
        return "the model has no FP8 linear of a supported scheme"
    return ""


def adapted(model: nn.Module, lora: Any, linears: Iterable[str]) -> str:
    """Say which of these linears LoRA adapters may change, or return an empty string.

    vLLM wraps linears for adapters once, at the start, after this; an adapter that is loaded later changes
    those and no others. A wrapped linear reads its input unquantized, whatever the adapters in use contain.

    Args:
        model: the model.
        lora: vLLM's ``LoRAConfig``, or ``None`` where there are no adapters.
        linears: names of linears in it.
    """
    if lora is None:
        return ""
    packed = versions.get_packed_modules_mapping(model)
    for linear in linears:
        if versions.is_in_target_modules(linear, lora.target_modules, packed):
            remedy = (
                "" if lora.target_modules else "; --lora-target-modules would say which linears they change"
            )
            return f"LoRA adapters may change {linear}, which reads it unquantized then{remedy}"
    return ""


def misfit(
    finding: proof.Finding, linears: Mapping[nn.Module, Scheme], names: Mapping[nn.Module, str]
) -> str:
    """Say why a producer cannot hand rows to the linears that opened its output, or an empty string."""
    first = finding.linears[0]
    for linear in finding.linears:
        if versions.get_input_quant_key(linear) != linears[linear].rows:
            return f"{names[linear]} needs unquantized input"
        (one, scale), (other, other_scale) = (
            (linears[at], static_scale(at, linears[at])) for at in (first, linear)
        )
        if linear is not first and (
            (one.rows, one.bound) != (other.rows, other.bound) or scale != other_scale
        ):
            return f"{names[first]} and {names[linear]}, which read it, quantize it in different ways"
        width = linear.input_size_per_partition
        if width != finding.width:
            return f"it is {finding.width} wide and {names[linear]} takes {width} features"
    return ""


def static_scale(linear: nn.Module, scheme: Scheme) -> torch.Tensor | None:
    """The scale of a linear's activations, ``[1]`` fp32, where the checkpoint gives it; else ``None``."""
    return linear.input_scale if scheme.static else None  # type: ignore[return-value]
