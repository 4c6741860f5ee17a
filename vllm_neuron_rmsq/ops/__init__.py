"""The operations of the packed contract, as ``torch.library`` ops with one overload per backend.

``torch.ops.neuron_rmsq.<op>.<backend>`` is what appears in a compiled graph, so a graph says who computes
it. The functions here check the arguments, choose the backend and call the overload.
"""

from vllm_neuron_rmsq.ops.packed_fp8_linear import (
    PrepackedWeight,
    packed_fp8_linear,
    prepack_fp8_weight,
    unpack_fp8_weight,
)
from vllm_neuron_rmsq.ops.rms_norm_quant import rms_norm_quant
from vllm_neuron_rmsq.ops.silu_mul_quant import silu_mul_quant

__all__ = [
    "PrepackedWeight",
    "packed_fp8_linear",
    "prepack_fp8_weight",
    "rms_norm_quant",
    "silu_mul_quant",
    "unpack_fp8_weight",
]
