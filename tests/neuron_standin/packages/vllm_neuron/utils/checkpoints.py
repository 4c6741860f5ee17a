"""Reads safetensors files: parameters only, and every key that is asked for must be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from .weight_loader import get_weight_loader


class CheckpointLoadResult(NamedTuple):
    state_dict: dict[str, torch.Tensor]
    missing_keys: list[str]
    unexpected_keys: list[str]


class SafetensorsCheckpoint:
    def __init__(self, model_name_or_path: str, cache_dir: str | None = None) -> None:
        folder = Path(model_name_or_path)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        assert names, f"No .safetensors files found for {model_name_or_path}"
        self._files = [folder / name for name in names]
        self._tensor_name_to_file: dict[str, Path] = {}
        self._open: dict[Path, object] = {}

    def _ensure_indexed(self) -> None:
        for path in self._files:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
                self._tensor_name_to_file.update(dict.fromkeys(self._open[path].keys(), path))

    def get_tensor_names(self) -> set[str]:
        self._ensure_indexed()
        return set(self._tensor_name_to_file)

    def _get_slice(self, name: str):
        return self._open[self._tensor_name_to_file[name]].get_slice(name)

    def load_sharded_pipelined(
        self,
        rank: int,
        world_size: int,
        model: torch.nn.Module,
        mappings: dict[str, str | list[str]],
        device: torch.device,
        dtype_override: dict[str, torch.dtype] | None = None,
        strict: bool = True,
    ) -> CheckpointLoadResult:
        self._ensure_indexed()
        state: dict[str, torch.Tensor] = {}
        wanted: set[str] = set()
        for name, parameter in model.named_parameters():
            keys = mappings.get(name, name)
            keys = keys if isinstance(keys, list) else [keys]
            wanted.update(keys)
            missing = [key for key in keys if key not in self._tensor_name_to_file]
            if missing:
                raise RuntimeError(
                    f"Checkpoint key(s) not found for parameter '{name}': {missing}. "
                    "Use strict=False to skip missing keys."
                )
            tensor = get_weight_loader(parameter).load([self._get_slice(key) for key in keys], rank)
            state[name] = tensor.to((dtype_override or {}).get(name, parameter.dtype)).to(device)
        return CheckpointLoadResult(state, [], [k for k in self._tensor_name_to_file if k not in wanted])
