"""Registration and loading as the real worker and its model runner do them, and steps for tests to drive."""

from __future__ import annotations

import torch
from vllm.config import set_current_vllm_config

from vllm_neuron import envs
from vllm_neuron.model.neuron_config import NeuronConfig
from vllm_neuron.utils.dtype_utils import QUANTIZED_KV_CACHE_DTYPES


class NeuronWorker:
    def __init__(
        self, vllm_config, local_rank=0, rank=0, distributed_init_method=None, is_driver_worker=True
    ):
        self.vllm_config = vllm_config
        self.rank = rank
        from vllm import ModelRegistry

        from vllm_neuron.model import registry

        for architecture, model_cls in registry.get_models():
            ModelRegistry.register_model(architecture, model_cls)

    def load_model(self) -> None:
        from vllm import ModelRegistry

        config = self.vllm_config
        neuron_config = NeuronConfig(**config.additional_config.get("neuron_config", {}))
        with set_current_vllm_config(config):
            model_cls, _ = ModelRegistry.resolve_model_cls(
                config.model_config.architecture, model_config=config.model_config
            )
            with torch.device("meta"):
                self.model = model_cls.from_configs(config.model_config.hf_config, neuron_config)
            device = torch.device("cpu")
            if envs.VLLM_NEURON_CPU_COMPILE:
                self.model.load_weights_lite(config.model_config.model, device, None)
                device = torch.device("meta")
            else:
                self.model.load_weights(config.model_config.model, device, None)
            self.model = self.model.to(device)
        self.device = device
        self.aux: list[torch.Tensor] = []  # Eagle3's hidden states, of every step
        # What the real runner gets from torch.compile; tests that look at graphs put theirs here.
        self.call = self.model

    def bind_cache(self, batch: int, block_size: int, max_blocks: int) -> None:
        """Paged caches for ``batch`` sequences, blocks in descending order, one more for nobody's tokens."""
        self.block_size, self.max_blocks = block_size, max_blocks
        quantized = self.vllm_config.cache_config.cache_dtype in QUANTIZED_KV_CACHE_DTYPES
        blocks = batch * max_blocks + 1
        order = torch.arange(batch * max_blocks - 1, -1, -1, dtype=torch.int32)
        self.table = order.view(batch, max_blocks)
        self.model.bind_kv_cache(
            {
                layer.name: [
                    torch.zeros(
                        blocks,
                        layer.num_kv_heads,
                        block_size,
                        layer.head_size,
                        dtype=torch.float8_e4m3fn if quantized else layer.dtype,
                        device=self.device,
                    )
                    for _ in range(2)
                ]
                for layer in self.model.get_kv_spec().layers
            }
        )

    def slots(self, sequence: int, positions: torch.Tensor) -> torch.Tensor:
        blocks = self.table[sequence][(positions // self.block_size).long()]
        return (blocks * self.block_size + positions % self.block_size).to(torch.int32)

    def _step(self, tokens, positions, slots, table, rows, **more):
        to = self.device
        md = {
            "max_query_len": rows,
            "decode_token_threshold": 4,
            "slot_mapping": slots.to(to),
            "block_size": self.block_size,
            "block_table_tensor": table.to(to),
            "max_blocks_per_seq": self.max_blocks,
            **more,
        }
        metadata = {layer.name: md for layer in self.model.get_kv_spec().layers}
        out = self.call(
            input_ids=tokens.to(to),
            positions=positions.to(to),
            attn_metadata=metadata,
            sampling_positions=torch.arange(len(tokens), dtype=torch.int32, device=to),
            rank=torch.tensor(self.rank, dtype=torch.int32, device=to),
        )
        if isinstance(out, tuple):
            out, states = out
            self.aux.append(states)
        return out

    def prefill(self, sequence: int, tokens: list[int], *, start=0, bucket=None, segment=None):
        """Logits ``[len(tokens), V]`` of the tokens from position ``start`` on; ``segment`` reads the cache,
        which holds the positions before. ``bucket`` pads, with slots that are nobody's."""
        missing = (bucket or len(tokens)) - len(tokens)
        ids = torch.tensor(tokens + [0] * missing, dtype=torch.int32)
        positions = start + torch.arange(len(ids), dtype=torch.int32)
        slots = torch.full((len(ids),), -1, dtype=torch.int32)
        slots[: len(tokens)] = self.slots(sequence, positions[: len(tokens)])
        more = {}
        if segment:
            more = {"kv_segment_size": segment, "cached_seq_len": torch.tensor([[start]], dtype=torch.int32)}
        table = self.table[sequence : sequence + 1]
        return self._step(ids, positions, slots, table, len(ids), **more)[: len(tokens)]

    def decode(self, tokens: list[list[int]], positions: list[int]):
        """Logits ``[B * S, V]`` of S new tokens of each sequence, the first of them at its position."""
        ids = torch.tensor(tokens, dtype=torch.int32)
        where = torch.tensor(positions, dtype=torch.int32)[:, None] + torch.arange(
            ids.shape[1], dtype=torch.int32
        )
        slots = torch.cat([self.slots(i, row) for i, row in enumerate(where)])
        return self._step(ids.view(-1), where.view(-1), slots, self.table[: len(ids)], ids.shape[1])
