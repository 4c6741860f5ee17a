"""``ops.rms_norm_quant`` on backend ``torch``: the reference's numbers, registration, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_inputs import DTYPES, GAMMA, HIDDEN, rows

from vllm_neuron_rmsq import ops, reference
from vllm_neuron_rmsq.target import TARGETS

OPS = torch.ops.neuron_rmsq


@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (0, 64), (2, 3, 36)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("static_scale", [None, 0.05])
def test_norm_ops_compute_the_reference(shape, dtype, weight, static_scale):
    hidden, residual = rows(*shape, dtype=dtype), rows(*shape, dtype=dtype, seed=1)
    gamma = rows(shape[-1], dtype=dtype, seed=2) if weight else None
    for target in TARGETS:
        keywords: dict[str, Any] = {"static_scale": static_scale, "lower_bound": 1.5, "target": target}
        alone = ops.rms_norm_quant(hidden, gamma, backend="torch", **keywords)
        assert torch.equal(alone, reference.rms_norm_quant(hidden, gamma, **keywords))
        keywords["residual"] = residual
        for got, expected in zip(
            ops.rms_norm_quant(hidden, gamma, backend="torch", **keywords),
            reference.rms_norm_quant(hidden, gamma, **keywords),
            strict=True,
        ):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("rms_norm_quant", (HIDDEN, GAMMA, 1e-6, 0.0, None, 240.0)),
        ("rms_norm_quant", (HIDDEN.bfloat16(), None, 1e-6, 2.0, None, 448.0)),
        ("rms_norm_quant", (HIDDEN[:0], GAMMA, 1e-6, 0.0, torch.ones(1), 240.0)),
        ("rms_norm_quant", (rows(2, 3, 7), None, 1e-6, 0.0, torch.ones(1), 240.0)),
        ("add_rms_norm_quant", (HIDDEN, GAMMA, 1e-6, HIDDEN, 0.0, None, 240.0)),
        ("add_rms_norm_quant", (HIDDEN.half(), None, 1e-6, HIDDEN.half(), 0.0, torch.ones(1), 448.0)),
        ("add_rms_norm_quant", (HIDDEN.t(), None, 1e-6, HIDDEN.t(), 0.0, None, 240.0)),
    ],
)
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(OPS, op).torch, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": rows(16)}, r"hidden: expected rank >= 2"),
        ({"weight": rows(8)}, r"weight: expected shape \[16\]"),
        ({"residual": rows(3, 8)}, r"residual: expected shape \[3, 16\]"),
        ({"eps": -1.0}, r"eps: expected a finite number >= 0"),
        ({"lower_bound": math.nan}, r"lower_bound: expected a finite number >= 0"),
        ({"static_scale": 0.0}, r"static_scale: expected a finite number > 0"),
        ({"static_scale": torch.ones(1, device="meta")}, r"static_scale: expected device cpu .*, got meta"),
        ({"target": "trn4"}, r"target: expected one of trn2, trn3; got 'trn4'"),
    ],
)
def test_bad_norm_arguments_are_named(change, message):
    arguments: dict[str, Any] = {"hidden": HIDDEN, "weight": GAMMA, "backend": "torch"}
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.rms_norm_quant(**arguments | change)
