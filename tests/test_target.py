"""Targets: two ranges of codes, found by name or by range."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vllm_neuron_rmsq import target
from vllm_neuron_rmsq.target import TARGETS, TRN2, TRN3


def test_ranges():
    assert (TRN2.fp8_max, TRN3.fp8_max) == (240, 448)
    for each in TARGETS.values():
        code = torch.tensor([each.max_code], dtype=torch.uint8)
        assert code.view(torch.float8_e4m3fn).float().item() == each.fp8_max


def test_get():
    assert target.get("trn3") is TRN3
    assert target.get(TRN3) is TRN3
    assert target.get(None) is TRN2
    with pytest.raises(ValueError, match="target: expected one of trn2, trn3; got 'trn1'"):
        target.get("trn1")


def test_of_fp8_max():
    assert target.of_fp8_max(240.0) is TRN2
    assert target.of_fp8_max(448.0) is TRN3
    with pytest.raises(ValueError, match="fp8_max: expected 240 or 448, got 1000"):
        target.of_fp8_max(1000.0)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TRN2.fp8_max = 448.0  # type: ignore[misc]
