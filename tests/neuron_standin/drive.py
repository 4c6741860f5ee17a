"""One rank of a run on the stand-in for vLLM Neuron: ``python drive.py JOBS RANK RANKS STORE OUT``.

JOBS is a JSON file with a list of jobs:
    model: the checkpoint's folder.
    rmsq, neuron, engine: settings of ours, of vLLM Neuron's, of vLLM's engine.
    tokens: of which the first ``prompt`` are prefilled, the others decoded, ``new`` at a time.
    chunks: prefill in so many pieces, which read the cache.
    shared: so many tokens of the prompt are another sequence's, prefilled before (prefix caching).
    bucket: prefill is padded to so many tokens.
    context: what the KV cache holds of a sequence.
    given: return the log-probability of each token but the first alone.
    parameters: return those of rank 0.
    compile: ``dynamo`` or ``autograd``: record the graphs.
    env: environment variables of this job.
    fails: an error may be the result.

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
        additional_config={"rmsq": job.get("rmsq", {}), "neuron_config": job.get("neuron", {})},
        **{"max_model_len": 128, "tensor_parallel_size": ranks, **job.get("engine", {})},
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
    graphs = Graphs()
    if job.get("compile"):
        torch._dynamo.reset()
        backend = graphs.of_dynamo if job["compile"] == "dynamo" else graphs.of_autograd
        worker.call = torch.compile(worker.model, backend=backend, fullgraph=True, dynamic=False)
    worker.bind_cache(batch=2, block_size=BLOCK, max_blocks=job.get("context", 128) // BLOCK)
    tokens, prompt, chunks, shared = job["tokens"], job["prompt"], job.get("chunks", 1), job.get("shared", 0)
    WIRE.clear()
    logits = []
    if shared:  # another sequence has computed these, and its blocks are read
        logits.append(worker.prefill(1, tokens[:shared]))
        worker.table[0, : shared // BLOCK] = worker.table[1, : shared // BLOCK]
    step = (prompt - shared) // chunks
    for start in range(shared, prompt, step):
        segment = BLOCK if chunks > 1 or shared else None
        part = tokens[start : start + step]
        logits.append(worker.prefill(0, part, start=start, bucket=job.get("bucket"), segment=segment))
    wire = list(WIRE)
    new = job.get("new", 1)
    logits += [worker.decode([tokens[i : i + new]], [i]) for i in range(prompt, len(tokens), new)]
    logprobs = torch.log_softmax(torch.cat(logits).float(), dim=-1)
    if job.get("given"):
        logprobs = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return {
        "logprobs": logprobs,
        "wire": [(name, str(dtype), count) for name, dtype, count in wire],
        "report": str(getattr(worker.model, "rmsq_report", None)),
        "class": type(worker.model).__name__,
        "architecture": config.model_config.architecture,
        "graphs": graphs.found,
        "parameters": dict(worker.model.named_parameters()) if job.get("parameters") else {},
    }


class Graphs:
    """What a compiler of vLLM Neuron's would get.

    Attributes:
        found: of each graph its nodes, see ``_seen``.
    """

    def __init__(self) -> None:
        self.found: list[list[tuple[str, list[str], list[str], bool]]] = []

    def of_dynamo(self, graph, inputs):
        """A ``torch.compile`` backend: Dynamo's graph, which torch_xla's route takes."""
        self.found.append([_seen(node) for node in graph.graph.nodes if node.op.startswith("call_")])
        return graph.forward

    def of_autograd(self, graph, inputs):
        """A ``torch.compile`` backend: AOTAutograd's graph, which the native route takes."""
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self.of_dynamo)(graph, inputs)


def _seen(node) -> tuple[str, list[str], list[str], bool]:
    """What is called, dtypes of the tensors that come and of those that go, and whether our code calls it."""

    def dtypes(values) -> list[str]:
        tensors = torch.utils._pytree.tree_leaves([v for v in values if v is not None])
        return [str(t.dtype) for t in tensors if isinstance(t, torch.Tensor)]

    came = [n.meta.get("example_value", n.meta.get("val")) for n in node.all_input_nodes]
    frames = [line for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    ours = bool(frames) and "/integrations/vllm_neuron/" in frames[-1]
    return (
        str(node.target),
        dtypes(came),
        dtypes([node.meta.get("example_value", node.meta.get("val"))]),
        ours,
    )


def main(jobs: str, rank: int, ranks: int, store: str, out: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
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
    torch.distributed.barrier()  # gloo's threads of a rank that ends early take the others down
    destroy_model_parallel()
    destroy_distributed_environment()


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
