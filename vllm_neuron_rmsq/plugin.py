"""What ``register()`` does, step by step. Safe to call again, in any process."""

from __future__ import annotations

from vllm_neuron_rmsq import settings


def register() -> None:
    """Register layer, kernel and loader hook with vLLM.

    1. The environment's settings are read, so that a misspelt one stops vLLM at once, and made known to vLLM.
    2. ``RMSNormQuant`` is registered as the out-of-tree ``RMSNorm``, and its sister as the norm of vLLM's
       Transformers backend: stock until they are bound.
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
        from vllm.model_executor.models.transformers.fusers.rms_norm import TPAwareRMSNorm

        from vllm_neuron_rmsq.layers.rms_norm_quant import RMSNormQuant, TPAwareRMSNormQuant
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
    for in_tree, ours in ((RMSNorm, RMSNormQuant), (TPAwareRMSNorm, TPAwareRMSNormQuant)):
        taken = op_registry_oot.get(in_tree.__name__)
        if taken is None:
            in_tree.register_oot(ours)
            # register_oot names the class after the class; the custom_ops switches go by this name.
            ours.name = "rms_norm"
        elif taken is not ours:
            logger.warning(
                "Another plugin has replaced %s by %s: those norms stay unfused, FP8 linears multiply packed "
                "rows all the same",
                in_tree.__name__,
                taken.__qualname__,
            )
    linear_kernel_order.apply()
    model_loader.apply()
