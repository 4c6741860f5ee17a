"""The packed format: bytes where they belong, views where possible, clear refusals."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_neuron_rmsq import packed as fmt


def random_rows(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes without NaN of ``shape`` and scales of ``shape[:-1] + (1,)``."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 0x7F, shape, dtype=torch.uint8, generator=generator)
    return codes, torch.rand(*shape[:-1], 1, generator=generator) + 0.5


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3).flatmap(
    lambda lead: st.integers(1, 70).map(lambda width: (*lead, width))
)


@given(shape=shapes, seed=st.integers(0, 1000))
def test_unpack_returns_what_was_packed(shape, seed):
    codes, scale = random_rows(*shape, seed=seed)
    packed = fmt.pack(codes, scale)
    assert packed.shape == (*shape[:-1], shape[-1] + 4)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    codes_back, scale_back = fmt.unpack(packed)
    assert torch.equal(codes_back, codes)
    assert torch.equal(scale_back, scale)


def test_bytes_are_codes_then_little_endian_scale():
    packed = fmt.pack(torch.tensor([[1, 2, 0xFE]], dtype=torch.uint8), torch.tensor([0.1]))
    assert bytes(packed[0].tolist()) == bytes([1, 2, 0xFE]) + struct.pack("<f", 0.1)


def test_one_scale_expanded_to_one_row_is_packed():
    packed = fmt.pack(torch.zeros(1, 8, dtype=torch.uint8), torch.tensor(0.5).expand(1, 1))
    assert fmt.unpack(packed)[1].item() == 0.5


def test_float8_codes_are_taken_by_their_bytes():
    codes, scale = random_rows(3, 8)
    assert torch.equal(fmt.pack(codes.view(torch.float8_e4m3fn), scale), fmt.pack(codes, scale))


@pytest.mark.parametrize("width", [4, 64, 576])
def test_aligned_rows_are_unpacked_without_a_copy(width):
    packed = fmt.pack(*random_rows(5, width))
    codes, scale = fmt.unpack(packed)
    assert codes.data_ptr() == packed.data_ptr()
    assert scale.data_ptr() == packed.data_ptr() + width


@pytest.mark.parametrize(
    "take",
    [
        pytest.param(lambda p: p[1:], id="an odd number of bytes in"),
        pytest.param(lambda p: p[::2], id="rows with a gap"),
        pytest.param(lambda p: p.t().contiguous().t(), id="transposed memory"),
        pytest.param(lambda p: p[None].expand(2, -1, -1), id="expanded"),
        pytest.param(lambda p: p[:0], id="no rows"),
    ],
)
@pytest.mark.parametrize("width", [6, 7, 8])
def test_any_layout_unpacks_to_the_same_numbers(take, width):
    packed = take(fmt.pack(*random_rows(6, width)))
    codes, scale = fmt.unpack(packed)
    copy = packed.clone(memory_format=torch.contiguous_format)
    assert torch.equal(codes, copy[..., :-4])
    expected = [struct.unpack("<f", bytes(row[-4:]))[0] for row in copy.reshape(-1, copy.shape[-1]).tolist()]
    assert torch.equal(scale.reshape(-1), torch.tensor(expected))


def test_dequantize_is_value_times_scale():
    values = torch.tensor([[0.0, 1.0, -240.0, 448.0, 0.001953125]])
    packed = fmt.pack(values.to(torch.float8_e4m3fn), torch.tensor([[0.25]]))
    assert torch.equal(fmt.dequantize(packed), values * 0.25)
    assert fmt.dequantize(packed, torch.bfloat16).dtype == torch.bfloat16


def test_a_nan_scale_makes_its_row_nan_and_no_other():
    codes, scale = random_rows(3, 8)
    scale[1] = math.nan
    values = fmt.dequantize(fmt.pack(codes, scale))
    assert values.isnan().any(dim=1).tolist() == [False, True, False]
    assert values[1].isnan().all()


def test_codes_within_240_mean_the_same_in_both_formats():
    """float8_e4m3 keeps exponent 15 for Inf and NaN: the codes of trn2 must all lie below it."""
    codes = torch.arange(256, dtype=torch.uint8)
    within = codes.view(torch.float8_e4m3fn).float().abs() <= 240
    assert torch.equal(within, (codes & 0x78) != 0x78)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fmt.check(torch.zeros(2, 8)), r"packed: expected dtype torch.uint8, got torch.float32"),
        (
            lambda: fmt.check(torch.zeros(2, 4, dtype=torch.uint8)),
            r"packed: expected shape \[..., H \+ 4\] with H >= 1, got \[2, 4\]",
        ),
        (
            lambda: fmt.check(torch.zeros(2, 8, dtype=torch.uint8), 8),
            r"packed: expected last dimension 12 \(H = 8 codes and a 4-byte scale\), got 8",
        ),
        (lambda: fmt.unpack(torch.zeros((), dtype=torch.uint8)), r"packed: expected shape .* got \[\]"),
        (lambda: fmt.dequantize(torch.zeros(2, 8, dtype=torch.int8)), r"packed: .* got torch.int8"),
        (
            lambda: fmt.pack(torch.zeros(2, 8), torch.ones(2)),
            r"codes: expected dtype torch.uint8 or torch.float8_e4m3fn, got torch.float32",
        ),
        (
            lambda: fmt.pack(torch.zeros(2, 0, dtype=torch.uint8), torch.ones(2)),
            r"codes: expected shape \[..., H\] with H >= 1, got \[2, 0\]",
        ),
        (
            lambda: fmt.pack(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, dtype=torch.float64)),
            r"scale: expected dtype torch.float32, got torch.float64",
        ),
        (
            lambda: fmt.pack(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(3)),
            r"scale: expected shape \[2, 1\] or \[2\], got \[3\]",
        ),
    ],
)
def test_what_is_not_packed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
