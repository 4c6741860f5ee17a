"""From settings and configuration to a plan for the model, or the reason why there is none."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group

from vllm_neuron_rmsq import settings, target
from vllm_neuron_rmsq.integrations.vllm_neuron import checkpoint, functional
from vllm_neuron_rmsq.integrations.vllm_neuron.llama import Plan
from vllm_neuron_rmsq.settings import Settings


def in_force() -> Settings:
    """Return the settings of vLLM's current configuration."""
    extra = get_current_vllm_config().additional_config
    return Settings.load(additional_config=extra if isinstance(extra, dict) else None)


def make_plan(hf_config: Any, neuron_config: Any) -> Plan:
    """Return how to build the model, and put the settings in force.

    Raises:
        ValueError: it cannot be served like this; says why and what to do.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    vllm_config, choice = get_current_vllm_config(), in_force()
    settings.install(choice)
    reason = checkpoint.supported(hf_config) or _conflict(choice, vllm_config, hf_config, neuron_config)
    if reason:
        raise ValueError(f"vllm-neuron-rmsq: {vllm_config.model_config.model} cannot be served: {reason}")
    dtype = vllm_config.model_config.dtype
    codes = target.get(choice.target)
    plan = Plan(
        kernels=functional.kernels(functional.serving(choice.backend), codes, dtype),
        target=codes,
        attention=choice.attention,
        gather=choice.gather,
        fuse=choice.fuse,
        attention_bias=bool(checkpoint.get(hf_config, "attention_bias")),
        mlp_bias=bool(checkpoint.get(hf_config, "mlp_bias")),
    )
    _check_limits(plan, vllm_config, hf_config)
    return plan


def _conflict(choice: Settings, vllm_config: Any, hf_config: Any, neuron_config: Any) -> str | None:
    """Why what was asked for does not go together."""
    if vllm_config.lora_config is not None:
        return "LoRA is not applied to FP8 weights; serve without --enable-lora"
    for name in ("attention_dp_size", "mlp_dp_size"):
        if getattr(neuron_config, name, 1) > 1:
            return f"neuron_config.{name} = {getattr(neuron_config, name)}; expected 1"
    dcp = getattr(vllm_config.parallel_config, "decode_context_parallel_size", 1)
    if dcp > 1 and choice.attention != "bf16":
        return (
            f"attention={choice.attention} knows no decode context parallelism (it is {dcp}); set "
            "VLLM_RMSQ_ATTENTION=bf16, the stock attention"
        )
    if dcp > 1 and checkpoint.get(hf_config, "attention_bias"):
        return "attention with biases knows no decode context parallelism"
    if choice.strict and not choice.fuse:
        return "VLLM_RMSQ_STRICT=1 and VLLM_RMSQ_FUSE=0: no norm would be fused"
    hidden = checkpoint.get(hf_config, "hidden_size")
    if choice.gather == "int32" and hidden % 4:
        return f"gather=int32 needs a hidden size that is a multiple of 4, and it is {hidden}"
    return None


def _check_limits(plan: Plan, vllm_config: Any, hf_config: Any) -> None:
    """Compare the model's widths on one rank with the kernels'.

    Raises:
        ValueError: one is too wide; says for how many ranks it would not be.
    """
    ranks = get_tp_group().world_size
    heads = checkpoint.get(hf_config, "num_attention_heads")
    hidden = checkpoint.get(hf_config, "hidden_size")
    head = checkpoint.get(hf_config, "head_dim") or hidden // heads
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    limits = functional.limits(plan.kernels.backend)
    widths = [
        ("hidden size", hidden, limits.norm, None),
        ("intermediate size of a rank", checkpoint.get(hf_config, "intermediate_size"), limits.silu, ranks),
    ]
    if plan.attention != "bf16":
        widths.append(("attention heads of a rank", heads * head, limits.norm, ranks))
    for what, width, limit, shared in widths:
        own = width // (shared or 1)
        if own > limit:
            remedy = f"; set --tensor-parallel-size {-(-width // limit)} or more" if shared else ""
            raise ValueError(
                f"vllm-neuron-rmsq: {what}: the kernels take {limit} at most, and it is {own}{remedy}"
            )
    if tokens > limits.rows:
        raise ValueError(
            f"vllm-neuron-rmsq: --max-num-batched-tokens: the kernels take {limits.rows} at most, and it is "
            f"{tokens}"
        )
