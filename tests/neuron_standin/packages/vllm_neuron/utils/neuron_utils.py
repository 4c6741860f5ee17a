"""Whether kernels run."""

import os

from vllm_neuron import envs


def can_run_kernel(device="") -> bool:
    if envs.VLLM_NEURON_DISABLE_NKI_KERNELS:
        return False
    if envs.VLLM_NEURON_CPU_MODE:
        return os.environ.get("NKI_SIMULATOR") == "1"
    return str(getattr(device, "device", device)) != "cpu"
