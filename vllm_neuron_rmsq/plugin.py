"""What ``register()`` does: which platform vLLM runs on, then one integration. Safe to call again."""

from __future__ import annotations

from vllm_neuron_rmsq import integrations, settings
from vllm_neuron_rmsq.integrations import metrics


def register() -> None:
    """Check the settings and apply the integration for vLLM's platform.

    The environment's settings are read first, so that a misspelt one stops vLLM at once. Then
    ``integrations.vllm_neuron`` is applied on vLLM Neuron, which builds models of its own, and
    ``integrations.vllm`` on every other platform; nothing of the other one is imported.

    With ``VLLM_RMSQ_BACKEND=off`` the same is registered and stays inert, since ``--additional-config``
    is only known later and wins.

    Raises:
        ValueError: a setting is unknown or has a value that is not valid.
    """
    settings.Settings.load()
    metrics.collect()
    if integrations.on_neuron():
        from vllm_neuron_rmsq.integrations import vllm_neuron

        vllm_neuron.apply()
    else:
        from vllm_neuron_rmsq.integrations import vllm

        vllm.apply()
