"""Convert a bf16 or FP8 checkpoint, or a GGUF file, to an FP8 checkpoint that vLLM serves.

The result is in compressed-tensors' ``float-quantized`` format. Each decoder linear becomes ``weight``
``[N, H]`` float8_e4m3fn and ``weight_scale`` fp32. What is no decoder linear is copied as it is. Every core
takes a tensor and reads, quantizes and writes it some rows at a time, so memory does not grow with the
checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_neuron_rmsq import __version__
from vllm_neuron_rmsq.checkpoint import calibration, folder, gguf, plan
from vllm_neuron_rmsq.checkpoint.appearing import Partial, appearing
from vllm_neuron_rmsq.checkpoint.files import Tensor, Writer, opened, unreadable, write_json
from vllm_neuron_rmsq.checkpoint.stream import Layer, Progress, Worker, every_core
from vllm_neuron_rmsq.target import Target, get

FLUSH_BYTES = 64 << 20
"""Written at most before the disk is told to begin: at the end there is little left to wait for."""


@dataclass
class Report:
    """What became of a checkpoint.

    Attributes:
        source: what it was made of.
        out: the folder made.
        target: name of the target.
        scheme: ``per-channel``, ``per-tensor`` or ``static``.
        layers: the linears in FP8.
        left: parameters of each linear, or block of fused experts, that stayed as it was, by name.
        bytes_before: size of the tensors before.
        bytes_after: and after.
        resumed: shards that a killed run had finished.
        cleared: whether the remains of a killed run with other arguments were removed.
    """

    source: Path
    out: Path
    target: str
    scheme: str
    layers: list[Layer] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    resumed: int = 0
    cleared: bool = False

    @property
    def parameters(self) -> int:
        """Weights that are in FP8."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    def worst(self, count: int) -> list[Layer]:
        """Return the linears with the largest error."""
        return sorted(self.layers, key=lambda layer: -layer.error)[:count]

    def as_dict(self) -> dict[str, Any]:
        """Return everything, and the sums, as JSON can hold it."""
        return asdict(self) | {
            "source": str(self.source),
            "out": str(self.out),
            "parameters": self.parameters,
            "parameters_left": sum(self.left.values()),
        }

    @classmethod
    def of_dict(cls, content: dict[str, Any]) -> Report:
        """Undo :meth:`as_dict`."""
        known = {name: content[name] for name in cls.__dataclass_fields__}
        paths = {"source": Path(known["source"]), "out": Path(known["out"])}
        return cls(**known | paths | {"layers": [Layer.of_dict(layer) for layer in known["layers"]]})


def convert(
    source: Path,
    out: Path,
    target: Target | str = "trn2",
    progress: Progress | None = None,
    *,
    scheme: str = "per-channel",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    lm_head: bool = False,
    from_fp8: bool = False,
    calibration_text: str | None = None,
) -> Report:
    """Write the FP8 checkpoint ``out`` made from ``source``.

    ``out`` appears complete or not at all. A run that was killed leaves ``.NAME.partial`` beside it; the next
    one with the same arguments goes on from there, and one with others removes it.

    Args:
        source: a Hugging Face checkpoint directory with safetensors, or a ``.gguf`` file.
        out: directory to make; must not exist.
        target: or its name; ``"trn2"`` keeps codes within ±240, ``"trn3"`` uses ±448.
        progress: told about every tensor.
        scheme: ``"per-channel"``: a scale for each output channel of a weight and, found at run time, each
            token; ``"per-tensor"``: one for a weight; ``"static"``: as per-channel, but one for all tokens,
            from ``calibration_text``.
        ignore: linears to leave as they are: names, or ``re:`` and a regular expression that matches names
            from their beginning.
        include: linears to quantize besides those of the decoder that end in ``_proj``, in the same form.
        lm_head: quantize the output projection, too. One that is the embedding gets a weight of its own.
        from_fp8: ``source`` is in FP8: its codes are brought within the target's range by halving, block
            scales become one scale a channel.
        calibration_text: what ``"static"`` runs the model on, which is loaded as a whole for it.

    Raises:
        ValueError: ``source`` is not there, damaged, already quantized, holds NaN or Inf, or has no
            decoder linears; or ``out`` exists or cannot be written; or the arguments do not go together.
    """
    recipe = plan.Recipe(get(target), scheme, tuple(ignore), tuple(include), lm_head, from_fp8)
    if (scheme == "static") != (calibration_text is not None):
        raise ValueError("scheme static needs a text for calibration, and the other schemes use none")
    folder.require(source)
    with appearing(out, _job(source, recipe, calibration_text)) as partial:
        if partial.report is not None:
            return Report.of_dict(partial.report)
        original = _Folder(source) if source.is_dir() else gguf.Unpacked(source)
        what = plan.make(str(source), original.config, original.shards, recipe)
        report = Report(source, out, str(recipe.target), scheme, left=what.left, cleared=partial.cleared)
        report.bytes_before = sum(t.nbytes for shard in original.shards.values() for t in shard.values())
        _check_room(out, partial, what)
        scales: dict[str, float] = {}
        if calibration_text is not None:
            model, tokenizer = original.load()
            scales = calibration.input_scales(
                model, tokenizer, what.quantized, calibration_text, recipe.target, progress
            )
        with _Conversion(partial, recipe.target, scales, progress) as conversion:
            conversion.run(what, report)
        original.save_others(partial.checkpoint)
        _write_config(original.config, what, partial.checkpoint, report)
        partial.complete(report.as_dict())
    return report


class _Folder:
    """A checkpoint directory that is to be converted; :class:`gguf.Unpacked` is its like for a GGUF file.

    Attributes:
        config: ``config.json``.
        shards: its tensors by the file they are in.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.config = folder.read_config(source)
        survey = folder.survey(source)
        if survey.problems:
            raise ValueError(survey.problems[0])
        self.shards: dict[str, dict[str, Tensor]] = {**survey.shards}  # type: ignore[dict-item]

    def load(self) -> tuple[Any, Any]:
        """Return model and tokenizer."""
        return calibration.load(self.source)

    def save_others(self, out: Path) -> None:
        """Copy what lies beside the weights, but for what another program says of how they are quantized."""
        for path in folder.others(self.source):
            if path != Path("hf_quant_config.json"):
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                _copy(self.source / path, out / path)


def _copy(source: Path, out: Path) -> None:
    with opened(source) as file, out.open("wb") as copy:
        while True:
            try:
                content = os.read(file, 1 << 20)
            except OSError as error:
                raise unreadable(source, error) from error
            if not content:
                break
            copy.write(content)


def _job(source: Path, recipe: plan.Recipe, text: str | None) -> dict[str, Any]:
    """Return what tells this job from others: the source and the arguments."""
    return {
        "version": __version__,
        **folder.identity(source),
        "recipe": {name: str(value) for name, value in vars(recipe).items()},
        "calibration": hashlib.sha256(text.encode()).hexdigest() if text is not None else None,
    }


def _check_room(out: Path, partial: Partial, what: plan.Plan) -> None:
    needed = sum(
        described.nbytes
        for shard, steps in what.steps.items()
        if partial.finished(shard) is None
        for step in steps
        for described in step.outputs()
    )
    free = shutil.disk_usage(partial.path).free
    if needed > free:
        raise ValueError(
            f"{out}: needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there; make room or "
            "choose another disk"
        )


class _Conversion:
    """The threads that carry out a plan.

    Args:
        partial: where shards go.
        target: whose range.
        scales: the scale of each linear's activations, where they are static.
        progress: told about every tensor.
    """

    def __init__(
        self, partial: Partial, target: Target, scales: dict[str, float], progress: Progress | None
    ) -> None:
        self._partial = partial
        self._progress = progress
        self._cleanup = contextlib.ExitStack()
        self._files = self._cleanup.enter_context(contextlib.ExitStack())  # closed last
        self._disk = self._cleanup.enter_context(ThreadPoolExecutor(1))
        self._pool, stop = self._cleanup.enter_context(every_core())
        self._workers = threading.local()
        self._make_worker = lambda: Worker(target, scales, stop)

    def __enter__(self) -> _Conversion:
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.shutdown(wait=False, cancel_futures=True)
        self._cleanup.close()

    def run(self, what: plan.Plan, report: Report) -> None:
        """Write every shard that is not finished, and fill in the report."""
        total = sum(map(len, what.steps.values()))
        done = 0
        on_disk: list[Future[None]] = []
        for shard, steps in what.steps.items():
            report.bytes_after += sum(described.nbytes for step in steps for described in step.outputs())
            known = self._partial.finished(shard)
            if known is not None:
                report.layers += map(Layer.of_dict, known["layers"])
                report.resumed += 1
                done += len(steps)
                self._tell(done, total, shard)
                continue
            outputs = [described for step in steps for described in step.outputs()]
            writer = Writer(self._partial.path / shard, outputs)
            self._files.callback(writer.close)
            futures = {self._pool.submit(self._carry_out, step, writer): step for step in steps}
            for future in as_completed(futures):
                future.result()
                done += 1
                self._tell(done, total, futures[future].source.name)
                if writer.unflushed > FLUSH_BYTES:
                    writer.unflushed = 0
                    on_disk.append(self._disk.submit(writer.flush))
            layers = [layer for layer in (future.result() for future in futures) if layer is not None]
            report.layers += layers
            on_disk.append(self._disk.submit(self._finish, shard, writer, layers))
        for flushed in on_disk:
            flushed.result()

    def _carry_out(self, step: plan.Step, writer: Writer) -> Layer | None:
        if not hasattr(self._workers, "mine"):
            self._workers.mine = self._make_worker()
        return self._workers.mine.carry_out(step, writer)

    def _finish(self, shard: str, writer: Writer, layers: list[Layer]) -> None:
        writer.flush()
        writer.close()
        self._partial.finish(shard, {"layers": [layer.as_dict() for layer in layers]})

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._progress is not None:
            self._progress(done, total, what)


def _write_config(config: dict[str, Any], what: plan.Plan, out: Path, report: Report) -> None:
    weight_map = {
        described.name: shard
        for shard, steps in what.steps.items()
        for step in steps
        for described in step.outputs()
    }
    if list(what.steps) != [folder.WEIGHTS]:
        write_json(
            out / folder.INDEX, {"metadata": {"total_size": report.bytes_after}, "weight_map": weight_map}
        )
    config = {key: value for key, value in config.items() if key != "compression_config"}
    write_json(out / "config.json", config | what.config | {"quantization_config": what.quantization_config})
