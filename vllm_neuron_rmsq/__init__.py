"""vLLM plugin: fused RMSNorm + FP8 quantization on AWS Neuron and CPU, one packed tensor throughout."""

__version__ = "0.1.0"


def register() -> None:
    """Register the plugin with vLLM; the ``vllm.general_plugins`` entry point ``neuron_rmsq``."""
    from vllm_neuron_rmsq.plugin import register as register_plugin

    register_plugin()
