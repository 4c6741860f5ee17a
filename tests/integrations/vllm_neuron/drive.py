"""One rank of a run on the stand-in for vLLM Neuron: ``python drive.py JOBS RANK RANKS STORE OUT``.

JOBS is a JSON file with a list of jobs: ``model``; ``rmsq``, settings; ``tokens``, of which the first
``prompt`` are prefilled, in ``chunks`` pieces that read the cache if there are several, the others decoded
one by one; ``env``; ``engine``, more arguments; ``neuron``, vLLM Neuron's configuration; ``fails``, whether
an error is the result.

The process finds the stand-in and its platform plugin on its path, as a
user's finds AWS's; vLLM loads both plugins, makes its configuration, and the worker registers, loads and
runs.
"""

from __future__ import annotations

import json
import os
import sys

import torch

BLOCK = 32


def configure(job: dict, ranks: int):
    """Make vLLM's configuration, as its front end does: the platform's validator runs."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        tensor_parallel_size=ranks,
        additional_config={"rmsq": job.get("rmsq", {}), "neuron_config": job.get("neuron", {})},
        **job.get("engine", {}),
    ).create_engine_config()


def run(job: dict, config, rank: int) -> dict:
    """Register, load and run tokens through the model, as a worker does."""
    from vllm_neuron.parallel.neuron_communicator import WIRE
    from vllm_neuron.vllm.worker.neuron_worker import NeuronWorker

    from vllm_neuron_rmsq import backends

    os.environ.update(job.get("env", {}))
    backends.resolve.cache_clear()
    worker = NeuronWorker(config, rank=rank)
    worker.load_model()
    worker.bind_cache(batch=1, block_size=BLOCK, max_blocks=128 // BLOCK)
    tokens, prompt, chunks = job["tokens"], job["prompt"], job.get("chunks", 1)
    WIRE.clear()
    logits = []
    step = prompt // chunks
    for start in range(0, prompt, step):
        segment = BLOCK if chunks > 1 else None
        logits.append(worker.prefill(0, tokens[start : start + step], start=start, segment=segment))
    wire = list(WIRE)
    logits += [worker.decode([[token]], [prompt + i]) for i, token in enumerate(tokens[prompt:])]
    return {
        "logprobs": torch.log_softmax(torch.cat(logits).float(), dim=-1),
        "wire": [(name, str(dtype), count) for name, dtype, count in wire],
        "report": str(getattr(worker.model, "rmsq_report", None)),
        "class": type(worker.model).__name__,
        "architecture": config.model_config.architecture,
    }


def main(jobs: str, rank: int, ranks: int, store: str, out: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.plugins import load_general_plugins

    torch.set_num_threads(1)
    load_general_plugins()
    with open(jobs) as file:
        todo = json.load(file)
    # All first: a class of vLLM Neuron's that is registered is not one vLLM could configure a model by.
    configs = [attempt(job, configure, job, ranks) for job in todo]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(ranks, rank, f"file://{store}", rank, "gloo")
        ensure_model_parallel_initialized(ranks, 1)
    done = [
        config if isinstance(config, dict) else attempt(job, run, job, config, rank)
        for job, config in zip(todo, configs, strict=True)
    ]
    if rank == 0:
        torch.save(done, out)


def attempt(job: dict, step, *arguments):
    """Return what ``step`` returns, or for a job that may fail its error."""
    try:
        return step(*arguments)
    except Exception as error:
        if not job.get("fails"):
            raise
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
