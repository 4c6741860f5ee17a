"""Who reads the output of a layer: the loaded model is run once, eagerly, on two dummy tokens.

PyTorch's own hooks do it, so the layers know nothing of it:

- a forward hook on each layer in question (a *producer*) replaces its output by an :class:`OutputProbe`;
- hooks around every module say where in the model an operator runs;
- a dispatch mode sees the plugin's own operators. A packed FP8 linear begins by quantizing the activation it
  was given: if that is a probe, the linear has *opened* it. Any other operator on a probe is a *read*.

A forward pre-hook on the linears would be simpler and too early: what a linear's module does to its input
before its kernel gets it (``RowParallelLinear`` may split it, another may cast or pad it) must count as a
read, since it would get a packed activation there. The mode also spares the work: it answers the plugin's
operators with zeros, so no FP8 weight is multiplied, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.integrations.vllm import versions
from vllm_neuron_rmsq.ops import dispatch

logger = logging.getLogger(f"vllm.{__name__}")

PROBE_TOKENS = 2


@dataclass
class Finding:
    """What was seen of one producer's output.

    Attributes:
        width: its last dimension; 0 when the producer did not run.
        linears: the packed FP8 linears that opened it.
        reason: why more than those have it, or it is not known who has; empty when nobody else has.
        outer: whether it is no norm between two layers: the model returns it, or joins it with another
            before a linear reads them, as a draft model does with its token and hidden state.
    """

    width: int = 0
    linears: list[nn.Module] = field(default_factory=list)
    reason: str = ""
    outer: bool = False


class UnknownForwardError(Exception):
    """A model's forward must be given something that the dummy forward does not know."""


def observe(
    model: nn.Module,
    vllm_config: Any,
    model_config: Any,
    producers: Iterable[nn.Module],
    linears: Iterable[nn.Module],
) -> dict[Any, Finding]:
    """Run ``model`` once and return what was seen of each producer's output.

    Args:
        model: what vLLM's model loader returned.
        vllm_config: the configuration it was built with.
        model_config: the part that describes it; a draft model's is not ``vllm_config.model_config``.
        producers: modules that return a tensor, or a tuple whose first element is the tensor in question.
        linears: the packed FP8 linears of the model.
    """
    names = {module: name for name, module in model.named_modules()}
    findings: dict[Any, Finding] = {producer: Finding() for producer in producers}
    reads: dict[nn.Module, list[str]] = {producer: [] for producer in findings}
    probes: dict[nn.Module, list[weakref.ref]] = {producer: [] for producer in findings}
    running: list[nn.Module] = []

    def replace_output(producer: nn.Module, args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output

        def on_read(operator: str) -> None:
            where = names.get(running[-1], "") if running else ""
            reads[producer].append(f"read by {operator} in {where or 'the model'}")
            findings[producer].outer |= operator.startswith("aten.cat.")

        probe = OutputProbe(tensor, on_read, findings[producer].linears.append)
        probes[producer].append(weakref.ref(probe))
        findings[producer].width = tensor.shape[-1]
        return (probe, *output[1:]) if isinstance(output, tuple) else probe

    failure = ""
    hooks = [producer.register_forward_hook(replace_output) for producer in findings]
    try:
        with _running(running), _OwnOperators(running, set(linears)):
            outputs = dummy_forward(model, vllm_config, model_config)
        for leaf in tree_leaves(_plain(outputs)):
            for producer, refs in probes.items():
                if any(ref() is leaf for ref in refs):
                    reads[producer].append("returned by the model")
                    findings[producer].outer = True
        leaf = outputs = None
    except UnknownForwardError as error:
        failure = str(error)
    except Exception as error:
        # A model this run cannot cope with must start all the same: it stays stock vLLM.
        logger.warning("The dummy forward that looks for fusable norms failed", exc_info=True)
        failure = f"the dummy forward failed ({type(error).__name__}: {error})"
    finally:
        for hook in hooks:
            hook.remove()
    if any(ref() is not None for refs in probes.values() for ref in refs):
        gc.collect()
    for producer, finding in findings.items():
        kept = any(ref() is not None for ref in probes[producer])
        finding.reason = failure or _reason(probes[producer], kept, reads[producer], finding.linears)
    return findings


def _reason(probes: list, kept: bool, reads: list[str], opened: list[nn.Module]) -> str:
    if not probes:
        return "not used in a forward of the model"
    if kept:
        return "its output is kept for later"
    if reads:
        others = f" (and {len(reads) - 1} more)" if len(reads) > 1 else ""
        return f"its output is {reads[0]}{others}"
    if not opened:
        return "no packed FP8 linear reads its output"
    return ""


def dummy_forward(model: nn.Module, vllm_config: Any, model_config: Any) -> Any:
    """Run ``model`` eagerly on a few tokens, without KV cache, as vLLM's own profiling run does.

    It is given what its forward asks for by name. Draft models (EAGLE, MTP) ask for the hidden states of the
    model they draft for.

    Raises:
        UnknownForwardError: it asks for something else and has no default for it.
    """
    device = torch.device(vllm_config.device_config.device)
    rows = (3, PROBE_TOKENS) if model_config.uses_mrope else (PROBE_TOKENS,)
    intermediate = None
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and not versions.get_pp_group().is_first_rank:
        empty: Callable = model.make_empty_intermediate_tensors  # type: ignore[assignment]
        intermediate = empty(PROBE_TOKENS, model_config.dtype, device)
    known = {
        "input_ids": torch.zeros(PROBE_TOKENS, dtype=torch.int32, device=device),
        "positions": torch.arange(PROBE_TOKENS, device=device).expand(rows),
        "intermediate_tensors": intermediate,
        "hidden_states": torch.zeros(
            PROBE_TOKENS, model_config.get_hidden_size(), dtype=model_config.dtype, device=device
        ),
    }
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    unknown = [p.name for p in parameters if p.name in named - known.keys() and p.default is p.empty]
    if unknown:
        raise UnknownForwardError(
            f"{type(model).__name__}.forward asks for {', '.join(unknown)}, which the dummy forward does not "
            "know"
        )
    with (
        torch.no_grad(),
        versions.set_forward_context(None, vllm_config, num_tokens=PROBE_TOKENS, skip_compiled=True),
    ):
        return model(**{name: value for name, value in known.items() if name in named})


class _OwnOperators(TorchDispatchMode):
    """Answers the plugin's operators with zeros, and tells a probe when a packed FP8 linear quantizes it."""

    def __init__(self, running: list[nn.Module], linears: set[nn.Module]) -> None:
        super().__init__()
        self.running, self.linears = running, linears

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace = getattr(torch.ops, dispatch.NAMESPACE)
        if func.overloadpacket is namespace.packed_fp8_linear:
            packed, *_, out_features, out_dtype = args
            return packed.new_zeros((*packed.shape[:-1], out_features), dtype=out_dtype)
        if func.overloadpacket is namespace.rms_norm_quant and self.running[-1] in self.linears:
            hidden = args[0]
            if isinstance(hidden, OutputProbe):
                hidden = hidden.open(self.running[-1])
            static_scale = args[4]
            width = hidden.shape[-1] + (fmt.SCALE_BYTES if static_scale is None else 0)
            return hidden.new_zeros((*hidden.shape[:-1], width), dtype=torch.uint8)
        return func(*args, **(kwargs or {}))


class OutputProbe(torch.Tensor):
    """Stands in for a layer's output: reports every operation that reads it, then lets it happen.

    It has the output's shape, strides and dtype but no storage. Metadata may be read freely; any operator
    that PyTorch dispatches with it, from Python or C++, is passed to ``on_read`` by name and then run on
    the real output; code that asks for the memory gets an error. :meth:`open` is passed to ``on_open``
    instead.
    """

    output: torch.Tensor
    on_read: Callable[[str], None]
    on_open: Callable[[nn.Module], None]

    @staticmethod
    def __new__(cls, output: torch.Tensor, on_read: Callable, on_open: Callable) -> Self:
        probe = torch.Tensor._make_wrapper_subclass(
            cls, output.shape, strides=output.stride(), dtype=output.dtype, device=output.device
        )
        torch._C._set_throw_on_mutable_data_ptr(probe)
        probe.output, probe.on_read, probe.on_open = output, on_read, on_open
        return probe

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        def unwrap(probe):
            probe.on_read(str(func))
            return probe.output

        args, kwargs = tree_map_only(cls, unwrap, (args, kwargs or {}))
        return func(*args, **kwargs)

    def open(self, linear: nn.Module) -> torch.Tensor:
        """Report that ``linear`` takes the output, and return it."""
        self.on_open(linear)
        return self.output

    def __repr__(self) -> str:  # type: ignore[override]  # the default reads the data
        return f"OutputProbe(shape={list(self.shape)}, dtype={self.dtype})"


@contextlib.contextmanager
def _running(stack: list[nn.Module]) -> Iterator[None]:
    """Keep ``stack`` the modules whose forward is running, innermost last."""

    def push(module, args):
        stack.append(module)

    def pop(module, args, output):
        stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(push),
        nn.modules.module.register_module_forward_hook(pop),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _plain(outputs: Any) -> Any:
    """vLLM's container of intermediate tensors is unknown to pytree."""
    return outputs.tensors if isinstance(outputs, versions.IntermediateTensors) else outputs
