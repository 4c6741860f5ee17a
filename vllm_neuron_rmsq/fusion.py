"""Which norm feeds which linears: find, prove, bind, report.

Names prove nothing: post-norm models use the decoder's usual attribute names for norms of outputs, routers
read the norm beside the experts. So the loaded model is run once, eagerly, on two dummy tokens, every
norm's output replaced by a probe (:class:`~vllm_neuron_rmsq.layers.activation.NormOutputProbe`). A norm is
bound when its output was opened by packed FP8 linears and read by nobody else; any other norm stays vLLM's
own, with the reason in the report.
"""

from __future__ import annotations

import contextlib
import gc
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from vllm_neuron_rmsq import backends, settings
from vllm_neuron_rmsq.layers.activation import PACKED_KEY, NormOutputProbe
from vllm_neuron_rmsq.layers.fp8_linear import PackedFp8LinearKernel
from vllm_neuron_rmsq.layers.rms_norm_quant import Binding, RMSNormQuant
from vllm_neuron_rmsq.reference import DTYPES

logger = init_logger(f"vllm.{__name__}")

PROBE_TOKENS = 2


@dataclass
class NormReport:
    """What became of one RMSNorm layer.

    Attributes:
        name: its name in the model.
        linears: names of the packed FP8 linears that read its output.
        reason: why it stays stock; empty when it is fused.
        decoder: whether it normalizes the hidden state inside a decoder layer.
    """

    name: str
    decoder: bool
    linears: list[str] = field(default_factory=list)
    reason: str = ""


@dataclass
class FusionReport:
    """What the plugin did to a model.

    Attributes:
        backend, target: who computes, and its code range.
        norms: one entry per RMSNorm layer.
        linears: how many FP8 linears multiply packed rows.
        halved: how many of those had weights beyond ±240, halved for trn2.
    """

    backend: str
    target: str
    norms: list[NormReport] = field(default_factory=list)
    linears: int = 0
    halved: int = 0

    @property
    def fused(self) -> list[NormReport]:
        return [norm for norm in self.norms if not norm.reason]

    def __str__(self) -> str:
        text = (
            f"{len(self.fused)} of {len(self.norms)} RMSNorm layers fused "
            f"(backend {self.backend}, target {self.target}), {self.linears} packed FP8 linears"
        )
        if self.halved:
            text += f", {self.halved} with weights beyond ±240 halved"
        return text


def bind(model: torch.nn.Module, vllm_config: VllmConfig) -> FusionReport | None:
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
    backend, reason = backends.for_serving(choice.backend, current_platform.device_type)
    if backend is None:
        logger.info("vllm-neuron-rmsq %s: nothing replaced", reason)
        return None
    report = FusionReport(backend, choice.target)
    names = {module: name for name, module in model.named_modules()}
    linears = [module for module in names if getattr(module, "_input_quant_key", None) == PACKED_KEY]
    report.linears = len(linears)
    report.halved = sum(getattr(module, "rmsq_halved", False) for module in linears)
    width = vllm_config.model_config.get_hidden_size()
    entries: dict[RMSNormQuant, NormReport] = {}
    for module, name in names.items():
        if "RMSNorm" not in type(module).__name__:
            continue
        decoder = re.search(r"\.\d+\.", f".{name}.") is not None and module.weight.numel() == width
        report.norms.append(NormReport(name, decoder))
        if isinstance(module, RMSNormQuant):
            entries[module] = report.norms[-1]
        else:
            report.norms[-1].reason = f"{type(module).__name__} is not vLLM's RMSNorm"
    general = _general_reason(choice, linears, vllm_config)
    if general:
        for entry in entries.values():
            entry.reason = general
    else:
        _prove(model, vllm_config, entries, names)
    for norm, entry in entries.items():
        if not entry.reason:
            norm.binding = Binding(report.backend, report.target)
    _log(report)
    model.rmsq_report = report  # type: ignore[assignment]
    unfused = [entry for entry in report.norms if entry.decoder and entry.reason]
    if choice.strict and unfused:
        raise RuntimeError(
            f"VLLM_RMSQ_STRICT=1 and {len(unfused)} decoder norms are not fused: "
            + "; ".join(f"{entry.name}: {entry.reason}" for entry in unfused[:4])
            + ("; ..." if len(unfused) > 4 else "")
        )
    return report


def _general_reason(choice: settings.Settings, linears: list, vllm_config: VllmConfig) -> str:
    """Why no norm of the model can be fused, or an empty string."""
    if not choice.fuse:
        return "switched off (VLLM_RMSQ_FUSE=0)"
    if not linears:
        return "the model has no FP8 linear of a supported scheme"
    if vllm_config.lora_config is not None:
        return "LoRA adapters read the norm's output unquantized"
    return ""


def _prove(model, vllm_config, entries: dict[RMSNormQuant, NormReport], names: dict) -> None:
    """Run the model once on probes; fill in each entry's linears and, where not proven, its reason."""
    readers: dict[RMSNormQuant, list[str]] = {norm: [] for norm in entries}
    opened: dict[RMSNormQuant, list[torch.nn.Module]] = {norm: [] for norm in entries}
    probes: dict[RMSNormQuant, list[weakref.ref]] = {norm: [] for norm in entries}
    running: list[torch.nn.Module] = []

    def attach(norm: RMSNormQuant) -> None:
        def on_read(operator: str) -> None:
            where = names.get(running[-1], "") if running else ""
            readers[norm].append(f"read by {operator} in {where or 'the model'}")

        def probe(output: torch.Tensor) -> torch.Tensor:
            stand_in = NormOutputProbe(output, on_read, opened[norm].append)
            probes[norm].append(weakref.ref(stand_in))
            return stand_in

        norm.probe = probe

    failure = ""
    for norm in entries:
        attach(norm)
    try:
        with _module_stack(running):
            outputs = _dummy_forward(model, vllm_config)
        for leaf in tree_leaves(_plain(outputs)):
            for norm, refs in probes.items():
                if any(ref() is leaf for ref in refs):
                    readers[norm].append("returned by the model")
        leaf = outputs = None
    except Exception as error:
        # A model this run cannot cope with must start all the same: it stays stock vLLM.
        logger.warning("The dummy forward that looks for fusable norms failed", exc_info=True)
        failure = f"the dummy forward failed ({type(error).__name__}: {error})"
    finally:
        for norm in entries:
            del norm.probe
    if any(ref() is not None for refs in probes.values() for ref in refs):
        gc.collect()
    for norm, entry in entries.items():
        entry.linears = [names[linear] for linear in opened[norm]]
        if not probes[norm] and not failure:
            entry.reason = "not used in a forward of the model"
        elif any(ref() is not None for ref in probes[norm]) and not failure:
            entry.reason = "its output is kept for later"
        else:
            entry.reason = failure or _refute(norm, readers[norm], opened[norm], names)


def _refute(norm: RMSNormQuant, readers: list[str], opened: list[torch.nn.Module], names: dict) -> str:
    """Why ``norm`` cannot be bound, given what was seen, or an empty string when it can."""
    if readers:
        others = f" (and {len(readers) - 1} more)" if len(readers) > 1 else ""
        return f"its output is {readers[0]}{others}"
    if not opened:
        return "no packed FP8 linear reads its output"
    if norm.variance_size_override is not None:
        return "it normalizes by a part of the row"
    if norm.weight.dtype not in DTYPES:
        return f"its weight is {norm.weight.dtype}"
    for linear in opened:
        if get_input_quant_key(linear) != PACKED_KEY:
            return f"{names[linear]} needs unquantized input"
        width = linear.input_size_per_partition
        if width != norm.hidden_size:
            return f"it is {norm.hidden_size} wide and {names[linear]} takes {width} features"
    return ""


def _dummy_forward(model: torch.nn.Module, vllm_config: VllmConfig):
    """Run ``model`` eagerly on a few tokens, without KV cache, as vLLM's own profiling run does."""
    config = vllm_config.model_config
    device = torch.device(vllm_config.device_config.device)
    rows = (3, PROBE_TOKENS) if config.uses_mrope else (PROBE_TOKENS,)
    positions = torch.arange(PROBE_TOKENS, device=device).expand(rows)
    intermediate = None
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        from vllm.distributed import get_pp_group

        if not get_pp_group().is_first_rank:
            empty = model.make_empty_intermediate_tensors
            intermediate = empty(PROBE_TOKENS, config.dtype, device)  # type: ignore[operator]
    PackedFp8LinearKernel.probing = True
    try:
        with (
            torch.no_grad(),
            set_forward_context(None, vllm_config, num_tokens=PROBE_TOKENS, skip_compiled=True),
        ):
            return model(
                input_ids=torch.zeros(PROBE_TOKENS, dtype=torch.int32, device=device),
                positions=positions,
                intermediate_tensors=intermediate,
            )
    finally:
        PackedFp8LinearKernel.probing = False


@contextlib.contextmanager
def _module_stack(stack: list[torch.nn.Module]) -> Iterator[None]:
    """Keep ``stack`` the modules whose forward is running, innermost last."""

    def push(module, args):
        stack.append(module)

    def pop(module, args, output):
        stack.pop()

    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(push),
        torch.nn.modules.module.register_module_forward_hook(pop),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _plain(outputs):
    """vLLM's container of intermediate tensors is unknown to pytree."""
    return outputs.tensors if isinstance(outputs, IntermediateTensors) else outputs


def _log(report: FusionReport) -> None:
    logger.info("%s", report)
    for entry in report.norms:
        if entry.reason:
            logger.debug("RMSNorm %s: stock, because %s", entry.name, entry.reason)
        else:
            logger.debug("RMSNorm %s: fused, feeds %s", entry.name, ", ".join(entry.linears))
