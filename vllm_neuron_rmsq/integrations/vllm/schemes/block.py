"""Dynamic activations; weights with one scale for each block of 128 x 128 (DeepSeek's and Qwen3's way).

``fp8`` with ``weight_block_size``, compressed-tensors, ModelOpt, Quark. These checkpoints mean activations to
have a scale for each 128 features of a row; here it is one for the whole row, in packed rows as in the
per-token scheme. ``docs/schemes.md`` has what that costs.
"""

from __future__ import annotations

from vllm_neuron_rmsq.integrations.vllm.activation import PACKED_KEY, PackedActivation
from vllm_neuron_rmsq.integrations.vllm.schemes.base import Scheme
from vllm_neuron_rmsq.integrations.vllm.versions import kFp8Dynamic128Sym, kFp8Static128BlockSym

SCHEME = Scheme(
    name="block",
    activation_keys=(kFp8Dynamic128Sym,),
    activations="dynamic per-group (1 x 128)",
    weight_keys=(kFp8Static128BlockSym,),
    weights="128 x 128 block",
    rows=PACKED_KEY,
    wrap=PackedActivation.of,
    blocks=True,
)
