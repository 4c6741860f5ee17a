"""Static activations, one scale for all rows, given by the checkpoint; weights as in the per-token scheme.

compressed-tensors ("FP8"), ``fp8`` with static activations, ModelOpt's FP8, Quark. A row is ``[..., H]``
uint8
codes without a tail: the linear knows their scale.
"""

from __future__ import annotations

from vllm_neuron_rmsq.integrations.vllm.activation import CODES_KEY, CodesActivation
from vllm_neuron_rmsq.integrations.vllm.schemes import per_token
from vllm_neuron_rmsq.integrations.vllm.schemes.base import Scheme
from vllm_neuron_rmsq.integrations.vllm.versions import kFp8StaticTensorSym

SCHEME = Scheme(
    name="static",
    activation_keys=(kFp8StaticTensorSym,),
    activations="static per-tensor",
    weight_keys=per_token.SCHEME.weight_keys,
    weights=per_token.SCHEME.weights,
    rows=CODES_KEY,
    wrap=CodesActivation.of,
    static=True,
)
