"""Acceptance on AWS's software and hardware, in four steps, from the one that needs least to the real thing.

    python benchmarks/neuron_acceptance.py kernels          # the SDK's own simulator; no device
    python benchmarks/neuron_acceptance.py cpu-mode         # a tiny model through vLLM Neuron on a CPU
    python benchmarks/neuron_acceptance.py compile          # the compiler on that model's graphs; no device
    python benchmarks/neuron_acceptance.py hardware --model CHECKPOINT [--bf16 ...] [--static-fp8 ...]

Each prints what passed and adds it to one JSON file (``--out``) to attach to an issue; the exit code is 1
where something failed. docs/neuron.md says what each step needs.

Where there is no Neuron SDK, ``kernels`` runs on our simulator and ``cpu-mode`` on vLLM for CPU: that is how
the script itself is tested, and the JSON file says so.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

PACKAGES = (
    "vllm-neuron-rmsq",
    "vllm-neuron",
    "vllm",
    "torch",
    "torch-neuronx",
    "libtorch-neuronx-lite",
    "neuronx-cc",
    "nki",
    "nki-library",
)
SCALE_RTOL = 2.0**-7
CODES_OFF = 0.02
"""What the contract allows NKI kernels: scales within 2^-7, codes one step off on at most 2 %."""

MARGIN = 0.6
"""Two first choices of a model, in nats, that are nearer than this may change places by rounding: twice the
most that a relative noise of 2^-8 on each matmul's result moved a log-probability of the tiny model."""

RANKS = (1, 2)
BACKENDS = ("torch", "cpu", "nki-sim")
"""Of CPU mode; the first is what the others are held to."""

BATCHES = (1, 8, 32)
DECODED = 64
PLACES = 64

Out = Annotated[Path, typer.Option(help="JSON file the results are added to.")]
OUT = Path("neuron_acceptance.json")


# -- what every step does ----------------------------------------------------------------------------


class Results:
    """Checks of one step: printed as they end, kept in a JSON file beside those of other steps."""

    def __init__(self, step: str, out: Path) -> None:
        self.step, self.out = step, out
        self.checks: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Run the block as a check; what it puts into the dictionary is kept with the verdict."""
        details: dict[str, Any] = {}
        start, error = time.perf_counter(), ""
        try:
            yield details
        except Exception as problem:  # the next check may pass all the same
            error = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            details["traceback"] = traceback.format_exc()
        seconds = time.perf_counter() - start
        verdict = "[red]failed[/red]" if error else "[green]passed[/green]"
        console.print(f"{verdict} {name} ({seconds:.1f} s)", highlight=False)
        if error:
            console.print(error, markup=False, highlight=False)
        self.checks.append(
            {"name": name, "passed": not error, "error": error, "seconds": round(seconds, 2), **details}
        )

    def close(self) -> None:
        """Add the step to the file, complete or not at all, and end the program with its verdict."""
        content: dict[str, Any] = json.loads(self.out.read_text()) if self.out.exists() else {"steps": {}}
        content["machine"] = {"platform": platform.platform(), "python": platform.python_version()}
        content["packages"] = {name: _version(name) for name in PACKAGES}
        content["environment"] = {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("NEURON_", "NKI_", "VLLM_"))
        }
        now = datetime.now(UTC).isoformat(timespec="seconds")
        content["steps"][self.step] = {"date": now, "checks": self.checks}
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.out)
        passed = sum(check["passed"] for check in self.checks)
        console.print(f"{passed} passed, {len(self.checks) - passed} failed; {self.out}", highlight=False)
        raise typer.Exit(0 if self.checks and passed == len(self.checks) else 1)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def generate(job: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Run ``LLM`` in a process of its own, as a user's program does, and return what it found.

    Args:
        job: ``engine``, arguments of ``LLM``; ``prompts``, lists of token ids; ``max_tokens``; ``logprobs``;
            ``timed``, batch sizes to time instead.
        environment: more variables.

    Raises:
        RuntimeError: the process failed; the message has the first error of its log, and the log's end.
    """
    default = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; vLLM for CPU would take most of the memory
    with tempfile.TemporaryDirectory() as folder:
        job_file, out, log = (Path(folder) / name for name in ("job.json", "out.json", "log.txt"))
        job_file.write_text(json.dumps(job))
        with log.open("w") as stream:
            done = subprocess.run(
                [sys.executable, __file__, "run-engine", str(job_file), str(out)],
                env=default | os.environ | {"VLLM_LOGGING_LEVEL": "INFO"} | environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
        text = log.read_text(errors="replace")
        if done.returncode:
            errors = [line for line in text.splitlines() if re.search(r"\b\w*Error: ", line)]
            cause = errors[0] if errors else "its log names no error"
            raise RuntimeError(f"the engine ended with {done.returncode}: {cause}\n{text[-8000:]}")
        result = json.loads(out.read_text())
        result["report"] = [line for line in text.splitlines() if re.search("(layers|norms) fused", line)]
        return result


def _require_report(run: dict[str, Any]) -> None:
    if not run["report"]:
        raise ValueError("expected the plugin's start-up line in the log, found none")


@app.command(hidden=True)
def run_engine(job_file: Path, out: Path) -> None:
    """The other process of :func:`generate`."""
    from vllm import LLM, SamplingParams

    job = json.loads(job_file.read_text())
    start = time.perf_counter()
    llm = LLM(**job["engine"])
    result: dict[str, Any] = {"start_seconds": time.perf_counter() - start}
    prompts = [{"prompt_token_ids": tokens} for tokens in job.get("prompts", [])]
    if "timed" in job:
        result["times"] = {batch: _time(llm, prompts[0], batch, job["max_tokens"]) for batch in job["timed"]}
        result["device_bytes"] = device_bytes()
    elif prompts:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=job["max_tokens"], logprobs=job.get("logprobs", 2), ignore_eos=True
        )
        result["outputs"] = [
            {
                "tokens": list(request.outputs[0].token_ids),
                "logprobs": [
                    {str(token): found.logprob for token, found in step.items()}
                    for step in request.outputs[0].logprobs
                ],
            }
            for request in llm.generate(prompts, sampling, use_tqdm=False)
        ]
    out.write_text(json.dumps(result))


def _time(llm: Any, prompt: dict[str, Any], batch: int, tokens: int) -> dict[str, float]:
    """Median seconds to the first token of ``batch`` prompts at once, and between tokens after it."""
    from vllm import SamplingParams

    def seconds(count: int, salt: int) -> float:
        # Prompts of their own, so that none is found in the prefix cache.
        ids = prompt["prompt_token_ids"]
        prompts = [
            {"prompt_token_ids": [ids[(i + salt * batch + j + 1) % len(ids)] for i in range(len(ids))]}
            for j in range(batch)
        ]
        start = time.perf_counter()
        llm.generate(
            prompts, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), use_tqdm=False
        )
        return time.perf_counter() - start

    seconds(2, 0)
    salts = itertools.count(1)
    first = statistics.median(seconds(1, next(salts)) for _ in range(3))
    whole = statistics.median(seconds(tokens, next(salts)) for _ in range(3))
    return {"first_token_s": first, "between_tokens_s": (whole - first) / max(1, tokens - 1)}


def device_bytes() -> int | None:
    """Bytes of device memory in use by all Neuron processes, as ``neuron-monitor`` says, or ``None``."""
    try:
        with subprocess.Popen(["neuron-monitor"], stdout=subprocess.PIPE, text=True) as monitor:
            assert monitor.stdout is not None
            line = monitor.stdout.readline()
            monitor.terminate()
    except OSError:
        return None
    return sum(
        runtime["report"]["memory_used"]["neuron_runtime_used_bytes"]["neuron_device"]
        for runtime in json.loads(line)["neuron_runtime_data"]
    )


def same_choices(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare greedy outputs, each as far as both had the same tokens before.

    Returns:
        how many first choices were compared and how far logprobs were apart.

    Raises:
        ValueError: a first choice differs although it led by more than ``MARGIN``.
    """
    compared, distances = 0, [0.0]
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for i, (mine, other) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            compared += 1
            both = a["logprobs"][i].keys() & b["logprobs"][i].keys()
            distances += [abs(a["logprobs"][i][t] - b["logprobs"][i][t]) for t in both]
            if mine == other:
                continue
            first, second = sorted(b["logprobs"][i].values(), reverse=True)[:2]
            if first - second > MARGIN:
                raise ValueError(
                    f"prompt {number}, token {i}: expected {other}, which leads by {first - second:.2f}, "
                    f"got {mine}"
                )
            break  # from here on the texts are different ones
    return {"choices_compared": compared, "largest_logprob_distance": max(distances)}


# -- the steps ---------------------------------------------------------------------------------------


@app.command()
def kernels(out: Out = OUT) -> None:
    """(1) Every NKI kernel in the SDK's own simulator, on both numbers of cores, against the contract."""
    import torch

    from vllm_neuron_rmsq import ops, packed, reference

    sdk = importlib.util.find_spec("nki") is not None and importlib.util.find_spec("nki.isa") is not None
    simulator = "AWS's" if sdk else "ours: the Neuron SDK is not installed"
    results = Results("kernels", out)
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).bfloat16()

    for cores in ("1", "2"):
        os.environ["NEURON_LOGICAL_NC_CONFIG"] = cores
        for t, h in ((1, 256), (2, 4096), (130, 576), (257, 2048)):
            hidden, residual, gamma = rows(t, h), rows(t, h), rows(h)
            where = f"[{t}, {h}], LNC {cores}"
            with results.check(f"rms_norm_quant {where}") as details:
                got = ops.rms_norm_quant(hidden, gamma, backend="nki-sim")
                want = reference.rms_norm_quant(hidden, gamma)
                details |= {"simulator": simulator} | _within_contract(packed, got, want)
            with results.check(f"add_rms_norm_quant {where}") as details:
                both = ops.rms_norm_quant(hidden, gamma, residual=residual, backend="nki-sim")
                wanted = reference.rms_norm_quant(hidden, gamma, residual=residual)
                details |= {"simulator": simulator} | _within_contract(packed, both[0], wanted[0])
            with results.check(f"silu_mul_quant {where}") as details:
                got = ops.silu_mul_quant(hidden, backend="nki-sim")
                want = reference.silu_mul_quant(hidden)
                details |= {"simulator": simulator} | _within_contract(packed, got, want)
        for t, h, n in ((1, 256, 384), (64, 576, 1280), (200, 1024, 512)):
            codes: Any = reference.rms_norm_quant(rows(t, h), None)
            weight = (torch.randn(n, h, generator=generator) * 60).clamp(-240, 240).to(torch.float8_e4m3fn)
            scale = torch.rand(n, generator=generator) + 0.1
            with results.check(f"packed_fp8_linear [{t}, {h}] x {n}, LNC {cores}") as details:
                product = ops.packed_fp8_linear(codes, weight, scale, backend="nki-sim").double()
                exact = packed.dequantize(codes).double() @ (weight.double() * scale.double()[:, None]).t()
                error = float((product - exact).abs().max() / exact.abs().max())
                details["largest_error"] = error
                if not error <= 2.0**-7:
                    raise ValueError(f"expected results within 2^-7 of the largest, got {error:.2e}")
    results.close()


def _within_contract(packed: Any, got: Any, want: Any) -> dict[str, float]:
    codes, scale = packed.unpack(got)
    expected, expected_scale = packed.unpack(want)
    scale_error = float(((scale - expected_scale).abs() / expected_scale).max())
    if not scale_error <= SCALE_RTOL:
        raise ValueError(f"expected scales within 2^-7, got one {scale_error:.2e} off")

    def ordinal(codes: Any) -> Any:
        magnitude = (codes & 0x7F).int()
        return magnitude.where(codes < 128, -magnitude)

    steps = (ordinal(codes) - ordinal(expected)).abs()
    off = float((steps > 0).float().mean())
    if int(steps.max()) > 1 or off > CODES_OFF:
        raise ValueError(
            f"expected codes one step off on at most 2 %, got {int(steps.max())} steps, {off:.1%}"
        )
    return {"scale_error": scale_error, "codes_off": off}


@app.command()
def cpu_mode(out: Out = OUT) -> None:
    """(2) A tiny model through vLLM Neuron in CPU mode, on one rank and two: each backend against torch."""
    neuron = _version("vllm-neuron") is not None
    results = Results("cpu-mode", out)
    environment = {"VLLM_NEURON_CPU_MODE": "1"} if neuron else {}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_checkpoint(Path(folder))
        prompts = [[(7 * i + 3 * j) % 250 + 3 for i in range(16)] for j in range(2)]
        for ranks in RANKS:
            found: dict[str, Any] = {}
            if not neuron:  # vLLM for CPU gives each rank a NUMA node, and fails where there are fewer
                cores = sorted(os.sched_getaffinity(0))
                bound = (str(cores[rank % len(cores)]) for rank in range(ranks))
                environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(bound)
            for backend in (*BACKENDS, *(("nki",) if neuron else ())):
                with results.check(f"cpu mode, {ranks} rank(s), backend {backend}") as details:
                    details["platform"] = "vLLM Neuron" if neuron else "vLLM for CPU: no Neuron SDK"
                    job = {
                        "engine": tiny_engine(model, ranks, neuron) | {"enforce_eager": True},
                        "prompts": prompts,
                        "max_tokens": 12,
                    }
                    simulator = {"NKI_SIMULATOR": "1"} if backend == "nki" else {}
                    run = generate(job, VLLM_RMSQ_BACKEND=backend, **environment, **simulator)
                    found[backend] = run["outputs"]
                    details["report"] = run["report"]
                    _require_report(run)
                    if backend != "torch" and "torch" in found:
                        details |= same_choices(run["outputs"], found["torch"])
    results.close()


@app.command("compile")
def compile_only(
    out: Out = OUT, target: Annotated[str, typer.Option(help="Platform to compile for.")] = "trn2"
) -> None:
    """(3) The tiny model's graphs through neuronx-cc on any x86 host: the cheapest decisive test."""
    results = Results("compile", out)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_checkpoint(Path(folder))
        for attention in ("bf16", "fp8-prefill", "fp8"):
            for route in ("neuron_native", "xla"):
                with results.check(f"compile, attention {attention}, route {route}") as details:
                    if _version("vllm-neuron") is None:
                        raise RuntimeError("vllm-neuron is not installed; install AWS's Neuron SDK first")
                    run = generate(
                        {"engine": tiny_engine(model, 1, True)},
                        VLLM_NEURON_CPU_COMPILE="1",
                        NEURON_PLATFORM_TARGET_OVERRIDE=target,
                        NEURON_LIBTORCH_DISABLE_COMPILE_CACHE="1",
                        TORCH_CACHING_PRECOMPILE="0",
                        VLLM_NEURON_BACKEND=route,
                        VLLM_RMSQ_ATTENTION=attention,
                        VLLM_RMSQ_BACKEND="nki",
                    )
                    details |= run
                    _require_report(run)
    results.close()


@app.command()
def hardware(
    model: Annotated[str, typer.Option(help="An FP8-dynamic Llama checkpoint, 8B for example.")],
    bf16: Annotated[str | None, typer.Option(help="The same model in bf16.")] = None,
    static_fp8: Annotated[str | None, typer.Option(help="The same in ModelOpt's static FP8.")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks.")] = 8,
    max_model_len: Annotated[int, typer.Option(help="Longest sequence.")] = 4096,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompts that are timed.")] = 1024,
    reference: Annotated[bool, typer.Option(help="Compare with backend torch in CPU mode, slow.")] = True,
    out: Out = OUT,
) -> None:
    """(4) A real checkpoint on a Trainium2: tokens, loss, times and memory, beside bf16 and static FP8."""
    results = Results("hardware", out)
    text = documentation(model)
    engine: dict[str, Any] = {"tensor_parallel_size": tensor_parallel, "max_model_len": max_model_len}
    prompts = [text[500 * i : 500 * i + 200] for i in range(4)]
    greedy: dict[str, Any] = {"engine": engine | {"model": model}, "prompts": prompts, "max_tokens": 32}
    tokens: list[dict[str, Any]] = []
    with results.check("starts, and says what it took over") as details:
        run = generate(greedy)
        tokens = run["outputs"]
        details |= {"report": run["report"], "start_seconds": run["start_seconds"]}
        _require_report(run)
    if reference:
        with results.check("greedy tokens against backend torch") as details:
            cpu = {"VLLM_NEURON_CPU_MODE": "1", "VLLM_RMSQ_BACKEND": "torch"}
            greedy_on_cpu = greedy | {"engine": engine | {"model": model, "enforce_eager": True}}
            details |= same_choices(tokens, generate(greedy_on_cpu, **cpu)["outputs"])
    sides = {"FP8-dynamic, this plugin": model, "bf16, stock": bf16, "ModelOpt static FP8, stock": static_fp8}
    table = Table(
        "side", "batch", "first token, ms", "between tokens, ms", "next-token loss", "device, GB",
        title=f"{prompt_tokens} prompt tokens, TP {tensor_parallel}",
    )  # fmt: skip
    for side, checkpoint in sides.items():
        if checkpoint is None:
            continue
        with results.check(f"loss, times and memory: {side}") as details:
            details["next_token_loss"] = next_token_loss(engine | {"model": checkpoint}, text)
            job = {
                "engine": engine | {"model": checkpoint, "max_num_seqs": max(BATCHES)},
                "prompts": [text[:prompt_tokens]],
                "max_tokens": DECODED,
                "timed": list(BATCHES),
            }
            run = generate(job)
            details |= {"times": run["times"], "device_bytes": run["device_bytes"]}
            for batch, times in run["times"].items():
                used = run["device_bytes"]
                table.add_row(
                    side,
                    str(batch),
                    f"{1e3 * times['first_token_s']:.1f}",
                    f"{1e3 * times['between_tokens_s']:.2f}",
                    f"{details['next_token_loss']:.4f}",
                    "?" if used is None else f"{used / 1e9:.1f}",
                )
    console.print(table)
    results.close()


def tiny_checkpoint(folder: Path) -> str:
    """Write a tiny FP8-dynamic Llama of random weights, and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from vllm_neuron_rmsq.checkpoint import convert

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.15,  # so that first choices lead by more than rounding
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "bf16")
    convert(folder / "bf16", folder / "fp8")
    return str(folder / "fp8")


def tiny_engine(model: str, ranks: int, neuron: bool) -> dict[str, Any]:
    """Return ``LLM``'s arguments for the tiny model."""
    engine: dict[str, Any] = {
        "model": model,
        "tensor_parallel_size": ranks,
        "max_num_seqs": 2,
        "max_model_len": 128,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    if neuron:
        engine["block_size"] = 128
        engine["num_gpu_blocks_override"] = 4
        engine["additional_config"] = {"neuron_config": {"num_batched_tokens_buckets": [16, 128]}}
    return engine


def documentation(model: str) -> list[int]:
    """Return CPython's own documentation of its language as the model's tokens."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)("\n".join(topics.values()))["input_ids"]


def next_token_loss(engine: dict[str, Any], text: list[int]) -> float:
    """Mean negative log-likelihood of the next token at ``PLACES`` places of the text, in nats.

    vLLM Neuron gives no logprobs of prompts, so each place is a prompt of 256 tokens and one token generated.
    A token beyond the 20 most likely counts as the 20th.
    """
    step = (len(text) - 257) // PLACES
    starts = [i * step for i in range(PLACES)]
    job = {"engine": engine, "prompts": [text[s : s + 256] for s in starts], "max_tokens": 1, "logprobs": 20}
    losses = []
    for start, output in zip(starts, generate(job)["outputs"], strict=True):
        found = output["logprobs"][0]
        losses.append(-found.get(str(text[start + 256]), min(found.values())))
    return math.fsum(losses) / len(losses)


if __name__ == "__main__":
    app()
