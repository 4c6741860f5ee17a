"""A real ``vllm serve`` with the plugin, and the ``openai`` client: eager and compiled."""

from __future__ import annotations

import concurrent.futures
import os
import time

import openai
import pytest
import requests
from servers import Server

import vllm_neuron_rmsq
from vllm_neuron_rmsq.backends import cpu

QUESTION = "Complete: The capital of France is"  # a question with a clear answer: see test_offline.py
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=[["--enforce-eager"], []], ids=["eager", "compiled"])
def server(request, smollm2_fp8, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # Prompts longer than 256 tokens are prefilled in chunks; prefix caching is on by default.
    arguments = [*request.param, "--max-model-len", "1024", "--max-num-batched-tokens", "256"]
    server = Server(smollm2_fp8, folder, *arguments, "--max-num-seqs", "16")
    try:
        server.wait()
        yield server
        assert server.stop() == []
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, 9)


def test_reports_the_fused_layers(server):
    assert "60 of 61 RMSNorm layers fused (backend cpu, target trn2), 120 packed FP8 linears" in server.text()
    assert "120 packed FP8 linears (per-token); 30 of 30 SiluAndMul layers fused" in server.text()
    assert "Unknown vLLM environment variable" not in server.text()


def test_chat(server):
    assert server.ask(QUESTION).startswith("The capital of France is Paris.")


def test_completions(server):
    reply = server.client.completions.create(
        model="smollm2", prompt="One, two, three, four,", max_tokens=8, temperature=0
    )
    assert "five" in reply.choices[0].text


def test_streaming(server):
    question = [{"role": "user", "content": QUESTION}]
    stream = server.client.chat.completions.create(
        model="smollm2", messages=question, max_tokens=16, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 4
    assert "".join(pieces).startswith("The capital of France is Paris.")


def test_sixteen_at_once(server):
    capitals = {"Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens"}
    countries = list(capitals) * 4
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda c: server.ask(f"What is the capital of {c}?"), countries))
    for country, answer in zip(countries, answers, strict=True):
        assert capitals[country] in answer


def test_chunked_prefill_and_prefix_caching(server):
    prompt = "one, two, three, four, five. " * 80 + "one, two, three,"
    for _ in range(2):  # the second time from cached blocks
        reply = server.client.completions.create(model="smollm2", prompt=prompt, max_tokens=4, temperature=0)
        assert reply.usage.prompt_tokens > 2 * 256
        assert reply.choices[0].text.startswith(" four, five")


def test_metrics(server):
    """What vLLM's own ``/metrics`` says of the plugin: gauges of the loaded model, counters that go on."""

    def metrics() -> dict[str, float]:
        text = requests.get(f"http://127.0.0.1:{server.port}/metrics", timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:rmsq_")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    own = 'engine="0",model_name="smollm2",rank="0"'
    before = metrics()
    assert before[f'vllm:rmsq_norms{{{own},state="fused"}}'] == 60
    assert before[f'vllm:rmsq_norms{{{own},state="stock"}}'] == 1
    assert before[f'vllm:rmsq_activations{{{own},state="fused"}}'] == 30
    assert before[f'vllm:rmsq_linears{{{own},scheme="per-token"}}'] == 120
    assert before[f"vllm:rmsq_halved_linears{{{own}}}"] == 0
    info = next(name for name in before if name.startswith("vllm:rmsq_info"))
    assert f'backend="cpu",{own.partition(",")[0]},instruction_set="{cpu.isa()}"' in info
    assert f'target="trn2",version="{vllm_neuron_rmsq.__version__}"' in info
    # Not zero in every start: vLLM warms up on memory that nobody has written.
    invalid = f"vllm:rmsq_invalid_rows_total{{{own}}}"

    tokens = server.client.completions.create(
        model="smollm2", prompt="One, two,", max_tokens=8, temperature=0
    ).usage
    name = f"vllm:rmsq_packed_rows_total{{{own}}}"
    # In each layer two norms, SiLU times up, and the attention's output, which its projection quantizes. The
    # last token is not run. Prompts may be cached, tokens beside this request's are not.
    expected = before[name] + 30 * 4 * (tokens.completion_tokens - 1)
    deadline = time.monotonic() + 30
    while metrics()[name] < expected:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert metrics()[invalid] == before[invalid]


def test_bad_requests_do_not_stop_it(server):
    with pytest.raises(openai.BadRequestError):
        server.ask("word " * 2000)
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="another", prompt="x")
    assert "Paris" in server.ask(QUESTION)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"VLLM_RMSQ_BACKEND": "gpu"}, "VLLM_RMSQ_BACKEND: expected one of auto, nki, nki-sim, cpu, torch"),
        ({"VLLM_RMSQ_TARGTE": "trn2"}, "VLLM_RMSQ_TARGTE: unknown environment variable; expected one of"),
    ],
)
def test_misspelt_settings_stop_the_start(environment, message, smollm2_fp8, tmp_path):
    server = Server(smollm2_fp8, tmp_path, "--enforce-eager", **environment)
    try:
        assert server.process.wait(120) != 0
        assert message in server.text()
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, 9)


def test_a_model_path_that_is_not_there_stops_the_start(tmp_path):
    server = Server(tmp_path / "nothing", tmp_path, "--enforce-eager", HF_HUB_OFFLINE="1")
    try:
        assert server.process.wait(120) != 0
        assert str(tmp_path / "nothing") in server.text()
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, 9)
