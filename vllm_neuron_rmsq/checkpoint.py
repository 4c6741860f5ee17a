"""Convert a bf16 checkpoint, or a GGUF file, to an FP8 checkpoint that vLLM serves.

Dimensions:
    N: output features of a linear
    H: input features of a linear

The result is in compressed-tensors' ``float-quantized`` format. Each decoder linear becomes
``weight`` ``[N, H]`` float8_e4m3fn and ``weight_scale`` ``[N, 1]`` fp32, one scale an output channel;
activations are quantized per token when the model runs. Embeddings, norms, biases and ``lm_head`` are copied
as they are. A directory is read and written shard by shard, so memory holds one shard at most.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_neuron_rmsq import weights
from vllm_neuron_rmsq.target import Target, get

DECODER_LINEAR = re.compile(r"(^|\.)layers\.\d+\.(.*\.)?\w*_proj\.weight$")
"""Checkpoint names of what is quantized: ``q_proj``, ``gate_up_proj``, ``experts.7.down_proj``, ..."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
)

Progress = Callable[[int, int, str], None]
"""Called as ``progress(tensors done, tensors in all, name of the one at hand)``."""


def quantization_config(ignore: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``, as compressed-tensors 0.17 writes it.

    Args:
        ignore: names of the linears that were left unquantized.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                    "observer": "memoryless_minmax",
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
        "kv_cache_scheme": None,
        "ignore": ignore,
    }


def convert(source: Path, out: Path, target: Target | str = "trn2", progress: Progress | None = None) -> int:
    """Write the FP8 checkpoint ``out`` made from ``source``.

    ``out`` appears complete or not at all: it is written beside its final place and renamed.

    Args:
        source: a Hugging Face checkpoint directory with safetensors, or a ``.gguf`` file.
        out: directory to make; must not exist.
        target: or its name; ``"trn2"`` keeps codes within ±240, ``"trn3"`` uses ±448.
        progress: told about every tensor.

    Returns:
        How many linears were quantized.

    Raises:
        ValueError: ``source`` is not there, damaged, already quantized, holds NaN or Inf, or has no
            decoder linears; or ``out`` exists.
    """
    chosen = get(target)
    with _appearing(out) as partial:
        if source.is_dir():
            return _quantize_directory(source, partial, chosen, progress)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.gguf-") as unpacked:
            _unpack_gguf(source, Path(unpacked))
            return _quantize_directory(Path(unpacked), partial, chosen, progress)


def unpack_gguf(source: Path, out: Path) -> None:
    """Write the bf16 checkpoint directory ``out`` holding the model, tokenizer and chat template of a GGUF.

    Raises:
        ValueError: ``source`` is not there or is no GGUF that can be read; or ``out`` exists.
    """
    with _appearing(out) as partial:
        _unpack_gguf(source, partial)


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a directory beside ``out`` that becomes ``out`` if the block ends well, and goes otherwise."""
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another name or delete it first")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: {out.parent} is not a directory; make it first")
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)  # safetensors and mkdtemp make theirs private
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _quantize_directory(source: Path, out: Path, target: Target, progress: Progress | None) -> int:
    config = _read_config(source)
    shards = _shards(source)
    total = sum(len(names) for names in shards.values())
    tied = bool(config.get("tie_word_embeddings", False))
    done = quantized = size = 0
    weight_map: dict[str, str] = {}
    ignore = ["lm_head"]
    for shard, names in shards.items():
        tensors: dict[str, torch.Tensor] = {}
        with _open(source / shard) as file:
            for name in names:
                if progress is not None:
                    progress(done, total, name)
                done += 1
                if tied and name == "lm_head.weight":
                    continue
                tensor = _read(file, source / shard, name)
                if DECODER_LINEAR.search(name) and tensor.dim() == 2:
                    codes, scale = weights.quantize(tensor, target)
                    tensors[name] = codes
                    tensors[name.removesuffix("weight") + "weight_scale"] = scale
                    quantized += 1
                    continue
                tensors[name] = tensor
                module = name.removesuffix(".weight")
                if tensor.dim() == 2 and "embed" not in module and module not in ignore:
                    ignore.append(module)
        save_file(tensors, out / shard, metadata={"format": "pt"})
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        weight_map |= dict.fromkeys(tensors, shard)
    if not quantized:
        raise ValueError(
            f"{source}: has no decoder linears to quantize; expected names like "
            f"model.layers.0.self_attn.q_proj.weight, got {', '.join(list(weight_map)[:3])}, ..."
        )
    if list(shards) != [WEIGHTS]:
        _write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, out / path.name)
    _write_json(out / "config.json", config | {"quantization_config": quantization_config(ignore)})
    if progress is not None:
        progress(total, total, "")
    return quantized


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source}: has no config.json; expected a Hugging Face checkpoint directory")
    config = _read_json(path)
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = (
                config[key].get("quant_method", "unknown") if isinstance(config[key], dict) else config[key]
            )
            raise ValueError(
                f"{source}: is quantized already ({method}); give the original bf16 or fp16 checkpoint"
            )
    return config


def _shards(source: Path) -> dict[str, list[str]]:
    """Return the tensor names of every safetensors file of a checkpoint, checked against its index."""
    index = source / INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: has no weight_map; download the checkpoint again")
        files = sorted(set(weight_map.values()))
    elif (source / WEIGHTS).is_file():
        weight_map, files = {}, [WEIGHTS]
    else:
        raise ValueError(
            f"{source}: has neither {WEIGHTS} nor {INDEX}; only safetensors checkpoints can be converted"
        )
    shards = {}
    for name in files:
        if Path(name).name != name or not (source / name).is_file():
            raise ValueError(f"{source / name}: is not there though {INDEX} names it")
        with _open(source / name) as file:
            shards[name] = list(file.keys())
    missing = sorted(set(weight_map) - {name for names in shards.values() for name in names})
    if missing:
        raise ValueError(f"{source}: {INDEX} names tensors that are in no file: {', '.join(missing[:3])}")
    return shards


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is damaged or truncated ({error}); download it again") from error


def _read(file: Any, path: Path, name: str) -> torch.Tensor:
    tensor = file.get_tensor(name)
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"{path}: {name} has dtype {tensor.dtype}; expected bf16, fp16 or fp32: is it quantized already?"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: {name} holds NaN or Inf; the checkpoint is broken")
    return tensor


def _unpack_gguf(source: Path, out: Path) -> None:
    if not source.exists():
        raise ValueError(f"{source}: is not there; expected a checkpoint directory or a .gguf file")
    with source.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{source}: is no GGUF file (it begins with {magic!r}, not b'GGUF'); "
            "expected a checkpoint directory or a .gguf file"
        )
    # Heavy, and needed for GGUF alone.
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    # Newer versions keep weights in GGUF's blocks unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.bfloat16, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except ImportError as error:
        raise ValueError(
            f"{source}: reading GGUF needs the packages gguf and accelerate ({error}); "
            "pip install 'vllm-neuron-rmsq[gguf]'"
        ) from error
    except Exception as error:  # the reader raises whatever its parsing of damaged bytes trips over
        raise ValueError(f"{source}: cannot be read as a GGUF model ({error})") from error
    # transformers notes the GGUF it came from in quantization_config and in names with an underscore.
    config = {
        k: v for k, v in model.config.to_diff_dict().items() if k[0] != "_" and k != "quantization_config"
    }
    config["architectures"] = [type(model).__name__]
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file({k: v.contiguous() for k, v in state.items()}, out / WEIGHTS, metadata={"format": "pt"})
    _write_json(out / "config.json", config)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
