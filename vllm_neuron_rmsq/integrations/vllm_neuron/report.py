"""What was done to a model, in one line."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_neuron_rmsq import __version__
from vllm_neuron_rmsq.integrations.vllm_neuron import versions

if TYPE_CHECKING:
    from vllm_neuron_rmsq.integrations.vllm_neuron.llama import RowFp8LlamaForCausalLM

logger = logging.getLogger(f"vllm.{__name__}")


@dataclass(frozen=True)
class Report:
    """What the start-up line says.

    Attributes:
        neuron: version of vLLM Neuron.
        backend: who computes.
        cores: NeuronCores a kernel runs on (LNC); ``None`` where there are none.
        target: range of codes.
        attention: stage.
        gather: what prefill's all-gather carries; ``None`` on one rank.
        norms: decoder norms.
        fused: decoder norms that add, normalize and quantize in one kernel.
        linears: decoder linears in the checkpoint.
        fp8: those multiplied in FP8, in prefill.
        fp8_decode: those multiplied in FP8, in decode.
        halved: FP8 linears of this rank whose codes had to be halved; ``None`` where no weight was read.
        weight_bytes: of all parameters of this rank.
    """

    neuron: str
    backend: str
    cores: int | None
    target: str
    attention: str
    gather: str | None
    norms: int
    fused: int
    linears: int
    fp8: int
    fp8_decode: int
    halved: int | None
    weight_bytes: int

    @classmethod
    def of(cls, model: RowFp8LlamaForCausalLM, read: bool = True) -> Report:
        """Look through a model.

        Args:
            read: its weights were.
        """
        from vllm_neuron_rmsq.integrations.vllm_neuron.weights import RowFp8Linear

        plan, layers = model.plan, len(model.model.layers)
        fused = 2 if plan.attention != "bf16" else 1
        found = [module for module in model.modules() if isinstance(module, RowFp8Linear)]
        return cls(
            neuron=versions.installed(),
            backend=plan.kernels.backend,
            cores=plan.kernels.cores if plan.kernels.backend == "nki" else None,
            target=plan.target.name,
            attention=plan.attention,
            gather=plan.gather if model.world_size > 1 else None,
            norms=2 * layers,
            fused=fused * layers if plan.fuse else 0,
            linears=7 * layers,
            fp8=sum(len(linear.source.parts) for linear in found),
            fp8_decode={"bf16": 3, "fp8-prefill": 4, "fp8": 7}[plan.attention] * layers,
            halved=sum(sum(linear.source.halved.values()) for linear in found) if read else None,
            weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        )

    def __str__(self) -> str:
        lnc = "" if self.cores is None else f", LNC {self.cores}"
        decode = "" if self.fp8 == self.fp8_decode else f" ({self.fp8_decode} in decode)"
        gather = "" if self.gather is None else f", gathering {self.gather}"
        halved = "no weights read" if self.halved is None else f"{self.halved} linears halved"
        return (
            f"vllm-neuron-rmsq {__version__} on vLLM Neuron {self.neuron}: {self.fused} of {self.norms} "
            f"decoder norms fused, {self.fp8} of {self.linears} linears in row FP8{decode}, "
            f"attention {self.attention}, backend {self.backend}{lnc}, target {self.target} "
            f"({halved}){gather}, {self.weight_bytes / 2**20:,.1f} MiB of weights a rank"
        )

    def log(self, rank: int) -> None:
        """Write the line, once for all ranks."""
        if rank == 0:
            logger.info("%s", self)
