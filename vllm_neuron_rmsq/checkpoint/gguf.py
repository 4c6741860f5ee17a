"""GGUF files: read once, by transformers, into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_neuron_rmsq.checkpoint.appearing import appearing
from vllm_neuron_rmsq.checkpoint.files import MemoryTensor, Tensor, opened, write_json
from vllm_neuron_rmsq.checkpoint.folder import WEIGHTS, require


class Unpacked:
    """The model, tokenizer and chat template of a GGUF file, in bf16.

    Args:
        source: the file.

    Attributes:
        config: ``config.json`` of the model.
        shards: its tensors, as if they were in one file.

    Raises:
        ValueError: it is no GGUF that can be read.
    """

    def __init__(self, source: Path) -> None:
        _require_gguf(source)
        # Heavy, and needed for GGUF alone.
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options: dict[str, Any] = {"gguf_file": source.name}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
            # Newer versions keep weights in GGUF's blocks unless told otherwise.
            if hasattr(transformers, "GgufConfig"):
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            self._model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **options)
        except ImportError as error:
            raise ValueError(
                f"{source}: reading GGUF needs the packages gguf and accelerate ({error}); "
                "pip install 'vllm-neuron-rmsq[gguf]'"
            ) from error
        except Exception as error:  # the reader raises whatever its parsing of damaged bytes trips over
            raise ValueError(f"{source}: cannot be read as a GGUF model ({error})") from error
        # transformers notes the GGUF it came from in quantization_config and in names with an underscore.
        self.config = {
            key: value
            for key, value in self._model.config.to_diff_dict().items()
            if key[0] != "_" and key != "quantization_config"
        }
        self.config["architectures"] = [type(self._model).__name__]
        self._state = self._model.state_dict()
        if self._model.config.tie_word_embeddings:
            self._state.pop("lm_head.weight", None)
        tensors: dict[str, Tensor] = {k: MemoryTensor(k, v) for k, v in self._state.items()}
        self.shards = {WEIGHTS: tensors}

    def load(self) -> tuple[Any, Any]:
        """Return model and tokenizer."""
        return self._model, self._tokenizer

    def save_others(self, out: Path) -> None:
        """Write what lies beside the weights: tokenizer, chat template, generation config."""
        self._model.generation_config.save_pretrained(out)
        self._tokenizer.save_pretrained(out)

    def save(self, out: Path) -> None:
        """Write it all, unquantized."""
        state = {name: tensor.contiguous() for name, tensor in self._state.items()}
        save_file(state, out / WEIGHTS, metadata={"format": "pt"})
        (out / WEIGHTS).chmod(out.stat().st_mode & 0o666)  # the library makes it private
        write_json(out / "config.json", self.config)
        self.save_others(out)


def unpack_gguf(source: Path, out: Path) -> None:
    """Write the bf16 checkpoint directory ``out`` holding the model, tokenizer and chat template of a GGUF.

    Raises:
        ValueError: ``source`` is not there or is no GGUF that can be read; or ``out`` exists.
    """
    require(source)
    with appearing(out, {"unpacked": str(source.resolve())}) as partial:
        if partial.report is None:
            Unpacked(source).save(partial.checkpoint)
            partial.complete({})


def _require_gguf(source: Path) -> None:
    with opened(source), source.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{source}: is no GGUF file (it begins with {magic!r}, not b'GGUF'); "
            "expected a checkpoint directory or a .gguf file"
        )
