"""Ways of running vLLM in several processes, each rank on a core of its own, beside the plugin without it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import modes
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FUSED = "4 of 5 RMSNorm layers fused (backend cpu, target trn2), 8 packed FP8 linears"


@pytest.fixture(autouse=True)
def _ranks(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send modes.report
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", modes.one_core_a_rank())
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm-cache"))


def test_pipeline_parallel(tiny, prove, monkeypatch):
    """Compiled, beside one rank compiled."""
    arguments = {"enforce_eager": False, "enable_prefix_caching": False}
    with modes.engine(tiny, pipeline_parallel_size=2, **arguments) as llm:
        reports = llm.apply_model(modes.report)
        two = modes.answers(llm)
    assert [line[: len("2 of 2 RMSNorm layers fused")] for line in reports] == [
        "2 of 2 RMSNorm layers fused",
        "2 of 3 RMSNorm layers fused",
    ]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", modes.one_core_a_rank().partition("|")[0])
    with modes.engine(tiny, **arguments) as llm:
        one = modes.answers(llm)
    assert two == one
    prove("pipeline parallel 2, compiled", "as without", modes.SAME)


def test_data_parallel(tiny, plain, prove):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def ask(llm, rank: int):
        outputs = []
        for number, ids in enumerate(modes.PROMPTS):
            async for output in llm.generate(
                {"prompt_token_ids": ids},
                modes.parameters(),
                request_id=f"{rank} {number}",
                data_parallel_rank=rank,
            ):
                last = output
            outputs.append(last)
        return modes.collect(outputs)

    async def run():
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(tiny), data_parallel_size=2, **modes.TINY))
        try:
            lines = await llm.collective_rpc("apply_model", args=(modes.report,))
            assert lines and all(line.startswith(FUSED) for line in lines)
            return [await ask(llm, rank) for rank in (0, 1)]
        finally:
            llm.shutdown()

    first, second = asyncio.run(run())
    assert first == second == plain
    prove("data parallel 2", "as without", modes.SAME)


def test_two_nodes(tiny, prove, monkeypatch, tmp_path):
    """``--nnodes 2``, tensor parallel, both on this machine."""
    with modes.engine(tiny, tensor_parallel_size=2) as llm:
        together = modes.answers(llm)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = modes.one_core_a_rank().split("|")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(tiny), "--headless"]
    command += ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command += ["--tensor-parallel-size", "2", "--skip-tokenizer-init", "--enforce-eager"]
    command += ["--max-model-len", "128", "--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20)]
    log = tmp_path / "second.log"
    with log.open("w") as out:
        second = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"VLLM_CPU_OMP_THREADS_BIND": cores[1], "PYTHONPATH": str(Path(modes.__file__).parent)},
            start_new_session=True,
        )
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", cores[0])
    nodes = {"nnodes": 2, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": port}
    try:
        with modes.engine(tiny, tensor_parallel_size=2, distributed_executor_backend="mp", **nodes) as llm:
            assert all(line.startswith(FUSED) for line in llm.apply_model(modes.report))
            assert modes.answers(llm) == together
    finally:
        second.terminate()
        second.wait(60)
    prove("--nnodes 2, tensor parallel", "as without", "the bits of two ranks on one node")


def test_sharded_state(tiny, prove, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    with modes.engine(tiny, tensor_parallel_size=2) as llm:
        before = modes.answers(llm)
        llm.llm_engine.engine_core.save_sharded_state(str(saved), pattern=None, max_size=None)
    shutil.copy(tiny / "config.json", saved)
    with modes.engine(saved, tensor_parallel_size=2, load_format="sharded_state") as llm:
        assert llm.apply_model(modes.report) == 2 * [f"{FUSED} (per-token); 2 of 2 SiluAndMul layers fused"]
        assert modes.answers(llm) == before
    prove("sharded_state saved and loaded, tensor parallel", "as without", modes.SAME)
