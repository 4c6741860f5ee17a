"""Which integration ``register()`` applies."""

from __future__ import annotations

import subprocess
import sys

import pytest

ON_NEURON = """
import sys, types
import vllm.platforms

class NeuronPlatform(vllm.platforms.Platform):
    device_type = "cpu"  # what it says in its CPU mode

NeuronPlatform.__module__ = "vllm_neuron.vllm.platform"
vllm.platforms._current_platform = NeuronPlatform()
applied = []
integration = types.ModuleType("vllm_neuron_rmsq.integrations.vllm_neuron")
integration.apply = lambda: applied.append("vllm_neuron")
sys.modules[integration.__name__] = integration
import vllm_neuron_rmsq
vllm_neuron_rmsq.register()
ours = [name for name in sys.modules if name.split(".")[:3] == ["vllm_neuron_rmsq", "integrations", "vllm"]]
print(applied, ours)
"""


@pytest.mark.engine
def test_on_neuron_its_own_integration_and_nothing_of_the_other():
    run = subprocess.run([sys.executable, "-c", ON_NEURON], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "['vllm_neuron'] []"
