"""The ops on backend ``torch``: registration, torch.compile, dispatch, the matmul, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_neuron_rmsq import backends, ops, reference, settings
from vllm_neuron_rmsq import packed as fmt
from vllm_neuron_rmsq.settings import Settings

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = torch.ops.neuron_rmsq


@pytest.fixture(autouse=True)
def fresh_settings():
    yield
    settings.install(None)


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fp8_weight(n: int, h: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, H]`` float8_e4m3fn over its whole range, and ``[N]`` scales."""
    weight = (rows(n, h, seed=seed) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return weight, rows(n, seed=seed + 1).abs() + 0.01


@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (0, 64), (2, 3, 36)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("static_scale", [None, 0.05])
def test_norm_ops_compute_the_reference(shape, dtype, weight, static_scale):
    hidden, residual = rows(*shape, dtype=dtype), rows(*shape, dtype=dtype, seed=1)
    gamma = rows(shape[-1], dtype=dtype, seed=2) if weight else None
    for target in fmt.FP8_MAX:
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


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n=st.integers(1, 70),
    h=st.integers(1, 70),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    per_channel=st.booleans(),
    bias=st.booleans(),
    as_bytes=st.booleans(),
)
def test_matmul_is_that_of_the_dequantized_rows(lead, n, h, seed, dtype, per_channel, bias, as_bytes):
    packed = reference.rms_norm_quant(rows(1, *lead, h, seed=seed), None)[0]
    weight, scale = fp8_weight(n, h, seed)
    scale = scale if per_channel else scale[:1]
    addend = rows(n, seed=seed + 5) if bias else None
    x = fmt.dequantize(packed, torch.float64)
    w = weight.double() * scale.double().reshape(-1, 1)
    expected = x @ w.t() + (addend.double() if bias else 0)
    got = ops.packed_fp8_linear(
        packed,
        weight.view(torch.uint8) if as_bytes else weight,
        scale,
        bias=addend,
        out_dtype=dtype,
        backend="torch",
    )
    assert got.dtype == dtype
    assert got.shape == (*lead, n)
    # The sum is rounded to bf16 before the scales, then to out_dtype: relative to what was added up.
    magnitude = x.abs() @ w.abs().t() + (addend.abs() if bias else 0)
    assert ((got.double() - expected).abs() <= 2.0**-7 * magnitude + 1e-30).all()


def test_matmul_keeps_a_nan_row_to_itself():
    hidden = rows(3, 16)
    hidden[1, 3] = math.nan
    weight, scale = fp8_weight(8, 16)
    packed = ops.rms_norm_quant(hidden, None, backend="torch")
    out = ops.packed_fp8_linear(packed, weight, scale, backend="torch")
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


def test_matmul_of_a_weight_larger_than_a_block():
    """The torch backend converts a wide weight piece by piece; the pieces must join."""
    h = 2048
    n = 2 * (1 << 20) // h + 3
    packed = reference.rms_norm_quant(rows(2, h), None)
    weight, scale = fp8_weight(n, h)
    out = ops.packed_fp8_linear(packed, weight, scale, out_dtype=torch.float32, backend="torch")
    expected = fmt.dequantize(packed) @ (weight.float() * scale[:, None]).t()
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


def test_prepacked_weight_computes_the_same():
    packed = reference.rms_norm_quant(rows(4, 32), None)
    weight, scale = fp8_weight(24, 32)
    prepacked = ops.prepack_fp8_weight(weight, scale, backend="torch")
    assert (prepacked.out_features, prepacked.in_features, prepacked.backend) == (24, 32, "torch")
    assert prepacked.data.data_ptr() == weight.data_ptr(), (
        "torch reads the checkpoint's layout: no second copy"
    )
    assert torch.equal(
        ops.packed_fp8_linear(packed, prepacked, scale),
        ops.packed_fp8_linear(packed, weight, scale, backend="torch"),
    )


HIDDEN, GAMMA = rows(3, 16), rows(16, seed=3)
WEIGHT, SCALE = fp8_weight(8, 16)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("rms_norm_quant", (HIDDEN, GAMMA, None, 1e-6, 0.0, 240.0)),
        ("rms_norm_quant", (HIDDEN.bfloat16(), None, None, 1e-6, 2.0, 448.0)),
        ("rms_norm_quant", (HIDDEN[:0], GAMMA, torch.ones(1), 1e-6, 0.0, 240.0)),
        ("rms_norm_quant", (rows(2, 3, 7), None, torch.ones(1), 1e-6, 0.0, 240.0)),
        ("add_rms_norm_quant", (HIDDEN, HIDDEN, GAMMA, None, 1e-6, 0.0, 240.0)),
        ("add_rms_norm_quant", (HIDDEN.half(), HIDDEN.half(), None, torch.ones(1), 1e-6, 0.0, 448.0)),
        ("add_rms_norm_quant", (HIDDEN.t(), HIDDEN.t(), None, None, 1e-6, 0.0, 240.0)),
        (
            "packed_fp8_linear",
            (
                reference.rms_norm_quant(HIDDEN, None),
                WEIGHT.view(torch.uint8),
                SCALE,
                None,
                8,
                torch.bfloat16,
            ),
        ),
        (
            "packed_fp8_linear",
            (
                reference.rms_norm_quant(HIDDEN[None], None),
                WEIGHT.view(torch.uint8),
                SCALE[:1],
                rows(8),
                8,
                torch.float32,
            ),
        ),
    ],
)
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(OPS, op).torch, arguments)


@pytest.mark.parametrize("static_scale", [None, 0.1])
def test_compiles_whole_with_a_dynamic_number_of_rows(static_scale):
    prepacked = ops.prepack_fp8_weight(WEIGHT, SCALE, backend="torch")
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def layer(hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        packed, residual = ops.rms_norm_quant(
            hidden, GAMMA, residual=residual, static_scale=static_scale, backend="torch"
        )
        if static_scale is not None:
            return packed, residual
        return ops.packed_fp8_linear(packed, prepacked, SCALE), residual

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=record)
    for tokens in (2, 5, 33):
        hidden, residual = rows(tokens, 16, seed=tokens), rows(tokens, 16, seed=99)
        for got, expected in zip(compiled(hidden, residual), layer(hidden, residual), strict=True):
            assert torch.equal(got, expected)
    assert len(graphs) == 1, "one graph must serve every number of rows"
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("add_rms_norm_quant.torch" in target for target in targets), targets


def test_inductor_agrees_with_eager():
    def layer(hidden: torch.Tensor) -> torch.Tensor:
        packed = ops.rms_norm_quant(hidden * 2, GAMMA, backend="torch")
        return ops.packed_fp8_linear(packed, WEIGHT, SCALE, backend="torch") + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (3, 8):
        hidden = rows(tokens, 16, seed=tokens)
        torch.testing.assert_close(compiled(hidden), layer(hidden))


def test_target_and_backend_come_from_the_settings():
    settings.install(Settings(backend="torch", target="trn3"))
    expected = reference.rms_norm_quant(HIDDEN, GAMMA, target="trn3")
    assert torch.equal(ops.rms_norm_quant(HIDDEN, GAMMA), expected)
    assert ops.prepack_fp8_weight(WEIGHT, SCALE).backend == "torch"
    assert torch.equal(
        ops.rms_norm_quant(HIDDEN, GAMMA, target="trn2"),
        reference.rms_norm_quant(HIDDEN, GAMMA, target="trn2"),
    )


def test_auto_takes_what_can_run(monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None if name == "torch" else "not today")
    backends.resolve.cache_clear()
    try:
        assert backends.resolve("auto", "cpu") == "torch"
        assert backends.resolve("auto", "cuda") == "torch"
        with pytest.raises(
            backends.BackendUnavailableError, match="backend 'cpu' cannot run here: not today"
        ):
            backends.resolve("cpu", "cpu")
        with pytest.raises(backends.BackendUnavailableError, match="backend 'nki' cannot run here"):
            backends.resolve("auto", "neuron")
    finally:
        backends.resolve.cache_clear()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend: expected one of auto, nki, .*; got 'cup'"):
        ops.rms_norm_quant(HIDDEN, GAMMA, backend="cup")


PACKED = reference.rms_norm_quant(HIDDEN, None)
PREPACKED = ops.prepack_fp8_weight(WEIGHT, SCALE, backend="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": HIDDEN}, r"packed: expected dtype torch.uint8, got torch.float32"),
        ({"packed": PACKED[:, :-1]}, r"packed: expected last dimension 20 .*, got 19"),
        ({"packed": PACKED[:, :4]}, r"packed: expected shape \[..., H \+ 4\] with H >= 1, got \[3, 4\]"),
        ({"weight": WEIGHT[:, :8]}, r"packed: expected last dimension 12 .*, got 20"),
        ({"weight": WEIGHT.float()}, r"weight: expected dtype .*float8_e4m3fn or .*uint8, got torch.float32"),
        ({"weight": WEIGHT[0]}, r"weight: expected shape \[N, H\], got \[16\]"),
        ({"weight": WEIGHT[:0]}, r"weight: expected shape \[N, H\], got \[0, 16\]"),
        ({"weight_scale": SCALE[:3]}, r"weight_scale: expected shape \[8\] or \[1\] .*, got \[3\]"),
        ({"weight_scale": SCALE[:, None]}, r"weight_scale: expected shape \[8\] or \[1\] .*, got \[8, 1\]"),
        ({"weight_scale": SCALE.double()}, r"weight_scale: .* got \[8\] of torch.float64"),
        (
            {"weight": PREPACKED, "weight_scale": SCALE[:3]},
            r"weight_scale: expected shape \[8\] .* got \[3\]",
        ),
        ({"bias": rows(9)}, r"bias: expected shape \[8\], got \[9\]"),
        ({"out_dtype": torch.float64}, r"out_dtype: expected .*, got torch.float64"),
        (
            {"weight": PREPACKED, "backend": "cpu"},
            r"weight: prepacked for backend 'torch', got backend 'cpu'",
        ),
        ({"bias": torch.zeros(8, device="meta")}, r"bias: expected device cpu \(packed's\), got meta"),
        ({"weight_scale": SCALE.to("meta")}, r"weight_scale: expected device cpu \(packed's\), got meta"),
    ],
)
def test_bad_matmul_arguments_are_named(change, message):
    arguments: dict[str, Any] = {
        "packed": PACKED,
        "weight": WEIGHT,
        "weight_scale": SCALE,
        "backend": None if isinstance(change.get("weight"), ops.PrepackedWeight) else "torch",
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.packed_fp8_linear(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": rows(16)}, r"hidden: expected rank >= 2"),
        ({"weight": rows(8)}, r"weight: expected shape \[16\]"),
        ({"residual": rows(3, 8)}, r"residual: expected shape \[3, 16\]"),
        ({"eps": -1.0}, r"eps: expected a finite number >= 0"),
        ({"lower_bound": math.nan}, r"lower_bound: expected a finite number >= 0"),
        ({"static_scale": 0.0}, r"static_scale: expected a finite number > 0"),
        ({"target": "trn4"}, r"target: expected one of trn2, trn3; got 'trn4'"),
    ],
)
def test_bad_norm_arguments_are_named(change, message):
    arguments: dict[str, Any] = {"hidden": HIDDEN, "weight": GAMMA, "backend": "torch"}
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.rms_norm_quant(**arguments | change)
