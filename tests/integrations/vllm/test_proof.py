"""The proof's stand-in for a layer's output, and the run that finds out who reads it."""

from __future__ import annotations

import pytest
import torch

from vllm_neuron_rmsq.integrations.vllm.proof import OutputProbe


class TestProbe:
    def probe(self):
        reads, opens = [], []
        output = torch.arange(8.0).reshape(2, 4)
        return OutputProbe(output, reads.append, opens.append), output, reads, opens

    def test_metadata_is_free(self):
        probe, output, reads, _ = self.probe()
        assert probe.shape == output.shape and probe.dtype == output.dtype and probe.size(-1) == 4
        assert probe.device == output.device and probe.stride() == output.stride()
        assert reads == []

    @pytest.mark.parametrize(
        "read",
        [
            lambda p: p + 1,
            lambda p: p.view(-1),
            lambda p: p[0],
            lambda p: p.add_(1),
            lambda p: torch.nn.functional.linear(p, torch.ones(3, 4)),
            lambda p: torch.cat([torch.ones(2, 4), p]),
            lambda p: p.bfloat16(),
            lambda p: p.sum().item(),
        ],
    )
    def test_every_operation_is_reported_and_happens(self, read):
        probe, output, reads, _ = self.probe()
        expected = read(output.clone())
        got = read(probe)
        assert reads
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("reach", [torch.Tensor.numpy, torch.Tensor.data_ptr, torch.Tensor.tolist])
    def test_memory_is_out_of_reach(self, reach):
        probe, *_ = self.probe()
        with pytest.raises(RuntimeError):
            reach(probe)

    def test_opening_is_not_reading(self):
        probe, output, reads, opens = self.probe()
        assert probe.open("linear") is output
        assert opens == ["linear"] and reads == []
