"""A run on the stand-in for vLLM Neuron: ``python drive.py JOBS RANKS FOLDER``.

FOLDER gets ``out.pt``: of each job what rank 0 found.

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
    aux: return the hidden states before these layers too, as Eagle3's draft model gets them.
    env: environment variables of this job.
    fails: an error may be the result.

The process finds the stand-in and its platform plugin on its path, as a
user's finds AWS's; vLLM loads both plugins, makes its configuration, and the worker registers, loads and
runs. Under VLLM_NEURON_CPU_COMPILE=1 all of it runs on meta tensors, and there are no logits.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from typing import NoReturn

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
    if job.get("aux"):
        worker.model.set_aux_hidden_state_layers(tuple(job["aux"]))
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
        "aux": torch.cat(worker.aux) if worker.aux else None,
    }


class Graphs:
    """What a compiler of vLLM Neuron's would get.

    Attributes:
        found: of each graph its nodes, see ``_seen``.
    """

    def __init__(self) -> None:
        self.found: list[list[tuple[str, list[str], list[str], bool, list[list[int]]]]] = []

    def of_dynamo(self, graph, inputs):
        """A ``torch.compile`` backend: Dynamo's graph, which torch_xla's route takes."""
        self.found.append([_seen(node) for node in graph.graph.nodes if node.op.startswith("call_")])
        return graph.forward

    def of_autograd(self, graph, inputs):
        """A ``torch.compile`` backend: AOTAutograd's graph, which the native route takes."""
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self.of_dynamo)(graph, inputs)


def _seen(node) -> tuple[str, list[str], list[str], bool, list[list[int]]]:
    """What is called, dtypes of the tensors that come and of those that go, whether our code calls it, and
    the shapes of those that go."""

    def tensors(values) -> list[torch.Tensor]:
        leaves = torch.utils._pytree.tree_leaves([v for v in values if v is not None])
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def dtypes(values) -> list[str]:
        return [str(tensor.dtype) for tensor in tensors(values)]

    came = [n.meta.get("example_value", n.meta.get("val")) for n in node.all_input_nodes]
    went = [node.meta.get("example_value", node.meta.get("val"))]
    frames = [line for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    ours = bool(frames) and "/integrations/vllm_neuron/" in frames[-1]
    return (
        re.sub(" at 0x[0-9a-f]+", "", str(node.target)),
        dtypes(came),
        dtypes(went),
        ours,
        [list(map(int, tensor.shape)) for tensor in tensors(went)],
    )


def main(jobs: str, ranks: int, folder: str) -> None:
    from vllm.plugins import load_general_plugins

    torch.set_num_threads(1)
    load_general_plugins()
    with open(jobs) as file:
        todo = json.load(file)
    # All first: a class of vLLM Neuron's that is registered is not one vLLM could configure a model by.
    configs = [attempt(job, configure, job, ranks) for job in todo]
    # Each worker in a process of its own, which has vLLM and the configurations from this one.
    for rank in range(ranks):
        if os.fork() == 0:
            work(todo, configs, rank, ranks, folder)
    for _ in range(ranks):
        if os.wait()[1]:
            sys.exit("a rank has failed")


def work(todo: list[dict], configs: list, rank: int, ranks: int, folder: str) -> NoReturn:
    """Run every job as one of the ranks, and end the process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    code = 1
    try:
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(ranks, rank, f"file://{folder}/store", rank, "gloo")
            ensure_model_parallel_initialized(ranks, 1)
        done = [
            config if isinstance(config, dict) else attempt(job, run, job, config, rank)
            for job, config in zip(todo, configs, strict=True)
        ]
        if rank == 0:
            torch.save(done, f"{folder}/out.pt")
        torch.distributed.all_reduce(torch.zeros(1))  # gloo's threads of one that ends early take others down
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(job: dict, step, *arguments):
    """Return what ``step`` returns, or for a job that may fail its error."""
    try:
        return step(*arguments)
    except Exception as error:
        if not job.get("fails"):
            raise
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
