"""Environment variables, read when asked for."""

import os

_FLAGS = ("VLLM_NEURON_CPU_MODE", "VLLM_NEURON_CPU_COMPILE", "VLLM_NEURON_DISABLE_NKI_KERNELS")


def __getattr__(name: str) -> bool:
    if name in _FLAGS:
        return os.environ.get(name) == "1"
    raise AttributeError(name)
