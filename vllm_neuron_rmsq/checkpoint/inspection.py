"""Say what is in a checkpoint: which linears are in FP8 and how, what ±240 means for them, what is broken.

The headers of all files are read first, then the FP8 weights and their scales, by every core a part of a
tensor at a time: some 10 MB a core whatever the checkpoint's size.

Dimensions:
    N: output features of a linear
    H: input features of a linear
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_neuron_rmsq import weights
from vllm_neuron_rmsq.checkpoint import folder
from vllm_neuron_rmsq.checkpoint.files import Tensor, check_whole, load, read_header
from vllm_neuron_rmsq.checkpoint.plan import blocks_of, scale_of_weight
from vllm_neuron_rmsq.checkpoint.stream import Error, Progress, Reader, every_core, scale_of_rows
from vllm_neuron_rmsq.packed import NAN_CODE
from vllm_neuron_rmsq.target import Target, get

LAYER = re.compile(r"^(?P<stack>.*?\blayers)\.(?P<number>\d+)\.")


@dataclass
class Scales:
    """What is wrong with a weight's scales: how many of them are zero, negative, NaN or Inf, denormal."""

    zero: int = 0
    negative: int = 0
    nan: int = 0
    denormal: int = 0

    @classmethod
    def of(cls, scale: torch.Tensor) -> Scales:
        """Count them; a denormal number is flushed to zero by most accelerators."""
        magnitude = scale.float().abs()
        return cls(
            zero=int((magnitude == 0).sum()),
            negative=int((scale.float() < 0).sum()),
            nan=int((~magnitude.isfinite()).sum()),
            denormal=int(((magnitude > 0) & (magnitude < torch.finfo(torch.float32).tiny)).sum()),
        )


@dataclass
class Weight:
    """An FP8 weight.

    Attributes:
        name: of the tensor.
        shape: ``[N, H]``, or ``[experts, N, H]``.
        scheme: of its scales: ``per-channel``, ``per-tensor``, ``blocks of 128 x 128`` or ``no scale``.
        activations: ``static`` where the checkpoint has their scale, else ``dynamic``.
        magnitudes: how many codes there are of each magnitude, by code without its sign: ``[128]``.
        beyond: codes beyond the target's range.
        rounded: codes that halving would round; 0 where nothing is beyond.
        halving_error: root mean square of what halving changes, over the weight's own.
        nan: codes that are NaN.
        dead: output channels that are zero throughout.
        scales: what is wrong with the scales.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    activations: str
    magnitudes: list[int] = field(default_factory=lambda: [0] * 128)
    beyond: int = 0
    rounded: int = 0
    halving_error: float = 0.0
    nan: int = 0
    dead: int = 0
    scales: Scales = field(default_factory=Scales)

    @property
    def count(self) -> int:
        """Codes in all."""
        return math.prod(self.shape)

    @property
    def broken(self) -> list[str]:
        """What makes it useless, in words."""
        found = {
            "NaN codes": self.nan,
            "scales of zero": self.scales.zero if self.scales.zero > self.dead else 0,
            "negative scales": self.scales.negative,
            "scales that are NaN or Inf": self.scales.nan,
            "denormal scales": self.scales.denormal,
        }
        none = ["no scale"] if self.scheme == "no scale" else []
        return none + [f"{count} {what}" for what, count in found.items() if count]


@dataclass
class Inspection:
    """What is in a checkpoint.

    Attributes:
        path: where it is.
        target: name of the target.
        problems: why it is not whole, a sentence each.
        weights: its FP8 weights.
        others: of the tensors that are neither such a weight nor its scale: how many tensors and how many
            elements of each dtype.
    """

    path: Path
    target: str
    problems: list[str] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    others: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether it is whole and no FP8 weight is broken."""
        return not self.problems and not any(weight.broken for weight in self.weights)

    def worst(self, count: int) -> list[Weight]:
        """Return what to look at first: broken, then most changed by halving, then with dead channels."""

        def rank(weight: Weight) -> tuple[int, float, float, int]:
            return len(weight.broken), weight.halving_error, weight.beyond / max(weight.count, 1), weight.dead

        ranked = sorted(self.weights, key=rank, reverse=True)
        return [weight for weight in ranked[:count] if any(rank(weight))]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self) | {
            "path": str(self.path),
            "sound": self.sound,
            "weights": [asdict(weight) | {"broken": weight.broken} for weight in self.weights],
        }


def inspect(source: Path, target: Target | str = "trn2", progress: Progress | None = None) -> Inspection:
    """Say what is in a checkpoint, whatever it is quantized by.

    Args:
        source: a Hugging Face checkpoint directory with safetensors, or one ``.safetensors`` file.
        target: or its name; whose range codes are compared with.
        progress: told about every FP8 weight.

    Raises:
        ValueError: ``source`` is not there or holds no safetensors, or its ``config.json`` or index is none.
    """
    chosen = get(target)
    folder.require(source, "a checkpoint directory or a .safetensors file")
    found = Inspection(source, str(chosen))
    config: dict[str, Any] = {}
    if source.is_dir():
        config = folder.read_config(source)
        survey = folder.survey(source)
        found.problems += survey.problems
        shards = survey.shards
        if not survey.problems:
            found.problems += _missing_layers(source, config, shards.values())
    else:
        header = read_header(source)
        shards = {source.name: header.tensors}
        try:
            check_whole(source, header)
        except ValueError as error:
            found.problems.append(str(error))
    everything: dict[str, Tensor] = {n: t for tensors in shards.values() for n, t in tensors.items()}
    in_fp8 = [tensor for tensor in everything.values() if tensor.dtype == "F8_E4M3" and len(tensor.shape) > 1]
    with every_core() as (pool, stop):
        futures = {
            pool.submit(_look_at, stop, tensor, everything, config, chosen): tensor for tensor in in_fp8
        }
        for done, future in enumerate(as_completed(futures), 1):
            if progress is not None:
                progress(done, len(futures), futures[future].name)
        for future, tensor in futures.items():
            try:
                found.weights.append(future.result())
            except ValueError as error:  # it lies in the part of a file that is missing
                found.problems.append(f"{tensor.name}: {error}")
    found.weights.sort(key=lambda weight: _natural(weight.name))
    belonging = {tensor.name for tensor in in_fp8} | {
        scale.name for tensor in in_fp8 for scale in [scale_of_weight(tensor, everything)] if scale
    }
    found.others = _count(tensor for name, tensor in everything.items() if name not in belonging)
    return found


def _look_at(
    stop: threading.Event,
    tensor: Tensor,
    everything: dict[str, Tensor],
    config: dict[str, Any],
    target: Target,
) -> Weight:
    reader = Reader(stop)
    scale_tensor = scale_of_weight(tensor, everything)
    static = everything.get(f"{tensor.name.removesuffix('.weight')}.input_scale")
    weight = Weight(
        tensor.name, tensor.shape, _scheme(tensor, scale_tensor, config), "static" if static else "dynamic"
    )
    scale = torch.ones(1) if scale_tensor is None else load(scale_tensor).float()
    weight.scales = Scales.of(
        torch.cat([scale.view(-1), *([load(static).float().view(-1)] if static else [])])
    )
    histogram = torch.zeros(256, dtype=torch.int64)
    for _, codes in reader.codes(tensor):
        histogram += torch.bincount(codes.reshape(-1), minlength=256)
        weight.dead += int(((codes & 0x7F).amax(dim=1) == 0).sum())
    magnitudes = histogram[:128] + histogram[128:]
    weight.magnitudes = magnitudes.tolist()
    weight.nan = int(magnitudes[NAN_CODE])
    weight.beyond = int(magnitudes[target.max_code + 1 :].sum()) - weight.nan
    if weight.beyond and not weight.nan:
        # Up to code 15 numbers are multiples of one step, and odd ones have no half.
        weight.rounded = int(magnitudes[1:16:2].sum())
        weight.halving_error = _halving_error(reader, tensor, scale, scale_tensor, config)
    return weight


def _halving_error(
    reader: Reader, tensor: Tensor, scale: torch.Tensor, scale_tensor: Tensor | None, config: dict[str, Any]
) -> float:
    error = Error()
    block = None if scale_tensor is None else blocks_of(tensor, scale_tensor, config)
    for row, codes in reader.codes(tensor):
        of_rows = scale_of_rows(scale, tensor.shape, block, row, codes)
        halved, doubled = weights.halve(codes, of_rows)
        error.add(weights.decode(codes).mul_(of_rows), weights.decode(halved).mul_(doubled))
    return error.relative()


def _scheme(tensor: Tensor, scale: Tensor | None, config: dict[str, Any]) -> str:
    if scale is None:
        return "no scale"
    block = blocks_of(tensor, scale, config)
    if block is not None:
        return f"blocks of {block[0]} x {block[1]}"
    return "per-tensor" if math.prod(scale.shape) == 1 else "per-channel"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort by it to have layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _count(tensors: Iterable[Tensor]) -> dict[str, tuple[int, int]]:
    number: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for tensor in tensors:
        number[tensor.dtype] += 1
        elements[tensor.dtype] += math.prod(tensor.shape)
    return {dtype: (number[dtype], elements[dtype]) for dtype in sorted(number)}


def _missing_layers(source: Path, config: dict[str, Any], shards: Iterable[Iterable[str]]) -> list[str]:
    """Say which decoder layers have no tensor at all."""
    inner = config.get("text_config")
    expected = config.get("num_hidden_layers")
    if expected is None and isinstance(inner, dict):
        expected = inner.get("num_hidden_layers")
    stacks: dict[str, set[int]] = {}
    for tensors in shards:
        for name in tensors:
            match = LAYER.match(name)
            if match:
                stacks.setdefault(match["stack"], set()).add(int(match["number"]))
    if not isinstance(expected, int) or not stacks:
        return []
    largest = max(stacks.values(), key=len)
    missing = [str(number) for number in range(expected) if number not in largest]
    return [f"{source}: has no weights of layers {folder.some(missing)}"] if missing else []
