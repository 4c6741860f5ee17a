"""Gathering packed rows: what is refused, and 2 and 4 processes over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gather_ranks
import pytest
import torch

from vllm_neuron_rmsq import ops
from vllm_neuron_rmsq.distributed import gather_packed

H = 60


class Three:
    """A group of three processes that all have the same rows, as vLLM's coordinators are called."""

    def __init__(self):
        self.sent = []

    def all_gather(self, tensor, dim):
        self.sent.append((tensor.dtype, tensor.nbytes))
        return torch.cat([tensor] * 3, dim)


@pytest.fixture
def rows():
    return ops.rms_norm_quant(torch.randn(2, 5, H), torch.ones(H))


@pytest.mark.parametrize("dim", [0, 1, -2, -3])
@pytest.mark.parametrize("wire", [torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_bytes_are_carried_as_they_are(rows, dim, wire):
    group = Three()
    got = gather_packed(rows, group, dim, wire=wire)
    assert torch.equal(got, torch.cat([rows] * 3, dim))
    assert group.sent == [(wire, 2 * 5 * (H + 4))]


@pytest.mark.parametrize("dim", [2, -1, 3, -4])
def test_a_row_is_not_divided(rows, dim):
    with pytest.raises(ValueError, match=rf"dim: expected .* -3 to -2 or 0 to 1, got {dim} "):
        gather_packed(rows, Three(), dim)


def test_what_is_no_packed_tensor_is_refused(rows):
    with pytest.raises(ValueError, match="packed: expected dtype"):
        gather_packed(rows.float(), Three())
    with pytest.raises(ValueError, match=r"wire: 63 bytes a row .* no whole number of torch\.int32"):
        gather_packed(rows[..., 1:], Three(), wire=torch.int32)


@pytest.mark.engine
def test_four_processes_get_what_quantizing_after_the_gather_gives_for_half_the_bytes(tmp_path):
    world = 4
    script = Path(gather_ranks.__file__)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    results = [result for process in ranks for result in json.loads(process.communicate(timeout=120)[0])]
    # Groups of 2 and of 4, along the first dimension and along the second.
    assert sorted(r["processes"] for r in results) == [2] * 4 + [4] * 8
    h = gather_ranks.H
    for result in results:
        assert result["equal"]
        # gloo's own messages, the barrier's among them, come on top.
        own = 2000 * result["processes"]
        assert result["tokens"] * (h + 4) <= result["packed"] <= result["tokens"] * (h + 4) + own
        assert result["tokens"] * 2 * h <= result["plain"] <= result["tokens"] * 2 * h + own
