"""Groups of the components. Component data parallelism is not in this stand-in: all are the TP group, or
one."""

from __future__ import annotations

from vllm.distributed.parallel_state import get_tp_group


class _Alone:
    """A group of one rank."""

    world_size, rank_in_group, device_group = 1, 0, None


_ALONE = _Alone()


def get_neuron_attention_tp_group():
    return get_tp_group()


get_neuron_mlp_tp_group = get_neuron_embedding_tp_group = get_neuron_attention_tp_group
get_neuron_lm_head_tp_group = get_neuron_attention_tp_group


def get_neuron_attention_dp_group():
    return _ALONE


get_neuron_mlp_dp_group = get_neuron_embedding_dp_group = get_neuron_attention_dp_group
get_neuron_lm_head_dp_group = get_neuron_attention_dp_group


def get_neuron_attention_dp_rank() -> int:
    return 0
