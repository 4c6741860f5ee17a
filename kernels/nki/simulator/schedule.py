"""When each instruction of a kernel would run: a MODEL, of in-order engines that wait for one another.

Every engine runs its instructions in program order, one after another, and so do two DMA queues: ``DMA in``
(whatever ends in SBUF) and ``DMA out`` (the rest). An instruction starts when its engine is free and all it
depends on, by bytes (``hazards.py``), is there:

* an instruction's result is there its own cycles and the pipeline's latency after its start; between engines
  a semaphore comes on top. On one engine only reading what an earlier instruction wrote waits for the
  pipeline;
* a queue issues one transfer after another; its bytes move some time later, behind those issued before, and
  the result is there some time after the last byte. Transfers of both queues share the DMA engines'
  bandwidth; pieces that are small are charged as larger ones, and a tensor on few partitions keeps few DMA
  engines busy;
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
        depends = self._hazards.note(len(self.instructions), reads, writes)
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

    cause: index of the instruction that kept it from starting earlier, or -1; waited_for: that one's engine;
    waited_us: how long its own engine had nothing to do for that.
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
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 4), layout="constrained")
        axes = figure.add_subplot()
        names = sorted({s.instruction.name for s in self.steps})
        for kind, name in enumerate(names):
            color = colormaps["tab20"](kind % 20)
            for row, engine in enumerate(ENGINES):
                bars = [
                    (s.start, s.end - s.start)
                    for s in self.steps
                    if s.instruction.name == name and s.instruction.engine == engine
                ]
                if bars:
                    axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=color,
                                     edgecolors="white", linewidth=0.2)  # fmt: skip
            axes.plot([], [], color=color, linewidth=6, label=name)
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


_READY, _DONE, _ISSUED, _BEGIN = range(4)
"""Events: an instruction's operands are there; an engine's work is done; a queue has issued a transfer; the
first byte of a transfer may move."""


class _Simulation:
    """Discrete events, and transfers that share the DMA engines between them."""

    def __init__(
        self, instructions: list[Instruction], careful: bool, reorder: bool, latencies: Latencies
    ) -> None:
        self.instructions, self.careful, self.reorder = instructions, careful, reorder
        self.latencies = latencies
        self.steps = [Step(i) for i in instructions]
        self.users: list[list[int]] = [[] for _ in instructions]
        self.queue: dict[str, list[int]] = defaultdict(list)
        for index, instruction in enumerate(instructions):
            self.queue[instruction.engine].append(index)
            for before in instruction.depends:
                self.users[before].append(index)
        self.missing = [len(i.depends) for i in instructions]
        self.ready = [0.0] * len(instructions)  # when its operands are there
        self.last_operand = [-1] * len(instructions)
        # Of each engine: instructions that could start, one that runs or is being issued, the one before.
        self.available: dict[str, list[int]] = {engine: [] for engine in self.queue}
        self.position = dict.fromkeys(self.queue, 0)
        self.running = dict.fromkeys(self.queue, -1)
        self.before = dict.fromkeys(self.queue, -1)
        self.free = dict.fromkeys(self.queue, 0.0)
        # Of each queue: transfers that wait, the one that moves and what it still needs of all DMA engines.
        self.waiting: dict[str, list[int]] = {engine: [] for engine in QUEUES}
        self.current: dict[str, int] = {}
        self.needs: dict[str, float] = {}
        self.through = dict.fromkeys(QUEUES, 0.0)
        self.through_with = dict.fromkeys(QUEUES, -1)
        self.now = 0.0
        self.events: list[tuple[float, int, int]] = []  # time, what, instruction

    def run(self) -> Schedule:
        for index, missing in enumerate(self.missing):
            if not missing:
                heapq.heappush(self.events, (0.0, _READY, index))
        while self.events or self.needs:
            self._advance()
            while self.events and self.events[0][0] <= self.now:
                _, what, index = heapq.heappop(self.events)
                engine = self.instructions[index].engine
                if what == _READY:
                    heapq.heappush(self.available[engine], index)
                elif what == _BEGIN:
                    self.waiting[engine].append(index)
                    self._move(engine)
                else:
                    self.running[engine], self.before[engine], self.free[engine] = -1, index, self.now
                    if what == _DONE:
                        self._end(index)
            self._start_all()
        return Schedule(self.steps)

    def _advance(self) -> None:
        """To the next event; the queues' transfers share the DMA engines evenly until then."""
        after = self.events[0][0] if self.events else float("inf")
        if not self.needs:
            self.now = after
            return
        first = min(self.needs, key=lambda engine: self.needs[engine])
        arrival = self.now + self.needs[first] * len(self.needs)
        until = min(after, arrival)
        share = (until - self.now) / len(self.needs)
        for engine in self.needs:
            self.needs[engine] = max(0.0, self.needs[engine] - share)
        self.now = until
        if arrival <= after:
            del self.needs[first]
            index = self.current.pop(first)
            self.through[first], self.through_with[first] = self.now, index
            self._end(index)
            self._move(first)

    def _start_all(self) -> None:
        heads = [(max(self.ready[index], self.free[engine]), index, engine)
                 for engine in self.queue if (index := self._head(engine)) >= 0]  # fmt: skip
        for _, index, engine in sorted(heads):
            if not self.instructions[index].shared_port or not self._port_taken(engine):
                self._start(engine, index)

    def _head(self, engine: str) -> int:
        """The instruction `engine` can start now, or -1."""
        available = self.available[engine]
        if self.running[engine] >= 0 or not available:
            return -1
        in_order = self.queue[engine][self.position[engine]]
        return available[0] if self.reorder or available[0] == in_order else -1

    def _port_taken(self, engine: str) -> bool:
        """Whether another engine holds the port that VectorE and GpSimdE share."""
        return any(
            index >= 0 and self.instructions[index].shared_port
            for other, index in self.running.items() if other != engine
        )  # fmt: skip

    def _start(self, engine: str, index: int) -> None:
        """An engine begins to work; a queue to issue a transfer."""
        heapq.heappop(self.available[engine])
        self.position[engine] += 1
        self.running[engine] = index
        instruction, step = self.instructions[index], self.steps[index]
        since, cause = max(
            (self.free[engine], self.before[engine]), (self.ready[index], self.last_operand[index])
        )
        if self.now > since:  # it was the port
            cause = max(
                before for other, before in self.before.items()
                if other != engine and before >= 0 and self.instructions[before].shared_port
                and self.free[other] == self.now
            )  # fmt: skip
        step.cause = cause
        if engine in QUEUES:
            heapq.heappush(self.events, (self.now + self.latencies.dma_issue, _ISSUED, index))
            heapq.heappush(self.events, (self.now + self.latencies.dma_start, _BEGIN, index))
            return
        step.start = self.now
        step.waited_us = self.now - self.free[engine]
        us = instruction.careful_us if self.careful else instruction.us
        heapq.heappush(self.events, (self.now + us, _DONE, index))

    def _move(self, queue: str) -> None:
        """The next transfer of `queue`, if one waits and none moves."""
        if queue in self.current or not self.waiting[queue]:
            return
        index = self.current[queue] = self.waiting[queue].pop(0)
        instruction, step = self.instructions[index], self.steps[index]
        self.needs[queue] = instruction.careful_us if self.careful else instruction.us
        step.start = self.now
        step.waited_us = self.now - self.through[queue]
        if not step.waited_us and self.through_with[queue] >= 0:
            step.cause = self.through_with[queue]

    def _end(self, index: int) -> None:
        """Its work is done; who needs the result learns when it is there."""
        instruction, step, latencies = self.instructions[index], self.steps[index], self.latencies
        engine = instruction.engine
        step.end = self.now
        if engine in QUEUES:
            step.done = step.end + latencies.dma_end
        else:
            tail = latencies.matmul * (step.end - step.start) if engine == "TensorE" else 0.0
            step.done = step.end + latencies.pipeline[engine] + tail
        if step.cause >= 0:
            step.waited_for = self.instructions[step.cause].engine
        for user in self.users[index]:
            there = step.done + latencies.semaphore
            if self.instructions[user].engine == engine:
                # In order behind it: only what it wrote has to come out of the pipeline first.
                there = step.done if self.instructions[user].depends[index] == READ_AFTER_WRITE else step.end
            if there >= self.ready[user]:
                self.ready[user], self.last_operand[user] = there, index
            self.missing[user] -= 1
            if not self.missing[user]:
                heapq.heappush(self.events, (self.ready[user], _READY, user))
