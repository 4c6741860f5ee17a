"""When each instruction of a kernel would run: a MODEL, of in-order engines that wait for one another.

Every engine runs its instructions in program order, one after another, and so do two DMA queues: ``DMA in``
(whatever ends in SBUF) and ``DMA out`` (the rest). An instruction starts when its engine is free and all it
depends on, by bytes (``hazards.py``), is there:

* an instruction's result is there its own cycles and the pipeline's latency after its start; between engines
  a semaphore comes on top. On one engine only reading what an earlier instruction wrote waits for the
  pipeline;
* a transfer's result is there the DMA latency after its last byte. Transfers of both queues share the DMA
  engines' bandwidth; pieces that are small are charged as larger ones, and a tensor on few partitions keeps
  few DMA engines busy;
* VectorE's faster modes and GpSimdE use one port to SBUF: they exclude each other, the first come first.

What a launch takes beside that, ``hardware.LAUNCH_US``, is not in any figure here. Latencies are in
``hardware.py``, which says where each comes from; docs/kernels/cost_model.md has the errors against times
that AWS recorded for its own kernel.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .hardware import MEASURED, Latencies
from .hazards import READ_AFTER_WRITE, Hazards, Region

DMA_IN, DMA_OUT = "DMA in", "DMA out"
ENGINES = ("TensorE", "VectorE", "ScalarE", "GpSimdE", DMA_IN, DMA_OUT)
QUEUES = (DMA_IN, DMA_OUT)
LAUNCH = "launch"
"""What an engine waits for that has nothing to do until somebody else begins."""


@dataclass(slots=True)
class Instruction:
    """One instruction as it was issued.

    us: how long its engine, or all DMA engines together, is busy with it; careful_us: the same under the
    slower reading of VectorE's 16-bit modes. shared_port: whether it uses the port VectorE and GpSimdE share.
    depends: instructions it waits for, by index, and why (RAW, WAR or WAW). line: the kernel's source line.
    """

    name: str
    engine: str
    us: float
    careful_us: float
    shared_port: bool
    depends: dict[int, str]
    line: str


class Program:
    """The instructions of one program (one NeuronCore), in program order."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self._hazards = Hazards()

    def add(
        self,
        name: str,
        engine: str,
        us: float,
        careful_us: float,
        shared_port: bool,
        reads: list[Region],
        writes: list[Region],
        line: str,
    ) -> None:
        """The next instruction, and the bytes it touches."""
        depends = self._hazards.note(len(self.instructions), engine, reads, writes)
        self.instructions.append(Instruction(name, engine, us, careful_us, shared_port, depends, line))


@dataclass
class EngineTime:
    """What an engine did: microseconds busy, and waiting, by the engine it waited for."""

    instructions: int = 0
    busy_us: float = 0.0
    waits: dict[str, float] = field(default_factory=dict)

    @property
    def waiting_us(self) -> float:
        """Waiting between its instructions and before the first; not what comes after the last."""
        return sum(self.waits.values())


@dataclass(slots=True)
class Step:
    """When an instruction ran: start, the end of its engine's work, when its result was there (us).

    cause: index of the instruction it waited for last, or -1; waited_for: that one's engine.
    """

    instruction: Instruction
    start: float = 0.0
    end: float = 0.0
    done: float = 0.0
    cause: int = -1
    waited_for: str = LAUNCH
    waited_us: float = 0.0


class Schedule:
    """The outcome: ``us`` in all, ``steps`` one per instruction, ``engines`` by name."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.us = max((s.done for s in steps), default=0.0)
        self.engines: dict[str, EngineTime] = {}
        for step in steps:
            engine = self.engines.setdefault(step.instruction.engine, EngineTime())
            engine.instructions += 1
            engine.busy_us += step.end - step.start
            if step.waited_us > 0:
                engine.waits[step.waited_for] = engine.waits.get(step.waited_for, 0.0) + step.waited_us

    @property
    def busiest(self) -> str:
        """The engine with the most busy time."""
        return max(self.engines, key=lambda name: self.engines[name].busy_us, default="none")

    @property
    def critical_path(self) -> list[Step]:
        """The chain of instructions of which each waited for the one before, up to the last to be done."""
        chain: list[Step] = []
        index = max(range(len(self.steps)), key=lambda i: self.steps[i].done, default=-1)
        while index >= 0:
            chain.append(self.steps[index])
            index = self.steps[index].cause
        return chain[::-1]

    def __str__(self) -> str:
        lines = [f"scheduled: {self.us:.1f} us; busiest: {self.busiest}"]
        lines.append(f"{'engine':10}{'instructions':>14}{'busy':>12}{'waiting':>12}  on")
        for name in ENGINES:
            if name in self.engines:
                e = self.engines[name]
                on = ", ".join(f"{who} {us:.1f}" for who, us in sorted(e.waits.items(), key=lambda w: -w[1]))
                lines.append(
                    f"{name:10}{e.instructions:>14,}{e.busy_us:>9.1f} us{e.waiting_us:>9.1f} us  {on}"
                )
        path: dict[str, float] = defaultdict(float)
        chain = self.critical_path
        for step, following in zip(chain, [*chain[1:], None], strict=True):
            until = step.done if following is None else following.start
            path[step.instruction.engine] += until - step.start
        parts = ", ".join(f"{name} {us:.1f}" for name, us in sorted(path.items(), key=lambda p: -p[1]))
        lines.append(f"critical path, latencies included: {parts} us")
        return "\n".join(lines)

    def trace(self) -> dict[str, Any]:
        """The timeline as Chrome's trace JSON (``chrome://tracing``, https://ui.perfetto.dev)."""
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": name}}
            for i, name in enumerate(ENGINES)
        ]
        for index, step in enumerate(self.steps):
            what = step.instruction
            args = {
                "index": index,
                "line": what.line,
                "waited for": step.waited_for if step.waited_us > 0 else "",
                "waited us": step.waited_us,
                "result after us": step.done - step.end,
                "depends on": {str(i): why for i, why in what.depends.items()},
            }
            events.append({"ph": "X", "name": what.name, "cat": what.engine, "pid": 0,
                           "tid": ENGINES.index(what.engine), "ts": step.start,
                           "dur": step.end - step.start, "args": args})  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ns"}

    def write_trace(self, path: str | Path) -> None:
        """:meth:`trace` to a file."""
        Path(path).write_text(json.dumps(self.trace()))

    def draw(self, path: str | Path, title: str = "") -> None:
        """The timeline as a picture, one row per engine, one color per kind of instruction.

        Raises ModuleNotFoundError without matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 4), layout="constrained")
        axes = figure.add_subplot()
        names = sorted({s.instruction.name for s in self.steps})
        for color, name in enumerate(names):
            for row, engine in enumerate(ENGINES):
                bars = [
                    (s.start, s.end - s.start)
                    for s in self.steps
                    if s.instruction.name == name and s.instruction.engine == engine
                ]
                if bars:
                    axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=f"C{color % 10}",
                                     edgecolors="white", linewidth=0.2)  # fmt: skip
            axes.plot([], [], color=f"C{color % 10}", linewidth=6, label=name)
        axes.set_yticks(range(len(ENGINES)), ENGINES)
        axes.invert_yaxis()
        axes.set_xlim(0, self.us)
        axes.set_xlabel("us (MODEL of Trainium2, not a measurement)")
        axes.set_title(title)
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
        figure.savefig(path)


def schedule(
    program: Program, careful: bool = False, reorder: bool = False, latencies: Latencies = MEASURED
) -> Schedule:
    """Schedule `program`.

    careful: the slower reading of VectorE's 16-bit modes. reorder: an engine takes the first instruction
    that need not wait, whatever its place in the program, as a compiler that is free to reorder might
    have it; the bytes' order is kept. latencies: of ``hardware.py``.
    """
    return _Simulation(program.instructions, careful, reorder, latencies).run()


_READY, _DONE, _FREE = 0, 1, 2  # events: operands are there; an engine's work is done; a queue takes another


class _Simulation:
    """Discrete events: an instruction's operands are there, an engine is free, bytes have arrived."""

    def __init__(
        self, instructions: list[Instruction], careful: bool, reorder: bool, latencies: Latencies
    ) -> None:
        self.instructions, self.careful, self.reorder = instructions, careful, reorder
        self.latencies = latencies
        self.steps = [Step(i) for i in instructions]
        self.missing = [len(i.depends) for i in instructions]
        self.ready = [0.0] * len(instructions)  # when its operands are there
        self.cause = [-1] * len(instructions)
        self.users: list[list[int]] = [[] for _ in instructions]
        for index, instruction in enumerate(instructions):
            for before in instruction.depends:
                self.users[before].append(index)
        self.queue: dict[str, list[int]] = defaultdict(list)
        for index, instruction in enumerate(instructions):
            self.queue[instruction.engine].append(index)
        self.position = dict.fromkeys(self.queue, 0)
        self.available: dict[str, list[int]] = {engine: [] for engine in self.queue}
        self.running: dict[str, int] = dict.fromkeys(self.queue, -1)
        self.free: dict[str, float] = dict.fromkeys(self.queue, 0.0)
        self.latest: dict[str, int] = dict.fromkeys(self.queue, -1)
        self.moving: dict[str, float] = {}  # us of all DMA engines that a queue's transfer still needs
        self.now = 0.0
        self.events: list[tuple[float, int, int]] = []  # time, what, index

    def run(self) -> Schedule:
        for index, missing in enumerate(self.missing):
            if not missing:
                self.ready[index] = self.now
                heapq.heappush(self.events, (self.now, _READY, index))
        while self.events or self.moving:
            self._advance()
            while self.events and self.events[0][0] <= self.now:
                _, kind, index = heapq.heappop(self.events)
                engine = self.instructions[index].engine
                if kind == _READY:
                    heapq.heappush(self.available[engine], index)
                elif kind == _DONE:
                    self._end(index)
                else:
                    self._free(engine, index)
            self._start_all()
        return Schedule(self.steps)

    def _advance(self) -> None:
        """To the next event; the queues' transfers share the DMA engines evenly until then."""
        after = self.events[0][0] if self.events else float("inf")
        if not self.moving:
            self.now = after
            return
        engine = min(self.moving, key=lambda name: self.moving[name])
        arrival = self.now + self.moving[engine] * len(self.moving)
        until = min(after, arrival)
        share = (until - self.now) / len(self.moving)
        for name in self.moving:
            self.moving[name] = max(0.0, self.moving[name] - share)
        self.now = until
        if arrival <= after:
            del self.moving[engine]
            self._end(self.running[engine])

    def _start_all(self) -> None:
        heads = [(self._since(engine, index), index, engine)
                 for engine in self.queue if (index := self._head(engine)) >= 0]  # fmt: skip
        for _, index, engine in sorted(heads):
            if not self.instructions[index].shared_port or self._port_holder(engine) < 0:
                self._start(engine, index)

    def _head(self, engine: str) -> int:
        """The instruction `engine` can start now, or -1."""
        available = self.available[engine]
        if self.running[engine] >= 0 or not available:
            return -1
        in_order = self.queue[engine][self.position[engine]]
        return available[0] if self.reorder or available[0] == in_order else -1

    def _since(self, engine: str, index: int) -> float:
        return max(self.ready[index], self.free[engine])

    def _port_holder(self, engine: str) -> int:
        """The instruction of another engine that holds the port VectorE and GpSimdE share, or -1."""
        for other, index in self.running.items():
            if other != engine and index >= 0 and self.instructions[index].shared_port:
                return index
        return -1

    def _start(self, engine: str, index: int) -> None:
        heapq.heappop(self.available[engine])
        self.position[engine] += 1
        instruction, step = self.instructions[index], self.steps[index]
        step.start = self.now
        step.waited_us = self.now - self.free[engine]
        step.cause, since = self.latest[engine], self.free[engine]
        if self.ready[index] > since:
            step.cause, since = self.cause[index], self.ready[index]
        if self.now > since and instruction.shared_port:
            step.cause = max(
                (i for name, i in self.latest.items() if name != engine and i >= 0
                 and self.instructions[i].shared_port and self.steps[i].end == self.now),
                default=step.cause,
            )  # fmt: skip
        if step.cause >= 0:
            step.waited_for = self.instructions[step.cause].engine
        self.running[engine] = index
        us = instruction.careful_us if self.careful else instruction.us
        if engine in QUEUES:
            self.moving[engine] = us
        else:
            heapq.heappush(self.events, (self.now + us, _DONE, index))

    def _end(self, index: int) -> None:
        """Its work is done: the next one may start; results follow."""
        instruction, step = self.instructions[index], self.steps[index]
        engine = instruction.engine
        step.end = self.now
        step.done = step.end + self._latency(step)
        issued = step.start + self.latencies.dma_issue
        if engine in QUEUES and issued > self.now:
            heapq.heappush(self.events, (issued, _FREE, index))
        else:
            self._free(engine, index)
        for user in self.users[index]:
            there = step.done + self.latencies.semaphore
            if self.instructions[user].engine == engine:
                # In order behind it: only what it wrote has to come out of the pipeline first.
                there = step.done if self.instructions[user].depends[index] == READ_AFTER_WRITE else step.end
            if there >= self.ready[user]:
                self.ready[user], self.cause[user] = there, index
            self.missing[user] -= 1
            if not self.missing[user]:
                heapq.heappush(self.events, (max(self.now, self.ready[user]), _READY, user))

    def _free(self, engine: str, index: int) -> None:
        self.running[engine], self.free[engine], self.latest[engine] = -1, self.now, index

    def _latency(self, step: Step) -> float:
        """From the end of an instruction's work to its result."""
        engine, latencies = step.instruction.engine, self.latencies
        if engine in QUEUES:
            return latencies.dma
        tail = latencies.matmul * (step.end - step.start) if engine == "TensorE" else 0.0
        return latencies.pipeline[engine] + tail
