"""The scheduler on kernels small enough to schedule by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_neuron_rmsq.kernels.nki.rms_norm_quant import rms_norm_quant_bytes_kernel
from vllm_neuron_rmsq.kernels.nki.simulator import Zeros, cost, hardware, nki, scheduled_us
from vllm_neuron_rmsq.kernels.nki.simulator.hazards import Places
from vllm_neuron_rmsq.kernels.nki.simulator.nki import isa as nisa
from vllm_neuron_rmsq.kernels.nki.simulator.nki import language as nl

N = 960  # elements per lane: 1 us on VectorE at one a cycle, 0.8 us on ScalarE
V, S = 1.0, 0.8
LATENCIES = hardware.MEASURED
SEMAPHORE = LATENCIES.semaphore


def pipe(engine):
    return LATENCIES.pipeline[engine]


def tile(dtype=nl.float32, n=N):
    return nl.ndarray((128, n), dtype=dtype, buffer=nl.sbuf)


@nki.jit
def call(body, x, y):
    """A kernel that does what `body` says with two tensors in HBM."""
    body(x, y)


ZEROS = np.zeros((2, 128, 4096), np.float32)


def steps(body, **options):
    """The schedule of `body`."""
    return cost(call)(body, *ZEROS).schedule(**options)


def starts(schedule):
    return [step.start for step in schedule.steps]


def vector(dst, src):
    nisa.tensor_copy(dst, src, engine=nisa.engine.vector)


def scalar(dst, src):
    nisa.tensor_copy(dst, src, engine=nisa.engine.scalar)


def filled(dtype=nl.float32, n=N):
    t = tile(dtype, n)
    nisa.memset(t, 1.0)
    return t


def test_an_engine_runs_one_instruction_after_another():
    """No dependency: back to back, without the pipeline."""

    def body(x, y):
        filled()
        filled()

    assert starts(steps(body)) == pytest.approx([0, V])


def test_read_after_write_waits_for_the_pipeline_and_between_engines_for_a_semaphore():
    def body(x, y):
        a = filled()  # VectorE, 0
        vector(tile(), a)  # VectorE: the pipeline's latency later
        scalar(tile(), a)  # ScalarE: and a semaphore

    schedule = steps(body)
    assert starts(schedule) == pytest.approx([0, V + pipe("VectorE"), V + pipe("VectorE") + SEMAPHORE])
    assert [s.instruction.depends for s in schedule.steps] == [{}, {0: "RAW"}, {0: "RAW"}]
    assert schedule.us == pytest.approx(2 * V + 2 * pipe("VectorE"))


def test_write_after_read_and_write_after_write():
    def body(x, y):
        a, b = filled(), tile()
        scalar(b, a)  # 1: reads a, writes b
        nisa.memset(a, 2.0)  # 2: VectorE may not overwrite a before ScalarE has read it
        nisa.memset(b, 3.0)  # 3: nor b before ScalarE has written it; 2 is through by then

    schedule = steps(body)
    second = V + pipe("VectorE") + SEMAPHORE
    third = second + S + pipe("ScalarE") + SEMAPHORE
    assert starts(schedule) == pytest.approx([0, second, third, third + V])
    assert schedule.steps[2].instruction.depends == {0: "WAW", 1: "WAR"}
    assert schedule.steps[3].instruction.depends == {1: "WAW"}


def test_bytes_not_tensors_decide():
    """Other columns, other partitions and the other half of interleaved elements are no dependency."""

    def body(x, y):
        a = filled()
        scalar(a[:, 0 : N // 2], a[:, 0 : N // 2])  # 1
        nisa.memset(a[:, N // 2 : N], 2.0)  # 2
        nisa.memset(a[64:128, 0 : N // 2], 2.0)  # 3: overlaps
        b = filled()  # 4
        scalar(b[:, 0:N:2], b[:, 0:N:2])  # 5
        nisa.memset(b[:, 1:N:2], 2.0)  # 6
        scalar(b[0:64, :], b[0:64, :])  # 7
        nisa.memset(b[64:128, :], 2.0)  # 8

    depends = [s.instruction.depends for s in steps(body).steps]
    assert 1 not in depends[2] and depends[3][1] == "WAR"
    assert 5 not in depends[6]
    assert 5 in depends[7] and depends[7][6] == "RAW"
    assert 7 not in depends[8]


def test_a_tensor_at_a_dead_ones_address_waits_for_its_readers():
    """SBUF is reused: next fit, so only once the addresses have come round."""
    size = hardware.TARGETS["trn2"].sbuf_bytes // 2 // 4

    def body(x, y):
        for _ in range(3):
            t = tile(n=size)
            nisa.memset(t, 1.0)
            scalar(t, t)
            del t

    depends = [s.instruction.depends for s in steps(body).steps]
    assert depends[2] == {} and depends[4] == {1: "WAR"}


def test_an_engine_in_order_stalls_behind_a_waiting_instruction():
    """ScalarE waits for VectorE with work at hand; free to reorder, it would do that first."""

    def body(x, y):
        a, b = filled(), tile()  # VectorE 0
        vector(b, a)  # VectorE 1
        scalar(tile(), b)  # ScalarE, waits for both
        scalar(tile(), a)  # ScalarE, could run after the first

    first = V + pipe("VectorE")
    schedule = steps(body)
    late = first + V + pipe("VectorE") + SEMAPHORE
    assert starts(schedule) == pytest.approx([0, first, late, late + S])
    assert schedule.engines["ScalarE"].waits == pytest.approx({"VectorE": late})
    assert starts(steps(body, reorder=True)) == pytest.approx([0, first, late, first + SEMAPHORE])


def test_a_free_order_keeps_the_bytes_order():
    """ScalarE's second reading of a may come first; what overwrites a waits for both all the same."""

    def body(x, y):
        a, b = filled(), tile()
        vector(b, a)
        nisa.activation(tile(), nl.copy, a, scale=b[:, 0:1])  # 2: waits for VectorE 1
        scalar(tile(), a)  # 3: need not
        nisa.memset(a, 2.0, engine=nisa.engine.gpsimd)

    schedule = steps(body, reorder=True)
    assert schedule.steps[3].start < schedule.steps[2].start
    assert schedule.steps[4].start > max(schedule.steps[i].end for i in (1, 2, 3))


def test_queues_share_the_bandwidth_and_have_a_latency():
    rows, columns = 128, 4096
    us = rows * columns * 4 / (16 * 23.0) / 1e3

    def body(x, y):
        a = tile(n=columns)
        nisa.dma_copy(dst=a, src=x)  # in: alone
        b = tile(n=columns)
        nisa.dma_copy(dst=b, src=x)  # in: after the first's bytes, not after its latency
        nisa.dma_copy(dst=y, src=a)  # out: after the first's latency, sharing with the second

    schedule = steps(body)
    first = LATENCIES.dma_start
    out = first + us + LATENCIES.dma_end + SEMAPHORE + LATENCIES.dma_start
    assert starts(schedule) == pytest.approx([first, first + us, out])
    left = first + 2 * us - out  # what the second still needs when the third starts; then each has half
    assert left > 0
    assert schedule.steps[1].end == pytest.approx(out + 2 * left)
    assert schedule.steps[2].end == pytest.approx(first + 3 * us)
    assert schedule.us == pytest.approx(schedule.steps[2].end + LATENCIES.dma_end)


def test_small_pieces_are_charged_as_larger_ones():
    def body(x, y):
        nisa.dma_copy(dst=nl.ndarray((128, 1), dtype=nl.float32, buffer=nl.sbuf), src=x[:, 0:1])

    report = steps(body)
    step = report.steps[0]
    assert step.end - step.start == pytest.approx(128 * 512 / (16 * 23.0) / 1e3)


def test_few_partitions_keep_few_dma_engines_busy():
    """One engine moves 8 partitions: 4 rows take as long as 8, and 12 as long as 16."""

    def body(x, y):
        for rows in (4, 8, 12, 128):
            t = nl.ndarray((rows, 4096), dtype=nl.float32, buffer=nl.sbuf)
            nisa.dma_copy(dst=t, src=x[0:rows, :])

    schedule = steps(body)
    us = 8 * 4096 * 4 / 23.0 / 1e3
    assert [s.end - s.start for s in schedule.steps] == pytest.approx([us / 2, us, us * 12 / 16, us])


def test_transposes_move_128_partitions_of_16_elements_at_a_time():
    def body(x, y):
        for columns, rows in ((128, 16), (64, 16), (128, 1), (128, 20)):
            t = nl.ndarray((columns, rows), dtype=nl.float32, buffer=nl.sbuf)
            nisa.dma_transpose(t, x[0:rows, 0:columns])

    us = 128 * 16 * 4 / (368e3 * hardware.DMA_TRANSPOSE_FROM_HBM)
    spans = [s.end - s.start for s in steps(body).steps]
    assert spans == pytest.approx([us, us, us, 2 * us])


def test_a_queue_issues_one_transfer_after_another():
    """Small transfers follow one another as they are issued; behind a long one they are issued meanwhile."""

    def body(x, y):
        for n in (128, 128, 4096, 128, 128):
            nisa.dma_copy(dst=tile(n=n), src=x[:, 0:n])

    first, issue = LATENCIES.dma_start, LATENCIES.dma_issue
    small, long = 128 * 512 / 368e3, 128 * 4 * 4096 / 368e3
    after = first + 2 * issue + long
    expected = [first, first + issue, first + 2 * issue, after, after + small]
    schedule = steps(body)
    assert starts(schedule) == pytest.approx(expected)
    assert schedule.engines["DMA in"].waits == pytest.approx({"launch": first, "DMA in": 2 * (issue - small)})
    documented = steps(body, latencies=hardware.DOCUMENTED)
    assert starts(documented)[1] == pytest.approx(hardware.DOCUMENTED.dma_start + small)


def test_a_matmul_results_twice_its_length_later():
    def body(x, y):
        a = filled(nl.bfloat16, 512)
        product = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(product, a[:, 0:128], a)
        vector(tile(n=512), product)

    matmul = steps(body).steps[1]
    assert matmul.end - matmul.start == pytest.approx(512 / 2.4e3)
    assert matmul.done - matmul.end == pytest.approx(pipe("TensorE") + 512 / 2.4e3)


def test_fast_modes_of_vectore_and_gpsimde_exclude_each_other():
    def body(dtype):
        a, b = filled(dtype), filled(dtype)
        nisa.memset(tile(n=3 * N), 1.0, engine=nisa.engine.gpsimd)
        vector(b, a)
        nisa.memset(tile(), 1.0, engine=nisa.engine.gpsimd)

    slow = steps(lambda x, y: body(nl.float32))
    fast = steps(lambda x, y: body(nl.bfloat16))
    gpsimd = (150 + 3 * N) / 1.2e3
    assert gpsimd > 2 * V
    assert starts(slow) == pytest.approx([0, V, 0, 2 * V, gpsimd])
    # When the first of GpSimdE ends, VectorE has waited for longer than the second: its turn.
    assert starts(fast) == pytest.approx([0, V, 0, gpsimd, gpsimd + V / 4])
    assert fast.engines["VectorE"].waits == pytest.approx({"GpSimdE": gpsimd - 2 * V})
    assert fast.engines["GpSimdE"].waits == pytest.approx({"VectorE": V / 4})


def test_both_readings_of_the_16_bit_modes():
    def body(x, y):
        a, b = filled(nl.float16), filled(nl.float16)
        nisa.tensor_tensor(b, a, b, nl.multiply)

    first, careful = steps(body), steps(body, careful=True)
    assert [s.steps[2].end - s.steps[2].start for s in (first, careful)] == pytest.approx([V / 2, V])
    assert careful.us - first.us == pytest.approx(V / 2)


def test_scheduled_us_is_a_number_found_once_for_a_call():
    calls = []

    def body(x, y):
        calls.append(x.shape)
        a, b = filled(nl.float16), filled(nl.float16)
        nisa.tensor_tensor(b, a, b, nl.multiply)

    x, y = Zeros((128, 4096), "float32"), Zeros((1,), "bfloat16")
    first = scheduled_us(call, 1, body, x=x, y=y)
    careful = scheduled_us(call, 1, body, x=x, y=y, careful=True)
    assert (first, careful) == pytest.approx((steps(body).us, steps(body, careful=True).us))
    assert calls == [(128, 4096)] * 3  # one of them for both numbers


def test_a_schedule_says_who_waits_for_whom():
    def body(x, y):
        a = filled()
        scalar(a, a)
        vector(a, a)

    schedule = steps(body)
    busy = {name: (e.instructions, e.busy_us) for name, e in schedule.engines.items()}
    assert busy == {"VectorE": (2, pytest.approx(2 * V)), "ScalarE": (1, pytest.approx(S))}
    assert schedule.busiest == "VectorE"
    there, back = V + pipe("VectorE") + SEMAPHORE, S + pipe("ScalarE") + SEMAPHORE
    assert schedule.engines["ScalarE"].waits == pytest.approx({"VectorE": there})
    assert schedule.engines["VectorE"].waits == pytest.approx({"ScalarE": there + back - V})
    assert [s.instruction.name for s in schedule.critical_path] == ["memset", "tensor_copy", "tensor_copy"]
    assert "busiest: VectorE" in str(schedule) and "test_schedule.py" in schedule.steps[0].instruction.line


def test_a_schedule_draws_itself(tmp_path):
    def body(x, y):
        scalar(tile(), filled())

    schedule = steps(body)
    schedule.draw(tmp_path / "timeline.png", "two instructions")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    schedule.write_trace(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [(rows[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    there = V + pipe("VectorE") + SEMAPHORE
    assert spans == [
        ("VectorE", "memset", 0, pytest.approx(V)),
        ("ScalarE", "tensor_copy", pytest.approx(there), pytest.approx(S)),
    ]


@pytest.mark.parametrize("latencies", [hardware.MEASURED, hardware.DOCUMENTED])
@pytest.mark.parametrize("reorder", [False, True])
def test_a_kernel_takes_at_least_its_floor_and_always_the_same(latencies, reorder):
    hidden, weight = np.zeros((300, 1024), np.float16), np.zeros(1024, np.float16)
    one, two = (cost(rms_norm_quant_bytes_kernel, 2)(hidden, weight) for _ in range(2))
    first, careful = (one.schedule(careful, reorder, latencies) for careful in (False, True))
    assert one.time_us < first.us <= careful.us
    again = two.schedule(False, reorder, latencies)
    assert [(s.start, s.done, s.cause) for s in again.steps] == [
        (s.start, s.done, s.cause) for s in first.steps
    ]
    for step in first.steps:  # nobody starts before what he depends on has at least ended
        assert all(first.steps[i].end <= step.start for i in step.instruction.depends)
    for name, engine in first.engines.items():
        last = max(s.end for s in first.steps if s.instruction.engine == name)
        assert engine.busy_us + engine.waiting_us == pytest.approx(last)


def test_addresses_go_round():
    places = Places()
    first, second = places.take(60, 100), places.take(30, 100)
    assert (first, second) == (0, 60)
    places.give(first)
    assert places.take(10, 100) == 90  # from the last one's end on, though there is room before
    assert places.take(20, 100) == 0
    assert places.take(90, 100) > 100  # room enough, but not in one piece: an address of its own
