"""``validate`` short of vLLM, which ``test_whole_model``, a slow one, runs on a tiny model."""

from __future__ import annotations

import json

import fp8_kinds
import pytest
import torch
from checkpoints import edit, load
from typer.testing import CliRunner
from vllm_models import tiny_config, write_checkpoint

from vllm_neuron_rmsq.cli import app
from vllm_neuron_rmsq.measure import validation
from vllm_neuron_rmsq.measure.engine import Scores
from vllm_neuron_rmsq.measure.layers import Agreement


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, smollm2_bf16):
    """A tiny Llama with SmolLM2's tokenizer, bf16; in FP8 in ``fp8/``."""
    folder = tmp_path_factory.mktemp("tiny") / "bf16"
    write_checkpoint(tiny_config("llama", vocab_size=49152), folder)
    for part in (folder, folder / "fp8"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (part / name).write_bytes((smollm2_bf16 / name).read_bytes())
    return folder


def measured(**changes) -> validation.Validation:
    scores = {
        "bf16": [Scores([-1.0, -2.0, -3.0, -4.0], [1, 2, 3, 4])],
        "trn2": [Scores([-1.0, -2.1, -3.0, -4.1], [1, 2, 3, 5])],
        "trn3": [Scores([-1.0, -2.0, -3.0, -4.1], [1, 2, 3, 4])],
    }
    scores |= changes
    texts = [validation._text(side, scores, "") for side in scores]
    agreement = Agreement("input_layernorm", "norm", "trn2", "cpu", 1e-8, 1.0, 0, 0.03, True)
    found = validation.Validation(
        "m", dict.fromkeys(("date", "machine", "versions", "commit"), ""), 4, texts, [], {}
    )
    found.layers.append(agreement)
    found.failures = validation._failures(found)
    return found


def test_the_numbers_of_a_text():
    bf16, trn2, trn3 = measured().texts
    assert (bf16.ratio, bf16.top, bf16.logprob) == (1, 1, 0)
    assert bf16.perplexity == pytest.approx(2.718281828**2.5)
    assert trn2.ratio == pytest.approx(2.718281828**0.05)
    assert (trn2.top, trn2.logprob) == (0.75, pytest.approx(0.05))
    assert trn3.top == 1


def test_what_is_beyond_a_bound_is_said():
    found = measured()
    assert [failure.split(",")[0] for failure in found.failures] == [
        "trn2: perplexity against bf16 1.051",
        "trn2: top-1 agreement 0.75",
    ]
    assert not found.passed
    assert measured(trn2=[Scores([-1.0, -2.0, -3.0, -4.0], [1, 2, 3, 4])]).passed
    worse = measured(
        trn2=[Scores([-1.1, -2.1, -3.1, -4.1], [1, 2, 3, 4])],
        trn3=[Scores([-1.0, -2.0, -3.0, -4.0], [1, 2, 3, 4])],
    )
    assert worse.cost_of_trn2() == pytest.approx((2.718281828**0.1, 0))
    assert worse.failures[-1].startswith("trn2: perplexity against trn3 1.105 ± ")
    assert worse.failures[-1].endswith(", expected at most 1.01")
    nan = measured(trn2=[Scores([float("nan")] * 4, [1, 2, 3, 4])])
    assert {"trn2: perplexity against bf16 nan", "trn2: perplexity against trn3 nan ± nan"} <= {
        failure.split(",")[0] for failure in nan.failures
    }


def test_dequantized_weights_are_those_of_the_checkpoint(checkpoints, tmp_path):
    validation.dequantize(checkpoints / "fp8", tmp_path / "out")
    given, fp8, bf16 = load(tmp_path / "out"), load(checkpoints / "fp8"), load(checkpoints)
    assert set(given) == set(bf16)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(given[name], (fp8[name].float() * fp8[f"{name}_scale"]).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("kind", sorted(fp8_kinds.KINDS))
def test_dequantized_weights_of_every_kind(kind, checkpoints, tmp_path):
    fp8 = fp8_kinds.write(checkpoints, tmp_path / "fp8", kind, calibration=[torch.arange(3, 40)])
    validation.dequantize(fp8, tmp_path / "out")
    given = load(tmp_path / "out")
    assert set(given) == set(load(checkpoints))
    for name, linear in fp8_kinds.reference_model(checkpoints, fp8, kind).named_modules():
        if fp8_kinds.is_linear(f"{name}.weight"):
            torch.testing.assert_close(given[f"{name}.weight"], linear.weight.detach().bfloat16())


def test_scales_that_are_none_are_refused(checkpoints, tmp_path):
    fp8 = fp8_kinds.write(checkpoints, tmp_path / "fp8", "fp8 block")
    edit(fp8, {"model.layers.0.self_attn.o_proj.weight_scale_inv": torch.ones(7)})
    with pytest.raises(ValueError, match=r"o_proj.weight has no scale for each output.*with --reference"):
        validation.dequantize(fp8, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["meta-llama/Llama-3.1-8B"], "hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B"),
        (["{bf16}/fp8", "--reference", "nothing"], "nothing: has no config.json; expected a Hugging Face"),
        (
            ["{bf16}", "--backend", "cup"],
            "backend: expected one of auto, nki, ",
        ),
        (["{bf16}", "--plot", "no/numbers.png"], "no/numbers.png: cannot be written, no is no directory"),
        (["{bf16}", "--plot", "numbers.docx"], "numbers.docx: expected the name of a picture, .png or"),
        (["nothing"], "nothing: is not there; expected a checkpoint directory or a .gguf file"),
        (["{bf16}", "--reference", "{bf16}"], "is not quantized, so it is its own"),
        (["{bf16}", "--text", "nothing.txt"], "nothing.txt: cannot be read as text"),
    ],
)
def test_wrong_use(checkpoints, arguments, said):
    result = CliRunner().invoke(app, ["validate", *(a.format(bf16=checkpoints) for a in arguments)])
    assert said in str(result.exception)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_model(checkpoints, tmp_path):
    """Both ways in, the FP8 checkpoint and the bf16 one, through the command; random weights know no text."""
    arguments = ["--tokens", "64", "--layer", "1", "--target", "trn2", "--work", str(tmp_path), "--json"]
    picture = tmp_path / "picture.png"
    result = CliRunner().invoke(
        app, ["validate", str(checkpoints / "fp8"), *arguments, "--plot", str(picture)]
    )
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["passed"] else 1), result.output
    _, trn2 = found["texts"]
    assert found["tokens"] == 63
    assert "4 of 5 RMSNorm layers fused" in trn2["fusion"]
    # All that differs is FP8 activations: the reference has the same weights.
    assert trn2["ratio"] == pytest.approx(1, abs=0.02)
    assert 0 < trn2["logprob"] < 0.1
    assert {one["step"] for one in found["layers"]} >= {"model.layers.1.input_layernorm"}
    assert all(one["passed"] for one in found["layers"])
    assert picture.read_bytes().startswith(b"\x89PNG")
