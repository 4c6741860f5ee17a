"""vLLM's plain communicator, on gloo in these tests."""

import torch
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

WIRE: list[tuple[str, torch.dtype, int]] = []
"""What this rank put on the wire: collective, dtype, bytes of its input. Ours, for tests to read."""


class NeuronDeviceCommunicator(DeviceCommunicatorBase):
    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        WIRE.append(("all_reduce", input_.dtype, input_.nbytes))
        return super().all_reduce(input_)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        WIRE.append(("all_gather", input_.dtype, input_.nbytes))
        if input_.dtype == torch.float8_e4m3fn and not input_.is_meta:  # gloo does not know it
            return super().all_gather(input_.view(torch.uint8), dim).view(input_.dtype)
        return super().all_gather(input_, dim)

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        WIRE.append(("reduce_scatter", input_.dtype, input_.nbytes))
        return super().reduce_scatter(input_, dim)
