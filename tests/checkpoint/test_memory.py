"""Memory does not grow with the checkpoint: what ``quantize`` and ``inspect`` promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS, FEATURES = 8, 8192
"""A linear each, of bf16 zeros, which take no room on the disk: 1.07 GB to read."""

PROGRAM = """
import re, sys
from pathlib import Path
from vllm_neuron_rmsq.checkpoint import convert, inspect
source, out = map(Path, sys.argv[1:])
assert len(convert(source, out).layers) == {layers}
assert len(inspect(out).weights) == {layers}
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def write_zeros(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))
    size = FEATURES * FEATURES * 2
    about = {"dtype": "BF16", "shape": [FEATURES, FEATURES]}
    header = json.dumps(
        {
            f"model.layers.{i}.self_attn.o_proj.weight": about | {"data_offsets": [i * size, (i + 1) * size]}
            for i in range(LAYERS)
        }
    ).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + LAYERS * size)
    return folder


@pytest.mark.engine  # another program
def test_a_gigabyte_is_read_in_less_than_half_of_it(tmp_path):
    """Python and torch included."""
    source = write_zeros(tmp_path / "bf16")
    program = PROGRAM.format(layers=LAYERS)
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "fp8")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 500e6
