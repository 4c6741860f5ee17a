"""A GGUF file of another architecture than Llama: SmolLM2's weights as a Qwen 2, for ``validate``.

Qwen 2 is Llama with biases on Q, K and V. Those of Q and K are zero here; V's are small random numbers, so
that a bias that got lost would show. Matrices are in Q8_0; tokenizer and chat template are SmolLM2's own::

    python benchmarks/qwen2_gguf.py .cache/qwen2.gguf
    vllm-neuron-rmsq validate .cache/qwen2.gguf
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from vllm_neuron_rmsq.cli import smollm2

CACHE = Path(__file__).parents[1] / ".cache"


def write(out: Path, cache: Path = CACHE) -> Path:
    """Write the file ``out`` and return its path."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        reader = gguf.GGUFReader(smollm2.gguf(cache, Path(folder)))
        writer = gguf.GGUFWriter(out, "qwen2")
        for name, field in reader.fields.items():
            if name.startswith(("GGUF.", "general.")) or name == "tokenizer.ggml.pre":
                continue
            value, *of = field.types
            key = name.replace("llama.", "qwen2.")
            writer.add_key_value(key, field.contents(), value, of[-1] if of else None)
        writer.add_tokenizer_pre("qwen2")
        heads = {"attn_q": reader.fields["llama.attention.head_count"].contents()}
        heads["attn_k"] = reader.fields["llama.attention.head_count_kv"].contents()
        random = np.random.default_rng(0)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            layer, _, part = tensor.name.removesuffix(".weight").rpartition(".")
            if part in heads:  # llama.cpp's Llama rotates neighbours of a head, its Qwen 2 halves
                values = (
                    values.reshape(heads[part], -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
                )
            if part in ("attn_q", "attn_k", "attn_v"):
                bias = random.normal(size=values.shape[0]) * (0.02 if part == "attn_v" else 0)
                writer.add_tensor(f"{layer}.{part}.bias", np.asarray(bias, np.float32))
            kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
