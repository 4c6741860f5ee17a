"""What the plugin did to a model: one line at the start of vLLM, every layer at DEBUG."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_neuron_rmsq import __version__, backends
from vllm_neuron_rmsq.integrations import metrics
from vllm_neuron_rmsq.integrations.vllm import versions

logger = logging.getLogger(f"vllm.{__name__}")


@dataclass
class LayerReport:
    """What became of one layer that can write packed rows.

    Attributes:
        name: its name in the model.
        linears: names of the packed FP8 linears that read its output.
        reason: why it stays stock; empty when it is fused.
        decoder: whether it normalizes the hidden state inside a decoder layer.
    """

    name: str
    linears: list[str] = field(default_factory=list)
    reason: str = ""
    decoder: bool = False


@dataclass
class LinearReport:
    """What became of one linear.

    Attributes:
        name: its name in the model.
        scheme: of the packed rows that it multiplies; empty when it is vLLM's own.
        reason: why it is vLLM's own; empty when it is not.
        halved: whether its weight was halved for the target's range; ``None`` where nobody looked.
    """

    name: str
    scheme: str = ""
    reason: str = ""
    halved: bool | None = None


@dataclass
class FusionReport:
    """What the plugin did to a model.

    Attributes:
        backend, target: who computes, and its code range.
        norms: one entry per RMSNorm layer.
        schemes: how many FP8 linears multiply packed rows, by the name of their scheme.
        halved: how many of those had weights beyond ±240, halved for trn2.
        activations: one entry per SiluAndMul layer, SiLU of a gate times up.
        weight_only: how many FP8 linears have plain activations, and multiply in the model's dtype.
        linear_layers: one entry per linear, whatever it multiplies by.
    """

    backend: str
    target: str
    norms: list[LayerReport] = field(default_factory=list)
    schemes: dict[str, int] = field(default_factory=dict)
    halved: int = 0
    activations: list[LayerReport] = field(default_factory=list)
    weight_only: int = 0
    linear_layers: list[LinearReport] = field(default_factory=list)

    @property
    def linears(self) -> int:
        """How many FP8 linears multiply packed rows."""
        return sum(self.schemes.values())

    @property
    def fused(self) -> list[LayerReport]:
        """The norms that are fused."""
        return [norm for norm in self.norms if not norm.reason]

    @property
    def fused_activations(self) -> list[LayerReport]:
        return [activation for activation in self.activations if not activation.reason]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as ``json`` can write it; ``docs/serving.md`` has the keys, which keep their
        meaning as long as ``schema`` is the same."""
        halved = [entry.halved for entry in self.linear_layers if entry.scheme]
        return {
            "schema": 1,
            "plugin": __version__,
            "vllm": versions.installed(),
            "backend": self.backend,
            "instruction_set": backends.get(self.backend).level(),
            "target": self.target,
            "summary": str(self),
            "norms": [asdict(entry) | {"fused": not entry.reason} for entry in self.norms],
            "activations": [asdict(entry) | {"fused": not entry.reason} for entry in self.activations],
            "linears": [asdict(entry) for entry in self.linear_layers],
            "counts": {
                "norms": len(self.norms),
                "fused_norms": len(self.fused),
                "activations": len(self.activations),
                "fused_activations": len(self.fused_activations),
                "linears": len(self.linear_layers),
                "packed_linears": dict(Counter(entry.scheme for entry in self.linear_layers if entry.scheme)),
                "halved_linears": None if None in halved else sum(map(bool, halved)),
            },
        }

    def publish(self, model_config: Any, parallel_config: Any) -> None:
        """Show on the server's ``/metrics`` what this rank has loaded, and what it counts from now on."""
        backend = backends.get(self.backend)
        labels = {
            "model_name": model_config.served_model_name,
            "engine": str(parallel_config.data_parallel_index),
            "rank": str(parallel_config.rank),
        }
        info = {
            "version": __version__,
            "backend": self.backend,
            "instruction_set": backend.level(),
            "target": self.target,
        }
        gauges = [metrics.Gauge("info", 1, info)]
        for name, layers, fused in (
            ("norms", self.norms, self.fused),
            ("activations", self.activations, self.fused_activations),
        ):
            gauges.append(metrics.Gauge(name, len(fused), {"state": "fused"}))
            gauges.append(metrics.Gauge(name, len(layers) - len(fused), {"state": "stock"}))
        gauges += [metrics.Gauge("linears", count, {"scheme": name}) for name, count in self.schemes.items()]
        gauges.append(metrics.Gauge("halved_linears", self.halved))
        metrics.publish(labels, gauges, backend.counts)

    def __str__(self) -> str:
        text = (
            f"{len(self.fused)} of {len(self.norms)} RMSNorm layers fused "
            f"(backend {self.backend}, target {self.target}), {self.linears} packed FP8 linears"
        )
        if len(self.schemes) > 1:
            text += f" ({', '.join(f'{count} {name}' for name, count in sorted(self.schemes.items()))})"
        elif self.schemes:
            text += f" ({', '.join(self.schemes)})"
        if self.halved:
            text += f", {self.halved} with weights beyond ±240 halved"
        if self.weight_only:
            text += f"; {self.weight_only} weight-only FP8 linears multiply in the model's dtype"
        if self.activations:
            text += f"; {len(self.fused_activations)} of {len(self.activations)} SiluAndMul layers fused"
        return text

    def log(self) -> None:
        """Log the line at INFO, and what became of each layer, and why, at DEBUG."""
        logger.info("%s", self)
        for kind, layers in (("RMSNorm", self.norms), ("SiluAndMul", self.activations)):
            for layer in layers:
                if layer.reason:
                    logger.debug("%s %s: stock, because %s", kind, layer.name, layer.reason)
                else:
                    logger.debug("%s %s: fused, feeds %s", kind, layer.name, ", ".join(layer.linears))
