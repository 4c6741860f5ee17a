"""Checkpoints on the disk: convert one to FP8, say what is in one.

:func:`convert` makes an FP8 checkpoint of a bf16 or FP8 one or of a GGUF file, :func:`unpack_gguf` a bf16 one
of a GGUF file. :func:`inspect` reads any checkpoint and says how its linears are quantized and what is wrong.
"""

from __future__ import annotations

from vllm_neuron_rmsq.checkpoint.conversion import Report, convert
from vllm_neuron_rmsq.checkpoint.gguf import unpack_gguf
from vllm_neuron_rmsq.checkpoint.inspection import Inspection, Weight, inspect
from vllm_neuron_rmsq.checkpoint.stream import Layer, Progress

__all__ = [
    "Inspection",
    "Layer",
    "Progress",
    "Report",
    "Weight",
    "convert",
    "inspect",
    "unpack_gguf",
]
