"""Which norm feeds which linears: find, prove, bind, report.

Names prove nothing: post-norm models use the decoder's usual attribute names for norms of outputs, routers
read the norm beside the experts. So :mod:`.proof` runs the loaded model once. A norm is bound when its output
was opened by packed FP8 linears and read by nobody else; any other norm stays vLLM's own, with the reason in
the report.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from vllm_neuron_rmsq import backends, settings, target
from vllm_neuron_rmsq.integrations.vllm import proof, schemes, versions
from vllm_neuron_rmsq.integrations.vllm.report import FusionReport, LayerReport
from vllm_neuron_rmsq.integrations.vllm.rms_norm import Binding, RMSNormQuant
from vllm_neuron_rmsq.integrations.vllm.schemes import Scheme

logger = logging.getLogger(f"vllm.{__name__}")


def bind(model: nn.Module, vllm_config: Any) -> FusionReport | None:
    """Bind the norms of a freshly loaded model to the linears they feed, and report.

    The report is logged (one line at INFO, every layer at DEBUG) and kept as ``model.rmsq_report``.

    Args:
        model: what vLLM's model loader returned, weights final.
        vllm_config: the configuration it was built with.

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
    report.linears = len(linears)
    report.halved = sum(getattr(module, "rmsq_halved", False) for module in linears)
    width = vllm_config.model_config.get_hidden_size()
    entries: dict[nn.Module, LayerReport] = {}
    for module, name in names.items():
        if "RMSNorm" not in type(module).__name__:
            continue
        decoder = re.search(r"\.\d+\.", f".{name}.") is not None and module.weight.numel() == width
        report.norms.append(LayerReport(name, decoder))
        if isinstance(module, RMSNormQuant):
            entries[module] = report.norms[-1]
        else:
            report.norms[-1].reason = f"{type(module).__name__} is not vLLM's RMSNorm"
    general = _general_reason(choice, linears, vllm_config)
    if general:
        for entry in entries.values():
            entry.reason = general
    else:
        for norm, finding in proof.observe(model, vllm_config, entries, linears).items():
            assert isinstance(norm, RMSNormQuant)
            entry = entries[norm]
            entry.linears = [names[linear] for linear in finding.linears]
            entry.reason = finding.reason or norm.unfit() or misfit(finding, linears, names)
            if not entry.reason:
                norm.binding = Binding(linears[finding.linears[0]], backend, target.get(choice.target))
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


def _scheme(module: nn.Module) -> Scheme | None:
    """The scheme of a packed FP8 linear, told by the key of the rows it takes; ``None`` for other modules."""
    key = getattr(module, "_input_quant_key", None)
    return next((scheme for scheme in schemes.SCHEMES if key == scheme.rows), None)


def _general_reason(choice: settings.Settings, linears: Mapping, vllm_config: Any) -> str:
    """Why no norm of the model can be fused, or an empty string."""
    if not choice.fuse:
        return "switched off (VLLM_RMSQ_FUSE=0)"
    if not linears:
        return "the model has no FP8 linear of a supported scheme"
    if vllm_config.lora_config is not None:
        return "LoRA adapters read the norm's output unquantized"
    return ""


def misfit(
    finding: proof.Finding, linears: Mapping[nn.Module, Scheme], names: Mapping[nn.Module, str]
) -> str:
    """Say why a producer cannot hand rows to the linears that opened its output, or an empty string."""
    scheme = linears[finding.linears[0]]
    for linear in finding.linears:
        if versions.get_input_quant_key(linear) != scheme.rows:
            return f"{names[linear]} needs unquantized input"
        width = linear.input_size_per_partition
        if width != finding.width:
            return f"it is {finding.width} wide and {names[linear]} takes {width} features"
    return ""
