"""One process of several that gather packed rows: ``python gather_ranks.py RANK WORLD FOLDER``.

Prints one JSON object: for groups of 2 and of all processes, whether gathering packed rows gave what
gathering first and quantizing then gives, and how many bytes this process received for each.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import stat
import struct
import sys
from pathlib import Path

import torch
from torch import distributed

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq.distributed import gather_packed

H = 1024
ROWS = 96  # a process's tokens
TCP_INFO_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in struct tcp_info of Linux


def received() -> int:
    """Bytes that this process's own TCP connections have received since they were made."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        descriptor = int(entry.name)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (
                    socket.AF_INET,
                    socket.AF_INET6,
                ):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, TCP_INFO_BYTES_RECEIVED)[0]
        except OSError:  # closed meanwhile
            continue
    return total


def compare(group, ranks: list[int], dim: int, rows: tuple[int, ...]) -> dict:
    """Gather this rank's part of ``rows`` tokens both ways."""
    generator = torch.Generator().manual_seed(0)
    size = (*rows[:dim], rows[dim] * len(ranks), *rows[dim + 1 :], H)
    everything = torch.randn(size, generator=generator).bfloat16()
    gamma = torch.rand(H, generator=generator) + 0.5
    mine = everything.chunk(len(ranks), dim)[ranks.index(distributed.get_rank())].contiguous()

    before = received()
    got = gather_packed(ops.rms_norm_quant(mine, gamma), group, dim)
    distributed.barrier(group)
    packed_bytes = received() - before

    before = received()
    parts = [torch.empty_like(mine) for _ in ranks]
    distributed.all_gather(parts, mine, group)
    distributed.barrier(group)
    plain_bytes = received() - before
    hidden = torch.cat(parts, dim)
    assert torch.equal(hidden, everything)
    return {
        "processes": len(ranks),
        "equal": torch.equal(got, ops.rms_norm_quant(hidden, gamma)),
        "packed": packed_bytes,
        "plain": plain_bytes,
        "tokens": mine.numel() // H * (len(ranks) - 1),
    }


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    groups = [(ranks, distributed.new_group(ranks)) for ranks in ([0, 1], list(range(world)))]
    shapes = [((ROWS,), 0), ((2, ROWS // 2), 1)]
    results = []
    for (ranks, group), (rows, dim) in itertools.product(groups, shapes):
        if rank in ranks:
            compare(group, ranks, dim, rows)  # opens the connections
            results.append(compare(group, ranks, dim, rows))
    distributed.barrier()
    distributed.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
