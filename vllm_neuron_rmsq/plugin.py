"""What ``register()`` does, step by step. Safe to call again, in any process."""

from __future__ import annotations

from vllm_neuron_rmsq import settings


def register() -> None:
    """Register layer, kernel and loader hook with vLLM.

    1. The environment's settings are read, so that a misspelt one stops vLLM at once, and made known to vLLM.
    2. ``RMSNormQuant`` is registered as the out-of-tree ``RMSNorm``: stock until it is bound.
    3. ``PackedFp8LinearKernel`` is registered as an FP8 linear kernel and put first.
    4. The model loader is patched: it binds norms to linears once the weights are final.

    With ``VLLM_RMSQ_BACKEND=off`` the same is registered and stays inert, since ``--additional-config``
    is only known later and wins.

    Raises:
        ValueError: a setting is unknown or has a value that is not valid.
    """
    settings.Settings.load()

    from vllm.logger import init_logger

    logger = init_logger(f"vllm.{__name__}")
    try:
        from vllm_neuron_rmsq.layers.rms_norm_quant import RMSNormQuant
        from vllm_neuron_rmsq.patches import env_variables, linear_kernel_order, model_loader
    except ImportError as error:
        if not (error.name or "").startswith("vllm."):
            raise
        import vllm

        # An installed plugin must not keep another vLLM from starting.
        logger.warning(
            "vllm-neuron-rmsq is inactive: it needs vLLM 0.32 and this is %s (%s)", vllm.__version__, error
        )
        return
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.layernorm import RMSNorm

    env_variables.apply()
    taken = op_registry_oot.get("RMSNorm")
    if taken is None:
        in_tree_name = RMSNorm.name
        RMSNorm.register_oot(RMSNormQuant)
        # register_oot names the class "RMSNorm"; the custom_ops switches go by the in-tree name.
        RMSNormQuant.name = in_tree_name
    elif taken is not RMSNormQuant:
        logger.warning(
            "Another plugin has replaced RMSNorm by %s: norms stay unfused, FP8 linears multiply packed rows",
            taken.__qualname__,
        )
    linear_kernel_order.apply()
    model_loader.apply()
