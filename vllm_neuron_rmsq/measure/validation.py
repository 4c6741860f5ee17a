"""What FP8 in packed rows does to a model: its layers beside an oracle, a text beside the bf16 checkpoint.

Three models are run by vLLM, one after the other: the unquantized one without the plugin, and the FP8 one
through the plugin for each target. ``trn2`` beside ``trn3`` is what Trainium2's ±240 costs this model.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_neuron_rmsq import backends, checkpoint, weights
from vllm_neuron_rmsq.checkpoint.folder import require
from vllm_neuron_rmsq.measure import layers as layers_of
from vllm_neuron_rmsq.measure import results
from vllm_neuron_rmsq.measure.engine import STOCK, Engine, Scores, need_vllm
from vllm_neuron_rmsq.measure.layers import SCALES
from vllm_neuron_rmsq.target import TARGETS

WINDOW, TOKENS = 1000, 4000
"""The text is read in windows of so many tokens, and so many in all."""

PERPLEXITY = 1.05
"""Bound: perplexity in FP8 over perplexity in bf16."""
TOP = 0.80
"""Bound: share of the places where FP8 and bf16 find the same token most probable."""
LOGPROB = 0.30
"""Bound: mean |difference of logprobs| of the text's tokens."""
COST_OF_TRN2 = 1.01
"""Bound: perplexity within ±240 over perplexity within ±448, less twice its standard error."""

Progress = Callable[[int, int, str], None]
"""Called as ``progress(steps done, steps in all, what comes next)``."""


@dataclass
class Text:
    """One model on the text.

    Attributes:
        side: ``bf16`` or a target.
        perplexity: exp of the mean negative logprob.
        ratio: to bf16's.
        top: share of places where it finds the same token most probable as bf16 does.
        logprob: mean |difference of logprobs| from bf16's.
        fusion: the plugin's line; empty for bf16.
        passed: whether these are within the bounds.
        logprobs: of every token of the text but each window's first.
    """

    side: str
    perplexity: float
    ratio: float = 1.0
    top: float = 1.0
    logprob: float = 0.0
    fusion: str = ""
    passed: bool = True
    logprobs: list[float] = field(default_factory=list, repr=False)


@dataclass
class Validation:
    """All numbers of one model.

    Attributes:
        model: its path's name.
        run: when and on what, as in results' files.
        tokens: how many of the text were predicted.
        texts: bf16 first, then each target.
        layers: every step of the layers looked at, by target and backend.
        skipped: backend to the reason why it could not run here.
        failures: what is beyond a bound, in words; empty when all passed.
    """

    model: str
    run: dict[str, str]
    tokens: int
    texts: list[Text]
    layers: list[layers_of.Agreement]
    skipped: dict[str, str]
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def cost_of_trn2(self) -> tuple[float, float] | None:
        """Perplexity within ±240 over that within ±448, where both were measured, and its standard error.

        The error is that of a text of so many tokens: another text gives another ratio.
        """
        by_side = {text.side: text.logprobs for text in self.texts}
        if not {"trn2", "trn3"} <= set(by_side):
            return None
        more = [trn3 - trn2 for trn2, trn3 in zip(by_side["trn2"], by_side["trn3"], strict=True)]
        mean = statistics.fmean(more)
        variance = statistics.fmean((one - mean) ** 2 for one in more)
        return math.exp(mean), math.exp(mean) * math.sqrt(variance / len(more))

    def json(self) -> dict[str, Any]:
        """Everything but the single tokens' logprobs."""
        texts = [{k: v for k, v in asdict(text).items() if k != "logprobs"} for text in self.texts]
        return asdict(self) | {"texts": texts, "cost_of_trn2": self.cost_of_trn2(), "passed": self.passed}


def validate(
    model: Path,
    *,
    reference: Path | None = None,
    text: str | None = None,
    tokens: int = TOKENS,
    layers: Sequence[int] | None = None,
    targets: Sequence[str] = tuple(TARGETS),
    backend: str = "auto",
    work: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Validation:
    """Measure what FP8 in packed rows does to a model.

    Args:
        model: checkpoint directory in bf16, or in FP8, or a GGUF file.
        reference: the bf16 checkpoint that an FP8 ``model`` was made of; ``None`` takes ``model``'s own
            weights, dequantized, and so shows what FP8 activations and the target cost but not the weights.
        text: to read; ``None`` is CPython's documentation of its language (``pydoc_data.topics``).
        tokens: of the text, at most; 0 looks at layers alone.
        layers: numbers of the decoder layers to look at; ``None`` is the first, the middle and the last.
            None are looked at if it is empty.
        targets: of ``trn2`` and ``trn3``.
        backend: who computes the whole model; at layers every backend that can run here does.
        work: where checkpoints are made and logs go, and stay; ``None`` is a temporary directory that goes.
        progress: told about every step.

    Raises:
        ValueError: an argument is not valid, the model is not one this can read, or vLLM stopped.
    """
    need_vllm()
    require(model)
    if reference is not None:
        _config(reference)
    if backend != "auto" and (reason := backends.unavailable(backend)):
        raise ValueError(f"backend {backend!r} cannot run here: {reason}")
    if tokens < 0:
        raise ValueError(f"tokens: expected 0 or more, got {tokens}")
    sides = ["bf16", *targets] if tokens else []
    total = 1 + len(sides) + len(targets)
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rmsq-validate-")))
        work.mkdir(parents=True, exist_ok=True)
        progress(0, total, "making checkpoints")
        bf16, fp8 = _checkpoints(model, reference, targets, work)
        windows = _windows(bf16, text, max(tokens, layers_of.ROWS))
        scores: dict[str, list[Scores]] = {}
        fusion = {"bf16": ""}
        for done, side in enumerate(sides, 1):
            environment = STOCK if side == "bf16" else _environment(backend, side)
            folder = bf16 if side == "bf16" else fp8[side]
            progress(done, total, f"{side}: loading")
            with _engine(folder, work / f"validate-{side}.log", environment, windows) as engine:
                report = engine.report()
                if side != "bf16":
                    fusion[side] = report["line"] if report else "the plugin changed nothing"
                scores[side] = []
                for i, window in enumerate(windows):
                    progress(done, total, f"{side}: text {i + 1} of {len(windows)}")
                    scores[side].append(engine.scores(window))
        usable = {name: backends.unavailable(name) for name in backends.names()}
        agreements = []
        if layers is None or layers:
            progress(total - len(targets), total, "layers: running the bf16 model")
            steps = _capture(bf16, windows[0], layers)
            names = [name for name, reason in usable.items() if reason is None]
            for done, name in enumerate(targets, total - len(targets)):
                progress(done, total, f"layers, {name}: {', '.join(names)}")
                agreements += layers_of.compare(steps, fp8[name], name, names)
        progress(total, total, "")
    texts = [_text(side, scores, fusion[side]) for side in sides]
    found = Validation(
        model.name,
        results.this_run(),
        sum(len(one.logprobs) for one in scores.get("bf16", ())),
        texts,
        agreements,
        {name: reason for name, reason in usable.items() if reason is not None},
    )
    found.failures = _failures(found)
    return found


def _environment(backend: str, target: str) -> dict[str, str]:
    return {"VLLM_RMSQ_BACKEND": backend, "VLLM_RMSQ_TARGET": target}


@contextlib.contextmanager
def _engine(
    folder: Path, log: Path, environment: dict[str, str], windows: Sequence[Sequence[int]]
) -> Iterator[Engine]:
    longest = max(map(len, windows))
    options = {"max_model_len": longest + 1, "max_num_batched_tokens": longest + 1, "max_num_seqs": 1}
    engine = Engine(folder, log, environment, enable_prefix_caching=False, **options)
    try:
        engine.ask()
        yield engine
    finally:
        engine.close()


def _checkpoints(
    model: Path, reference: Path | None, targets: Sequence[str], work: Path
) -> tuple[Path, dict[str, Path]]:
    """The unquantized checkpoint, and the FP8 one of each target."""
    if model.is_file():
        model, source = work / "bf16", model
        if not model.exists():
            checkpoint.unpack_gguf(source, model)
    config = _config(model)
    if "quantization_config" in config or "compression_config" in config:
        bf16 = reference or _once(work / "dequantized", lambda out: dequantize(model, out))
        return bf16, dict.fromkeys(targets, model)  # the plugin halves what is beyond ±240
    if reference is not None:
        raise ValueError(f"reference: {model} is not quantized, so it is its own; leave the option out")
    return model, {
        name: _once(work / f"fp8-{name}", lambda out, name=name: checkpoint.convert(model, out, name))  # type: ignore[misc]
        for name in targets
    }


def _once(out: Path, make: Callable[[Path], Any]) -> Path:
    if not out.exists():
        make(out)
    return out


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no config.json; expected a Hugging Face checkpoint directory")
    return dict(json.loads(path.read_text()))


def dequantize(source: Path, out: Path) -> None:
    """Write the bf16 checkpoint directory ``out``: every FP8 weight of ``source`` times its scales.

    Raises:
        ValueError: ``source`` has other scales than one for each output, for all, or for each block of
            128 x 128.
    """
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
                shutil.copy(path, partial)
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(source.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scales = {n: tensors.pop(n) for n in list(tensors) if n.endswith(("_scale", "_scale_inv"))}
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float8_e4m3fn:
                module = name.removesuffix(".weight")
                given = next((scales[n] for part in SCALES if (n := f"{module}.{part}") in scales), None)
                scale = None if given is None else layers_of.natural_scale(given, tensor.shape)
                if scale is None:
                    raise ValueError(
                        f"{source}: {name} has no scale for each output, for all, or for each block of "
                        "128 x 128; give the bf16 checkpoint it was made of with --reference"
                    )
                tensors[name] = weights.dequantize(tensor.view(torch.uint8), scale, torch.bfloat16)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        config = _config(source)
        config.pop("quantization_config", None)
        config.pop("compression_config", None)
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _windows(folder: Path, text: str | None, tokens: int) -> list[list[int]]:
    """The text's tokens in windows the model can read."""
    from transformers import AutoTokenizer

    if text is None:
        import pydoc_data.topics

        text = "\n".join(pydoc_data.topics.topics.values())
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids[:tokens]
    if len(ids) < layers_of.ROWS:
        raise ValueError(f"text: expected at least {layers_of.ROWS} tokens, got {len(ids)}")
    size = min(WINDOW, int(_config(folder).get("max_position_embeddings", WINDOW + 1)) - 1)
    windows = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [window for window in windows if len(window) > 1]


def _capture(folder: Path, window: Sequence[int], layers: Sequence[int] | None) -> list[layers_of.Step]:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if layers is None:
        last = int(model.config.get_text_config().num_hidden_layers) - 1
        layers = sorted({0, last // 2, last})
    return layers_of.capture(model, window[: 4 * layers_of.ROWS], layers)


def _text(side: str, scores: dict[str, list[Scores]], fusion: str) -> Text:
    def joined(of: str) -> tuple[list[float], list[int]]:
        return [p for one in scores[of] for p in one.logprobs], [t for one in scores[of] for t in one.top]

    (logprobs, top), (stock, stock_top) = joined(side), joined("bf16")
    perplexity, of_stock = (math.exp(-sum(given) / len(given)) for given in (logprobs, stock))
    differences = [abs(a - b) for a, b in zip(logprobs, stock, strict=True)]
    text = Text(
        side,
        perplexity,
        perplexity / of_stock,
        sum(a == b for a, b in zip(top, stock_top, strict=True)) / len(top),
        sum(differences) / len(differences),
        fusion,
        logprobs=logprobs,
    )
    text.passed = text.ratio <= PERPLEXITY and text.top >= TOP and text.logprob <= LOGPROB
    return text


def _failures(found: Validation) -> list[str]:
    failures = []
    for text in found.texts:
        for what, value, within, bound in (
            ("perplexity against bf16", text.ratio, text.ratio <= PERPLEXITY, f"at most {PERPLEXITY}"),
            ("top-1 agreement", text.top, text.top >= TOP, f"at least {TOP}"),
            ("mean |difference of logprobs|", text.logprob, text.logprob <= LOGPROB, f"at most {LOGPROB}"),
        ):
            if not within:
                failures.append(f"{text.side}: {what} {value:.4g}, expected {bound}")
    cost = found.cost_of_trn2()
    if cost is not None and not cost[0] - 2 * cost[1] <= COST_OF_TRN2:
        said = f"{cost[0]:.4g} ± {cost[1]:.2g}"
        failures.append(f"trn2: perplexity against trn3 {said}, expected at most {COST_OF_TRN2}")
    failures += [
        f"{one.step}, {one.target}, backend {one.backend}: scales off by {one.scale_error:.2g}, "
        f"{1 - one.codes_equal:.2%} of the codes off, by up to {one.steps} steps: beyond the contract"
        for one in found.layers
        if not one.passed
    ]
    return failures
