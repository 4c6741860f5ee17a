"""Packed rows between processes: what sequence parallelism gathers, H + 4 bytes a token.

Dimensions:
    H: features of a row
    W: processes of the group
    ...: rows (tokens)

In sequence parallelism each process normalizes its own tokens, and all of them are gathered before a linear
that needs every token. Rows are quantized one by one, so quantizing before the gather gives the bytes that
quantizing after it would give, and half as many travel as bf16 has (2 H).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from vllm_neuron_rmsq import packed as fmt


def gather_packed(
    packed: torch.Tensor, group: Any = None, dim: int = 0, *, wire: torch.dtype = torch.uint8
) -> torch.Tensor:
    """Gather every process's packed rows, one process's after the other's.

    Args:
        packed: ``[..., H + 4]`` uint8, of the same shape in every process of the group.
        group: a group of ``torch.distributed`` (``None`` is all processes), or an object whose
            ``all_gather(tensor, dim=...)`` concatenates along ``dim``: vLLM's group coordinators and vLLM
            Neuron's groups have it.
        dim: dimension of the rows that the processes share out among them; not the last one.
        wire: dtype as which the bytes travel, where a transport or a compiler does not carry uint8. The
            result is uint8 whatever it is; H + 4 must be a multiple of its size.

    Returns:
        ``packed`` with ``dim`` W times as long.

    Raises:
        ValueError: ``packed`` is not a packed tensor, ``dim`` is none of its row dimensions, or its rows
            cannot be seen as ``wire``.
    """
    fmt.check(packed)
    rank, width = packed.dim(), packed.shape[-1]
    if not -rank <= dim < rank or dim % rank == rank - 1:
        raise ValueError(
            f"dim: expected a dimension of the rows, {-rank} to -2 or 0 to {rank - 2}, got {dim} for shape "
            f"{list(packed.shape)}; the last dimension is one row, with one scale"
        )
    if width % wire.itemsize:
        raise ValueError(f"wire: {width} bytes a row (H + {fmt.SCALE_BYTES}) are no whole number of {wire}")
    dim %= rank
    rows = packed if wire is torch.uint8 else packed.view(wire)
    if hasattr(group, "all_gather"):
        gathered = group.all_gather(rows, dim=dim)
    else:
        processes = torch.distributed.get_world_size(group)
        gathered = rows.new_empty((processes * rows.shape[0], *rows.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, rows.contiguous(), group)
        if dim:
            gathered = gathered.unflatten(0, (processes, -1)).movedim(0, dim).flatten(dim, dim + 1)
    return gathered if wire is torch.uint8 else gathered.view(torch.uint8)
