"""Dynamic activations, one scale per token; weights with one scale per output channel or per tensor.

What most published FP8 checkpoints are ("FP8-dynamic"): compressed-tensors, ``fp8``, ModelOpt, Quark, FBGEMM.
A row is a packed row, ``[..., H + 4]`` uint8: H codes and their scale (:mod:`vllm_neuron_rmsq.packed`).
"""

from __future__ import annotations

from vllm_neuron_rmsq.integrations.vllm.activation import PACKED_KEY, PackedActivation
from vllm_neuron_rmsq.integrations.vllm.schemes.base import Scheme
from vllm_neuron_rmsq.integrations.vllm.versions import (
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    kFp8StaticTokenSym,
)

SCHEME = Scheme(
    name="per-token",
    # Dynamic per-tensor activations are computed per token, which is finer, as vLLM itself does on CUDA.
    activation_keys=(kFp8DynamicTokenSym, kFp8DynamicTensorSym),
    activations="dynamic per-token or per-tensor",
    # ModelOpt and FBGEMM call the scale of an output channel a token's.
    weight_keys=(kFp8StaticChannelSym, kFp8StaticTokenSym, kFp8StaticTensorSym),
    weights="per-channel or per-tensor",
    rows=PACKED_KEY,
    wrap=PackedActivation.of,
)
