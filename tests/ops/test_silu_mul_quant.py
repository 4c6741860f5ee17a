"""``ops.silu_mul_quant`` on backend ``torch``: the contract, the reference's numbers, and refusals."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, rows

from vllm_neuron_rmsq import ops, packed, reference
from vllm_neuron_rmsq.target import TARGETS


@given(
    lead=st.lists(st.integers(0, 4), max_size=2),
    width=st.integers(1, 70),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    target=st.sampled_from(sorted(TARGETS)),
    power=st.integers(-8, 4),
    static=st.booleans(),
)
def test_the_contract(lead, width, seed, dtype, target, power, static):
    gate_up = (rows(1, *lead, 2 * width, seed=seed) * 2.0**power).to(dtype)
    scale = 0.01 if static else None
    got = ops.silu_mul_quant(gate_up, static_scale=scale, target=target, backend="torch")
    assert got.shape == (*gate_up.shape[:-1], width + (0 if static else 4))
    expected = oracle.silu_mul_quant(gate_up, static_scale=scale, target=target)
    if not gate_up.numel():
        return
    ties = (
        oracle.assert_codes(got.reshape(-1, width).numpy(), expected)
        if static
        else oracle.assert_packed(got, expected)
    )
    assert ties <= 1 + gate_up.numel() / 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static_scale", [None, 0.05])
def test_it_computes_the_reference(dtype, static_scale):
    gate_up = rows(2, 3, 36, dtype=dtype)
    got = ops.silu_mul_quant(gate_up, static_scale=static_scale, backend="torch")
    assert torch.equal(got, reference.silu_mul_quant(gate_up, static_scale=static_scale))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [1, 9])
def test_an_invalid_row_is_marked_and_keeps_to_itself(bad, column):
    gate_up = rows(3, 16)
    clean = reference.silu_mul_quant(gate_up)
    gate_up[1, column] = bad
    codes, scale = packed.unpack(reference.silu_mul_quant(gate_up))
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert (codes[1] == 0).all()
    assert torch.equal(reference.silu_mul_quant(gate_up)[[0, 2]], clean[[0, 2]])
    static = reference.silu_mul_quant(gate_up, static_scale=0.1)
    assert (static[1] == packed.NAN_CODE).all()


def test_large_gates_overflow_nothing():
    gate_up = torch.tensor([[-1e30, -200.0, -0.0, 1e30, 2.0, 3.0, 4.0, 1e-30]])
    codes, scale = packed.unpack(reference.silu_mul_quant(gate_up))
    assert torch.isfinite(scale).all()
    assert (codes[0, :3] & 0x7F == 0).all()


def test_a_row_of_zeros():
    codes, scale = packed.unpack(reference.silu_mul_quant(torch.zeros(2, 8)))
    assert (codes == 0).all() and (scale == 1e-6).all()


@pytest.mark.parametrize("static_scale", [None, torch.ones(1)])
def test_opcheck(static_scale):
    for gate_up in (rows(3, 16), rows(2, 3, 7 * 2).bfloat16(), rows(0, 8)):
        torch.library.opcheck(torch.ops.neuron_rmsq.silu_mul_quant.torch, (gate_up, static_scale, 240.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": rows(16)}, r"gate_up: expected rank >= 2 and an even last dimension, got shape \[16\]"),
        ({"gate_up": rows(2, 7)}, r"gate_up: expected rank >= 2 and an even last dimension, got .*\[2, 7\]"),
        ({"gate_up": rows(2, 8).double()}, r"gate_up: expected dtype torch.bfloat16, .* got torch.float64"),
        ({"static_scale": 0.0}, r"static_scale: expected a finite number > 0"),
        ({"static_scale": torch.ones(2)}, r"static_scale: expected one torch.float32 element"),
        ({"static_scale": torch.ones(1, device="meta")}, r"static_scale: expected device cpu .*, got meta"),
        ({"target": "trn4"}, r"target: expected one of trn2, trn3; got 'trn4'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments: dict[str, Any] = {"gate_up": rows(2, 8), "backend": "torch"}
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.silu_mul_quant(**arguments | change)
