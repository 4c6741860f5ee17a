"""Our simulator under the name of AWS's package, where the tests say that the SDK is installed."""

import sys

from vllm_neuron_rmsq.kernels.nki.simulator import nki

sys.modules["nki"] = nki
sys.modules.update({f"nki.{name}": getattr(nki, name) for name in ("isa", "language", "typing")})
