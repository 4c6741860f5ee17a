"""How the kernels get into a serving engine: one package for each, and the question which one to take."""

from __future__ import annotations


def on_neuron() -> bool:
    """Return whether vLLM runs on vLLM Neuron's platform, which has models of its own.

    Told by where the platform's class is defined: in its CPU mode vLLM Neuron's device type is ``cpu`` too.
    """
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False  # vllm.versions names what is missing
    return type(current_platform).__module__.startswith("vllm_neuron.")
