"""Checkpoints on the disk: convert one to FP8.

:func:`convert` makes an FP8 checkpoint of a bf16 or FP8 one or of a GGUF file, :func:`unpack_gguf` a bf16 one
of a GGUF file.
"""

from __future__ import annotations

from vllm_neuron_rmsq.checkpoint.conversion import Progress, Report, convert
from vllm_neuron_rmsq.checkpoint.gguf import unpack_gguf
from vllm_neuron_rmsq.checkpoint.stream import Layer

__all__ = ["Layer", "Progress", "Report", "convert", "unpack_gguf"]
