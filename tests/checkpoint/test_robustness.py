"""Sources and places that are not as they should be: one clear error, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from checkpoints import edit, load, write_llama

from vllm_neuron_rmsq.checkpoint import convert, files
from vllm_neuron_rmsq.checkpoint.appearing import appearing

INDEX = "model.safetensors.index.json"


def refused(source: Path, out: Path, message: str) -> None:
    """Converting fails with the message, and what was there before is all there is."""
    before = sorted(source.parent.rglob("*")), sorted(out.parent.rglob("*")) if out.parent.is_dir() else []
    with pytest.raises(ValueError, match=message):
        convert(source, out)
    after = sorted(source.parent.rglob("*")), sorted(out.parent.rglob("*")) if out.parent.is_dir() else []
    assert after == before


def test_a_full_disk_while_writing(tmp_path, monkeypatch):
    source = write_llama(tmp_path / "bf16", shards=3)
    written = 0

    def pwrite(file: int, content: memoryview, offset: int) -> int:
        nonlocal written
        written += len(content)
        if written > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)

    monkeypatch.setattr(files.os, "pwrite", pwrite)
    refused(
        source, tmp_path / "fp8", r"fp8: cannot be made \(No space left on device\); nothing of it is left"
    )


def test_a_disk_that_has_no_room(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("vllm_neuron_rmsq.checkpoint.conversion.shutil.disk_usage", lambda _: usage)
    refused(write_llama(tmp_path / "bf16"), tmp_path / "fp8", r"needs .* GB, and 1e-06 GB are free there")


def test_a_place_where_nothing_can_be_made(tmp_path):
    """``/sys`` belongs to the kernel: even root makes no directory there."""
    source = write_llama(tmp_path / "bf16")
    with pytest.raises(ValueError, match=r"/sys/fp8: cannot be made \(.*\); choose another place"):
        convert(source, Path("/sys/fp8"))


def test_a_name_that_is_too_long(tmp_path):
    source = write_llama(tmp_path / "bf16")
    for length in (250, 300):
        refused(source, tmp_path / ("n" * length), r"cannot be made \(File name too long\); .* shorter name")


def test_an_existing_link(tmp_path):
    (tmp_path / "fp8").symlink_to(tmp_path / "nowhere")
    refused(write_llama(tmp_path / "bf16"), tmp_path / "fp8", r"fp8: exists already, a link to .*nowhere")


def test_somebody_else_s_folder_is_not_touched(tmp_path):
    """Not even one that has the name of ours."""
    source = write_llama(tmp_path / "bf16")
    (tmp_path / ".fp8.partial").mkdir()
    (tmp_path / ".fp8.partial" / "thesis.txt").write_text("all of it")
    refused(source, tmp_path / "fp8", r"\.fp8\.partial: is in the way and was not made by this tool")


def test_two_at_once(tmp_path):
    source = write_llama(tmp_path / "bf16")
    with pytest.raises(KeyError), appearing(tmp_path / "fp8", {}):
        with pytest.raises(ValueError, match=r"fp8: another process is making it, in .*\.fp8\.partial"):
            convert(source, tmp_path / "fp8")
        assert (tmp_path / ".fp8.partial").is_dir(), "the other one's"
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


@pytest.mark.parametrize("value", [None, 7, ["model.safetensors"], "../model.safetensors"])
def test_index_values_that_are_no_names(tmp_path, value):
    source = write_llama(tmp_path / "bf16", shards=3)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = value
    (source / INDEX).write_text(json.dumps(index))
    refused(source, tmp_path / "fp8", r"expected the name of a file beside it for model\.norm\.weight, got ")


def test_a_shard_that_is_a_folder_is_not_called_damaged(tmp_path):
    source = write_llama(tmp_path / "bf16", shards=3)
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    shard.mkdir()
    refused(source, tmp_path / "fp8", rf"{shard.name}: expected a file, got a directory")


def test_a_read_error_half_way(tmp_path, monkeypatch):
    source = write_llama(tmp_path / "bf16")
    calls = iter(range(10))
    preadv = os.preadv

    def failing(*arguments):
        if next(calls, 10) >= 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(files.os, "preadv", failing)
    refused(source, tmp_path / "fp8", r"model\.safetensors: cannot be read \(Input/output error\)")


def test_dangling_links_in_the_source(tmp_path):
    source = write_llama(tmp_path / "bf16", shards=3)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("../blobs/gone")
    refused(source, tmp_path / "fp8", r"tokenizer\.json: is a link to \.\./blobs/gone, which is not there")
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to("../blobs/gone")
    refused(source, tmp_path / "fp8", rf"{shard.name}: is a link to \.\./blobs/gone, which is not there")
    (tmp_path / "link").symlink_to("gone")
    refused(tmp_path / "link", tmp_path / "fp8", r"link: is a link to gone, which is not there")


def test_fifos_and_sockets(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refused(
        tmp_path / "fifo", tmp_path / "fp8", r"expected a checkpoint directory or a \.gguf file, got a FIFO"
    )
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        refused(tmp_path / "socket", tmp_path / "fp8", r"got a socket")
    source = write_llama(tmp_path / "bf16")
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")
    refused(source, tmp_path / "fp8", r"model\.safetensors: expected a file, got a FIFO")
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    refused(source, tmp_path / "fp8", r"config\.json: expected a file, got a FIFO")


def test_a_hub_id_gets_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = r"hf download meta-llama/Llama-3\.1-8B --local-dir Llama-3\.1-8B"
    refused(Path("meta-llama/Llama-3.1-8B"), Path("fp8"), message)


def test_a_file_missing_from_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    with pytest.raises(ValueError, match=r"is not there; expected .* a \.gguf file$"):
        convert(Path("models/llama.gguf"), Path("fp8"))


def test_a_tokenizer_that_is_none(tmp_path):
    source = write_llama(tmp_path / "bf16")
    with pytest.raises(ValueError, match=r"bf16: cannot be loaded to calibrate it \("):
        convert(source, tmp_path / "fp8", scheme="static", calibration_text="some words")
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_other_numbers_are_copied(tmp_path):
    source = write_llama(tmp_path / "bf16")
    others = {
        "model.position_ids": torch.arange(8),
        "model.mask": torch.tensor([True, False]),
        "model.inv_freq": torch.rand(3, dtype=torch.float64),
        "model.bytes": torch.arange(3, dtype=torch.uint8),
        "model.nothing": torch.zeros(0, 4),
    }
    edit(source, others)
    convert(source, tmp_path / "fp8")
    made = load(tmp_path / "fp8")
    assert all(torch.equal(made[name], tensor) for name, tensor in others.items())


def test_integers_for_a_linear_are_refused(tmp_path):
    source = write_llama(tmp_path / "bf16")
    name = "model.layers.0.mlp.up_proj.weight"
    edit(source, {name: torch.zeros(48, 32, dtype=torch.int8)})
    refused(
        source, tmp_path / "fp8", rf"{name} has dtype I8; expected BF16, F16, F32: is it quantized already"
    )


def test_what_lies_beside_the_weights_is_kept(tmp_path):
    source = write_llama(tmp_path / "bf16")
    (source / "LICENSE").write_text("yours")
    (source / "modeling_custom.py").write_text("class Custom: ...")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / ".cache").mkdir()
    (source / ".cache" / "download.lock").write_text("")
    convert(source, tmp_path / "fp8")
    kept = {
        str(path.relative_to(tmp_path / "fp8")) for path in (tmp_path / "fp8").rglob("*") if path.is_file()
    }
    assert kept == {
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_custom.py",
        "tokenizer.json",
    }
