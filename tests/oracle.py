"""Assertions against the float64 oracle, :mod:`vllm_neuron_rmsq.oracle`, whose names tests find here too."""

from __future__ import annotations

import numpy as np
import torch

from vllm_neuron_rmsq.oracle import (
    BOUNDARIES,
    FP8_MAX,
    SCALE_RTOL,
    TIE_RTOL,
    VALUES,
    Expected,
    from_fp8,
    ordinal,
    packed_fp8_linear,
    rms_norm_quant,
    silu_mul_quant,
    to_fp8,
)

__all__ = [
    "BOUNDARIES",
    "FP8_MAX",
    "SCALE_RTOL",
    "TIE_RTOL",
    "VALUES",
    "Expected",
    "assert_codes",
    "assert_packed",
    "from_fp8",
    "packed_fp8_linear",
    "rms_norm_quant",
    "silu_mul_quant",
    "to_fp8",
]


def assert_codes(codes: np.ndarray, expected: Expected) -> int:
    """Codes are the expected ones, but for values at a rounding boundary, which may go one step either way.

    Args:
        codes: ``[T, H]`` uint8.

    Returns:
        How many went the other way.
    """
    exact = to_fp8(expected.scaled)
    differ = (codes != exact) & ((codes | exact) & 0x7F != 0)  # the sign of a zero does not count
    if differ.any():
        got, want, value = codes[differ], exact[differ], expected.scaled[differ]
        assert not ((got & 0x7F) == 0x7F).any(), "NaN code in a finite row"
        steps = np.abs(ordinal(got) - ordinal(want))
        assert steps.max() <= 1, f"{steps.max()} steps off: {got[steps.argmax()]} for {value[steps.argmax()]}"
        boundary = (from_fp8(got) + from_fp8(want)) / 2
        off = np.abs(value - boundary) / np.abs(boundary)
        assert off.max() <= TIE_RTOL, (
            f"code {got[off.argmax()]:#x} for {value[off.argmax()]}, which is no tie"
        )
    return int(differ.sum())


def assert_packed(packed: torch.Tensor, expected: Expected) -> int:
    """Packed rows ``[..., H + 4]`` are as the contract says; returns how many ties went the other way."""
    rows = packed.reshape(-1, packed.shape[-1]).contiguous().numpy()
    scale = np.ascontiguousarray(rows[:, -4:]).view("<f4").astype(np.float64)
    np.testing.assert_allclose(scale, expected.scale, rtol=SCALE_RTOL, atol=0)
    return assert_codes(rows[:, :-4], expected)
